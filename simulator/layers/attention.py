"""Multi-head, grouped-query and multi-query attention, full or masked.

Legend: D hidden_size, h heads, g key-value heads, d head_dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, W_BF16, CacheFormat, CacheRow, WeightFormat
from simulator.kernels.attention import Causal, Mask, Segment, attention
from simulator.kernels.elementwise import backward, copy, norm, rotary
from simulator.kernels.gemm import gemm, gemm_backward
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Module, Remembers, Slice, StateRules, shared_share
from simulator.units import Num
from simulator.work import Op, Serial, Work


@dataclass(frozen=True, slots=True)
class Attention(Remembers):
    """MHA (h = g), GQA, MQA (g = 1).

    Parameters: (h + 2 g) d D + h d D, plus biases, QK-norm (2 d) and the block's norm (D).
    `rotary_dim` 0 is NoPE.  `mask` is causal, windowed or chunked.  Source: FORMULAS 1.1, 1.2, 2.1.
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

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads."""
        return Slice(segments, heads=float(self.num_attention_heads), kv_heads=float(self.num_key_value_heads))

    def modules(self, held: Slice) -> Sequence[Module]:
        """Key-value heads never fall below one: with more ranks than heads they are replicated."""
        d, width = self.head_dim, self.hidden_size
        found = [
            Module("q_proj", held.heads * (d * width), self.weight),
            Module("kv_proj", held.kv_heads * (2 * d * width), self.weight),
            Module("o_proj", held.heads * (d * width), self.weight),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
        ]
        if self.attention_bias:
            found.append(Module("qkv_bias", (held.heads + 2 * held.kv_heads) * d, W_BF16))
        if self.output_bias:
            found.append(Module("o_bias", float(width), W_BF16, replicated=True))
        if self.qk_norm:
            found.append(Module("qk_norm", 2.0 * d, W_BF16, replicated=True))
        if self.learned_sinks:
            found.append(Module("sinks", held.heads, W_BF16))
        return found

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (rows alone)
        """Keys and values of the local key-value heads, 2 g d, of the tokens the mask keeps."""
        if self.mask.most == 0:
            return ()
        return (Kept(Keep.ROWS, CacheRow(held.kv_heads * (2 * self.head_dim)), most=self.mask.most),)

    def query_elements(self, held: Slice) -> Num:
        """Query elements per token on this rank: h d."""
        return held.heads * self.head_dim

    def output_elements(self, held: Slice) -> Num:
        """Core output elements per token on this rank: h d."""
        return held.heads * self.head_dim

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """norm, qkv, [QK-norm], rotary, cache write, core, o."""
        tokens, d, width = held.tokens, self.head_dim, float(self.hidden_size)
        qkv = (held.heads + 2 * held.kv_heads) * d
        first = norm("attention norm", tokens=tokens, width=width)
        turned = self._position(held, tokens)
        if direction is Direction.BACKWARD:
            return Serial([
                gemm_backward("o", m=tokens, n=width, k=held.heads * d, weight=self.weight),
                *(self._core(held, segment, cache, is_backward=True) for segment in held.segments),
                *(backward(op) for op in turned),
                gemm_backward("qkv", m=tokens, n=qkv, k=width, weight=self.weight), backward(first),
            ])  # fmt: skip
        return Serial([
            first, gemm("qkv", m=tokens, n=qkv, k=width, weight=self.weight), *turned,
            copy("cache write", rows=tokens, width=held.kv_heads * (2 * d)),
            *(self._core(held, segment, cache) for segment in held.segments),
            gemm("o", m=tokens, n=width, k=held.heads * d, weight=self.weight),
        ])  # fmt: skip

    def _position(self, held: Slice, tokens: Num) -> list[Op]:
        heads = held.heads + held.kv_heads
        found = [norm("qk norm", tokens=tokens, width=heads * (self.head_dim / 2))] if self.qk_norm else []
        if self.rotary_dim:
            found.append(rotary("rotary", tokens=tokens, width=heads * self.rotary_dim))
        return found

    def _core(self, held: Slice, segment: Segment, cache: CacheFormat, *, is_backward: bool = False) -> Op:
        """One segment's scores.  Decode over shared caches: this rank's share of the keys with every sharer's heads.
        Prefill over shared caches: own heads over the gathered past, the same flops.
        """
        shared = segment.split_kv
        return attention(
            "core", shared_share(segment, held.cache_ranks) if shared else segment,
            heads=held.heads * held.cache_ranks if shared else held.heads, kv_heads=held.kv_heads,
            head_dim=self.head_dim, mask=self.mask, dtype=BF16, cache=cache, backward=is_backward,
            learned_sinks=self.learned_sinks,
        )  # fmt: skip
