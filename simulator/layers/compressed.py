"""Compressed attention of DeepSeek-V4: a window of raw tokens beside entries that stand for m tokens each.

Legend: D hidden_size, n heads of width c, r_q q_lora_rank, g o_groups of d_g o_lora_rank, W sliding_window,
m compress_ratio, n_I and c_I of the indexer, k index_topk, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, FP4, FP32, W_BF16, CacheFormat, CacheRow, WeightFormat
from simulator.kernels.attention import Mask, Segment, Window
from simulator.kernels.elementwise import copy, elementwise, norm_in_place, rotary
from simulator.kernels.grouped_gemm import grouped_gemm, grouped_gemm_backward
from simulator.kernels.sparse_attention import TopK, index_scores, sparse_attention
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Module, Remembers, Slice, Split, StateRules
from simulator.layers.steps import Steps
from simulator.units import Num
from simulator.work import Work

#: Above this ratio entries are few and all are seen (HCA); up to it they overlap and an indexer selects (CSA).
OVERLAPPING_RATIO = 4


@dataclass(frozen=True, slots=True)
class CompressedAttention(Remembers):
    """Multi-query attention with one shared key-value head over min(t, W) raw tokens and compressed entries.

    `compress_ratio` 0: the window alone; 4 (CSA): overlapping entries, of which an indexer selects k; 128 (HCA): all
    floor(t / m) entries.  One learned sink per head.  The output goes through g groups of rank d_g.
    Linear flops per token: 2 D r_q + 2 r_q n c + 2 D c + 2 n c d_g + 2 g d_g D, CSA + 8 D (c + c_I) + 2 r_q n_I c_I +
    2 D n_I, HCA + 4 D c.  Keeps the window, an entry every m tokens, index keys every m tokens, and the tokens that wait
    for compression, values and gates of (1 + overlap) c: a ring in fp32 (vLLM) or what there is (transformers).
    Heads and output groups are split over tensor ranks; keys, entries and indexer are every rank's.
    Source: FORMULAS 1.13, 2.1, 2.2; DeepSeek-V4 report 2.3, 4.2; transformers 5.23.0 deepseek_v4; vLLM models/deepseek_v4.
    """

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratio: int = 0
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads; one key-value row."""
        return Slice(segments, heads=float(self.num_attention_heads), kv_heads=1.0)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads and output groups are divided; everything else is every rank's."""
        return (Split("attention heads", self.num_attention_heads), Split("output groups", self.o_groups))

    @property
    def overlap(self) -> int:
        """Whether neighbouring entries share tokens: 0 or 1."""
        return 1 if 0 < self.compress_ratio <= OVERLAPPING_RATIO else 0

    @property
    def selects(self) -> bool:
        """Whether an indexer chooses entries."""
        return self.overlap == 1

    @property
    def entries(self) -> Mask | None:
        """Which entries a query sees."""
        if not self.compress_ratio:
            return None
        return TopK(self.index_topk if self.selects else None, self.compress_ratio)

    @property
    def row(self) -> CacheRow:
        """One key that is its own value: c - d_r elements and d_r rotated ones."""
        return CacheRow(float(self.head_dim - self.qk_rope_head_dim), float(self.qk_rope_head_dim), latent=True)

    def modules(self, held: Slice) -> Sequence[Module]:
        """Down-projections, compressor and indexer are replicated."""
        width, c, query = self.hidden_size, self.head_dim, self.q_lora_rank
        inner = held.heads * c
        found = [
            Module("q_a_proj", float(width * query), self.weight, replicated=True),
            Module("q_a_norm", float(query), W_BF16, replicated=True),
            Module("q_b_proj", inner * query, self.weight),
            Module("kv_proj", float(width * c), self.weight, replicated=True),
            Module("kv_norm", float(c), W_BF16, replicated=True),
            Module("o_a_proj", inner * self.o_lora_rank, self.weight),
            Module("o_b_proj", self._groups(held) * (self.o_lora_rank * width), self.weight),
            Module("sinks", held.heads, W_BF16),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]
        if self.compress_ratio:
            made = (1 + self.overlap) * c
            found.append(Module("compressor", 2.0 * width * made, W_BF16, replicated=True))
            found.append(Module("compressor.position_bias", float(self.compress_ratio * made + c), W_BF16, replicated=True))
        if self.selects:
            heads, d = self.index_n_heads, self.index_head_dim
            found += [
                Module("indexer.compressor", 4.0 * width * d, W_BF16, replicated=True),
                Module("indexer.position_bias", float(self.compress_ratio * 2 * d + d), W_BF16, replicated=True),
                Module("indexer.q_b_proj", float(query * heads * d), self.weight, replicated=True),
                Module("indexer.weights_proj", float(width * heads), W_BF16, replicated=True),
            ]
        return found

    def _groups(self, held: Slice) -> Num:
        return self.o_groups / held.tensor_ranks

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (the same on every rank)
        """Window, entries, index keys, tails."""
        m, row = self.compress_ratio, self.row
        if not m:
            times = 2.0 if rules.twice else 1.0
            return (Kept(Keep.ROWS, CacheRow(row.elements * times, row.rope * times, latent=True), most=self.sliding_window),)
        found = [Kept(Keep.ROWS, row, most=self.sliding_window), Kept(Keep.ENTRIES, row, every=m)]
        widths = [self.head_dim]
        if self.selects:
            found.append(Kept(Keep.INDEX, CacheRow(float(self.index_head_dim), index=True), every=m))
            widths.append(self.index_head_dim)
        span = 1 + self.overlap
        for width in widths:
            # values and gates, each as wide as the overlap makes them
            pair = 2.0 * span * width
            if rules.tails == "ring":
                found.append(Kept(Keep.TAIL, CacheRow(span * m * pair), every=0, dtype=FP32))
            else:
                found.append(Kept(Keep.TAIL, CacheRow(pair), cycle=m, dtype=BF16))
                if self.overlap:
                    found.append(Kept(Keep.TAIL, CacheRow(m * pair / span), every=0, dtype=BF16))
        return tuple(found)

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """norm, down-projections, query up-projection, rotary, compression, indexer, core, grouped output."""
        tokens, width, c = held.tokens, float(self.hidden_size), self.head_dim
        inner, span = held.heads * float(c), 1 + self.overlap
        steps = Steps(direction)
        steps.norm("attention norm", tokens=tokens, width=width)
        steps.linear("q kv down", m=tokens, n=float(self.q_lora_rank + c), k=width, weight=self.weight)
        steps.stream(norm_in_place("latent norm", tokens=tokens, width=self.q_lora_rank + c))
        asked_bytes = tokens * (self.q_lora_rank * BF16.bytes)
        steps.linear("q up", m=tokens, n=inner, k=float(self.q_lora_rank), weight=self.weight, saved_bytes=asked_bytes)
        steps.stream(norm_in_place("query norm", tokens=tokens, width=inner))
        steps.stream(rotary("rotary", tokens=tokens, width=(2 * held.heads + 1) * self.qk_rope_head_dim))
        steps.forward_only(copy("cache write", rows=tokens, width=float(c)))
        if self.compress_ratio:
            made = 2.0 * span * (c + (self.index_head_dim if self.selects else 0))
            steps.linear("compressor", m=tokens, n=made, k=width, weight=self.weight)
            steps.stream(elementwise("compress", rows=tokens, read=made, written=made * 0.5 / (span * self.compress_ratio), impl="compress"))
        if self.selects:
            self._index(held, steps, cache)
        masks: tuple[Mask, ...] = (Window(self.sliding_window),)
        if self.entries is not None:
            masks = (*masks, self.entries)
        steps.add(*(
            sparse_attention(
                "core", segment, masks=masks, heads=held.heads, kv_heads=1.0, head_dim=c, v_head_dim=c, row=self.row, shared_kv=True,
                cache=cache, backward=steps.is_backward, learned_sinks=True,
            ) for segment in held.segments
        ))  # fmt: skip
        self._output(held, steps)
        return steps.serial()

    def _output(self, held: Slice, steps: Steps) -> None:
        """Each group's heads into its own rank d_g, then all groups into D."""
        groups, rank = self._groups(held), float(self.o_lora_rank)
        rows, k = held.tokens * groups, held.heads * self.head_dim / groups
        if steps.is_backward:
            steps.add(*grouped_gemm_backward("o a", rows=rows, experts=groups, n=rank, k=k, weight=self.weight)[::-1])
        else:
            steps.add(grouped_gemm("o a", rows=rows, experts=groups, n=rank, k=k, weight=self.weight))
        steps.linear("o b", m=held.tokens, n=float(self.hidden_size), k=groups * rank, weight=self.weight)

    def _index(self, held: Slice, steps: Steps, cache: CacheFormat) -> None:
        """Index queries and head weights, fp4 scores against every entry: the same on every rank."""
        tokens, heads, d = held.tokens, self.index_n_heads, self.index_head_dim
        steps.linear("index q", m=tokens, n=float(heads * d), k=float(self.q_lora_rank), weight=self.weight)
        steps.linear("index weights", m=tokens, n=float(heads), k=float(self.hidden_size), weight=self.weight)
        seen = TopK(None, self.compress_ratio)
        row = CacheRow(float(d), index=True)
        steps.add(*(
            index_scores("index scores", s, mask=seen, heads=heads, head_dim=d, row=row, dtype=FP4, cache=cache, backward=steps.is_backward)
            for s in held.segments
        ))  # fmt: skip
