"""Core attention over segments: causal, windowed, chunked, bidirectional; prefill (tiled over queries) and decode
(split over keys).

Legend: P cached prefix, C new tokens, t = 1..P+C position (1-indexed), d_k and d_v head widths, e bytes per element.
A pair is one (query, key) score of one query head.  F(n) is the number of pairs of queries 1..n, so a chunk has
F(P + C) - F(P) pairs, and a run of r equal chunks has (F(P + rC) - F(P)) / r on average: exact for every mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from simulator.dtypes import BF16, C_BF16, FP32, CacheFormat, CacheRow, DType
from simulator.units import Bytes, Count, Num, Tokens, floor, maximum, minimum, tri, where
from simulator.work import Aside, Op


class Segment(NamedTuple):
    """`sequences` that each add `new_tokens` after a cached `prefix`.

    `chunks` > 1 makes it a run: the first of that many equal chunks, standing for their mean.  `split_kv` marks few
    query tokens over a long cache (decode, verification): the kernel splits keys, not queries, over the SMs.
    """

    sequences: Num
    new_tokens: Num
    prefix: Num
    chunks: Num = 1.0
    split_kv: bool = False

    @property
    def mean_prefix(self) -> Tokens:
        """Cached tokens before a chunk, averaged over the run."""
        return self.prefix + (self.chunks - 1) * 0.5 * self.new_tokens

    @property
    def context(self) -> Tokens:
        """Tokens visible to the last new token, averaged over the run."""
        return self.mean_prefix + self.new_tokens

    @property
    def tokens(self) -> Tokens:
        """New tokens of all sequences."""
        return self.sequences * self.new_tokens


class Seen(NamedTuple):
    """What a mask lets a segment see, per sequence: `pairs` scored, `live` keys that some query sees (what must be
    read), and the most `keys` one query sees.
    """

    pairs: Count
    live: Tokens
    keys: Tokens


class Mask(Protocol):
    """Which keys a query sees."""

    def cumulative(self, n: Num) -> Count:
        """F(n): pairs of queries 1..n."""

    def seen(self, segment: Segment) -> Seen:
        """Pairs, live keys and keys of a segment."""

    @property
    def most(self) -> int | None:
        """Tokens whose rows must be kept to continue, at most; None for all, 0 where nothing continues."""


def mean_pairs(mask: Mask, segment: Segment) -> Count:
    """(F(P + rC) - F(P)) / r: the pairs of one chunk, averaged over a run."""
    end = segment.prefix + segment.chunks * segment.new_tokens
    return (mask.cumulative(end) - mask.cumulative(segment.prefix)) / segment.chunks


@dataclass(frozen=True, slots=True)
class Causal:
    """Every key up to the query itself."""

    def cumulative(self, n: Num) -> Count:
        """N (n + 1) / 2."""
        return tri(n)

    def seen(self, segment: Segment) -> Seen:
        """Pairs C P + C (C + 1) / 2, written without the difference of large numbers; live and keys P + C."""
        prefix = segment.mean_prefix
        context = prefix + segment.new_tokens
        return Seen(segment.new_tokens * prefix + tri(segment.new_tokens), context, context)

    @property
    def most(self) -> int | None:
        """All are kept."""
        return None


@dataclass(frozen=True, slots=True)
class Window:
    """The last `width` keys, the query included (HF convention q - width < k <= q; FlashAttention's left window is
    width - 1).
    """

    width: int

    def cumulative(self, n: Num) -> Count:
        """Tri(n) if n <= W else Tri(W) + (n - W) W."""
        full = minimum(n, self.width)
        return tri(full) + (n - full) * self.width

    def seen(self, segment: Segment) -> Seen:
        """Live min(P, W - 1) + C; keys min(P + C, W)."""
        prefix = segment.mean_prefix
        live = minimum(prefix, self.width - 1) + segment.new_tokens
        return Seen(mean_pairs(self, segment), live, minimum(prefix + segment.new_tokens, self.width))

    @property
    def most(self) -> int | None:
        """W: a rolling buffer."""
        return self.width


@dataclass(frozen=True, slots=True)
class Sinks:
    """The first `sinks` keys and the last `width` (StreamingLLM): a window of s + W slots.

    F(n) as a window of s + W: the sinks leave the window when they would slide out of it.  Source: FORMULAS 1.6;
    2309.17453 section 3.2.

    >>> pairs(Sinks(4, 2044), Segment(1, 1048576, 0))
    2145387520.0
    """

    sinks: int
    width: int

    @property
    def slots(self) -> Window:
        """The window that keeps as many keys."""
        return Window(self.sinks + self.width)

    def cumulative(self, n: Num) -> Count:
        """That of s + W keys."""
        return self.slots.cumulative(n)

    def seen(self, segment: Segment) -> Seen:
        """That of s + W keys."""
        return self.slots.seen(segment)

    @property
    def most(self) -> int | None:
        """S + W: fixed."""
        return self.sinks + self.width


@dataclass(frozen=True, slots=True)
class DualChunk:
    """Every key, at positions folded into chunks of `chunk_size` - `local_size` (Qwen2.5-1M): each key is scored once, by
    the query's rotation for its own chunk, for the one before, or for all earlier.  Source: 2402.17463 section 3;
    vLLM 0.9 dual_chunk_flash_attn.py.
    """

    chunk_size: int
    local_size: int

    @property
    def stride(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size

    def cumulative(self, n: Num) -> Count:
        """N (n + 1) / 2."""
        return tri(n)

    def parts(self, n: Num) -> tuple[Count, Count, Count]:
        """Pairs of queries 1..n within their chunk, with the chunk before, with all earlier ones."""
        whole = floor(n / self.stride)
        rest = n - whole * self.stride
        within = whole * tri(self.stride * 1.0) + tri(rest)
        before = maximum(whole - 1, 0.0) * (self.stride * self.stride) + where(whole > 0, rest * self.stride, 0.0)
        return within, before, tri(n) - within - before

    def seen(self, segment: Segment) -> Seen:
        """As causal."""
        return Causal().seen(segment)

    @property
    def most(self) -> int | None:
        """All are kept."""
        return None


@dataclass(frozen=True, slots=True)
class Chunked:
    """Keys of the query's own block of `width` tokens (Llama 4)."""

    width: int

    def cumulative(self, n: Num) -> Count:
        """floor(n / K) Tri(K) + Tri(n mod K)."""
        whole = floor(n / self.width)
        return whole * tri(self.width) + tri(n - whole * self.width)

    def seen(self, segment: Segment) -> Seen:
        """Live (P mod K) + C; over a run, where the phase of P repeats, the mean that its pairs imply."""
        prefix, new = segment.mean_prefix, segment.new_tokens
        scored = mean_pairs(self, segment)
        inside = prefix - floor(prefix / self.width) * self.width
        by_pairs = maximum(scored / maximum(new, 1.0) - 0.5 * (new + 1), 0.0)
        return Seen(scored, where(segment.chunks > 1, by_pairs, inside) + new, minimum(prefix + new, self.width))

    @property
    def most(self) -> int | None:
        """K: the bound a server must plan for (the live count is a sawtooth 1..K)."""
        return self.width


