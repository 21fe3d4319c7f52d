"""Tensor parallelism: heads, widths and vocabulary split over t ranks; one all-reduce after each layer.

Payload T D e per all-reduce (FORMULAS 5.2).  Replicated: norms, routers, latent down-projections, and key-value heads
when t exceeds their number.  Backward the gradient by a layer's input is summed, beside the weight gradient of the product
that made it, where one column-split product reads the input (NVIDIA/Megatron-LM, core/tensor_parallel/layers.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from simulator.dtypes import BF16, CacheFormat
from simulator.kernels.messages import message
from simulator.layers import MLP, Attention, GatedMLP, Head, HyperConnection, Linear, MoE
from simulator.layers.layer import Direction, Layer, Slice, is_mixer, tensor_share
from simulator.model import ModelSpec
from simulator.parallel.scheme import Scheme, divisors, is_one
from simulator.units import where
from simulator.work import Overlap, Serial, Work

#: Elements of the longest scale block along one axis; larger ones are squares.
_ROW_BLOCK = 128


def reads_by_columns(layer: Layer) -> bool:
    """Whether one column-split product reads the layer's normed input: the last but one step of its backward."""
    return isinstance(layer, (Attention, GatedMLP, MLP))


def beside_product(work: Work, gradient: int, messages: list[Work]) -> Work:
    """The same backward with messages beside a gradient of that product: by its input (0) or its weight (1)."""
    assert isinstance(work, Serial)
    *others, product, last = work.parts
    assert isinstance(product, Serial)
    halves = list(product.parts)
    halves[gradient] = Overlap([*messages, halves[gradient]]) if len(messages) == 1 else Overlap([Serial(messages), halves[gradient]])
    return Serial([*others, Serial(halves), last])


class Tensor(Scheme):
    """`tp` ranks share every layer."""

    field = "tp"

    def shard(self, held: Slice, layer: Layer) -> Slice:
        """Heads / t, max(1, kv_heads / t), width / t; experts keep their width where expert ranks split their number."""
        t = self.degree
        if is_one(t):
            return held
        if is_mixer(layer):
            return tensor_share(held, t)
        if isinstance(layer, HyperConnection):
            return held._replace(tensor_ranks=t)
        if isinstance(layer, MoE):
            width = where(held.expert_ranks > 1, held.intermediate, held.intermediate / t)
            return held._replace(intermediate=width, tensor_ranks=t)
        if isinstance(layer, (GatedMLP, MLP, Linear)):
            return held._replace(intermediate=held.intermediate / t, tensor_ranks=t)
        return held._replace(vocabulary=held.vocabulary / t, tensor_ranks=t)

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction) -> Work:  # noqa: ARG002 (any cache)
        """All-reduce of the layer's output; all-gather of the logits.

        Experts reached by an all-to-all return whole rows to the rank that asked, which holds 1 / t of the tokens:
        an all-gather restores the rest.
        """
        if is_one(self.degree) or isinstance(layer, HyperConnection):
            return work
        group = self.layout.groups["tp"]
        payload = held.tokens * (self.layout.hidden_size * BF16.bytes)
        if isinstance(layer, Head):
            logits = held.sequences * held.vocabulary * held.tensor_ranks * BF16.bytes
            return Serial([work, message("gather logits", "all_gather", group=group, payload_bytes=logits)])
        inner = layer.inner_elements(held) if is_mixer(layer) else 0.0
        if inner:
            within = held.tokens * (inner * BF16.bytes)
            return Serial([
                work, message("inner all-reduce", "all_reduce", group=group, payload_bytes=within),
                message("tensor all-reduce", "all_reduce", group=group, payload_bytes=payload),
            ])  # fmt: skip
        shares = self.layout.expert_shares
        if not isinstance(layer, MoE) or is_one(shares):
            sums: list[Work] = []
            if not is_one(self.layout.sp):
                shared = where(self.layout.sp > 1, 1.0, 0.0)
                sums.append(message("sequence reduce-scatter", "reduce_scatter", group=group, payload_bytes=payload * shared))
                payload = payload * (1 - shared)
            sums.append(message("tensor all-reduce", "all_reduce", group=group, payload_bytes=payload))
            if direction is Direction.BACKWARD and reads_by_columns(layer):
                return beside_product(work, 1, sums)
            return Serial([work, *sums])
        travels = where(shares > 1, 1.0, 0.0)
        return Serial([
            work, message("gather tokens", "all_gather", group=group, payload_bytes=payload * travels),
            message("tensor all-reduce", "all_reduce", group=group, payload_bytes=payload * (1 - travels)),
        ])  # fmt: skip

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """Heads and widths must divide; key-value heads divide or are replicated evenly."""
        t = int(self.degree)
        for layer in model.layers:
            for name, count, copied in layer.splits if is_mixer(layer) else ():
                if copied and max(count, t) % min(count, t):
                    yield f"--tp {t}: {model.name} has {count} {name}; the degree must divide them or be a multiple"
                    return
                if not copied and count % t:
                    yield f"--tp {t}: {model.name} has {count} {name}; use a divisor: {divisors(count)}"
                    return
            if isinstance(layer, (GatedMLP, MLP, MoE)):
                width = layer.moe_intermediate_size if isinstance(layer, MoE) else layer.intermediate_size
                split_experts = isinstance(layer, MoE) and self.layout.ep > 1
                if width % t and not split_experts:
                    yield f"--tp {t}: width {width} of {model.name}'s feed-forward does not divide by {t}"
                    return
                # square scale blocks cannot be cut; formats scaled along one axis are padded by the engines
                block = layer.expert_weight.block if isinstance(layer, MoE) else layer.weight.block
                side = math.isqrt(int(block))
                if block > _ROW_BLOCK and not split_experts and (width // t) % side:
                    yield (
                        f"--tp {t}: {width} / {t} = {width // t} splits the {side}-wide scale blocks of {model.name}; "
                        f"use a smaller degree, or --ep to split experts instead"
                    )
                    return
