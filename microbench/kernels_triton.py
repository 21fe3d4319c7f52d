"""The small fused kernels that inference engines run, in Triton with fixed configurations (no autotuning).

Norms, rotary, activation and gathers stream rows.  `paged_decode` and `latent_decode` read a paged cache: keys are
split over programs, the query heads of one key-value head share a program, and a second kernel merges the splits by
their log-sum-exp.  The backward kernels serve the training direction.

Legend: D head_dim, G query heads per key-value head, S splits.  Caches are (pages, page, kv_heads, D), the layout of
FlashAttention's paged interface.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
#: Programs of a split kernel that one SM holds at once (about 100 KiB of shared memory each).
PROGRAMS_PER_SM = 2
#: Splits are worth their partial outputs from this many keys on.
KEYS_PER_SPLIT = 256
MERGE_SPLITS = tl.constexpr(16)
#: Numbers of a key tile that a program of the paged kernel holds.
PAGED_TILE = 8192
#: Query heads that share a program of the latent kernel: what vLLM's and SGLang's Triton kernels use, and, where there are
#: enough heads, one that reads the cache from L2 a quarter as often.
FEW_HEADS, MANY_HEADS = 16, 64
ACTIVATION_BLOCK = 2048
NORM_BACKWARD_PROGRAMS = 264


@triton.jit
def _norm(x, residual, weight, out, added, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    total = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual + row + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(added + row + columns, total.to(added.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (total * scale * gain).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(
    added, weight, d_out, d_added, d_x, d_weight, rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    d_gain = tl.zeros([BLOCK], tl.float32)
    for index in range(program, rows, programs):
        row = index.to(tl.int64) * WIDTH
        total = tl.load(added + row + columns, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / WIDTH + eps)
        normed = total * scale
        gradient = tl.load(d_out + row + columns, mask=mask, other=0.0).to(tl.float32)
        d_gain += gradient * normed
        inner = gradient * gain
        mean = tl.sum(inner * normed, axis=0) / WIDTH
        passed = tl.load(d_added + row + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x + row + columns, (passed + scale * (inner - normed * mean)).to(d_x.dtype.element_ty), mask=mask)
    tl.store(d_weight + program.to(tl.int64) * WIDTH + columns, d_gain, mask=mask)


@triton.jit
def _rotary(
    x, table, positions, row_stride, sign,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HALF: tl.constexpr, STRIDE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    position = tl.load(positions + token).to(tl.int64)
    column = tl.arange(0, HALF)
    cosine = tl.load(table + position * (2 * HALF) + column).to(tl.float32)[None, :]
    sine = tl.load(table + position * (2 * HALF) + HALF + column).to(tl.float32)[None, :] * sign
    head = tl.arange(0, HEADS_PAD)[:, None]
    mask = head < HEADS
    place = head * STRIDE
    if LAST != (HEADS - 1) * STRIDE:
        place = tl.where(head == HEADS - 1, LAST, place)
    base = x + token.to(tl.int64) * row_stride + place + column[None, :]
    first = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(base + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(base, (first * cosine - second * sine).to(x.dtype.element_ty), mask=mask)
    tl.store(base + HALF, (second * cosine + first * sine).to(x.dtype.element_ty), mask=mask)


@triton.jit
def _head_norm(x, weight, row_stride, eps, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, DIM: tl.constexpr):
    head = tl.arange(0, HEADS_PAD)[:, None]
    column = tl.arange(0, DIM)[None, :]
    mask = head < HEADS
    place = x + tl.program_id(0).to(tl.int64) * row_stride + head * DIM + column
    value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / DIM + eps)
    gain = tl.load(weight + column).to(tl.float32)
    tl.store(place, (value * scale[:, None] * gain).to(x.dtype.element_ty), mask=mask)


@triton.jit
def _activation(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + columns, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _activation_backward(gate_up, d_out, d_gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    base = row * (2 * WIDTH) + columns
    gate = tl.load(gate_up + base, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + base + WIDTH, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(d_out + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    d_gate = gradient * up * share * (1.0 + gate * (1.0 - share))
    tl.store(d_gate_up + base, d_gate.to(d_gate_up.dtype.element_ty), mask=mask)
    tl.store(d_gate_up + base + WIDTH, (gradient * gate * share).to(d_gate_up.dtype.element_ty), mask=mask)


@triton.jit
def _copy_rows(
    source, target, index, source_stride, target_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    named = tl.load(index + row).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    read = named if GATHER else row
    write = row if GATHER else named
    value = tl.load(source + read * source_stride + columns, mask=mask)
    tl.store(target + write * target_stride + columns, value, mask=mask)


@triton.jit
def _write_cache(source, keys, values, index, source_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(index + row).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    tl.store(keys + slot + columns, tl.load(source + row * source_stride + columns, mask=mask), mask=mask)
    tl.store(values + slot + columns, tl.load(source + row * source_stride + WIDTH + columns, mask=mask), mask=mask)


@triton.jit
def _assemble(
    plain, turned, out, row_stride, head_stride, turned_row, turned_head,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, PLAIN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)[:, None]
    mask = head < HEADS
    wide, narrow = tl.arange(0, PLAIN)[None, :], tl.arange(0, TURNED)[None, :]
    place = out + token * (HEADS * (PLAIN + TURNED)) + head * (PLAIN + TURNED)
    tl.store(place + wide, tl.load(plain + token * row_stride + head * head_stride + wide, mask=mask, other=0.0), mask=mask)
    shared = tl.load(turned + token * turned_row + head * turned_head + narrow, mask=mask, other=0.0)
    tl.store(place + PLAIN + narrow, shared, mask=mask)


@triton.jit
def _combine(rows, index, share, out, TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(index + token * TOP_K + choice).to(tl.int64)
        weight = tl.load(share + token * TOP_K + choice).to(tl.float32)
        total += weight * tl.load(rows + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _paged_split(
    query, keys, values, table, lengths, out, partial, lse, score_scale, splits, table_stride, query_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    each = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    begin = split * each
    end = tl.minimum(begin + each, length)
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, HEAD_DIM)
    head = sequence * (KV_HEADS * GROUP) + kv_head * GROUP + member
    real = member < GROUP
    asked = query + sequence * query_stride + (kv_head * GROUP + member)[:, None] * HEAD_DIM
    q = tl.load(asked + column[None, :], mask=real[:, None], other=0.0)
    largest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_PAD], tl.float32)
    total = tl.zeros([GROUP_PAD, HEAD_DIM], tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        seen = position < end
        page = tl.load(table + sequence * table_stride + position // PAGE, mask=seen, other=0).to(tl.int64)
        slot = (page * PAGE + position % PAGE) * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
        place = slot[:, None] + column[None, :]
        key = tl.load(keys + place, mask=seen[:, None], other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(key)) * score_scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, axis=1))
        shrink = tl.exp2(largest - higher)
        probability = tl.exp2(score - higher[:, None])
        weight = weight * shrink + tl.sum(probability, axis=1)
        value = tl.load(values + place, mask=seen[:, None], other=0.0).to(q.dtype)
        total = total * shrink[:, None] + tl.dot(probability.to(q.dtype), value)
        largest = higher
    mean = total * (1.0 / tl.where(weight > 0.0, weight, 1.0))[:, None]
    if MERGED:
        place = (head * splits + split)[:, None] * HEAD_DIM + column[None, :]
        tl.store(partial + place, mean, mask=real[:, None])
        tl.store(lse + head * splits + split, largest + tl.log2(weight), mask=real)
    else:
        tl.store(out + head[:, None] * HEAD_DIM + column[None, :], mean.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def _latent_split(
    query, cache, table, lengths, out, partial, lse, score_scale, splits, table_stride, heads,
    HEAD_BLOCK: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    sequence, head_block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    each = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    begin = split * each
    end = tl.minimum(begin + each, length)
    member = head_block * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    real = member < heads
    head = sequence * heads + member
    latent, rope = tl.arange(0, RANK), tl.arange(0, ROPE)
    row = head[:, None] * (RANK + ROPE)
    q = tl.load(query + row + latent[None, :], mask=real[:, None], other=0.0)
    q_rope = tl.load(query + row + RANK + rope[None, :], mask=real[:, None], other=0.0)
    largest = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    weight = tl.zeros([HEAD_BLOCK], tl.float32)
    total = tl.zeros([HEAD_BLOCK, RANK], tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        seen = position < end
        page = tl.load(table + sequence * table_stride + position // PAGE, mask=seen, other=0).to(tl.int64)
        slot = (page * PAGE + position % PAGE) * (RANK + ROPE)
        key = tl.load(cache + slot[:, None] + latent[None, :], mask=seen[:, None], other=0.0)
        key_rope = tl.load(cache + slot[:, None] + RANK + rope[None, :], mask=seen[:, None], other=0.0)
        score = tl.dot(q, tl.trans(key))
        score = tl.dot(q_rope, tl.trans(key_rope), acc=score) * score_scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, axis=1))
        shrink = tl.exp2(largest - higher)
        probability = tl.exp2(score - higher[:, None])
        weight = weight * shrink + tl.sum(probability, axis=1)
        total = total * shrink[:, None] + tl.dot(probability.to(key.dtype), key)
        largest = higher
    mean = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
    if MERGED:
        tl.store(partial + (head * splits + split)[:, None] * RANK + latent[None, :], mean, mask=real[:, None])
        tl.store(lse + head * splits + split, largest + tl.log2(weight), mask=real)
    else:
        tl.store(out + head[:, None] * RANK + latent[None, :], mean.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def _merge(
    partial, lse, out, stats, splits, heads, own, out_stride, stats_stride, WIDTH: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    largest = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, splits, MERGE_SPLITS):
        split = start + tl.arange(0, MERGE_SPLITS)
        there = split < splits
        score = tl.load(lse + head * splits + split, mask=there, other=float("-inf"))
        higher = tl.maximum(largest, tl.max(score, axis=0))
        shrink = tl.exp2(largest - higher)
        share = tl.exp2(score - higher)
        place = (head * splits + split)[:, None] * WIDTH + column[None, :]
        block = tl.load(partial + place, mask=there[:, None], other=0.0)
        total = total * shrink + tl.sum(block * share[:, None], axis=0)
        weight = weight * shrink + tl.sum(share, axis=0)
        largest = higher
    # from sequence and head to rank, sequence and head of the rank
    row = ((head % heads) // own * (tl.num_programs(0) // heads) + head // heads) * own + head % own
    tl.store(out + row * out_stride + column, (total / weight).to(out.dtype.element_ty))
    one = tl.arange(0, 1)
    if STATS == 1:
        tl.store(stats + row * stats_stride + one, largest + tl.log2(weight))
    if STATS > 1:
        tl.store(stats + row * stats_stride + one, largest)
        tl.store(stats + row * stats_stride + 1 + one, weight)


@triton.jit
def _weigh(out, lse, others, weights, ranks, rows, out_stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    one, column = tl.arange(0, 1), tl.arange(0, WIDTH)
    largest = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    for rank in range(ranks):
        score = tl.load(others + rank * rows + row + one)
        higher = tl.maximum(largest, score)
        weight = weight * tl.exp2(largest - higher) + tl.exp2(score - higher)
        largest = higher
    factor = tl.exp2(tl.load(lse + row + one) - largest) / weight
    tl.store(weights + row + one, factor)
    place = out + row * out_stride + column
    tl.store(place, (tl.load(place).to(tl.float32) * factor).to(out.dtype.element_ty))


@triton.jit
def _join_ranks(received, stats, out, ranks, rows, row_stride, stats_stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    one, column = tl.arange(0, 1), tl.arange(0, WIDTH)
    largest = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for rank in range(ranks):
        index = rank * rows + row
        score = tl.load(stats + index * stats_stride + one)
        higher = tl.maximum(largest, score)
        shrink = tl.exp2(largest - higher)
        share = tl.load(stats + index * stats_stride + 1 + one) * tl.exp2(score - higher)
        total = total * shrink + tl.load(received + index * row_stride + column).to(tl.float32) * share
        weight = weight * shrink + share
        largest = higher
    tl.store(out + row * WIDTH + column, (total / weight).to(out.dtype.element_ty))


@triton.jit
def _join(
    a, a_lse, b, b_lse, out, out_lse, a_batch, b_batch, out_batch, a_lse_batch, a_lse_head, b_lse_batch, b_lse_head, out_lse_batch,
    out_lse_head, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    token, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads = tl.arange(0, HEADS_PAD)
    head = heads < HEADS
    first = tl.load(a_lse + sequence * a_lse_batch + heads * a_lse_head + token, mask=head, other=0.0)
    second = tl.load(b_lse + sequence * b_lse_batch + heads * b_lse_head + token, mask=head, other=0.0)
    most = tl.maximum(first, second)
    total = most + tl.log(tl.exp(first - most) + tl.exp(second - most))
    columns = tl.arange(0, WIDTH_PAD)[None, :]
    mask = head[:, None] & (columns < WIDTH)
    place = token * (HEADS * WIDTH) + heads[:, None] * WIDTH + columns
    x = tl.load(a + sequence * a_batch + place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(b + sequence * b_batch + place, mask=mask, other=0.0).to(tl.float32)
    value = x * tl.exp(first - total)[:, None] + y * tl.exp(second - total)[:, None]
    tl.store(out + sequence * out_batch + place, value.to(out.dtype.element_ty), mask=mask)
    tl.store(out_lse + sequence * out_lse_batch + heads * out_lse_head + token, total, mask=head)


def _warps(block: int) -> int:
    return max(1, min(16, block // 1024))


def norm(x: Any, residual: Any, weight: Any, out: Any, added: Any, eps: float) -> None:
    """`added = x + residual; out = added / rms(added) * weight`, row by row."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _norm[(rows,)](x, residual, weight, out, added, eps, WIDTH=width, BLOCK=block, num_warps=_warps(block))


