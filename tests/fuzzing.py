"""Inputs nobody would write, and what must hold of every answer to them: the documented error, or an answer."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from simulator import cli
from simulator.data import data_path
from simulator.hardware import catalog as gpus
from simulator.hf import catalog, load_model
from simulator.model import ModelSpec

NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([0, 1, 7, 64, 4096, 10**9, 2**63, 1e308]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["yarn", "mamba", "full_attention", "sliding_attention", "fp8", "auto"]))
JSON = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)), max_leaves=8
)
CONFIGS = {name: json.loads(data_path("models", name.replace("/", "--") + ".json").read_text("utf-8")) for name in catalog()}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config of the catalog with some keys changed, exchanged or gone; seldom one of nothing but noise."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.dictionaries(st.text(max_size=12), JSON, max_size=6))
    config = json.loads(json.dumps(CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]))
    inner = [config, *(value for value in config.values() if isinstance(value, dict) and value)]
    for _ in range(draw(st.integers(1, 4))):
        table = draw(st.sampled_from(inner))
        if not table:
            continue
        key = draw(st.sampled_from(sorted(table)))
        change = draw(st.integers(0, 3))
        if change == 0:
            del table[key]
        elif change == 1:
            table[key] = draw(JSON)
        elif change == 2:
            table[key] = table[draw(st.sampled_from(sorted(table)))]
        else:
            table[draw(st.text(max_size=12))] = draw(JSON)
    return config


def check_config(config: dict[str, Any]) -> None:
    """A model, or one line; of a model, its sizes are numbers."""
    try:
        model = load_model(config)
    except ValueError as refusal:
        assert "\n" not in str(refusal), str(refusal)
        return
    assert isinstance(model, ModelSpec)
    assert float(model.parameters()) > 0
    assert float(model.cache_bytes(131072.0)) >= 0


MODELS = st.one_of(st.sampled_from(["Llama-3.1-8B", "gpt-oss-20b", "DeepSeek-V2-Lite", "Qwen3-Next-80B-A3B", "Jamba-v0.1"]), st.sampled_from(catalog()), st.text(max_size=12))
VALUES = st.one_of(
    st.sampled_from(["1", "2", "8", "0", "-1", "3", "1M", "128K", "0.5", "1e9", "nan", "inf", "fp8", "bf16", "nvfp4", "kivi-2", "h100", "", "vllm", "decode", "prefill", "name"]),
    st.sampled_from(gpus()), st.integers().map(str), st.floats().map(str), st.text(max_size=6),
)  # fmt: skip
OPTIONS = (
    "--gpu", "--gpus", "--context", "--concurrency", "--output", "--prefix-hit", "--tp", "--pp", "--dp", "--ep", "--dcp", "--dp-attention", "--weights", "--cache",
    "--block-size", "--memory-fraction", "--chunk", "--price", "--phase", "--batch", "--prefix", "--engine", "--top", "--sort", "--match", "--tokens", "--heads",
    "--kv-heads", "--head-dim", "--m", "--n", "--k", "--dtype", "--window", "--sequences", "--exit-zero", "--json", "--head-types", "--backward", "--nonsense",
)  # fmt: skip
FLAGS = {"--exit-zero", "--json", "--head-types", "--backward"}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A verb and words that may or may not belong to it."""
    verb = draw(st.sampled_from([["size"], ["kv"], ["estimate"], ["explain"], ["diff"], ["models"], ["compare"], ["gpus"], ["kernel", "gemm"], ["kernel", "attention"]]))
    words = list(verb)
    if verb[0] in ("size", "kv", "estimate", "explain", "compare") and draw(st.integers(0, 9)):
        words.append(draw(MODELS))
    if verb[0] == "diff":
        words += [" ".join(draw(st.lists(st.one_of(MODELS, st.sampled_from(OPTIONS), VALUES), max_size=4))) for _ in range(2)]
    own = {"--" + name.replace("_", "-") for command in [_command(verb)] for name in (p.name or "" for p in command.params)}
    for _ in range(draw(st.integers(0, 4))):
        option = draw(st.sampled_from(sorted(own & {*OPTIONS}) or OPTIONS)) if draw(st.integers(0, 7)) else draw(st.sampled_from(OPTIONS))
        words += [option] if option in FLAGS else [option, draw(VALUES)]
    return words


def _command(verb: list[str]) -> Any:
    found: Any = cli.main
    for name in verb:
        found = found.get_command(mock.Mock(), name)
    return found


def check_command_line(words: list[str]) -> None:
    """Exit code 0, 2 or 3; with 2 nothing on stdout and one line on stderr, unless help was asked for."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["longctx", *words]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run()
        except SystemExit as left:
            code = left.code or 0
    assert code in (0, 2, 3), (words, code)
    if code == 2:
        assert out.getvalue() == "", words
        assert err.getvalue().startswith("error: "), words
        assert err.getvalue().rstrip("\n").count("\n") == 0, (words, err.getvalue())
    elif "--json" in words and "-h" not in words:
        json.loads(out.getvalue())


__all__ = ["check_command_line", "check_config", "command_lines", "configs"]
