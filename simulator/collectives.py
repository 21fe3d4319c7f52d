"""Which algorithm carries a message, and how long it takes: ring, tree, in-switch reduction (NVLS) or direct sends,
under NCCL's protocols LL, LL128 and Simple.

Legend: n ranks of the group, l of them on each node, m = n / l nodes, S payload (nccl-tests), w wire bytes of a rank.
A `Lane` is one algorithm under one protocol: t = latency + w x scale / rate.  NCCL takes the fastest for the size, and so
does `carry`.  Everything is closed form, for numbers and arrays alike.
A reduction in the switch is held by the port, which carries S (1 + 1 / h) of h = min(n, 32) heads, or by NCCL's channels, each of
which copies its share of S into and out of a buffer: 8 B200 and 72 GB300 attain the same 486 GB/s of S over 24 channels.
Rows sent to their experts (`dispatch`) go by DeepEP's kernels, which attain less of a link than NCCL's.
Neglected: the smaller chunks of messages below 64 x heads x channels x 128 KiB (6.4 GB in a rack), at which 72 GB300 run 6 % slower;
that more channels serve reductions across nodes, where NICs hold them.
Source: NVIDIA/nccl@5067397c src/graph/tuning.cc (ncclTopoTuneModel), src/transport/nvls.cc; FORMULAS 5.1, 5.3.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from simulator.calibration import MeasuredLink
from simulator.data import data_path
from simulator.hardware import Cluster, link_seeds
from simulator.units import Bytes, BytesPerSecond, Num, Seconds, floor, maximum, minimum, where
from simulator.work import Group


class Lane(NamedTuple):
    """One way to carry a message: seconds before its first byte, and its seconds per wire byte over those of the port."""

    name: str
    latency_s: Seconds
    scale: Num


class Port(NamedTuple):
    """What messages of one pattern meet in one group: everything of their time but their size.

    `share` of the wire bytes passes this rank's slowest port at `bytes_per_s`, the link's own rate.
    """

    share: Num
    bytes_per_s: BytesPerSecond
    lanes: tuple[Lane, ...]


class Attained(NamedTuple):
    """Figures of data/hardware/collectives.toml by name."""

    payload: dict[str, float]
    rate: dict[str, float]
    peers: dict[str, float]
    ramp: dict[str, float]
    switch: dict[str, float]
    dispatch: dict[str, float]


@cache
def attained() -> Attained:
    """What collectives attain of a link."""
    tables = tomllib.loads(data_path("hardware", "collectives.toml").read_text("utf-8"))
    return Attained(*({key: float(row["value"]) for key, row in tables[name].items()} for name in Attained._fields))


def figure(table: str, prefix: str, architecture: str) -> float:
    """An architecture's figure; Hopper's where it has none."""
    rows: dict[str, float] = getattr(attained(), table)
    return rows.get(prefix + architecture, rows[f"{prefix}hopper"])


class Span(NamedTuple):
    """How a group lies on the machine: ranks per node, nodes, whether it leaves the scale-up domain, and the rates."""

    local: Num
    nodes: Num
    outside: Any
    inner_bytes_per_s: BytesPerSecond
    outer_bytes_per_s: BytesPerSecond
    inner_kind: str
    outer_kind: str
    inner_payload: float
    outer_payload: float


def span(group: Group, cluster: Cluster) -> Span:
    """Where `group` lies: l = min(n, floor(node / stride)) ranks to a node, at least one."""
    n = group.ranks
    first, last = cluster.tiers[0], cluster.tiers[-1]
    payload = attained().payload
    inner = figure("payload", "", cluster.gpu.architecture) if first.kind in ("nvlink", "xgmi", "ici") else payload.get(first.kind, 1.0)
    outer = payload.get(last.kind, inner)
    crossing = cluster.tier(n, group.stride)
    outside = crossing.index > 0 if len(cluster.tiers) > 1 else False
    local = maximum(minimum(n, floor(first.domain / group.stride)), 1.0)
    local = where(outside, local, n)
    return Span(
        local, n / local, outside, first.group_bytes_per_s(where(outside, local, n)), last.bytes_per_s, first.kind, last.kind, inner, outer
    )


def port(
    pattern: str, group: Group, cluster: Cluster, *, algorithm: str | None = None, measured: tuple[MeasuredLink, ...] = ()
) -> Port:
    """Every lane of a rank of `group` that is the fastest for some size; `algorithm` pins one ("ring", "tree", "nvls").

    Inside one scale-up domain everything moves at the domain's rate.  Across nodes rings cross a node's edge once each,
    so they run at min(scale-up, l x NIC); an all-to-all or a dispatch sends (n - l) / (n - 1) of its wire bytes through the
    rank's own NIC; a group with one rank a node uses the NIC alone.  A pattern `measured` inside a scale-up domain, in a group of this size,
    takes what was measured.
    """
    if isinstance(group.ranks, np.ndarray) or isinstance(group.stride, np.ndarray):
        return _port_of_many(pattern, group, cluster, algorithm, measured)
    return _port(pattern, float(group.ranks), float(group.stride), cluster, algorithm, measured)


def _port_of_many(pattern: str, group: Group, cluster: Cluster, algorithm: str | None, measured: tuple[MeasuredLink, ...]) -> Port:
    """As many groups as an array has cells are few different ones: each is worked out once and looked up."""
    ranks, stride = np.asarray(group.ranks, dtype=np.int64), np.asarray(group.stride, dtype=np.int64)
    wide = int(stride.max()) + 1
    key = ranks * wide + stride
    if key.max() < _TABLE:
        there = np.zeros(int(key.max()) + 1, dtype=bool)
        there[key] = True
        few, place = np.flatnonzero(there), (np.cumsum(there) - 1)[key]
    else:
        few, place = np.unique(key, return_inverse=True)
    ports = [_port(pattern, float(k // wide), float(k % wide), cluster, algorithm, measured) for k in few]
    most = max(len(p.lanes) for p in ports)

    def column(values: list[Num]) -> Num:
        plain = [float(v) for v in values]
        return plain[0] if len(set(plain)) == 1 else np.array(plain)[place]

    lanes = [[p.lanes[min(i, len(p.lanes) - 1)] for p in ports] for i in range(most)]
    return Port(
        column([p.share for p in ports]), column([p.bytes_per_s for p in ports]),
        tuple(Lane(same[-1].name, column([x.latency_s for x in same]), column([x.scale for x in same])) for same in lanes),
    )  # fmt: skip


#: Patterns whose ranks send to each other without passing on.
DIRECT = ("all_to_all", "dispatch", "send")
#: Groups are told apart by a table up to this many (ranks, stride), by sorting beyond.
_TABLE = 2**20


@lru_cache(maxsize=4096)
def _port(
    pattern: str, ranks: float, stride: float, cluster: Cluster, algorithm: str | None, measured: tuple[MeasuredLink, ...]
) -> Port:
    group = Group(pattern, ranks, stride)
    where_ = span(group, cluster)
    n = group.ranks
    inner, outer = where_.inner_bytes_per_s, where_.outer_bytes_per_s
    known = next((link for link in measured if (link.pattern, link.ranks) == (pattern, n)), None)
    if known is not None and algorithm is None and not np.any(where_.outside):
        lines = sorted(zip(known.latency_s, known.bytes_per_s, strict=True))
        return Port(1.0, inner, tuple(Lane("measured", latency, inner / rate) for latency, rate in lines))
    few = figure("peers", "", cluster.gpu.architecture)
    if pattern == "dispatch":
        where_ = where_._replace(inner_payload=_dispatched(where_.inner_kind), outer_payload=_dispatched(where_.outer_kind))
        few = 0.0
    share: Num = 1.0
    if pattern in DIRECT:
        rate = where(where_.outside, outer, inner)
        full = where(where_.outside, outer * where_.outer_payload, inner * where_.inner_payload)
        if pattern != "send":
            share = where(where_.outside, maximum(n - where_.local, 0.0) / maximum(n - 1.0, 1.0), 1.0)
    else:
        edge = where(where_.local > 1, minimum(inner, outer * where_.local), outer)
        data = minimum(inner * where_.inner_payload, outer * where_.local * where_.outer_payload)
        rate = where(where_.outside, edge, inner)
        full = where(where_.outside, where(where_.local > 1, data, outer * where_.outer_payload), inner * where_.inner_payload)
    full = full * where(where_.outside, 1.0, (n - 1) / maximum(n - 1 + few, 1e-9))
    every = list(_lanes(pattern, group, cluster, where_, rate, maximum(full, 1.0)))
    lanes = [lane for lane in every if algorithm is None or lane.name.startswith(algorithm)]
    if not lanes:
        names = ", ".join(dict.fromkeys(lane.name.split()[0] for lane in every))
        message = f"algorithm {algorithm!r}: {cluster.gpu.name} carries no {pattern} of {n} ranks so; use {names}"
        raise ValueError(message)
    return Port(share, rate, _fastest(lanes))


def _dispatched(kind: str) -> float:
    """The share of a link that DeepEP's kernels attain."""
    attains = attained().dispatch
    return attains.get(kind, attains["nvlink"])


