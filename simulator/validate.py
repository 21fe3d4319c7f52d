"""Predicted beside measured: what others published, and what was measured here, compared by source and kind.

A suite yields comparisons and refusals; `SUITES` names them.  Errors are predicted / measured - 1: of times, so that
+100 % is twice too slow; of bytes or tokens where a row states those.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator import __version__
from simulator.calibration import Calibration
from simulator.data import data_path
from simulator.published import MICROBENCHMARKS, Measurement, NotComparableError, fitted_sources, measurements, question, role
from simulator.published.caches import TOLERANCE
from simulator.report import SCHEMA_VERSION
from simulator.units import BYTES, SECONDS, significant

if TYPE_CHECKING:
    from rich.console import Console

#: What a row may be used for: its error informed a prior; its source's other series did; nothing of its source did.
USES = ("fit", "held out", "score")


#: Kinds that time one kernel on one GPU.
KERNELS = ("kernel_tflops", "kernel_time")


@dataclass(frozen=True, slots=True)
class Compared:
    """One measured value with ours and our 80 % interval, in base units."""

    source: str
    kind: str
    id: str
    gpu: str
    use: str
    unit: str
    predicted: float
    measured: float
    low: float
    high: float
    basis: str
    shape: str
    explanation: str = ""

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted / self.measured - 1

    @property
    def covered(self) -> bool:
        """Whether the interval holds the measured value."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True)
class Refused:
    """A measured value that is not compared, and why."""

    source: str
    kind: str
    id: str
    gpu: str
    reason: str


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The errors of a group of comparisons."""

    source: str
    kind: str
    use: str
    n: int
    median: float
    p90: float
    signed: float
    coverage: float
    worst: Compared


def published() -> Iterator[Compared | Refused]:
    """Every row of `data/published/measurements.csv`."""
    for row in measurements():
        yield _answered(row)


def _answered(row: Measurement) -> Compared | Refused:
    try:
        asked = question(row)
        calibration = Calibration.load(asked.cluster.gpu) if asked.cluster is not None else Calibration.none()
        ours = asked.answer(calibration)
    except NotComparableError as refusal:
        return Refused(row.source, row.kind, row.id, row.hardware, str(refusal))
    gpu = asked.cluster.gpu.name if asked.cluster is not None else ""
    use = role(row)
    if use == "score" and row.kind in MICROBENCHMARKS and row.source in fitted_sources():
        use = "held out"
    return Compared(
        row.source, row.kind, row.id, gpu, use, asked.unit, ours.value, asked.measured, ours.low, ours.high, ours.basis, row.shape,
        asked.explanation,
    )  # fmt: skip


#: Where comparisons come from.
SUITES: Mapping[str, Callable[[], Iterable[Compared | Refused]]] = {"published": published}


def measured() -> Iterator[Compared]:
    """Rows measured by installed packages (entry points `longctx.suites`); none where what they need is missing (PyTorch)."""
    for point in entry_points(group="longctx.suites"):
        try:
            suite = point.load()
        except ImportError:
            continue
        yield from suite()


def compare(
    *, kinds: Sequence[str] = (), sources: Sequence[str] = (), gpus: Sequence[str] = (), with_measured: bool = False
) -> tuple[list[Compared], list[Refused]]:
    """All published rows (and those measured here), or the kinds, sources and GPUs asked for (a GPU by our name, or by a part of
    what a refused row calls it).

    Errors: ValueError for a kind, source or GPU that no row has.
    """
    found: list[Compared | Refused] = [one for suite in SUITES.values() for one in suite()]
    if with_measured:
        found += measured()
    for option, asked, known in (
        ("--kind", kinds, {one.kind for one in found}), ("--source", sources, {one.source for one in found}),
        ("--gpu", gpus, {one.gpu for one in found if isinstance(one, Compared) and one.gpu}),
    ):  # fmt: skip
        for name in asked:
            if name not in known:
                message = f"{option} {name}: nothing measured has it; use one of {', '.join(sorted(known))}"
                raise ValueError(message)

    def wanted(one: Compared | Refused) -> bool:
        return (not kinds or one.kind in kinds) and (not sources or one.source in sources) and (not gpus or one.gpu in gpus)

    kept = [one for one in found if wanted(one)]
    return [one for one in kept if isinstance(one, Compared)], [one for one in kept if isinstance(one, Refused)]


def accuracy(rows: Sequence[Compared], *, source: str, kind: str, use: str) -> Accuracy:
    """Median and 90th percentile of the absolute error, median of the signed one, share inside the interval, worst row."""
    errors = np.array([row.error for row in rows])
    size = np.abs(errors)
    return Accuracy(
        source, kind, use, len(rows), float(np.median(size)), float(np.quantile(size, 0.9)), float(np.median(errors)),
        float(np.mean([row.covered for row in rows])), rows[int(np.argmax(size))],
    )  # fmt: skip


def by_source(compared: Sequence[Compared]) -> list[Accuracy]:
    """Accuracy per (source, kind, use)."""
    groups: dict[tuple[str, str, str], list[Compared]] = {}
    for row in compared:
        groups.setdefault((row.kind, row.source, row.use), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], item[0][1], USES.index(item[0][2])))
    return [accuracy(rows, source=source, kind=kind, use=use) for (kind, source, use), rows in ordered]


def by_kind(compared: Sequence[Compared]) -> list[Accuracy]:
    """Accuracy per (kind, use), of all scored rows of a kind, and of the two kinds of kernel rows together."""
    groups: dict[tuple[str, str], list[Compared]] = {}
    for row in compared:
        groups.setdefault((row.kind, row.use), []).append(row)
        if row.use != "fit":
            groups.setdefault((row.kind, "all scored"), []).append(row)
        if row.kind in KERNELS:
            groups.setdefault(("kernel rows", "fit" if row.use == "fit" else "all scored"), []).append(row)
    order = (*USES, "all scored")
    kept = {key: rows for key, rows in groups.items() if key[1] != "all scored" or (key[0], "held out") in groups or key[0] == "kernel rows"}
    return [
        accuracy(rows, source="all", kind=kind, use=use)
        for (kind, use), rows in sorted(kept.items(), key=lambda item: (item[0][0], order.index(item[0][1])))
    ]


def reasons(refused: Sequence[Refused]) -> list[tuple[str, str, str, int]]:
    """(kind, source, reason, rows) of what is not compared."""
    counted = Counter((one.kind, one.source, one.reason) for one in refused)
    return [(*key, count) for key, count in sorted(counted.items())]


# ---- the recorded accuracy

RECORD = ("source", "kind", "use", "n", "median", "p90")


def recorded() -> dict[tuple[str, str, str], dict[str, float]]:
    """`data/published/accuracy.csv`: figures by (source, kind, use)."""
    with data_path("published", "accuracy.csv").open(encoding="utf-8", newline="") as file:
        return {
            (row["source"], row["kind"], row["use"]): {"n": float(row["n"]), "median": float(row["median"]), "p90": float(row["p90"])}
            for row in csv.DictReader(file)
        }


def record(found: Sequence[Accuracy]) -> str:
    """Write the figures to `data/published/accuracy.csv`; its path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RECORD)
    writer.writerows([one.source, one.kind, one.use, one.n, f"{one.median:.4f}", f"{one.p90:.4f}"] for one in found)
    path = data_path("published") / "accuracy.csv"
    path.write_text(text.getvalue(), encoding="utf-8")
    return str(path)


