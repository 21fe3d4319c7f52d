"""Runs -> a profile of constants: the physics of `simulator.timing`, fitted to rows that may be fitted, tested on the others.

The fit minimises a soft loss of log(predicted / measured) over the constants each kernel has; the exponent of the smooth
maximum is the best of 1, 2, 4 and 8.  Sigma is what the held-out rows show.  Nothing is clamped: a row that beats its bound
is reported and fails the calibration.
"""

from __future__ import annotations

import csv
import datetime as dt
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from microbench import decoder
from microbench.case import HANDED, LONGEST_FITTED, Case
from microbench.ring import collectives
from microbench.ring import fit as rings
from microbench.run import case_of, module_of, read, runs_of
from simulator.calibration import Calibration, Constants, Family, MeasuredLink
from simulator.data import data_path, observed
from simulator.hardware import Cluster, Gpu, cluster, gpu
from simulator.launch import launch
from simulator.timing import Clock, seconds_expected
from simulator.units import Array
from simulator.validate import Compared
from simulator.work import Op

#: Constants a kernel is fitted by: start, least and largest value (all but the exponent in log).
BOUNDS: dict[str, tuple[float, float, float]] = {
    "tensor": (0.8, 0.05, 1.0), "special": (1.0, 0.1, 20.0), "memory": (0.85, 0.1, 1.0), "handed": (1.5, 0.1, 3.0), "sustained": (0.65, 0.2, 1.0),
    "depth_half": (150.0, 1.0, 4000.0), "split": (2.0, 1.0, 64.0), "variant": (0.9, 0.2, 1.5), "merge_s": (2e-8, 1e-10, 1e-6),
    "wave": (0.3, 0.01, 4.0), "step": (0.3, 0.001, 1.0), "window": (0.5, 0.001, 8.0), "launch_s": (3e-6, 2e-7, 6e-5),
}  # fmt: skip
FREE: dict[str, tuple[str, ...]] = {
    "gemm": ("tensor", "sustained", "memory", "depth_half", "split", "launch_s"),
    "batched_gemm": ("tensor", "memory", "depth_half", "split", "launch_s"),
    "grouped_gemm": ("tensor", "sustained", "memory", "depth_half", "split", "launch_s"),
    "attention": ("tensor", "sustained", "special", "memory", "depth_half", "split", "wave", "step", "window", "variant", "launch_s"),
    "attention_backward": ("tensor", "sustained", "special", "memory", "depth_half", "split", "wave", "variant", "launch_s"),
    "unfused_attention": ("tensor", "memory", "launch_s"),
    "decode_attention": ("tensor", "memory", "variant", "wave", "launch_s", "merge_s"),
    "latent_attention": ("tensor", "memory", "wave", "launch_s", "merge_s"),
    "elementwise": ("memory", "handed", "launch_s"),
    "host_copy": ("memory", "launch_s"),
}
POWERS = (1, 2, 4, 8)
#: Fewest rows a family is fitted from.
LEAST_ROWS = 5
#: Fewest rows, mostly found in the L2 cache, that show at which rate it serves them.
LEAST_HANDED = 3
#: What a family that was hardly measured on handed rows attains of them.
HANDED_RATE = observed("handed_rate")
#: What a layer adds to a kernel that was measured after its like.
TURN_S = observed("turn_s")
Z80 = 1.2815515655446004
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """Measured rows of one family: their cases, seconds and why each is held out ("" where it is not)."""

    family: Family
    cases: tuple[Case, ...]
    seconds: Array
    held: tuple[str, ...]

    @property
    def op(self) -> Op:
        """All rows as one op of arrays."""
        return stacked([module_of(c.kernel).op(c) for c in self.cases])

    def where(self, *reasons: str) -> Mask:
        """Which rows are held for one of `reasons`."""
        return np.array([h in reasons for h in self.held])


