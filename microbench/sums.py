"""Is a layer's time the sum of its ops?  Whole layers and models beside their own ops, both measured on one card in one run.

sum = sum over the ops that have a case of (times it runs x its measured seconds) + the expected seconds of those that have none,
whose share is told, + what going from one kernel to another takes, times their number: by itself a kernel follows its like, whose
instructions are at hand.  No constant decides the first part, so cards that differ do not blur the answer.

A board at its power limit runs a product alone more slowly than the same product in a layer, whose other kernels need less power.  An op
counts as it was measured in the layer's company where the file holds that, else as it was measured alone.
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
    """A layer's measured seconds and those of its ops: `company_s` of ops measured in its company (`accompanied` kinds of them),
    `others_s` of ops measured alone only, `expected_s` of `unmeasured` ones; `turns_s`: from kernel to kernel, all of them together.
    `apart_s` is what the accompanied ops take where each is measured alone.
    """

    which: Case
    measured_s: float
    company_s: float
    apart_s: float
    accompanied: int
    others_s: float
    expected_s: float
    unmeasured: tuple[str, ...]
    turns_s: float

    @property
    def seconds(self) -> float:
        """The sum of the ops."""
        return self.company_s + self.others_s + self.expected_s + self.turns_s

    @property
    def alone_s(self) -> float:
        """The sum of the ops, each measured alone."""
        return self.seconds - self.company_s + self.apart_s

    @property
    def error(self) -> float:
        """Sum over layer, less one."""
        return self.seconds / self.measured_s - 1

    @property
    def alone_error(self) -> float:
        """The same of the ops alone."""
        return self.alone_s / self.measured_s - 1

    @property
    def company(self) -> float:
        """The share of the sum that was measured in the layer's company."""
        return self.company_s / self.seconds

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
        parts = decoder.parts(which)
        if any(part not in seconds for _, part in parts):
            continue
        beside = {part: seconds[case] for part, case in decoder.in_company(which).items() if case in seconds}
        unmeasured = [(count, op) for count, op in decoder.leaves(which) if decoder.measurable(op) is None]
        yield Sum(
            which, seconds[which],
            company_s=sum(count * beside[part] for count, part in parts if part in beside),
            apart_s=sum(count * seconds[part] for count, part in parts if part in beside), accompanied=len(beside),
            others_s=sum(count * seconds[part] for count, part in parts if part not in beside),
            expected_s=sum(count * float(clock.expected(op)) for count, op in unmeasured), unmeasured=tuple(op.name for _, op in unmeasured),
            turns_s=TURN_S * sum(count * float(op.launches) for count, op in decoder.leaves(which)),
        )  # fmt: skip


def lines(found: list[Sum]) -> list[str]:
    """One line a layer: what it took, the sum of its ops and how far that is off, the same of the ops alone, and what was not measured."""
    told = []
    for one in found:
        mark = " " if abs(one.error) <= ALLOWED else "!"
        beside = f", {one.company:.0%} in its company ({one.accompanied} ops); alone {one.alone_s * 1e6:,.1f} us {one.alone_error:+.1%}"
        rest = f"{one.share:.1%} of it expected, not measured: {', '.join(one.unmeasured)}" if one.unmeasured else "all of it measured"
        told.append(
            f"{mark} {one.which.impl:16}{one.which.extents:44}{one.measured_s * 1e6:12,.1f} us  ops {one.seconds * 1e6:12,.1f} us"
            f" {one.error:+7.1%}  {rest}{beside if one.accompanied else ''}"
        )
    return told