def _lanes(pattern: str, group: Group, cluster: Cluster, lies: Span, rate: Num, full: Num) -> Iterator[Lane]:
    n, seeds, figures = group.ranks, link_seeds(), attained()
    inter, steps = _steps(pattern, n, lies)
    ring_base, ring_in, ring_out = (seeds.latency_s[kind]["ring"] for kind in ("base", lies.inner_kind, lies.outer_kind))
    tree_out = seeds.latency_s[lies.outer_kind].get("tree", ring_out)
    ceiling = figure("rate", "ll_", cluster.gpu.architecture)
    name = "deepep" if pattern == "dispatch" else "ring"
    for protocol in ("ll", "ll128", "simple") if name == "ring" else ("simple",):
        # with one rank a node the network's latency is exposed: NCCL takes the tree's
        out = where(lies.local > 1, ring_out[protocol], tree_out[protocol])
        latency = ring_base[protocol] + (steps - inter) * ring_in[protocol] + inter * out
        scale = rate / full
        if protocol == "ll":
            scale = maximum(scale / figures.rate["ll"], rate / ceiling)
        elif protocol == "ll128":
            scale = scale / figures.rate["ll128"]
        filled = figures.ramp["direct_fill_s" if pattern in DIRECT else "ring_fill_s"]
        yield from _ramped(f"{name} {protocol}", latency, scale, figures, filled)
    if pattern != "all_reduce":
        return
    outside = bool(np.any(lies.outside))
    if outside:
        tree_base, tree_in = seeds.latency_s["base"]["tree"], seeds.latency_s[lies.inner_kind]["tree"]
        for protocol in ("ll", "ll128", "simple"):
            hops = 2 * ((lies.local - 1) * tree_in[protocol] + _log2(lies.nodes) * tree_out[protocol])
            slower = {"ll": 3.8, "ll128": 128 / 120, "simple": 1.0}[protocol] / 0.92
            # a tree sends and receives the tensor twice whatever n: 2 S against 2 (n - 1) / n S
            yield Lane(f"tree {protocol}", tree_base[protocol] + hops, slower * (rate / full) / maximum(group.others, 1e-9))
    efficiency = seeds.nvls_efficiency.get(cluster.gpu.architecture)
    if efficiency is None or lies.inner_kind != "nvlink":
        return
    ring_wire = maximum(2 * group.others, 1e-9)
    inside_s = (1 + 1 / minimum(lies.local, figures.switch["heads"])) / (lies.inner_bytes_per_s * lies.inner_payload * efficiency)
    channels_s = 1 / (figure("switch", "channels_", cluster.gpu.architecture) * figures.switch["channel_bytes_per_s"])
    between_s = 2 * (1 - 1 / lies.nodes) / (lies.local * lies.outer_bytes_per_s * lies.outer_payload)
    latency = seeds.latency_s[lies.inner_kind]["nvls"]["simple"]
    if outside:
        latency = latency + where(lies.outside, 2 * _log2(lies.nodes) * seeds.latency_s[lies.outer_kind]["nvls"]["simple"], 0.0)
    scale = maximum(maximum(inside_s, channels_s), where(lies.outside, between_s, 0.0)) * rate / ring_wire
    # one rank a node has no switch to reduce in
    unusable = where(lies.local > 1, 0.0, np.inf)
    # a step of the pipeline ends when the last rank has posted it, and holds a chunk for every head: the more ranks, the longer to fill
    fill = figure("ramp", "nvls_fill_s_per_rank_", cluster.gpu.architecture) * lies.local
    yield from _ramped("nvls", latency + unusable, scale, figures, fill)


