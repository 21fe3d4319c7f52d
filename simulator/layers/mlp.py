"""Feed-forward layers: gated (SwiGLU and kin) and plain (GELU, squared ReLU).

Legend: D hidden_size, F intermediate_size, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, W_BF16, CacheFormat, WeightFormat
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import activation, backward, elementwise, norm
from simulator.kernels.gemm import gemm, gemm_backward
from simulator.layers.layer import Direction, Module, Slice
from simulator.layers.steps import Steps
from simulator.work import Serial, Work


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """Parameters 3 D F and `norm_parameters` vectors of D; flops 6 D F per token.  Source: FORMULAS 1.19."""

    hidden_size: int
    intermediate_size: int
    weight: WeightFormat = W_BF16
    norm_parameters: int = 1

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The full width."""
        return Slice(segments, intermediate=float(self.intermediate_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """gate, up, down and the block's norm."""
        width = self.hidden_size
        return [
            Module("gate_up_proj", held.intermediate * (2 * width), self.weight),
            Module("down_proj", held.intermediate * width, self.weight),
            Module("post_attention_layernorm", float(self.norm_parameters * width), W_BF16, replicated=True),
        ]

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, gate and up, activation, down."""
        tokens, width, inner = held.tokens, float(self.hidden_size), held.intermediate
        first = norm("mlp norm", tokens=tokens, width=width)
        gate = activation("activation", tokens=tokens, width=inner)
        saved = tokens * inner * BF16.bytes
        if direction is Direction.BACKWARD:
            return Serial([
                gemm_backward("down", m=tokens, n=width, k=inner, weight=self.weight, freed_bytes=saved), backward(gate),
                gemm_backward("gate up", m=tokens, n=2 * inner, k=width, weight=self.weight), backward(first),
            ])  # fmt: skip
        return Serial([
            first, gemm("gate up", m=tokens, n=2 * inner, k=width, weight=self.weight), gate,
            gemm("down", m=tokens, n=width, k=inner, weight=self.weight, saved_bytes=saved),
        ])  # fmt: skip


@dataclass(frozen=True, slots=True)
class MLP:
    """Parameters 2 D F (+ F + D of bias) and `norm_parameters` vectors of D; flops 4 D F per token.

    Source: FORMULAS 1.19; transformers 5.23.0 bloom, gpt2, mpt, nemotron_h (relu2).
    """

    hidden_size: int
    intermediate_size: int
    mlp_bias: bool = False
    weight: WeightFormat = W_BF16
    norm_parameters: int = 1

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The full width."""
        return Slice(segments, intermediate=float(self.intermediate_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """up, down and the block's norm."""
        width = self.hidden_size
        found = [
            Module("up_proj", held.intermediate * width, self.weight),
            Module("down_proj", held.intermediate * width, self.weight),
            Module("post_attention_layernorm", float(self.norm_parameters * width), W_BF16, replicated=True),
        ]
        if self.mlp_bias:
            found.append(Module("up_bias", held.intermediate, W_BF16))
            found.append(Module("down_bias", float(width), W_BF16, replicated=True))
        return found

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, up, activation, down."""
        tokens, width, inner = held.tokens, float(self.hidden_size), held.intermediate
        steps = Steps(direction)
        steps.norm("mlp norm", tokens=tokens, width=width)
        steps.linear("up", m=tokens, n=inner, k=width, weight=self.weight)
        steps.stream(elementwise("activation", rows=tokens, read=inner, written=inner, impl="activation", kept=inner))
        steps.linear("down", m=tokens, n=width, k=inner, weight=self.weight, saved_bytes=tokens * inner * BF16.bytes)
        return steps.serial()
