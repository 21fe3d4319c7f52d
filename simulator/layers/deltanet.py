"""Gated delta rule layers: gated DeltaNet (Qwen3-Next, Qwen3.5) and Kimi delta attention.

Legend: D hidden_size, h_v value heads, h_k key heads, d_k and d_v head widths, k convolution kernel, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, FP32, W_BF16, CacheFormat, CacheRow, DType, WeightFormat
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import activation
from simulator.kernels.scan import delta_chunk_flops, delta_step_flops, recurrent, short_convolution
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Module, Remembers, Slice, Split, StateRules
from simulator.layers.steps import Steps
from simulator.units import Num
from simulator.work import Work

#: Tokens per chunk of the delta rule's chunked form (flash-linear-attention).
CHUNK = 64


@dataclass(frozen=True, slots=True)
class GatedDeltaNet(Remembers):
    """One decay per head, keys shared by h_v / h_k value heads.

    Parameters: D (2 h_k d_k + 2 h_v d_v) + 2 D h_v + k (2 h_k d_k + h_v d_v) + 2 h_v + d_v + h_v d_v D.
    Keeps per sequence h_v d_k d_v of state in `ssm_dtype` and k - 1 columns of convolution inputs.
    Source: FORMULAS 1.18, 2.1; transformers 5.23.0 qwen3_next; vLLM mamba_utils.py.
    """

    hidden_size: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    ssm_dtype: DType = BF16
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All value heads, and all key heads."""
        return Slice(segments, heads=float(self.linear_num_value_heads), kv_heads=float(self.linear_num_key_heads))

    @property
    def splits(self) -> tuple[Split, ...]:
        """Value heads are divided; key heads beyond their number are copied."""
        return (Split("linear value heads", self.linear_num_value_heads), Split("linear key heads", self.linear_num_key_heads, copied=True))

    def _channels(self, held: Slice) -> Num:
        return held.kv_heads * (2 * self.linear_key_head_dim) + held.heads * self.linear_value_head_dim

    def modules(self, held: Slice) -> Sequence[Module]:
        """Projections by head; one norm over d_v for all heads."""
        width, value = self.hidden_size, held.heads * self.linear_value_head_dim
        return [
            Module("in_proj_qkvz", (self._channels(held) + value) * width, self.weight),
            Module("in_proj_ba", held.heads * (2 * width), W_BF16),
            Module("conv1d", self._channels(held) * self.linear_conv_kernel_dim, W_BF16),
            Module("dt_bias_A_log", 2 * held.heads, W_BF16),
            Module("gated_norm", float(self.linear_value_head_dim), W_BF16, replicated=True),
            Module("out_proj", value * width, self.weight),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """A state and the last inputs of the convolution."""
        columns = self.linear_conv_kernel_dim - rules.conv_spare
        state = held.heads * (self.linear_key_head_dim * self.linear_value_head_dim)
        return (
            Kept(Keep.SSM, CacheRow(state), every=0, dtype=self.ssm_dtype),
            Kept(Keep.CONV, CacheRow(self._channels(held) * columns), every=0, dtype=BF16),
        )

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, projections, convolution, delta rule, gated norm, out."""
        tokens, width, channels = held.tokens, float(self.hidden_size), self._channels(held)
        d_k, d_v = self.linear_key_head_dim, self.linear_value_head_dim
        value = held.heads * d_v
        steps = Steps(direction)
        steps.norm("attention norm", tokens=tokens, width=width)
        steps.linear("qkvz", m=tokens, n=channels + value, k=width, weight=self.weight)
        steps.linear("ba", m=tokens, n=2 * held.heads, k=width)
        steps.add(short_convolution("convolution", tokens=tokens, channels=channels, kernel=self.linear_conv_kernel_dim, backward=steps.is_backward))
        steps.add(*(
            recurrent(
                "delta rule", segment, heads=held.heads, d_k=d_k, d_v=d_v, chunk=CHUNK,
                chunk_flops=held.heads * delta_chunk_flops(d_k=d_k, d_v=d_v, chunk=CHUNK),
                step_flops=held.heads * delta_step_flops(d_k=d_k, d_v=d_v), inputs=channels + 2 * held.heads, outputs=value,
                state_dtype=self.ssm_dtype, impl="delta", backward=steps.is_backward,
            ) for segment in held.segments
        ))  # fmt: skip
        steps.stream(activation("gated norm", tokens=tokens, width=value))
        steps.linear("out", m=tokens, n=width, k=value, weight=self.weight)
        return steps.serial()


@dataclass(frozen=True, slots=True)
class KimiDeltaAttention(Remembers):
    """KDA: one decay per channel, from a low-rank gate; as many key as value heads, of one width d.

    Parameters: 4 D h d (q, k, v, o) + 3 k h d + 2 (D d + d h d) (decay and output gates) + D h + h d + h + d.
    Keeps per sequence h d^2 of state and k - 1 columns of 3 h d convolution inputs.
    Source: FORMULAS 1.18, 2.1; transformers 5.23.0 kimi_linear.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    short_conv_kernel_size: int
    ssm_dtype: DType = FP32
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads."""
        return Slice(segments, heads=float(self.num_heads), kv_heads=float(self.num_heads))

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads are divided."""
        return (Split("linear heads", self.num_heads),)

    def modules(self, held: Slice) -> Sequence[Module]:
        """The inner sides of both low-rank gates are every rank's."""
        width, d = self.hidden_size, self.head_dim
        inner = held.heads * d
        return [
            Module("qkv_proj", inner * (3 * width), self.weight),
            Module("conv1d", inner * (3 * self.short_conv_kernel_size), W_BF16),
            Module("f_a_proj", float(width * d), self.weight, replicated=True),
            Module("f_b_proj", inner * d, self.weight),
            Module("dt_bias_A_log", inner + held.heads, W_BF16),
            Module("b_proj", held.heads * width, W_BF16),
            Module("g_a_proj", float(width * d), self.weight, replicated=True),
            Module("g_b_proj", inner * d, self.weight),
            Module("o_norm", float(d), W_BF16, replicated=True),
            Module("o_proj", inner * width, self.weight),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """A state and the last inputs of the convolutions of q, k and v."""
        columns = self.short_conv_kernel_size - rules.conv_spare
        return (
            Kept(Keep.SSM, CacheRow(held.heads * (self.head_dim * self.head_dim)), every=0, dtype=self.ssm_dtype),
            Kept(Keep.CONV, CacheRow(held.heads * (3 * self.head_dim * columns)), every=0, dtype=BF16),
        )

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, projections, convolution, gates, delta rule, gated norm, out."""
        tokens, width, d = held.tokens, float(self.hidden_size), self.head_dim
        inner = held.heads * d
        steps = Steps(direction)
        steps.norm("attention norm", tokens=tokens, width=width)
        steps.linear("qkv", m=tokens, n=3 * inner, k=width, weight=self.weight)
        steps.linear("gates down", m=tokens, n=2.0 * d + held.heads, k=width, weight=self.weight)
        steps.linear("gates up", m=tokens, n=2 * inner, k=float(d), weight=self.weight)
        steps.add(short_convolution("convolution", tokens=tokens, channels=3 * inner, kernel=self.short_conv_kernel_size, backward=steps.is_backward))
        steps.add(*(
            recurrent(
                "delta rule", segment, heads=held.heads, d_k=d, d_v=d, chunk=CHUNK,
                chunk_flops=held.heads * delta_chunk_flops(d_k=d, d_v=d, chunk=CHUNK),
                step_flops=held.heads * delta_step_flops(d_k=d, d_v=d), inputs=4 * inner + held.heads, outputs=inner,
                state_dtype=self.ssm_dtype, impl="delta", backward=steps.is_backward,
            ) for segment in held.segments
        ))  # fmt: skip
        steps.stream(activation("gated norm", tokens=tokens, width=inner))
        steps.linear("out", m=tokens, n=width, k=inner, weight=self.weight)
        return steps.serial()
