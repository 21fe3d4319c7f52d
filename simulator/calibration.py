"""What a GPU attains of its peaks: constants per (kernel, impl, dtype), with where they come from and how well they fit.

`Calibration.none()` is the identity.  A profile is a small file, `data/calibration/<gpu>/constants.toml`; a user's own
lies in their data directory and is preferred.  A GPU without a profile borrows the fitted shape of a named one, or
documented priors, and says so.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from simulator.data import data_path, observed
from simulator.hardware import STAND_IN, Gpu
from simulator.hardware import gpu as named
from simulator.units import Fraction, Seconds

Family = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Constants:
    """Constants of one family of ops.

    tensor, special, memory: shares of peak attained at saturation (`special` above 1: exponentials that hide behind products).
    handed: the rate at which the L2 cache serves what kernels hand each other, over the HBM's peak (0: as `memory`).
    sustained: the share of the tensor peak that the board's power limit lets through when work goes on (0: no limit known);
    heat: the share of the power budget that memory takes at its peak rate.  depth_half: trip count of a tile's inner loop at
    half of the tensor rate.  split: pieces into which a kernel may cut its tiles to fill the machine.  wave: what the last wave
    of tiles costs, in waves; step: the share of a part-filled wave of even tiles that is lost.  variant: what the family's second
    kernel attains of the first.  window: what a window's mask adds to a pair, in exponentials.  launch_s: the op's own fixed time
    on the GPU; merge_s: what merging one more partial result takes.  power: exponent of the smooth maximum.  sigma: standard
    deviation of log(measured / predicted) on held-out rows.
    """

    tensor: Fraction = 1.0
    special: Fraction = 1.0
    memory: Fraction = 1.0
    handed: float = 0.0
    sustained: Fraction = 0.0
    heat: Fraction = 0.0
    depth_half: float = 0.0
    split: float = 1.0
    variant: Fraction = 1.0
    wave: float = 0.0
    step: Fraction = 0.0
    window: float = 0.0
    launch_s: Seconds = 0.0
    merge_s: Seconds = 0.0
    power: int = 0
    sigma: float = 0.0
    basis: str = "analytic"
    source: str = ""
    rows: int = 0


IDENTITY = Constants()
#: The share of the HBM's peak that streaming kernels attain.
STREAMED = observed("streamed")
#: Element types that tensor cores treat alike.
_TWINS = {"fp16": "bf16", "bf16": "fp16"}


class MeasuredLink(NamedTuple):
    """How one pattern travels between `ranks` neighbours of a scale-up domain: t = the least over i of latency_s[i] + w /
    bytes_per_s[i], w the wire bytes of a rank.  Short messages take the first line, long ones the last.
    """

    pattern: str
    ranks: int
    latency_s: tuple[float, ...]
    bytes_per_s: tuple[float, ...]
    source: str = ""


@dataclass(frozen=True)
class Calibration:
    """Constants by family; `common_sigma` is the error shared by all ops (clock, engine).  `interference`: the share of the SMs that a
    message takes from kernels beside it, by pattern, "" for patterns it does not name; none was measured where it is empty.
    `links`: patterns measured on groups of some size; others are worked out (`collectives.port`).
    """

    gpu: str = ""
    families: dict[Family, Constants] = field(default_factory=dict)
    common_sigma: float = 0.0
    description: str = "none: the identity"
    interference: Mapping[str, float] = field(default_factory=dict)
    links: tuple[MeasuredLink, ...] = ()

    @staticmethod
    def none() -> Calibration:
        """Every op at its bound."""
        return Calibration()

    @staticmethod
    def load(gpu: Gpu) -> Calibration:
        """The user's profile, else the shipped one, else one borrowed or assumed."""
        return _load(gpu)

    def constants(self, family: Family) -> Constants:
        """Constants of a family: exact, else its implementation's in another dtype, else the kernel's default implementation's.

        Implementations of one kernel differ by factors, dtypes by less once their peaks are told apart; fp16 is bf16 in rate and power.
        """
        found = self._resolved.get(family)
        if found is None:
            kernel, impl, dtype = family
            keys = [(kernel, name, kept) for name in (impl, "") for kept in (dtype, _TWINS.get(dtype, ""), "")]
            found = next((self.families[key] for key in keys if key in self.families), IDENTITY)
            self._resolved[family] = found
        return found

    def implementations(self, kernel: str) -> list[str]:
        """The implementations of a kernel that have constants of their own."""
        return sorted({impl for name, impl, _ in self.families if name == kernel and impl})

    def taken(self, pattern: str) -> float:
        """The share of the SMs that a message takes from kernels beside it."""
        return self.interference.get(pattern, self.interference.get("", 0.0))

    @property
    def _resolved(self) -> dict[Family, Constants]:
        memo = self.__dict__.get("_memo")
        if memo is None:
            memo = {}
            object.__setattr__(self, "_memo", memo)
        return memo


