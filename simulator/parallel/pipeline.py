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
    """One stage: how many blocks of each kind, and whether it is the first, the last, or there at all (0 or 1)."""

    index: int
    counts: tuple[Num, ...]
    first: Num
    last: Num
    present: Num


class Pipeline(Scheme):
    """`pp` stages of layers."""

    field = "pp"

    def stages(self, model: ModelSpec) -> list[Stage]:
        """Every stage with its blocks by kind; degrees may be arrays, then stages beyond a row's degree are empty."""
        p = self.degree
        kinds, cumulative = range(len(model.kinds)), model.cumulative
        total = len(model.order)
        if isinstance(p, (int, float)):
            found = []
            for s in range(int(p)):
                start, end = (int(x) for x in _bounds(total, int(p), s))
                counts = tuple(float(cumulative[k][end] - cumulative[k][start]) for k in kinds)
                found.append(Stage(s, counts, float(s == 0), float(s == int(p) - 1), 1.0))
            return found
        degrees = np.asarray(p).astype(int)
        found = []
        for s in range(int(degrees.max())):
            here = s < degrees
            start, end = _bounds(total, degrees, s)
            start, end = np.where(here, start, 0), np.where(here, end, 0)
            counts = tuple((cumulative[k][end] - cumulative[k][start]).astype(float) for k in kinds)
            found.append(Stage(s, counts, here * float(s == 0), (s == degrees - 1).astype(float), here.astype(float)))
        return found

    def hand_over(self, tokens: Tokens, stage: Stage) -> Work | None:
        """The send to the next stage, nothing from the last."""
        if is_one(self.degree):
            return None
        sends = (1 - stage.last) * stage.present
        payload = tokens * (2 * self.layout.hidden_size * BF16.bytes) / self.layout.tp * sends
        return message("stage send", "send", group=self.layout.groups["pp"], payload_bytes=payload)

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """At least one layer per stage."""
        total = len(model.order)
        if self.degree > total:
            yield f"--pp {int(self.degree)}: {model.name} has {total} layers; use at most {total} stages"


def _bounds(total: int, p: int | np.ndarray, s: int) -> tuple[np.ndarray, np.ndarray]:
    """First layer of stage `s` and of the next."""
    base, extra = total // p, total % p

    def start(stage: int) -> np.ndarray:
        return stage * base + np.clip(stage - (p - 1 - extra), 0, extra)

    end = np.where(np.equal(s + 1, p), total, start(s + 1))
    return np.asarray(start(s)), end
