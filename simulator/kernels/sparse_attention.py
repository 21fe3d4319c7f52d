"""Attention over part of the past: static sparse masks, dynamic selections, compressed entries; and what selects.

Legend: P cached prefix, C new tokens, t = 1..P+C position (1-indexed), m tokens per compressed entry, b block, k kept by
a selection, e bytes per element.  As for every mask, F(n) counts the pairs of queries 1..n.

A *static* mask is known before the keys are (Sparse Transformer, Longformer, BigBird).  A *dynamic* one depends on the
data: every query reads its own selection, so `gathered` rows are read where nothing is shared, and at least one
selection and the new tokens' own rows where everything is.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.dtypes import BF16, C_BF16, CacheFormat, CacheRow, DType
from simulator.kernels.attention import Mask, Seen, Segment, mean_pairs
from simulator.units import Bytes, Count, Num, Tokens, floor, maximum, minimum, tri, where
from simulator.work import Aside, Op

#: Bytes of fp32 scores that exist at once: engines score a long prefill piece by piece (vLLM envs.py,
#: VLLM_SPARSE_INDEXER_MAX_LOGITS_MB).
LOGITS_BYTES = 512.0 * 2**20


def floors(n: Num, m: int) -> Count:
    """Sum over t = 1..n of floor(t / m) = m q (q - 1) / 2 + q (r + 1), q = floor(n / m), r = n mod m.

    Between whole n (the mean of a run may end there) it is interpolated, so that parts of a run add up.
    Source: FORMULAS 1.13.

    >>> floors(10, 4)
    10.0
    """
    q = floor(n / m)
    r = n - q * m
    return m * (q * (q - 1) * 0.5) + q * (r + 1) + maximum(r - (m - 1.0), 0.0)


def whole(n: Num) -> Num:
    """Largest integer not above `n`, forgiving the rounding of a mean that should be whole."""
    return floor(n + 1e-6)


def floors_capped(n: Num, m: int, k: int) -> Count:
    """Sum over t = 1..n of min(floor(t / m), k).  Source: FORMULAS 1.13.

    >>> floors_capped(1048576, 4, 1024)
    1071643648.0
    """
    full = minimum(n, k * m - 1.0)
    return floors(full, m) + (n - full) * k


@dataclass(frozen=True, slots=True)
class Columns:
    """Sparse Transformer, strided, second head: every `stride`-th key back from the query.

    F(n) = n + sum of floor(i / l), i = 0..n-1.  Source: FORMULAS 1.8; 1904.10509 section 4.
    """

    stride: int

    def cumulative(self, n: Num) -> Count:
        """N + sum of floors."""
        return n + floors(maximum(n - 1.0, 0.0), self.stride)

    def seen(self, segment: Segment) -> Seen:
        """All that lie on the columns of the new tokens: min(C, l) columns of the prefix, and the new tokens."""
        new, prefix = segment.new_tokens, segment.mean_prefix
        columns = minimum(new, self.stride)
        keys = whole((prefix + new - 1) / self.stride) + 1
        live = minimum(prefix / self.stride * columns, prefix) + new
        return Seen(mean_pairs(self, segment), live, keys)

    @property
    def most(self) -> int | None:
        """All are kept."""
        return None


@dataclass(frozen=True, slots=True)
class Summaries:
    """Sparse Transformer, fixed, second head: the last `columns` positions of every block of `block`.

    F(n) = sum over i = 0..n-1 of floor(i / l) c + max(0, (i mod l) - (l - c) + 1).  Source: FORMULAS 1.8.
    """

    block: int
    columns: int

    def cumulative(self, n: Num) -> Count:
        """Whole blocks before, and the part of the own one."""
        block, columns = self.block, self.columns
        before = floors(maximum(n - 1.0, 0.0), block) * columns
        blocks = floor(n / block)
        return before + blocks * tri(float(columns)) + tri(maximum(n - blocks * block - (block - columns), 0.0))

    def seen(self, segment: Segment) -> Seen:
        """The summaries of all blocks up to the new tokens' last."""
        end = segment.context
        inside = end - whole(end / self.block) * self.block
        keys = whole(end / self.block) * self.columns + maximum(inside - (self.block - self.columns), 0.0)
        return Seen(mean_pairs(self, segment), keys, keys)

    @property
    def most(self) -> int | None:
        """All are kept: the other head needs its own block."""
        return None


