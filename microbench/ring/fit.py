"""Runs of the sharing algorithms beside what the simulator says of them; links and interference fitted to rows that may be.

- Links: for each pattern a few straight lines of seconds over wire bytes, of which a message takes the fastest, from collectives
  alone on the links.
- Interference: kernels beside a message run 1 + i as long.  Fitted on programs that overlap, relative to the same program's
  own compute (`silent_s`), so that the error of a kernel's time does not enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

from microbench.case import Case
from microbench.ring.suite import module_of
from microbench.run import case_of, read
from simulator.calibration import Calibration, MeasuredLink
from simulator.hardware import Cluster, Gpu, cluster, gpu
from simulator.kernels.elementwise import elementwise
from simulator.timing import Clock, calibrated
from simulator.units import Array, Seconds
from simulator.work import Leaf, Message, Overlap, Repeat, Select, Serial, Work, fold, quantity

#: Straight lines that stand for a pattern's time over its bytes: as many as its fitted rows ask for.
LINES = 4
#: Fewest rows that an interference is fitted from.
LEAST = 3


@dataclass(frozen=True)
class Row:
    """A measured program: seconds of all of it and of its compute alone."""

    case: Case
    backend: str
    seconds: float
    silent_s: float

    @property
    def where(self) -> str:
        """On how many GPUs."""
        return f"{self.case['ranks']} GPUs" if self.backend == "nccl" else self.backend

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
        for row in rows:
            which = case_of(row)
            found[which, row["backend"]] = Row(which, row["backend"], float(row["p50_s"]), float(row["silent_s"] or 0.0))
    if len(parts) != 1:
        message = f"{folder}: {'runs of several GPUs, ' + ', '.join(sorted(parts)) if parts else 'no runs of a GPU'}; give each its own folder"
        raise ValueError(message)
    return gpu(parts.pop()), [_with_products(row, found) for row in found.values()]


def _with_products(row: Row, known: Mapping[tuple[Case, str], Row]) -> Row:
    """Products beside messages take by themselves what they took where no message was."""
    if row.case.kernel != "gemm_beside":
        return row
    alone = next(
        (r for r in known.values() if r.case.kernel == row.case.kernel and r.case.impl == "none" and r.case["ranks"] == row.case["ranks"]), None
    )
    return row if alone is None else replace(row, silent_s=alone.seconds * row.case["gemms"] / alone.case["gemms"])


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


def overlaps(work: Work) -> bool:
    """Whether interference changes its time."""
    return bool(np.any(_slowed(work)))


def _slowed(work: Work) -> list[bool]:
    if isinstance(work, Overlap):
        return [True]
    if isinstance(work, Serial):
        return [any(any(_slowed(part)) for part in work.parts)]
    if isinstance(work, Repeat):
        return _slowed(work.work)
    if isinstance(work, Select):
        return _slowed(work.a)
    return [False]


#: What runs beside the messages of each kernel of the suite.
BESIDE = {"context_attention": "attention", "context_attention_backward": "attention_backward", "gemm_beside": "gemm", "pipeline_handover": "gemm"}


def interference(rows: Sequence[Row], part: Gpu, calibration: Calibration) -> dict[str, float]:
    """How much longer kernels run beside messages on a link, by kernel: the i that explains p50 / silent of the fitted rows that
    overlap with it; "" for kernels that none ran beside is that of all rows.
    """
    used = [row for row in rows if row.backend == "nccl" and not row.case.held and row.case.kernel in BESIDE and row.silent_s > 0.1 * row.seconds]
    by_kernel = {"": used} | {kernel: [row for row in used if BESIDE[row.case.kernel] == kernel] for kernel in dict.fromkeys(BESIDE.values())}
    return {kernel: _slowed_by(some, part, calibration) for kernel, some in by_kernel.items() if len(some) >= LEAST}


def _slowed_by(rows: Sequence[Row], part: Gpu, calibration: Calibration) -> float:
    works = [(module_of(row.case).work(row.case), cluster(part, row.case["ranks"]), row) for row in rows]
    works = [one for one in works if overlaps(one[0])]
    alone = [silent(work, Clock(machine, calibration)) for work, machine, _ in works]

    def loss(i: float) -> float:
        told = replace(calibration, interference={"": i})
        error = [
            np.log(predicted(work, Clock(machine, told)) / own * row.silent_s / row.seconds)
            for (work, machine, row), own in zip(works, alone, strict=True)
        ]
        return float(np.sum(np.abs(error)))

    return round(float(minimize_scalar(loss, bounds=(1e-4, 8.0), method="bounded", options={"xatol": 1e-4}).x), 3) if works else 0.0


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
        """Exposed communication predicted less measured, as a share of the row's time: small differences of long runs say no more."""
        return (self.predicted_s - self.predicted_silent_s - self.row.exposed_s) / self.row.seconds


def judged(rows: Sequence[Row], part: Gpu, calibration: Calibration) -> Iterator[Judged]:
    """Every row beside its prediction.  A copy inside one device runs beside kernels and takes no SMs from them."""
    for row in rows:
        machine = cluster(part, row.case["ranks"] if row.backend == "nccl" else 1)
        used = replace(calibration, interference={}) if row.backend == "loopback" else calibration
        on = clock(machine, used, row.backend)
        work = module_of(row.case).work(row.case)
        yield Judged(row, predicted(work, on), silent(work, on))


def grouped(rows: Iterable[Judged]) -> dict[tuple[tuple[str, str], str], list[Judged]]:
    """Rows by ((kernel, where), why held out)."""
    found: dict[tuple[tuple[str, str], str], list[Judged]] = {}
    for one in rows:
        held = "fitted" if not one.row.case.held and (one.row.case.kernel == "collective" or one.row.case.kernel in BESIDE) else "held"
        found.setdefault(((one.row.case.kernel, one.row.where), held if one.row.backend == "nccl" else "held"), []).append(one)
    return found
