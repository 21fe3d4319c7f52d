"""Who does what when: the intervals of every rank of a tree, as data.

A rank has two lanes, compute and send; where one waits for the other (a ring's step, a stage without a microbatch) the
gap is an interval too.  Ranks that do the same are one rank here: ring positions and stages are listed, tensor ranks not.
Repetitions beyond `unroll` are one interval that says how many it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from simulator.parallel.context import Ring
from simulator.timing import Clock, calibrated
from simulator.work import Later, Leaf, Message, Op, Overlap, Pipeline, Repeat, Select, Serial, Work, fold


@dataclass(frozen=True, slots=True)
class Span:
    """One interval of one lane of one rank; `times` repetitions of `name` lie in it."""

    rank: str
    lane: str
    name: str
    start_s: float
    end_s: float
    times: float = 1.0


def timeline(work: Work, clock: Clock, *, rank: str = "", position: int | None = None, unroll: int = 4) -> list[Span]:
    """The intervals of one rank that runs `work`; at ring `position`, blocks that lie later are waits, not work."""
    return list(_Walk(clock, rank, position, unroll).spans(work, 0.0))


def seconds_of(spans: list[Span], lane: str) -> float:
    """Time a lane is occupied."""
    return sum(span.end_s - span.start_s for span in spans if span.lane == lane)


def document(spans: list[Span]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(span) for span in spans]


class _Walk:
    """Walks a tree of plain numbers in time order."""

    def __init__(self, clock: Clock, rank: str, position: int | None, unroll: int) -> None:
        self.clock, self.rank, self.position, self.unroll = clock, rank, position, unroll
        self.algebra = calibrated(clock)

    def seconds(self, work: Work) -> float:
        return float(np.sum(fold(work, self.algebra)))

    def span(self, lane: str, name: str, start: float, seconds: float, times: float = 1.0) -> Span:
        return Span(self.rank, lane, name, start, start + seconds, times)

    def spans(self, work: Work, start: float) -> Iterator[Span]:
        if isinstance(work, (Op, Message)):
            yield from self.leaf(work, start)
        elif isinstance(work, Later):
            yield from self.spans(work.make(), start)
        elif isinstance(work, Ring):
            yield from self.ring(work, start)
        elif isinstance(work, Serial):
            for part in work.parts:
                yield from self.spans(part, start)
                start += self.seconds(part)
        elif isinstance(work, Overlap):
            yield from self.together(work, start)
        elif isinstance(work, Repeat):
            yield from self.repeat(work, start)
        elif isinstance(work, Select):
            yield from self.spans(work.a if bool(np.all(work.mask)) else work.b, start)
        else:
            yield from self.pipeline(work, start)

    def leaf(self, op: Leaf, start: float) -> Iterator[Span]:
        seconds = float(np.sum(self.clock.expected(op)))
        if seconds:
            yield self.span("send" if isinstance(op, Message) else "compute", op.name, start, seconds)

    def together(self, work: Overlap, start: float) -> Iterator[Span]:
        """All from the start; what ends first waits for the rest."""
        whole = self.seconds(work)
        for part in work.parts:
            own = self.seconds(part)
            yield from self.spans(part, start)
            if own and whole > own and not _only_messages(part):
                yield self.span("wait", "for the send beside it", start + own, whole - own)

    def repeat(self, work: Repeat, start: float) -> Iterator[Span]:
        count, whole = float(np.sum(work.count)), self.seconds(work)
        shown = 0 if work.runs or count % 1 else min(int(count), self.unroll)
        each = 0.0 if work.runs else self.seconds(work.work)
        for turn in range(shown):
            yield from self.spans(work.work, start + turn * each)
        if whole - shown * each > 0 and count > shown:
            lane = "send" if _only_messages(work.work) else "compute"
            yield self.span(lane, _name(work.work), start + shown * each, whole - shown * each, count - shown)

    def ring(self, work: Ring, start: float) -> Iterator[Span]:
        """Every step on its own: at a position before the block's owner there is nothing to compute."""
        step = 0
        for part in work.parts:
            count = int(part.count) if isinstance(part, Repeat) else 1
            inner = part.work if isinstance(part, Repeat) else part
            each = self.seconds(inner)
            for _ in range(count):
                idle = work.skips and self.position is not None and step > self.position
                for span in self.spans(inner, start):
                    if not idle or span.lane == "send":
                        yield span
                if idle:
                    yield self.span("wait", f"for rank {step}", start, each)
                start, step = start + each, step + 1

    def pipeline(self, work: Pipeline, start: float) -> Iterator[Span]:
        """Stage after stage, microbatch after microbatch: each starts when its stage and the stage before it are done."""
        equal = work.flows[0].times or [1.0] * len(work.flows[0].stages)
        free = [start] * int(sum(equal))
        number = 0
        runs = []
        for flow in work.flows:
            kinds = [np.broadcast_to(fold(stage, self.algebra), np.shape(flow.count)).ravel() for stage in flow.stages]
            times = np.repeat(kinds, np.array(equal, dtype=int), axis=0)
            counts = np.atleast_1d(flow.count).ravel()
            # shares of chunks may be fractions: whole chunks by their running sum
            runs += list(zip(np.diff(np.round(np.cumsum([0.0, *counts]))).astype(int), times.T, strict=True))
        for count, each in runs * int(np.max(work.rounds)):
            for _ in range(count):
                ready = start
                for s, seconds in enumerate(each.tolist()):
                    begin = max(ready, free[s])
                    if begin > free[s]:
                        yield Span(f"stage {s}", "wait", "for the stage before", free[s], begin)
                    yield Span(f"stage {s}", "compute", f"microbatch {number}", begin, begin + seconds)
                    ready = free[s] = begin + seconds
                number += 1


def _only_messages(work: Work) -> bool:
    return not any(isinstance(op, Op) for op in _leaves(work))


def _leaves(work: Work) -> Iterator[Leaf]:
    if isinstance(work, (Op, Message)):
        yield work
    elif isinstance(work, (Serial, Overlap)):
        for part in work.parts:
            yield from _leaves(part)
    elif isinstance(work, Repeat):
        yield from _leaves(work.work)
    elif isinstance(work, Later):
        yield from _leaves(work.make())
    elif isinstance(work, Select):
        yield from _leaves(work.a)


def _name(work: Work) -> str:
    names = list(dict.fromkeys(op.name for op in _leaves(work)))
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}" if names else "nothing"


__all__ = ["Span", "document", "seconds_of", "timeline"]
