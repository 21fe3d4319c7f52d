"""The command line: what it prints, in which keys, with which exit code, and how it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import simulator
from simulator import cli
from simulator.data import data_path
from simulator.hardware import catalog as gpus
from tests.support import EVERY, MAIN

LLAMA, LLAMA_8B, V3 = "meta-llama/Meta-Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-8B", "deepseek-ai/DeepSeek-V3"
BASES = {"measured", "calibrated", "analytic", "assumed"}


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Say = Callable[..., Said]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `longctx` in this process, through its entry point."""

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["longctx", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.run()
        out, err = capsys.readouterr()
        return Said(int(left.value.code or 0), out, err)

    return run


def refused(said: Said, *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that names what is wrong."""
    assert said.code == 2, said
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.endswith("\n")
    assert said.err.count("\n") == 1, said.err
    for word in words:
        assert word in said.err, said.err


# ---- the contract: these keys, no others (DESIGN.md, public surface)

VALUE = {"value", "low", "high", "basis"}
HEAD = {"schema_version", "tool_version", "inputs", "warnings"}
ENGINE = {
    "title", "version", "bytes_per_sequence", "bytes_per_sequence_per_gpu", "capacity_tokens", "max_concurrency", "replicas", "prefix_tokens", "log", "note",
}  # fmt: skip
SECONDS = VALUE | {"lower", "upper"}
SIZE = HEAD | {
    "fits", "verdict", "binding_constraint", "layout", "memory_bytes_per_gpu", "cache", "max_context_tokens", "max_context_layout", "max_concurrency",
    "whole_sequences", "smallest_gpus", "ttft_s", "ttft_cached_s", "tpot_s", "tokens_per_s_per_gpu", "input_tokens_per_s_per_gpu",
    "cost_usd_per_million_tokens", "cost_usd_per_request", "energy_j_per_token", "energy_j_per_input_token", "alternatives", "tie",
    "refused_layouts", "prefill_context", "cache_moves", "launch", "calibration",
}  # fmt: skip
LAYOUT = {
    "name", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "expert_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size",
    "attention_data_parallel_size",
}  # fmt: skip
MEMORY = {"weights", "cache", "activations", "workspace", "engine", "total", "usable"}
SIZE_INPUTS = {
    "model", "gpu", "gpus", "context", "concurrency", "output", "prefix_hit", "weights", "cache", "block_size", "memory_fraction", "chunk", "max_num_seqs",
    "engine", "price_usd_per_gpu_hour", "price_source",
}  # fmt: skip
ESTIMATE = HEAD | {"seconds", "flops", "model_flops", "hbm_bytes", "wire_bytes", "memory_bytes_per_gpu", "rows", "calibration"}
ROW = {"name", "kernel", "impl", "dtype", "count", "seconds", "lower", "flops", "model_flops", "hbm_bytes", "wire_bytes", "bound_by", "basis"}
KERNEL = HEAD | {"flops", "model_flops", "hbm_bytes", "seconds", "bound_by", "calibration", "source", "launched"}
KV = HEAD | {"bytes_per_token", "fixed_bytes", "bytes_per_sequence", "layers", "engines", "reach"}
REACH = {
    "trained_tokens", "declared_tokens", "effective_tokens", "effective_at_least", "effective_measure", "effective_source", "positions",
}  # fmt: skip
KV_LAYER = {"count", "kind", "keeps", "row_bytes", "stored_tokens", "bytes_per_sequence"}


def intervals(document: Any) -> Iterator[dict[str, Any]]:
    """Every {value, low, high, basis} of a document."""
    if isinstance(document, dict):
        if {"value", "basis"} <= document.keys():
            yield document
        for value in document.values():
            yield from intervals(value)
    elif isinstance(document, list):
        for value in document:
            yield from intervals(value)


def check_intervals(document: dict[str, Any], number: int) -> None:
    found = list(intervals(document))
    assert len(found) == number
    for one in found:
        assert one.keys() in (VALUE, SECONDS)
        assert one["basis"] in BASES
        assert 0 < one["low"] <= one["value"] <= one["high"]


def test_the_keys_of_size_are_frozen(say: Say) -> None:
    said = say("size", V3, "--gpus", 16, "--context", "1M", "--json")
    found = said.document
    assert said.code == 0
    assert said.err == ""
    assert found.keys() == SIZE
    assert found["layout"].keys() == LAYOUT
    assert found["memory_bytes_per_gpu"].keys() == MEMORY
    assert found["cache"].keys() == {"bytes_per_token", "fixed_bytes", "bytes_per_sequence", "engines"}
    assert found["cache"]["engines"].keys() == {"vllm", "sglang", "tensorrt_llm"}
    assert all(engine.keys() == ENGINE for engine in found["cache"]["engines"].values())
    assert found["cost_usd_per_million_tokens"].keys() == {"input", "cached", "output"}
    assert found["launch"].keys() == {"vllm", "notes"}
    assert found["inputs"].keys() == SIZE_INPUTS
    for key in ("ttft_s", "tpot_s", "tokens_per_s_per_gpu", "energy_j_per_token"):
        assert found[key].keys() == VALUE
    check_intervals(found, 11)


def test_size_keeps_its_keys_where_nothing_fits(say: Say) -> None:
    said = say("size", LLAMA, "--gpus", 1, "--context", "128K", "--json")
    assert said.code == 3
    assert said.document.keys() == SIZE
    assert said.document["fits"] is False
    assert said.document["binding_constraint"] in ("weights", "cache")
    assert said.document["launch"]["vllm"] is None
    assert said.document["ttft_s"] is None
    check_intervals(said.document, 0)


def test_the_keys_of_kv_are_frozen(say: Say) -> None:
    found = say("kv", "gpt-oss-20b", "--json").document
    assert found.keys() == KV
    assert all(layer.keys() == KV_LAYER for layer in found["layers"])
    assert found["engines"].keys() == {"vllm", "sglang", "tensorrt_llm"}
    assert all(engine.keys() == ENGINE for engine in found["engines"].values())
    assert found["reach"].keys() == REACH
    assert found["inputs"].keys() == {"model", "gpu", "gpus", "context", "layout", "cache", "block_size", "memory_fraction", "chunk", "engine"}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_keys_of_estimate_are_frozen(say: Say, phase: str) -> None:
    found = say("estimate", LLAMA, "--tp", 8, "--phase", phase, "--context", "32K", "--json").document
    assert found.keys() == ESTIMATE
    assert found["seconds"].keys() == SECONDS
    assert found["memory_bytes_per_gpu"].keys() == {"weights", "cache", "activations", "total"}
    assert all(row.keys() == ROW for row in found["rows"])
    assert found["inputs"].keys() == {"model", "gpu", "gpus", "layout", "phase", "context", "batch", "prefix", "chunk", "engine", "weights", "cache"}
    check_intervals(found, 1)
    assert sum(row["seconds"] for row in found["rows"]) == pytest.approx(found["seconds"]["value"], rel=1e-9)


@pytest.mark.parametrize(
    ("words", "inputs"),
    [
        (["gemm", "--m", 8, "--n", 8192, "--k", 8192], {"gpu", "kernel", "m", "n", "k", "dtype"}),
        (
            ["attention", "--tokens", 4096, "--heads", 64, "--kv-heads", 8],
            {"gpu", "kernel", "impl", "sequences", "tokens", "context", "heads", "kv_heads", "head_dim", "v_head_dim", "window", "backward", "dtype"},
        ),
    ],
    ids=["gemm", "attention"],
)
def test_the_keys_of_kernel_are_frozen(say: Say, words: list[object], inputs: set[str]) -> None:
    found = say("kernel", *words, "--json").document
    assert found.keys() == KERNEL
    assert found["seconds"].keys() == SECONDS
    assert found["launched"].keys() == {"tensor_flops", "hbm_bytes", "tiles", "depth"}
    assert found["inputs"].keys() == inputs
    check_intervals(found, 1)


@pytest.mark.parametrize(("gpu", "tokens", "told"), [("h200", "64K", "flash4"), ("h200", "1", "triton"), ("b200", "64K", "no implementation is told apart")])
def test_an_implementation_nobody_knows_is_refused_by_name(say: Say, gpu: str, tokens: str, told: str) -> None:
    words = ("kernel", "attention", "--gpu", gpu, "--tokens", tokens, "--context", "64K", "--heads", "32", "--kv-heads", "8", "--impl")
    refused(say(*words, "flsh4"), "--impl flsh4", told)
    if gpu == "h200":
        assert say(*words, "flash2").code == 0


VERBS = [
    ["size", LLAMA_8B, "--context", "32K"], ["kv", LLAMA_8B], ["estimate", LLAMA_8B, "--context", "8K"], ["estimate", LLAMA_8B, "--phase", "decode", "--engine", "vllm"],
    ["kernel", "gemm", "--m", 1, "--n", 2, "--k", 3], ["kernel", "attention", "--tokens", 1, "--context", "128K", "--heads", 8],
]  # fmt: skip
every_verb = pytest.mark.parametrize("words", VERBS, ids=lambda w: " ".join(map(str, w)))


@every_verb
def test_json_is_one_document_and_nothing_else(say: Say, words: list[object]) -> None:
    said = say(*words, "--json")
    assert said.code == 0
    assert said.err == ""
    assert said.document["schema_version"] == "1"
    assert said.document["tool_version"] == simulator.__version__
    assert isinstance(said.document["warnings"], list)
    assert "NaN" not in said.out
    assert "Infinity" not in said.out


@every_verb
def test_people_get_a_table_without_exponents_or_unknowns(say: Say, words: list[object]) -> None:
    said = say(*words)
    assert said.code == 0
    assert said.err == ""
    assert said.out.strip()
    for word in ("nan", "inf ", "None", "e+", "e-0", "Traceback"):
        assert word not in said.out.replace("inference", ""), word
    assert "\x1b" not in said.out


def test_an_answer_names_its_inputs_in_full(say: Say) -> None:
    found = say("size", LLAMA_8B, "--context", "1m", "--gpus", 8, "--tp", 8, "--output", "2K", "--price", "2.5", "--json").document
    assert found["inputs"] | {"context": 1_000_000, "output": 2048, "tp": 8, "price_usd_per_gpu_hour": 2.5, "price_source": "given", "gpu": "h200_sxm"} == found["inputs"]


def test_a_ring_is_estimated_as_asked(say: Say) -> None:
    found = say("estimate", LLAMA, "--tp", 8, "--cp", 4, "--cp-passing", "q", "--cp-order", "striped", "--context", "128K", "--json").document
    assert found["inputs"] | {"layout": "TP8 x CP4", "gpus": 32, "passing": "q", "order": "striped"} == found["inputs"]
    names = {row["name"] for row in found["rows"]}
    assert {"ring queries", "return outputs"} <= names
    exchanged = say("estimate", LLAMA, "--tp", 8, "--ulysses", 4, "--context", "128K", "--json").document
    assert {"tokens to heads", "heads to tokens"} <= {row["name"] for row in exchanged["rows"]}
    helix = say("estimate", LLAMA, "--tp", 8, "--helix", 4, "--phase", "decode", "--context", "128K", "--json").document
    assert "hand over outputs" in {row["name"] for row in helix["rows"]}


# ---- exit codes


def test_exit_codes_say_whether_it_fits(say: Say) -> None:
    fits, short = ["size", LLAMA_8B, "--context", "32K"], ["size", LLAMA, "--context", "128K"]
    assert say(*fits).code == 0
    assert say(*short).code == 3
    assert say(*short, "--json").code == 3
    assert say(*short, "--exit-zero").code == 0
    assert say("size", "no-such-model").code == 2


def test_a_real_process_exits_the_same() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "simulator", *words], capture_output=True, text=True, check=False, timeout=60)

    fits, short, bad = run("kv", "gpt-oss-20b", "--json"), run("size", LLAMA, "--json"), run("size", "no-such-model")
    assert (fits.returncode, short.returncode, bad.returncode) == (0, 3, 2)
    assert json.loads(fits.stdout)["bytes_per_token"] == 24_576
    assert fits.stderr == short.stderr == bad.stdout == ""
    assert bad.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-m", "simulator", "size", LLAMA_8B], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read().decode()
        process.wait(timeout=60)
    assert "Traceback" not in told


@pytest.mark.parametrize("words", [["--help"], ["size", "--help"], ["kv", "-h"], ["estimate", "-h"], ["kernel", "-h"], ["kernel", "gemm", "-h"], ["kernel", "attention", "-h"]], ids=str)
def test_help_is_no_error(say: Say, words: list[str]) -> None:
    said = say(*words)
    assert said.code == 0
    assert said.err == ""
    assert "Usage:" in said.out


def test_the_version_is_told_from_a_checkout_too(say: Say) -> None:
    said = say("--version")
    assert said.code == 0
    assert simulator.__version__ in said.out


@pytest.mark.parametrize("words", [[], ["kernel"]], ids=["nothing", "kernel"])
def test_a_verb_without_its_noun_shows_help_or_says_one_line(say: Say, words: list[str]) -> None:
    said = say(*words)
    if said.code == 0:
        assert "Usage:" in said.out
    else:
        refused(said)


# ---- bad input

BAD: list[tuple[list[object], list[str]]] = [
    (["size", "no-such-model"], ["no-such-model", "not in the catalog", "config.json"]),
    (["size", "DeepSeek-V33"], ["DeepSeek-V33", "did you mean", "DeepSeek-V3"]),
    (["size", "Llama"], ["several match"]),
    (["size", LLAMA, "--tp", 6, "--gpus", 6], ["--tp 6", "64 attention heads", "1, 2, 4, 8, 16, 32, 64"]),
    (["estimate", LLAMA, "--tp", 6], ["--tp 6", "64 attention heads"]),
    (["size", LLAMA, "--cp", 4], ["--cp 4", "multi-head latent attention", "compare-cp"]),
    (["size", "DeepSeek-V3", "--gpus", 16, "--cp", 4, "--tp", 4, "--cp-passing", "kv"], ["--cp-passing kv", "gather"]),
    (["size", "DeepSeek-V3", "--gpus", 16, "--cp-passing", "gather"], ["--cp-passing gather", "give --cp too"]),
    (["size", "DeepSeek-V3", "--gpus", 16, "--tp", 4, "--ulysses", 4], ["--ulysses 4", "vLLM", "--tp"]),
    (["size", LLAMA, "--tp", 8, "--helix", 4], ["--helix 4", "vLLM", "--dcp"]),
    (["estimate", LLAMA, "--phase", "train", "--prefix", "4K"], ["--prefix 4096", "leave it out"]),
    (["estimate", LLAMA, "--zero", 3], ["--zero 3", "--phase train"]),
    (["estimate", LLAMA, "--phase", "train", "--dp", 4, "--batch", 6], ["--batch 6", "--dp 4"]),
    (["explain", LLAMA, "--phase", "train"], ["--phase train", "estimate"]),
    (["estimate", LLAMA, "--cp", 4, "--cp-passing", "round"], ["--cp-passing", "round"]),
    (["estimate", LLAMA, "--cp", 4, "--cp-holds", "whole"], ["--cp-passing kv", "--cp-holds share"]),
    (["estimate", LLAMA, "--tp", 8, "--ulysses", 16], ["--ulysses 16", "8 attention heads", "1, 2, 4, 8"]),
    (["kv", LLAMA, "--tp", 6], ["--tp 6", "64 attention heads"]),
    (["size", LLAMA, "--tp", -1], ["--tp", "-1"]),
    (["size", LLAMA, "--tp", 0], ["--tp", "0"]),
    (["size", LLAMA, "--tp", 2.5], ["--tp", "2.5"]),
    (["size", LLAMA, "--gpus", 0], ["--gpus", "0"]),
    (["size", LLAMA, "--gpus", -8], ["--gpus", "-8"]),
    (["size", LLAMA, "--gpus", 10**9], ["--gpus"]),
    (["size", LLAMA, "--gpus", 8, "--tp", 16], ["16 GPUs", "8"]),
    (["size", LLAMA, "--context", "1.5M"], ["1.5M", "fractions"]),
    (["size", LLAMA, "--context", 0], ["--context", "0", "outside"]),
    (["size", LLAMA, "--context", -5], ["-5"]),
    (["size", LLAMA, "--context", "1MB"], ["1MB", "not a number of tokens"]),
    (["size", LLAMA, "--context", "128 GiB"], ["128 GiB", "not a number of tokens"]),
    (["size", LLAMA, "--context", "2e6"], ["2e6"]),
    (["size", LLAMA, "--context", "4096T"], ["4096T"]),
    (["size", LLAMA, "--context", "9999G"], ["9999G", "outside"]),
    (["size", LLAMA, "--gpu", "h2000"], ["h2000", "not in the catalog", "h200"]),
    (["size", LLAMA, "--gpu", ""], ["not in the catalog"]),
    (["kernel", "gemm", "--m", 1, "--n", 1, "--k", 1, "--gpu", "tpu"], ["tpu", "not in the catalog"]),
    (["size", LLAMA, "--cache", "fp8_ds_mla"], ["fp8_ds_mla", "stores latents of 512", "use fp8, bf16"]),
    (["kv", LLAMA, "--cache", "fp8_ds_mla"], ["fp8_ds_mla", "stores latents of 512"]),
    (["size", LLAMA, "--cache", "fp9"], ["fp9", "use one of"]),
    (["size", LLAMA, "--weights", "q4"], ["q4", "use one of"]),
    (["size", LLAMA, "--price", -1], ["--price", "-1"]),
    (["size", LLAMA, "--price", "free"], ["--price", "free"]),
    (["size", LLAMA, "--price", "nan"], ["--price", "nan"]),
    (["size", LLAMA, "--dp-attention", 4], ["--dp-attention 4", "no experts", "--dp 4"]),
    (["size", LLAMA, "--ep", 8, "--tp", 8], ["--ep 8", "no experts"]),
    (["estimate", V3, "--dp-attention", 4], ["--dp-attention 4", "--ep 4"]),
    (["size", LLAMA, "--concurrency", 0], ["--concurrency", "0"]),
    (["size", LLAMA, "--output", "1M", "--context", "128K"], ["--output", "--context 131072"]),
    (["size", LLAMA, "--prefix-hit", 1.5], ["--prefix-hit", "1.5"]),
    (["size", LLAMA, "--prefix-hit", "nan"], ["--prefix-hit", "nan"]),
    (["size", LLAMA, "--memory-fraction", 92], ["--memory-fraction", "92"]),
    (["size", LLAMA, "--memory-fraction", "nan"], ["--memory-fraction", "nan"]),
    (["size", LLAMA, "--block-size", 0], ["--block-size", "0"]),
    (["estimate", LLAMA, "--prefix", 200_000, "--context", "128K"], ["--prefix 200000", "smaller than --context 131072"]),
    (["estimate", LLAMA, "--phase", "training"], ["training", "prefill", "decode"]),
    (["estimate", LLAMA, "--engine", "sglang"], ["sglang", "vllm"]),
    (["estimate", LLAMA, "--chunk", 0], ["--chunk", "0"]),
    (["estimate", LLAMA, "--batch", 0], ["--batch", "0"]),
    (["estimate", LLAMA, "--tp", 8, "--gpus", 4], ["needs 8 GPUs", "4"]),
    (["kernel", "gemm", "--m", 0, "--n", 1, "--k", 1], ["--m", "0"]),
    (["kernel", "gemm", "--n", 1, "--k", 1], ["--m"]),
    (["kernel", "attention", "--tokens", 100, "--context", 50, "--heads", 8], ["--context 50", "at least 100"]),
    (["kernel", "attention", "--tokens", 100, "--heads", 8, "--kv-heads", 3], ["--kv-heads 3", "--heads 8"]),
    (["kernel", "attention", "--tokens", 100, "--heads", 8, "--dtype", "fp4"], ["fp4", "bf16"]),
    (["kernel", "conv"], ["conv"]),
    (["size", LLAMA, "--flag-that-is-not", 1], ["--flag-that-is-not"]),
    (["sise", LLAMA], ["sise"]),
    (["size"], ["MODEL"]),
    (["size", ""], ["config.json"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "told"), BAD, ids=[" ".join(map(str, w)) for w, _ in BAD])
def test_bad_input_is_one_line_on_stderr_and_nothing_on_stdout(say: Say, words: list[object], told: list[str]) -> None:
    refused(say(*words), *told)
    refused(say(*words, "--json"), *told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not JSON"), ("[]", "not an object"), ("{}", "has no hidden_size"), ('{"hidden_size": -4}', "hidden_size"), ('{"hidden_size": true, "vocab_size": 3}', "hidden_size"),
        ('{"hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 3}', "3 key-value heads"),
        ('{"hidden_size": NaN, "vocab_size": 100}', "hidden_size"), ('{"hidden_size": Infinity, "vocab_size": 100}', "hidden_size"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_read_is_one_line(say: Say, tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content, "utf-8")
    refused(say("size", file), told)
    refused(say("kv", tmp_path), told)


def test_a_folder_without_a_config_is_one_line(say: Say, tmp_path: Path) -> None:
    refused(say("size", tmp_path), "no config.json in this folder")


def test_a_users_own_config_is_a_model_like_any_other(say: Say, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(data_path("models", LLAMA_8B.replace("/", "--") + ".json").read_text("utf-8"), "utf-8")
    mine, theirs = (say("kv", source, "--json").document for source in (tmp_path, LLAMA_8B))
    assert mine["bytes_per_token"] == theirs["bytes_per_token"]
    assert mine["engines"] == theirs["engines"]


# ---- every model, every machine


@pytest.mark.parametrize("name", EVERY)
def test_every_model_of_the_catalog_answers_kv(say: Say, name: str) -> None:
    said = say("kv", name, "--context", "1M", "--json")
    assert said.code == 0
    found = said.document
    assert found["bytes_per_sequence"] == sum(layer["bytes_per_sequence"] for layer in found["layers"])
    assert found["bytes_per_sequence"] == pytest.approx(found["bytes_per_token"] * 2**20 + found["fixed_bytes"])
    # an indexer's keys are fp8 in every engine, DeepSeek-V4's cache has its own format
    kept = sum(layer["bytes_per_sequence"] for layer in found["layers"] if layer["keeps"] != "index keys")
    for engine in found["engines"].values():
        least = 0.5 if "fp8_ds_v4" in engine.get("note", "") or any(layer["keeps"] == "entries" for layer in found["layers"]) else 1.0
        assert "refused" in engine or engine["bytes_per_sequence"] >= least * kept * (1 - 1e-12)
    assert ("refused" in found["engines"]["vllm"]) == (found["bytes_per_sequence"] == 0)
    shown = say("kv", name)
    assert shown.code == 0
    assert "nan" not in shown.out


@pytest.mark.parametrize("name", [n for n in EVERY if n not in MAIN])
@pytest.mark.parametrize("number", [8, 16])
def test_every_model_of_the_catalog_answers_size(say: Say, name: str, number: int) -> None:
    said = say("size", name, "--gpus", number, "--context", "32K", "--json")
    assert said.code in (0, 3)
    assert said.err == ""
    assert math.isfinite(said.document["memory_bytes_per_gpu"]["total"])


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("number", [8, 16])
def test_the_main_models_answer_size_at_a_million_tokens(say: Say, name: str, number: int) -> None:
    said = say("size", name, "--gpus", number, "--context", "1M", "--json")
    found = said.document
    assert said.err == ""
    assert said.code == (0 if found["fits"] else 3)
    layout = found["layout"]
    gpus_used = layout["tensor_parallel_size"] * layout["pipeline_parallel_size"] * layout["data_parallel_size"] * layout["attention_data_parallel_size"]
    assert gpus_used == number
    memory = found["memory_bytes_per_gpu"]
    assert memory["total"] == pytest.approx(sum(memory[part] for part in MEMORY - {"total", "usable"}))
    assert found["fits"] == (found["whole_sequences"] >= 1)
    assert memory["total"] <= memory["usable"] or not found["fits"]
    assert found["fits"] == (found["max_context_tokens"] >= 2**20)
    assert found["fits"] <= (found["smallest_gpus"] is not None and found["smallest_gpus"] <= number)
    assert (found["launch"]["vllm"] or "vllm serve").startswith("vllm serve")
    if found["fits"]:
        assert found["ttft_cached_s"]["value"] < found["ttft_s"]["value"]
        assert found["tpot_s"]["value"] < found["ttft_s"]["value"]


@pytest.mark.parametrize("gpu", gpus())
def test_every_gpu_answers(say: Say, gpu: str) -> None:
    assert say("size", LLAMA_8B, "--gpu", gpu, "--gpus", 4, "--context", "128K", "--json").code == 0
    assert say("kernel", "attention", "--gpu", gpu, "--tokens", "8K", "--heads", 32, "--kv-heads", 8, "--json").code == 0


@pytest.mark.parametrize("words", [["size", V3, "--gpus", 16, "--context", "64K"], ["estimate", V3, "--tp", 16, "--context", "64K"], ["kernel", "gemm", "--m", 64, "--n", 64, "--k", 64, "--dtype", "fp8"]], ids=lambda w: w[0])
def test_a_gpu_without_fp8_says_so(say: Say, words: list[object]) -> None:
    def told(gpu: str) -> bool:
        return any("fp8" in line and "bf16" in line for line in say(*words, "--gpu", gpu, "--json").document["warnings"])

    assert told("a100")
    assert not told("h200")


def test_a_context_beyond_the_models_reach_is_told(say: Say) -> None:
    def told(context: str) -> bool:
        return any("declares" in line for line in say("size", LLAMA_8B, "--gpus", 8, "--context", context, "--json").document["warnings"])

    assert told("1M")
    assert not told("128K")


def test_what_is_asked_for_is_what_is_answered(say: Say) -> None:
    """Degrees the user insists on are kept; what is left is chosen."""
    found = say("size", V3, "--gpus", 16, "--context", "64K", "--tp", 8, "--json").document
    assert found["layout"]["tensor_parallel_size"] == 8
    alone = say("size", LLAMA, "--tp", 4, "--context", "32K", "--json").document
    assert (alone["inputs"]["gpus"], alone["layout"]["tensor_parallel_size"]) == (4, 4)


def test_price_scales_dollars_and_nothing_else(say: Say) -> None:
    one, two = (say("size", LLAMA, "--gpus", 8, "--context", "128K", "--price", p, "--json").document for p in (1, 2))
    for kind in ("input", "cached", "output"):
        assert two["cost_usd_per_million_tokens"][kind]["value"] == pytest.approx(2 * one["cost_usd_per_million_tokens"][kind]["value"])
    assert one["ttft_s"] == two["ttft_s"]
    free = say("size", LLAMA, "--gpus", 8, "--context", "128K", "--price", 0, "--json").document
    assert free["cost_usd_per_million_tokens"]["input"]["value"] == 0


# ---- models and compare


def test_models_lists_the_catalog_in_the_order_asked(say: Say) -> None:
    found = say("models", "--sort", "bytes_per_token", "--json").document
    assert found.keys() == HEAD | {"models"}
    assert {entry["name"] for entry in found["models"]} == set(EVERY)
    slopes = [entry["cache_bytes_per_token"] for entry in found["models"]]
    assert slopes == sorted(slopes)
    for entry in found["models"]:
        assert 0 < entry["active_parameters"] <= entry["parameters"]
        assert entry["cache_bytes_128k"] <= entry["cache_bytes_1m"]
    by_name = {entry["name"]: entry for entry in found["models"]}
    assert by_name["meta-llama/Meta-Llama-3.1-70B"]["effective_tokens"] == 65_536
    assert by_name["openai/gpt-oss-120b"]["active_parameters"] == pytest.approx(5.7e9, rel=0.01)


def test_models_matches_and_says_when_nothing_does(say: Say) -> None:
    assert "DeepSeek-V4-Pro" in say("models", "--match", "v4-pro").out
    refused = say("models", "--match", "no such model")
    assert refused.code == 2
    assert "longctx models lists all" in refused.err


def test_the_essays_figure_of_head_types(say: Say) -> None:
    """1 x, 16 x, 57 x, 128 x fewer floats per token and layer (FORMULAS 8)."""
    found = say("compare", "--head-types", "--json").document["head_types"]
    assert [(t["name"], t["elements_per_token_per_layer"]) for t in found] == [("MHA", 32_768), ("GQA", 2048), ("MLA", 576), ("MQA", 256)]
    assert [round(t["reduction"]) for t in found] == [1, 16, 57, 128]
    assert found[2]["cache_bytes_per_sequence"] == 61 * 576 * 2 * 2**20
    assert say("compare", "--head-types", "--cache", "kivi-2").code == 0


def test_the_essays_recipe_then_and_now(say: Say) -> None:
    said = say("compare", "gpt3-175b.paper", "Llama-4-Scout-17B-16E-Instruct", "DeepSeek-V4-Pro", "--context", "1M", "--json")
    then, scout, now = said.document["models"]
    assert then["position_schemes"] == "learned absolute"
    assert "NoPE + temperature" in scout["position_schemes"]
    assert "MHA" in then["mixers"]
    assert "chunked" in scout["mixers"]
    assert then["channels"] == "dense"
    assert now["channels"].startswith("MoE")
    assert then["cache_bytes_per_sequence"] > 100 * now["cache_bytes_per_sequence"]
    assert all(entry["prefill_flops"] > entry["decode_flops"] > 0 for entry in said.document["models"])


def test_compare_with_a_gpu_adds_fit_and_times(say: Say) -> None:
    found = say("compare", LLAMA_8B, LLAMA, "--gpu", "h200", "--gpus", 8, "--context", "128K", "--json").document
    assert [entry["fits"] for entry in found["models"]] == [True, True]
    small, large = (entry["ttft_s"]["value"] for entry in found["models"])
    assert 0 < small < large
    assert say("compare", LLAMA_8B, "--gpu", "h200").code == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [(["compare"], ["name at least one MODEL", "--head-types"]), (["compare", LLAMA, "--head-types"], ["leave out"]), (["compare", "--head-types", "--kv-heads", "7"], ["--kv-heads 7", "divide"])],
)  # fmt: skip
def test_compare_refuses_what_makes_no_sense(say: Say, words: list[str], parts: list[str]) -> None:
    said = say(*words)
    assert said.code == 2
    assert all(part in said.err for part in parts)