@dataclass(frozen=True, slots=True)
class Bidirectional:
    """Every key, earlier or later (encoders)."""

    def cumulative(self, n: Num) -> Count:
        """N squared: only meaningful from an empty prefix."""
        return n * n

    def seen(self, segment: Segment) -> Seen:
        """Pairs C (P + C)."""
        context = segment.context
        return Seen(segment.new_tokens * context, context, context)

    @property
    def most(self) -> int | None:
        """Nothing is kept: an encoder does not continue."""
        return 0


@dataclass(frozen=True, slots=True)
class Block(Bidirectional):
    """The same `keys` keys for every query: a block of other ranks' tokens, all of them earlier."""

    keys: Num

    def cumulative(self, n: Num) -> Count:
        """N keys."""
        return n * self.keys

    def seen(self, segment: Segment) -> Seen:
        """Pairs C keys."""
        return Seen(segment.new_tokens * self.keys, self.keys, self.keys)


def _edges(mask: Mask, live: Tokens) -> Num:
    """How many edges of a query tile's keys are masked: the diagonal, and a window's other end once it hides keys."""
    if isinstance(mask, Bidirectional):
        return 0.0
    return where(live > mask.width, 2.0, 1.0) if isinstance(mask, Window) else 1.0


def pairs(mask: Mask, segment: Segment) -> Count:
    """Pairs per query head and sequence: (F(P + rC) - F(P)) / r.

    >>> pairs(Causal(), Segment(1, 8192, 122880))
    1040191488.0
    >>> pairs(Window(4096), Segment(1, 131072, 0))
    528484352.0
    """
    return mask.seen(segment).pairs


