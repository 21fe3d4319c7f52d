"""Run cases, slice by slice, and write one immutable file per run.

A file is CSV behind a head of `# key = value` lines (the environment).  A run stopped half-way leaves a file too; the
next run into the same folder measures only what no file of the same GPU holds yet.
"""

from __future__ import annotations

import csv
import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microbench import attention, decoder, elementwise, gemm
from microbench.case import Case, Module, shape_of
from microbench.clock import REGIMES, Company, Timing, accompany, measure, regime_of
from microbench.environment import Sensors, environment
from simulator.work import Op

MODULES: tuple[Module, ...] = (gemm, attention, elementwise, decoder)
SUITES = ("tiny", "quick", "full")
#: The suite that measures whole layers right after their own ops, one by one on the same card.
BESIDE = "layers"
#: Seconds of a GPU that a case takes, all told, in the mean of the shipped runs: alone, and in company, with its share of the layer's
#: own start.
CASE_S, COMPANY_S = 0.5, 0.85
COLUMNS = (
    "kernel", "impl", "dtype", "regime", "shape", "held", "l2", "p20_s", "p50_s", "p80_s", "samples", "error", "sm_clock_hz", "power_w",
    "flops", "hbm_bytes", "peak_bytes",
)  # fmt: skip
#: Relative errors allowed by element type: rounding of inputs and outputs, not of a wrong result.
TOLERANCE = {"bf16": 2e-2, "fp8": 6e-2}


def module_of(kernel: str) -> Module:
    """The module that measures a kernel."""
    return next(m for m in MODULES if kernel in m.KERNELS)


def cases_of(names: Iterable[str]) -> list[Case]:
    """The cases of suites ("layers" too), kernels ("attention") or implementations ("attention/cudnn"), each once."""
    found: dict[Case, None] = {}
    everything = [c for m in MODULES for c in m.cases("full")]
    for name in names:
        if name in SUITES:
            chosen = [c for m in MODULES for c in m.cases(name)]
        elif name == BESIDE:
            chosen = [*elementwise.TURNS, elementwise.TURN, *decoder.beside()]
        else:
            kernel, _, impl = name.partition("/")
            chosen = [c for c in everything if c.kernel == kernel and impl in ("", c.impl)]
        if not chosen:
            known = ", ".join([*SUITES, BESIDE, *dict.fromkeys(c.kernel for c in everything)])
            message = f"--suite {name}: no such suite or kernel; use one of {known}"
            raise ValueError(message)
        found |= dict.fromkeys(chosen)
    return list(found)


def gpu_seconds(cases: Iterable[Case]) -> float:
    """About how long the cases keep a GPU."""
    return sum(CASE_S if which.company is None else COMPANY_S for which in cases)


class Companies:
    """The layer in whose company parts are measured: prepared once for those that follow each other, freed before anything else."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._layer: Case | None = None
        self._company: Company | None = None

    def of(self, which: Case) -> Company | None:
        """What a case is measured beside, None where it runs alone."""
        if which.company != self._layer:
            self._layer = self._company = None
            _free(self._device)
            if which.company is not None:
                self._company = accompany(module_of(which.company.kernel).prepare(which.company, self._device), self._device)
                self._layer = which.company
        return self._company


def _free(device: Any) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Outcome:
    """What a run left: its file, and how many cases were measured, known before, skipped, left for the next slice."""

    file: Path | None
    measured: int
    known: int
    skipped: tuple[str, ...]
    left: int


def bench(names: Sequence[str], folder: Path, *, limit_s: float = 540.0, progress: Any = None) -> Outcome:
    """Measure the cases of `names` that `folder` does not hold, for at most `limit_s` seconds."""
    device = here()
    torch.manual_seed(20261124)
    facts = environment(device)
    wanted = cases_of(names)
    folder.mkdir(parents=True, exist_ok=True)
    waiting = todo(names, folder)
    if not waiting:
        return Outcome(None, 0, len(wanted), (), 0)
    stamp = str(facts["date"]).replace(":", "").replace("-", "")
    file = folder / f"{_slug(str(facts['gpu']))}-{stamp}.csv"
    start, measured, skipped = time.monotonic(), 0, []
    checked: dict[tuple[Any, ...], float] = {}
    sensors, companies = Sensors(device), Companies(device)
    with file.open("x", encoding="utf-8", newline="") as out:
        out.writelines(f"# {key} = {value}\n" for key, value in facts.items())
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        for index, which in enumerate(waiting):
            if time.monotonic() - start > limit_s:
                break
            try:
                row = _row(which, device, sensors, checked, companies)
            except (RuntimeError, ValueError, ImportError, AssertionError, StopIteration) as reason:
                skipped.append(f"{which.key}: {str(reason).splitlines()[0] if str(reason) else type(reason).__name__}")
                row = None
            gc.collect()
            if row is not None:
                writer.writerow(row)
                out.flush()
                measured += 1
            if progress is not None:
                progress(index + 1, len(waiting), which)
    left = len(waiting) - measured - len(skipped)
    return Outcome(file, measured, len(wanted) - len(waiting), tuple(skipped), left)


def here() -> Any:
    """The device that is measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def todo(names: Sequence[str], folder: Path) -> list[Case]:
    """The cases of `names` that no file of this GPU holds; of the suite "layers" those that no single file holds beside all their parts."""
    runs = _runs(folder, str(environment(here())["gpu"]))
    known: set[str] = set().union(*runs)
    found: dict[Case, None] = {}
    for name in names:
        if name == BESIDE:
            together = [*elementwise.TURNS, elementwise.TURN]
            if not any(all(c.key in run for c in together) for run in runs):
                found |= dict.fromkeys(together)
            for layer in decoder.cases("full"):
                together = decoder.together(layer)
                if not any(all(c.key in run for c in together) for run in runs):
                    found |= dict.fromkeys(together)
        else:
            found |= dict.fromkeys(c for c in cases_of([name]) if c.key not in known)
    return list(found)


