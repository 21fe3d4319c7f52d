"""What a GPU makes of an op: tiles, waves, splits, padding, re-reads.

Bounds use the op's compulsory quantities; expected times use what is worked out here.  One function per kernel, in
`LAUNCHES`.  Everything is closed form, for numbers and arrays alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from simulator.data import observed
from simulator.dtypes import BF16
from simulator.hardware import Gpu
from simulator.units import Bytes, Count, Flops, Num, ceil, maximum, minimum, raise_to, where
from simulator.work import Op

#: Rows and columns of the output tile of large products on tensor cores since Ampere (CUTLASS and cuBLAS defaults);
#: rows are padded to the instruction's 64.
TILE_M, TILE_N, PAD_M = 128.0, 128.0, 64.0
#: Rows of a warp-level matrix instruction: what the query heads of one key-value head are padded to where they are few.
WARP_ROWS = 16.0
#: Query heads of a latent row are padded to these in gathered attention, by architecture; elsewhere to a warp's.
LATENT_ROWS = {"hopper": 64.0}
#: Outputs one SM holds in a wave of a large product, and the reads of a real raster over those of a square one.
WAVE_TILE, RASTER = observed("wave_tile"), observed("raster")
#: How many L2 caches of keys and values a head has when sweeps begin to miss, and how many more when every second does: of kernels like
#: cuDNN's, of FlashAttention-2.
KEPT, HALF_MISSED, HALF_MISSED_FLASH2 = observed("kept"), observed("half_missed"), observed("half_missed_flash2")
#: Of the L2 cache, how much a kernel may touch when half of what it was handed is still found there.
HALF_HANDED = observed("half_handed")
#: Of the L2 cache, how large the rows of all tokens are when half of the gathers from them miss.
HALF_GATHERED = observed("half_gathered")
#: Kernels of FlashAttention's third and fourth version: what runs on Hopper where nobody names an implementation (SGLang's default there,
#: and vLLM's).  Tiles of narrow heads have 192 rows, others 128.  Their schedulers take the heads that fit in the L2 cache together, and the
#: tiles of a larger head at once, so that its keys are not read again however many they are.  Source: flash-attn-4 4.0.0b36, its tile
#: configuration for sm90 and SingleTileLPTScheduler (an L2 of 50 MB); timed in data/calibration/h200_sxm/runs/nvidia-h200-20261125T014814Z.csv.
FLASH, NARROW_HEAD, NARROW_ROWS = ("flash3", "flash4"), 96, 192.0
#: Heads wider than this have tiles of their own.
WIDE_HEAD = 192


class Launched(NamedTuple):
    """An op as launched: executed work by pipe, traffic with re-reads, and how it fills the machine.

    `tiles` are independent units of work, `slots` how many run at once, `depth` the trip count of a tile's inner loop.
    `variant` is 1 where a second kernel of the family runs: heads wider than 192, whose tiles crowd the registers; decode whose
    keys need no split.  `splits` are partial results that a further kernel merges one after the other.
    `windowed` is 1 where a window hides keys at both ends of a tile's sweep.  `uneven`: the longest tile over the mean one, less 1.
    `streams`: the second kernel reads memory at
    another rate too, because it only streams (decode).  `found` is the share of the traffic that the L2 cache serves, because kernels
    before wrote it and kernels after read it.
    """

    tensor_flops: Flops
    exponentials: Count
    hbm_bytes: Bytes
    tiles: Num
    slots: Num
    depth: Num
    variant: Num = 0.0
    splits: Num = 1.0
    windowed: Num = 0.0
    uneven: Num = 1.0
    streams: bool = False
    found: Num = 0.0


def launch_gemm(op: Op, gpu: Gpu) -> Launched:
    """Rows and columns padded to 64; pieces of 128 x 128, which the kernel may cut further (smaller tiles, split-K) to fill
    the machine; every wave of tiles reads its own panels of both operands.

    HBM reads: what a wave of 128 x 256 tiles over all SMs asks for, flops (a + w) / (2 s) with s the side of the square it
    covers, where that exceeds one reading of both operands; rasters are not square, which costs a third more.
    Within 8 % (median) of DRAM counters on an H200, worst 36 %.  Source: FORMULAS 3.6; data/calibration/h200_sxm.
    """
    s = op.shape
    m, n, k = s["m"], s["n"], s["k"]
    rows, columns = ceil(m * (1 / PAD_M)) * PAD_M, ceil(n * (1 / PAD_M)) * PAD_M
    pieces = rows * columns * (1 / (TILE_M * TILE_N))
    side = (gpu.units * WAVE_TILE) ** 0.5
    requested = op.tensor_flops * ((s["activation_bytes"] + s["weight_bytes"]) * (RASTER * 0.5 / side))
    once = (m * s["activation_bytes"] + n * s["weight_bytes"]) * k
    again = maximum(requested - once, 0.0)
    return Launched(rows * columns * (2.0 * k), 0.0, op.hbm_bytes + again, pieces, gpu.units, k)


def launch_batched_gemm(op: Op, gpu: Gpu) -> Launched:
    """Every member padded and tiled by itself.  Re-reads within a member are neglected: its operands stay in the L2 cache."""
    s = op.shape
    rows, columns = ceil(s["m"] * (1 / PAD_M)) * PAD_M, ceil(s["n"] * (1 / PAD_M)) * PAD_M
    tiles = s["members"] * (rows * columns * (1 / (TILE_M * TILE_N)))
    return Launched(s["members"] * (rows * columns * (2.0 * s["k"])), 0.0, op.hbm_bytes, tiles, gpu.units, s["k"])


def launch_grouped_gemm(op: Op, gpu: Gpu) -> Launched:
    """Each expert's rows are padded to whole tiles of 64: by half a tile on average, and never to less than one.

    PyTorch's kernel (impl "cutlass") has pairs of tiles, 2 x 64 rows x 128 columns where experts have up to 128 rows on average,
    2 x 128 x 256 beyond: whole pairs of normally scattered rows, of variance rows / experts.  Read off its kernels' names on an
    H200; its time climbs in such steps (320 us at 129 rows of 64 experts, 346 at 256, 627 at 384), its DRAM traffic is
    compulsory.  Source: data/calibration/h200_sxm/probes/grouped-gemm-20261125.csv.
    """
    s = op.shape
    experts = maximum(s["experts"], 1e-9)
    if op.impl == "cutlass":
        mean = s["m"] / experts
        large = where(mean > 2 * PAD_M, 2.0, 1.0)
        pair, wide = large * (2 * PAD_M), large * TILE_N
        rows = experts * pair * maximum(whole(mean / pair, mean**0.5 / pair), 1.0)
        columns = ceil(s["n"] / wide) * wide
        return Launched(rows * (columns * (2.0 * s["k"])), 0.0, op.hbm_bytes, rows * columns / (0.5 * pair * wide), gpu.units, s["k"])
    rows = maximum(s["m"] + experts * (0.5 * PAD_M), experts * PAD_M)
    tiles = rows * ceil(s["n"] * (1 / TILE_N)) * (1 / TILE_M)
    return Launched(rows * (s["n"] * (2.0 * s["k"])), 0.0, op.hbm_bytes, tiles, gpu.units, s["k"])


def whole(mean: Num, deviation: Num) -> Num:
    """The mean of a normal variable rounded up to whole numbers: x + 1/2 + sum over j of sin(2 pi j x) exp(-2 (pi j s)^2) / (pi j).

    Validity: four terms, within 0.004 from a deviation of 0.08 on, within 0.12 below.  Source: the Fourier series of a sawtooth (derived).

    >>> round(float(whole(0.75, 0.1)), 2), round(float(whole(8.0, 1.0)), 2)
    (1.01, 8.5)
    """
    found = mean + 0.5
    for j in range(1, 5):
        found = found + np.sin(mean * (2 * np.pi * j)) * np.exp(raise_to(deviation * j, 2) * (-2 * np.pi**2)) * (1 / (np.pi * j))
    return found


def launch_attention(op: Op, gpu: Gpu) -> Launched:
    """Query tiles of 128 rows (64 for wide heads; FlashAttention-3 and 4: 192 for narrow ones), whole key tiles on the mask's edge.

    executed pairs = C' (pairs / C + (B_M - 1) / 2 where the edge is masked), C' = C rounded up to tiles: exact for causal
    chunks aligned to tiles.
    Every query tile sweeps its head's keys and values.  They come from the L2 cache while a head's K and V fit in one of its two
    partitions, 0.45 of it; of a larger head sweeps miss more and more: x / (1 + x), x = ((K and V that one key-value head reads / L2 -
    0.45) / h)^1.25, h = 1.9 for cuDNN, 1.2 for FlashAttention-2.  DRAM counters of cuDNN on an H200 show 0, 1, 17, 50 and 72 % at 17, 34,
    67, 134 and 268 MB (0, 2, 20, 46, 71 here), of FlashAttention-2 0, 5, 36, 59 and 77 %.  At a million tokens this, not the tensor
    cores, binds cuDNN; FlashAttention-3 and 4 take the heads that fit in the cache together, and the tiles of a larger head at once: they
    run at 676 TFLOP/s there, cuDNN at 471.
    Tiles of a triangle are uneven (the longest twice the mean), those of a block without a mask are alike: a block fills the machine as
    soon as its tiles do.
    Backward's tiles are keys, which meet queries one after the other; it adds fp32 sums of dQ (written, read, converted) and, for grouped heads, dK and dV
    per query head.  Source: FORMULAS 1.2, 3.3; data/calibration/h200_sxm.
    """
    s = op.shape
    tokens, sequences, live = maximum(s["tokens"], 1e-9), maximum(s["sequences"], 1e-9), maximum(s["live"], 1e-9)
    flash = op.kernel == "attention" and (op.impl in FLASH or (not op.impl and gpu.architecture == "hopper"))
    if flash:
        rows = where(s["head_dim"] <= NARROW_HEAD, NARROW_ROWS, 128.0)
    else:
        rows = where(s["v_head_dim"] <= 128, 128.0, 64.0)  # noqa: PLR2004 (tile height halves beyond 128 wide heads)
    blocks = ceil(tokens * (1 / rows))
    padded = blocks * (rows / tokens)
    edge = s["masked"] * (0.5 * (rows - 1))
    queries = sequences * s["heads"] * tokens
    executed = (s["scores"] + queries * edge) * padded
    depth, tiles = s["scores"] / queries + edge, blocks * (s["heads"] * sequences)
    variant = where(s["head_dim"] > WIDE_HEAD, 1.0, 0.0)
    if op.kernel == "attention_backward":
        both = s["head_dim"] + s["v_head_dim"]
        sums = queries * (12.0 * s["head_dim"]) + where(s["heads"] > s["kv_heads"], queries * (4.0 * both), 0.0)
        flops = executed * (2.0 * (both + 2 * s["head_dim"] + s["v_head_dim"]))
        keys = live / sequences
        swept = s["scores"] / (sequences * s["heads"] * keys) + edge
        tiles = ceil(keys * (1 / rows)) * (s["heads"] * sequences)
        return Launched(flops, executed, op.hbm_bytes + sums, tiles, gpu.units, swept, variant, uneven=_uneven(tokens, swept))
    moved = op.hbm_bytes
    if not flash:
        head, half = s["row_bytes"] / s["kv_heads"], HALF_MISSED_FLASH2 if op.impl == "flash2" else HALF_MISSED
        beyond = maximum(live / sequences * head * (1.0 / gpu.l2_bytes) - KEPT, 0.0) * (1.0 / half)
        sweeps = beyond**1.25
        moved = moved + tiles * depth * head * (sweeps / (1.0 + sweeps))
    return Launched(
        executed * (2.0 * (s["head_dim"] + s["v_head_dim"])), executed, moved, tiles, gpu.units, depth, variant,
        windowed=maximum(s["masked"] - 1.0, 0.0), uneven=_uneven(minimum(minimum(s["keys"], live / sequences), depth + 0.5 * tokens), depth),
    )  # fmt: skip


def _uneven(longest: Num, mean: Num) -> Num:
    """How much the longest of a launch's tiles exceeds the mean: 0 for a block, 1 for a triangle."""
    return minimum(maximum(longest / maximum(mean, 1e-9) - 1.0, 0.0), 1.0)


