"""Context parallelism: n ranks hold different tokens of the same sequences, through every layer.

Linear layers see tokens / n.  A mixer that remembers every token meets the others' keys and values in one of four ways
(`passing`); one that remembers a window fetches the window's rows before it starts (a halo).
- "kv": a ring.  In each of n - 1 steps a rank sends the block of keys and values it has just used to its neighbour while
  it attends to the next one.
- "q": the same ring with queries, whose partial outputs then return by an all-to-all, exposed.
- "auto": "kv" where new tokens or their share are large, else "q" (`passes_kv`, the rule of 2411.01783).
- "gather": all keys and values first, exposed, then one kernel (Llama 3, 2407.21783).
- "double": a ring inside blocks of `cp_inner` ranks, around which a ring of blocks turns (one send per inner round).
A rank keeps its tokens' share of every cache, or with `holds` "whole" all of it, as serving engines do: then "gather" moves
only the new rows, a decoding sequence belongs to one rank, whose new rows all others gather too, and the last layer's outputs
are gathered before the head.

Legend: T new tokens of a sequence, P cached, c = T / n, K = (T + P) / n keys a rank holds, e bytes per element.
Order decides who waits: contiguous ranks work max / mean = about 2 n / (n + 1) apart, zigzag (chunks i and 2 n - 1 - i)
exactly 1, striped (token i on rank i mod n) within n / T of 1, but with a masked edge in every step.
Neglected: padding of T to 2 n tokens; steps are as long as the longest of any rank's (the ring turns together).
Source: FORMULAS 5.5, 5.6; Ring Attention (2310.01889); 2411.01783 Alg. 1 and 5; zhuzilin/ring-flash-attention@89962823.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.dtypes import BF16, FP32, CacheFormat
from simulator.kernels.attention import Bidirectional, Block, Segment
from simulator.kernels.elementwise import elementwise
from simulator.kernels.messages import message
from simulator.layers import Attention, Head, LatentAttention, MoE
from simulator.layers.layer import Direction, Keep, Kept, Layer, Mixer, Slice, is_mixer
from simulator.model import ModelSpec
from simulator.parallel.data import share_sequences
from simulator.parallel.scheme import Scheme, divisors, has_mixing, is_one, mixing_of, with_mixing
from simulator.units import Bytes, FlopsPerSecond, Num, Tokens, floor, maximum, minimum, where
from simulator.work import Overlap, Repeat, Select, Serial, Work

ORDERS = ("zigzag", "contiguous", "striped")
PASSING = ("kv", "q", "auto", "gather", "double")
HOLDS = ("share", "whole")


def pieces(order: str, segment: Segment, ranks: Num, position: Num) -> tuple[Segment, ...]:
    """The queries of one rank over all keys they see, as segments whose pairs are exact under a causal mask.

    contiguous: tokens [p c, (p + 1) c).  zigzag: chunks p and 2 n - 1 - p of T / 2 n.  striped: tokens p, p + n, ...,
    whose mean prefix is P + p + (n - 1)(c - 1) / 2.

    >>> [int(s.prefix) for s in pieces("zigzag", Segment(1, 64, 0), 4, 1)]
    [8, 48]
    """
    sequences, new, past = segment.sequences, segment.new_tokens, segment.mean_prefix
    own = new / ranks
    if order == "contiguous":
        return (Segment(sequences, own, past + position * own),)
    if order == "striped":
        return (Segment(sequences, own, past + position + (ranks - 1) * (own - 1) * 0.5),)
    half = own * 0.5
    return (Segment(sequences, half, past + position * half), Segment(sequences, half, past + (2 * ranks - 1 - position) * half))


def imbalance(order: str, tokens: Num, ranks: Num) -> Num:
    """Pairs of the busiest rank over the mean, for T tokens without a past.

    contiguous: (T^2 - (T - c)^2 + c) / (T (T + 1) / n); zigzag: 1; striped: 1 + (n - 1) / (T + 1).

    >>> round(imbalance("contiguous", 131072, 16), 4), imbalance("zigzag", 131072, 16), round(imbalance("striped", 131072, 16), 6)
    (1.9375, 1.0, 1.000114)
    """
    own, mean = tokens / ranks, tokens * (tokens + 1) * 0.5 / ranks
    if order == "zigzag":
        return mean / mean
    if order == "striped":
        return (mean + own * (ranks - 1) * 0.5) / mean
    return (own * (tokens - own) + own * (own + 1) * 0.5) / mean


def block_tokens_to_hide(*, flops_per_s: FlopsPerSecond, bytes_per_s: Num, kv_heads: Num, heads: Num, element_bytes: float, share: float = 1.0) -> Tokens:
    """Tokens c of a local block from which attention hides the send of the next block.

    c = F n_kv e / (2 n_q B), for a full block; a causal zigzag step does half the pairs (`share` 0.5) and needs twice c.
    Source: Ring Attention (2310.01889) section 3; FORMULAS 5.5.

    >>> round(block_tokens_to_hide(flops_per_s=312e12, bytes_per_s=300e9, kv_heads=32, heads=32, element_bytes=2))
    1040
    """
    return flops_per_s * kv_heads * element_bytes / (2 * heads * bytes_per_s * share)


def tokens_to_hide_kv(*, ranks: Num, flops_per_s: FlopsPerSecond, bytes_per_s: Num, kv_heads: Num, heads: Num, element_bytes: float) -> Tokens:
    """New tokens T of the whole group from which pass-KV is hidden: N C n_kv e / (2 n_q BW), C and BW of one CP rank.

    Source: 2411.01783 eq. 2.

    >>> tokens_to_hide_kv(ranks=16, flops_per_s=6.4e15, bytes_per_s=400e9, kv_heads=8, heads=128, element_bytes=2)
    16000.0
    """
    return ranks * flops_per_s * kv_heads * element_bytes / (2 * heads * bytes_per_s)


def tokens_to_hide_q(*, ranks: Num, flops_per_s: FlopsPerSecond, bytes_per_s: Num, element_bytes: float) -> Tokens:
    """Tokens T + P from which the ring of queries is hidden: N e C / (4 BW).  Source: 2411.01783 eq. 3."""
    return ranks * element_bytes * flops_per_s / (4 * bytes_per_s)


def passes_kv(new: Tokens, past: Tokens, *, kv_heads: Num, heads: Num, hidden_from: Tokens = np.inf, allowance: Num = 0.0) -> Any:
    """Whether to pass keys and values rather than queries.

    T >= `hidden_from` (the ring is hidden), or T / (T + P) >= 2 n_kv / n_q - `allowance` (they are fewer bytes).
    Algorithm 1 has allowance 0, algorithm 5 takes off 4 T BW / (N C e) for the all-to-all that pass-Q needs.
    Source: 2411.01783.

    >>> bool(passes_kv(12500, 87500, kv_heads=8, heads=128)), bool(passes_kv(12400, 87600, kv_heads=8, heads=128))
    (True, False)
    """
    share = new / maximum(new + past, 1.0)
    return (new >= hidden_from) | (share >= 2 * kv_heads / heads - allowance)


def passed_bytes(layer: Mixer, held: Slice) -> Bytes:
    """Bytes of one token's keys and values, or of its latent, in the arithmetic's type (bf16)."""
    row = layer.cache_row(held)
    return (row.elements + row.rope) * BF16.bytes


def halo_tokens(layer: Mixer, held: Slice) -> float | None:
    """Earlier tokens whose rows a query may need, or None for all (an encoder, which keeps nothing, reads all)."""
    if isinstance(getattr(layer, "mask", None), Bidirectional):
        return None
    rows = [kept for kept in layer.kept(held) if kept.keep is Keep.ROWS]
    if any(kept.grows for kept in rows):
        return None
    return max((float(kept.most or kept.cycle or 1) - 1 for kept in rows), default=0.0)


def halo_rows(order: str, segment: Segment, ranks: Num, reach: Tokens, position: Num | None = None) -> Tokens:
    """Rows of other ranks that one rank's queries reach: of the busiest rank's, or of that at `position` p; `reach` R of each query.

    contiguous: min(R, P + p c), most at the end.  zigzag, h = c / 2: the queries of chunks p and 2 n - 1 - p reach a = min(R, P + p h) and
    b = min(R, P + (2 n - 1 - p) h) rows before them; min(h + a, max(0, R - 2 (n - 1 - p) h)) of those before the second are its own or
    before the first: a + b less those.  It grows with p while a does and falls where the chunks come near: most at p = floor(n - 1 -
    R / 2 h) or the next.  striped: as of contiguous rows before the queries' mean.

    >>> [halo_rows("zigzag", Segment(1.0, 64.0, 0.0), n, 3.0) for n in (2.0, 4.0)], halo_rows("zigzag", Segment(1.0, 64.0, 0.0), 4.0, 3.0, 3.0)
    ([3.0, 6.0], 3.0)
    """
    past, own = segment.mean_prefix, segment.new_tokens / ranks
    if order != "zigzag":
        (piece,) = pieces(order, segment, ranks, ranks - 1 if position is None else position)
        return minimum(reach, piece.prefix)
    half = own * 0.5
    if position is None:
        apart = floor(ranks - 1 - reach / maximum(2 * half, 1e-9))
        near, next_ = (maximum(minimum(p, ranks - 1), 0.0) for p in (apart, apart + 1))
        return maximum(halo_rows(order, segment, ranks, reach, near), halo_rows(order, segment, ranks, reach, next_))
    first, second = minimum(reach, past + position * half), minimum(reach, past + (2 * ranks - 1 - position) * half)
    return first + second - minimum(half + first, maximum(reach - 2 * (ranks - 1 - position) * half, 0.0))


def made(layer: Mixer, held: Slice) -> tuple[Num, Num]:
    """Elements of a token's queries and outputs as prefill makes them: a latent is expanded, not absorbed."""
    if isinstance(layer, LatentAttention):
        return held.heads * layer.qk_head_dim, held.heads * layer.v_head_dim
    return layer.query_elements(held), layer.output_elements(held)


