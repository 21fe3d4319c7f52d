"""Data parallelism: whole replicas, each with its own requests.  Nothing is sent in serving."""

from __future__ import annotations

from simulator.layers.layer import Layer, Slice
from simulator.parallel.scheme import Scheme, is_one
from simulator.units import Num, ceil


def share_sequences(held: Slice, ranks: Num) -> Slice:
    """The busiest of `ranks` replicas: ceil(B / ranks) of each segment's sequences."""
    return held._replace(segments=tuple(s._replace(sequences=ceil(s.sequences / ranks)) for s in held.segments))


class Data(Scheme):
    """`dp` independent replicas."""

    field = "dp"

    def shard(self, held: Slice, layer: Layer) -> Slice:  # noqa: ARG002 (every layer alike)
        """Requests are dealt out evenly; the busiest replica is counted."""
        return held if is_one(self.degree) else share_sequences(held, self.degree)
