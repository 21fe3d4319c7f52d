"""Which engine splits a prompt's tokens over GPUs, for which model, and with which flags.

The facts stand in data/engines/*.toml under `prefill_context_parallel`.  vLLM's is modelled: `Vllm.arranged` makes it a layout.
"""

from __future__ import annotations

import tomllib
from functools import cache
from typing import Any, NamedTuple

from simulator.data import data_path
from simulator.model import ModelSpec


class Offer(NamedTuple):
    """What another engine has for a model."""

    title: str
    version: str
    flags: str
    source: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.title} {self.version} has {self.flags} (not modelled here)"


@cache
def _facts(engine: str) -> dict[str, Any]:
    return tomllib.loads(data_path("engines", f"{engine}.toml").read_text("utf-8"))


def kinds(model: ModelSpec) -> list[str]:
    """The names of a model's mixers, each once."""
    return list(dict.fromkeys(type(layer).__name__ for _, layer in model.mixers))


def vllm_refuses(model: ModelSpec) -> str | None:
    """Why vLLM does not split this model's prompts; None where it does."""
    allowed = _facts("vllm")["prefill_context_parallel"]["mixers"]["value"]
    found = [name for name in kinds(model) if name not in allowed]
    return f"only for models whose every mixer is multi-head latent attention, not {' and '.join(found)}" if found else None


def vllm_way() -> dict[str, str]:
    """How vLLM lays tokens and caches over the ranks: fields of `Layout`."""
    facts = _facts("vllm")["prefill_context_parallel"]
    return {name: str(facts[name]["value"]) for name in ("order", "passing", "holds")}


def vllm_flag() -> str:
    """The flag of `vllm serve`."""
    return str(_facts("vllm")["prefill_context_parallel"]["flag"]["value"])


def sglang_offer(model: ModelSpec) -> Offer | None:
    """What SGLang has for this model: the first entry that names its only kind of mixer."""
    found, facts = kinds(model), _facts("sglang")
    for entry in facts["prefill_context_parallel"]:
        if all(name in entry["mixers"] for name in found):
            return Offer("SGLang", facts["version"], entry["flags"], entry["source"])
    return None


__all__ = ["Offer", "kinds", "sglang_offer", "vllm_flag", "vllm_refuses", "vllm_way"]
