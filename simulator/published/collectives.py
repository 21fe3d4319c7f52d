"""Collectives: bus bandwidths and times as nccl-tests defines them, turned into seconds of one call."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from simulator.calibration import Calibration
from simulator.collectives import carry, port
from simulator.dtypes import BF16
from simulator.estimate import Interval, interval
from simulator.hardware import Cluster
from simulator.kernels.messages import message
from simulator.parallel.expert import distinct_nodes
from simulator.published.kernels import GIGA, MS, timed
from simulator.published.table import Asked, Measurement, machine, refuse
from simulator.timing import Clock
from simulator.work import Group

_PATTERNS = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "alltoall": "all_to_all", "all_to_all": "all_to_all",
}  # fmt: skip
_SIZES = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
#: Bytes of a message whose author calls it large: the time is all bandwidth.
LARGE_BYTES = 8 * 2.0**30


def _bytes(row: Measurement) -> float:
    """The message's size; nccl-tests counts K, M and G in powers of two, and some print those in decimal (33 MB is 2^25)."""
    text = row.inputs.get("message") or row.inputs.get("bytes") or row.other_inputs
    if re.search(r"\blarge\b", text):
        return LARGE_BYTES
    found = re.search(r"([\d,]+)\s*([KMG]?i?B)?\b", text)
    if found is None:
        refuse("the message's size is not stated")
    size = float(found[1].replace(",", "")) * _SIZES[found[2] or "B"]
    return 2.0 ** round(math.log2(size)) if found[2] in ("KB", "MB", "GB") else size


def _call(name: str, on: Cluster, payload: float, algorithm: str | None = None) -> tuple[float, Callable[[float], Asked]]:
    """Wire bytes of a rank (the numerator of a bus bandwidth) and what makes the question of measured seconds.  Where the
    run was made to use one `algorithm`, so are we.
    """
    pattern = _PATTERNS.get(name.partition(" ")[0])
    if pattern is None:
        refuse(f"{name}: not modelled")
    op = message(name, pattern, group=Group("all", float(on.gpus)), payload_bytes=payload)
    if algorithm is None:
        return float(op.wire_bytes), lambda seconds: timed(op, on, seconds)

    def answer(calibration: Calibration) -> Interval:
        share = calibration.constants(op.family).memory
        value = float(carry(op.wire_bytes, port(pattern, op.group, on, algorithm=algorithm), share))
        return interval({op.family: value}, calibration, value, float(Clock(on, calibration).bound(op)))

    return float(op.wire_bytes), lambda seconds: Asked(seconds, "s", answer, on)


def _algorithm(row: Measurement) -> str | None:
    """The algorithm a row names."""
    told = f"{row.kernel_or_engine} {row.hardware}"
    if "no NVLS" in told or told.endswith(" ring"):
        return "ring"
    return "nvls" if "NVLS" in told else None


def bus_bandwidth(row: Measurement) -> Asked:
    """nccl-tests' bus bandwidth: wire bytes of a ring rank per second, (2) (n - 1) / n x message."""
    named = row.other_inputs.partition(" ")[0]
    stated = named if named in _PATTERNS else row.parallelism
    wire, ask = _call(stated, machine(row), _bytes(row), _algorithm(row))
    return ask(wire / (float(row.value) * GIGA))


def timed_collective(row: Measurement) -> Asked:
    """The NCCL runs of aiconfigurator: milliseconds of one call; bytes as nccl-tests counts them."""
    on = machine(row)
    _, ask = _call(row.inputs["collective"], on, float(re.match(r"\d+", row.inputs["bytes"])[0]))  # type: ignore[index]
    return ask(float(row.value) * MS)


#: What DeepEP's own tests send: 256 experts, 8 a token, of at most 4 nodes; fp8 with an fp32 scale per 128.
_EXPERTS, _TOP, _NODES, _FP8_BYTES = 256, 8, 4, 1 + 4 / 128
#: What travels with every row of its low-latency dispatch: where it came from.  Choices that the test of those kernels masks.
_LOW_LATENCY_BYTES, _MASKED = 16, 10


def deep_ep(row: Measurement) -> Asked:
    """DeepEP's bandwidths: the bytes its own tests count, rows that stay at home among them, per second.

    Normal kernels: rows to all distinct nodes of a token (within a node: to all distinct ranks).  A row crosses once for each other
    node and is handed on to each rank there once, while others cross: the longer of NIC and NVLink.  Low-latency kernels: a row to each
    of the k experts, over NVLink inside a node (8 ranks show 98 and 127 GB/s with NICs of 50).
    Its router picks nodes by their best expert, so that rows go to nearly all of those it picks (3.98 of 4, drawn at random).
    Source: deepseek-ai/DeepEP@dd758caf tests/legacy/test_internode.py (num_rdma_token_sent, recv_x), test_intranode.py,
    test_low_latency.py (num_selections).
    """
    on = machine(row)
    dispatched = row.inputs["op"] == "dispatch"
    row_bytes = row.number("hidden") * (_FP8_BYTES if dispatched else BF16.bytes)
    if "low-latency" in row.kernel_or_engine:
        each = row_bytes + (_LOW_LATENCY_BYTES if dispatched else 0)
        counted = (row.number("tokens_per_gpu") * _TOP - _MASKED) * each
        return timed(message("rows", "dispatch", group=Group("all", float(on.gpus)), payload_bytes=counted), on, counted / (float(row.value) * GIGA))
    local = min(on.gpus, on.gpus_per_node)
    nodes = on.gpus // local
    chosen = min(nodes, _NODES)
    distinct = distinct_nodes(nodes=float(nodes), experts=_EXPERTS, top_k=_TOP) if chosen == nodes else float(chosen)
    ranks = distinct_nodes(nodes=float(on.gpus), experts=_EXPERTS, top_k=_TOP, limit=float(chosen * local))
    sent, handed = (float(row.number("tokens_per_gpu") * each * row_bytes) for each in (distinct, ranks))
    inside = message("hand on", "dispatch", group=Group("node", float(local)), payload_bytes=handed)
    across = message("cross", "dispatch", group=Group("nodes", float(nodes), float(local)), payload_bytes=sent)

    def answer(calibration: Calibration) -> Interval:
        clock = Clock(on, calibration)
        op = max((inside, across), key=lambda one: float(clock.expected(one)))
        value = float(clock.expected(op))
        return interval({op.family: value}, calibration, value, float(clock.bound(op)))

    return Asked((handed if nodes == 1 else sent) / (float(row.value) * GIGA), "s", answer, on)


SOURCES: Mapping[str, Callable[[Measurement], Asked]] = {
    "nccl-threads": bus_bandwidth, "coreweave-nccl-tests-pr-43": bus_bandwidth, "nccl-tests-issue-78": bus_bandwidth, "deepep-v1": deep_ep,
}  # fmt: skip