def launch_decode(op: Op, gpu: Gpu) -> Launched:
    """Keys split over the SMs: the query rows of a key-value head share tiles of up to 64 rows, padded to the 16 of a warp's
    matrix instruction (as FlashInfer, FA2DetermineCtaTileQ, and the kernels measured here do; FlashAttention-3 pads to 64, which costs time
    only where the tensor cores are slow beside the memory); each split writes fp32 partial outputs and reads them once.
    Source: FORMULAS 3.4, FlashAttention's num_splits_heuristic in closed form.
    """
    s = op.shape
    group_rows = s["heads"] / s["kv_heads"] * s["tokens"]
    row_tiles = ceil(group_rows * (1 / PAD_M))
    padded = ceil(group_rows * (1 / WARP_ROWS)) * WARP_ROWS / maximum(group_rows, 1e-9)
    blocks = maximum(ceil(s["keys"] * (1 / 128.0)), 1.0)
    heads = s["sequences"] * s["kv_heads"] * row_tiles
    splits = minimum(maximum(gpu.units / maximum(heads, 1e-9), 1.0), blocks)
    outputs = s["sequences"] * s["heads"] * s["tokens"] * (8.0 * (s["v_head_dim"] + 1))
    partials = where(splits > 1.0, outputs * splits, 0.0)
    return Launched(
        op.tensor_flops * padded, op.exponentials * padded, op.hbm_bytes + partials, heads * splits, gpu.units,
        maximum(s["keys"] / splits, 1.0), where(splits > 1.0, 0.0, 1.0), splits, streams=True,
    )  # fmt: skip


