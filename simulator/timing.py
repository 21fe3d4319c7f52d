"""Seconds of an op on a GPU: its bound from compulsory quantities, its expected time from launched ones.

t = launch_s + (sum over resources of (work / (peak x attained))^p)^(1/p); p -> infinity is perfect overlap inside the
kernel, p = 1 none.  attained(tensor) = tensor x fill(tiles, SMs) x depth / (depth + depth_half); attained(memory) and
attained(special) are constants; what a kernel finds in the L2 cache, because the one before it wrote it, moves at `handed` of the
HBM's peak, which may exceed 1; a tile's exponentials add to its products (`special` says what remains of them once they
overlap: it may exceed 1); the power limit is a resource of its own, on which useful products run at `sustained` of the
peak whatever the tiling (an H200 does 780 TFLOP/s of bf16 for milliseconds and 670 for longer), and memory traffic takes `heat`
of it.  launch_s is the one
small-size term (split decode adds merge_s per partial result).  An op without work takes no time.
Source: FORMULAS 3.7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from simulator.calibration import Calibration
from simulator.collectives import Port, carry, port
from simulator.data import observed
from simulator.hardware import Cluster, Gpu
from simulator.launch import fills, launch
from simulator.units import Bytes, Num, Seconds, maximum, minimum, raise_to, root, where
from simulator.work import Demands, Group, Known, Leaf, Message, Op, Repeat, SecondsOverlapped, SecondsSerial, Serial, Work, fold

#: Bytes that no multiprocessor of any GPU here loads or stores more of per clock, whatever cache they come from.
LOADED_PER_CLOCK = observed("loaded_per_clock")


class Clock:
    """Turns ops into seconds on one cluster under one calibration.  Ports are worked out once per group."""

    def __init__(self, cluster: Cluster, calibration: Calibration) -> None:
        self.cluster, self.gpu, self.calibration = cluster, cluster.gpu, calibration
        self._ports: dict[tuple[object, ...], tuple[Group, Port]] = {}
        self._peaks: dict[str, float] = {}
        # a bound rests on nothing assumed
        self._knows_units = not {"units", "max_clock_hz", "sfu_per_clock"} & {*cluster.gpu.assumed}

    def peak(self, math: str) -> float:
        """FLOP/s of an element type at the maximum clock."""
        if math not in self._peaks:
            self._peaks[math] = float(self.gpu.peak_flops_per_s(math))
        return self._peaks[math]

    def port(self, op: Message) -> Port:
        """What the message meets: by the group's numbers, or by the group itself where they are arrays."""
        group = op.group
        plain = isinstance(group.ranks, float) and isinstance(group.stride, float)
        key = (op.pattern, group.ranks, group.stride) if plain else (op.pattern, id(group))
        if key not in self._ports:
            self._ports[key] = (group, port(op.pattern, group, self.cluster, measured=self.calibration.links))
        return self._ports[key][1]

    def demand(self, op: Leaf) -> Mapping[str, Seconds]:
        """Seconds each resource is occupied at its peak by the compulsory work of `op`."""
        gpu = self.gpu
        if isinstance(op, Message):
            through = self.port(op)
            return {"link": least_wire(op) * (through.share / through.bytes_per_s)}
        if op.kernel == "host":
            return {"host": op.shape["seconds"]}
        if op.kernel == "host_copy":
            return {"link": op.hbm_bytes * (1 / gpu.host_bytes_per_s)}
        found: dict[str, Seconds] = {}
        if op.kernel == "elementwise":
            found["hbm"] = least_traffic(op, gpu) * (1 / gpu.hbm_bytes_per_s)
            if self._knows_units:
                found["l2"] = op.hbm_bytes * (1 / (gpu.units * gpu.max_clock_hz * LOADED_PER_CLOCK))
            return found
        found["hbm"] = op.hbm_bytes * (1 / gpu.hbm_bytes_per_s)
        if type(op.tensor_flops) is not float or op.tensor_flops:
            found["tensor"] = op.tensor_flops * (1 / self.peak(op.math))
            if self._knows_units and (type(op.exponentials) is not float or op.exponentials):
                found["special"] = op.exponentials * (1 / gpu.sfu_per_s)
        return found

    def bound(self, op: Leaf) -> Seconds:
        """The least time: the busiest resource at peak, no calibration."""
        return busiest(self.demand(op))

    def expected(self, op: Leaf) -> Seconds:
        """The calibrated time of the op alone."""
        constants = self.calibration.constants(op.family)
        if isinstance(op, Message):
            return carry(op.wire_bytes, self.port(op), constants.memory)
        if op.kernel == "host":
            return op.shape["seconds"] / constants.memory
        if op.kernel == "host_copy":
            through = op.hbm_bytes * (1 / (self.gpu.host_bytes_per_s * constants.memory))
            return where_any(op.hbm_bytes, smooth_max([through, constants.launch_s], constants.power))
        launched, gpu = launch(op, self.gpu), self.gpu
        moved = launched.hbm_bytes
        pace: Num = 1.0
        if constants.variant != 1.0:
            pace = where(launched.variant > 0, 1 / constants.variant, 1.0)
        each: Num = (pace if launched.streams else 1.0) / (gpu.hbm_bytes_per_s * constants.memory)
        if constants.handed and (type(launched.found) is not float or launched.found):
            each = each + launched.found * (1 / (gpu.hbm_bytes_per_s * constants.handed) - each)
        parts = [moved * each]
        if type(launched.tensor_flops) is not float or launched.tensor_flops:
            slow = pace / fills(launched, constants.split, constants.wave, constants.step)
            peak = self.peak(op.math)
            deep = (1 + constants.depth_half / maximum(launched.depth, 1e-9)) / (peak * constants.tensor)
            compute = launched.tensor_flops * deep
            if type(launched.exponentials) is not float or launched.exponentials:
                special = launched.exponentials * (1 / (gpu.sfu_per_s * constants.special))
                if constants.window:
                    special = special * (1 + constants.window * launched.windowed)
                if constants.power:
                    compute = compute + special
                else:  # perfect overlap
                    parts.append(special * slow)
            parts.append(compute * slow)
            if constants.sustained:
                power = op.tensor_flops * (1 / (peak * constants.sustained))
                parts.append(power + moved * (constants.heat / gpu.hbm_bytes_per_s))
        fixed: Num = constants.launch_s
        if constants.merge_s:
            fixed = fixed + constants.merge_s * (launched.splits - 1)
        return where_any(op.hbm_bytes, smooth_max(parts, constants.power) + fixed)