#: Mixers whose core goes round a ring; others gather what they need before they start.
_RINGS = (Attention, LatentAttention)


class Context(Scheme):
    """`cp` ranks share the tokens of each sequence; the busiest position is counted unless `position` names one."""

    field = "cp"
    position: Num | None = None

    def shard(self, held: Slice, layer: Layer) -> Slice:
        """Tokens / n; in decoding sequences / n, each attending to every rank's keys (mixers without a ring: to its own,
        whole sequences a rank); resident rows / n.
        """
        n = self.degree
        if is_one(n):
            return held
        if isinstance(layer, MoE):
            spans = self.layout.ep > self.layout.tp * self.layout.dp_attention
            held = held._replace(token_ranks=held.token_ranks * where(spans, n, 1.0))
        if self.layout.holds == "whole" and (decodes(held) or resident(held)):
            if isinstance(layer, Head) or resident(held):
                return held
            return share_sequences(held, n)._replace(asked=held.segments)
        if decodes(held):
            if is_mixer(layer) and type(layer) not in _RINGS:
                return share_sequences(held, n)
            return (held if self.layout.merge == "tree" else share_sequences(held, n))._replace(asked=held.segments, cache_ranks=held.cache_ranks * n)
        if resident(held):
            return held._replace(cache_ranks=held.cache_ranks * n)
        position = n - 1 if self.position is None else self.position
        if not is_mixer(layer):
            own = tuple(s._replace(new_tokens=s.new_tokens / n) for s in held.segments)
        else:
            own = tuple(piece for s in held.segments for piece in pieces(self.layout.order, s, n, position))
        return held._replace(segments=own, asked=held.segments)

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction) -> Work:
        """The ring, the gather or the halo in place of the mixer's core."""
        if is_one(self.degree):
            return work
        if isinstance(layer, Head) and self.layout.holds == "whole":
            return Serial([self._outputs(held), work])
        if not is_mixer(layer) or not held.asked:
            return work
        held = self.layout.spread(held)
        if self.layout.holds == "whole" and decodes(held):
            return Serial([*self._new_rows(layer, held), work])
        if decodes(held):
            return with_mixing(work, self._decode(layer, held, cache)) if has_mixing(work) else work
        core = _Core(layer, held, cache, direction)
        if not has_mixing(work):
            return Serial([*self._fetched(layer, held), work])
        if halo_tokens(layer, held) is not None:
            return with_mixing(work, self._windowed(core))
        return with_mixing(work, Serial([self._whole(core, segment) for segment in held.asked]))

    def _whole(self, core: _Core, segment: Segment) -> Work:
        passing = self.layout.passing
        if passing == "auto":
            mask = passes_kv(
                segment.new_tokens, segment.mean_prefix, kv_heads=self._row_elements(core), heads=2 * made(core.layer, core.held)[0],
                hidden_from=self.layout.hidden_from,
            )  # fmt: skip
            return Select(mask, self._ring(core, segment, "kv"), self._ring(core, segment, "q"))
        if passing == "gather":
            return self._gather(core, segment)
        return self._ring(core, segment, passing)

    @staticmethod
    def _row_elements(core: _Core) -> Num:
        row = core.layer.cache_row(core.held)
        return row.elements + row.rope

    def _ring(self, core: _Core, segment: Segment, passing: str) -> Work:
        """Own block first, then n - 1 blocks of others, each beside the send of the next.

        Pairs of the own block: a triangle in every order (zigzag: two triangles and a square of half the side).  Of a
        step: full rectangles c x c (contiguous), c x c / 2 (zigzag), triangles (striped); without a mask c x c in all.  Each adds c x P / n of the past.
        Backward sends keys and values again (n - 1 times) and their fp32 gradients n times.
        """
        n, layout = self.degree, self.layout
        own, past = segment.new_tokens / n, segment.mean_prefix / n
        seq = segment.sequences
        step = first = core.work((Segment(seq, own, past),))
        everyone = isinstance(getattr(core.layer, "mask", None), Bidirectional)
        if everyone:
            step = first = core.work((Segment(seq, own, 0.0),), Block(own + past))
        elif layout.order != "striped":
            step = core.work((Segment(seq, own, 0.0),), Block(own * (0.5 if layout.order == "zigzag" else 1.0) + past))
        queries, outputs = made(core.layer, core.held)
        group, rows = layout.groups["cp"], seq * (own + past)
        if passing == "q":
            send = message("ring queries", "send", group=group, payload_bytes=seq * own * queries * BF16.bytes)
            partial = outputs * BF16.bytes + core.held.heads * FP32.bytes
            back = message("return outputs", "all_to_all", group=group, payload_bytes=seq * segment.new_tokens * partial)
            return Serial([ring(first, step, send, n), back, merge(seq * own * n, outputs)])
        step = Serial([step, merge(seq * own, outputs)])
        kv_bytes = rows * passed_bytes(core.layer, core.held)
        send = message("ring keys and values", "send", group=group, payload_bytes=kv_bytes)
        if core.direction is Direction.BACKWARD:
            gradients = message("ring gradients", "send", group=group, payload_bytes=kv_bytes * (FP32.bytes / BF16.bytes))
            return backward_ring(first, step, send, gradients, n)
        if passing == "double":
            inner = layout.cp_inner
            near = message("inner ring", "send", group=layout.groups["cp_inner"], payload_bytes=kv_bytes)
            far = message("outer ring", "send", group=layout.groups["cp_outer"], payload_bytes=kv_bytes)
            return ring(ring(first, step, near, inner), ring(step, step, near, inner), far, n / inner)
        return ring(first, step, send, n, skips=layout.order == "contiguous" and not everyone)

    def _gather(self, core: _Core, segment: Segment) -> Work:
        """All keys and values, then one kernel for each of the rank's pieces, which expands the latents it sees; backward
        returns their gradients by a reduce-scatter.  Both travel as two messages of half the bytes, one for each of a rank's pieces,
        so that rows arrive in the order of the sequence (Transformer Engine sends keys and values apart and reorders them).
        """
        past = 0.0 if self.layout.holds == "whole" else segment.mean_prefix
        rows = segment.sequences * (segment.new_tokens + past)
        half = rows * passed_bytes(core.layer, core.held) / 2
        group = self.layout.groups["cp"]
        gather = message("gather keys and values", "all_gather", group=group, payload_bytes=half)
        found: list[Work] = [Repeat(2.0, gather), core.work(core.held.segments)]
        if core.direction is Direction.BACKWARD:
            found.append(Repeat(2.0, message("scatter gradients", "reduce_scatter", group=group, payload_bytes=half)))
        return Serial(found)

    def _windowed(self, core: _Core) -> Work:
        """The rows before each piece that its window reaches, then one kernel; striped tokens need every row."""
        reach, row = halo_tokens(core.layer, core.held), passed_bytes(core.layer, core.held)
        assert reach is not None
        group = self.layout.groups["cp"]
        if self.layout.order == "striped":
            rows = sum((s.sequences * s.new_tokens for s in core.held.asked), 0.0)
            fetch: Work = message("gather keys and values", "all_gather", group=group, payload_bytes=rows * row)
        else:
            rows = self._halo(core.held, reach)
            fetch = message("halo", "send", group=group, payload_bytes=rows * row)
        back = message("halo gradients", "send", group=group, payload_bytes=rows * row)
        return Serial([fetch, core.work(core.held.segments), *([back] if core.direction is Direction.BACKWARD else [])])

    def _halo(self, held: Slice, reach: Tokens) -> Tokens:
        rows: Tokens = sum((s.sequences * halo_rows(self.layout.order, s, self.degree, reach, self.position) for s in held.asked), 0.0)
        return rows

    def _fetched(self, layer: Mixer, held: Slice) -> list[Work]:
        """What a mixer without a ring needs of others before it starts: every row, entry and indexer key that grows with the
        context (gathered), the rows of a window and tokens waiting for compression (a halo), and of a recurrence the state
        every rank reaches by itself (gathered and combined, as LASP-2 does, 2502.07563).
        """
        group = self.layout.groups["cp"]
        found: list[Work] = []
        for kept in layer.kept(held):
            row = element_bytes(kept)
            if kept.every == 0:
                sequences = sum((s.sequences for s in held.asked), 0.0)
                found.append(message("gather states", "all_gather", group=group, payload_bytes=self.degree * sequences * row))
            elif kept.grows:
                whole = self.layout.holds == "whole"
                rows = sum((s.sequences * kept.rows(s.new_tokens if whole else s.mean_prefix + s.new_tokens) for s in held.asked), 0.0)
                found.append(message(f"gather {kept.keep.value}", "all_gather", group=group, payload_bytes=rows * row))
            else:
                most = float(kept.most or kept.cycle or 1) - 1
                rows = self._halo(held, most)
                found.append(message("halo", "send", group=group, payload_bytes=rows * row))
        return found

    def _new_rows(self, layer: Mixer, held: Slice) -> list[Work]:
        """What every rank's new tokens leave in the cache, for all ranks to write; of sequences dealt to one rank each."""
        tokens: Num = sum((s.tokens for s in held.asked), 0.0)
        rows = [kept for kept in layer.kept(held) if kept.grows]
        return [
            message(f"gather new {kept.keep.value}", "all_gather", group=self.layout.groups["cp"], payload_bytes=tokens / kept.every * element_bytes(kept))
            for kept in rows
        ]

    def _outputs(self, held: Slice) -> Work:
        """The last layer's outputs of all ranks' tokens, restored on every rank to be sampled from."""
        tokens = held.tokens if decodes(held) else held.tokens * self.degree
        payload = tokens * (self.layout.hidden_size * BF16.bytes)
        return message("gather outputs", "all_gather", group=self.layout.groups["cp"], payload_bytes=payload)

    def _decode(self, layer: Mixer, held: Slice, cache: CacheFormat) -> Work:
        """Every rank attends with everyone's queries to its own keys; outputs return and are merged by their LSE.

        merge "gather": queries all-gathered, outputs by an all-to-all and merged by one kernel.  "tree": queries are
        everywhere, and three all-reduces (maximum, numerator, denominator) leave the result everywhere; one kernel makes the
        numerator, one divides.  Source: 2411.01783 Alg. 4; 2408.04093.
        """
        n, group = self.degree, self.layout.groups["cp"]
        reach = halo_tokens(layer, held)
        share = tuple(
            s._replace(prefix=maximum(minimum(s.prefix + s.new_tokens, np.inf if reach is None else reach + 1) / n, s.new_tokens) - s.new_tokens)
            for s in held.asked
        )
        core = mixing_of(layer.work(held._replace(segments=share, cache_ranks=held.cache_ranks / n, asked=()), cache=cache))
        tokens = sum((s.tokens for s in held.asked), 0.0)
        queries, outputs = layer.query_elements(held), layer.output_elements(held)
        if self.layout.merge == "tree":
            return Serial([core, *tree_merge(tokens, held.heads, outputs, group)])
        join = elementwise("merge outputs", rows=tokens, read=outputs, written=outputs / n, impl="merge")
        return Serial([
            message("gather queries", "all_gather", group=group, payload_bytes=tokens * queries * BF16.bytes), core,
            message("return outputs", "all_to_all", group=group, payload_bytes=tokens * (outputs * BF16.bytes + held.heads * FP32.bytes)),
            Repeat(where(n > 1, 1.0, 0.0), join),
        ])  # fmt: skip

    def classes(self) -> list[str]:
        """Ring positions that differ: all of them unless the order is balanced."""
        n = self.degree
        if not isinstance(n, (int, float)) or n == 1 or self.layout.order == "zigzag":
            return [""]
        return [f"ring {p}" for p in range(int(n))]

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """Known order and way to pass; an inner ring divides; no second split of the same cache."""
        n, layout = int(self.degree), self.layout
        if layout.order not in ORDERS:
            yield f"--cp-order {layout.order}: unknown; use one of {', '.join(ORDERS)}"
        if layout.passing not in PASSING:
            yield f"--cp-passing {layout.passing}: unknown; use one of {', '.join(PASSING)}"
        if layout.holds not in HOLDS:
            yield f"--cp-holds {layout.holds}: unknown; use one of {', '.join(HOLDS)}"
        if n > 1 and layout.holds == "whole" and layout.passing != "gather":
            yield f"--cp-passing {layout.passing}: ranks that hold the whole cache gather its new rows; use --cp-passing gather, or --cp-holds share"
        if layout.merge not in ("gather", "tree"):
            yield f"--merge {layout.merge}: unknown; use gather or tree"
        if n == 1:
            return
        for _, layer in model.mixers:
            silent = not layer.kept(layer.whole((Segment(1.0, 1.0, 0.0),))) and not getattr(layer, "shares_cache", False)
            if silent and not isinstance(getattr(layer, "mask", None), Bidirectional):
                yield f"--cp {n}: {model.name} is an encoder with a mask whose halo is not modelled; use --dp {n}"
                return
        if n % int(layout.cp_inner):
            yield f"--cp-inner {int(layout.cp_inner)}: it divides the ring of {n} ranks; use a divisor: {divisors(n)}"
        if layout.passing == "double" and layout.cp_inner == 1:
            yield f"--cp-passing double: an inner ring needs at least 2 ranks; add --cp-inner with a divisor: {divisors(n)}"
        if layout.dcp > 1 or layout.helix > 1:
            yield f"--cp {n}: the cache is split over its ranks already; leave --dcp and --helix out"


