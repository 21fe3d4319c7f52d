"""State space layers: Mamba-1, Mamba-2 (SSD), S4, and the short convolution of LFM2.

Legend: D hidden_size, d_in inner channels, N state size, R time-step rank, k convolution kernel, h heads of width p,
g groups, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, FP32, W_BF16, CacheFormat, CacheRow, DType, WeightFormat
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import activation, norm_in_place
from simulator.kernels.scan import long_convolution, recurrent, selective_scan, short_convolution, ssd_chunk_flops
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Module, Remembers, Slice, Split, StateRules
from simulator.layers.steps import Steps
from simulator.units import Num
from simulator.work import Work


@dataclass(frozen=True, slots=True)
class Mamba(Remembers):
    """Mamba-1: every channel its own N states, scanned on the fp32 pipes.

    Parameters: 2 D d_in (in) + k d_in (+ d_in) + d_in (R + 2 N) + R d_in + d_in + d_in N + d_in + d_in D (out);
    `inner_norms` (Jamba) R + 2 N more.  Keeps d_in N of state and k - 1 columns of d_in inputs per sequence.
    Tensor ranks share channels and sum R + 2 N values per token inside.
    Source: FORMULAS 1.16, 2.1; transformers 5.23.0 mamba, jamba.
    """

    hidden_size: int
    intermediate_size: int
    state_size: int
    conv_kernel: int
    time_step_rank: int
    use_conv_bias: bool = True
    use_bias: bool = False
    inner_norms: bool = False
    ssm_dtype: DType = BF16
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All channels: each is a head of its own."""
        return Slice(segments, heads=float(self.intermediate_size), kv_heads=1.0)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Channels are divided."""
        return (Split("Mamba channels", self.intermediate_size),)

    def inner_elements(self, held: Slice) -> Num:  # noqa: ARG002 (the same on every rank)
        """Time step, B and C come from all channels."""
        return float(self.time_step_rank + 2 * self.state_size)

    def modules(self, held: Slice) -> Sequence[Module]:
        """Everything by channel."""
        width, inner, rest = self.hidden_size, held.heads, self.time_step_rank + 2 * self.state_size
        found = [
            Module("in_proj", inner * (2 * width), self.weight),
            Module("conv1d", inner * (self.conv_kernel + (1 if self.use_conv_bias else 0)), W_BF16),
            Module("x_proj", inner * rest, self.weight),
            Module("dt_proj", inner * (self.time_step_rank + 1), self.weight),
            Module("A_log_D", inner * (self.state_size + 1), W_BF16),
            Module("out_proj", inner * width, self.weight),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]
        if self.inner_norms:
            found.append(Module("inner_norms", float(rest), W_BF16, replicated=True))
        if self.use_bias:
            found.append(Module("in_proj_bias", 2 * inner, W_BF16))
            found.append(Module("out_proj_bias", float(width), W_BF16, replicated=True))
        return found

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """A state and the last inputs of the convolution."""
        return (
            Kept(Keep.SSM, CacheRow(held.heads * self.state_size), every=0, dtype=self.ssm_dtype),
            Kept(Keep.CONV, CacheRow(held.heads * (self.conv_kernel - rules.conv_spare)), every=0, dtype=BF16),
        )

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, in, convolution, x, dt, scan (gated), out."""
        tokens, width, inner = held.tokens, float(self.hidden_size), held.heads
        rest = float(self.time_step_rank + 2 * self.state_size)
        steps = Steps(direction)
        steps.norm("mamba norm", tokens=tokens, width=width)
        steps.linear("in", m=tokens, n=2 * inner, k=width, weight=self.weight)
        steps.add(short_convolution("convolution", tokens=tokens, channels=inner, kernel=self.conv_kernel, backward=steps.is_backward))
        steps.linear("x", m=tokens, n=rest, k=inner, weight=self.weight)
        if self.inner_norms:
            steps.stream(norm_in_place("inner norms", tokens=tokens, width=rest))
        steps.linear("dt", m=tokens, n=inner, k=float(self.time_step_rank), weight=self.weight)
        steps.add(*(
            selective_scan(
                "scan", segment, channels=inner, state=self.state_size, state_dtype=self.ssm_dtype, backward=steps.is_backward
            ) for segment in held.segments
        ))  # fmt: skip
        steps.linear("out", m=tokens, n=width, k=inner, weight=self.weight)
        return steps.serial()


