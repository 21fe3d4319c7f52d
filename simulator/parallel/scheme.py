"""What every scheme answers: four hooks, each of which may be the identity, and what it forbids.

Shard first, then count: layers never see a degree, only their slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from simulator.layers.layer import Direction, Mixing, Slice
from simulator.units import Num
from simulator.work import Serial, Work

if TYPE_CHECKING:
    from simulator.dtypes import CacheFormat
    from simulator.layers.layer import Layer
    from simulator.model import ModelSpec
    from simulator.parallel.layout import Layout


class Scheme:
    """One parallelism; the base is the identity."""

    #: The flag and the field of `Layout` that hold its degree.
    field = ""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @property
    def degree(self) -> Num:
        """Ranks of one group."""
        value: Num = getattr(self.layout, self.field)
        return value

    def shard(self, held: Slice, layer: Layer) -> Slice:  # noqa: ARG002 (identity)
        """What is left of a slice on one rank."""
        return held

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction) -> Work:  # noqa: ARG002 (identity)
        """The messages and overlaps this scheme puts around a layer's work."""
        return work

    def refusals(self, model: ModelSpec) -> Iterator[str]:  # noqa: ARG002 (identity)
        """The rules this model breaks, one line each: value, rule, remedy."""
        yield from ()


def mixing_of(work: Work) -> Mixing:
    """The part of a mixer's work that reads other tokens."""
    if isinstance(work, Mixing):
        return work
    assert isinstance(work, Serial)
    return next(mixing_of(part) for part in work.parts if has_mixing(part))


def with_mixing(work: Work, mixing: Work) -> Work:
    """The same work with another such part: messages and overlaps around it."""
    if isinstance(work, Mixing):
        return Mixing([mixing])
    assert isinstance(work, Serial)
    return Serial([with_mixing(part, mixing) if has_mixing(part) else part for part in work.parts])


def has_mixing(work: Work) -> bool:
    """Whether a layer marks the part of its work that reads other tokens."""
    return isinstance(work, Mixing) or (isinstance(work, Serial) and any(has_mixing(part) for part in work.parts))


def divisors(n: int, most: int = 1024) -> str:
    """The divisors of `n` for an error line."""
    return ", ".join(str(d) for d in range(1, min(n, most) + 1) if n % d == 0)


def is_one(value: Num) -> bool:
    """Whether a degree is the plain number one, so that its scheme can be left out of the tree."""
    return isinstance(value, (int, float)) and value == 1