def norm_backward(added: Any, weight: Any, d_out: Any, d_added: Any, eps: float) -> tuple[Any, Any]:
    """Gradients of `norm` by its input (the same by x and residual) and by its weight."""
    rows, width = added.shape
    block, programs = triton.next_power_of_2(width), min(rows, NORM_BACKWARD_PROGRAMS)
    d_x = torch.empty_like(added)
    d_weight = torch.empty((programs, width), dtype=torch.float32, device=added.device)
    _norm_backward[(programs,)](
        added, weight, d_out, d_added, d_x, d_weight, rows, eps, WIDTH=width, BLOCK=block, num_warps=_warps(block)
    )
    return d_x, d_weight.sum(0).to(weight.dtype)


def rotary(
    x: Any, table: Any, positions: Any, heads: int, head_dim: int, *, stride: int = 0, last: int = 0, inverse: bool = False
) -> None:
    """Rotate the first `heads` heads of each row of `x` in place; `table` holds cosines and sines by position.

    Heads begin `stride` numbers apart (0: they adjoin), the last one at `last` (0: as the others).
    """
    stride = stride or head_dim
    _rotary[(x.shape[0],)](
        x, table, positions, x.stride(0), -1.0 if inverse else 1.0, HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads),
        HALF=head_dim // 2, STRIDE=stride, LAST=last or (heads - 1) * stride, num_warps=4,
    )  # fmt: skip


