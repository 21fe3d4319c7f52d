"""Attention over blocks chosen by the data: NSA (three branches) and MoBA (block top-k).

Legend: D hidden_size, h heads, g key-value heads, d_k and d_v head widths, l and d the compressed branch's block and
stride, l' and n the selected blocks' width and number, W window, b block, k blocks kept, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, W_BF16, CacheFormat, CacheRow, WeightFormat
from simulator.kernels.attention import Segment, Window, attention
from simulator.kernels.elementwise import copy, elementwise, rotary
from simulator.kernels.sparse_attention import Blocks, Pooled, TopK, index_scores, sparse_attention
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Module, Remembers, Slice, Split, StateRules
from simulator.layers.steps import Steps
from simulator.units import Num
from simulator.work import Work


@dataclass(frozen=True, slots=True)
class NativeSparseAttention(Remembers):
    """NSA: compressed entries of l tokens every d, the n blocks of l' tokens they rank highest, a window of W; each branch
    with keys and values of its own, mixed by three gates per head.

    Parameters: h d_k D + 3 g (d_k + d_v) D + h d_v D + 3 h D, and one linear layer per key and value that compresses a
    block, l (d_k^2 + d_v^2) (the paper leaves its size open).  Selection reuses the compressed scores.
    Source: FORMULAS 1.11, 2.1; 2502.11089 section 3.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_blocks: int = 16
    sliding_window: int = 512
    rotary_dim: int = 0
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads."""
        return Slice(segments, heads=float(self.num_attention_heads), kv_heads=float(self.num_key_value_heads))

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads are divided; key-value heads beyond their number are copied."""
        return (Split("attention heads", self.num_attention_heads), Split("key-value heads", self.num_key_value_heads, copied=True))

    @property
    def masks(self) -> tuple[Pooled, TopK, Window]:
        """What each branch sees."""
        return Pooled(self.compress_block, self.compress_stride), TopK(self.select_blocks * self.select_block), Window(self.sliding_window)

    def _row(self, held: Slice) -> CacheRow:
        return CacheRow(held.kv_heads * (self.head_dim + self.v_head_dim))

    def modules(self, held: Slice) -> Sequence[Module]:
        """Everything by head but the compression and the block's norm."""
        width = self.hidden_size
        return [
            Module("q_proj", held.heads * (self.head_dim * width), self.weight),
            Module("kv_proj", held.kv_heads * (3 * (self.head_dim + self.v_head_dim) * width), self.weight),
            Module("gates", held.heads * (3 * width), W_BF16),
            Module("compress", float(self.compress_block * (self.head_dim**2 + self.v_head_dim**2)), W_BF16, replicated=True),
            Module("o_proj", held.heads * (self.v_head_dim * width), self.weight),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (one way to hold it)
        """The selected branch's rows, compressed entries, the window, and the raw tail of the compressed branch."""
        row = self._row(held)
        return (
            Kept(Keep.ROWS, row),
            Kept(Keep.ENTRIES, row, every=self.compress_stride, late=self.compress_block - self.compress_stride),
            Kept(Keep.ROWS, row, most=self.sliding_window),
            Kept(Keep.TAIL, row, most=self.compress_block),
        )

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """norm, qkv and gates, rotary, compression, three cores, mix, o."""
        tokens, width, d_k, d_v = held.tokens, float(self.hidden_size), self.head_dim, self.v_head_dim
        both, steps = held.kv_heads * float(d_k + d_v), Steps(direction)
        steps.norm("attention norm", tokens=tokens, width=width)
        steps.linear("qkv gates", m=tokens, n=held.heads * (d_k + 3.0) + 3 * both, k=width, weight=self.weight)
        steps.stream(rotary("rotary", tokens=tokens, width=(held.heads + 3 * held.kv_heads) * self.rotary_dim))
        steps.forward_only(copy("cache write", rows=tokens, width=3 * both))
        pooled = tokens / self.compress_stride * held.kv_heads
        steps.linear("compress k", m=pooled, n=float(d_k), k=float(self.compress_block * d_k))
        steps.linear("compress v", m=pooled, n=float(d_v), k=float(self.compress_block * d_v))
        compressed, selected, window = self.masks
        for segment in held.segments:
            for name, mask in (("compressed core", compressed), ("selected core", selected)):
                steps.add(sparse_attention(
                    name, segment, masks=(mask,), heads=held.heads, kv_heads=held.kv_heads, head_dim=d_k, v_head_dim=d_v,
                    row=self._row(held), cache=cache, backward=steps.is_backward,
                ))  # fmt: skip
            steps.add(attention(
                "window core", segment, heads=held.heads, kv_heads=held.kv_heads, head_dim=d_k, v_head_dim=d_v, mask=window, dtype=BF16,
                cache=cache, backward=steps.is_backward,
            ))  # fmt: skip
        out = held.heads * float(d_v)
        steps.stream(elementwise("mix branches", rows=tokens, read=3 * out, written=out, impl="activation", kept=3 * out))
        steps.linear("o", m=tokens, n=width, k=out, weight=self.weight)
        return steps.serial()


@dataclass(frozen=True, slots=True)
class MixtureOfBlockAttention(Remembers):
    """MoBA: GQA whose query sees its own block and the `moba_topk` - 1 earlier blocks whose mean keys score highest.

    Parameters as attention.  gate: 2 h d per query and complete block.  Keeps all rows and, so that decoding need not read
    them to choose, one mean key per block.  Source: FORMULAS 1.14; 2502.13189 section 2; MoonshotAI/MoBA moba_naive.py.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    moba_chunk_size: int = 4096
    moba_topk: int = 12
    rotary_dim: int = 0
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads."""
        return Slice(segments, heads=float(self.num_attention_heads), kv_heads=float(self.num_key_value_heads))

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads are divided; key-value heads beyond their number are copied."""
        return (Split("attention heads", self.num_attention_heads), Split("key-value heads", self.num_key_value_heads, copied=True))

    def modules(self, held: Slice) -> Sequence[Module]:
        """Those of attention: the gate has no weights."""
        width, d = self.hidden_size, self.head_dim
        return [
            Module("q_proj", held.heads * (d * width), self.weight), Module("kv_proj", held.kv_heads * (2 * d * width), self.weight),
            Module("o_proj", held.heads * (d * width), self.weight), Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]  # fmt: skip

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (one way to hold it)
        """All rows, and a mean key per block."""
        return (
            Kept(Keep.ROWS, CacheRow(held.kv_heads * (2 * self.head_dim))),
            Kept(Keep.ENTRIES, CacheRow(held.kv_heads * self.head_dim), every=self.moba_chunk_size),
        )

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """norm, qkv, rotary, block means, gate, core, o."""
        tokens, width, d = held.tokens, float(self.hidden_size), self.head_dim
        heads: Num = held.heads
        steps = Steps(direction)
        steps.norm("attention norm", tokens=tokens, width=width)
        steps.linear("qkv", m=tokens, n=(heads + 2 * held.kv_heads) * d, k=width, weight=self.weight)
        steps.stream(rotary("rotary", tokens=tokens, width=(heads + held.kv_heads) * self.rotary_dim))
        steps.forward_only(copy("cache write", rows=tokens, width=held.kv_heads * (2 * d)))
        means = held.kv_heads * float(d)
        steps.stream(elementwise("block means", rows=tokens, read=means, written=means / self.moba_chunk_size, impl="activation"))
        for segment in held.segments:
            steps.add(index_scores(
                "gate", segment, mask=TopK(None, self.moba_chunk_size), heads=heads, head_dim=d, row=CacheRow(means), dtype=BF16, cache=cache,
                backward=steps.is_backward,
            ))  # fmt: skip
            steps.add(sparse_attention(
                "core", segment, masks=(Blocks(self.moba_chunk_size, self.moba_topk),), heads=heads, kv_heads=held.kv_heads, head_dim=d,
                v_head_dim=d, row=CacheRow(held.kv_heads * (2 * d)), cache=cache, backward=steps.is_backward,
            ))  # fmt: skip
        steps.linear("o", m=tokens, n=width, k=heads * d, weight=self.weight)
        return steps.serial()
