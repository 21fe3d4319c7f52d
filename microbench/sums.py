"""Is a layer's time the sum of its ops?  Whole layers and models beside their own ops, both measured on one card in one run.

sum = sum over the ops that have a case of (times it runs x its measured seconds) + the expected seconds of those that have none,
whose share is told, + what going from one kernel to another takes, times their number: by itself a kernel follows its like, whose
instructions are at hand.  No constant decides the first part, so cards that differ do not blur the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from microbench import decoder
from microbench.case import Case
from microbench.run import case_of, read, runs_of
from simulator.calibration import Calibration
from simulator.data import observed
from simulator.hardware import cluster, gpu
from simulator.timing import Clock

TURN_S = observed("turn_s")
#: How far the sum may be from the measured layer.
ALLOWED = 0.05


@dataclass(frozen=True)
class Sum:
    """A layer's measured seconds, those of its measured ops, the expected seconds of the others, and which these are; `turns_s`: from
    kernel to kernel, all of them together.
    """

    which: Case
    measured_s: float
    parts_s: float
    expected_s: float
    unmeasured: tuple[str, ...]
    turns_s: float

    @property
    def seconds(self) -> float:
        """The sum of the ops."""
        return self.parts_s + self.expected_s + self.turns_s

    @property
    def error(self) -> float:
        """Sum over layer, less one."""
        return self.seconds / self.measured_s - 1

    @property
    def share(self) -> float:
        """The share of the sum that no measurement backs."""
        return self.expected_s / self.seconds


def sums(folder: Path) -> list[Sum]:
    """Every layer that a file of the folder holds together with all its parts; of several files the newest counts."""
    found: dict[Case, Sum] = {}
    for file in runs_of(folder):
        facts, rows = read(file)
        if facts["gpu"] != "cpu":
            seconds = {case_of(row): float(row["p50_s"]) for row in rows}
            part = gpu(facts["gpu"])
            clock = Clock(cluster(part, 1), Calibration.load(part))
            found |= {one.which: one for one in _of(seconds, clock)}
    return list(found.values())


def _of(seconds: dict[Case, float], clock: Clock) -> Iterator[Sum]:
    for which in (case for case in seconds if case.kernel in decoder.KERNELS):
        measured, expected, launches, unmeasured = 0.0, 0.0, 0.0, []
        for count, op in decoder.leaves(which):
            part = decoder.measurable(op)
            launches += count * float(op.launches)
            if part is None:
                expected += count * float(clock.expected(op))
                unmeasured.append(op.name)
            elif part in seconds:
                measured += count * seconds[part]
            else:
                break
        else:
            yield Sum(which, seconds[which], measured, expected, tuple(unmeasured), launches * TURN_S)



def lines(found: list[Sum]) -> list[str]:
    """One line a layer: what it took, the sum of its ops, how far that is off, and what was not measured."""
    told = []
    for one in found:
        rest = f"{one.share:.1%} of it expected, not measured: {', '.join(one.unmeasured)}" if one.unmeasured else "all of it measured"
        mark = " " if abs(one.error) <= ALLOWED else "!"
        told.append(
            f"{mark} {one.which.impl:16}{one.which.extents:44}{one.measured_s * 1e6:12,.1f} us  ops {one.seconds * 1e6:12,.1f} us"
            f" {one.error:+7.1%}  {rest}"
        )
    return told
