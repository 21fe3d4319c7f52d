"""Attention-data parallelism: each rank runs attention, dense layers and cache for its own requests; experts are
shared by all (expert parallelism over the same ranks).  Nothing of the cache is replicated.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.layers import MoE
from simulator.layers.layer import Layer, Slice
from simulator.model import ModelSpec
from simulator.parallel.data import share_sequences
from simulator.parallel.scheme import Scheme, is_one


class AttentionData(Scheme):
    """`dp_attention` ranks with their own requests and common experts."""

    field = "dp_attention"

    def shard(self, held: Slice, layer: Layer) -> Slice:
        """Own requests; experts see those of every rank."""
        if is_one(self.degree):
            return held
        own = share_sequences(held, self.degree)
        return own._replace(token_ranks=self.degree * 1.0) if isinstance(layer, MoE) else own

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """Only experts make it differ from plain replicas, and they must be expert-parallel."""
        n = int(self.degree)
        if n == 1:
            return
        if not any(isinstance(layer, MoE) for layer in model.layers):
            yield f"--dp-attention {n}: {model.name} has no experts to share; use --dp {n}"
        elif self.layout.ep == 1:
            yield f"--dp-attention {n}: experts must be split over the same ranks; add --ep {int(self.layout.tp) * n}"