@dataclass(frozen=True, slots=True)
class Banded:
    """Longformer: both ways within half a `window`, and `global_tokens` at the start that see and are seen by all.

    pairs = (2h + 1) N - h (h + 1) + 2 g N - g^2 - overlap, h = w / 2; only meaningful from an empty prefix.
    Source: FORMULAS 1.9; 2004.05150 section 3.1.
    """

    window: int
    global_tokens: int = 0

    def cumulative(self, n: Num) -> Count:
        """The band, the cross of the global tokens, less what both hold."""
        half = self.window // 2
        cross = minimum(float(self.global_tokens), n)
        band = where(n > half, (2 * half + 1) * n - half * (half + 1.0), n * n)
        # row i < g of the band holds min(N, i + h + 1) - max(0, i - h) keys
        inside = minimum(maximum(n - half, 0.0), cross)
        rows = inside * (half + 1.0) + inside * (inside - 1) * 0.5 + (cross - inside) * n
        rows = rows - tri(maximum(cross - 1 - half, 0.0))
        both = minimum(cross, half + 1.0)
        square = cross * cross - (cross - both) * (cross - both + 1)
        return band + 2 * cross * n - cross * cross - (2 * rows - square)

    def seen(self, segment: Segment) -> Seen:
        """Every key is seen by some query."""
        context = segment.context
        keys = minimum(context, self.window + 1.0 + self.global_tokens)
        return Seen(mean_pairs(self, segment), context, keys)

    @property
    def most(self) -> int | None:
        """Nothing is kept: an encoder does not continue."""
        return 0


@dataclass(frozen=True, slots=True)
class BigBird:
    """Blocks of `block` tokens: three neighbours, `random_blocks` at random, the first and the last block for all.

    pairs = b^2 (2 n_b + 2 (4 + r) + (n_b - 4)(5 + r)) with n_b = ceil(N / b); N^2 up to (5 + 2 r) b tokens, where
    transformers falls back to full attention.  Only meaningful from an empty prefix.
    Source: FORMULAS 1.10; transformers big_bird/modeling_big_bird.py.
    """

    block: int
    random_blocks: int

    def cumulative(self, n: Num) -> Count:
        """Whole blocks, also of a ragged last one: it is padded."""
        r = self.random_blocks
        blocks = -floor(-n / self.block)
        sparse = self.block**2 * (2 * blocks + 2 * (4 + r) + (blocks - 4) * (5 + r))
        return where(n <= (5 + 2 * r) * self.block, n * n, sparse)

    def seen(self, segment: Segment) -> Seen:
        """Every key is seen by some query."""
        context = segment.context
        return Seen(mean_pairs(self, segment), context, minimum(context, (5.0 + self.random_blocks) * self.block))

    @property
    def most(self) -> int | None:
        """Nothing is kept: an encoder does not continue."""
        return 0


@dataclass(frozen=True, slots=True)
class TopK:
    """Of `every`-token entries a query sees, the `k` an indexer ranks highest (DeepSeek-V3.2: tokens; V4: entries).

    F(n) = sum of min(floor(t / m), k); k None keeps all entries (V4's heavily compressed attention).
    Source: FORMULAS 1.12, 1.13.
    """

    k: int | None
    every: int = 1

    def cumulative(self, n: Num) -> Count:
        """Capped sum of floors."""
        return floors(n, self.every) if self.k is None else floors_capped(n, self.every, self.k)

    def seen(self, segment: Segment) -> Seen:
        """Live: at least one query's selection and the entries of the new tokens; all entries where none is dropped."""
        end = whole(segment.context / self.every)
        if self.k is None:
            return Seen(mean_pairs(self, segment), end, end)
        keys = minimum(end, float(self.k))
        live = minimum(end, keys + segment.new_tokens / self.every - where(segment.new_tokens > 0, 1.0 / self.every, 0.0))
        return Seen(mean_pairs(self, segment), maximum(live, keys), keys)

    @property
    def most(self) -> int | None:
        """All are kept: any may be selected later."""
        return None


