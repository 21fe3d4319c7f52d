"""Pipeline parallelism: layers split over p stages, unevenly where they do not divide.

The split is vLLM's (get_pp_indices): floor(L / p) each, the L mod p extra layers on the stages before the last.
Sends the residual stream and the block output (2 T D e, split over the tensor group) to the next stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from simulator.dtypes import BF16
from simulator.kernels.messages import message
from simulator.model import ModelSpec
from simulator.parallel.scheme import Scheme, is_one
from simulator.units import Num, Tokens
from simulator.work import Work


class Stage(NamedTuple):
    """One stage: how many blocks of each kind, whether it is the first, the last, or there at all (0 or 1), and how many
    equal neighbours it stands for.
    """

    number: int
    counts: tuple[Num, ...]
    first: Num
    last: Num
    present: Num
    times: float = 1.0


class Pipeline(Scheme):
    """`pp` stages of layers."""

    field = "pp"

    def stages(self, model: ModelSpec) -> list[Stage]:
        """Every stage with its blocks by kind; degrees may be arrays, then stages beyond a row's degree are empty."""
        p = self.degree
        if isinstance(p, (int, float)):
            return _split(model, int(p), int(p))
        degrees, row = np.unique(p, return_inverse=True)
        most = int(degrees.max())
        tables = [_split(model, int(p), most) for p in degrees]

        def column(values: list[Num]) -> Num:
            plain = [float(value) for value in values]
            return plain[0] if len(set(plain)) == 1 else np.array(plain)[row]

        found = []
        for s in range(len(tables[0])):
            same = [table[s] for table in tables]
            counts = tuple(column([stage.counts[k] for stage in same]) for k in range(len(model.kinds)))
            first, last, present = (column([getattr(stage, name) for stage in same]) for name in ("first", "last", "present"))
            found.append(Stage(s, counts, first, last, present))
        return found

    def distinct(self, model: ModelSpec) -> list[Stage]:
        """The stages with equal neighbours as one that stands for them; of an array of degrees all of them."""
        stages = self.stages(model)
        if isinstance(self.degree, np.ndarray):
            return stages
        found = stages[:1]
        for stage in stages[1:]:
            if stage[1:-1] == found[-1][1:-1]:
                found[-1] = found[-1]._replace(times=found[-1].times + 1)
            else:
                found.append(stage)
        return found

    def hand_over(self, tokens: Tokens) -> Work | None:
        """The send from a stage to the next: residual stream and block output, each rank of the tensor group its part."""
        if is_one(self.degree):
            return None
        payload = tokens * (2 * self.layout.hidden_size * BF16.bytes) / self.layout.tp
        return message("stage send", "send", group=self.layout.groups["pp"], payload_bytes=payload)

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """At least one layer per stage."""
        total = len(model.order)
        if self.degree > total:
            yield f"--pp {int(self.degree)}: {model.name} has {total} layers; use at most {total} stages"


def _split(model: ModelSpec, p: int, most: int) -> list[Stage]:
    """The stages of `p`, filled up with empty ones to `most`."""
    total, cumulative = len(model.order), model.cumulative
    base, extra = divmod(total, p)
    found, start = [], 0
    for s in range(most):
        end = start if s >= p else start + base + (1 if p - 1 - extra <= s < p - 1 else 0)
        counts = tuple(float(c[end] - c[start]) for c in cumulative)
        found.append(Stage(s, counts, float(s == 0), float(s == p - 1), float(s < p)))
        start = end
    return found