def user_folder() -> Path:
    """Where a user's own profiles lie: $XDG_DATA_HOME/longctx/calibration."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "longctx" / "calibration"


@cache
def _load(gpu: Gpu) -> Calibration:
    """What was not measured keeps what lay below: families, links, and what messages take from kernels."""
    found = _assumed(gpu)
    for name, title in ((gpu.name, ""), (gpu.borrows, f"{gpu.name} borrows the shape of ")):
        measured = False
        for folder, whose in ((data_path("calibration"), "shipped"), (user_folder(), "yours")):
            file = folder / name / "constants.toml"
            if name and file.is_file():
                measured = True
                top = read_profile(file, gpu.name, whose)
                added = top.families if not title else {f: borrowed(f, c, gpu, named(name)) for f, c in top.families.items()}
                # a row without a dtype stands for all
                kept = {f: c for f, c in found.families.items() if (*f[:2], "") not in added}
                alike = not title or _joined(gpu) == _joined(named(name))
                found = replace(
                    top, families=kept | added, description=title + top.description, links=(top.links if alike else ()) or found.links,
                    interference=(shares_of(top.interference, gpu, named(name)) if alike else {}) or found.interference,
                )  # fmt: skip
        if measured:
            return found
    return found


def _joined(gpu: Gpu) -> tuple[object, ...]:
    """What decides how messages travel between neighbours."""
    return (gpu.architecture, *((gpu.links[0].kind, gpu.links[0].bytes_per_s) if gpu.links else ()))


#: What a borrowed constant adds to its error: another board of the same architecture, scaled by datasheet.
BORROWED_SIGMA = observed("borrowed_sigma")


def borrowed(family: Family, constants: Constants, gpu: Gpu, lender: Gpu) -> Constants:
    """Another GPU's constants, scaled by datasheet, wider and analytic."""
    return replace(
        carried(family, constants, gpu, lender), sigma=math.hypot(constants.sigma, BORROWED_SIGMA), basis="analytic",
        source=f"borrowed from {lender.name}: {constants.source}",
    )  # fmt: skip


def carried(family: Family, constants: Constants, gpu: Gpu, lender: Gpu) -> Constants:
    """Constants of `lender` on the units, power and memory of `gpu`.

    tensor' = 1 / (1 + (1 / tensor - 1) r), depth_half' = depth_half r, r the FLOP per clock of this board's SM over the lender's:
    what a tile spends beside its products (fetching operands, softmax, write-out) is as long on a slower tensor core.
    sustained' = sustained (W' / P') / (W / P), heat' = heat (B' / W') / (B / W), W the board power, P the tensor peak, B the memory
    rate: the same joules per FLOP and per byte.  Shares of memory and of exponentials, pieces, waves and fixed times are the lender's.
    Grouped products are slowed by what a multiprocessor keeps in flight, not by the memory: on slower memory they attain
    memory' = memory B U / (B' U'), U multiprocessors x clock, up to what streaming kernels attain (an H100 measured 0.79, an H200 0.61).
    A power that is not known counts as in proportion to the peak: the same share of it is sustained.
    Neglected: other voltages and memory generations, and instructions that only one of the two has.
    """
    dtype = family[2] if gpu.supports(family[2]) and lender.supports(family[2]) else "bf16"
    rate = gpu.flops_per_unit_clock(dtype) / lender.flops_per_unit_clock(dtype)
    peak = gpu.peak_flops_per_s(dtype) / lender.peak_flops_per_s(dtype)
    watts = gpu.tdp_w / lender.tdp_w if gpu.tdp_w and lender.tdp_w else peak
    memory = constants.memory
    if family[0] == "grouped_gemm":
        units = gpu.units * gpu.max_clock_hz / (lender.units * lender.max_clock_hz)
        memory = max(memory, min(STREAMED, memory * units * lender.hbm_bytes_per_s / gpu.hbm_bytes_per_s))
    return replace(
        constants, tensor=1 / (1 + (1 / constants.tensor - 1) * rate), memory=memory, depth_half=constants.depth_half * rate,
        sustained=constants.sustained * watts / peak,
        heat=constants.heat / watts * gpu.hbm_bytes_per_s / lender.hbm_bytes_per_s,
    )  # fmt: skip