@dataclass(frozen=True, slots=True)
class Pooled:
    """NSA's compressed branch: entries of `block` tokens every `stride`, seen once complete.

    floor((t - l) / d) + 1 from t = l on.  Source: FORMULAS 1.11; 2502.11089 section 3.3.1.
    """

    block: int
    stride: int

    def cumulative(self, n: Num) -> Count:
        """Sum of floors, shifted."""
        return floors(maximum(n - self.block + self.stride, 0.0), self.stride)

    def seen(self, segment: Segment) -> Seen:
        """Every complete entry."""
        end = self.entries(segment.context)
        return Seen(mean_pairs(self, segment), end, end)

    def entries(self, context: Tokens) -> Count:
        """Complete entries after `context` tokens."""
        return maximum(whole((context - self.block) / self.stride) + 1, 0.0)

    @property
    def most(self) -> int | None:
        """All are kept."""
        return None


@dataclass(frozen=True, slots=True)
class Blocks:
    """The query's own block of `block` tokens up to itself, and the `k` - 1 earlier blocks a gate ranks highest (MoBA,
    block top-k).

    F(n) = sum of ((t - 1) mod b) + 1 + min(k - 1, floor((t - 1) / b)) b.  Source: FORMULAS 1.14; 2502.13189.

    >>> Blocks(4096, 12).cumulative(1048576)
    48285351936.0
    """

    block: int
    k: int

    def cumulative(self, n: Num) -> Count:
        """The own block as chunked attention, the others as capped floors."""
        blocks = floor(n / self.block)
        own = blocks * tri(float(self.block)) + tri(n - blocks * self.block)
        return own + self.block * floors_capped(maximum(n - 1.0, 0.0), self.block, self.k - 1)

    def seen(self, segment: Segment) -> Seen:
        """Live: at least one query's selection and the new tokens."""
        end, block = segment.context, self.block
        inside = end - whole((end - 1) / block) * block
        keys = inside + minimum(float(self.k - 1), whole((end - 1) / block)) * block
        return Seen(mean_pairs(self, segment), minimum(end, maximum(keys, segment.new_tokens)), keys)

    @property
    def most(self) -> int | None:
        """All are kept: any may be selected later."""
        return None


