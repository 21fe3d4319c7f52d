"""The question as widgets whose values live in the address: a link is a question."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import cache
from itertools import cycle
from typing import Any

import streamlit as st

from simulator import hardware, hf
from simulator.dtypes import CACHE_FORMATS, WEIGHT_FORMATS
from simulator.question import Question
from simulator.units import parse_tokens, show_tokens

DEFAULT_MODEL = "Qwen/Qwen2.5-14B-Instruct-1M"
DEGREES = ("tp", "pp", "dp", "ep", "dcp", "dp_attention", "cp")
_HELP = {
    "tp": "Tensor-parallel degree", "pp": "Pipeline-parallel degree", "dp": "Independent replicas", "ep": "Expert-parallel degree (tp x dp-attention)",
    "dcp": "Decode-context-parallel degree", "dp_attention": "Attention-data-parallel degree",
    "cp": "Context-parallel degree of prefill",
}  # fmt: skip
_NOTES = "_link_notes"


@cache
def gpus() -> tuple[str, ...]:
    """GPUs that ship with the tool."""
    return hardware.catalog()


# ---- links


def _one_of(options: tuple[str, ...]) -> Callable[[str], str | None]:
    return lambda text: None if text in options else f"use one of {', '.join(options)}"


def _number(least: float, most: float, *, whole: bool = True) -> Callable[[str], str | None]:
    def refuse(text: str) -> str | None:
        rule = f"use a{' whole' if whole else ''} number from {least:,g} to {most:,g}"
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            return rule
        return None if least <= value <= most else rule

    return refuse


def _any(_text: str) -> None:
    """What the answer itself judges, in its own words."""


@cache
def parameters() -> dict[str, Callable[[str], str | None]]:
    """What a link to `size` may hold: per name, what refuses a value and with which rule."""
    return {
        "model": _any, "gpu": _any, "gpus": _number(1, 1024), "context": _any, "concurrency": _number(1, 1_000_000), "output": _any,
        "prefix_hit": _number(0, 1, whole=False), "weights": _one_of(tuple(WEIGHT_FORMATS)), "cache": _one_of(tuple(CACHE_FORMATS)),
        **{name: _number(1, 1024) for name in DEGREES},
        "memory_fraction": _number(0.05, 1, whole=False), "chunk": _any, "price": _number(0, 10_000, whole=False),
    }  # fmt: skip


def link_notes() -> list[str]:
    """What a link says that cannot be used, with the rule.  Bound widgets drop it from the address without a word, so it is remembered:
    call this before them.
    """
    known, found = parameters(), []
    for name, text in st.query_params.items():
        if name not in known:
            found.append(f"link: {name!r} is not a parameter of this page and is ignored; it takes {', '.join(known)}")
        elif text and (rule := known[name](text)):
            found.append(f"link: {name}={text} is not used, its default stands; {rule}")
    kept: list[str] = st.session_state.setdefault(_NOTES, [])
    kept += [note for note in found if note not in kept]
    return kept


# ---- widgets


def _text(label: str, key: str, default: str, hint: str, placeholder: str | None = None) -> str:
    told = st.text_input(label, value=default, key=key, help=hint, placeholder=placeholder, bind="query-params")
    return (told or "").strip()


def _maybe(label: str, key: str, least: float, most: float, hint: str, *, step: float = 1) -> Any:
    return st.number_input(
        label, min_value=least, max_value=most, value=None, step=step, key=key, help=hint, placeholder="auto", bind="query-params",
    )  # fmt: skip


def _format(label: str, key: str, options: tuple[str, ...]) -> str | None:
    chosen: str | None = st.selectbox(label, options, index=None, key=key, placeholder="the checkpoint's", bind="query-params")
    return chosen


def sidebar() -> Question:
    """Ask.  Errors: ValueError where a number of tokens cannot be read."""
    with st.sidebar:
        models = hf.catalog()
        model = st.selectbox(
            "Model", models, index=models.index(DEFAULT_MODEL), key="model", accept_new_options=True, bind="query-params",
            help="A model of the catalog, or the path of a config.json or its folder on the machine that runs this app. "
            "Other ids of the Hugging Face hub need `longctx app --hub`.",
        )  # fmt: skip
        gpu = st.selectbox(
            "GPU", gpus(), index=gpus().index("h200_sxm"), key="gpu", accept_new_options=True, bind="query-params",
            help="A GPU that ships with the tool, or the path of a file of your own on the machine that runs this app.",
        )  # fmt: skip
        left, right = st.columns(2)
        with left:
            count = st.number_input("GPUs", min_value=1, max_value=1024, value=8, key="gpus", bind="query-params")
        with right:
            concurrency = st.number_input(
                "Concurrency", min_value=1, max_value=1_000_000, value=4, key="concurrency", help="Requests at the same time.", bind="query-params",
            )  # fmt: skip
        with left:
            context = _text("Context", "context", "1M", "Tokens of a request, prompt and output: 131072, 128K = 131,072, 1M = 1,048,576, 1m = 1,000,000.")
        with right:
            output = _text("Output", "output", "", "Output tokens of a request: 1,024, or an eighth of a short context, unless given.", "auto")
        hit = st.slider("Prefix cache hit", 0.0, 1.0, 0.9, 0.05, key="prefix_hit", help="Share of the prompt found in the prefix cache.", bind="query-params")
        weights = _format("Weights", "weights", tuple(WEIGHT_FORMATS))
        cache_format = _format("Cache", "cache", tuple(CACHE_FORMATS))
        with st.expander("Layout, engine, price"):
            left, right = st.columns(2)
            degrees = {}
            for name, column in zip(DEGREES, cycle((left, right)), strict=False):
                with column:
                    degrees[name] = _maybe(name.replace("_", "-"), name, 1, 1024, _HELP[name])
            with left:
                fraction = _maybe("Memory fraction", "memory_fraction", 0.05, 1.0, "gpu_memory_utilization (default 0.92).", step=0.01)
                price = _maybe("$ per GPU-hour", "price", 0.0, 10_000.0, "Default: data/prices.toml.", step=0.1)
            with right:
                chunk = _text("Chunk", "chunk", "", "max_num_batched_tokens (default: the engine's for the GPU).", "auto")
        chosen = tuple((name, int(degree)) for name, degree in degrees.items() if degree is not None)
        return Question(
            model or DEFAULT_MODEL, gpu or "h200_sxm", int(count), parse_tokens(context), int(concurrency), parse_tokens(output) if output else None,
            float(hit), chosen, weights, cache_format, None, fraction, parse_tokens(chunk) if chunk else None, price,
        )  # fmt: skip


def current(notes: list[str], question: Question) -> list[str]:
    """The notes until another question is asked; then they are forgotten."""
    if st.session_state.setdefault("_asked", question) != question:
        st.session_state["_asked"] = question
        notes.clear()
    return notes


def as_command(question: Question) -> str:
    """The same question to the command line."""
    usual = Question(question.model)
    told = ["longctx", "size", question.model, "--gpu", question.gpu, "--gpus", str(question.gpus), "--context", short(question.context)]
    told += ["--concurrency", str(question.concurrency)]
    options = {
        "output": question.output, "prefix-hit": None if question.prefix_hit == usual.prefix_hit else question.prefix_hit,
        "weights": question.weights, "cache": question.cache,
        "memory-fraction": question.memory_fraction, "chunk": question.chunk, "price": question.price_usd_per_gpu_hour, **dict(question.degrees),
    }  # fmt: skip
    for name, value in options.items():
        if value is not None:
            told += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(told)


def short(tokens: int) -> str:
    """As one would type it: 1M, 128K, 1000000."""
    told = re.match(r"([0-9]+[MK]) = ", show_tokens(tokens))
    return told[1] if told else str(tokens)


def plain(text: str) -> str:
    """Text for places that read markdown: nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]$~#<>|])", r"\\\1", text)