def head_norm(x: Any, weight: Any, heads: int, head_dim: int, eps: float) -> None:
    """RMS norm of each of the first `heads` heads of a row, in place."""
    pad = triton.next_power_of_2(heads)
    _head_norm[(x.shape[0],)](x, weight, x.stride(0), eps, HEADS=heads, HEADS_PAD=pad, DIM=head_dim, num_warps=4)


def activation(gate_up: Any, out: Any) -> None:
    """`out = silu(gate) * up`, `gate_up` holding both side by side."""
    rows, width = out.shape
    block = min(ACTIVATION_BLOCK, triton.next_power_of_2(width))
    _activation[(rows, triton.cdiv(width, block))](gate_up, out, WIDTH=width, BLOCK=block, num_warps=4)


def activation_backward(gate_up: Any, d_out: Any, d_gate_up: Any) -> None:
    """Gradient of `activation`."""
    rows, width = d_out.shape
    block = min(ACTIVATION_BLOCK, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    _activation_backward[grid](gate_up, d_out, d_gate_up, WIDTH=width, BLOCK=block, num_warps=4)


def _copy(source: Any, target: Any, index: Any, *, gather: bool) -> None:
    width = target.shape[1] if gather else source.shape[1]
    block = triton.next_power_of_2(width)
    _copy_rows[(index.numel(),)](
        source, target, index, source.stride(0), target.stride(0),
        WIDTH=width, BLOCK=block, GATHER=gather, num_warps=_warps(block),
    )  # fmt: skip


def gather(source: Any, index: Any, out: Any) -> None:
    """out[i] = source[index[i]]: embedding, permutation to experts."""
    _copy(source, out, index, gather=True)


def scatter(source: Any, index: Any, target: Any) -> None:
    """target[index[i]] = source[i]: writing keys and values to cache slots."""
    _copy(source, target, index, gather=False)


def write_cache(source: Any, index: Any, keys: Any, values: Any) -> None:
    """keys[index[i]], values[index[i]] = the two halves of source[i]: a new token's rows into their cache slots."""
    width = source.shape[1] // 2
    block = triton.next_power_of_2(width)
    _write_cache[(source.shape[0],)](source, keys, values, index, source.stride(0), WIDTH=width, BLOCK=block, num_warps=_warps(block))


def assemble(plain: Any, turned: Any, out: Any) -> None:
    """out[t, h] = plain[t, h] followed by turned[t, h], whatever the strides of the two."""
    rows, heads, width = plain.shape
    _assemble[(rows,)](
        plain, turned, out, plain.stride(0), plain.stride(1), turned.stride(0), turned.stride(1),
        HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), PLAIN=width, TURNED=turned.shape[2],
        num_warps=_warps(triton.next_power_of_2(heads) * width),
    )  # fmt: skip