def stacked(ops: Sequence[Op]) -> Op:
    """Ops of one family as one op whose quantities are arrays."""
    first = ops[0]

    def column(name: str) -> Array:
        return np.array([float(getattr(op, name)) for op in ops])

    return Op(
        first.name, first.kernel, first.impl, first.math, operands=first.operands,
        shape={key: np.array([float(op.shape[key]) for op in ops]) for key in first.shape},
        tensor_flops=column("tensor_flops"), exponentials=column("exponentials"), model_flops=column("model_flops"),
        hbm_bytes=column("hbm_bytes"),
    )  # fmt: skip


def gather(folder: Path) -> tuple[Gpu, dict[Family, Rows]]:
    """The steady rows of a folder by family, of each case the newest.  Rows with inputs in the L2 cache are left out, but for those
    that were meant to find them there, as in a layer: they get the turn from another kernel that a layer adds.
    """
    files = runs_of(folder)
    if not files:
        message = f"{folder}: holds no run; measure with `longctx bench --out {folder}` first"
        raise ValueError(message)
    parts: set[str] = set()
    found: dict[Family, dict[Case, float]] = defaultdict(dict)
    for file in files:
        facts, rows = read(file)
        parts.add(facts.get("gpu", "unknown"))
        for row in rows:
            which = case_of(row)
            cold = which.regime == "steady" and row["l2"] == "cold"
            if (cold or which.regime == HANDED) and which.kernel not in UNFITTED and which.impl != "math":
                op = module_of(which.kernel).op(which)
                found[op.family][which] = float(row["p50_s"]) + (0.0 if cold else TURN_S * float(op.launches))
    if len(parts) > 1:
        message = f"{folder}: runs of several GPUs ({', '.join(sorted(parts))}); give each its own folder"
        raise ValueError(message)
    part = gpu(next(iter(parts)))
    return part, {
        family: Rows(family, tuple(measured), np.array(list(measured.values())), tuple(c.held for c in measured))
        for family, measured in found.items()
    }  # fmt: skip


#: What is measured to be shown, not fitted: whole layers test the sum, launches and host copies stand for themselves; so does
#: unfused ("math") attention, which is a sum of products and passes over the scores.
UNFITTED = ("decoder_layer", "model", "launch")


def predict(op: Op, machine: Cluster, constants: Constants) -> Array:
    """Seconds of the rows under `constants`."""
    calibration = Calibration(machine.gpu.name, {op.family: constants})
    return np.asarray(Clock(machine, calibration).expected(op), dtype=float)


def fit_family(rows: Rows, machine: Cluster, heat: float = 0.0) -> Constants:
    """The constants of one family.  `heat` is the board's, measured apart."""
    op, use = rows.op, rows.where("")
    if int(use.sum()) < LEAST_ROWS:
        use = np.ones(len(rows.cases), dtype=bool)
    # what no row shows is not fitted: it keeps its plain value
    windowed = any(case.get("window") for case in rows.cases)
    streams = rows.family[0] == "elementwise"
    handed = streams and int((launch(op, machine.gpu).found * use > 0.5).sum()) >= LEAST_HANDED  # noqa: PLR2004 (mostly found)
    names = tuple(n for n in FREE[rows.family[0]] if {"window": windowed, "handed": handed}.get(n, True))
    start, low, high = (np.log([BOUNDS[n][i] for n in names]) for i in range(3))
    shared = Constants(heat=heat) if "sustained" in names else Constants()
    if streams and not handed:
        shared = Constants(handed=HANDED_RATE)
    best: tuple[Constants, float] | None = None
    for power in POWERS:

        def residuals(x: Array, power: int = power) -> Array:
            constants = _with(shared, power, dict(zip(names, np.exp(x), strict=True)))
            return np.log(predict(op, machine, constants)[use] / rows.seconds[use])

        found = least_squares(residuals, start, bounds=(low - 1e-9, high + 1e-9), loss="soft_l1", f_scale=0.05)
        if best is None or found.cost < best[1]:
            rounded = {n: float(f"{v:.4g}") for n, v in zip(names, np.exp(found.x), strict=True)}
            best = _with(shared, power, rounded), float(found.cost)
    assert best is not None
    return best[0]


def _with(base: Constants, power: int, values: Mapping[str, float]) -> Constants:
    changes: dict[str, Any] = {"power": power, **values}
    return replace(base, **changes)


