"""Seconds of a prepared case: warm, cold caches, device events, percentiles, the clock and power beside them.

Short kernels are captured many times over into one CUDA graph, rotating over their input sets, and a sample is a
replay divided by the number of captures: the time of the kernel and of the gap to the next graph node, as a serving
engine sees it.  Long kernels are launched one by one; a sample lies between two events.  Before sampling the case runs
until the power limit has settled, because that is the state of a machine at work.

In company, a layer and one of its parts take turns: the board is in the state of the layer, whose products share the power limit
with kernels that need less of it, and only the part is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, pairwise
from math import ceil
from typing import Any

import numpy as np
import torch

from microbench.case import HANDED, IN, Case, Prepared
from microbench.environment import Reading, Sensors


@dataclass(frozen=True)
class Regime:
    """How long a case runs before it is sampled, for how long it is sampled, and how many samples are the least.

    `idle_s`: a pause before every sample, so that it runs at the clock of a cool machine.
    """

    warm_s: float
    sample_s: float
    least: int = 3
    idle_s: float = 0.0


REGIMES = {
    "steady": Regime(0.2, 0.12),
    HANDED: Regime(0.2, 0.12),
    IN: Regime(0.3, 0.15, least=5),
    "sustained": Regime(1.0, 1.0),
    "burst": Regime(0.0, 0.0, least=5, idle_s=0.3),
    "tiny": Regime(0.0, 0.0, least=2),
}
#: A kernel shorter than this is captured in a graph, and a graph lasts about as long.
GRAPH_BELOW_S, GRAPH_S, MOST_CAPTURES = 1e-3, 4e-3, 1024
#: Kernels this short do not heat the machine: half the warm-up will do.
SHORT_S = 100e-6
#: Kernels this long settle the power limit by themselves: two samples are enough.
LONG_S = 1.0
#: In a turn a part takes at most this much of its layer's time, or it would set the board's state itself, and is repeated for less
#: than the few milliseconds in which the power limit acts.
PART_SHARE, PART_S = 0.2, 1e-3


@dataclass(frozen=True)
class Timing:
    """Seconds of one launch: percentiles over `samples`, and the board's state at their end."""

    p20_s: float
    p50_s: float
    p80_s: float
    samples: int
    reading: Reading


@dataclass(frozen=True)
class Company:
    """What runs before every sample of a part: its program, kept alive, a launch of it, and the seconds that takes."""

    prepared: Prepared
    launch: Callable[[], Any]
    seconds: float


def regime_of(which: Case) -> Regime:
    """How long a case runs."""
    return REGIMES[which.regime if which.company is None else IN]


def accompany(prepared: Prepared, device: Any) -> Company:
    """A layer as company, captured as engines do, and timed once it has run as long as a part will."""
    if device.type != "cuda":
        return Company(prepared, lambda: prepared.run(0), _host_seconds(lambda: prepared.run(0)))
    launch = captured(prepared.run, prepared.sets)
    each, start = between(launch), time.perf_counter()
    while time.perf_counter() - start < REGIMES[IN].warm_s:
        _queue(launch, each)
    return Company(prepared, launch, between(launch))


def turn(part_s: float, company_s: float) -> tuple[int, int]:
    """How often the company and then the part run in a turn: parts of PART_S, but PART_SHARE of their company at most.

    >>> turn(1e-4, 3e-3), turn(1e-4, 1e-1), turn(1e-2, 3e-2)
    ((1, 6), (1, 10), (2, 1))
    """
    times = max(1, int(min(PART_SHARE * company_s, PART_S) / part_s + 1e-9))
    return max(1, ceil(times * part_s / (PART_SHARE * company_s) - 1e-9)), times