def assemble_keys(plain: Any, turned: Any, out: Any) -> None:
    """Keys of MLA: out[t, h] = plain[t, h] followed by turned[t], which all heads share."""
    assemble(plain, turned[:, None].expand(-1, plain.shape[1], -1), out)


def combine(rows: Any, index: Any, share: Any, out: Any) -> None:
    """out[t] = sum over the chosen experts j of share[t, j] * rows[index[t, j]]."""
    tokens, width = out.shape
    block = triton.next_power_of_2(width)
    _combine[(tokens,)](rows, index, share, out, TOP_K=share.shape[1], WIDTH=width, BLOCK=block, num_warps=_warps(block))


def join(into: Any, a: Any, b: Any) -> None:
    """Two partial outputs [B, C, h, d], each with its LSE [B, h, C], by their LSE into a third; it may be one of them."""
    batch, tokens, heads, width = a.out.shape
    if not (into.out[0].is_contiguous() and (into.lse.stride(2) == 1 or tokens == 1)):
        message = f"join: written rows of {heads} x {width} numbers lie together; these have strides {into.out.stride()}"
        raise ValueError(message)
    a_out, b_out = (part.out if part.out[0].is_contiguous() else part.out.contiguous() for part in (a, b))
    a_lse, b_lse = (part.lse if part.lse.stride(2) == 1 else part.lse.contiguous() for part in (a, b))
    pads = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    _join[(tokens, batch)](
        a_out, a_lse, b_out, b_lse, into.out, into.lse, a_out.stride(0), b_out.stride(0), into.out.stride(0), *a_lse.stride()[:2],
        *b_lse.stride()[:2], *into.lse.stride()[:2], heads, pads[0], width, pads[1], num_warps=_warps(pads[0] * pads[1]),
    )  # fmt: skip


