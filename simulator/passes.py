"""Which ops lie on the critical path of a tree, how often, and which run beside it: the lines of an explanation.

`Passes` is an algebra of `fold`: a part is worth its seconds and what it passes.  Counting waits until somebody asks, and then
goes from the whole down to the ops once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from operator import attrgetter
from typing import Any

import numpy as np

from simulator.schedule import crossings, longest, turns
from simulator.units import Num, Seconds, total
from simulator.work import Aside, Leaf, Message, Op, Pipeline, Work, alike_stages, lines_of, repeated, summed


@dataclass(eq=False)
class Passed:
    """The critical path of a part: its seconds (over the runs of a flow, a vector), and what it passes: an op, or other parts so many times.
    `waiting` parts are beside it (in overlaps, where another takes longer).
    """

    seconds: Num
    parts: Sequence[Passed] = ()
    times: Num = 1.0
    waiting: Sequence[Passed] = ()
    op: Leaf | None = None

    @property
    def longest(self) -> dict[Leaf, Num]:
        """How often each op runs on the critical path; over the runs of a flow, vectors."""
        return self._counted[0]

    @property
    def beside(self) -> dict[Leaf, Num]:
        """How often each op runs beside it."""
        return self._counted[1]

    @cached_property
    def _counted(self) -> tuple[dict[Leaf, Num], dict[Leaf, Num]]:
        """From the whole down to the ops, every part once, however many others it is part of."""
        order: dict[Passed, None] = {}
        self.enlist(order)
        on: dict[Any, Num] = {self: 1.0}
        off: dict[Any, Num] = {}
        for path in reversed(order):
            if path in on:
                count = on[path] * path.times
                _add(on, path.parts, count)
                _add(off, path.waiting, count)
            if path in off:
                count = off[path] * path.times
                _add(off, path.parts, count)
                _add(off, path.waiting, count)
        longest: dict[Leaf, Num] = {}
        beside: dict[Leaf, Num] = {}
        for path in order:
            if path.op is not None:
                for found, counts in ((longest, on), (beside, off)):
                    if path in counts:
                        _add(found, (path.op,), counts[path])
        return longest, beside

    def enlist(self, order: dict[Passed, None]) -> None:
        """Name all it is made of, parts before the whole."""
        for part in self.parts:
            if part not in order:
                part.enlist(order)
        for part in self.waiting:
            if part not in order:
                part.enlist(order)
        order[self] = None


def _add(counts: dict[Any, Num], keys: Sequence[Any], count: Num) -> None:
    """Count each so many times more."""
    for key in keys:
        counts[key] = counts[key] + count if key in counts else count


class Passes:
    """The passes of the critical path: of an overlap the part that takes longest, of a pipeline the longest path."""

    def __init__(self, leaf_seconds: Callable[[Leaf], Seconds]) -> None:
        self.leaf_seconds = leaf_seconds

    def leaf(self, op: Leaf) -> Passed:
        """Once."""
        return Passed(self.leaf_seconds(op), op=op)

    def serial(self, values: list[Passed]) -> Passed:
        """All of them."""
        return Passed(summed([value.seconds for value in values]), values)

    def overlap(self, parts: Sequence[Work], values: list[Passed]) -> Passed:  # noqa: ARG002
        """The part that takes longest, and the others beside it."""
        longest = max(values, key=lambda value: total(value.seconds))
        return Passed(longest.seconds, [longest], waiting=[value for value in values if value is not longest])

    def repeat(self, count: Num, value: Passed, *, runs: bool) -> Passed:
        """Times count."""
        return Passed(repeated(count, value.seconds, runs=runs), [value], count)

    def select(self, mask: Any, a: Passed, b: Passed) -> Passed:
        """Weighted by the share of runs on which each branch is taken."""
        share = np.asarray(mask, dtype=float)
        return self.serial([self.repeat(share, a, runs=False), self.repeat(1 - share, b, runs=False)])

    def pipeline(self, pipe: Pipeline, values: list[list[Passed]]) -> Passed:
        """Every stage as often as the longest path passes it, in each run, for one question."""
        counts = _passes(pipe, [[value.seconds for value in stages] for stages in values])
        return self.serial([
            self.repeat(count if flow.runs else float(count[0]), value, runs=flow.runs)
            for flow, stages, by_stage in zip(pipe.flows, values, counts, strict=True)
            for value, count in zip(stages, by_stage, strict=True)
            if np.any(count)
        ])


def _passes(pipe: Pipeline, seconds: Sequence[Sequence[Num]]) -> list[Any]:
    """By flow and stage, how often the longest path of a pipeline passes each run."""
    rounds, (flow, *_) = float(np.max(pipe.rounds)), pipe.flows
    if flow.steady:
        return [rounds * np.array(turns(flow.count, seconds[0], alike_stages(flow)))[:, None]]
    ends = np.cumsum([len(flow.alike) for flow in pipe.flows])
    spans = [slice(end - len(flow.alike), end) for end, flow in zip(ends, pipe.flows, strict=True)]
    each = np.eye(ends[-1])
    shares = [crossing for flow, span in zip(pipe.flows, spans, strict=True) for crossing in crossings(flow.alike, list(each[span]))]
    found = longest(lines_of(pipe, seconds), shares, rounds)
    return [found[:, span] for span in spans]


@dataclass(slots=True, eq=False)
class Row:
    """One line of an explanation: an op (the mean over its passes), how often it runs, and what it takes in all."""

    op: Leaf
    count: float
    seconds: float


def rows(passes: Passed, leaf_seconds: Callable[[Leaf], Seconds]) -> list[Row]:
    """The passes of the critical path and beside it as lines."""
    found = dict(passes.longest)
    for op, count in passes.beside.items():
        _add(found, (op,), count)
    return [Row(_mean(op, count), total(count), _times(count, leaf_seconds(op))) for op, count in found.items()]


def by_kernel(passes: Passed, leaf_seconds: Callable[[Leaf], Seconds]) -> dict[tuple[str, str, str], float]:
    """Seconds of the critical path by family of ops, for the interval of a total."""
    found: dict[tuple[str, str, str], float] = {}
    for op, count in passes.longest.items():
        found[op.family] = found.get(op.family, 0.0) + _times(count, leaf_seconds(op))
    return found


def _times(count: Num, value: Num) -> float:
    """Count times value, over all runs."""
    if isinstance(count, np.ndarray) and isinstance(value, np.ndarray) and count.ndim == value.ndim == 1:
        return float(np.dot(count, value))
    return total(count) * value if type(value) is float else total(count * value)


def _mean(op: Leaf, count: Num) -> Leaf:
    """The op with each quantity replaced by its mean over the passes of each run."""
    if type(count) is float:
        return op
    shape = op.shape if isinstance(op, Op) else {}
    numbers = _AMOUNTS[type(op)](op)
    if not any(isinstance(value, np.ndarray) for value in (*numbers, *shape.values())) or not (steps := total(count)):
        return op

    def mean(value: Any) -> Any:
        return _times(count, value) / steps if isinstance(value, np.ndarray) and value.ndim else value

    changes: dict[str, Any] = dict(zip(_NUMBERS[type(op)], map(mean, numbers), strict=True))
    if isinstance(op, Op):
        changes |= {"shape": {key: mean(value) for key, value in shape.items()}, "aside": cache(lambda: Aside(*map(mean, op.aside())))}
    return replace(op, **changes)


#: What may differ from run to run.
_NUMBERS = {
    Op: ("tensor_flops", "exponentials", "model_flops", "hbm_bytes", "wire_bytes", "launches"),
    Message: ("payload_bytes", "wire_bytes"),
}  # fmt: skip
_AMOUNTS = {kind: attrgetter(*names) for kind, names in _NUMBERS.items()}