Value = TypeVar("Value")


def once(function: Callable[[Leaf], Value]) -> Callable[[Leaf], Value]:
    """The same function, worked out once for every leaf that algebras ask about."""
    known: dict[Leaf, Value] = {}

    def remembered(op: Leaf) -> Value:
        if op not in known:
            known[op] = function(op)
        return known[op]

    return remembered


_clocks: dict[tuple[int, int], Clock] = {}


def clock_of(cluster: Cluster, calibration: Calibration) -> Clock:
    """The clock of a cluster under a calibration, kept for the next single question about the same two."""
    key = (id(cluster), id(calibration))
    found = _clocks.get(key)
    if found is None or found.cluster is not cluster or found.calibration is not calibration:
        if len(_clocks) >= 16:  # noqa: PLR2004 (a handful of machines is plenty)
            _clocks.clear()
        found = _clocks[key] = Clock(cluster, calibration)
    return found


def where_any(work: Num, seconds: Seconds) -> Seconds:
    """`seconds` where there is work, else nothing."""
    if isinstance(work, np.ndarray) and np.minimum.reduce(work, axis=None) > 0:
        return seconds
    return where(work > 0, seconds, 0.0)


def least_traffic(op: Op, gpu: Gpu) -> Bytes:
    """What an elementwise op must pass through HBM: of what it is handed a cache's worth may lie in the L2 cache when it starts, and of
    what it hands on as much when it ends.
    """
    handed = op.shape["handed_bytes"]
    if type(handed) is float and not handed:
        return op.hbm_bytes
    least = maximum(op.hbm_bytes - 2.0 * gpu.l2_bytes, 0.0)
    return where(handed > 0, least, op.hbm_bytes) if isinstance(handed, np.ndarray) else least