def read_profile(file: Path, gpu: str, whose: str = "given", architecture: str = "") -> Calibration:
    """Read a profile file.  A row that names an architecture counts on that one only, and before rows that name none."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{file}: not TOML ({error}); calibrate again"
        raise ValueError(message) from error
    rows, common, interference = data.get("family"), data.get("common_sigma", 0.0), data.get("interference", {})
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("kernel"), str) for row in rows):
        message = f"{file}: has no [[family]] tables with a kernel each; calibrate again"
        raise ValueError(message)
    if not isinstance(interference, dict) or not all(_is_number(s, least=0.0) and s < 1 for s in interference.values()):
        message = f"{file}: interference = {interference!r} holds no shares from 0 to 1 by pattern; calibrate again"
        raise ValueError(message)
    if not _is_number(common, least=0.0):
        message = f"{file}: common_sigma = {common!r} is not a number from 0; calibrate again"
        raise ValueError(message)
    rows = sorted((row for row in rows if row.get("architecture", architecture) == architecture), key=lambda row: "architecture" in row)
    families = {(row["kernel"], row.get("impl", ""), row.get("dtype", "")): _constants(row, file) for row in rows}
    described = f"{data.get('description', gpu)} ({whose} profile)"
    return Calibration(gpu, families, float(common), described, interference, _links(data.get("link", []), file))


def _links(rows: object, file: Path) -> tuple[MeasuredLink, ...]:
    return tuple(_link(row, file) for row in rows) if isinstance(rows, list) else ()


def _link(row: object, file: Path) -> MeasuredLink:
    given = row if isinstance(row, dict) else {}
    lines = [given.get("latency_s"), given.get("bytes_per_s")]
    latency, rate = (tuple(line) if isinstance(line, list) else () for line in lines)
    ranks = given.get("ranks")
    if not isinstance(ranks, int) or len(latency) != len(rate) or not latency or not all(_is_number(v, least=0.0) and v for v in latency + rate):
        message = f"{file}: [[link]] {row!r} is no pattern, ranks, latency_s and as many bytes_per_s; calibrate again"
        raise ValueError(message)
    return MeasuredLink(str(given.get("pattern")), ranks, latency, rate, str(given.get("source", "")))


BASES = ("measured", "calibrated", "analytic", "assumed")
_POWERS = (0, 1, 2, 4, 8, 16)


def _constants(row: dict[str, object], file: Path) -> Constants:
    """One family, every constant checked: shares above 0, the rest from 0, a power of two, a known basis."""
    for name, value in row.items():
        if name in ("tensor", "special", "memory", "split", "variant"):
            sound = _is_number(value, least=0.0) and value != 0
        elif name in ("handed", "sustained", "heat", "depth_half", "wave", "step", "window", "launch_s", "merge_s", "sigma", "rows"):
            sound = _is_number(value, least=0.0)
        else:
            sound = {"power": value in _POWERS, "basis": value in BASES}.get(name, True)
        if not sound:
            message = f"{file}: {row['kernel']} has {name} = {value!r}, which makes no sense; calibrate again"
            raise ValueError(message)
    known = {f.name for f in fields(Constants)}
    return Constants(**{k: v for k, v in row.items() if k in known})  # type: ignore[arg-type]


def _is_number(value: object, *, least: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= least


#: Whose collectives are kernels; elsewhere engines of their own carry them.
SENDS_BY_SMS = ("nvidia", "amd")
#: No message is assumed to take more of the SMs.
MOST_TAKEN = 0.5
#: What standing in for figures that are not published adds to the error all ops share.
STAND_IN_SIGMA = observed("stand_in_sigma")


def shares_of(taken: Mapping[str, float], gpu: Gpu, lender: Gpu) -> dict[str, float]:
    """Shares of the SMs of `gpu` that messages take, who take as many as of `lender`."""
    return {pattern: min(share * lender.units / gpu.units, MOST_TAKEN) for pattern, share in taken.items()}


def _assumed(gpu: Gpu) -> Calibration:
    """Documented priors, with the GPU's own published matmul ceiling where there is one.

    A ceiling c is what long products of the best shape attain, so the power limit is what it leaves to be explained:
    sustained = (c^-p - tensor^-p)^(-1/p) with p the exponent of the smooth maximum.
    """
    file = data_path("calibration", "priors.toml")
    priors, everywhere = (read_profile(file, gpu.name, "prior", architecture) for architecture in (gpu.architecture, ""))
    families = {
        family: carried(family, c, gpu, named(STAND_IN)) if everywhere.families.get(family) == c else c for family, c in priors.families.items()
    }  # fmt: skip
    for (kernel, impl, _), constants in list(families.items()):
        if kernel != "gemm":
            continue
        for dtype, attained in gpu.attained.items():
            share, p = attained / gpu.peak_flops_per_s(dtype), constants.power
            left = share**-p - constants.tensor**-p
            limits = {"sustained": left ** (-1 / p)} if left > 0 else {"tensor": share, "sustained": 0.0}
            cited = gpu.sources.get(f"attained.{dtype}", "see data/hardware")
            families[kernel, impl, dtype] = replace(constants, **limits, source=f"published matmul ceiling, {cited}; shape: {constants.source}")
    taken = shares_of(priors.interference, gpu, named(STAND_IN)) if gpu.vendor in SENDS_BY_SMS else {}
    found = Calibration(gpu.name, families, priors.common_sigma, f"{gpu.name}: no measurements; documented priors", taken)
    if not gpu.assumed:
        return found
    told = f"{gpu.name}: no measurements, and {', '.join(gpu.assumed)} not published: documented priors, in proportion to an H200"
    return replace(
        found, families={family: replace(c, basis="assumed") for family, c in families.items()},
        common_sigma=math.hypot(priors.common_sigma, STAND_IN_SIGMA), description=told,
    )  # fmt: skip