# ---- for people and programs


def document(compared: Sequence[Compared], refused: Sequence[Refused], inputs: Mapping[str, Any], *, rows: bool) -> dict[str, Any]:
    """The keys of `validate`."""
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "tool_version": __version__, "inputs": dict(inputs), "warnings": [],
        "accuracy": [asdict(one) for one in by_source(compared)], "by_kind": [asdict(one) for one in by_kind(compared)],
        "compared": len(compared), "not_compared": len(refused),
        "not_comparable": [{"kind": k, "source": s, "reason": r, "rows": n} for k, s, r, n in reasons(refused)],
    }  # fmt: skip
    if rows:
        found["rows"] = [{**asdict(one), "error": one.error} for one in compared]
    return found


def show(compared: Sequence[Compared], refused: Sequence[Refused], console: Console, *, rows: bool) -> None:
    """Tables: by kind, by source, what is not compared; every row if asked."""
    console.print(
        f"{len(compared)} rows compared, {len(refused)} not.  Error = predicted / measured - 1.  fit: a prior was fitted to these rows; "
        "held out: to other series of their source; score: to nothing of their source.",
        highlight=False,
    )
    console.print()
    head = ("kind", "source", "use", "n", "median", "p90", "signed", "in 80 %", "worst", "row")
    _table(console, "By kind", head[:1] + head[2:8], [(a.kind, a.use, *_figures(a)) for a in by_kind(compared)])
    _table(
        console, "By source", head,
        [(a.kind, a.source, a.use, *_figures(a), f"{a.worst.error:+.0%}", f"{a.worst.id}: {a.worst.shape}"[:64]) for a in by_source(compared)],
    )  # fmt: skip
    if rows:
        _table(
            console, "Rows", ("id", "GPU", "use", "measured", "predicted", "error", "80 % interval", "basis", "shape"),
            [(o.id, o.gpu, o.use, _value(o, o.measured), _value(o, o.predicted), f"{o.error:+.1%}",
              f"{_value(o, o.low)} to {_value(o, o.high)}", o.basis, _told(o)) for o in compared],
        )  # fmt: skip
    _table(console, "Not compared", ("kind", "source", "rows", "reason"), [(k, s, str(n), r) for k, s, r, n in reasons(refused)])


def _figures(a: Accuracy) -> tuple[str, ...]:
    inside = "exact" if a.worst.low == a.worst.high else f"{a.coverage:.0%}"
    return (str(a.n), f"{a.median:.1%}", f"{a.p90:.0%}", f"{a.signed:+.1%}", inside)


def _told(row: Compared) -> str:
    """What was measured; and why an exact comparison is off, where it is."""
    off = row.explanation and abs(row.error) > TOLERANCE
    return f"{row.shape[:64]}\n{row.error:+.2%}: {row.explanation}" if off else row.shape[:64]


def _value(row: Compared, value: float) -> str:
    if row.unit == "s":
        return SECONDS.show(value, 3)
    return BYTES.show(value) if row.unit == "B" else f"{significant(value, 4)} {row.unit}"


_NUMBERS = frozenset({"n", "rows", "median", "p90", "signed", "in 80 %", "worst", "error", "measured", "predicted"})


def _table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()