def _ramped(name: str, latency: Seconds, scale: Num, figures: Attained, fill: Seconds) -> Iterator[Lane]:
    """A lane while its chunks do not fill the pipeline, and once they do."""
    if name.endswith(("ll", "ll128")):
        yield Lane(name, latency, scale)
        return
    yield Lane(name, latency, scale * figures.ramp["slow"])
    yield Lane(name, latency + fill, scale)


def _steps(pattern: str, n: Num, lies: Span) -> tuple[Num, Num]:
    """Hops between nodes and hops in all."""
    if pattern == "all_reduce":
        return 2 * (lies.nodes - 1), 2 * (n - 1)
    if pattern in ("all_gather", "reduce_scatter", "broadcast"):
        return lies.nodes - 1, n - 1
    one = minimum(n - 1, 1.0)
    return where(lies.outside, one, 0.0), one


#: Sizes at which lanes are compared, in seconds at the port's own rate; a lane that is nowhere this much faster is left out.
_IDEAL_S = 2.0 ** np.arange(-40, 8)
_FASTER = 1.02


def _fastest(lanes: list[Lane]) -> tuple[Lane, ...]:
    """The lanes that are the fastest for some size, by at least 2 %; from the shortest messages to the longest."""
    kept = sorted((lane for lane in lanes if np.isfinite(lane.latency_s)), key=lambda lane: float(lane.latency_s))
    found = True
    while found and len(kept) > 1:
        seconds = np.array([lane.latency_s + lane.scale * _IDEAL_S for lane in kept])
        gains = [float(np.max(np.min(np.delete(seconds, i, axis=0), axis=0) / seconds[i])) for i in range(len(kept))]
        least = int(np.argmin(gains))
        found = gains[least] < _FASTER
        if found:
            del kept[least]
    return tuple(kept)


def carry(wire_bytes: Bytes, through: Port, attained_share: Num) -> Seconds:
    """Seconds of a message on the fastest of its lanes, at `attained_share` of their rate; no bytes take no time."""
    ideal = wire_bytes * (through.share / (through.bytes_per_s * attained_share))
    first, *rest = through.lanes
    seconds = first.latency_s + ideal * first.scale
    for lane in rest:
        seconds = minimum(seconds, lane.latency_s + ideal * lane.scale)
    return where(wire_bytes > 0, seconds, 0.0)


def chosen(wire_bytes: float, through: Port) -> str:
    """The algorithm and protocol that carries a message of this size.

    >>> from simulator.hardware import cluster
    >>> through = port("all_reduce", Group("tp", 8.0), cluster("h200", 8))
    >>> chosen(1e4, through), chosen(1e9, through)
    ('ring ll', 'nvls')
    """
    ideal = wire_bytes * (through.share / through.bytes_per_s)
    return min(through.lanes, key=lambda lane: float(lane.latency_s + ideal * lane.scale)).name


def _log2(n: Num) -> Num:
    return float(np.log2(n)) if isinstance(n, (int, float)) else np.log2(n)
