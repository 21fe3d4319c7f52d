"""Kernels with a state instead of a past: linear attention and its delta rule, state space scans, short convolutions.

Legend: T new tokens, h heads, d_k and d_v head widths, N state size, p head width, g groups, c chunk length.

Prefill works in chunks on the tensor cores: within a chunk as attention, between chunks through the state.  Decode
updates the state token by token.  Useful work is the recurrence; the chunked form executes more.
"""

from __future__ import annotations

from simulator.dtypes import BF16, FP32, DType
from simulator.kernels.attention import Segment
from simulator.units import Bytes, Flops, Num, Tokens, ceil, log2, maximum, where
from simulator.work import Aside, Op


def linear_chunk_flops(*, d_k: int, d_v: int, chunk: int) -> float:
    """Lightning, retention: 2 c (d_k + d_v) + 4 d_k d_v per token and head (the whole chunk square, Q S, K^T V).

    Source: FORMULAS 1.15; 2405.17381.

    >>> linear_chunk_flops(d_k=128, d_v=128, chunk=256)
    196608.0
    """
    return 2.0 * chunk * (d_k + d_v) + 4.0 * d_k * d_v


def linear_step_flops(*, d_k: int, d_v: int) -> float:
    """The recurrence: K^T V into the state and Q S out of it, 4 d_k d_v per token and head.  Source: FORMULAS 1.15."""
    return 4.0 * d_k * d_v


def delta_chunk_flops(*, d_k: int, d_v: int, chunk: int) -> float:
    """Gated delta rule (GDN, KDA): 2 c (3 d_k + 2 d_v) + 6 d_k d_v per token and head (K K^T, W, U, Q K^T, A V; W S, K^T V,
    Q S).  Neglected: the triangular solve, O(c^2) per token.  Source: FORMULAS 1.18; flash-linear-attention
    gated_delta_rule/chunk.py, kda/chunk_fwd.py.

    >>> delta_chunk_flops(d_k=128, d_v=128, chunk=64)
    180224.0
    """
    return 2.0 * chunk * (3 * d_k + 2 * d_v) + 6.0 * d_k * d_v


def delta_step_flops(*, d_k: int, d_v: int) -> float:
    """The recurrence: read S k, write the correction, read S q, with a decay: 8 d_k d_v per token and head.

    Source: FORMULAS 1.18 (Megatron-LM counts 8 d^2).

    >>> delta_step_flops(d_k=128, d_v=128)
    131072.0
    """
    return 8.0 * d_k * d_v


def ssd_chunk_flops(*, head_dim: int, state: int, chunk: int, heads: Num, groups: Num) -> Flops:
    """Mamba-2: 2 c N g + 2 c p h + 4 N p h + 2 N p h / c per token.  Source: FORMULAS 1.17; mamba ssd_minimal.py.

    >>> ssd_chunk_flops(head_dim=64, state=128, chunk=256, heads=80, groups=1)
    5313536.0
    """
    wide = heads * (head_dim * state)
    return groups * (2.0 * chunk * state) + heads * (2.0 * chunk * head_dim) + wide * (4.0 + 2.0 / chunk)


def recurrent(
    name: str,
    segment: Segment,
    *,
    heads: Num,
    d_k: int,
    d_v: int,
    chunk: int,
    chunk_flops: Flops,
    step_flops: Flops,
    inputs: Num,
    outputs: Num,
    state_dtype: DType = FP32,
    dtype: DType = BF16,
    impl: str = "linear",
    backward: bool = False,
) -> Op:
    """All heads of one segment: chunked for prefill, token by token for decode.

    `chunk_flops` and `step_flops` are per token, over the heads of this rank; useful work is the latter.
    bytes: `inputs` and `outputs` elements per token once; chunked, the state of every chunk written and read between the
    two kernels; decode reads and writes the state.  backward: twice the useful work, executed 2.5 x the chunked form
    (states recomputed), inputs, outputs and their gradients.
    Source: FORMULAS 1.15-1.18, 3.6.
    """
    tokens = segment.tokens
    state = heads * (float(d_k) * d_v)
    io_bytes = tokens * ((inputs + outputs) * dtype.bytes)
    kept = segment.sequences * (state * state_dtype.bytes)
    any_tokens = where(segment.new_tokens > 0, 1.0, 0.0)
    useful = tokens * step_flops
    shape = {"sequences": segment.sequences, "tokens": segment.new_tokens, "heads": heads, "chunk": float(chunk), "d_k": float(d_k), "d_v": float(d_v)}
    shape |= {"token_bytes": (inputs + outputs) * dtype.bytes, "state_bytes": state * state_dtype.bytes}
    if segment.split_kv:
        moved = io_bytes + 2.0 * kept * any_tokens
        shape["token_flops"] = step_flops
        return Op(
            name, "recurrent_step", impl, FP32.name, tensor_flops=useful, model_flops=useful, hbm_bytes=moved, shape=shape,
            aside=lambda: Aside(useful, io_bytes),
        )  # fmt: skip
    passed = ceil(segment.new_tokens / chunk) * kept
    executed = tokens * chunk_flops
    shape["token_flops"] = chunk_flops
    if not backward:
        return Op(
            name, "chunk_scan", impl, dtype.name, tensor_flops=executed, model_flops=useful,
            hbm_bytes=io_bytes + 2.0 * passed, shape=shape, aside=lambda: Aside(tokens * state * (3.0 / chunk), io_bytes + passed, io_bytes),
        )  # fmt: skip
    return Op(
        f"{name} backward", "chunk_scan", impl, dtype.name, tensor_flops=2.5 * executed, model_flops=2 * useful,
        hbm_bytes=2.0 * io_bytes + 4.0 * passed, shape={**shape, "backward": 1.0}, aside=lambda: Aside(tokens * state * (6.0 / chunk), 2 * io_bytes, -io_bytes),
    )  # fmt: skip


