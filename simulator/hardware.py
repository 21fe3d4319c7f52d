"""GPUs, links and clusters: rates and sizes read from `data/hardware`, one file per GPU.

    peak FLOP/s = units x FLOP per clock per unit x maximum clock

The maximum clock makes the peak a bound; the datasheet rate (boost clock) and the best measured product (`attained`)
stand beside it.  Where no clock is known the datasheet's rate stands for the peak.  FLOP/s are dense, link rates one
direction per GPU, capacity is what the driver reports.  The source of each figure is in `Gpu.sources`.  Figures that a time
needs and nobody has published are taken in proportion from another GPU (`_stand_in`) and named in `Gpu.assumed`.  Message latencies
are NCCL's own seeds (`data/hardware/links.toml`).  A user's own GPUs are read by `simulator.hardware_file`.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simulator import hardware_file
from simulator.data import data_path
from simulator.units import (
    Bytes,
    BytesPerSecond,
    Count,
    FlopsPerSecond,
    Hertz,
    Num,
    Seconds,
    Watts,
    ceil,
    floor,
    maximum,
    minimum,
    where,
)

MAX_GPUS = 1_000_000
#: What the time of an op needs to know of a GPU beside its rates.
TIMED = ("units", "max_clock_hz", "sfu_per_clock", "l2_bytes")
#: The GPU whose proportions stand in for figures that are not published: the one that the priors describe.
STAND_IN = "h200_sxm"
FALLBACK = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "fp16": "bf16"}
"""The type a product runs in on a GPU that lacks the rate of its own type."""


@dataclass(frozen=True, slots=True)
class Link:
    """One way out of a GPU.

    `latency_s` is what one hop costs a message of no bytes (NCCL ring, LL protocol; `link_seeds` has the others).
    `domain` is the number of GPUs the link joins: 1 for a host link.  Where GPUs are wired in pairs (xGMI),
    `peer_bytes_per_s` is the rate to one neighbour.
    """

    name: str
    kind: str
    bytes_per_s: BytesPerSecond
    latency_s: Seconds
    domain: int
    peer_bytes_per_s: BytesPerSecond = math.inf

    def group_bytes_per_s(self, ranks: Count) -> BytesPerSecond:
        """What one GPU of a group of `ranks` can send within the group: pairwise wiring reaches ranks - 1 peers."""
        return minimum(self.bytes_per_s, self.peer_bytes_per_s * maximum(ranks - 1.0, 1.0))


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator.  Figures "per unit" are per SM (NVIDIA) or CU (AMD).

    A figure of 0 is not known; `assumed` names those of `TIMED` that are not published and were taken in proportion from another.
    `usable_bytes` is what the framework offers of `capacity_bytes` (torch `total_memory`), or the capacity where that is unknown.
    `l2_bytes` is the last cache before HBM.  `gpus_per_node` counts the GPUs of one host, which may be
    fewer than its scale-up domain.  `attained` holds the best matrix products measured, in FLOP/s by dtype;
    `sustained_clock_hz` the clock under long products at the power cap, None where unknown.  `borrows` names the GPU whose
    calibration stands in where this one has none.
    """

    name: str
    title: str
    vendor: str
    architecture: str
    compute_capability: str
    units: float
    max_clock_hz: Hertz
    boost_clock_hz: Hertz
    sustained_clock_hz: Hertz | None
    sfu_per_clock: float
    capacity_bytes: Bytes
    usable_bytes: Bytes
    hbm_bytes_per_s: BytesPerSecond
    l2_bytes: Bytes
    shared_memory_bytes_per_unit: Bytes | None
    tdp_w: Watts
    gpus_per_node: int
    links: tuple[Link, ...]
    flops_per_clock: Mapping[str, float] = field(hash=False)
    datasheet: Mapping[str, float] = field(hash=False)
    attained: Mapping[str, float] = field(hash=False)
    sources: Mapping[str, str] = field(hash=False, repr=False)
    borrows: str = ""
    price_usd_per_gpu_hour: float | None = None
    assumed: tuple[str, ...] = ()

    def unknown(self, figures: Sequence[str]) -> list[str]:
        """Which of `figures` are not known."""
        return [name for name in figures if not getattr(self, name)]

    def flops_per_unit_clock(self, dtype: str) -> float:
        """FLOP of one unit in one clock: the stated figure, else peak / (units x clock)."""
        kind = self.runs_as(dtype)
        return self.flops_per_clock.get(kind) or float(self.peak_flops_per_s(kind) / (self.units * self.max_clock_hz))

    @property
    def sfu_per_s(self) -> float:
        """Exponentials per second of the whole GPU at the maximum clock."""
        return float(self.units * self.sfu_per_clock * self.max_clock_hz)

    @property
    def host_bytes_per_s(self) -> BytesPerSecond:
        """Bytes per second to host memory, one direction; 0 where not known."""
        return next((link.bytes_per_s for link in self.links if link.kind in ("pcie", "c2c")), 0.0)

    def supports(self, dtype: str) -> bool:
        """Whether the GPU multiplies `dtype` at a rate of its own."""
        return dtype in self.datasheet

    def runs_as(self, dtype: str) -> str:
        """The type a product of `dtype` runs in: itself, or the next wider one the GPU has.

        >>> gpu("a100").runs_as("fp4")
        'bf16'
        """
        candidate = dtype
        while candidate not in self.datasheet:
            if candidate not in FALLBACK:
                message = (
                    f"dtype {dtype!r}: no multiplication rate on {self.name}; "
                    f"use one of {', '.join(sorted({*self.datasheet, *FALLBACK}))}"
                )
                raise ValueError(message)
            candidate = FALLBACK[candidate]
        return candidate

    def peak_flops_per_s(self, dtype: str) -> FlopsPerSecond:
        """Units x FLOP per clock per unit x maximum clock, in FLOP/s: no product is faster.  The datasheet's rate where no
        clock is known.

        >>> round(gpu("h200").peak_flops_per_s("bf16") / 1e12, 1)
        1070.5
        """
        kind = self.runs_as(dtype)
        if kind not in self.flops_per_clock:
            return self.datasheet[kind]
        return self.units * self.flops_per_clock[kind] * self.max_clock_hz

    def datasheet_flops_per_s(self, dtype: str) -> FlopsPerSecond:
        """The vendor's dense rate in FLOP/s, quoted at the boost clock."""
        return self.datasheet[self.runs_as(dtype)]


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """What a message crosses: the position in `Cluster.tiers`, bytes per second per GPU, seconds per hop."""

    index: Num
    bytes_per_s: BytesPerSecond
    latency_s: Seconds


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal GPUs joined by `tiers` of links, fastest first."""

    gpu: Gpu
    gpus: int
    tiers: tuple[Link, ...]
    price_usd_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        """Refuse a number of GPUs that is none."""
        if isinstance(self.gpus, bool) or not isinstance(self.gpus, (int, np.integer)):
            message = f"gpus {self.gpus!r}: must be an integer; write for example 8"
            raise ValueError(message)  # noqa: TRY004 - bad input is a ValueError throughout
        if not 1 <= self.gpus <= MAX_GPUS:
            message = f"gpus {self.gpus}: must be between 1 and {MAX_GPUS:,}; {self.gpu.gpus_per_node} fill one node"
            raise ValueError(message)
        widest = max((link.domain for link in self.tiers), default=1)
        if self.gpus > widest:
            message = f"gpus {self.gpus}: the links of {self.gpu.name} join {widest} and its network is not known; use at most {widest}"
            raise ValueError(message)

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one host."""
        return self.gpu.gpus_per_node

    @property
    def nodes(self) -> int:
        """Hosts needed."""
        return -(-self.gpus // self.gpus_per_node)

    def tier(self, ranks: Count, stride: Count = 1.0) -> Crossing:
        """The tier that the messages of a group cross; `ranks` and `stride` may be arrays.

        A group of `ranks` GPUs, every `stride`-th in rank order, shares a block of ranks x stride neighbours with the
        groups interleaved with it.  It stays inside a tier's domains if blocks can be laid out so that none straddles
        two of them: floor(gpus / block) <= ceil(gpus / domain) x floor(domain / block).  Assumed: whole blocks are
        placed first and the fewest domains are used.  A group of one rank sends nothing and stays in the first tier.

        >>> h200 = cluster("h200", gpus=16)
        >>> h200.tier(8).index, h200.tier(2, stride=8).index
        (0.0, 1.0)
        """
        block = ranks * stride
        last = self.tiers[-1]
        index: Num = float(len(self.tiers) - 1)
        rate, latency = last.group_bytes_per_s(ranks), last.latency_s
        for position, link in reversed(list(enumerate(self.tiers[:-1]))):
            inside = (ranks <= 1) | self._fits(block, link.domain)
            index = where(inside, float(position), index)
            rate = where(inside, link.group_bytes_per_s(ranks), rate)
            latency = where(inside, link.latency_s, latency)
        return Crossing(index, rate, latency)

    def _fits(self, block: Num, domain: int) -> bool | npt.NDArray[np.bool_]:
        return floor(self.gpus / block) <= ceil(self.gpus / domain) * floor(domain / block)


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per GPU-hour: the ends of what providers ask and what to reckon with; None where not found."""

    low: float | None
    typical: float | None
    high: float | None
    sources: Mapping[str, str] = field(hash=False, repr=False)


@dataclass(frozen=True, slots=True)
class LinkSeeds:
    """Constants of NCCL's tuner, from which its choice of algorithm and protocol can be followed.

    `latency_s[kind][algorithm][protocol]` is per hop (kind "base": once per call); `nvls_efficiency` is the share of
    the link rate that in-switch reduction attains, by GPU architecture.
    """

    latency_s: Mapping[str, Mapping[str, Mapping[str, float]]]
    nvls_efficiency: Mapping[str, float]


def gpu(name: str) -> Gpu:
    """The GPU called `name`: a catalog name, an alias, or what nvidia-smi prints ("NVIDIA H200").

    >>> gpu("h200").name
    'h200_sxm'
    """
    found = _resolve(name)
    return _own(found) if isinstance(found, Path) else _load(found)


def cluster(name: str | Gpu, gpus: int = 1) -> Cluster:
    """`gpus` GPUs of one kind with their own links, at the typical price.

    >>> cluster("gb200", gpus=72).nodes
    18
    """
    part = name if isinstance(name, Gpu) else gpu(name)
    cost = price(part)
    tiers = tuple(link for link in part.links if link.domain > 1)
    return Cluster(part, gpus, tiers, cost.typical if cost else None)


def catalog() -> tuple[str, ...]:
    """The names of all GPUs that ship with the tool."""
    return tuple(sorted(set(_spellings().values())))


def own() -> tuple[str, ...]:
    """The names of the GPUs in the user's folder."""
    return tuple(sorted({hardware_file.plain(file.stem) for file in _owned(hardware_file.user_folder()).values()}))


def price(part: str | Gpu) -> Price | None:
    """What an hour of one GPU costs, or None where no price was found."""
    part = gpu(part) if isinstance(part, str) else part
    if part.price_usd_per_gpu_hour is not None:
        return Price(None, part.price_usd_per_gpu_hour, None, {"typical": f"the file of {part.name}"})
    return _prices().get(part.name)


def _resolve(name: str) -> str | Path:
    """The file name of a shipped GPU, or the path of a user's own: a file that is named, else one of the folder, which
    comes before a shipped GPU of the same name.
    """
    spelling = name if isinstance(name, str) else ""
    if spelling.endswith(".toml"):
        return Path(spelling)
    key = hardware_file.plain(spelling)
    mine, known = _owned(hardware_file.user_folder()), _spellings()
    if key in mine:
        return mine[key]
    if key in known:
        return known[key]
    shortest = sorted([*(min((s for s in known if known[s] == stem), key=len) for stem in catalog()), *own()])
    near = difflib.get_close_matches(key, shortest, n=2, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    message = f"gpu {name!r}: not in the catalog; {hint}known: {', '.join(shortest)}, or a TOML file"
    raise ValueError(message)


@cache
def _owned(folder: Path) -> dict[str, Path]:
    return hardware_file.owned(folder)


@cache
def _spellings() -> dict[str, str]:
    """Every accepted spelling -> file name, from the files' heads (all that precedes the first table)."""
    known: dict[str, str] = {}
    for path in data_path("hardware").glob("*.toml"):
        head = tomllib.loads(path.read_text("utf-8").partition("\n[")[0])
        if "name" in head:
            known |= dict.fromkeys([head["name"], *head["aliases"]], path.stem)
    return known


def _read(*parts: str) -> dict[str, Any]:
    return tomllib.loads(data_path(*parts).read_text("utf-8"))


def _values(table: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(entry["value"]) for key, entry in table.items()}


def _cite(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    return {
        prefix + key: f"{entry['source']}, {entry['date']}" + (f" ({entry['basis']})" if "basis" in entry else "")
        for key, entry in table.items()
    }


@cache
def link_seeds() -> LinkSeeds:
    """NCCL's latencies and NVLS efficiencies."""
    tables = _read("hardware", "links.toml")
    efficiency = _values(tables.pop("nvls_efficiency"))
    protocols = ("ll", "ll128", "simple")
    latency = {
        kind: {algorithm: {p: float(row[p]) for p in protocols if p in row} for algorithm, row in table.items()}
        for kind, table in tables.items()
    }
    return LinkSeeds(latency, efficiency)


@cache
def _prices() -> dict[str, Price]:
    return {
        name: Price(**{end: _values(row).get(end) for end in ("low", "typical", "high")}, sources=_cite(row))
        for name, row in _read("prices.toml").items()
    }


@cache
def _load(stem: str) -> Gpu:
    return _made(_read("hardware", f"{stem}.toml"))


@cache
def _own(file: Path) -> Gpu:
    def shipped(name: str) -> dict[str, Any]:
        found = _resolve(name)
        if isinstance(found, Path):
            message = "must be a GPU that longctx gpus lists, not a file"
            raise ValueError(message)  # noqa: TRY004 (a user's mistake)
        return _read("hardware", f"{found}.toml")

    return _made(hardware_file.read(file, shipped, link_seeds().latency_s.keys() - {"base"}))


def _made(data: Mapping[str, Any]) -> Gpu:
    rates = {name: data[name] for name in ("flops_per_clock", "datasheet", "attained")}
    sources = _cite(data["figures"])
    for name, table in rates.items():
        sources |= _cite(table, f"{name}.")
    links = []
    for row in data["links"]:
        quoted = {key: entry for key, entry in row.items() if isinstance(entry, dict)}
        sources |= _cite(quoted, f"links.{row['name']}.")
        links.append(_link(row["name"], row["kind"], _values(quoted)))
    figures: dict[str, Any] = dict.fromkeys(_MAY_BE_UNKNOWN, 0.0)
    figures |= {"sustained_clock_hz": None, "shared_memory_bytes_per_unit": None, **_values(data["figures"])}
    figures.setdefault("usable_bytes", figures["capacity_bytes"])
    assumed = tuple(name for name in TIMED if not figures[name])
    if assumed:
        figures |= _stand_in(figures, float(data["datasheet"]["bf16"]["value"]))
    figures["gpus_per_node"] = int(figures["gpus_per_node"])
    identity = {key: data.get(key, "") for key in ("name", "title", "vendor", "architecture", "compute_capability", "borrows")}
    tables: dict[str, Any] = {name: _values(table) for name, table in rates.items()}
    price_usd = data.get("price_usd_per_gpu_hour")
    return Gpu(**identity, **figures, **tables, links=tuple(links), sources=sources, price_usd_per_gpu_hour=price_usd, assumed=assumed)


def _stand_in(figures: Mapping[str, float], bf16_flops_per_s: float) -> dict[str, float]:
    """What is not published of an accelerator, as if it were its dense bf16 rate's worth of an H200: as many more of its SMs,
    of its L2 and of its exponentials per second, at its boost clock.

    Kernels then attain the H200's shares of the peak and of the bandwidth, which is the meaning of an assumed time.
    """
    lender = _load(STAND_IN)
    worth, boost = bf16_flops_per_s / lender.datasheet["bf16"], float(lender.boost_clock_hz)
    clock = figures["max_clock_hz"] or boost
    units = figures["units"] or worth * lender.units * boost / clock
    exponentials = worth * lender.units * boost * lender.sfu_per_clock
    return {
        "max_clock_hz": clock, "boost_clock_hz": figures["boost_clock_hz"] or clock, "units": units,
        "sfu_per_clock": figures["sfu_per_clock"] or exponentials / (units * clock), "l2_bytes": figures["l2_bytes"] or worth * float(lender.l2_bytes),
    }  # fmt: skip


_MAY_BE_UNKNOWN = ("units", "max_clock_hz", "boost_clock_hz", "sfu_per_clock", "hbm_bytes_per_s", "l2_bytes", "tdp_w")


def _link(name: str, kind: str, figures: Mapping[str, float]) -> Link:
    alone = MAX_GPUS if kind == "network" else 1
    latency = link_seeds().latency_s[kind]["ring"]["ll"]
    peer = figures.get("peer_bytes_per_s", math.inf)
    return Link(name, kind, figures["bytes_per_s"], latency, int(figures.get("domain", alone)), peer)