def heat_of(folder: Path, part: Gpu) -> float:
    """What memory traffic at its peak rate costs products on a board at its power limit, from the board's own power readings.

    A third of (P_read - P_idle) / (P_limit - P_idle) x (peak rate / rate read): below its maximum clock a chip's power goes with
    the cube of the clock, so a watt that memory takes costs the products a third of its share.  P_read is that of the longest
    plain read, P_idle that of the rows measured after a pause.  0 where the readings are missing.
    """
    reads: list[tuple[float, float, float]] = []
    idle: list[float] = []
    limit = float("nan")
    for file in runs_of(folder):
        facts, rows = read(file)
        limit = float(facts.get("power_limit_w", limit))
        for row in rows:
            if row.get("regime") == "burst":
                idle.append(float(row["power_w"]))
            elif row["kernel"] == "elementwise" and row["impl"] == "read":
                moved = float(row["hbm_bytes"])
                reads.append((moved, moved / float(row["p50_s"]), float(row["power_w"])))
    if not idle or not reads:
        return 0.0
    _, rate, power = max(reads)
    rest = float(np.median(idle))
    heat = float((power - rest) / (limit - rest) * part.hbm_bytes_per_s / rate / 3)
    return round(heat, 3) if np.isfinite(heat) and heat > 0 else 0.0


@dataclass(frozen=True)
class Quality:
    """How well a family is predicted on rows of one kind: number, median and 90th percentile of |log error|, signed median; the
    same two with the residual table; the share of rows inside the 80 % interval; the worst row.
    """

    family: Family
    held: str
    rows: int
    median: float
    p90: float
    signed: float
    median_with_table: float
    p90_with_table: float
    inside: float
    worst: str


def errors(rows: Rows, machine: Cluster, constants: Constants) -> Array:
    """log(predicted / measured) of every row."""
    return np.log(predict(rows.op, machine, constants) / rows.seconds)


def judge(rows: Rows, error: Array, sharp: Array, sigma: float) -> list[Quality]:
    """Quality on fitted rows and on each kind of held-out rows."""
    found = []
    for held in ("", "size", "layout", "length"):
        chosen = rows.where(held)
        if not chosen.any():
            continue
        e = error[chosen]
        worst = int(np.argmax(np.where(chosen, np.abs(error), -1)))
        found.append(Quality(
            rows.family, held or "fitted", len(e), float(np.median(np.abs(e))), float(np.quantile(np.abs(e), 0.9)), float(np.median(e)),
            float(np.median(np.abs(sharp[chosen]))), float(np.quantile(np.abs(sharp[chosen]), 0.9)),
            float(np.mean(np.abs(e) <= Z80 * sigma)), f"{rows.cases[worst].extents} {error[worst]:+.0%}",
        ))  # fmt: skip
    return found


@dataclass(frozen=True)
class Residuals:
    """What the physics leaves on fitted rows, by log2 of the kernel's extents: a table that sharpens between them.

    error'(x) = error(x) - sum_i w_i e_i / (0.3 + sum_i w_i), w_i = exp(-|x - x_i|^2 / 2), one doubling of an extent being a
    distance of 1: nothing changes far from the measured rows.
    """

    at: Array
    error: Array

    def sharpened(self, op: Op, error: Array) -> Array:
        """Errors after the table's correction."""
        distance = ((extents(op)[:, None, :] - self.at[None]) ** 2).sum(-1)
        weight = np.exp(-0.5 * distance)
        return np.asarray(error - (weight * self.error).sum(1) / (weight.sum(1) + 0.3), dtype=float)


def extents(op: Op) -> Array:
    """log2 of the extents of every row, one column each."""
    columns: Array = np.stack([np.asarray(value, dtype=float) for value in op.shape.values()], axis=1)
    return np.asarray(np.log2(np.maximum(columns, 1e-9)), dtype=float)


def residuals_of(rows: Rows, error: Array) -> Residuals:
    """The table of a family's fitted rows."""
    use = rows.where("")
    return Residuals(extents(rows.op)[use], error[use])


