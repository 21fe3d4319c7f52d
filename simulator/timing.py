"""Seconds of an op on a GPU: its bound from compulsory quantities, its expected time from launched ones.

t = launch_s + (sum over resources of (work / (peak x attained))^p)^(1/p); p -> infinity is perfect overlap inside the
kernel, p = 1 none.  attained(tensor) = tensor x fill(tiles, SMs) x depth / (depth + depth_half); attained(memory) =
memory x bytes / (bytes + bytes_half).  An op without work takes no time.  Source: FORMULAS 3.7.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulator.calibration import Calibration, Constants
from simulator.hardware import Cluster
from simulator.launch import carry, fills, launch, port
from simulator.units import Num, Seconds, maximum, minimum, raise_to, root, where
from simulator.work import Leaf, Message, Op, SecondsOverlapped, SecondsSerial, Work, fold


def host_seconds(op: Op, constants: Constants) -> Seconds:
    """Host work: so many seconds as its shape says (steps and launches at the engine's own figures)."""
    return op.shape["seconds"] / constants.memory


class Clock:
    """Turns ops into seconds on one cluster under one calibration."""

    def __init__(self, cluster: Cluster, calibration: Calibration) -> None:
        self.cluster, self.gpu, self.calibration = cluster, cluster.gpu, calibration

    def demand(self, op: Leaf) -> Mapping[str, Seconds]:
        """Seconds each resource is occupied at its peak by the compulsory work of `op`."""
        gpu = self.gpu
        if isinstance(op, Message):
            wire, rate, _ = port(op, self.cluster)
            return {"link": least_wire(op, wire) / rate}
        if op.kernel == "host":
            return {"host": op.shape["seconds"]}
        found: dict[str, Seconds] = {"hbm": op.hbm_bytes / gpu.hbm_bytes_per_s}
        if type(op.tensor_flops) is not float or op.tensor_flops:
            found["tensor"] = op.tensor_flops / gpu.peak_flops_per_s(op.math)
            if type(op.exponentials) is not float or op.exponentials:
                found["special"] = op.exponentials / gpu.sfu_per_s
        return found

    def bound(self, op: Leaf) -> Seconds:
        """The least time: the busiest resource at peak, no calibration."""
        values = list(self.demand(op).values())
        least = values[0]
        for value in values[1:]:
            least = maximum(least, value)
        return least

    def expected(self, op: Leaf) -> Seconds:
        """The calibrated time of the op alone."""
        constants = self.calibration.constants(op.family)
        if isinstance(op, Message):
            sent = carry(op, self.cluster)
            return sent.wire_bytes / (sent.bytes_per_s * constants.memory) + sent.latency_s + where(
                sent.wire_bytes > 0, constants.launch_s, 0.0
            )  # fmt: skip
        if op.kernel == "host":
            return host_seconds(op, constants)
        launched, gpu = launch(op, self.gpu), self.gpu
        moved = launched.hbm_bytes
        memory = (moved + constants.bytes_half) / (gpu.hbm_bytes_per_s * constants.memory)
        if type(op.tensor_flops) is float and not op.tensor_flops:
            return where(moved > 0, memory + constants.launch_s, 0.0)
        deep = (launched.depth + constants.depth_half) / launched.depth
        filled = fills(launched, constants.wave)
        tensor = launched.tensor_flops * deep / (gpu.peak_flops_per_s(op.math) * constants.tensor * maximum(filled, 1e-9))
        parts = [tensor, memory]
        if type(launched.exponentials) is not float or launched.exponentials:
            parts.append(launched.exponentials / (gpu.sfu_per_s * constants.special * maximum(filled, 1e-9)))
        return where(op.tensor_flops + moved > 0, smooth_max(parts, constants.power) + constants.launch_s, 0.0)


def least_wire(op: Message, wire: Num) -> Num:
    """What any algorithm must put on a rank's port: a reduction in the network sends each byte once."""
    return minimum(wire, op.payload_bytes) if op.pattern == "all_reduce" else wire


def smooth_max(parts: list[Num], power: int) -> Num:
    """(sum x^p)^(1/p) for a power of two p; the plain maximum for p = 0."""
    if power == 0:
        largest = parts[0]
        for part in parts[1:]:
            largest = maximum(largest, part)
        return largest
    total: Num = 0.0
    for part in parts:
        total = total + raise_to(part, power)
    return root(total, power)


def seconds_bound(work: Work, cluster: Cluster) -> Seconds:
    """No calibration, full overlap where the tree says so."""
    clock = Clock(cluster, Calibration.none())
    value: Seconds = fold(work, SecondsOverlapped(clock.bound, clock.demand))
    return value


def seconds_expected(work: Work, clock: Clock) -> Seconds:
    """Calibrated leaves, overlap where the tree says so."""
    value: Seconds = fold(work, SecondsOverlapped(clock.expected, clock.demand))
    return value


def seconds_no_overlap(work: Work, clock: Clock) -> Seconds:
    """Calibrated leaves, everything serial: the upper figure."""
    value: Seconds = fold(work, SecondsSerial(clock.expected))
    return value
