"""Helix: attention splits the cache over h of t ranks and heads over the other t / h; the rest of the layer uses all t.

Each rank makes the queries of its t / h share whole (h ranks make the same), attends to 1 / h of the tokens, and one
all-to-all hands every rank the partial outputs of its own heads with their log-sum-exp:
(h - 1) / h B (n_q h / t)(d_v e + 2 x 4) bytes a layer, whatever the context (a maximum and a sum in fp32 with each output).
One kernel merges the h partial outputs of a head.  A rank of t / h <= n_kv holds no copy of a key-value head.  Prefill gathers
the past, as ranks that share a cache do.
Source: Helix Parallelism (2507.07120); NVIDIA/TensorRT-LLM, alltoall_helix; FORMULAS 5.8.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.dtypes import BF16, FP32, CacheFormat
from simulator.kernels.elementwise import elementwise
from simulator.kernels.messages import message
from simulator.layers import Attention
from simulator.layers.layer import Direction, Layer, Slice, is_mixer
from simulator.model import ModelSpec
from simulator.parallel.scheme import Scheme, divisors, is_one
from simulator.units import maximum, where
from simulator.work import Repeat, Serial, Work


class Helix(Scheme):
    """`helix` ranks of each tensor group hold different tokens of the same heads."""

    field = "helix"

    def shard(self, held: Slice, layer: Layer) -> Slice:
        """Key-value heads h / t, tokens / h, queries made h-fold."""
        h = self.degree
        if is_one(h) or not is_mixer(layer):
            return held
        shared = layer.num_key_value_heads * h / self.layout.tp if isinstance(layer, Attention) else held.kv_heads
        return held._replace(cache_ranks=held.cache_ranks * h, query_ranks=h * 1.0, kv_heads=maximum(shared, 1.0))

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction) -> Work:  # noqa: ARG002 (serving only)
        """One all-to-all of partial outputs after the core; a prefill gathers the past before it."""
        h = self.degree
        if is_one(h) or not is_mixer(layer):
            return work
        group = self.layout.groups["helix"]
        before: list[Work] = []
        after: list[Work] = []
        for segment in held.segments:
            if not segment.split_kv:
                rows = segment.sequences * segment.mean_prefix * cache.row_bytes(layer.cache_row(held))
                before.append(message("gather past", "all_gather", group=group, payload_bytes=rows))
                continue
            outputs = layer.output_elements(held)
            partial = (outputs * BF16.bytes + held.heads * (2 * FP32.bytes)) * h
            after.append(message("hand over outputs", "all_to_all", group=group, payload_bytes=segment.tokens * partial))
            join = elementwise("merge outputs", rows=segment.tokens, read=outputs * h, written=outputs, impl="merge")
            after.append(Repeat(where(h > 1, 1.0, 0.0), join))
        return Serial([*before, work, *after])

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """H divides t; what is left of t splits key-value heads without copies."""
        h, t = int(self.degree), int(self.layout.tp)
        if h == 1:
            return
        if t % h:
            yield f"--helix {h}: it splits the caches of a tensor group of {t}; use a divisor: {divisors(t)}"
            return
        if self.layout.dcp > 1:
            yield f"--helix {h}: the cache is split over its ranks already; leave --dcp out"
        for layer in model.layers:
            if isinstance(layer, Attention):
                shared = layer.num_key_value_heads
                if shared % (t // h):
                    least = next(d for d in range(1, t + 1) if t % d == 0 and shared % (t // d) == 0)
                    yield (
                        f"--helix {h}: {t // h} ranks would copy the {shared} key-value heads of {model.name}; "
                        f"use at least --helix {least}"
                    )
                    return
                if layer.stored_tokens(2.0**40) < 2.0**40:
                    yield f"--helix {h}: not offered for models with windowed or chunked layers; use --helix 1"
                    return
