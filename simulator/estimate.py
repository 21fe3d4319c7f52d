"""Where the two sides meet: a model on a layout does a phase on a cluster, and takes so long.

`estimate` answers one question with its rows and interval; `sweep` answers many at once with the same trees.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import math
import mmap
import multiprocessing.pool
import os
import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from simulator import train_step
from simulator.calibration import Calibration, Family
from simulator.dtypes import CacheFormat
from simulator.footprint import Footprint
from simulator.hardware import Cluster
from simulator.launch import launch
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.passes import Passes, Row, by_kernel, rows
from simulator.phases import Decode, Host, Mixed, Phase, Prefill, System, TrainStep
from simulator.replay import Often
from simulator.timing import Clock, bounded, calibrated, clock_of, once
from simulator.units import Array, Bytes, Count, Num, Seconds, Tokens, minimum, total
from simulator.work import Leaf, Op, PeakBytes, SecondsSerial, Together, Work, fold, quantity

#: Half-width of an 80 % interval in standard deviations.
Z80 = 1.2815515655446004
_ORDER = ("measured", "calibrated", "analytic", "assumed")


class Engine(Protocol):
    """What an estimate needs of an engine: the host work of a step."""

    def host(self, phase: Phase) -> Host | None:
        """Host work of one step, or None."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A time or rate: its value, an 80 % interval, and on what it rests."""

    value: float
    low: float
    high: float
    basis: str

    def scaled(self, factor: float) -> Interval:
        """The same times a known factor."""
        return Interval(self.value * factor, self.low * factor, self.high * factor, self.basis)

    def inverse(self, factor: float = 1.0) -> Interval:
        """Factor / this: a rate from a time."""
        if self.value == 0:
            return Interval(math.inf, math.inf, math.inf, self.basis)
        return Interval(factor / self.value, factor / self.high, factor / self.low, self.basis)

    def plus(self, other: Interval) -> Interval:
        """The sum of two times whose errors are shared: ends add."""
        basis = max(self.basis, other.basis, key=_ORDER.index)
        return Interval(self.value + other.value, self.low + other.low, self.high + other.high, basis)

    def overlaps(self, other: Interval) -> bool:
        """Whether the two cannot be told apart."""
        return self.low <= other.high and other.low <= self.high

    def document(self) -> dict[str, float | str]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "basis": self.basis}


def interval(by_family: Mapping[Family, Num], calibration: Calibration, value: float, lower: float = 0.0) -> Interval:
    """An 80 % interval of a sum of times by family, in log time.

    sigma^2 = sum over families of (share x sigma_family)^2 + common^2: the error of a family is shared by all its ops
    and independent between families.  No time lies below its bound, so neither does the low end.
    Basis: the weakest of the families that make up 5 % of the time or more.
    """
    whole = sum(total(v) for v in by_family.values())
    if not whole or not value:
        return Interval(value, value, value, "analytic")
    variance, basis = calibration.common_sigma**2, "measured"
    for family, seconds in by_family.items():
        constants, share = calibration.constants(family), total(seconds) / whole
        variance += (share * constants.sigma) ** 2
        if share >= 0.05:  # noqa: PLR2004
            basis = max(basis, constants.basis, key=_ORDER.index)
    spread = math.exp(Z80 * math.sqrt(variance))
    return Interval(value, max(value / spread, min(lower, value)), value * spread, basis)


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """The answer to one question.

    `lower` is the bound (peak rates, compulsory work), `upper` the calibrated ops with nothing overlapped.
    Quantities are per GPU, of the critical rank.
    """

    model: ModelSpec
    layout: Layout
    cluster: Cluster
    phase: Phase | TrainStep
    lower: float
    seconds: Interval
    upper: float
    flops: float
    model_flops: float
    hbm_bytes: float
    wire_bytes: float
    footprint: Footprint
    rows: list[Row]
    calibration: Calibration
    work: Work

    def binding(self) -> str:
        """What takes the most time: the kernel with the largest share and the resource it waits for."""
        if not self.rows:
            return "nothing"
        clock = Clock(self.cluster, self.calibration)
        by: dict[str, float] = {}
        for row in self.rows:
            resource = binding_resource(clock, row.op)
            by[resource] = by.get(resource, 0.0) + total(row.seconds)
        most, whole = max(by, key=by.__getitem__), sum(by.values())
        return f"{RESOURCE_NAMES[most]} ({by[most] / whole:.0%} of the time)" if whole else "nothing"


