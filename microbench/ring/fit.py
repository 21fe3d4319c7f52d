"""Runs of the sharing algorithms beside what the simulator says of them; links and interference fitted to rows that may be.

- Links: each pattern's share of the link's attainable rate (`memory`) and what a call takes beyond NCCL's own latency
  (`launch_s`), from collectives alone on the links.
- Interference: kernels beside a message run 1 + i as long.  Fitted on programs that overlap, relative to the same program's
  own compute (`silent_s`), so that the error of a kernel's time does not enter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

from microbench.case import Case
from microbench.ring.suite import module_of
from microbench.run import case_of, read
from simulator.calibration import Calibration, Constants, Family
from simulator.hardware import Cluster, Gpu, cluster, gpu
from simulator.kernels.elementwise import elementwise
from simulator.timing import Clock, calibrated
from simulator.units import Array, Seconds
from simulator.work import Leaf, Message, Repeat, Work, fold

#: Bytes from which a collective counts as large.
LARGE = 1e6
#: Exposed communication is judged where it is at least this share of the time.
SHOWN = 0.02


@dataclass(frozen=True)
class Row:
    """A measured program: seconds of all of it and of its compute alone."""

    case: Case
    backend: str
    seconds: float
    silent_s: float

    @property
    def exposed_s(self) -> float:
        """What its messages cost."""
        return self.seconds - self.silent_s


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


def gathered(folder: Path) -> tuple[Gpu, list[Row]]:
    """Rows of every `ring-*.csv`, of each case and backend the newest; gloo's say nothing of time and are left out."""
    found: dict[tuple[Case, str], Row] = {}
    parts: set[str] = set()
    for file in sorted(folder.glob("ring-*.csv")):
        facts, rows = read(file)
        if facts["backend"] == "gloo":
            continue
        parts.add(facts["gpu"])
        for row in rows:
            which = case_of(row)
            found[which, row["backend"]] = Row(which, row["backend"], float(row["p50_s"]), float(row["silent_s"] or 0.0))
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

    plain = replace(on.calibration, interference=0.0)
    return float(np.sum(fold(work, calibrated(type(on)(on.cluster, plain), seconds, demand))))  # type: ignore[arg-type]


def is_plain(row: Row) -> bool:
    """A collective with nothing beside it."""
    return row.case.kernel == "collective" and not row.case.get("beside")


def links(rows: Sequence[Row], machine: Cluster) -> dict[Family, Constants]:
    """Each pattern's constants from its fitted rows on real links."""
    found: dict[Family, Constants] = {}
    plain = [row for row in rows if is_plain(row) and row.backend == "nccl"]
    for pattern in dict.fromkeys(row.case.impl for row in plain):
        own = [row for row in plain if row.case.impl == pattern]
        used = [row for row in own if not row.case.held]
        if len(used) < 5:  # noqa: PLR2004 (two constants need a few rows)
            continue
        family = ("message", pattern, "")
        seconds = np.log([row.seconds for row in used])
        works = [module_of(row.case).work(row.case) for row in used]

        def constants(x: Array) -> Constants:
            return Constants(memory=float(np.exp(x[0])), launch_s=float(np.exp(x[1])))

        def residuals(x: Array, family: Family = family, works: list[Work] = works, seconds: Array = seconds) -> Array:
            on = Clock(machine, Calibration(machine.gpu.name, {family: constants(x)}))
            return np.array([np.log(predicted(work, on)) for work in works]) - seconds

        best = least_squares(residuals, np.log([0.95, 2e-6]), bounds=(np.log([0.3, 1e-9]), np.log([1.6, 1e-4])), loss="soft_l1", f_scale=0.05)
        fitted = Constants(memory=float(f"{np.exp(best.x[0]):.4g}"), launch_s=float(f"{np.exp(best.x[1]):.4g}"))
        on = Clock(machine, Calibration(machine.gpu.name, {family: fitted}))
        held = [row for row in own if row.case.held] or own
        error = [abs(np.log(predicted(module_of(r.case).work(r.case), on) / r.seconds)) for r in held]
        found[family] = replace(
            fitted, sigma=round(float(max(np.quantile(error, 0.8) / 1.2816, 0.01)), 4), basis="calibrated", rows=len(used),
            source=f"{len(own)} rows measured on {machine.gpus} x {machine.gpu.title}, {len(used)} fitted",
        )  # fmt: skip
    return found


def overlaps(work: Work) -> bool:
    """Whether interference changes its time."""
    return bool(np.any(_slowed(work)))


def _slowed(work: Work) -> list[bool]:
    from simulator.work import Overlap, Select, Serial  # noqa: PLC0415

    if isinstance(work, Overlap):
        return [True]
    if isinstance(work, Serial):
        return [any(any(_slowed(part)) for part in work.parts)]
    if isinstance(work, Repeat):
        return _slowed(work.work)
    if isinstance(work, Select):
        return _slowed(work.a)
    return [False]


def interference(rows: Sequence[Row], machine: Cluster, calibration: Calibration, backend: str) -> float:
    """How much longer kernels run beside messages: the i that explains p50 / silent of the fitted rows that overlap."""
    used = [
        (module_of(row.case).work(row.case), row)
        for row in rows
        if row.backend == backend and not row.case.held and row.case.kernel not in ("collective", "gemm_beside")
    ]
    used = [(work, row) for work, row in used if row.silent_s > 0.1 * row.seconds and overlaps(work)]
    if not used:
        return 0.0
    quiet = clock(machine, replace(calibration, interference=0.0), backend)
    alone = [silent(work, quiet) for work, _ in used]

    def loss(i: float) -> float:
        on = clock(machine, replace(calibration, interference=i), backend)
        error = [np.log(predicted(w, on) / a * row.silent_s / row.seconds) for (w, row), a in zip(used, alone, strict=True)]
        return float(np.sum(np.abs(error)))

    return round(float(minimize_scalar(loss, bounds=(1e-4, 1.0), method="bounded", options={"xatol": 1e-4}).x), 4)


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
    def exposed_error(self) -> float | None:
        """Exposed communication predicted over measured, less one; None where it is too small a share to be judged."""
        if self.row.exposed_s < SHOWN * self.row.seconds:
            return None
        return (self.predicted_s - self.predicted_silent_s) / self.row.exposed_s - 1


def judged(rows: Sequence[Row], part: Gpu, calibration: Calibration, *, loopback: float) -> Iterator[Judged]:
    """Every row beside its prediction."""
    for row in rows:
        machine = cluster(part, row.case["ranks"] if row.backend == "nccl" else 1)
        used = replace(calibration, interference=loopback) if row.backend == "loopback" else calibration
        on = clock(machine, used, row.backend)
        work = module_of(row.case).work(row.case)
        yield Judged(row, predicted(work, on), silent(work, on))