def launch_plain(op: Op, gpu: Gpu) -> Launched:
    """As counted."""
    return Launched(op.tensor_flops, op.exponentials, op.hbm_bytes, float(gpu.units), float(gpu.units), 1.0)


def launch_elementwise(op: Op, gpu: Gpu) -> Launched:
    """Rows stream.  What a kernel before wrote is found in the L2 cache, and what is written stays there, until the launch touches
    about as many bytes as the cache holds: found = 1 / (1 + (bytes / 0.74 L2)^16), a cliff, because a stream that exceeds the cache
    evicts itself; a kernel that writes over what it read touches half of what it moves.  A permutation reads a token's row once for
    every expert: again where the rows of all tokens do not stay in the cache.

    Timed on four H200: everything found up to 38 MB, half missed at 46 MB, all at 59 MB.  Source: data/calibration/h200_sxm.
    """
    s, moved = op.shape, op.hbm_bytes
    handed = s["handed_bytes"]
    found: Num = 0.0
    if type(handed) is not float or handed:
        found = 1.0 / (1.0 + (handed * (1 / (HALF_HANDED * gpu.l2_bytes))) ** 16)
        if isinstance(handed, np.ndarray):
            found = where(handed > 0, found, 0.0)
    if op.impl == "permute" and "routed" in s:
        row = s["width"] * BF16.bytes
        moved = moved + maximum(s["routed"] - s["tokens"], 0.0) * row * missed(s["tokens"] * row, HALF_GATHERED * gpu.l2_bytes)
    return Launched(op.tensor_flops, op.exponentials, moved, float(gpu.units), float(gpu.units), 1.0, found=found)


