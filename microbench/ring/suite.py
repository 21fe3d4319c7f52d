"""Run the sharing algorithms on what this machine has and write one row per case.

Several GPUs talk by NCCL, one process each (or as `torchrun` started them).  One GPU plays one of four logical ranks, whose
neighbours' tensors are copied beside its kernels (`Loopback`).  Without a GPU two CPU processes talk by gloo, which shows that
the code runs and says nothing of time.

A row holds the slowest rank's seconds of the whole program, and of the same program when nothing is sent (`silent_s`).  The two
take turns, a few milliseconds each, so that both see the same clocks and temperatures; `exposed_s` is the median of what lies
between neighbours, exposed communication, and `exposed_se_s` that median's standard error.  Of a collective alone the seconds
are such differences themselves: a call after a kernel less the kernel.

On several GPUs CUDA_DEVICE_MAX_CONNECTIONS is 1 unless it was set: kernels then start in the order in which they were launched.
Otherwise the persistent kernels of attention and products, whose stream waits for nothing, take every SM before a message's own
kernel may start, and the message runs after them instead of beside (Megatron-LM asks for the same).
"""

from __future__ import annotations

import csv
import datetime as dt
import gc
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from microbench.case import Case
from microbench.clock import between
from microbench.clock import captured as captured_graph
from microbench.environment import Reading, Sensors, environment
from microbench.ring import collectives, context, decode, experts, halo, handover, tensor, trace, ulysses
from microbench.ring.transport import Distributed, Loopback, Silent, Transport
from microbench.run import TOLERANCE, Outcome, case_of, read
from simulator.units import Array
from simulator.work import Work