RESOURCE_NAMES = {
    "tensor": "tensor cores", "vector": "vector units", "special": "exponentials", "hbm": "HBM bandwidth", "l2": "L2 cache",
    "link": "links", "host": "host", "launch": "kernel launches",
}  # fmt: skip


def binding_resource(clock: Clock, op: Leaf) -> str:
    """The resource with the largest demand; "launch" where the op's fixed time exceeds it, "link" for messages."""
    demand = {resource: float(np.mean(seconds)) for resource, seconds in clock.demand(op).items()}
    resource = max(demand, key=demand.__getitem__)
    fixed, taken = float(clock.calibration.constants(op.family).launch_s), demand[resource]
    if isinstance(op, Op) and op.kernel == "elementwise":
        resource = "l2" if found_in_l2(clock, op) > 0.5 else "hbm"  # noqa: PLR2004 (mostly found)
        taken = float(np.mean(clock.expected(op))) - fixed
    return "launch" if resource not in ("link", "host") and fixed > taken else resource


def found_in_l2(clock: Clock, op: Op) -> float:
    """The share of an op's traffic that the L2 cache serves, because kernels before it wrote it and kernels after it read it."""
    return float(np.mean(launch(op, clock.gpu).found))


def estimate(
    model: ModelSpec,
    cluster: Cluster,
    layout: Layout,
    phase: Phase | TrainStep,
    *,
    engine: Engine | None = None,
    calibration: Calibration | None = None,
    cache: CacheFormat | None = None,
) -> Estimate:
    """How long `phase` of `model` takes on `layout` of `cluster`, and what it moves.  Without an engine no host work is
    added.  Errors: ValueError where the layout breaks a rule of the model or needs more GPUs than there are.
    """
    check(model, cluster, layout)
    calibration = calibration or Calibration.load(cluster.gpu)
    system = System(model, layout, cache)
    if isinstance(phase, TrainStep):
        for refusal in train_step.refusals(system, phase):
            raise ValueError(refusal)
        work = train_step.work(system, phase)
    else:
        work = system.work(phase, host=engine.host(phase) if engine else None)
    clock, amounts = clock_of(cluster, calibration), ("flops", "model_flops", "hbm_bytes", "wire_bytes")
    expected, bound = once(clock.expected), bounded(clock, once(clock.demand))
    lower, value, upper, passes, (_, peak), *totals = fold(
        work,
        Together(
            bound, calibrated(clock, expected, bound.demands), SecondsSerial(expected), Passes(expected),
            PeakBytes(keeps_saved=False), *(quantity(name) for name in amounts),
        ),
    )  # fmt: skip
    numbers = {name: total(amount) for name, amount in zip(amounts, totals, strict=True)}
    if isinstance(phase, TrainStep):
        # what is computed twice is useful once
        once_only = train_step.work(system, replace(phase, recompute="none"))
        numbers["model_flops"] = total(fold(once_only, quantity("model_flops")))
    return Estimate(
        model=model, layout=layout, cluster=cluster, phase=phase, lower=float(lower),
        seconds=interval(by_kernel(passes, expected), calibration, float(value), float(lower)), upper=float(upper),
        footprint=train_step.footprint(system, phase) if isinstance(phase, TrainStep) else _held(system, phase, peak),
        rows=_merged(rows(passes, expected)), calibration=calibration, work=work, **numbers,
    )  # fmt: skip


def check(model: ModelSpec, cluster: Cluster, layout: Layout) -> None:
    """Refuse a layout the model forbids, or one larger than the cluster."""
    for refusal in layout.refusals(model):
        raise ValueError(refusal)
    if layout.gpus > cluster.gpus:
        message = f"layout {layout} needs {int(layout.gpus)} GPUs and there are {cluster.gpus}; lower a degree or raise --gpus"
        raise ValueError(message)