def spread(error: Array, held: Mask) -> float:
    """Sigma from held-out rows: their 80th percentile over that of a normal; of all rows where fewer than five are held."""
    chosen = error[held] if int(held.sum()) >= LEAST_ROWS else error
    return float(max(np.quantile(np.abs(chosen), 0.8) / Z80, 0.01))


@dataclass(frozen=True)
class Profile:
    """What a calibration found: constants with sigma by family, their quality, rows that beat their bound, and every row's error."""

    gpu: Gpu
    families: dict[Family, Constants]
    quality: list[Quality]
    beaten: list[str]
    points: list[dict[str, object]]
    links: tuple[MeasuredLink, ...] = ()
    interference: Mapping[str, float] = field(default_factory=dict)

    def standing(self) -> dict[Family, Constants]:
        """Constants by family, and those that stand for a kernel whose implementation nobody names."""
        found, stands = dict(self.families), {**STANDS_FOR, **STANDS_ON.get(self.gpu.architecture, {})}
        for (kernel, impl, dtype), constants in self.families.items():
            if impl and stands.get((kernel, dtype)) == impl:
                found[kernel, "", dtype] = replace(constants, source=f"{impl} stands for it: {constants.source}")
        return found

    def unstood(self) -> list[str]:
        """What was measured, but of no implementation that engines run here: it keeps what lay below."""
        known = self.standing()
        return [
            f"{kernel} {dtype} that nobody names: on {self.gpu.architecture.title()} engines run kernels like {impl}, which these runs lack"
            for (kernel, dtype), impl in STANDS_ON.get(self.gpu.architecture, {}).items()
            if (kernel, "", dtype) not in known and any((k, d) == (kernel, dtype) for k, _, d in known)
        ]  # fmt: skip


def calibrate(folder: Path) -> Profile:
    """Fit every family of a folder of runs, and judge it on the rows that were held out; then links and what runs beside them."""
    profile = _kernels(folder)
    if not rings.files_of(folder):
        return profile
    part, rows = rings.gathered(folder)
    below = Calibration.load(part)
    known = replace(below, families=below.families | profile.standing(), links=tuple(rings.links(rows, part)), interference={})
    known = replace(known, interference=rings.interference(rows, part, known))
    quality = [_quality_of(kind, held, some) for (kind, held), some in rings.grouped(rings.judged(rows, part, known)).items()]
    return replace(profile, links=known.links, interference=known.interference, quality=profile.quality + quality)


def _quality_of(kind: tuple[str, str], held: str, some: Sequence[rings.Judged]) -> Quality:
    error = np.array([one.error for one in some])
    worst = some[int(np.argmax(np.abs(error)))]
    median, p90 = float(np.median(np.abs(error))), float(np.quantile(np.abs(error), 0.9))
    inside = float(np.mean(np.abs(error) <= Z80 * RINGS_SIGMA))
    told = f"{worst.row.case.extents} {worst.error:+.0%}"
    return Quality((*kind, "bf16"), held, len(some), median, p90, float(np.median(error)), median, p90, inside, told)


def _kernels(folder: Path) -> Profile:
    part, families = gather(folder)
    machine = cluster(part, 1)
    constants: dict[Family, Constants] = {}
    quality: list[Quality] = []
    beaten: list[str] = []
    points: list[dict[str, object]] = []
    heat = heat_of(folder, part)
    for family, rows in families.items():
        if len(rows.cases) < LEAST_ROWS:
            continue
        fitted = fit_family(rows, machine, heat)
        error = errors(rows, machine, fitted)
        sigma = round(spread(error, rows.where("size", "layout", "length")), 4)
        constants[family] = replace(
            fitted, sigma=sigma, basis="calibrated", rows=int(rows.where("").sum()),
            source=f"{len(rows.cases)} rows measured on {part.title}, {int(rows.where('').sum())} fitted",
        )  # fmt: skip
        sharp = residuals_of(rows, error).sharpened(rows.op, error)
        quality += judge(rows, error, sharp, sigma)
        beaten += beats(rows, machine)
        points += [
            {
                "kernel": " ".join(filter(None, family)), "shape": c.extents, "held": c.held or "fitted",
                "measured_s": float(t), "error": float(np.expm1(e)), "error_with_table": float(np.expm1(s)),
            }
            for c, t, e, s in zip(rows.cases, rows.seconds, error, sharp, strict=True)
        ]  # fmt: skip
    return Profile(part, constants, quality, beaten, points)


