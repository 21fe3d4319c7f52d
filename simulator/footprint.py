"""Bytes resident on one GPU, by purpose."""

from __future__ import annotations

from dataclasses import dataclass, fields

from simulator.units import Bytes, maximum


@dataclass(frozen=True, slots=True, eq=False)
class Footprint:
    """Bytes one GPU holds.  `cache` is what the asked sequences need, not what an engine reserves for more."""

    weights: Bytes = 0.0
    gradients: Bytes = 0.0
    optimizer: Bytes = 0.0
    activations: Bytes = 0.0
    cache: Bytes = 0.0
    workspace: Bytes = 0.0
    engine: Bytes = 0.0

    @property
    def total(self) -> Bytes:
        """Everything."""
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.cache + self.workspace + self.engine
        )

    def __add__(self, other: Footprint) -> Footprint:
        """Part by part."""
        return Footprint(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def largest(self, other: Footprint) -> Footprint:
        """Part by part the larger: what every GPU of a uniform cluster must offer."""
        return Footprint(*(maximum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))