def attention(
    name: str,
    segment: Segment,
    *,
    heads: Num,
    kv_heads: Num,
    head_dim: int,
    v_head_dim: int | None = None,
    mask: Mask | None = None,
    dtype: DType = BF16,
    cache: CacheFormat = C_BF16,
    impl: str = "",
    backward: bool = False,
    learned_sinks: bool = False,
    shared_kv: bool = False,
) -> Op:
    """Softmax(Q K^T) V of one segment.

    forward: flops = 2 heads (d_k + d_v) pairs; one exponential per pair (one more per row with a learned sink).
    backward: model 2 x forward, executed 2 heads (3 d_k + 2 d_v) pairs (scores recomputed, dV, dP, dQ, dK).
    bytes, each once: Q and O for new tokens, K and V rows of all live keys in the cache's format, LSE (fp32); backward
    adds dO, dQ, dK, dV.  `shared_kv`: a key is its own value, read once.  Grouping of heads changes the bytes, never the flops.
    alive: Q, O, the new tokens' K and V, LSE, all kept for backward; backward dO, dQ, dK, dV and the kernel's workspace: dQ and the
    rows' sums of dO x O in fp32, and, where query heads share keys, dK and dV of each (FlashAttention-2 flash_api.cpp, mha_bwd).
    Neglected: masks of documents, dropout.  Source: FORMULAS 1.2, 3.3, 3.4; FlashAttention-2 (2307.08691) section 3.

    >>> attention("core", Segment(1, 131072, 0), heads=64, kv_heads=8, head_dim=128).tensor_flops
    281477124194304.0
    """
    mask = mask or Causal()
    d_k, d_v = head_dim, v_head_dim or head_dim
    seen = mask.seen(segment)
    tokens, live = segment.tokens, segment.sequences * seen.live
    scores = heads * (segment.sequences * seen.pairs)
    forward = scores * (2.0 * (d_k + d_v))
    kept = d_k if shared_kv else d_k + d_v
    row_bytes = cache.row_bytes(CacheRow(kv_heads * kept, vectors=kv_heads * (1 if shared_kv else 2)))
    io_bytes = tokens * heads * ((d_k + d_v) * dtype.bytes)
    shape = {
        "sequences": segment.sequences, "tokens": segment.new_tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": d_k,
        "v_head_dim": d_v, "scores": scores, "keys": seen.keys, "live": live, "row_bytes": row_bytes,
        "masked": _edges(mask, seen.live),
    }  # fmt: skip

    def saved() -> Bytes:
        return io_bytes + tokens * (kv_heads * (kept * dtype.bytes) + heads * FP32.bytes)

    def gradients() -> Bytes:
        workspace = heads * (d_k * FP32.bytes) + where(kv_heads < heads, heads * (kept * dtype.bytes), 0.0)
        return saved() + tokens * workspace

    if not backward:
        extra = tokens * heads if learned_sinks else 0.0
        return Op(
            name, "decode_attention" if segment.split_kv else "attention", impl, dtype.name,
            operands=cache.name if segment.split_kv and cache.bits < dtype.bits else "", tensor_flops=forward,
            exponentials=scores + extra if learned_sinks else scores, model_flops=forward,
            hbm_bytes=io_bytes + live * row_bytes, shape=shape, aside=lambda: Aside(scores * 5.0, saved(), saved()),
        )  # fmt: skip
    executed = scores * (2.0 * (3 * d_k + 2 * d_v))
    return Op(
        f"{name} backward", "attention_backward", impl, dtype.name, tensor_flops=executed, exponentials=scores,
        model_flops=2 * forward,
        hbm_bytes=2 * io_bytes + tokens * heads * (d_v * dtype.bytes + 4.0) + 2 * live * row_bytes,
        shape=shape, aside=lambda: Aside(scores * 8.0, gradients(), -saved()),
    )  # fmt: skip
