"""Mixture of experts: router, routed experts, shared experts.

Legend: D hidden_size, E num_experts, k num_experts_per_tok, F moe_intermediate_size, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from simulator.dtypes import BF16, W_BF16, CacheFormat, WeightFormat
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import activation, add, backward, combine, elementwise, norm, permute
from simulator.kernels.gemm import Size, gemm, gemm_backward
from simulator.kernels.grouped_gemm import busiest_rank, experts_hit, grouped_gemm, grouped_gemm_backward
from simulator.layers.layer import Direction, Module, Slice
from simulator.units import Count, Num, minimum
from simulator.work import Op, Serial, Work, beside


@dataclass(frozen=True, slots=True)
class MoE:
    """Parameters D E (router, held whole by every rank) + 3 D F E + 3 D F_shared; plain experts (`gated` false) 2 instead
    of 3.  `latent_size` experts work in a narrower space, with 2 D latent more for the way in and out (Nemotron-3 Super).
    `hash_routed` layers (DeepSeek-V4) look their experts up by token: the router's weights and
    work remain, so that the two are equal here.

    Rows and distinct experts are those of the busiest expert rank under uniform routing; with `balanced` routing every rank
    receives as many rows, and every expert that can be one (what benchmarks of engines force).
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
    gated: bool = True
    latent_size: int | None = None
    hash_routed: bool = field(default=False, compare=False)
    shared_weight: WeightFormat | None = None
    norm_parameters: int = 1
    balanced: bool = False

    @property
    def expert_width(self) -> int:
        """What an expert reads and writes per row."""
        return self.latent_size or self.hidden_size

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All experts at full width; `intermediate` is the width of one expert."""
        return Slice(segments, experts=float(self.num_experts), intermediate=float(self.moe_intermediate_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """Router, norm and the experts' output biases are replicated; shared experts are split like a dense layer."""
        width, inner, ups = self.hidden_size, self.expert_width, self._ups
        found = [
            Module("experts.gate_up_proj", held.experts * held.intermediate * (ups * inner), self.expert_weight),
            Module("experts.down_proj", held.experts * held.intermediate * inner, self.expert_weight),
            Module("router", float(width * self.num_experts), W_BF16, replicated=True),
            Module("post_attention_layernorm", float(self.norm_parameters * width), W_BF16, replicated=True),
        ]
        if self.latent_size:
            found.append(Module("latent_proj", float(2 * width * self.latent_size), self.weight, replicated=True))
        if self.expert_bias:
            found.append(Module("experts.gate_up_bias", held.experts * (ups * held.intermediate), W_BF16))
            found.append(Module("experts.down_bias", held.experts * inner, W_BF16, replicated=True))
        if self.router_bias:
            found.append(Module("router.bias", float(self.num_experts), W_BF16, replicated=True))
        if self.shared_intermediate_size:
            found.append(Module("shared_experts", self._shared(held) * ((ups + 1) * width), self.shared_weight or self.weight))
        if self.shared_gate:
            found.append(Module("shared_expert_gate", float(width), W_BF16, replicated=True))
        return found

    @property
    def _ups(self) -> int:
        return 2 if self.gated else 1

    def _activation(self, name: str, rows: Num, width: Num) -> Op:
        if self.gated:
            return activation(name, tokens=rows, width=width)
        return elementwise(name, rows=rows, read=width, written=width, impl="activation", kept=width)

    def _shared(self, held: Slice) -> Num:
        return self.shared_intermediate_size / held.tensor_ranks

    def routed(self, held: Slice) -> tuple[Count, Count]:
        """Rows and distinct experts on the busiest expert rank."""
        tokens = held.tokens * held.token_ranks
        if self.balanced:
            rows = tokens * self.num_experts_per_tok / held.expert_ranks
            return rows, minimum(rows, held.experts)
        if type(held.expert_ranks) is float and held.expert_ranks == 1.0:
            hit = experts_hit(
                experts=held.experts, total_experts=self.num_experts, top_k=self.num_experts_per_tok, tokens=tokens
            )
            return tokens * self.num_experts_per_tok, hit
        return busiest_rank(
            tokens=tokens, top_k=self.num_experts_per_tok, total_experts=self.num_experts, ranks=held.expert_ranks
        )

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, router, permute, gate and up, activation, down, combine, shared experts.

        Backward needs each expert's rows (those permuted, those activated) again.  The shares' own gradient, which needs the
        experts' outputs, is neglected: engines that train weigh the activated rows instead (Megatron-Core).
        """
        tokens, width, inner = held.tokens, float(self.hidden_size), held.intermediate
        rows, hit = self.routed(held)
        outer, ups, weight = float(self.expert_width), self._ups * inner, self.expert_weight
        first = norm("moe norm", tokens=tokens, width=width)
        router: Size = {"m": tokens, "n": float(self.num_experts), "k": width}
        sent = permute("permute", tokens=tokens, rows=rows, width=outer)
        gate = self._activation("expert activation", rows, inner)
        summed = combine("unpermute", tokens=tokens, rows=rows, width=outer)
        into: Size = {"m": tokens, "n": outer, "k": width}
        out_of: Size = {"m": tokens, "n": width, "k": outer}
        narrow = self.latent_size is not None
        sent_bytes, inner_bytes = rows * (outer * BF16.bytes), rows * (inner * BF16.bytes)
        # what shared experts are to read, or the gradient that they left, lives beside the routed ones
        shared_bytes = tokens * (width * BF16.bytes) if self.shared_intermediate_size else 0.0
        if direction is Direction.BACKWARD:
            down = grouped_gemm_backward("experts down", rows=rows, experts=hit, n=outer, k=inner, weight=weight, freed_bytes=inner_bytes)
            up = grouped_gemm_backward("experts gate up", rows=rows, experts=hit, n=ups, k=outer, weight=weight, freed_bytes=sent_bytes)
            return Serial([
                *self._shared_work(held, direction), *([gemm_backward("latent out", **out_of, weight=self.weight)] if narrow else []),
                *beside(shared_bytes, backward(summed), *down, backward(gate), *up, backward(sent)),
                *([gemm_backward("latent in", **into, weight=self.weight)] if narrow else []),
                gemm_backward("router", **router), backward(first),
            ])  # fmt: skip
        up_op = grouped_gemm("experts gate up", rows=rows, experts=hit, n=ups, k=outer, weight=weight, saved_bytes=sent_bytes)
        down_op = grouped_gemm("experts down", rows=rows, experts=hit, n=outer, k=inner, weight=weight, saved_bytes=inner_bytes)
        return Serial([
            first, gemm("router", **router), *([gemm("latent in", **into, weight=self.weight)] if narrow else []), sent,
            *beside(shared_bytes, up_op, gate, down_op, summed),
            *([gemm("latent out", **out_of, weight=self.weight)] if narrow else []), *self._shared_work(held, direction),
        ])  # fmt: skip

    def _shared_work(self, held: Slice, direction: Direction) -> list[Work]:
        if not self.shared_intermediate_size:
            return []
        tokens, width, inner = held.tokens, float(self.hidden_size), self._shared(held)
        ups, weight = self._ups * inner, self.shared_weight or self.weight
        gate = self._activation("shared activation", tokens, inner)
        saved = tokens * inner * BF16.bytes
        if direction is Direction.BACKWARD:
            return [
                gemm_backward("shared down", m=tokens, n=width, k=inner, weight=weight, freed_bytes=saved),
                backward(gate), gemm_backward("shared gate up", m=tokens, n=ups, k=width, weight=weight),
            ]  # fmt: skip
        return [
            # beside the routed experts' sum
            *beside(
                tokens * (width * BF16.bytes), gemm("shared gate up", m=tokens, n=ups, k=width, weight=weight), gate,
                gemm("shared down", m=tokens, n=width, k=inner, weight=weight, saved_bytes=saved),
            ),
            # vLLM and SGLang add the two outputs in a kernel of its own
            add("shared sum", rows=tokens, width=width),
        ]
