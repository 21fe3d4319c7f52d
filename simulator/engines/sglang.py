"""SGLang: token pools sized by a static share of memory.

KV bytes per GPU = total x mem_fraction_static - what is static already (weights).  A token takes a row of every layer; windows have a
pool of their own for some models, recurrent states one for all of them.
The rules and their sources stand in data/engines/sglang.toml.  Neglected: multimodal reserves, speculative decoding, draft models.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from typing import Any

from simulator.data import data_path
from simulator.engines.allocation import Allocation, refuse
from simulator.engines.paging import Demand, Held, by_kind, check_kept, stage_of, stored_as
from simulator.hardware import Cluster
from simulator.layers import CompressedAttention, LatentAttention
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import System

_MIB = 2**20
#: Rings up to this long follow the pages of the window pool, longer ones the requests (DSV4PoolConfigurator).
_SHORT_RING = 8
#: From this tensor-parallel degree on CUDA graphs are captured for larger batches.
_WIDE = 4


@cache
def _facts() -> dict[str, Any]:
    return tomllib.loads(data_path("engines", "sglang.toml").read_text("utf-8"))


def _fact(table: str, name: str) -> Any:
    return _facts()[table][name]["value"]


@dataclass(frozen=True)
class Sglang:
    """SGLang with its settings; None takes its own default."""

    memory_fraction: float | None = None
    page_size: int | None = None

    name = "sglang"
    title = "SGLang"

    @property
    def version(self) -> str:
        """The version whose rules these are."""
        return str(_facts()["version"])

    def page_tokens(self, model: ModelSpec) -> int:
        """page_size, or what the attention backend of the model's caches takes."""
        if self.page_size:
            return self.page_size
        layers = [layer for _, layer in model.mixers]
        if any(isinstance(layer, CompressedAttention) for layer in layers):
            return int(_fact("defaults", "v4_page_size"))
        return int(_fact("defaults", "latent_page_size" if any(isinstance(x, LatentAttention) for x in layers) else "page_size"))

    def fraction(self, model: ModelSpec, layout: Layout, cluster: Cluster) -> float:
        """mem_fraction_static: 1 - reserved / capacity, rounded to a thousandth."""
        if self.memory_fraction is not None:
            return self.memory_fraction
        total = float(cluster.gpu.usable_bytes) / _MIB
        tier: dict[str, float] = next(c for c in _facts()["defaults"]["memory_classes"] if total < c["below_mib"])
        reserved = float(_fact("memory", "reserved_mib")) + tier["chunked_prefill_size"] * float(_fact("memory", "reserved_mib_per_token"))
        reserved += float(layout.tp * layout.pp) / 8 * float(_fact("memory", "reserved_mib_per_8_gpus"))
        reserved += tier["graph_batch_tp4" if float(layout.tp) >= _WIDE else "graph_batch"] * float(_fact("memory", "reserved_mib_per_graph_row"))
        if any(isinstance(layer, LatentAttention) for _, layer in model.mixers):
            reserved += float(_fact("memory", "reserved_mib_latent"))
        if total > 60 * 1024:
            reserved = max(reserved, float(_fact("memory", "least_reserved_mib")))
        return round((total - reserved) / total, 3)

    def allocation(self, model: ModelSpec, layout: Layout, cluster: Cluster, max_model_len: int) -> Allocation:
        """Tokens of the pools, and how many requests of `max_model_len` they hold.

        tokens = available / (full rows + ratio x window rows), in whole pages; a request takes its length of them and its states.
        """
        if model.cache.name not in _facts()["cache_dtypes"]:
            known = ", ".join(_facts()["cache_dtypes"])
            raise refuse(self.title, self.version, f"no {model.cache.name} cache; it offers {known}")
        check_kept(model)
        page, fraction = self.page_tokens(model), self.fraction(model, layout, cluster)
        weights = float(System(model, layout).footprint(sequences=0.0, context=1.0, step_tokens=1.0).weights)
        usable = float(cluster.gpu.usable_bytes) * fraction
        available = usable - weights
        cell, state, ring, windows = self._cell(model, layout, page)
        note = f"mem_fraction_static {fraction:g}, pages of {page}"
        budget, slots, each = available, math.inf, 0
        if state:
            each, ratio = int(_fact("pools", "states_per_request")), float(_fact("pools", "state_ratio"))
            slots = max(math.floor((available * ratio / (1 + ratio) - state) / state), 0)
            budget = available - (slots + 1) * state
            note += f"; {each} states per request for the prefix cache, {ratio / (1 + ratio):.0%} of the pool for states"
        if windows:
            note += f"; {windows}"
        shared = max(int(layout.dcp), 1)
        tokens = max(math.floor(budget / cell), 0) // page * page * shared if cell else 0
        whole = -(-max_model_len // page) * page
        by_tokens = max(budget, 0.0) / (whole / shared * cell + ring) if ring else tokens / whole if cell else math.inf
        by_states = slots / each if each else math.inf
        return Allocation(
            engine=self.name, title=self.title, version=self.version, available_bytes=available,
            per_sequence_bytes=whole / shared * cell + each * state + ring, max_concurrency=max(min(by_tokens, by_states), 0.0), capacity_tokens=tokens,
            replicas=int(layout.dp * layout.dp_attention), prefix_tokens=page, log=(f"max_total_num_tokens={tokens}",), note=note,
        )  # fmt: skip

    def _cell(self, model: ModelSpec, layout: Layout, page: int) -> tuple[float, float, float, str]:
        """Bytes of a token in all pools of the fullest stage, of a sequence's states and long rings, and what windows cost."""
        kinds, where = by_kind(model, layout), stage_of(model, int(layout.pp))
        v4 = any(isinstance(layer, CompressedAttention) for _, layer in model.mixers)
        pooled = v4 or model.model_type in _fact("pools", "window_models")
        ratio = float(_fact("pools", "v4_window_ratio" if v4 else "window_ratio"))
        everything = all(h.demand in (Demand.WINDOW, Demand.CHUNK) for kind in kinds for h in kind)
        cells, states, rings = ([0.0] * int(layout.pp) for _ in range(3))
        window = False
        for index, kind in enumerate(model.order):
            for held in kinds[kind]:
                if held.demand is Demand.STATE:
                    states[where[index]] += float(held.row_bytes)
                    continue
                if held.demand is Demand.RING and (held.width or 0) > _SHORT_RING:
                    rings[where[index]] += (held.width or 0) * float(held.row_bytes)
                    continue
                bounded = held.demand in (Demand.WINDOW, Demand.CHUNK, Demand.RING)
                window = window or bounded
                share = ratio if bounded and pooled and not everything else 1.0
                cells[where[index]] += share * self._token(model, held, page)
        told = ""
        if window and not everything:
            told = f"windows have a pool of {ratio:g} x the tokens" if pooled else "windows are held in full: no pool of their own for this model"
        return max(cells), max(states), max(rings), told

    def _token(self, model: ModelSpec, held: Held, page: int) -> float:
        """Bytes per token: pages of entries padded, a short ring per page."""
        if held.demand is Demand.RING:
            return (held.width or 0) / page * float(held.row_bytes)
        rows = max(page // held.every, 1)
        multiple = stored_as(model).page_multiple
        return math.ceil(rows * float(held.row_bytes) / multiple) * multiple / page if multiple > 1 else float(held.row_bytes) / held.every