def decodes(held: Slice) -> bool:
    """Whether it is a step of decoding."""
    return any(s.split_kv for s in held.segments)


def resident(held: Slice) -> bool:
    """Whether nothing is computed: what lies there is asked for."""
    return all(type(s.new_tokens) is float and s.new_tokens == 0.0 for s in held.segments)


def element_bytes(kept: Kept) -> Bytes:
    """Bytes of one row as it travels: in the arithmetic's type unless the state has its own."""
    return (kept.row.elements + kept.row.rope) * (BF16.bytes if kept.dtype is None else kept.dtype.bytes)


class _Core:
    """The core of one mixer for any segments: what a ring repeats."""

    def __init__(self, layer: Mixer, held: Slice, cache: CacheFormat, direction: Direction) -> None:
        self.layer, self.held, self.cache, self.direction = layer, held, cache, direction

    def work(self, segments: tuple[Segment, ...], mask: object | None = None) -> Work:
        """The mixing part over `segments`, under another mask if one is given."""
        layer = self.layer if mask is None else replace(self.layer, mask=mask)  # type: ignore[type-var]
        return mixing_of(layer.work(self.held._replace(segments=segments, asked=()), self.direction, cache=self.cache))


@dataclass(slots=True, eq=False)
class Ring(Serial):
    """Steps of a ring: the first, those between, the last.  `skips`: a position before a block's owner has nothing to do
    with it, and waits.
    """

    skips: bool = False