def measure(prepared: Prepared, device: Any, regime: Regime, sensors: Sensors, company: Company | None = None) -> Timing:
    """Time `prepared` on `device`, alone or in company."""
    if device.type != "cuda":
        return _on_host(prepared, regime, company)
    # sets may need kernels of their own (their pointers' alignment, which repeats): all are compiled before anything is timed
    for index in {*range(min(prepared.sets, 16)), prepared.sets - 1}:
        prepared.run(index)
    if company is not None:
        return _in_company(prepared, regime, sensors, company)
    once = between(lambda: prepared.run(prepared.sets - 1))
    launches, per = (lambda: prepared.run(0)), 1
    if prepared.captured:
        launches, per = captured(prepared.run, prepared.sets), prepared.sets
    elif prepared.graphable and once < GRAPH_BELOW_S * 2:
        rough = max(between(lambda: [prepared.run(i % prepared.sets) for i in range(32)]) / 32, 1e-6)
        if rough < GRAPH_BELOW_S:
            wanted = int(min(max(GRAPH_S / rough, prepared.sets), MOST_CAPTURES))
            launches, per = captured(lambda i: prepared.run(i % prepared.sets), wanted), wanted
    elif prepared.sets > 1:
        launches, per = (lambda: [prepared.run(i) for i in range(prepared.sets)]), prepared.sets
    each = once if once > LONG_S else between(launches)
    warm = regime.warm_s * (0.4 if each / per < SHORT_S else 1.0)
    start = time.perf_counter()
    while once < LONG_S and time.perf_counter() - start < warm:
        _queue(launches, each)
    count = 2 if once > LONG_S else int(min(max(regime.least, regime.sample_s / max(each, 1e-6)), 200))
    found, reading = _rested(launches, count, regime.idle_s, sensors) if regime.idle_s else samples(launches, count, sensors)
    return _timing([seconds / per for seconds in found], reading)


def _in_company(prepared: Prepared, regime: Regime, sensors: Sensors, company: Company) -> Timing:
    """Turns of company and part, queued without a pause: a sample is the part's share of a turn.  The first turns warm up; the
    sensors are read when half of the samples are done and all of them are queued.
    """
    sets = cycle(range(prepared.sets))

    def part(times: int) -> None:
        for _ in range(times):
            prepared.run(next(sets))

    layers, times = turn(between(lambda: part(8)) / 8, company.seconds)
    each = layers * company.seconds * (1 + PART_SHARE)
    warm, count = ceil(regime.warm_s / each), int(min(max(regime.least, regime.sample_s / each), 200))
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(warm + count)]
    for first, last in marks:
        for _ in range(layers):
            company.launch()
        first.record()
        part(times)
        last.record()
    marks[warm + count // 2][0].synchronize()
    reading = sensors.read()
    torch.cuda.synchronize()
    return _timing([first.elapsed_time(last) * 1e-3 / times for first, last in marks[warm:]], reading)


def _timing(taken: list[float], reading: Reading) -> Timing:
    p20, p50, p80 = (float(np.percentile(taken, q)) for q in (20, 50, 80))
    return Timing(p20, p50, p80, len(taken), reading)


def _queue(launches: Any, each: float) -> None:
    for _ in range(int(min(max(1, 0.02 / max(each, 1e-6)), 20))):
        launches()
    torch.cuda.synchronize()


def _rested(launches: Any, count: int, idle_s: float, sensors: Sensors) -> tuple[list[float], Reading]:
    """Samples after pauses."""
    taken = []
    for _ in range(count):
        time.sleep(idle_s)
        taken.append(between(launches))
    return taken, sensors.read()


def samples(launches: Any, count: int, sensors: Sensors) -> tuple[list[float], Reading]:
    """Samples queued back to back, so that the machine never idles between them, and the sensors half-way."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    reading = Reading()
    for index in range(count):
        launches()
        events[index + 1].record()
        if index == count // 2:
            events[max(index - 1, 0)].synchronize()
            reading = sensors.read()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in pairwise(events)], reading


def between(action: Any) -> float:
    """Seconds of one launch between two events."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    action()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) * 1e-3


def captured(run: Callable[[int], Any], count: int) -> Callable[[], Any]:
    """`count` launches, `run(0)` to `run(count - 1)`, as one CUDA graph; what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            run(index)
    replay: Callable[[], Any] = graph.replay
    return replay


def _on_host(prepared: Prepared, regime: Regime, company: Company | None) -> Timing:
    sets, taken = cycle(range(prepared.sets)), []
    layers, times = (0, 1) if company is None else turn(_host_seconds(lambda: prepared.run(0)), company.seconds)
    for _ in range(max(regime.least, 2)):
        if company is not None:
            for _ in range(layers):
                company.launch()
        taken.append(_host_seconds(lambda: [prepared.run(next(sets)) for _ in range(times)]) / times)
    return _timing(taken, Reading())


def _host_seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