def sparse_attention(
    name: str,
    segment: Segment,
    *,
    masks: tuple[Mask, ...],
    heads: Num,
    kv_heads: Num,
    head_dim: int,
    v_head_dim: int,
    row: CacheRow,
    shared_kv: bool = False,
    dtype: DType = BF16,
    cache: CacheFormat = C_BF16,
    backward: bool = False,
    learned_sinks: bool = False,
) -> Op:
    """One softmax over the keys of several masks (a window and a selection), `row` being one key's cached row.

    forward: flops = 2 heads (d_k + d_v) pairs; backward as dense attention.  bytes: Q and O of new tokens, every live row
    once, 4 bytes per selected index.  `shared_kv`: the key is the value, read once.  `gathered` rows are what is read
    where no two queries share a row: the time side decides how many of those miss the cache.
    Neglected: the index list of static masks.  Source: FORMULAS 1.11-1.14, 3.5.
    """
    seen = [mask.seen(segment) for mask in masks]
    pairs, live, keys = seen[0].pairs, seen[0].live, seen[0].keys
    for more in seen[1:]:
        pairs, live, keys = pairs + more.pairs, live + more.live, keys + more.keys
    tokens = segment.tokens
    gathered = segment.sequences * pairs
    scores = heads * gathered
    forward = scores * (2.0 * (head_dim + v_head_dim))
    row_bytes = cache.row_bytes(row)
    io_bytes = tokens * heads * ((head_dim + v_head_dim) * dtype.bytes)
    index_bytes = 4.0 * gathered if any(isinstance(mask, (TopK, Blocks)) for mask in masks) else 0.0
    shape = {
        "sequences": segment.sequences, "tokens": segment.new_tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "v_head_dim": v_head_dim, "scores": scores, "keys": keys, "live": segment.sequences * live, "row_bytes": row_bytes,
        "gathered": gathered, "masked": 1.0, "index_bytes": minimum(index_bytes, 4.0 * tokens * keys),
    }  # fmt: skip
    moved = io_bytes + segment.sequences * live * row_bytes + shape["index_bytes"]

    def saved() -> Bytes:
        return io_bytes + tokens * (kv_heads * ((head_dim + (0 if shared_kv else v_head_dim)) * dtype.bytes) + 4.0 * heads)

    if not backward:
        extra = tokens * heads if learned_sinks else 0.0
        return Op(
            name, "sparse_attention", "decode" if segment.split_kv else "prefill", dtype.name, tensor_flops=forward,
            exponentials=scores + extra, model_flops=forward, hbm_bytes=moved, shape=shape,
            aside=lambda: Aside(scores * 5.0, io_bytes, saved()),
        )  # fmt: skip
    return Op(
        f"{name} backward", "sparse_attention", "backward", dtype.name, tensor_flops=scores * (2.0 * (3 * head_dim + 2 * v_head_dim)),
        exponentials=scores, model_flops=2 * forward,
        hbm_bytes=moved + io_bytes + tokens * heads * (v_head_dim * dtype.bytes + 4.0) + segment.sequences * live * row_bytes,
        shape={**shape, "backward": 1.0}, aside=lambda: Aside(scores * 8.0, 2 * io_bytes, -saved()),
    )  # fmt: skip


def index_scores(
    name: str,
    segment: Segment,
    *,
    mask: Mask,
    heads: Num,
    head_dim: int,
    row: CacheRow,
    dtype: DType,
    cache: CacheFormat = C_BF16,
    backward: bool = False,
) -> Op:
    """Scores of an indexer: `heads` small heads against one shared key per token or entry, ReLU, weighted sum.

    flops = 2 n_I d_I per pair (+ 2 n_I on the vector pipes): quadratic however few are selected.  bytes: index keys once,
    queries, the selected indices.  The fp32 scores, 4 C keys, are launched traffic (`scored`).  backward: twice.
    Source: FORMULAS 1.12, 1.13; DeepSeek-V3.2-Exp inference/model.py.

    >>> index_scores("i", Segment(1, 1, 1048575), mask=TopK(None), heads=64, head_dim=128, row=CacheRow(128), dtype=BF16).tensor_flops
    17179869184.0
    """
    seen = mask.seen(segment)
    times = 2.0 if backward else 1.0
    scored = segment.sequences * seen.pairs
    flops = scored * (heads * (2.0 * head_dim * times))
    queries = segment.tokens * (heads * head_dim * BF16.bytes)
    moved = (segment.sequences * seen.live * cache.row_bytes(row) + queries) * times
    return Op(
        f"{name} backward" if backward else name, "index_scores", "", dtype.name, tensor_flops=flops, model_flops=flops, hbm_bytes=moved,
        shape={"sequences": segment.sequences, "tokens": segment.new_tokens, "keys": seen.keys, "scored": scored,
               "heads": heads * 1.0, "head_dim": float(head_dim), "live": segment.sequences * seen.live, "row_bytes": cache.row_bytes(row),
               "passes": times},
        aside=lambda: Aside(scored * (heads * (2.0 * times)), minimum(segment.tokens * seen.keys * 4.0, LOGITS_BYTES)),
    )  # fmt: skip
