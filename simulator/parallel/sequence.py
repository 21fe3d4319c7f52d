"""Sequence parallelism beside tensor parallelism: what tensor ranks would repeat (norms, residual stream) they share.

Each all-reduce becomes a reduce-scatter after the layer and an all-gather before it: the same wire bytes, activations of
the residual stream / t.  Backward gathers a layer's input once more, of which only a share was kept: half the wire bytes again,
beside the input gradient of the product that reads it.
Source: Korthikanti et al. (2205.05198) section 4.2; NVIDIA/Megatron-LM, core/tensor_parallel/layers.py; FORMULAS 4.1, 5.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.dtypes import BF16, CacheFormat
from simulator.kernels.messages import message
from simulator.layers import Head
from simulator.layers.layer import Direction, Layer, Slice
from simulator.model import ModelSpec
from simulator.parallel.scheme import Scheme, is_one
from simulator.parallel.tensor import beside_product, reads_by_columns
from simulator.units import where
from simulator.work import Op, Repeat, Serial, Work


class Sequence(Scheme):
    """`sp` is the tensor degree, or one."""

    field = "sp"

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction) -> Work:  # noqa: ARG002 (any cache)
        """A share of the layer's own norm, then the gather; `Tensor` scatters the output."""
        t = self.degree
        if is_one(t) or isinstance(layer, Head) or not isinstance(work, Serial):
            return work
        payload = held.tokens * (self.layout.hidden_size * BF16.bytes) * where(t > 1, 1.0, 0.0)
        gather = message("sequence all-gather", "all_gather", group=self.layout.groups["tp"], payload_bytes=payload)
        backward = direction is Direction.BACKWARD
        own = len(work.parts) - 1 if backward else 0
        shared = [Repeat(1 / t, part) if i == own and isinstance(part, Op) and part.impl == "norm" else part for i, part in enumerate(work.parts)]
        if not backward:
            return Serial([shared[0], gather, *shared[1:]])
        if not reads_by_columns(layer):
            return Serial([gather, *shared])
        again = message("sequence all-gather again", "all_gather", group=self.layout.groups["tp"], payload_bytes=payload)
        return beside_product(Serial([gather, *shared]), 0, [again])

    def refusals(self, model: ModelSpec) -> Iterator[str]:  # noqa: ARG002 (any model)
        """It splits over the tensor group and no other."""
        s, t = int(self.degree), int(self.layout.tp)
        if s not in (1, t):
            yield f"--sp {s}: it shares tokens among the tensor group of {t}; use --sp {t} or leave it out"