def _held(system: System, phase: Phase, peak: Bytes) -> Footprint:
    """What the phase needs resident: weights, the caches of its sequences at its context, and `peak` bytes of activations
    beside the residual stream.
    """
    if isinstance(phase, Mixed):
        sequences: Num = sum([float(np.max(s.sequences)) for s in phase.segments], 0.0)
        context: Num = max(float(np.max(s.context)) for s in phase.segments)
        step: Num = sum([float(np.max(s.tokens)) for s in phase.segments], 0.0)
    else:
        sequences, context, step = phase.batch, phase.context, _step_tokens(phase)
    return replace(system.resident(sequences=sequences, context=context), activations=peak + system.residual_bytes(step))


def _step_tokens(phase: Prefill | Decode) -> Tokens:
    if isinstance(phase, Decode):
        return phase.batch * phase.new_tokens
    new = phase.context - phase.prefix
    return new if phase.chunk is None else minimum(phase.chunk, new)


def _merged(lines: list[Row]) -> list[Row]:
    """Rows of the same op of the same size become one; in order of first appearance."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in lines:
        op = row.op
        key = (op.name, op.family, total(op.flops), total(op.hbm_bytes), total(op.wire_bytes))
        same = found.get(key)
        found[key] = Row(op, same.count + row.count, same.seconds + row.seconds) if same else row
    return [row for row in found.values() if row.count]


@dataclass(frozen=True, slots=True, eq=False)
class Bare:
    """One cell of a sweep, or an array of them: bound and expected seconds, bytes held."""

    lower: Seconds
    seconds: Seconds
    total_bytes: Bytes
    weight_bytes: Bytes
    cache_bytes: Bytes


def bare(
    model: ModelSpec, cluster: Cluster, layout: Layout, phase: Prefill | Decode, *, calibration: Calibration,
    engine: Engine | None = None, cache: CacheFormat | None = None, with_footprint: bool = True,
) -> Bare:  # fmt: skip
    """Bound, expected time and footprint without rows or interval, for numbers or arrays.

    Numbers asked over and over of the same objects (a model, a cluster, a calibration, ...) and degrees are answered by a recording of
    the fold (`replay`), which is kept for the next question.
    """
    numbers, degrees = _numbers(phase), _DEGREES(layout)
    kind = type(phase)

    def question(*given: Num) -> Sequence[Num]:
        return folded(model, cluster, layout, kind(*given), calibration, engine, cache, with_footprint=with_footprint)

    if any(isinstance(x, np.ndarray) for x in (*numbers, *degrees)):
        return Bare(*question(*numbers))
    shared = model, cluster, calibration, engine, cache
    key = (*map(id, shared), degrees, kind, len(numbers), with_footprint)
    if key not in _asked:
        if len(_asked) >= _KEPT:
            _asked.clear()
        # the objects are kept with it, so that no other can take their place in memory
        _asked[key] = Often(question), shared
    return Bare(*_asked[key][0].answer(tuple(map(float, numbers))))


_DEGREES = attrgetter(*(f.name for f in fields(Layout) if f.init))
_asked: dict[tuple[Any, ...], tuple[Often, tuple[Any, ...]]] = {}
#: Questions whose recordings are kept.
_KEPT = 256


def _numbers(phase: Prefill | Decode) -> tuple[Num, ...]:
    """The numbers of a phase, in the order of its constructor."""
    if isinstance(phase, Decode):
        return phase.context, phase.batch, phase.new_tokens
    return (phase.context, phase.batch, phase.prefix) if phase.chunk is None else (phase.context, phase.batch, phase.prefix, phase.chunk)


def folded(
    model: ModelSpec, cluster: Cluster, layout: Layout, phase: Prefill | Decode, calibration: Calibration, engine: Engine | None,
    cache: CacheFormat | None, *, with_footprint: bool,
) -> tuple[Num, Num, Num, Num, Num]:  # fmt: skip
    """The fields of `Bare`."""
    system = System(model, layout, cache)
    work = system.work(phase, host=engine.host(phase) if engine else None)
    arrays = any(isinstance(x, np.ndarray) for group in system.layout.groups.values() for x in (group.ranks, group.stride))
    clock = Clock(cluster, calibration) if arrays else clock_of(cluster, calibration)
    bound = bounded(clock)
    times = bound, calibrated(clock, demand=bound.demands)
    if not with_footprint:
        lower, seconds = fold(work, Together(*times))
        return lower, seconds, 0.0, 0.0, 0.0
    lower, seconds, (_, peak) = fold(work, Together(*times, PeakBytes(keeps_saved=False)))
    held = _held(system, phase, peak)
    return lower, seconds, held.total, held.weights, held.cache


#: Cells evaluated together: enough to hide the cost of a call, few enough that a layer's arrays stay near the core.
BLOCK = 16384
#: Rows of a layout below which they share a block with another's.
_FEW = 1024
#: Under the roots of primes plus degrees no two likely layouts weigh the same.
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
#: Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def sweep(
    model: ModelSpec, cluster: Cluster, layout: Layout, phase: Prefill | Decode, *,
    calibration: Calibration | None = None, engine: Engine | None = None, workers: int | None = None, block: int = BLOCK,
    with_footprint: bool = True,
) -> Bare:  # fmt: skip
    """`bare` over arrays of any length, block by block; equal to it cell by cell.

    Rows of a layout are evaluated together, and what all rows of a block share is asked as a number.  More than two blocks are
    shared among `workers` processes (default: one per core), forked once and kept; where the system cannot fork, one after
    the other.
    """
    calibration = calibration or Calibration.load(cluster.gpu)
    asked = {"layout": layout, "phase": phase}
    arrays = [(part, f.name) for part, thing in asked.items() for f in fields(thing) if isinstance(getattr(thing, f.name), np.ndarray)]
    cells = max((np.size(getattr(asked[part], name)) for part, name in arrays), default=1)
    values = [np.broadcast_to(getattr(asked[part], name), cells) for part, name in arrays]
    names = [f.name for f in fields(Bare)]
    pool = _pool(workers or os.cpu_count() or 1) if cells > 2 * block else None
    most = cells if pool is None else len(_ARENA) // (8 * (len(arrays) + len(names)))
    degrees = {name: value for (part, name), value in zip(arrays, values, strict=True) if part == "layout"}
    order, blocks = _arranged(degrees, cells, min(block, max(most, 1)))
    shared = pickle.dumps((model, cluster, calibration, engine, _plain(layout), _plain(phase)))
    answers = np.empty((len(names), cells))
    with _LOCK:
        while blocks:
            first = blocks[0].start
            batch = [blocks.pop(0)]
            while blocks and blocks[0].stop - first <= most:
                batch.append(blocks.pop(0))
            rows = order[first : batch[-1].stop]
            memory = np.empty((len(arrays) + len(names), len(rows))) if pool is None else _arena(len(arrays) + len(names), len(rows))
            for row, value in enumerate(values):
                np.take(value, rows, out=memory[row])
            shares = [_Share(shared, tuple(arrays), len(rows), b.start - first, b.stop - first, with_footprint) for b in batch]
            if pool is None:
                for share in shares:
                    _answer(share, memory)
            else:
                pool.map(_answer, shares, chunksize=1)
            for answer, found in zip(answers, memory[len(arrays) :], strict=True):
                answer[rows] = found
    return Bare(*answers)


def _arranged(degrees: Mapping[str, Array], cells: int, block: int) -> tuple[npt.NDArray[np.intp], list[slice]]:
    """The order in which cells are evaluated, and which of them together: those of a layout as far as a block goes, layouts of
    few cells with their neighbours, but never two depths of pipeline, whose trees have different stages.  Deep ones, which
    take longest, come first.
    """
    order, changes, deeper = np.arange(cells), np.zeros(0, dtype=int), set[int]()
    if degrees:
        # one number per layout, but for chance: what a block's rows share is looked up in them, not in it
        key: Array = sum((np.sqrt(prime + value) for prime, value in zip(_PRIMES, degrees.values(), strict=False)), np.zeros(cells))
        depth = degrees.get("pp", np.zeros(cells))
        order = np.argsort(key - 1e3 * depth)
        changes = np.flatnonzero(np.diff(key[order])) + 1
        deeper = set((np.flatnonzero(np.diff(depth[order])) + 1).tolist())
    blocks: list[slice] = []
    start = 0
    for stop in (*changes.tolist(), cells):
        if stop > start and (stop - start >= min(block, _FEW) or stop in deeper or stop == cells):
            parts = -(-(stop - start) // block)
            edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
            blocks += [slice(*pair) for pair in itertools.pairwise(edges)]
            start = stop
    return order, blocks


class _Share(NamedTuple):
    """A block's cells, `start` to `stop` of `cells` that lie in the arena, and what all cells have in common, as bytes a worker
    unpacks once.  `arrays` names the rows of the arena that are questions; the rows after them are the answers.
    """

    shared: bytes
    arrays: tuple[tuple[str, str], ...]
    cells: int
    start: int
    stop: int
    with_footprint: bool


@lru_cache(maxsize=4)
def _unpacked(shared: bytes) -> tuple[ModelSpec, Cluster, Calibration, Engine | None, Layout, Prefill | Decode]:
    """Our own bytes, back from `sweep`."""
    unpacked: tuple[ModelSpec, Cluster, Calibration, Engine | None, Layout, Prefill | Decode]
    unpacked = pickle.loads(shared)  # noqa: S301 (written by sweep, in this process's own pool)
    return unpacked


def _answer(share: _Share, memory: Array | None = None) -> None:
    """Write the fields of `Bare` as rows behind the questions."""
    model, cluster, calibration, engine, layout, phase = _unpacked(share.shared)
    names = [f.name for f in fields(Bare)]
    memory = _arena(len(share.arrays) + len(names), share.cells) if memory is None else memory
    cut = memory[:, share.start : share.stop]
    given: dict[str, dict[str, Num]] = {"layout": {}, "phase": {}}
    for (part, name), values in zip(share.arrays, cut, strict=False):
        given[part][name] = float(values[0]) if values[0] == values[-1] and np.all(values == values[0]) else values
    found = bare(
        model, cluster, replace(layout, **given["layout"]), replace(phase, **given["phase"]),  # type: ignore[arg-type]
        calibration=calibration, engine=engine, with_footprint=share.with_footprint,
    )  # fmt: skip
    for name, answer in zip(names, cut[len(share.arrays) :], strict=True):
        answer[:] = getattr(found, name)


#: Memory shared with the workers, made before they are forked: questions and answers need not be copied through pipes.
_ARENA = mmap.mmap(-1, 1 << 25)
_LOCK = threading.Lock()


def _arena(rows: int, cells: int) -> Array:
    """The first rows x cells numbers of the shared memory."""
    return np.frombuffer(_ARENA, dtype=np.float64, count=rows * cells).reshape(rows, cells)


def _plain(thing: Any) -> Any:
    """The same question with its arrays left out."""
    arrays = [f.name for f in fields(thing) if f.init and isinstance(getattr(thing, f.name), np.ndarray)]
    return replace(thing, **dict.fromkeys(arrays, 1.0))


@cache
def _pool(workers: int) -> multiprocessing.pool.Pool | None:
    """Worker processes, or None where they would not help or cannot be forked."""
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():  # noqa: PLR2004 (one worker is this process)
        return None
    pool = multiprocessing.get_context("fork").Pool(workers, initializer=_keep_memory)
    atexit.register(pool.terminate)
    return pool


def _keep_memory() -> None:
    """Let a worker keep the arrays it frees: block after block allocates the same sizes, and to return them to the
    system each time costs as much as the arithmetic.  Only where the C library has the knob (glibc's mallopt).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        mallopt(_M_TRIM_THRESHOLD, 1 << 29)


__all__ = ["RESOURCE_NAMES", "Bare", "Count", "Engine", "Estimate", "Interval", "bare", "binding_resource", "check", "estimate", "interval", "sweep"]