def missed(held: Bytes, half: Bytes) -> Num:
    """The share of repeated reads of `held` bytes that miss a cache: x^2 / (1 + x^2), x = held / half, without a kink."""
    excess = held * (1.0 / half)
    return excess * excess / (1.0 + excess * excess)


#: Tiling of every kernel; a kernel without tiles streams.
LAUNCHES: dict[str, Callable[[Op, Gpu], Launched]] = {
    "gemm": launch_gemm,
    "batched_gemm": launch_batched_gemm,
    "grouped_gemm": launch_grouped_gemm,
    "attention": launch_attention,
    "attention_backward": launch_attention,
    "decode_attention": launch_decode,
    "latent_attention": launch_decode,
    "elementwise": launch_elementwise,
}


def launch(op: Op, gpu: Gpu) -> Launched:
    """What `gpu` makes of `op`."""
    return LAUNCHES[op.kernel](op, gpu)


def fills(launched: Launched, split: Num, wave: Num, step: Num = 0.0) -> Num:
    """The share of the machine that a launch keeps busy, from its tiles and the slots they run in.

    1 / fill = (max(1, slots / (split x tiles)) + wave x uneven x slots / (split x tiles)) (1 + step (1 - uneven) (ceil(w) / w - 1)), w
    = tiles / slots where that is above 1: kernels cut tiles (smaller tiles, split-K) until the machine is full, uneven tiles leave
    the end of it empty, and of even ones the last wave is part-filled.  Products' waves do not step on a machine at its power limit:
    what a part-filled wave saves in power the others gain in clock.
    """
    ratio = launched.slots / maximum(launched.tiles * split, 1e-9)
    busy = maximum(ratio, 1.0) + ratio * (wave * launched.uneven)
    if step:
        waves = maximum(launched.tiles * (1.0 / launched.slots), 1.0)
        busy = busy * (1.0 + (ceil(waves) / waves - 1.0) * (1.0 - launched.uneven) * step)
    return 1.0 / busy


