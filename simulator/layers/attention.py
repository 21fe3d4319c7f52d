"""Multi-head, grouped-query and multi-query attention, full or masked.

Legend: D hidden_size, h heads, g key-value heads, d head_dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, W_BF16, CacheFormat, CacheRow, WeightFormat
from simulator.kernels.attention import Causal, DualChunk, Mask, Segment, attention
from simulator.kernels.elementwise import activation, backward, copy, norm, norm_in_place, rotary
from simulator.kernels.gemm import gemm, gemm_backward
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Mixing, Module, Remembers, Slice, Split, StateRules, shared_share
from simulator.units import Num
from simulator.work import Op, Serial, Work


@dataclass(frozen=True, slots=True)
class Attention(Remembers):
    """MHA (h = g), GQA, MQA (g = 1).

    Parameters: (h + 2 g) d D + h d D, plus biases, QK-norm (2 d) and the block's norm (D).
    `rotary_dim` 0 is NoPE (or ALiBi, or positions added to the embedding).  `second_mask` is that of the other half of
    the heads (Sparse Transformer).  `output_gate` doubles the query projection (Qwen3-Next).  `shared_kv`: keys are the
    values.  `shares_cache`: keys and values of an earlier layer are read, none are made or kept.  `global_projections`:
    Q, K and V once more for global tokens (Longformer), used by few and counted as weights alone.  `qk_norm_full`: QK-norm
    over all heads together (MiniMax-M2).  `norm_parameters`: vectors of D in the block's norms (2: with bias, or a norm
    after the block too).  Source: FORMULAS 1.1, 1.2, 2.1.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mask: Mask = Causal()
    rotary_dim: int = 0
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    learned_sinks: bool = False
    weight: WeightFormat = W_BF16
    output_gate: bool = False
    shared_kv: bool = False
    shares_cache: bool = False
    qk_norm_full: bool = False
    second_mask: Mask | None = None
    global_projections: bool = False
    norm_parameters: int = 1

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads."""
        return Slice(segments, heads=float(self.num_attention_heads), kv_heads=float(self.num_key_value_heads))

    def modules(self, held: Slice) -> Sequence[Module]:
        """Key-value heads never fall below one: with more ranks than heads they are replicated."""
        d, width, query, kept = self.head_dim, self.hidden_size, self._query_width(held), self._kept_width(held)
        found = [
            Module("q_proj", query * width, self.weight),
            Module("o_proj", held.heads * (d * width), self.weight),
            Module("input_layernorm", float(self.norm_parameters * width), W_BF16, replicated=True),
        ]
        if not self.shares_cache:
            found.append(Module("kv_proj", kept * width, self.weight))
        if self.global_projections:
            found.append(Module("global_qkv_proj", (query + kept) * (width + 1), self.weight))
        if self.attention_bias:
            found.append(Module("qkv_bias", query + kept, W_BF16))
        if self.output_bias:
            found.append(Module("o_bias", float(width), W_BF16, replicated=True))
        if self.qk_norm:
            found.append(Module("qk_norm", 2.0 * d, W_BF16, replicated=True))
        if self.qk_norm_full:
            found.append(Module("qk_norm", (held.heads + held.kv_heads) * d, W_BF16))
        if self.learned_sinks:
            found.append(Module("sinks", held.heads, W_BF16))
        return found

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (rows alone)
        """Keys and values of the local key-value heads, 2 g d, of the tokens the mask keeps."""
        if self.mask.most == 0 or self.shares_cache:
            return ()
        most = self.mask.most if self.second_mask is None or self.second_mask.most is not None else None
        return (Kept(Keep.ROWS, CacheRow(self._kept_width(held), vectors=held.kv_heads * (1 if self.shared_kv else 2)), most=most),)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads are divided; key-value heads beyond their number are copied."""
        return (Split("attention heads", self.num_attention_heads), Split("key-value heads", self.num_key_value_heads, copied=True))

    def _query_width(self, held: Slice) -> Num:
        return _queries(held) * ((2 if self.output_gate else 1) * self.head_dim)

    def _kept_width(self, held: Slice) -> Num:
        if self.shares_cache:
            return 0.0
        return held.kv_heads * ((1 if self.shared_kv else 2) * self.head_dim)

    def query_elements(self, held: Slice) -> Num:
        """Query elements per token on this rank: h d."""
        return held.heads * self.head_dim

    def output_elements(self, held: Slice) -> Num:
        """Core output elements per token on this rank: h d."""
        return held.heads * self.head_dim

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """norm, qkv, [QK-norm], rotary, cache write, core, o."""
        tokens, d, width = held.tokens, self.head_dim, float(self.hidden_size)
        kept = self._kept_width(held)
        qkv = self._query_width(held) + kept
        first = norm("attention norm", tokens=tokens, width=width)
        turned = self._position(held, tokens)
        if direction is Direction.BACKWARD:
            return Serial([
                gemm_backward("o", m=tokens, n=width, k=held.heads * d, weight=self.weight),
                *(backward(op) for op in self._gate(held, tokens)),
                Mixing([op for segment in held.segments for op in self._core(held, segment, cache, is_backward=True)]),
                *(backward(op) for op in turned),
                gemm_backward("qkv", m=tokens, n=qkv, k=width, weight=self.weight), backward(first),
            ])  # fmt: skip
        return Serial([
            first, gemm("qkv", m=tokens, n=qkv, k=width, weight=self.weight), *turned,
            *self._written(held, tokens, kept), Mixing([op for segment in held.segments for op in self._core(held, segment, cache)]),
            *self._gate(held, tokens),
            gemm("o", m=tokens, n=width, k=held.heads * d, weight=self.weight),
        ])  # fmt: skip

    def _written(self, held: Slice, tokens: Num, width: Num) -> list[Op]:
        """The write into the cache, where there is one."""
        return [copy("cache write", rows=tokens, width=width)] if self.kept(held) else []

    def _gate(self, held: Slice, tokens: Num) -> list[Op]:
        return [activation("output gate", tokens=tokens, width=held.heads * self.head_dim)] if self.output_gate else []

    def _position(self, held: Slice, tokens: Num) -> list[Op]:
        heads = _queries(held) if self.shares_cache else _queries(held) + held.kv_heads
        normed = self.qk_norm or self.qk_norm_full
        found = [norm_in_place("qk norm", tokens=tokens, width=heads * self.head_dim)] if normed else []
        if self.rotary_dim:
            # dual chunks rotate queries for their own, the previous and all earlier chunks
            times = 3 if isinstance(self.mask, DualChunk) else 1
            found.append(rotary("rotary", tokens=tokens, width=(heads + (times - 1) * held.heads) * self.rotary_dim))
        return found

    def _core(self, held: Slice, segment: Segment, cache: CacheFormat, *, is_backward: bool = False) -> list[Op]:
        """One segment's scores.  Decode over shared caches: this rank's share of the keys with every sharer's heads.
        Prefill over shared caches: own heads over the gathered past, the same flops.
        """
        shared = segment.split_kv
        masks = [self.mask] if self.second_mask is None else [self.mask, self.second_mask]
        heads = held.heads * held.cache_ranks if shared else held.heads
        return [
            attention(
                "core", shared_share(segment, held.cache_ranks) if shared else segment, heads=heads / len(masks) if len(masks) > 1 else heads,
                kv_heads=held.kv_heads / len(masks) if len(masks) > 1 else held.kv_heads, head_dim=self.head_dim, mask=mask, dtype=BF16,
                cache=cache, backward=is_backward, learned_sinks=self.learned_sinks, shared_kv=self.shared_kv,
            ) for mask in masks
        ]  # fmt: skip


def _queries(held: Slice) -> Num:
    """Query heads this rank makes."""
    return held.heads if type(held.query_ranks) is float and held.query_ranks == 1.0 else held.heads * held.query_ranks
