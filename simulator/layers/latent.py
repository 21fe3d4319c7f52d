"""Multi-head latent attention (DeepSeek-V2/V3, Kimi-K2).

Legend: D hidden_size, n heads, r_q q_lora_rank, r kv_lora_rank, d_n qk_nope_head_dim, d_r qk_rope_head_dim,
d_v v_head_dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulator.dtypes import BF16, C_BF16, FP32, W_BF16, CacheFormat, CacheRow, WeightFormat
from simulator.kernels.attention import Causal, Mask, Segment, attention
from simulator.kernels.elementwise import backward, copy, join, norm, norm_in_place, rotary
from simulator.kernels.gemm import Size, batched_gemm, gemm, gemm_backward
from simulator.kernels.latent_attention import crossover_tokens, latent_attention
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Mixing, Module, Remembers, Slice, Split, StateRules, shared_share
from simulator.units import Num, minimum
from simulator.work import Aside, Select, Serial, Work

#: Tokens whose keys and values exist at once during prefill (vLLM, mla_attention.py, workspace of 65,536 rows).
EXPANSION_TOKENS = 65536.0


@dataclass(frozen=True, slots=True)
class LatentAttention(Remembers):
    """MLA: queries through r_q (or straight, q_lora_rank None), keys and values through a shared latent of r + d_r.

    Parameters: D r_q + r_q n (d_n + d_r) + D (r + d_r) + r n (d_n + d_v) + n d_v D.  The two down-projections, their
    norms and the cache are held whole by every rank of a tensor-parallel group.
    `rotary` false: the d_r dimensions exist but are not turned (Kimi-Linear).
    Decode absorbs W_UK and W_UV into query and output; a prefill chunk re-expands keys and values of everything it
    sees, P + C tokens, unless it is shorter than the crossover.  Source: FORMULAS 1.4.
    """

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    mask: Mask = Causal()
    weight: WeightFormat = W_BF16
    rotary: bool = True
    gathers_past = True

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """All heads; one latent row, which no head split divides."""
        return Slice(segments, heads=float(self.num_attention_heads), kv_heads=1.0)

    @property
    def qk_head_dim(self) -> int:
        """d_n + d_r."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def modules(self, held: Slice) -> Sequence[Module]:
        """Down-projections are replicated."""
        width, latent = self.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim
        query_in = self.q_lora_rank or width
        found = [
            Module("q_b_proj" if self.q_lora_rank else "q_proj", held.heads * held.query_ranks * (query_in * self.qk_head_dim), self.weight),
            Module("kv_a_proj", float(width * latent), self.weight, replicated=True),
            Module("kv_b_proj", held.heads * (self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)), self.weight),
            Module("o_proj", held.heads * (self.v_head_dim * width), self.weight),
            Module("input_layernorm", float(width), W_BF16, replicated=True),
            Module("kv_a_layernorm", float(self.kv_lora_rank), W_BF16, replicated=True),
        ]
        if self.q_lora_rank:
            found.append(Module("q_a_proj", float(width * self.q_lora_rank), self.weight, replicated=True))
            found.append(Module("q_a_layernorm", float(self.q_lora_rank), W_BF16, replicated=True))
        return found

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:  # noqa: ARG002 (the same on every rank)
        """One latent row of r + d_r per token, whatever the number of heads."""
        return (Kept(Keep.ROWS, CacheRow(float(self.kv_lora_rank), float(self.qk_rope_head_dim), latent=True), most=self.mask.most),)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Heads are divided; the latent row is every rank's."""
        return (Split("attention heads", self.num_attention_heads),)

    def query_elements(self, held: Slice) -> Num:
        """Absorbed queries: n (r + d_r)."""
        return held.heads * (self.kv_lora_rank + self.qk_rope_head_dim)

    def output_elements(self, held: Slice) -> Num:
        """Absorbed outputs: n r."""
        return held.heads * self.kv_lora_rank

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """norm, down-projections, latent norm, query up-projection, rotary, cache write, core, o."""
        tokens, width = held.tokens, float(self.hidden_size)
        latent = float(self.kv_lora_rank + self.qk_rope_head_dim)
        down = latent + (self.q_lora_rank or 0)
        query: Size = {"m": tokens, "n": held.heads * held.query_ranks * self.qk_head_dim, "k": float(self.q_lora_rank or width)}
        first = norm("attention norm", tokens=tokens, width=width)
        inner = norm_in_place("latent norm", tokens=tokens, width=down)
        turned = rotary("rotary", tokens=tokens, width=(held.heads + 1) * (self.qk_rope_head_dim if self.rotary else 0))
        down_size: Size = {"m": tokens, "n": down, "k": width}
        o_size: Size = {"m": tokens, "n": width, "k": held.heads * self.v_head_dim}
        # normed latents are kept beside what their norm read; queries made straight from x find it kept by the block's norm
        asked_bytes = tokens * ((self.q_lora_rank or 0) * BF16.bytes)
        if direction is Direction.BACKWARD:
            return Serial([
                gemm_backward("o", **o_size, weight=self.weight),
                Mixing([self._expanded(held, segment, is_backward=True) for segment in held.segments]),
                backward(turned), gemm_backward("q up", **query, weight=self.weight, freed_bytes=asked_bytes), backward(inner),
                gemm_backward("q kv down", **down_size, weight=self.weight), backward(first),
            ])  # fmt: skip
        return Serial([
            first, gemm("q kv down", **down_size, weight=self.weight), inner,
            gemm("q up", **query, weight=self.weight, saved_bytes=asked_bytes), turned, copy("cache write", rows=tokens, width=latent),
            Mixing([self._core(held, segment, cache) for segment in held.segments]),
            gemm("o", **o_size, weight=self.weight),
        ])  # fmt: skip

    def _core(self, held: Slice, segment: Segment, cache: CacheFormat) -> Work:
        """Absorbed for decode and for chunks below the crossover, else expanded."""
        if segment.split_kv:
            return self._absorbed(held, segment, cache)
        below = segment.new_tokens < crossover_tokens(
            kv_lora_rank=self.kv_lora_rank, nope=self.qk_nope_head_dim, v_head_dim=self.v_head_dim
        )
        if not np.any(below):
            return self._expanded(held, segment)
        return Select(below, self._absorbed(held, segment, cache), self._expanded(held, segment))

    def _absorbed(self, held: Slice, segment: Segment, cache: CacheFormat) -> Work:
        """W_UK into the query, its two parts side by side, the multi-query core, W_UV after it: 2 r n (d_n + d_v) per new token.

        Every head has its own W_UK and W_UV.  The query is put together as vLLM does before its cores (forward_mqa).
        """
        shared = segment.split_kv
        queries, rank = held.heads * held.query_ranks, self.kv_lora_rank
        return Serial([
            batched_gemm("absorb k", members=queries, m=segment.tokens, n=float(rank), k=float(self.qk_nope_head_dim)),
            copy("query assembly", rows=segment.tokens, width=queries * (rank + self.qk_rope_head_dim)),
            latent_attention(
                "core", shared_share(segment, held.cache_ranks) if shared else segment,
                heads=held.heads * held.cache_ranks if shared else held.heads, kv_lora_rank=self.kv_lora_rank,
                rope_head_dim=self.qk_rope_head_dim, mask=self.mask, cache=cache,
            ),
            batched_gemm("absorb v", members=held.heads, m=segment.tokens, n=float(self.v_head_dim), k=float(rank)),
        ])  # fmt: skip

    def _expanded(self, held: Slice, segment: Segment, *, is_backward: bool = False) -> Work:
        """Keys and values of every visible token made from its latent, keys put together, then a core of d_n + d_r and d_v.

        The rotary part of a key is copied to every head, as the cores of vLLM and SGLang want it (vLLM, mla_attention.py,
        _concat_k_nope_k_pe); values are read where the product wrote them.
        """
        size: Size = {
            "m": segment.sequences * self.mask.seen(segment).live,
            "n": held.heads * (self.qk_nope_head_dim + self.v_head_dim), "k": float(self.kv_lora_rank),
        }  # fmt: skip
        core = attention(
            "core", segment, heads=held.heads, kv_heads=held.heads, head_dim=self.qk_head_dim,
            v_head_dim=self.v_head_dim, mask=self.mask, dtype=BF16, cache=C_BF16, backward=is_backward,
        )  # fmt: skip
        whole = join("key assembly", rows=size["m"], heads=held.heads, plain=self.qk_nope_head_dim, turned=self.qk_rope_head_dim)
        latents = segment.tokens * (size["k"] * BF16.bytes)
        if is_backward:
            return Serial([core, backward(whole), gemm_backward("kv up", **size, weight=self.weight, freed_bytes=latents)])
        expand = gemm("kv up", **size, weight=self.weight)
        per_token = segment.tokens * (held.heads * BF16.bytes)
        queries, outputs = per_token * self.qk_head_dim, per_token * self.v_head_dim + segment.tokens * held.heads * FP32.bytes
        core_aside = core.aside

        def rows(width: Num) -> Num:
            """Engines expand a long context piece by piece and merge by log-sum-exp."""
            return minimum(size["m"], EXPANSION_TOKENS) * (width * BF16.bytes)

        # the queries are there before the expansion, which stays for its values beside the keys made of it
        made = size["k"] + self.qk_rope_head_dim + size["n"]
        expand.aside = lambda: Aside(live_bytes=queries + rows(made), saved_bytes=latents)
        whole.aside = lambda: Aside(live_bytes=queries + rows(made + held.heads * self.qk_head_dim))
        core.aside = lambda: core_aside()._replace(live_bytes=whole.live_bytes + outputs)
        return Serial([expand, whole, core])
