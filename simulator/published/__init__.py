"""What others measured, turned into questions the simulator answers.

Conventions differ per source; each is converted in one function, named in `SOURCES`.  A row its function
refuses is not comparable and says why: nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simulator.published import collectives, kernels, rings, serving, training
from simulator.published.table import (
    MICROBENCHMARKS,
    Asked,
    Measurement,
    NotComparableError,
    addresses,
    fitted_sources,
    measurements,
    refuse,
    role,
)

#: Source -> the function that knows its conventions.
SOURCES: Mapping[str, Callable[[Measurement], Asked]] = {**kernels.SOURCES, **collectives.SOURCES, **rings.SOURCES, **serving.SOURCES, **training.SOURCES}


def question(row: Measurement) -> Asked:
    """The question a row asks; NotComparableError with the reason where it asks none."""
    if not addresses()[row.reference]:
        refuse("its address was not recorded: nobody can check it")
    return SOURCES[row.source](row)


__all__ = [
    "MICROBENCHMARKS", "SOURCES", "Asked", "Measurement", "NotComparableError", "addresses", "fitted_sources", "measurements", "question",
    "role",
]  # fmt: skip