def split_count(units: int, slots: int, keys: int) -> int:
    """Splits of the keys that fill `slots` programs with `units` independent pieces of work.

    The smallest count within 85 % of the best wave efficiency (FlashAttention's rule), at least KEYS_PER_SPLIT keys
    each.

    >>> split_count(8, 264, 131072), split_count(1024, 264, 131072)
    (29, 1)
    """
    most = max(1, min(slots, keys // KEYS_PER_SPLIT))
    fill = [units * s / slots / -(-units * s // slots) for s in range(1, most + 1)]
    return next(s for s, share in enumerate(fill, 1) if share >= 0.85 * max(fill))


def _slots(device: Any) -> int:
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return int(sms) * PROGRAMS_PER_SM


class Paged:
    """Scratch and launch constants of a paged decode: made once, called with queries and caches.

    `keys` is the longest context, from which the splits are chosen.  `partial`: even a single split is merged, because its
    log-sum-exp is asked for.
    """

    def __init__(self, batch: int, heads: int, units: int, width: int, keys: int, device: Any, *, partial: bool = False) -> None:
        self.splits = split_count(units, _slots(device), keys)
        shape = (batch, heads, self.splits) if self.splits > 1 or partial else (1, 1, 1)
        self.partial = torch.empty((*shape, width), dtype=torch.float32, device=device)
        self.lse = torch.empty(shape, dtype=torch.float32, device=device)

    def merge(self, out: Any) -> None:
        """Weigh the splits by their log-sum-exp into `out` (batch, heads, width)."""
        if self.splits > 1:
            heads, width = out.shape[-2:]
            _merge[(out.numel() // width,)](
                self.partial, self.lse, out, out, self.splits, heads, heads, width, 0, WIDTH=width, STATS=0, num_warps=4
            )

    def merge_partial(self, out: Any, stats: Any) -> None:
        """As `merge` into rows for several ranks, `out` (ranks, batch, heads / ranks, width), with base-2 `stats` of each: its
        log-sum-exp, or its maximum and its sum.
        """
        ranks, batch, own, width = out.shape
        _merge[(ranks * batch * own,)](
            self.partial, self.lse, out, stats, self.splits, ranks * own, own, out.stride(2), stats.stride(2),
            WIDTH=width, STATS=stats.shape[-1], num_warps=4,
        )  # fmt: skip


def weigh(out: Any, lse: Any, others: Any, weights: Any) -> None:
    """Rows of `out` (ranks, batch, heads, width) times 2^(lse - log-sum-exp of `others`), which holds one or several to a row."""
    rows = lse.numel()
    _weigh[(rows,)](out, lse, others, weights, others.numel() // rows, rows, out.stride(2), WIDTH=out.shape[-1], num_warps=4)


def join_ranks(received: Any, stats: Any, out: Any) -> None:
    """Partial outputs `received` (ranks, batch, heads, width and more) with their (maximum, sum) into `out` (batch, heads, width)."""
    ranks, batch, heads, _ = received.shape
    _join_ranks[(batch * heads,)](
        received, stats, out, ranks, batch * heads, received.stride(2), stats.stride(2), WIDTH=out.shape[-1], num_warps=4
    )


def paged_scratch(batch: int, heads: int, kv_heads: int, head_dim: int, keys: int, device: Any, *, partial: bool = False) -> Paged:
    """Scratch of `paged_decode`, or of `paged_partial`."""
    return Paged(batch, heads, batch * kv_heads, head_dim, keys, device, partial=partial)


def paged_decode(query: Any, keys: Any, values: Any, table: Any, lengths: Any, out: Any, scratch: Paged) -> None:
    """One query token per sequence against a paged cache of bf16 or e4m3 keys and values.

    query (batch, heads, D), its rows any distance apart; out (batch, heads, D); keys, values (pages, page, kv_heads, D); table
    (batch, pages of a sequence) int32; lengths (batch) int32.
    """
    _paged(query, keys, values, table, lengths, out, scratch, merged=scratch.splits > 1)
    scratch.merge(out)


def paged_partial(
    query: Any, keys: Any, values: Any, table: Any, lengths: Any, out: Any, stats: Any, scratch: Paged
) -> None:
    """As `paged_decode` over some of the tokens: outputs and `stats` as `Paged.merge_partial` lays them out."""
    _paged(query, keys, values, table, lengths, out, scratch, merged=True)
    scratch.merge_partial(out, stats)


def _paged(
    query: Any, keys: Any, values: Any, table: Any, lengths: Any, out: Any, scratch: Paged, *, merged: bool
) -> None:
    batch, heads, head_dim = query.shape
    _, page, kv_heads, _ = keys.shape
    group = heads // kv_heads
    block = max(32, min(128, PAGED_TILE // head_dim))
    _paged_split[(batch, kv_heads, scratch.splits)](
        query, keys, values, table, lengths, out, scratch.partial, scratch.lse,
        head_dim**-0.5 * LOG2_E.value, scratch.splits, table.stride(0), query.stride(0),
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        PAGE=page, BLOCK=block, MERGED=merged, num_warps=4, num_stages=3,
    )  # fmt: skip


def head_block(heads: int) -> int:
    """How many of `heads` query heads share a program of `latent_decode`."""
    return MANY_HEADS if heads >= MANY_HEADS else FEW_HEADS


def latent_scratch(batch: int, heads: int, rank: int, keys: int, head_block: int, device: Any) -> Paged:
    """Scratch of `latent_decode`."""
    return Paged(batch, heads, batch * triton.cdiv(heads, head_block), rank, keys, device)


def latent_decode(
    query: Any, cache: Any, table: Any, lengths: Any, out: Any, scratch: Paged, scale: float, head_block: int
) -> None:
    """Absorbed MLA: one query token per sequence, all heads against the shared latent rows.

    query (batch, heads, rank + rope); cache (pages, page, rank + rope); out (batch, heads, rank).  `head_block` is that of
    the scratch.
    """
    batch, heads, _ = query.shape
    page, rank = cache.shape[1], out.shape[-1]
    _latent_split[(batch, triton.cdiv(heads, head_block), scratch.splits)](
        query, cache, table, lengths, out, scratch.partial, scratch.lse, scale * LOG2_E.value, scratch.splits,
        table.stride(0), heads, HEAD_BLOCK=head_block, RANK=rank, ROPE=cache.shape[-1] - rank, PAGE=page, BLOCK=32,
        MERGED=scratch.splits > 1, num_warps=8 if head_block > FEW_HEADS else 4, num_stages=2,
    )  # fmt: skip
    scratch.merge(out)