class Sharing(Protocol):
    """What every module of sharing algorithms offers."""

    KERNELS: tuple[str, ...]
    IMPLS: tuple[str, ...]

    def cases(self, suite: str, ranks: int) -> list[Case]:
        """The cases of a suite, tiny or ring, for a group of `ranks`."""

    def work(self, which: Case) -> Work:
        """The simulator's tree of what one rank does."""

    def build(self, which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
        """One rank's program on inputs made beforehand."""

    def error(self, which: Case, transport: Transport, device: Any, dtype: Any) -> float:
        """Relative error of this rank's results against the whole computed on one device."""


MODULES: tuple[Any, ...] = (collectives, context, ulysses, halo, decode, tensor, experts, handover)
#: Logical ranks of which a single GPU plays one.
LOOPBACK_RANKS = 4
#: What it plays: rings and gathers of attention, as long as 128K tokens a rank of 8 heads.
LOOPBACK_IMPLS, LOOPBACK_PAIRS = ("ring_kv.contiguous", "ring_kv.zigzag", "gather.zigzag"), 8 * 131072**2
#: Rings whose timeline is written, at most so many tokens a rank and preferably so many heads.
TIMELINES, TIMELINE_TOKENS, TIMELINE_HEADS = ("ring_kv.contiguous", "ring_kv.zigzag", "gather.zigzag"), 32768, 32
#: Seconds of warming up and of sampling of a case; of a turn of either program; the fewest and most turns.
WARM_S, SAMPLE_S, TURN_S, LEAST, MOST = 0.12, 0.45, 5e-3, 4, 60
#: A program this long settles the power limit by itself: two turns are enough.
LONG_S = 0.3
#: Kernels start in the order of their launches.
ORDERED = "CUDA_DEVICE_MAX_CONNECTIONS"
#: A layer's error is that of several products in a row.
SEVERAL = 3
#: Tokens of a rank at which attention is checked.
FEW = 256
#: A program this short, or one of whose time launching takes more than this share, is captured in a graph, many times over.
GRAPH_BELOW_S, HOST_SHARE, MOST_CAPTURES = 2e-4, 0.5, 64
COLUMNS = (
    "kernel", "impl", "dtype", "regime", "shape", "held", "backend", "captured", "p20_s", "p50_s", "p80_s", "samples", "silent_s", "exposed_s",
    "exposed_se_s", "error", "sm_clock_hz", "power_w", "sent_bytes",
)  # fmt: skip


def module_of(which: Case) -> Sharing:
    """The module that runs a case."""
    found: Sharing = next(m for m in MODULES if which.kernel in m.KERNELS and which.impl in m.IMPLS)
    return found


def cases_of(suite: str, ranks: int) -> list[Case]:
    """Every case of a suite for a group of `ranks`."""
    return [which for module in MODULES for which in module.cases(suite, ranks)]


def is_played(which: Case) -> bool:
    """Whether one GPU plays the case by itself."""
    return which.impl in LOOPBACK_IMPLS and which["heads"] * which["tokens"] ** 2 <= LOOPBACK_PAIRS


@dataclass
class Rank:
    """One process's part of a run: its end of the whole, its device, and how ranks talk."""

    world: Transport
    device: Any
    backend: str

    def transport(self, ranks: int) -> Transport | None:
        """The group of the first `ranks`; None on the others."""
        if ranks == self.world.size:
            return self.world
        if self.backend == "loopback":
            return Loopback.of(ranks - 1, ranks, self.device)
        block = self.world.rank // ranks
        found = self.world.group(range(block * ranks, (block + 1) * ranks))
        return found if block == 0 else None


def plan() -> str:
    """What a run will be on this machine, and what it leaves out."""
    gpus = torch.cuda.device_count()
    if "WORLD_SIZE" in os.environ:
        return f"{os.environ['WORLD_SIZE']} processes as torchrun started them"
    if gpus > 1:
        return f"{gpus} GPUs by NCCL; left out: more ranks, other hosts (start it under torchrun there)"
    if gpus:
        return (
            f"one GPU plays one of {LOOPBACK_RANKS} ranks, its neighbours' tensors copied beside its kernels: {', '.join(LOOPBACK_IMPLS)}; left out: "
            "links, collectives, Ulysses, decoding, layers, experts, pipelines, which need several GPUs"
        )
    return "no GPU: two CPU processes by gloo show that the code runs; left out: everything that says something of time"


def bench(folder: Path, *, limit_s: float = 540.0, only: Iterable[str] = (), progress: Any = None) -> Outcome:
    """Run what `folder` does not hold yet, for at most `limit_s` seconds; `only` names kernels."""
    gpus = torch.cuda.device_count()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = tuple(only)
    if "WORLD_SIZE" in os.environ:
        return _distributed(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder, limit_s, chosen, progress)
    if gpus == 1:
        device = torch.device("cuda", 0)
        rank = Rank(Loopback.of(LOOPBACK_RANKS - 1, LOOPBACK_RANKS, device), device, "loopback")
        return _run(rank, folder, limit_s, chosen, progress)
    size = max(gpus, 2)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(_free_port())
    os.environ.setdefault(ORDERED, "1")
    before = set(folder.glob("*.csv"))
    torch.multiprocessing.spawn(_process, args=(size, folder, limit_s, chosen), nprocs=size)
    file = next(iter(set(folder.glob("*.csv")) - before), None)
    left_out = () if file is None else tuple(line for line in read(file)[0].get("left_out", "").split(" | ") if line)
    return Outcome(file, 0 if file is None else len(read(file)[1]), 0, left_out, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _process(rank: int, size: int, folder: Path, limit_s: float, only: tuple[str, ...]) -> None:
    _distributed(rank, size, folder, limit_s, only, None)


def _distributed(rank: int, size: int, folder: Path, limit_s: float, only: tuple[str, ...], progress: Any) -> Outcome:
    local = int(os.environ.get("LOCAL_RANK", rank))
    os.environ.setdefault(ORDERED, "1")
    cuda = torch.cuda.device_count() > local
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    # numbers of the host travel by gloo, so that agreeing on them puts nothing on the links
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=size, timeout=dt.timedelta(seconds=120), device_id=device if cuda else None
    )
    try:
        return _run(Rank(Distributed.world(), device, "nccl" if cuda else "gloo"), folder, limit_s, only, progress if rank == 0 else None)
    finally:
        dist.destroy_process_group()


def _run(rank: Rank, folder: Path, limit_s: float, only: tuple[str, ...], progress: Any) -> Outcome:
    """The slice of one process; the first writes."""
    first, size = rank.world.rank == 0 or rank.backend == "loopback", rank.world.size
    facts = environment(rank.device) | {"backend": rank.backend, "gpus": 1 if rank.backend == "loopback" else size}
    if rank.device.type == "cuda":
        facts |= {"nccl": ".".join(str(part) for part in torch.cuda.nccl.version()), ORDERED.lower(): os.environ.get(ORDERED, "")}
    suite = "ring" if rank.device.type == "cuda" else "tiny"
    groups = [r for r in (2, 4, 8, 16, 32, 64) if r < size and size % r == 0 and rank.backend == "nccl"] + [size]
    known = _known(folder, str(facts["gpu"]), rank.backend)
    todo = [which for r in groups for which in cases_of(suite, r) if which.key not in known and (not only or which.kernel in only)]
    if rank.backend == "loopback":
        todo = [which for which in todo if is_played(which)]
    stamp = str(facts["date"]).replace(":", "").replace("-", "")
    file = folder / f"ring-{rank.backend}-{''.join(c if c.isalnum() else '-' for c in str(facts['gpu']).lower())}-{stamp}.csv"
    rows: list[Mapping[str, Any]] = []
    if isinstance(rank.world, Distributed):
        rank.world.prepare(groups)
    transports = {r: rank.transport(r) for r in groups}
    sensors, checked, skipped, start = Sensors(rank.device), {}, [], time.monotonic()  # type: ignore[var-annotated]
    for index, which in enumerate(todo):
        if rank.world.agree([time.monotonic() - start])[0] > limit_s:
            break
        transport, told = transports[which["ranks"]], ""
        row = None
        if transport is not None:
            try:
                row = _row(which, transport, rank, sensors, checked)
            except (RuntimeError, ValueError, AssertionError, ImportError) as reason:
                told = f"{which.key}: {str(reason).splitlines()[0] if str(reason) else type(reason).__name__}"
        gc.collect()
        if rank.world.agree([float(bool(told))])[0]:
            skipped.append(told or f"{which.key}: failed on another rank")
        elif row is not None:
            rows.append(row)
        if first:
            _write(file, facts | {"left_out": " | ".join(skipped)}, rows)
        if progress is not None:
            progress(index + 1, len(todo), which)
    if not only or "timeline" in only:
        _timelines(rank, suite, file.with_suffix(""))
    done = len(rows) + len(skipped)
    return Outcome(file if first and rows else None, len(rows), len(known), tuple(skipped), len(todo) - done)


def _timelines(rank: Rank, suite: str, stem: Path) -> None:
    """What every rank computes, sends and waits for in one run of each way to turn a ring: JSON beside the rows."""
    for impl in TIMELINES:
        found = (c for c in context.cases(suite, rank.world.size) if c.impl == impl and not context.is_backward(c))
        which = max((c for c in found if c["tokens"] <= TIMELINE_TOKENS), key=lambda c: (c["heads"] == TIMELINE_HEADS, c["tokens"]))
        traced = trace.Traced.over(rank.world, rank.device)
        run = context.build(which, traced, rank.device)
        for _ in range(3):
            traced.begin()
            run()
        spans = trace.everyone(traced)
        if rank.world.rank == 0 or rank.backend == "loopback":
            trace.write(Path(f"{stem}-{impl}.json"), spans)


def _write(file: Path, facts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        out.writelines(f"# {key} = {value}\n" for key, value in facts.items())
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _row(which: Case, transport: Transport, rank: Rank, sensors: Sensors, checked: dict[tuple[object, ...], float]) -> dict[str, Any]:
    module = module_of(which)
    kind = (which.kernel, which.impl, *(which.get(name) for name in ("ranks", "heads", "kv_heads", "head_dim")))
    if kind not in checked:
        checked[kind] = 0.0 if rank.backend == "loopback" else _error(module, which, transport, rank)
    if not checked[kind] < TOLERANCE["bf16"] * (SEVERAL if which.kernel.startswith("tensor_layer") else 1):
        message = f"wrong result, relative error {checked[kind]:.2g} against one device"
        raise AssertionError(message)
    if rank.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(20261124 + transport.rank)
    alone = module.build(which, Silent(transport.rank, transport.size), rank.device)
    run = module.build(which, transport, rank.device)
    transport.counted.clear()
    transport.calls.clear()
    run()
    sent = " ".join(f"{pattern}={size}" for pattern, size in sorted(transport.counted.items()))
    taken = _turns(alone, run, transport, rank.device, sensors)
    return {
        "kernel": which.kernel, "impl": which.impl, "dtype": which.dtype, "regime": which.regime, "shape": which.extents, "held": which.held,
        "backend": rank.backend, "captured": int(taken.captured), "samples": len(taken.whole), "error": f"{checked[kind]:.3g}",
        **{name: f"{value:.6g}" for name, value in _seconds(which, taken).items()},
        "sm_clock_hz": f"{taken.reading.sm_clock_hz:.6g}", "power_w": f"{taken.reading.power_w:.5g}", "sent_bytes": sent,
    }  # fmt: skip


def _seconds(which: Case, taken: Turns) -> dict[str, float]:
    """Percentiles of the program's time, what its silent twin takes, and what is exposed; of a collective the percentiles of the last."""
    exposed = taken.whole - taken.silent
    alone = which.kernel == "collective"
    found = {f"p{q}_s": float(np.percentile(exposed if alone else taken.whole, q)) for q in (20, 50, 80)}
    if alone:
        return found
    return found | {"silent_s": float(np.median(taken.silent)), "exposed_s": float(np.median(exposed)), "exposed_se_s": error_of_median(exposed)}


def _error(module: Sharing, which: Case, transport: Transport, rank: Rank) -> float:
    """Of the same case at few tokens, the worst rank's."""
    small = dict(which.shape)
    if which.kernel.startswith("context_attention"):
        small |= {"tokens": min(which["tokens"], FEW), "context": min(which["tokens"], FEW) * which["ranks"]}
    checked = Case(which.kernel, which.impl, which.dtype, tuple(small.items()))
    return transport.agree([module.error(checked, transport, rank.device, torch.bfloat16)])[0]


def error_of_median(values: Array) -> float:
    """Standard error of the median of `values`: that of a normal of their spread, sqrt(pi / 2) sigma / sqrt(n), sigma half of what
    lies between the 16th and the 84th percentile.
    """
    low, high = np.percentile(values, (16, 84))
    return float(np.sqrt(np.pi / 2 / len(values)) * (high - low) / 2)


@dataclass(frozen=True)
class Turns:
    """Seconds of each turn of a program and, before it, of the same one when nothing is sent: of the slowest rank, a launch."""

    silent: Array
    whole: Array
    reading: Reading
    captured: bool


def _turns(alone: Callable[[], Any], run: Callable[[], Any], transport: Transport, device: Any, sensors: Sensors) -> Turns:
    """Both programs by turns; the ranks meet before every turn, so that none starts with what another has left over."""
    if device.type != "cuda":
        silent, whole = (np.array([_on_host(one) for _ in range(2)]) for one in (alone, run))
        return Turns(silent, whole, Reading(), captured=False)
    for one in (alone, run):
        one()
        one()
    torch.cuda.synchronize()
    launching = _on_host(run)
    launching, once = transport.agree([launching, between(run)])
    per, programs = 1, (alone, run)
    if once < GRAPH_BELOW_S or launching > HOST_SHARE * once:
        per = int(min(max(TURN_S / max(once, 1e-5), 1), MOST_CAPTURES))
        programs = (captured_graph(lambda _: alone(), per), captured_graph(lambda _: run(), per))
    each = transport.agree([between(programs[1])])[0]
    launches = int(max(1, TURN_S / each))
    for _ in range(int(max(1, WARM_S / (2 * each))) if each < LONG_S else 0):
        programs[0]()
        programs[1]()
    count = int(min(max(LEAST, SAMPLE_S / (2 * launches * each)), MOST)) if each < LONG_S else 2
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(4)] for _ in range(count)]
    torch.cuda.synchronize()
    for turn in events:
        for index, program in enumerate(programs):
            transport.meet()
            turn[2 * index].record()
            for _ in range(launches):
                program()
            turn[2 * index + 1].record()
    reading = sensors.read()
    torch.cuda.synchronize()
    silent, whole = (
        np.array(transport.agree([turn[i].elapsed_time(turn[i + 1]) * 1e-3 / (launches * per) for turn in events])) for i in (0, 2)
    )
    return Turns(silent, whole, reading, captured=programs[0] is not alone)


def _on_host(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _known(folder: Path, gpu: str, backend: str) -> set[str]:
    found = set()
    for file in folder.glob("ring-*.csv"):
        facts, rows = read(file)
        if facts.get("gpu") == gpu and facts.get("backend") == backend:
            found |= {case_of(row).key for row in rows}
    return found