def launch_gathered(op: Op, gpu: Gpu) -> Launched:
    """Every query token gathers its own rows: its heads of one key-value head are one tile, padded to 16 rows, or to FlashMLA's
    64 on Hopper where they share wide latent rows.

    Rows that several tokens select are read again as far as the live rows do not stay in L2: (gathered - live) row bytes
    x / (x + L2), x the live bytes.  Few tokens split their keys over idle SMs.  Source: FORMULAS 3.5, 3.6; FlashMLA's sparse
    kernels assert h_q % B_H == 0, and SGLang's dsa_backend pads to it.  There it pads to
    128 on Blackwell; published rows of few heads on a B200 show no such cost, so none is taken (which kernel ran is not recorded).
    """
    s = op.shape
    group = maximum(s["heads"] / s["kv_heads"], 1e-9)
    tile = where(s["head_dim"] > WIDE_HEAD, LATENT_ROWS.get(gpu.architecture, WARP_ROWS), WARP_ROWS)
    padded = ceil(group / tile) * tile / group
    footprint = s["live"] * s["row_bytes"]
    again = maximum(s["gathered"] - s["live"], 0.0) * s["row_bytes"] * (footprint / (footprint + gpu.l2_bytes))
    tiles = s["sequences"] * s["tokens"] * s["kv_heads"]
    blocks = maximum(ceil(s["keys"] * (1 / PAD_M)), 1.0)
    splits = minimum(maximum(gpu.units / maximum(tiles, 1e-9), 1.0), blocks)
    outputs = s["sequences"] * s["heads"] * s["tokens"] * (8.0 * (s["v_head_dim"] + 1))
    partials = where(splits > 1.0, outputs * splits, 0.0)
    return Launched(
        op.tensor_flops * padded, op.exponentials * padded, op.hbm_bytes + again + partials, maximum(tiles * splits, 1e-9), gpu.units,
        maximum(s["keys"] / splits, 1.0),
    )  # fmt: skip


def launch_index_scores(op: Op, gpu: Gpu) -> Launched:
    """Scores leave the kernel in fp32 and are read once by the selection: 8 bytes per scored pair.

    Tiles of 64 query rows (all heads of a token) x 128 keys.  Source: FORMULAS 3.5; DeepGEMM fp8_mqa_logits.
    """
    s = op.shape
    rows = maximum(ceil(s["heads"] * s["tokens"] * (1 / PAD_M)), 1.0) * s["sequences"]
    tiles = maximum(rows, 1e-9) * maximum(ceil(s["keys"] * (1 / TILE_N)), 1.0)
    return Launched(op.tensor_flops, 0.0, op.hbm_bytes + 8.0 * s["scored"], tiles, gpu.units, s["head_dim"])


def launch_chunk_scan(op: Op, gpu: Gpu) -> Launched:
    """A tile per chunk, head and sequence; the last chunk of a sequence is padded.  Source: FORMULAS 1.15-1.18."""
    s = op.shape
    chunks = ceil(s["tokens"] / s["chunk"])
    padded = chunks * s["chunk"] / maximum(s["tokens"], 1e-9)
    return Launched(op.tensor_flops * padded, 0.0, op.hbm_bytes, maximum(s["sequences"] * s["heads"] * chunks, 1e-9), gpu.units, s["chunk"])


LAUNCHES |= {
    "sparse_attention": launch_gathered,
    "index_scores": launch_index_scores,
    "chunk_scan": launch_chunk_scan,
    "recurrent_step": launch_plain,
    "selective_scan": launch_plain,
    "long_convolution": launch_plain,
}

__all__ = ["LAUNCHES", "Launched", "fills", "launch"]
