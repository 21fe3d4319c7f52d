"""What a GPU makes of an op: tiles, waves, splits, padding, re-reads; and which algorithm carries a message.

Bounds use the op's compulsory quantities; expected times use what is worked out here.  One function per kernel, in
`LAUNCHES`.  Everything is closed form, for numbers and arrays alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from simulator.hardware import Cluster, Gpu, link_seeds
from simulator.units import Bytes, Count, Flops, Num, Seconds, ceil, floor, maximum, minimum, where
from simulator.work import Message, Op

#: Rows and columns of the output tile of large products on tensor cores since Ampere (CUTLASS and cuBLAS defaults).
TILE_M, TILE_N = 128.0, 128.0


class Launched(NamedTuple):
    """An op as launched: executed work by pipe, traffic with re-reads, and how it fills the machine.

    `tiles` are independent units of work, `slots` how many run at once, `depth` the trip count of a tile's inner loop.
    """

    tensor_flops: Flops
    exponentials: Count
    hbm_bytes: Bytes
    tiles: Num
    slots: Num
    depth: Num


def launch_gemm(op: Op, gpu: Gpu) -> Launched:
    """Tiles of 128 x 128 (64 rows when m is small); every wave of tiles reads its own panels of both operands.

    HBM: compulsory, plus what does not stay in L2 between waves: a wave covers a square of side
    s = sqrt(SMs x tile), so panels are read K (M N / s) times; they are hits while one wave's panels of the smaller
    operand fit in half the L2.  Source: FORMULAS 3.6.
    """
    s = op.shape
    m, n, k = s["m"], s["n"], s["k"]
    rows = where(m <= 64, 64.0, TILE_M)
    tiles = ceil(m / rows) * ceil(n / TILE_N)
    side = (gpu.units * TILE_M * TILE_N) ** 0.5
    again_a = maximum(n / side - 1, 0.0) * m * s["activation_bytes"] * k
    again_b = maximum(m / side - 1, 0.0) * n * s["weight_bytes"] * k
    smaller = minimum(m * s["activation_bytes"], n * s["weight_bytes"]) * k
    missed = smaller / (smaller + gpu.l2_bytes)
    padded = ceil(m / rows) * rows / maximum(m, 1e-9)
    return Launched(
        op.tensor_flops * where(m > 64, padded, 1.0), 0.0, op.hbm_bytes + 0.25 * missed * minimum(again_a, again_b),
        tiles, gpu.units, k,
    )  # fmt: skip


def launch_grouped_gemm(op: Op, gpu: Gpu) -> Launched:
    """Each expert's rows are padded to whole tiles of 64 (few rows) or 128."""
    s = op.shape
    experts = maximum(s["experts"], 1e-9)
    each = s["m"] / experts
    rows = where(each <= 64, 64.0, TILE_M)
    # a random number of rows pads by half a tile on average, and never to less than one tile
    padded = maximum(each + 0.5 * rows, rows)
    tiles = experts * (padded / rows) * ceil(s["n"] / TILE_N)
    return Launched(op.tensor_flops * padded / maximum(each, 1e-9), 0.0, op.hbm_bytes, tiles, gpu.units, s["k"])


def launch_attention(op: Op, gpu: Gpu) -> Launched:
    """Query tiles of 128 rows (64 for wide heads), whole key tiles on the mask's edge.

    executed pairs = C' (pairs / C + (B_M - 1) / 2 x (share of the rows whose edge is masked)), C' = C rounded up to
    tiles; exact for causal chunks aligned to tiles.  K and V are re-read from HBM once per wave that sweeps a
    key-value head which does not fit in half the L2: rho = (w P + C (w + 1) / 2) / (P + C), smoothed by
    x / (1 + x) of its size over the L2.  Source: FORMULAS 1.2, 3.3.
    """
    s = op.shape
    tokens, keys = maximum(s["tokens"], 1e-9), s["keys"]
    rows = 128.0 if s["v_head_dim"] <= 128 else 64.0
    padded = ceil(tokens / rows) * rows
    pairs_each = s["pairs"] / maximum(s["sequences"], 1e-9)
    mean_keys = pairs_each / tokens
    edge = where(mean_keys < keys, (rows - 1) * 0.5, 0.0)
    executed = padded * (mean_keys + edge) / maximum(pairs_each, 1e-9)
    tiles = (padded / rows) * s["heads"] * s["sequences"]
    head_bytes = s["live"] / maximum(s["sequences"], 1e-9) * s["row_bytes"] / maximum(s["kv_heads"], 1e-9)
    group = s["heads"] / maximum(s["kv_heads"], 1e-9)
    waves = maximum(padded / rows * group / gpu.units, 1.0)
    new = minimum(tokens / maximum(s["context"], 1e-9), 1.0)
    swept = waves * (1 - new) + new * (waves + 1) * 0.5
    excess = head_bytes / (0.5 * gpu.l2_bytes)
    missed = excess * excess / (1 + excess * excess)
    again = (swept - 1) * missed * s["live"] * s["row_bytes"]
    return Launched(
        op.tensor_flops * executed, op.exponentials * executed, op.hbm_bytes + maximum(again, 0.0), tiles, gpu.units, mean_keys
    )