def selective_scan(
    name: str,
    segment: Segment,
    *,
    channels: Num,
    state: int,
    state_dtype: DType = FP32,
    dtype: DType = BF16,
    backward: bool = False,
) -> Op:
    """Mamba-1: 7 d_in N per token on the fp32 pipes, one exponential per channel and state.

    bytes: x, delta, z in and y out per channel, B and C per token, once; the state read and written once per sequence.
    backward recomputes the states: executed 3 x, useful 2 x.  Source: FORMULAS 1.16; 2312.00752 section 3.3.2.

    >>> selective_scan("scan", Segment(1, 1, 0), channels=8192, state=16).tensor_flops
    917504.0
    """
    tokens = segment.tokens
    flops = tokens * (channels * (7.0 * state))
    moved = tokens * ((channels * 4 + 2.0 * state) * dtype.bytes)
    kept = segment.sequences * (channels * (2.0 * state * state_dtype.bytes)) * where(segment.new_tokens > 0, 1.0, 0.0)
    times = 3.0 if backward else 1.0
    return Op(
        f"{name} backward" if backward else name, "selective_scan", "decode" if segment.split_kv else "prefill", FP32.name, tensor_flops=flops * times,
        exponentials=tokens * (channels * float(state)), model_flops=flops * (2.0 if backward else 1.0),
        hbm_bytes=moved * (2.0 if backward else 1.0) + kept,
        shape={"sequences": segment.sequences, "tokens": segment.new_tokens, "channels": channels, "state": float(state),
               "element_bytes": dtype.bytes, "state_element_bytes": state_dtype.bytes, **({"backward": 1.0} if backward else {})},
        aside=lambda: Aside(flops * times, moved, -moved if backward else moved),
    )  # fmt: skip


def long_convolution(name: str, segment: Segment, *, channels: Num, state: int, backward: bool = False) -> Op:
    """S4: prefill as a convolution as long as the sequence, by FFT; decode as a recurrence of N / 2 complex states.

    convolution: 2 transforms of 2 L points and one product per channel, 2 x 5 n log2 n + 6 n with n = 2 L, and the
    kernel, 2 N L by its closed form; recurrence: 8 N per token and channel.  All on the fp32 pipes.  A prefix is
    convolved again: the convolution has no state to start from.  Source: 2111.00396 sections 2.4, 3; definition of the FFT.
    """
    io_bytes = segment.tokens * (channels * (2.0 * BF16.bytes))
    shape: dict[str, Num] = {"sequences": segment.sequences, "tokens": segment.new_tokens, "channels": channels, "state": float(state)}
    if segment.split_kv:
        flops = segment.tokens * (channels * (8.0 * state))
        moved = io_bytes + segment.sequences * (channels * (2.0 * state * FP32.bytes)) * where(segment.new_tokens > 0, 1.0, 0.0)
    else:
        points = 2.0 * segment.context
        shape |= {"points": points, "prefix": segment.mean_prefix}
        one = 2.0 * 5.0 * points * log2(maximum(points, 1.0)) + (6.0 + state) * points
        flops = segment.sequences * (channels * one) * where(segment.new_tokens > 0, 1.0, 0.0)
        moved = io_bytes + segment.sequences * (channels * (segment.mean_prefix * BF16.bytes))
    times = 2.0 if backward else 1.0
    return Op(
        f"{name} backward" if backward else name, "long_convolution", "", FP32.name, tensor_flops=flops * times, model_flops=flops * times,
        hbm_bytes=moved * times,
        shape={**shape, "passes": times}, aside=lambda: Aside(flops * times, moved * times),
    )  # fmt: skip


def short_convolution(name: str, *, tokens: Tokens, channels: Num, kernel: int, dtype: DType = BF16, backward: bool = False) -> Op:
    """Causal depthwise convolution over the last `kernel` inputs: 2 k flops per token and channel, read and write once.

    Neglected: the k - 1 columns of state.  Source: definition; FORMULAS 1.16.
    """
    flops = tokens * (channels * (2.0 * kernel))
    moved: Bytes = tokens * (channels * (2.0 * dtype.bytes))
    times = 2.0 if backward else 1.0
    return Op(
        f"{name} backward" if backward else name, "elementwise", "convolution", dtype.name, hbm_bytes=moved * times,
        shape={"rows": tokens, "row_bytes": channels * (2.0 * dtype.bytes * times), "handed_bytes": 0.0 if backward else moved},
        aside=lambda: Aside(flops * times, moved, -moved * 0.5 if backward else moved * 0.5),
    )  # fmt: skip


__all__ = [
    "delta_chunk_flops", "delta_step_flops", "linear_chunk_flops", "linear_step_flops", "long_convolution", "recurrent",
    "selective_scan", "short_convolution", "ssd_chunk_flops",
]  # fmt: skip