def least_wire(op: Message) -> Num:
    """What any algorithm must put on a rank's port: a reduction in the network sends each byte once."""
    return minimum(op.wire_bytes, op.payload_bytes) if op.pattern == "all_reduce" else op.wire_bytes


def smooth_max(parts: list[Num], power: int) -> Num:
    """(sum x^p)^(1/p) for a power of two p; the plain maximum for p = 0."""
    if len(parts) == 1:
        return parts[0]
    if power == 0:
        largest = parts[0]
        for part in parts[1:]:
            largest = maximum(largest, part)
        return largest
    total: Num = 0.0
    for part in parts:
        total = total + raise_to(part, power)
    return root(total, power)


def busiest(demand: Mapping[str, Seconds]) -> Seconds:
    """The seconds of the resource that is occupied the longest."""
    least: Seconds = 0.0
    for seconds in demand.values():
        least = seconds if type(least) is float and least == 0.0 else maximum(least, seconds)
    return least


def bounded(clock: Clock, demand: Callable[[Leaf], Mapping[str, Seconds]] | None = None) -> SecondsOverlapped:
    """The algebra of bounds: peak rates whatever the calibration, overlap where the tree says so.  `demand` may be the clock's,
    worked out `once`.
    """
    asked = demand or clock.demand
    return SecondsOverlapped(lambda op: busiest(asked(op)), asked)


def calibrated(
    clock: Clock, seconds: Callable[[Leaf], Seconds] | None = None, demand: Demands | None = None
) -> SecondsOverlapped:
    """The algebra of expected times: calibrated leaves, overlap where the tree says so.  `seconds` and `demand` may be those
    that other algebras of the same clock ask for, so that they are worked out once.
    """
    seconds, asked = seconds or clock.expected, demand or clock.demand
    if clock.calibration.interference:
        return Interfering(seconds, asked, clock.calibration.taken)
    return SecondsOverlapped(seconds, asked)


class Interfering(SecondsOverlapped):
    """Expected times where messages take SMs from kernels beside them: a share s = `taken(pattern)`.

    While messages of m seconds move, kernels run at 1 - s of their rate: with c seconds of them, an overlap takes
    max(m, c + s min(m, c / (1 - s))); s of several messages is their mean by time.
    """

    def __init__(
        self, leaf_seconds: Callable[[Leaf], Seconds], demand: Callable[[Leaf], Mapping[str, Seconds]] | Demands, taken: Callable[[str], float]
    ) -> None:
        super().__init__(leaf_seconds, demand)
        self.lost = SecondsSerial(lambda op: leaf_seconds(op) * taken(op.pattern) if isinstance(op, Message) else 0.0)
        self.known: Known = {}

    def overlap(self, parts: Sequence[Work], values: list[Num]) -> Num:
        """As without interference, and never less than the slowed kernels."""
        free = super().overlap(parts, values)
        sent = [(part, value) for part, value in zip(parts, values, strict=True) if _sends(part)]
        if not sent:
            return free
        moving = _sum([value for _, value in sent])
        share = _sum([fold(part, self.lost, self.known) for part, _ in sent]) / maximum(moving, 1e-30)
        for part, running in zip(parts, values, strict=True):
            if not _sends(part):
                free = maximum(free, running + share * minimum(moving, running / (1 - share)))
        return free


def _sum(values: Sequence[Num]) -> Num:
    first, *rest = values
    for value in rest:
        first = first + value
    return first


def _sends(work: Work) -> bool:
    """Whether a part of an overlap is messages alone."""
    if isinstance(work, Message):
        return True
    if isinstance(work, Repeat):
        return _sends(work.work)
    return isinstance(work, Serial) and bool(work.parts) and all(_sends(part) for part in work.parts)


def seconds_bound(work: Work, clock: Clock) -> Seconds:
    """The least time of a tree."""
    value: Seconds = fold(work, bounded(clock))
    return value


def seconds_expected(work: Work, clock: Clock) -> Seconds:
    """The expected time of a tree."""
    value: Seconds = fold(work, calibrated(clock))
    return value


def seconds_no_overlap(work: Work, clock: Clock) -> Seconds:
    """Calibrated leaves, everything serial: the upper figure."""
    value: Seconds = fold(work, SecondsSerial(clock.expected))
    return value