def beats(rows: Rows, machine: Cluster) -> list[str]:
    """Rows faster than their bound: a bug of the formula or of the measurement."""
    bound = np.asarray(Clock(machine, Calibration.none()).bound(rows.op), dtype=float)
    return [f"{c.key}: {s:.3g} s, bound {b:.3g} s" for c, s, b in zip(rows.cases, rows.seconds, bound, strict=True) if s < b]


#: The implementation that stands for a kernel whose implementation nobody names: the fastest measured that engines use or resemble.
#: None stands for decode over an fp8 cache: the kernel measured here converts it to bf16 at half the memory rate, engines' do not.
STANDS_FOR = {
    ("attention", "bf16"): "cudnn", ("attention_backward", "bf16"): "cudnn", ("decode_attention", "bf16"): "triton",
    ("elementwise", "bf16"): "copy", ("grouped_gemm", "bf16"): "cutlass",
}  # fmt: skip
#: The same where an architecture decides: vLLM's and SGLang's prefill runs FlashAttention-3 on Hopper, whose sister FlashAttention-4 is.
STANDS_ON = {"hopper": {("attention", "bf16"): "flash4"}}


def write(profile: Profile, folder: Path) -> None:
    """constants.toml (the profile) and quality.csv (how well it predicts) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    today = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"
    lines = [f'description = "{profile.gpu.name}: measured, fitted {today}"', f"common_sigma = {COMMON_SIGMA}", ""]
    if profile.interference:
        lines += ["[interference]", *(f'"{pattern}" = {share}' for pattern, share in profile.interference.items()), ""]
    for link in profile.links:
        lines += ["[[link]]", f'pattern = "{link.pattern}"', f"ranks = {link.ranks}", f"latency_s = {list(link.latency_s)}",
                  f"bytes_per_s = {list(link.bytes_per_s)}", f'source = "{link.source}"', ""]  # fmt: skip
    for (kernel, impl, dtype), constants in profile.standing().items():
        lines += _table(kernel, impl, dtype, constants)
    (folder / "constants.toml").write_text("\n".join(lines), encoding="utf-8")
    names = ("rows", "median", "p90", "signed", "median_with_table", "p90_with_table", "inside")
    with (folder / "quality.csv").open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("kernel", "impl", "dtype", "held", *names, "worst"))
        for q in profile.quality:
            table.writerow((*q.family, q.held, *(f"{getattr(q, n):.4g}" for n in names), q.worst))


#: What all ops of a machine share.
COMMON_SIGMA = observed("common_sigma")


#: Of programs over several ranks.
RINGS_SIGMA = observed("rings_sigma")


def _table(kernel: str, impl: str, dtype: str, constants: Constants) -> list[str]:
    named = (
        "tensor", "special", "memory", "handed", "sustained", "heat", "depth_half", "split", "variant", "wave", "step", "window",
        "launch_s", "merge_s", "power", "sigma", "rows",
    )  # fmt: skip
    plain = Constants()
    values = [f"{n} = {getattr(constants, n)!r}" for n in named if getattr(constants, n) != getattr(plain, n) or n in FREE.get(kernel, ())]
    return ["[[family]]", f'kernel = "{kernel}"', f'impl = "{impl}"', f'dtype = "{dtype}"', *values, f'basis = "{constants.basis}"',
            f'source = "{constants.source}"', ""]  # fmt: skip


def measured() -> Iterator[Compared]:
    """Every shipped row beside the shipped profile's prediction, for `longctx validate`: fitted rows and, by what they test, the
    held-out ones; whole layers as sums of their ops.
    """
    for folder in sorted(path.parent for path in data_path("calibration").glob("*/constants.toml")):
        part, families = gather(folder / "runs")
        machine, calibration = cluster(part, 1), Calibration.load(part)
        clock = Clock(machine, calibration)
        for family, rows in families.items():
            sigma = float(np.hypot(calibration.constants(family).sigma, calibration.common_sigma))
            for which, seconds, predicted in zip(rows.cases, rows.seconds, np.asarray(clock.expected(rows.op)), strict=True):
                yield _compared(which, part, float(predicted), float(seconds), sigma)
        newest = {case_of(row): row for file in runs_of(folder / "runs") for row in read(file)[1] if row["kernel"] in decoder.KERNELS}
        for which, row in newest.items():
            yield _compared(which, part, float(seconds_expected(decoder.work(which), clock)), float(row["p50_s"]), 1.5 * calibration.common_sigma)


def borrowed() -> Iterator[Compared]:
    """Kernels of GPUs that borrow their constants, measured to judge that: nothing is fitted to the rows of a folder `scored`."""
    for folder in sorted(data_path("calibration").glob("*/scored")):
        part, families = gather(folder)
        calibration = Calibration.load(part)
        clock = Clock(cluster(part, 1), calibration)
        for family, rows in families.items():
            sigma = float(np.hypot(calibration.constants(family).sigma, calibration.common_sigma))
            for which, seconds, predicted in zip(rows.cases, rows.seconds, np.asarray(clock.expected(rows.op)), strict=True):
                one = _compared(which, part, float(predicted), float(seconds), sigma)
                yield replace(one, source=f"measured here on {part.name}", use="score", basis="analytic")


def measured_rings() -> Iterator[Compared]:
    """Every shipped program of ranks beside its prediction: collectives and programs beside products are fitted where not held out."""
    for folder in sorted(path.parent / "runs" for path in data_path("calibration").glob("*/constants.toml")):
        if not rings.files_of(folder):
            continue
        part, rows = rings.gathered(folder)
        for one in rings.judged(rows, part, Calibration.load(part)):
            spread = float(np.exp(Z80 * RINGS_SIGMA))
            which = one.row.case
            fitted = one.row.backend == "nccl" and which.kernel in collectives.KERNELS
            use = "held out" if which.held else "fit" if fitted else "score"
            yield Compared(
                f"measured here, {one.row.where}", which.kernel, which.impl, part.name, use, "s",
                one.predicted_s, one.row.seconds, one.predicted_s / spread, one.predicted_s * spread, "calibrated", which.extents,
            )  # fmt: skip


def _compared(which: Case, part: Gpu, predicted: float, seconds: float, sigma: float) -> Compared:
    spread = float(np.exp(Z80 * sigma))
    held = {"": "fit", "size": "held out", "layout": "held out", "length": "held out"}[which.held]
    use = "score" if which.kernel in decoder.KERNELS else held
    kind = which.kernel + (f" to {LONGEST_FITTED // 1024}K+" if which.held == "length" else "")
    return Compared(
        f"measured here, {' '.join(filter(None, (which.impl, which.dtype)))}", kind, which.regime, part.name, use, "s", predicted, seconds,
        predicted / spread, predicted * spread, "calibrated", which.extents,
    )  # fmt: skip


def draw(profile: Profile, folder: Path) -> Path:
    """residuals.html: predicted over measured for every row, by kernel and kind of row."""
    import altair as alt  # noqa: PLC0415 (an extra)
    import pandas as pd  # noqa: PLC0415

    frame = pd.DataFrame(profile.points)
    chart = (
        alt.Chart(frame, width=560, height=180)
        .mark_circle(opacity=0.6)
        .encode(
            x=alt.X("measured_s:Q", scale=alt.Scale(type="log"), title="measured, s"),
            y=alt.Y("error:Q", axis=alt.Axis(format="%"), title="predicted / measured - 1"),
            color=alt.Color("held:N", title="held out for"), tooltip=["kernel", "shape", "measured_s", "error"],
        )
        .facet(row=alt.Row("kernel:N", title=None))
    )  # fmt: skip
    file = folder / "residuals.html"
    chart.save(str(file))
    return file