def ring(first: Work, step: Work, send: Work, ranks: Num, *, skips: bool = False) -> Work:
    """`first` beside a send, n - 2 steps beside a send each, a last step alone; one rank: `first` alone."""
    if is_one(ranks):
        return first
    several = where(ranks > 1, 1.0, 0.0)
    return Ring([
        Overlap([Repeat(several, send), first]), Repeat(maximum(ranks - 2.0, 0.0), Overlap([send, step])), Repeat(several, step),
    ], skips)  # fmt: skip


def backward_ring(first: Work, step: Work, send: Work, gradients: Work, ranks: Num) -> Work:
    """As `ring`; each step after the first also sends the gradients of the block before, the last of them exposed."""
    several = where(ranks > 1, 1.0, 0.0)
    return Serial([
        Overlap([Repeat(several, send), first]), Repeat(maximum(ranks - 2.0, 0.0), Overlap([send, gradients, step])),
        Repeat(several, Overlap([gradients, step])), Repeat(several, gradients),
    ])  # fmt: skip


def merge(tokens: Num, outputs: Num) -> Work:
    """Two partial outputs by their LSE: reads the fp32 sum and a bf16 block, writes the sum.  Source:
    zhuzilin/ring-flash-attention@89962823 utils.py.
    """
    return elementwise("merge outputs", rows=tokens, read=1.5 * outputs, written=outputs, impl="merge", dtype=FP32)


def tree_merge(tokens: Num, heads: Num, outputs: Num, group: Any) -> list[Work]:
    """Three all-reduces: maximum and denominator (fp32 per head), numerator (bf16 outputs), made and divided in place."""
    small = tokens * heads * FP32.bytes
    scale = Repeat(where(group.ranks > 1, 1.0, 0.0), elementwise("scale outputs", rows=tokens, read=outputs, written=outputs, impl="merge"))
    return [
        message("maximum", "all_reduce", group=group, payload_bytes=small), scale,
        message("numerator", "all_reduce", group=group, payload_bytes=tokens * outputs * BF16.bytes),
        message("denominator", "all_reduce", group=group, payload_bytes=small), scale,
    ]  # fmt: skip


__all__ = [
    "HOLDS", "ORDERS", "PASSING", "Context", "Ring", "block_tokens_to_hide", "halo_rows", "halo_tokens", "imbalance", "made", "merge",
    "passed_bytes", "passes_kv", "pieces", "ring", "tokens_to_hide_kv", "tokens_to_hide_q",
]  # fmt: skip