@dataclass(frozen=True, slots=True)
class Mamba2(Remembers):
    """Mamba-2: h heads of p channels with one decay each, B and C shared by the heads of a group.

    Parameters: D (2 h p + 2 g N + h) + k (h p + 2 g N) (+ bias) + 3 h + h p + h p D.
    Keeps h p N of state and k - 1 columns of h p + 2 g N inputs per sequence.
    Source: FORMULAS 1.17, 2.1; transformers 5.23.0 nemotron_h.
    """

    hidden_size: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int = 256
    use_conv_bias: bool = True
    ssm_dtype: DType = BF16
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads and groups."""
        return Slice(segments, heads=float(self.mamba_num_heads), kv_heads=float(self.n_groups))

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads are divided; groups beyond their number are copied."""
        return (Split("Mamba heads", self.mamba_num_heads), Split("Mamba groups", self.n_groups, copied=True))

    def _channels(self, held: Slice) -> Num:
        return held.heads * self.mamba_head_dim + held.kv_heads * (2 * self.ssm_state_size)

    def modules(self, held: Slice) -> Sequence[Module]:
        """Everything by head or group but the block's norm."""
        width, inner, channels = self.hidden_size, held.heads * self.mamba_head_dim, self._channels(held)
        return [
            Module("in_proj", (inner + channels + held.heads) * width, self.weight),
            Module("conv1d", channels * (self.conv_kernel + (1 if self.use_conv_bias else 0)), W_BF16),
            Module("dt_bias_A_log_D", 3 * held.heads, W_BF16),
            Module("gated_norm", inner, W_BF16),
            Module("out_proj", inner * width, self.weight),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """A state and the last inputs of the convolution."""
        return (
            Kept(Keep.SSM, CacheRow(held.heads * (self.mamba_head_dim * self.ssm_state_size)), every=0, dtype=self.ssm_dtype),
            Kept(Keep.CONV, CacheRow(self._channels(held) * (self.conv_kernel - rules.conv_spare)), every=0, dtype=BF16),
        )

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, in, convolution, scan, gated norm, out."""
        tokens, width, channels = held.tokens, float(self.hidden_size), self._channels(held)
        p, state = self.mamba_head_dim, self.ssm_state_size
        inner = held.heads * float(p)
        steps = Steps(direction)
        steps.norm("mamba norm", tokens=tokens, width=width)
        steps.linear("in", m=tokens, n=inner + channels + held.heads, k=width, weight=self.weight)
        steps.add(short_convolution("convolution", tokens=tokens, channels=channels, kernel=self.conv_kernel, backward=steps.is_backward))
        steps.add(*(
            recurrent(
                "scan", segment, heads=held.heads, d_k=state, d_v=p, chunk=self.chunk_size,
                chunk_flops=ssd_chunk_flops(head_dim=p, state=state, chunk=self.chunk_size, heads=held.heads, groups=held.kv_heads),
                step_flops=held.heads * (4.0 * state * p), inputs=channels + held.heads, outputs=inner, state_dtype=self.ssm_dtype,
                impl="ssd", backward=steps.is_backward,
            ) for segment in held.segments
        ))  # fmt: skip
        steps.stream(activation("gated norm", tokens=tokens, width=inner))
        steps.linear("out", m=tokens, n=width, k=inner, weight=self.weight)
        return steps.serial()


@dataclass(frozen=True, slots=True)
class S4(Remembers):
    """Structured state space layer: one diagonal-plus-low-rank system of N real states per channel, GLU output.

    Parameters: D (3 N + 2) (Lambda, P, B folded; C; D, step) + 2 D^2 (GLU).  Prefill convolves, decode steps.  Keeps D N of state per
    sequence in fp32.  Source: 2111.00396 sections 2, 3.
    """

    hidden_size: int
    state_size: int = 64
    ssm_dtype: DType = FP32
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All channels."""
        return Slice(segments, heads=float(self.hidden_size), kv_heads=1.0)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Channels are divided."""
        return (Split("S4 channels", self.hidden_size),)

    def modules(self, held: Slice) -> Sequence[Module]:
        """The systems and the output by channel."""
        return [
            Module("systems", held.heads * (3 * self.state_size + 2), W_BF16),
            Module("output_glu", held.heads * (2 * self.hidden_size), self.weight),
            Module("input_layernorm", float(self.hidden_size), W_BF16, replicated=True),
        ]

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (one way to hold it)
        """The state alone."""
        return (Kept(Keep.SSM, CacheRow(held.heads * self.state_size), every=0, dtype=self.ssm_dtype),)

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, convolution or steps, GLU."""
        tokens, width, inner = held.tokens, float(self.hidden_size), held.heads
        steps = Steps(direction)
        steps.norm("s4 norm", tokens=tokens, width=width)
        steps.add(*(long_convolution("core", s, channels=inner, state=self.state_size, backward=steps.is_backward) for s in held.segments))
        steps.linear("glu", m=tokens, n=2 * width, k=inner, weight=self.weight)
        steps.stream(activation("activation", tokens=tokens, width=width))
        return steps.serial()


@dataclass(frozen=True, slots=True)
class ShortConv(Remembers):
    """LFM2: a gated depthwise convolution over the last `conv_L_cache` tokens, nothing else.

    Parameters: 3 D^2 (in: two gates and the input) + k D + D^2 (out).  Keeps k - 1 columns of D inputs.
    Source: MODELS, short convolution; vLLM mamba_utils.py (short_conv_state_shape).
    """

    hidden_size: int
    conv_L_cache: int  # noqa: N815 (the name in config.json)
    conv_bias: bool = False
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All channels."""
        return Slice(segments, heads=float(self.hidden_size), kv_heads=1.0)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Channels are divided."""
        return (Split("convolution channels", self.hidden_size),)

    def modules(self, held: Slice) -> Sequence[Module]:
        """Everything by channel."""
        width = self.hidden_size
        found = [
            Module("in_proj", held.heads * (3 * width), self.weight), Module("conv", held.heads * self.conv_L_cache, W_BF16),
            Module("out_proj", held.heads * width, self.weight), Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]  # fmt: skip
        if self.conv_bias:
            found.append(Module("biases", 5 * held.heads, W_BF16))
        return found

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """The last inputs of the convolution."""
        return (Kept(Keep.CONV, CacheRow(held.heads * (self.conv_L_cache - rules.conv_spare)), every=0, dtype=BF16),)

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, in, gate, convolution, gate, out."""
        tokens, width, inner = held.tokens, float(self.hidden_size), held.heads
        steps = Steps(direction)
        steps.norm("conv norm", tokens=tokens, width=width)
        steps.linear("in", m=tokens, n=3 * inner, k=width, weight=self.weight)
        steps.stream(activation("first gate", tokens=tokens, width=inner))
        steps.add(short_convolution("convolution", tokens=tokens, channels=inner, kernel=self.conv_L_cache, backward=steps.is_backward))
        steps.stream(activation("second gate", tokens=tokens, width=inner))
        steps.linear("out", m=tokens, n=width, k=inner, weight=self.weight)
        return steps.serial()
