"""Multi-head latent attention (MLA) cores: absorbed (every head reads the latent) or expanded (keys and values made
from it).

Legend: n heads, r kv_lora_rank, d_n nope width, d_r rope width, d_v value width.
"""

from __future__ import annotations

from simulator.dtypes import BF16, C_BF16, CacheFormat, CacheRow, DType
from simulator.kernels.attention import Causal, Mask, Segment
from simulator.units import Num
from simulator.work import Aside, Op


def crossover_tokens(*, kv_lora_rank: int, nope: int, v_head_dim: int) -> float:
    """Chunk length below which absorbed costs fewer flops than expanded for P >> C.

    C* = r (d_n + d_v) / (2 r - d_n - d_v).  Source: FORMULAS 1.4 (derived); DeepSeek-V3: 170.7.

    >>> round(crossover_tokens(kv_lora_rank=512, nope=128, v_head_dim=128), 1)
    170.7
    """
    return kv_lora_rank * (nope + v_head_dim) / (2 * kv_lora_rank - nope - v_head_dim)


def latent_attention(
    name: str,
    segment: Segment,
    *,
    heads: Num,
    kv_lora_rank: int,
    rope_head_dim: int,
    mask: Mask | None = None,
    dtype: DType = BF16,
    cache: CacheFormat = C_BF16,
    impl: str = "",
) -> Op:
    """Absorbed core: all heads attend to the shared latent row (multi-query form).

    flops = 2 n (2 r + d_r) pairs; bytes = latent rows once for all heads + Q (r + d_r) + O (r) per head.
    Source: FORMULAS 1.4; FlashMLA docs/20250422.

    >>> latent_attention("core", Segment(1, 1, 0, split_kv=True), heads=128, kv_lora_rank=512, rope_head_dim=64).tensor_flops
    278528.0
    """
    mask = mask or Causal()
    seen = mask.seen(segment)
    tokens, live = segment.tokens, segment.sequences * seen.live
    scores = heads * (segment.sequences * seen.pairs)
    flops = scores * (2.0 * (2 * kv_lora_rank + rope_head_dim))
    row_bytes = cache.row_bytes(CacheRow(kv_lora_rank, rope_head_dim, latent=True))
    io_bytes = tokens * heads * ((2 * kv_lora_rank + rope_head_dim) * dtype.bytes)
    return Op(
        name, "latent_attention", impl, dtype.name, tensor_flops=flops, exponentials=scores,
        model_flops=flops, hbm_bytes=io_bytes + live * row_bytes,
        shape={"sequences": segment.sequences, "tokens": segment.new_tokens, "heads": heads, "kv_heads": 1.0,
               "head_dim": kv_lora_rank + rope_head_dim, "v_head_dim": kv_lora_rank, "scores": scores, "keys": seen.keys,
               "live": live, "row_bytes": row_bytes, "masked": 1.0},
        aside=lambda: Aside(scores * 5.0, io_bytes),
    )  # fmt: skip