def launch_decode(op: Op, gpu: Gpu) -> Launched:
    """Keys split over the SMs: the query rows of a key-value head share a tile of 64 rows; each split writes fp32
    partial outputs and reads them once.  Source: FORMULAS 3.4, FlashAttention's num_splits_heuristic in closed form."""
    s = op.shape
    group_rows = s["heads"] / maximum(s["kv_heads"], 1e-9) * s["tokens"]
    padded = ceil(group_rows / 64.0) * 64.0
    blocks = maximum(ceil(s["keys"] / 128.0), 1.0)
    heads = s["sequences"] * s["kv_heads"] * ceil(group_rows / 64.0)
    splits = minimum(maximum(gpu.units / maximum(heads, 1e-9), 1.0), blocks)
    partials = where(splits > 1.0, 2 * 4.0 * s["sequences"] * s["heads"] * s["tokens"] * splits * (s["v_head_dim"] + 1), 0.0)
    return Launched(
        op.tensor_flops * padded / maximum(group_rows, 1e-9), op.exponentials * padded / maximum(group_rows, 1e-9),
        op.hbm_bytes + partials, heads * splits, gpu.units, maximum(s["keys"] / splits, 1.0),
    )  # fmt: skip


def launch_plain(op: Op, gpu: Gpu) -> Launched:
    """As counted."""
    return Launched(op.tensor_flops, op.exponentials, op.hbm_bytes, float(gpu.units), float(gpu.units), 1.0)


#: Tiling of every kernel; a kernel without tiles streams.
LAUNCHES: dict[str, Callable[[Op, Gpu], Launched]] = {
    "gemm": launch_gemm,
    "grouped_gemm": launch_grouped_gemm,
    "attention": launch_attention,
    "attention_backward": launch_attention,
    "decode_attention": launch_decode,
    "latent_attention": launch_decode,
    "elementwise": launch_plain,
}


def launch(op: Op, gpu: Gpu) -> Launched:
    """What `gpu` makes of `op`."""
    return LAUNCHES[op.kernel](op, gpu)


class Sent(NamedTuple):
    """A message as carried: bytes through this rank's port, the rate they get, and the latency of all steps."""

    wire_bytes: Bytes
    bytes_per_s: Num
    latency_s: Seconds


def port(message: Message, cluster: Cluster) -> tuple[Bytes, Num, Seconds]:
    """Bytes through this rank's slowest port, that port's rate, and the latency of one hop.

    Inside one scale-up domain: everything at the domain's rate.  Across nodes, with l ranks of the group per node:
    rings cross a node's edge once each, so all-reduce, all-gather and reduce-scatter run at min(scale-up, l x NIC);
    an all-to-all sends (n - l) / n of its payload through the rank's own NIC.  Source: FORMULAS 5.3; NCCL rings.
    """
    n, stride = message.group.ranks, message.group.stride
    crossing = cluster.tier(n, stride)
    if len(cluster.tiers) == 1 or (type(crossing.index) is float and crossing.index == 0.0):
        return message.wire_bytes, crossing.bytes_per_s, crossing.latency_s
    first = cluster.tiers[0]
    local = maximum(minimum(n, floor(minimum(first.domain, cluster.gpus_per_node) / stride)), 1.0)
    outside = crossing.index > 0
    if message.pattern == "all_to_all":
        remote = message.payload_bytes * maximum(n - local, 0.0) / n
        return where(outside, remote, message.wire_bytes), crossing.bytes_per_s, crossing.latency_s
    if message.pattern == "send":
        return message.wire_bytes, crossing.bytes_per_s, crossing.latency_s
    together = minimum(first.bytes_per_s, crossing.bytes_per_s * local)
    return message.wire_bytes, where(outside, together, crossing.bytes_per_s), crossing.latency_s


#: Of NCCL's protocols: share of the link rate that carries data, and latency of a hop over that of LL.
#: LL sends a flag with every 4 bytes; the others' hop latencies are NCCL's (links.toml), NVLink rows.
_LL_RATE, _SIMPLE_HOP = 0.5, 3.4 / 0.6


def carry(message: Message, cluster: Cluster) -> Sent:
    """The protocol and algorithm NCCL would choose by size: the least of LL and Simple, each with the lower of ring and
    tree hops for an all-reduce (2 (n - 1) and 2 log2 n), n - 1 for gathers, one for sends and all-to-alls.

    NVLS (reduction in the switch) is left out: it needs multicast, which not every host allows.
    Source: FORMULAS 5.1; NCCL src/graph/tuning.cc.
    """
    n = message.group.ranks
    wire, rate, hop = port(message, cluster)
    if message.pattern == "all_reduce":
        steps = minimum(2 * (n - 1), 2 * _log2(n))
    elif message.pattern in ("all_gather", "reduce_scatter"):
        steps = n - 1
    else:
        steps = minimum(n - 1, 1.0)
    base = link_seeds().latency_s["base"]["ring"]
    short, long = base["ll"] + steps * hop, base["simple"] + steps * hop * _SIMPLE_HOP
    small = short + wire / (rate * _LL_RATE) < long + wire / rate
    sends = wire > 0
    return Sent(wire, where(small, rate * _LL_RATE, rate), where(sends, where(small, short, long), 0.0))


def _log2(n: Num) -> Num:
    return float(np.log2(n)) if isinstance(n, (int, float)) else np.log2(n)


def fills(launched: Launched, blend: Num) -> Num:
    """The share of the machine that `tiles` units keep busy, as a blend of stepped and smooth waves.

    stepped: T / (ceil(T / S) S); smooth (persistent, stream-K): min(1, T / S).  blend 1 is stepped, 0 is smooth.
    """
    per_slot = launched.tiles / launched.slots
    smooth = minimum(per_slot, 1.0)
    if type(blend) is float and blend == 0.0:
        return smooth
    stepped = per_slot / maximum(ceil(per_slot), 1.0)
    return stepped * blend + smooth * (1 - blend)


__all__ = ["LAUNCHES", "Launched", "Sent", "carry", "fills", "launch", "port"]
