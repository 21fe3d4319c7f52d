"""TensorRT-LLM (PyTorch backend): blocks of tokens in a share of what is free.

KV bytes per GPU = (total - weights - activations - rest) x free_gpu_memory_fraction.  Without `max_attention_window` every layer keeps
every token, windows too; recurrent states are held once per request.
The rules and their sources stand in data/engines/tensorrt_llm.toml.  Neglected: snapshots of states for block reuse, windows given by hand,
host offload.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from typing import Any

from simulator.data import data_path
from simulator.engines.allocation import Allocation, refuse
from simulator.engines.paging import Demand, by_kind, check_kept, stage_of
from simulator.hardware import Cluster
from simulator.layers import CompressedAttention
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import System


@cache
def _facts() -> dict[str, Any]:
    return tomllib.loads(data_path("engines", "tensorrt_llm.toml").read_text("utf-8"))


def _fact(table: str, name: str) -> Any:
    return _facts()[table][name]["value"]


@dataclass(frozen=True)
class TensorrtLlm:
    """TensorRT-LLM with its settings; None takes its own default."""

    memory_fraction: float | None = None
    block_size: int | None = None

    name = "tensorrt_llm"
    title = "TensorRT-LLM"

    @property
    def version(self) -> str:
        """The version whose rules these are."""
        return str(_facts()["version"])

    def allocation(self, model: ModelSpec, layout: Layout, cluster: Cluster, max_model_len: int) -> Allocation:
        """Tokens = budget / rows of a token, in whole blocks; a request takes ceil(L / b) blocks and its states."""
        if model.cache.name not in _facts()["cache_dtypes"]:
            known = ", ".join(_facts()["cache_dtypes"])
            raise refuse(self.title, self.version, f"no {model.cache.name} cache; it offers {known}")
        if any(isinstance(layer, CompressedAttention) for _, layer in model.mixers):
            raise refuse(self.title, self.version, "its pages of compressed entries are not modelled; use vllm or sglang")
        if int(layout.dcp) > 1:
            raise refuse(self.title, self.version, f"--dcp {int(layout.dcp)} is vLLM's; its own context parallelism (Helix) is not modelled")
        if layout.cp > 1 or layout.ulysses > 1 or layout.helix > 1:
            raise refuse(self.title, self.version, "its context parallelism is not modelled")
        check_kept(model)
        block = self.block_size or int(_fact("defaults", "tokens_per_block"))
        share = self.memory_fraction if self.memory_fraction is not None else float(_fact("defaults", "free_gpu_memory_fraction"))
        step = float(_fact("defaults", "max_num_tokens"))
        held = System(model, layout).footprint(sequences=0.0, context=1.0, step_tokens=step)
        free = float(cluster.gpu.usable_bytes) - float(held.weights) - float(held.activations) - float(_fact("memory", "other_bytes"))
        available = free * share
        kinds, where = by_kind(model, layout), stage_of(model, int(layout.pp))
        rows, states = [0.0] * int(layout.pp), [0.0] * int(layout.pp)
        window = False
        for index, kind in enumerate(model.order):
            for item in kinds[kind]:
                into = states if item.demand is Demand.STATE else rows
                into[where[index]] += float(item.row_bytes) / item.every
                window = window or item.demand in (Demand.WINDOW, Demand.CHUNK)
        # the stage that fills first
        row, state = max(zip(rows, states, strict=True), key=lambda pair: pair[0] * max_model_len + pair[1])
        whole = -(-max_model_len // block) * block
        each = whole * row + state
        blocks = max(math.floor(available / (block * row)), 0) if row else 0
        concurrency = max(available / each, 0.0) if state else blocks / (whole // block)
        note = f"{share:g} of what is free, blocks of {block}"
        if window:
            note += "; windows are held in full unless max_attention_window is given"
        if state:
            note += "; one state per request"
        tokens = blocks * block if not state else math.floor(concurrency * max_model_len)
        return Allocation(
            engine=self.name, title=self.title, version=self.version, available_bytes=available, per_sequence_bytes=each,
            max_concurrency=concurrency, capacity_tokens=tokens, replicas=int(layout.dp * layout.dp_attention), prefix_tokens=block,
            log=(f"Max tokens in paged KV cache: {tokens}",), note=note,
        )  # fmt: skip
