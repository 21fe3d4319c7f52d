"""HBM traffic of the first fused attention, whose outer loop is over blocks of keys: what FlashAttention's bound counts."""

from __future__ import annotations

from simulator.dtypes import BF16, DType
from simulator.units import Bytes, Count, Num, Tokens, ceil

#: Bytes of a row's maximum or sum.
_STATISTIC_BYTES = 4.0


def blocked_attention_bytes(*, tokens: Tokens, heads: Count, head_dim: int, sram_bytes: Num, dtype: DType = BF16, backward: bool = False) -> Bytes:
    """Bytes that FlashAttention's algorithms move for `heads` heads of all sequences; with `backward`, of the backward pass alone.

    B = ceil(M / 4 d) keys a block, M elements of SRAM, T = ceil(N / B) blocks.  Forward: K, V once, for each block Q and O read,
    O written: (2 + 3 T) N d elements, and T times two statistics of a row read and written.  Backward: K, V read, dK, dV written,
    for each block Q, O, dO, dQ read, dQ written: (4 + 5 T) N d, and both statistics read.  Theta(N^2 d^2 / M).
    Validity: queries and keys of one sequence, no cache.  Neglected: what an L2 catches.  FlashAttention-2 and later turn the loops
    and move each tensor once: `attention`.  Source: FlashAttention (2205.14135) algorithms 1 and 4, theorem 2.

    >>> blocked_attention_bytes(tokens=1024.0, heads=1024.0, head_dim=64, sram_bytes=128 * 1024.0) / 1e9
    1.946157056
    """
    keys = ceil(sram_bytes / dtype.bytes / (4 * head_dim))
    blocks = ceil(tokens / keys)
    tensors, statistics = (4 + 5 * blocks, 2 * blocks) if backward else (2 + 3 * blocks, 4 * blocks)
    return heads * tokens * (tensors * head_dim * dtype.bytes + statistics * _STATISTIC_BYTES)
