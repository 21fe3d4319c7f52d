"""Linear attention with a fixed decay: lightning attention (MiniMax-01, M1) and retention (RetNet).

Legend: D hidden_size, h heads, d head width, d_k and d_v where they differ, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, W_BF16, CacheFormat, CacheRow, DType, WeightFormat
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import activation, rotary
from simulator.kernels.scan import linear_chunk_flops, linear_step_flops, recurrent
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Module, Remembers, Slice, Split, StateRules
from simulator.layers.steps import Steps
from simulator.work import Work


@dataclass(frozen=True, slots=True)
class LightningAttention(Remembers):
    """MHA without softmax, with an output gate and a norm over all heads.

    Parameters: 5 D h d (q, k, v, gate, out) + h d.  Keeps h d^2 of state per sequence in the cache's element type.
    Source: FORMULAS 1.15, 2.1; transformers 5.23.0 minimax; 2501.08313 section 2.2.
    """

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    block_size: int = 256
    state_dtype: DType = BF16
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads."""
        return Slice(segments, heads=float(self.num_attention_heads), kv_heads=float(self.num_attention_heads))

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads are divided."""
        return (Split("attention heads", self.num_attention_heads),)

    def modules(self, held: Slice) -> Sequence[Module]:
        """Everything by head but the block's norm."""
        inner, width = held.heads * self.head_dim, self.hidden_size
        return [
            Module("qkv_proj", inner * (3 * width), self.weight),
            Module("output_gate", inner * width, self.weight),
            Module("out_proj", inner * width, self.weight),
            Module("norm", inner, W_BF16),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (one way to hold it)
        """The state alone."""
        return (Kept(Keep.LINEAR, CacheRow(held.heads * (self.head_dim * self.head_dim)), every=0, dtype=self.state_dtype),)

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, qkv, core, norm and gate, out."""
        tokens, width, d = held.tokens, float(self.hidden_size), self.head_dim
        inner = held.heads * d
        steps = Steps(direction)
        steps.norm("attention norm", tokens=tokens, width=width)
        steps.linear("qkv gate", m=tokens, n=4 * inner, k=width, weight=self.weight)
        steps.add(*(
            recurrent(
                "core", segment, heads=held.heads, d_k=d, d_v=d, chunk=self.block_size,
                chunk_flops=held.heads * linear_chunk_flops(d_k=d, d_v=d, chunk=self.block_size),
                step_flops=held.heads * linear_step_flops(d_k=d, d_v=d), inputs=3 * inner, outputs=inner,
                state_dtype=self.state_dtype, backward=steps.is_backward,
            ) for segment in held.segments
        ))  # fmt: skip
        steps.stream(activation("gated norm", tokens=tokens, width=inner))
        steps.linear("out", m=tokens, n=width, k=inner, weight=self.weight)
        return steps.serial()


@dataclass(frozen=True, slots=True)
class Retention(Remembers):
    """RetNet: rotated queries and keys of d_k, values of d_v, a gate of all values, a fixed decay per head.

    Parameters: 2 D h d_k (q, k) + 3 D h d_v (v, gate, out).  Keeps h d_k d_v of state per sequence.
    Source: 2307.08621 section 2; FORMULAS 1.15.
    """

    hidden_size: int
    num_heads: int
    key_head_dim: int
    value_head_dim: int
    chunk_size: int = 512
    state_dtype: DType = BF16
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads."""
        return Slice(segments, heads=float(self.num_heads), kv_heads=float(self.num_heads))

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads are divided."""
        return (Split("retention heads", self.num_heads),)

    def modules(self, held: Slice) -> Sequence[Module]:
        """Everything by head but the block's norm; the group norm has no weights."""
        width = self.hidden_size
        return [
            Module("qk_proj", held.heads * (2 * self.key_head_dim * width), self.weight),
            Module("vg_proj", held.heads * (2 * self.value_head_dim * width), self.weight),
            Module("out_proj", held.heads * (self.value_head_dim * width), self.weight),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (one way to hold it)
        """The state alone."""
        return (Kept(Keep.LINEAR, CacheRow(held.heads * (self.key_head_dim * self.value_head_dim)), every=0, dtype=self.state_dtype),)

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, q k v g, rotary, core, norm and gate, out."""
        tokens, width, d_k, d_v = held.tokens, float(self.hidden_size), self.key_head_dim, self.value_head_dim
        steps = Steps(direction)
        steps.norm("attention norm", tokens=tokens, width=width)
        steps.linear("qkvg", m=tokens, n=held.heads * (2.0 * d_k + 2.0 * d_v), k=width, weight=self.weight)
        steps.stream(rotary("rotary", tokens=tokens, width=held.heads * (2.0 * d_k)))
        steps.add(*(
            recurrent(
                "core", segment, heads=held.heads, d_k=d_k, d_v=d_v, chunk=self.chunk_size,
                chunk_flops=held.heads * linear_chunk_flops(d_k=d_k, d_v=d_v, chunk=self.chunk_size),
                step_flops=held.heads * linear_step_flops(d_k=d_k, d_v=d_v), inputs=held.heads * (2.0 * d_k + d_v),
                outputs=held.heads * float(d_v), state_dtype=self.state_dtype, backward=steps.is_backward,
            ) for segment in held.segments
        ))  # fmt: skip
        steps.stream(activation("gated norm", tokens=tokens, width=held.heads * float(d_v)))
        steps.linear("out", m=tokens, n=width, k=held.heads * float(d_v), weight=self.weight)
        return steps.serial()
