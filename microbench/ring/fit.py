"""Runs of the sharing algorithms beside what the simulator says of them; links and interference fitted to rows that may be.

- Links: for each pattern a few straight lines of seconds over wire bytes, of which a message takes the fastest, from collectives
  alone on the links.
- Interference: the share of the SMs that a message of a pattern takes.  Fitted on what single messages add to single kernels, so
  that the error of a kernel's own time does not enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from microbench.case import Case
from microbench.implementations import as_run
from microbench.ring import collectives
from microbench.ring.suite import module_of
from microbench.run import case_of, read
from simulator.calibration import Calibration, MeasuredLink
from simulator.hardware import Cluster, Gpu, cluster, gpu
from simulator.kernels.elementwise import elementwise
from simulator.timing import Clock, calibrated, seconds_no_overlap
from simulator.units import Array, Seconds
from simulator.work import Leaf, Message, Work, fold, quantity

#: Straight lines that stand for a pattern's time over its bytes: as many as its fitted rows ask for.
LINES = 4
#: Fewest rows that an interference is fitted from.
LEAST = 3


#: Exposed communication is compared where its standard error is at most this share of it.
SHARP = 0.05


@dataclass(frozen=True)
class Row:
    """A measured program: seconds of all of it and of its compute alone, what its messages cost, and the standard error of that
    (infinite where the two programs did not take turns).
    """

    case: Case
    backend: str
    seconds: float
    silent_s: float
    exposed_s: float
    exposed_se_s: float

    @staticmethod
    def of(row: Mapping[str, str]) -> Row:
        """From a line of a file."""
        seconds, silent_s = float(row["p50_s"]), float(row["silent_s"] or 0.0)
        exposed_s, error = row.get("exposed_s"), row.get("exposed_se_s")
        return Row(
            case_of(row), row["backend"], seconds, silent_s, float(exposed_s) if exposed_s else seconds - silent_s, float(error) if error else float("inf")
        )

    @property
    def where(self) -> str:
        """On how many GPUs."""
        return f"{self.case['ranks']} GPUs" if self.backend == "nccl" else self.backend

    @property
    def sharp(self) -> bool:
        """Whether what its messages cost is known well enough to be compared."""
        return self.exposed_se_s <= SHARP * self.exposed_s


class CopyClock(Clock):
    """Messages are copies inside one device's memory, as `Loopback` makes them."""

    def expected(self, op: Leaf) -> Seconds:
        """A message of w wire bytes reads and writes w."""
        if not isinstance(op, Message):
            return super().expected(op)
        elements = op.wire_bytes * 0.5
        return super().expected(elementwise(op.name, rows=1.0, read=elements, written=elements, impl="stream"))

    def demand(self, op: Leaf) -> Any:
        """It moves through the memory, not a link."""
        return {"hbm": op.wire_bytes * (2 / self.gpu.hbm_bytes_per_s)} if isinstance(op, Message) else super().demand(op)


def files_of(folder: Path) -> list[Path]:
    """The runs of a folder that say something of time, oldest first."""
    return [file for file in sorted(folder.glob("ring-*.csv")) if not file.name.startswith("ring-gloo")]


def gathered(folder: Path) -> tuple[Gpu, list[Row]]:
    """Rows of every `ring-*.csv`, of each case and backend the newest."""
    found: dict[tuple[Case, str], Row] = {}
    parts: set[str] = set()
    for file in files_of(folder):
        facts, rows = read(file)
        parts.add(facts["gpu"])
        for row in map(Row.of, rows):
            found[row.case, row.backend] = row
    if len(parts) != 1:
        message = f"{folder}: {'runs of several GPUs, ' + ', '.join(sorted(parts)) if parts else 'no runs of a GPU'}; give each its own folder"
        raise ValueError(message)
    return gpu(parts.pop()), list(found.values())


def clock(machine: Cluster, calibration: Calibration, backend: str) -> Clock:
    """The clock of rows of a backend."""
    return CopyClock(machine, calibration) if backend == "loopback" else Clock(machine, calibration)


def predicted(work: Work, on: Clock) -> float:
    """Expected seconds of a tree."""
    return float(np.sum(fold(work, calibrated(on))))


def silent(work: Work, on: Clock) -> float:
    """The same when messages take no time."""

    def seconds(op: Leaf) -> Seconds:
        return 0.0 if isinstance(op, Message) else on.expected(op)

    def demand(op: Leaf) -> Any:
        return {} if isinstance(op, Message) else on.demand(op)

    plain = replace(on.calibration, interference={})
    return float(np.sum(fold(work, calibrated(type(on)(on.cluster, plain), seconds, demand))))  # type: ignore[arg-type]


