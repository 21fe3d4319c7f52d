"""Mixture of experts: router, routed experts, shared experts.

Legend: D hidden_size, E num_experts, k num_experts_per_tok, F moe_intermediate_size, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, W_BF16, CacheFormat, WeightFormat
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import activation, backward, copy, norm
from simulator.kernels.gemm import Size, gemm, gemm_backward
from simulator.kernels.grouped_gemm import busiest_rank, experts_hit, grouped_gemm
from simulator.layers.layer import Direction, Module, Slice
from simulator.units import Count, Num, maximum
from simulator.work import Op, Serial, Work


@dataclass(frozen=True, slots=True)
class MoE:
    """Parameters D E (router, held whole by every rank) + 3 D F E + 3 D F_shared.

    Rows and distinct experts are those of the busiest expert rank under uniform routing.
    Source: FORMULAS 1.19, 5.4.
    """

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_intermediate_size: int = 0
    router_bias: bool = False
    expert_bias: bool = False
    shared_gate: bool = False
    weight: WeightFormat = W_BF16
    expert_weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All experts at full width; `intermediate` is the width of one expert."""
        return Slice(segments, experts=float(self.num_experts), intermediate=float(self.moe_intermediate_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """Router, norm and the experts' output biases are replicated; shared experts are split like a dense layer."""
        width = self.hidden_size
        found = [
            Module("experts.gate_up_proj", held.experts * held.intermediate * (2 * width), self.expert_weight),
            Module("experts.down_proj", held.experts * held.intermediate * width, self.expert_weight),
            Module("router", float(width * self.num_experts), W_BF16, replicated=True),
            Module("post_attention_layernorm", float(width), W_BF16, replicated=True),
        ]
        if self.expert_bias:
            found.append(Module("experts.gate_up_bias", held.experts * (2 * held.intermediate), W_BF16))
            found.append(Module("experts.down_bias", held.experts * width, W_BF16, replicated=True))
        if self.router_bias:
            found.append(Module("router.bias", float(self.num_experts), W_BF16, replicated=True))
        if self.shared_intermediate_size:
            found.append(Module("shared_experts", self._shared(held) * (3 * width), self.weight))
        if self.shared_gate:
            found.append(Module("shared_expert_gate", float(width), W_BF16, replicated=True))
        return found

    def _shared(self, held: Slice) -> Num:
        return self.shared_intermediate_size / held.tensor_ranks

    def routed(self, held: Slice) -> tuple[Count, Count]:
        """Rows and distinct experts on the busiest expert rank."""
        tokens = held.tokens * held.token_ranks
        if type(held.expert_ranks) is float and held.expert_ranks == 1.0:
            hit = experts_hit(
                experts=held.experts, total_experts=self.num_experts, top_k=self.num_experts_per_tok, tokens=tokens
            )
            return tokens * self.num_experts_per_tok, hit
        return busiest_rank(
            tokens=tokens, top_k=self.num_experts_per_tok, total_experts=self.num_experts, ranks=held.expert_ranks
        )

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, router, permute, gate and up, activation, down, combine, shared experts."""
        tokens, width, inner = held.tokens, float(self.hidden_size), held.intermediate
        rows, hit = self.routed(held)
        first = norm("moe norm", tokens=tokens, width=width)
        router: Size = {"m": tokens, "n": float(self.num_experts), "k": width}
        permute = copy("permute", rows=rows, width=width)
        gate = activation("expert activation", tokens=rows, width=inner)
        combine = copy("combine", rows=rows, width=width)
        if direction is Direction.BACKWARD:
            up = grouped_gemm("experts gate up dX", rows=rows, experts=hit, n=width, k=2 * inner, weight=self.expert_weight)
            down = grouped_gemm("experts down dX", rows=rows, experts=hit, n=inner, k=width, weight=self.expert_weight)
            return Serial([
                backward(combine), down, self._weight_gradient("experts down dW", rows, hit, width, inner), backward(gate),
                up, self._weight_gradient("experts gate up dW", rows, hit, 2 * inner, width), backward(permute),
                *self._shared_work(held, direction), gemm_backward("router", **router), backward(first),
            ])  # fmt: skip
        return Serial([
            first, gemm("router", **router), permute,
            grouped_gemm("experts gate up", rows=rows, experts=hit, n=2 * inner, k=width, weight=self.expert_weight), gate,
            grouped_gemm("experts down", rows=rows, experts=hit, n=width, k=inner, weight=self.expert_weight), combine,
            *self._shared_work(held, direction),
        ])  # fmt: skip

    @staticmethod
    def _weight_gradient(name: str, rows: Num, hit: Num, n: Num, k: Num) -> Op:
        """DW of each expert: k x n from rows / experts rows each."""
        return grouped_gemm(name, rows=hit * k, experts=hit, n=n, k=rows / maximum(hit, 1.0))

    def _shared_work(self, held: Slice, direction: Direction) -> list[Work]:
        if not self.shared_intermediate_size:
            return []
        tokens, width, inner = held.tokens, float(self.hidden_size), self._shared(held)
        gate = activation("shared activation", tokens=tokens, width=inner)
        saved = tokens * inner * BF16.bytes
        if direction is Direction.BACKWARD:
            return [
                gemm_backward("shared down", m=tokens, n=width, k=inner, weight=self.weight, freed_bytes=saved),
                backward(gate), gemm_backward("shared gate up", m=tokens, n=2 * inner, k=width, weight=self.weight),
            ]  # fmt: skip
        return [
            gemm("shared gate up", m=tokens, n=2 * inner, k=width, weight=self.weight), gate,
            gemm("shared down", m=tokens, n=width, k=inner, weight=self.weight, saved_bytes=saved),
        ]