def _row(which: Case, device: Any, sensors: Sensors, checked: dict[tuple[Any, ...], float], companies: Companies) -> dict[str, Any]:
    module = module_of(which.kernel)
    layout = (which.get(name) for name in ("heads", "kv_heads", "head_dim", "v_head_dim", "window", "full", "width"))
    kind = (which.kernel, which.impl, which.dtype, *layout)
    if kind not in checked:
        checked[kind] = module.error(which, device)
    if not checked[kind] < TOLERANCE[which.dtype]:
        message = f"wrong result, relative error {checked[kind]:.2g} against the reference"
        raise AssertionError(message)
    company, beside = companies.of(which), 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        beside = torch.cuda.memory_allocated() if company else 0
    prepared = module.prepare(which, device)
    timing = measure(prepared, device, regime_of(which) if device.type == "cuda" else REGIMES["tiny"], sensors, company)
    op = module.op(which)
    peak = torch.cuda.max_memory_allocated() - beside if device.type == "cuda" else 0
    return record(which, timing, op, error=checked[kind], hot=prepared.hot, peak_bytes=prepared.peak_bytes or peak)


def record(which: Case, timing: Timing, op: Op, *, error: float, hot: bool, peak_bytes: float) -> dict[str, Any]:
    """A row of the file."""
    return {
        "kernel": which.kernel, "impl": which.impl, "dtype": which.dtype, "regime": which.regime, "shape": which.extents,
        "held": which.held, "l2": "hot" if hot else "cold", "p20_s": f"{timing.p20_s:.6g}", "p50_s": f"{timing.p50_s:.6g}",
        "p80_s": f"{timing.p80_s:.6g}", "samples": timing.samples, "error": f"{error:.2g}", "sm_clock_hz": f"{timing.reading.sm_clock_hz:.4g}",
        "power_w": f"{timing.reading.power_w:.3g}", "flops": f"{float(op.flops):.8g}", "hbm_bytes": f"{float(op.hbm_bytes):.8g}",
        "peak_bytes": f"{float(peak_bytes):.8g}",
    }  # fmt: skip


def runs_of(folder: Path) -> list[Path]:
    """The files of a folder that hold timed kernels, oldest first: no counters, no rings, no quality."""
    return sorted(file for file in folder.glob("*.csv") if not file.name.startswith(("counters-", "ring-")) and file.name != "quality.csv")


def read(file: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The environment and the rows of a run."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head = [line[1:].partition("=") for line in lines if line.startswith("#")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return {key.strip(): value.strip() for key, _, value in head}, rows


def case_of(row: Mapping[str, str]) -> Case:
    """The case a row measured."""
    return Case(row["kernel"], row["impl"], row["dtype"], shape_of(row["shape"].split()), row["regime"])


def _runs(folder: Path, gpu: str) -> list[set[str]]:
    """The cases that each file of this GPU holds."""
    read_files = [read(file) for file in runs_of(folder)]
    return [{case_of(row).key for row in rows} for facts, rows in read_files if facts.get("gpu") == gpu and rows and "regime" in rows[0]]


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