def links(rows: Sequence[Row], part: Gpu) -> list[MeasuredLink]:
    """Each pattern between each number of ranks: the best LINES straight lines of which a message takes the fastest, by its fitted
    rows on real links.  No line is slower than a tenth of the port or faster than all of it.
    """
    peak = float(cluster(part, 2).tiers[0].bytes_per_s)
    low, high = (np.log(np.repeat(ends, LINES)) for ends in ((1e-6, 0.1 * peak), (1e-3, peak)))
    plain = [row for row in rows if row.case.kernel == "collective" and row.backend == "nccl"]
    found = []
    for pattern, ranks in dict.fromkeys((row.case.impl, row.case["ranks"]) for row in plain):
        own = [row for row in plain if (row.case.impl, row.case["ranks"]) == (pattern, ranks)]
        used = [row for row in own if not row.case.held]
        if len(used) < 2 * LINES:
            continue
        wire = np.array([float(fold(module_of(row.case).work(row.case), quantity("wire_bytes"))) for row in used])
        seconds = np.array([row.seconds for row in used])

        def residuals(x: Array, wire: Array = wire, seconds: Array = seconds) -> Array:
            lines = np.exp(x[:LINES, None]) + wire / np.exp(x[LINES:, None])
            return np.asarray(np.log(lines.min(0) / seconds), dtype=float)

        starts = [
            np.log([*(seconds.min() * spread ** np.linspace(0, 1, LINES)), *((wire / seconds).max() * np.linspace(slow, 1, LINES))])
            for spread in (2, 4, 8, 16)
            for slow in (0.3, 0.5, 0.7)
        ]
        best = min(
            (least_squares(residuals, np.clip(x, low, high), bounds=(low, high), loss="soft_l1", f_scale=0.05) for x in starts),
            key=lambda one: float(one.cost),
        )
        latency, rate = np.exp(best.x[:LINES]), np.exp(best.x[LINES:])
        order = np.argsort(latency)
        found.append(MeasuredLink(
            pattern, ranks, tuple(float(f"{latency[i]:.4g}") for i in order), tuple(float(f"{rate[i]:.4g}") for i in order),
            f"{len(own)} rows measured on {ranks} x {part.title}, {len(used)} fitted",
        ))  # fmt: skip
    return found


def interference(rows: Sequence[Row], part: Gpu, calibration: Calibration) -> dict[str, float]:
    """The share of the SMs that messages take from kernels beside them, by pattern: what explains the seconds that fitted messages add
    to a longer kernel; "" for patterns that ran beside none is that of all rows.
    """
    used = [row for row in rows if row.backend == "nccl" and not row.case.held and row.case.kernel in collectives.BESIDE]
    by_pattern = {"": used} | {pattern: [row for row in used if row.case.impl == pattern] for pattern in collectives.PATTERNS}
    found = {pattern: _taken_by(some, part, calibration) for pattern, some in by_pattern.items() if len(some) >= LEAST}
    return {pattern: round(share, 3) for pattern, share in found.items()}


def _taken_by(rows: Sequence[Row], part: Gpu, calibration: Calibration) -> float:
    """Median over the rows of added seconds over the message's own, where that is the shorter of the two."""
    shares = []
    for row in rows:
        on = Clock(cluster(part, row.case["ranks"]), calibration)
        work = as_run(module_of(row.case).work(row.case))
        sent = float(seconds_no_overlap(work, on)) - silent(work, on)
        if sent < row.silent_s:
            shares.append(row.exposed_s / sent)
    return float(np.median(shares)) if shares else 0.0


@dataclass(frozen=True)
class Judged:
    """A row with its prediction: log errors of the whole and of the compute alone, and exposed seconds of both."""

    row: Row
    predicted_s: float
    predicted_silent_s: float

    @property
    def error(self) -> float:
        """log(predicted / measured)."""
        return float(np.log(self.predicted_s / self.row.seconds))

    @property
    def exposed_error(self) -> float:
        """Exposed communication predicted over measured, less one."""
        return (self.predicted_s - self.predicted_silent_s) / self.row.exposed_s - 1


def judged(rows: Sequence[Row], part: Gpu, calibration: Calibration) -> Iterator[Judged]:
    """Every row beside its prediction.  A copy inside one device runs beside kernels and takes no SMs from them."""
    for row in rows:
        machine = cluster(part, row.case["ranks"] if row.backend == "nccl" else 1)
        used = replace(calibration, interference={}) if row.backend == "loopback" else calibration
        on = clock(machine, used, row.backend)
        work = as_run(module_of(row.case).work(row.case))
        yield Judged(row, predicted(work, on), silent(work, on))


def grouped(rows: Iterable[Judged]) -> dict[tuple[tuple[str, str], str], list[Judged]]:
    """Rows by ((kernel, where), why held out)."""
    found: dict[tuple[tuple[str, str], str], list[Judged]] = {}
    for one in rows:
        held = "fitted" if not one.row.case.held and one.row.case.kernel in collectives.KERNELS else "held"
        found.setdefault(((one.row.case.kernel, one.row.where), held if one.row.backend == "nccl" else "held"), []).append(one)
    return found
