"""Caches that move: from prefill to decode machines, and to and from host memory or disks.

Legend: S tokens, kv bytes of one token over all layers, b bytes per second, N_a matrix parameters used by a token, L layers,
n_q d width of the queries, F FLOP per second attained by all GPUs of a replica.
Source: FORMULAS 5.9; DistServe (2401.09670), Splitwise (2311.18677), Mooncake (2407.00079) for transfer layer by layer.
"""

from __future__ import annotations

from typing import Any

from simulator.dtypes import CacheFormat
from simulator.kernels.attention import Segment
from simulator.kernels.messages import message
from simulator.layers.layer import is_mixer
from simulator.model import ModelSpec
from simulator.parallel.layout import Layout
from simulator.units import Bytes, BytesPerSecond, Flops, FlopsPerSecond, Num, Seconds, Tokens, maximum, tri
from simulator.work import Group, Overlap, Repeat, Serial, Work


def handed_over_bytes(model: ModelSpec, layout: Layout, context: Tokens, cache: CacheFormat | None = None) -> Bytes:
    """Bytes one rank of the prefill side sends of a sequence: what it holds, once however many ranks hold copies.

    Ranks of another degree on the decode side only cut the same rows differently.
    """
    placed = layout.place(model)
    total: Bytes = 0.0
    stored = (Segment(1.0, 0.0, context),)
    for count, layer in model.counted:
        if is_mixer(layer):
            held = placed.shard(layer, stored)
            whole = layer.state_bytes(layer.whole(stored), cache or model.cache)
            mine = layer.state_bytes(held, cache or model.cache)
            # copies are sent by one of those that hold them
            ranks = layout.tp * layout.cp * layout.ulysses
            total = total + count * (mine / maximum(mine * ranks / whole, 1.0) if whole else 0.0)
    return total / layout.pp


def send_cache(payload_bytes: Bytes, stride: Num) -> Work:
    """The send of a rank's share to its peer, `stride` ranks away."""
    return message("hand over cache", "send", group=Group("hand over", 2.0, stride), payload_bytes=payload_bytes)


def prefill_and_hand_over(layer_work: Work, layers: int, payload_bytes: Bytes, stride: Num) -> Work:
    """Layer by layer: the rows of a layer travel while the next one computes; the last layer's are exposed.

    Hidden while kv S / (L b) < seconds of a layer.
    """
    send = send_cache(payload_bytes / layers, stride)
    return Serial([layer_work, Repeat(layers - 1.0, Overlap([layer_work, send])), send])


def exposed_hand_over_s(*, cache_bytes: Bytes, prefill_s: Seconds, layers: int, bytes_per_s: BytesPerSecond) -> Seconds:
    """Seconds a decode machine waits after a prefill that sends layer by layer.

    one layer's send, and for each of the others what a layer's computation does not hide:
    kv / (L b) + (L - 1) max(kv / (L b) - t / L, 0).

    >>> round(exposed_hand_over_s(cache_bytes=42.9e9, prefill_s=10.0, layers=80, bytes_per_s=50e9), 4)
    0.0107
    """
    each = cache_bytes / layers / bytes_per_s
    return each + (layers - 1) * maximum(each - prefill_s / layers, 0.0)


def recompute_flops(*, tokens: Tokens, matrix_parameters: Num, layers: Num, query_width: Num) -> Flops:
    """2 N_a P + 4 L n_q d P (P + 1) / 2: what a prefill of P tokens costs under a causal mask."""
    return 2 * matrix_parameters * tokens + 4 * layers * query_width * tri(tokens)


def restores(
    *, tokens: Tokens, token_bytes: Bytes, bytes_per_s: BytesPerSecond, flops_per_s: FlopsPerSecond, matrix_parameters: Num, layers: Num,
    query_width: Num,
) -> Any:  # fmt: skip
    """Whether to read a cached prefix back rather than compute it again: kv P / b < FLOPs(P) / F."""
    again = recompute_flops(tokens=tokens, matrix_parameters=matrix_parameters, layers=layers, query_width=query_width)
    return tokens * token_bytes / bytes_per_s < again / flops_per_s


def restore_crossover_tokens(
    *, token_bytes: Bytes, bytes_per_s: BytesPerSecond, flops_per_s: FlopsPerSecond, matrix_parameters: Num, layers: Num, query_width: Num
) -> Tokens:
    """P* = 2 ((kv / b) F - 2 N_a) / (4 L n_q d) - 1: beyond it reading back is cheaper, and at 0 it always is.

    >>> round(restore_crossover_tokens(token_bytes=327680, bytes_per_s=7e9, flops_per_s=3.956e15, matrix_parameters=70.6e9,
    ...                                layers=80, query_width=8192))
    33558
    """
    spare = token_bytes / bytes_per_s * flops_per_s - 2 * matrix_parameters
    return maximum(2 * spare / (4 * layers * query_width) - 1, 0.0)
