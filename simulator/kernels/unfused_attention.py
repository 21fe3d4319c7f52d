"""Attention as separate kernels whose scores go through memory: what attention costs without a fused kernel."""

from __future__ import annotations

from simulator.dtypes import BF16, WEIGHT_FORMATS, DType
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import elementwise
from simulator.kernels.gemm import gemm
from simulator.units import Num
from simulator.work import Serial, Work


def unfused_attention(
    name: str, segment: Segment, *, heads: Num, head_dim: int, causal: bool = True, dtype: DType = BF16, backward: bool = False,
    dropout: bool = False,
) -> Work:  # fmt: skip
    """Q K^T, mask, softmax, P V as four kernels over the full square of s x t scores, whatever the mask; with `backward`, also
    dV = P^T dO, dP = dO V^T, the softmax's gradient, dQ = dS K, dK = dS^T Q.  `dropout` is one more kernel each way.

    FLOPs: 4 b h s t d forward, 8 b h s t d backward.  bytes: each kernel reads and writes its s x t matrices once.
    A batched product is one tall product of b h s rows.  Validity: as many key-value heads as query heads.
    Dropout also writes, and reads back, which scores were kept: half a matrix of 16-bit elements.
    Neglected: the b h - 1 further reads of K and V (d / s of the scores).  Source: FlashAttention (2205.14135),
    algorithm 0.

    >>> from simulator.work import fold, quantity
    >>> fold(unfused_attention("a", Segment(1, 1024, 0), heads=1, head_dim=64), quantity("model_flops"))
    268435456.0
    """
    rows, keys, width = segment.tokens * heads, segment.context, head_dim * 1.0
    weight, kept = WEIGHT_FORMATS[dtype.name], 1.0 / dtype.bytes

    def inner(what: str) -> Work:
        return gemm(f"{name} {what}", m=rows, n=keys, k=width, weight=weight, out=dtype)

    def outer(what: str) -> Work:
        return gemm(f"{name} {what}", m=rows, n=width, k=keys, weight=weight, out=dtype)

    def over_scores(what: str, read: Num, written: Num = 1.0) -> Work:
        return elementwise(f"{name} {what}", rows=rows, read=read * keys, written=written * keys, impl="softmax", dtype=dtype)

    masked = [over_scores("mask", 1.0)] if causal else []
    dropped = [over_scores("dropout", 1.0, 1.0 + kept)] if dropout else []
    parts = [inner("scores"), *masked, over_scores("softmax", 1.0), *dropped, outer("values")]
    if backward:
        masked = [over_scores("mask gradient", 1.0)] if causal else []
        dropped = [over_scores("dropout gradient", 1.0 + kept)] if dropout else []
        parts += [outer("dV"), inner("dP"), *dropped, over_scores("softmax gradient", 2.0), *masked, outer("dQ"), outer("dK")]
    return Serial(parts)
