"""Latent attention over what an indexer selects (DSA: DeepSeek-V3.2, GLM-5).

Legend: as for latent attention; n_I index_n_heads, d_I index_head_dim, k index_topk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import BF16, FP8, W_BF16, CacheFormat, CacheRow, WeightFormat
from simulator.kernels.attention import Causal
from simulator.kernels.elementwise import copy, norm_in_place, rotary
from simulator.kernels.sparse_attention import TopK, index_scores, sparse_attention
from simulator.layers.latent import LatentAttention
from simulator.layers.layer import ARCHITECTURE, Direction, Keep, Kept, Module, Slice, StateRules
from simulator.layers.steps import Steps
from simulator.work import Work


@dataclass(frozen=True, slots=True)
class IndexedLatentAttention(LatentAttention):
    """MLA whose core sees the `index_topk` tokens that small fp8 heads rank highest; the scoring stays quadratic.

    More parameters: r_q n_I d_I + D d_I + 2 d_I + D n_I, held whole by every rank.  `indexer_shared` layers use the
    selection of an earlier layer: no indexer, no index keys.  Prefill and decode both run the absorbed core
    (FlashMLA's sparse kernels are multi-query), so prefill pays 2 n (2 r + d_r) per selected pair.
    Source: FORMULAS 1.12, 2.1; DeepSeek-V3.2-Exp inference/model.py; transformers 5.23.0 glm_moe_dsa.
    """

    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    indexer_shared: bool = False
    index_weight: WeightFormat = W_BF16

    def modules(self, held: Slice) -> Sequence[Module]:
        """Those of MLA and the indexer's."""
        found = list(LatentAttention.modules(self, held))
        if not self.indexer_shared:
            heads, d, width = self.index_n_heads, self.index_head_dim, self.hidden_size
            found += [
                Module("indexer.wq_b", float((self.q_lora_rank or width) * heads * d), self.index_weight, replicated=True),
                Module("indexer.wk", float(width * d), self.index_weight, replicated=True),
                Module("indexer.k_norm", 2.0 * d, W_BF16, replicated=True),
                Module("indexer.weights_proj", float(width * heads), W_BF16, replicated=True),
            ]
        return found

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """The latent row and, unless shared, one index key per token."""
        rows = LatentAttention.kept(self, held, rules)
        return rows if self.indexer_shared else (*rows, Kept(Keep.INDEX, CacheRow(float(self.index_head_dim), index=True)))

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """norm, down-projections, query up-projection, indexer, top-k, absorbed sparse core, o."""
        tokens, width = held.tokens, float(self.hidden_size)
        latent = float(self.kv_lora_rank + self.qk_rope_head_dim)
        steps = Steps(direction)
        steps.norm("attention norm", tokens=tokens, width=width)
        down = latent + (self.q_lora_rank or 0)
        steps.linear("q kv down", m=tokens, n=down, k=width, weight=self.weight)
        steps.stream(norm_in_place("latent norm", tokens=tokens, width=down))
        steps.linear(
            "q up", m=tokens, n=held.heads * self.qk_head_dim, k=float(self.q_lora_rank or width), weight=self.weight,
            saved_bytes=tokens * ((self.q_lora_rank or 0) * BF16.bytes),
        )  # fmt: skip
        steps.stream(rotary("rotary", tokens=tokens, width=(held.heads + 1) * self.qk_rope_head_dim))
        steps.forward_only(copy("cache write", rows=tokens, width=latent))
        if not self.indexer_shared:
            self._index(held, steps, cache)
        steps.batched("absorb k", members=held.heads, m=tokens, n=float(self.kv_lora_rank), k=float(self.qk_nope_head_dim))
        steps.stream(copy("query assembly", rows=tokens, width=held.heads * latent))
        row = CacheRow(float(self.kv_lora_rank), float(self.qk_rope_head_dim), latent=True)
        steps.add(*(
            sparse_attention(
                "core", segment, masks=(TopK(self.index_topk),), heads=held.heads, kv_heads=1.0,
                head_dim=self.kv_lora_rank + self.qk_rope_head_dim, v_head_dim=self.kv_lora_rank, row=row, shared_kv=True, dtype=BF16,
                cache=cache, backward=steps.is_backward,
            ) for segment in held.segments
        ))  # fmt: skip
        steps.batched("absorb v", members=held.heads, m=tokens, n=float(self.v_head_dim), k=float(self.kv_lora_rank))
        steps.linear("o", m=tokens, n=width, k=held.heads * self.v_head_dim, weight=self.weight)
        return steps.serial()

    def _index(self, held: Slice, steps: Steps, cache: CacheFormat) -> None:
        """Index queries, keys and head weights, their scores and the choice: the same on every rank."""
        tokens, width, heads, d = held.tokens, float(self.hidden_size), self.index_n_heads, self.index_head_dim
        steps.linear("index q", m=tokens, n=float(heads * d), k=float(self.q_lora_rank or width), weight=self.index_weight)
        steps.linear("index k weights", m=tokens, n=float(d + heads), k=width, weight=self.index_weight)
        steps.forward_only(copy("index write", rows=tokens, width=float(d)))
        row = CacheRow(float(d), index=True)
        steps.add(*(
            index_scores("index scores", s, mask=Causal(), heads=heads, head_dim=d, row=row, dtype=FP8, cache=cache, backward=steps.is_backward)
            for s in held.segments
        ))  # fmt: skip
