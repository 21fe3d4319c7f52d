"""Decode context parallelism: c ranks of a tensor group hold different tokens of the same cache.

It adds no GPUs: it removes the copies that tensor parallelism makes of a latent row, or of key-value heads beyond
their number.  Decode gathers queries, attends to its own tokens with everyone's heads, and merges outputs by their
log-sum-exp: one kernel weighs the outputs before they are summed.  Prefill gathers the past (latents) or the queries.
Source: FORMULAS 5.8; vLLM docs, context_parallel_deployment; vllm-project/vllm, cp_lse_ag_out_rs.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.dtypes import BF16, FP32, CacheFormat
from simulator.kernels.elementwise import elementwise
from simulator.kernels.messages import message
from simulator.layers import Attention, LatentAttention
from simulator.layers.layer import Direction, Layer, Slice, is_mixer
from simulator.model import ModelSpec
from simulator.parallel.scheme import Scheme, divisors, is_one
from simulator.units import where
from simulator.work import Repeat, Serial, Work


class DecodeContext(Scheme):
    """`dcp` ranks of each tensor group share one copy of the cache."""

    field = "dcp"

    def shard(self, held: Slice, layer: Layer) -> Slice:
        """Tokens / c of each sequence's cache."""
        if is_one(self.degree) or not is_mixer(layer):
            return held
        return held._replace(cache_ranks=held.cache_ranks * self.degree)

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction) -> Work:  # noqa: ARG002 (serving only)
        """All-gather of queries, all-gather of LSE and reduce-scatter of outputs; or all-gather of the past."""
        if is_one(self.degree) or not is_mixer(layer):
            return work
        c, group = self.degree, self.layout.groups["dcp"]
        before: list[Work] = []
        after: list[Work] = []
        for segment in held.segments:
            if layer.gathers_past and not segment.split_kv:
                rows = segment.sequences * segment.mean_prefix * cache.row_bytes(layer.cache_row(held))
                before.append(message("gather past", "all_gather", group=group, payload_bytes=rows))
                continue
            tokens = segment.tokens * c
            queries, outputs = layer.query_elements(held) * BF16.bytes, layer.output_elements(held) * BF16.bytes
            before.append(message("gather queries", "all_gather", group=group, payload_bytes=tokens * queries))
            after.append(message("gather lse", "all_gather", group=group, payload_bytes=tokens * c * held.heads * FP32.bytes))
            weigh = elementwise("weigh outputs", rows=tokens, read=outputs / BF16.bytes, written=outputs / BF16.bytes, impl="merge")
            after.append(Repeat(where(c > 1, 1.0, 0.0), weigh))
            after.append(message("merge outputs", "reduce_scatter", group=group, payload_bytes=tokens * outputs))
        return Serial([*before, work, *after])

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """C divides t, and removes copies only: c <= t / kv_heads (t for a latent cache)."""
        c, t = int(self.degree), int(self.layout.tp)
        if c == 1:
            return
        if t % c:
            yield f"--dcp {c}: it shares the caches of a tensor group of {t}; use a divisor: {divisors(t)}"
            return
        for layer in model.layers:
            if is_mixer(layer) and not isinstance(layer, Attention) and type(layer) is not LatentAttention:
                yield f"--dcp {c}: not offered for models with {type(layer).__name__} layers; use --dcp 1"
                return
            if isinstance(layer, Attention):
                most = max(1, t // layer.num_key_value_heads)
                if c > most:
                    yield (
                        f"--dcp {c}: with --tp {t} and {layer.num_key_value_heads} key-value heads the cache is held {most}-fold, "
                        f"so at most {most} ranks can share it; use --dcp {most}"
                    )
                    return
                if layer.mask.most is not None or layer.shares_cache:
                    yield f"--dcp {c}: not offered for models with windowed or chunked layers; use --dcp 1"
                    return
