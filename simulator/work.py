"""A model on a machine is a tree of ops; every answer is a fold over it.

Leaves are `Op` (one kernel on one GPU) and `Message` (one transfer of one GPU with its group).  Branches are
`Serial`, `Overlap`, `Repeat`, `Select` and `Pipeline`.  `fold(work, algebra)` is the only evaluator: an `Algebra`
says what a leaf is worth and how values combine.  The algebras here know no GPU; those that turn work into seconds
take the leaf's time as a function (`simulator.timing` makes it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np

from simulator.schedule import Crossing, Line, Run, by_run, crossings, equal, growing, lines, longest, makespan, turn, turns
from simulator.units import Bytes, Count, Flops, Num, Seconds, maximum, total, where

RESOURCES = ("tensor", "vector", "special", "hbm", "link", "host")


@dataclass(slots=True, eq=False)
class Op:
    """The work of one kernel on one GPU.

    Executed work by pipe: `tensor_flops` at the rate of `math`, `vector_flops` on the fp32 pipes, `exponentials` on
    the special-function units.  `operands` names the stored type where it is not that of `math` and the kernel converts it (an
    fp8 cache read by a bf16 core).  `model_flops` is the useful part (backward = 2 x forward, no recompute, no padding).
    `hbm_bytes` is compulsory traffic: every operand once.  `shape` holds the kernel's own extents, from which the
    time side works out tiles and re-reads.  `aside` makes what no time depends on, when it is asked for.
    """

    name: str
    kernel: str
    impl: str = ""
    math: str = "bf16"
    operands: str = ""
    tensor_flops: Flops = 0.0
    exponentials: Count = 0.0
    model_flops: Flops = 0.0
    hbm_bytes: Bytes = 0.0
    shape: Mapping[str, Num] = field(default_factory=dict)
    aside: Callable[[], Aside] = field(default=lambda: Aside())  # noqa: PLW0108 (defined below)
    wire_bytes: Bytes = 0.0
    launches: Count = 1.0

    @property
    def flops(self) -> Flops:
        """Executed matrix and vector work."""
        return self.tensor_flops + self.vector_flops

    @property
    def vector_flops(self) -> Flops:
        """Work of the fp32 pipes."""
        return self.aside().vector_flops

    @property
    def live_bytes(self) -> Bytes:
        """Activations that exist while it runs, beside the residual stream; backward, beside what forward kept."""
        return self.aside().live_bytes

    @property
    def saved_bytes(self) -> Bytes:
        """Activations kept for backward; negative where backward frees them."""
        return self.aside().saved_bytes

    @property
    def family(self) -> tuple[str, str, str]:
        """What is calibrated together: kernel, implementation and element type (of the stored operands, then of the math)."""
        return (self.kernel, self.impl, self.operands or self.math)


class Aside(NamedTuple):
    """Quantities of an op that no time depends on."""

    vector_flops: Flops = 0.0
    live_bytes: Bytes = 0.0
    saved_bytes: Bytes = 0.0


def beside(held: Bytes, *ops: Op) -> list[Op]:
    """The ops, with `held` bytes of activations living beside each: made before it, read only after it."""

    def widened(aside: Callable[[], Aside]) -> Callable[[], Aside]:
        return lambda: (found := aside())._replace(live_bytes=found.live_bytes + held)

    for op in ops:
        op.aside = widened(op.aside)
    return list(ops)


@dataclass(slots=True, eq=False)
class Group:
    """The ranks that take part in a message: their number and the distance between neighbours in rank order.

    `others` is the share of a payload that belongs to the other ranks, (n - 1) / n.
    """

    name: str
    ranks: Num
    stride: Num = 1.0
    others: Num = field(init=False)

    def __post_init__(self) -> None:
        """Work out the share once for all messages of the group."""
        self.others = (self.ranks - 1) / self.ranks


@dataclass(slots=True, eq=False)
class Message:
    """One GPU's part in a collective or a send.

    `payload_bytes` follows nccl-tests: the tensor of an all-reduce, the gathered whole of an all-gather or
    reduce-scatter, everything one rank holds for all ranks in an all-to-all, the buffer of a send.
    `wire_bytes` is what this rank puts on the wire under the ring (or direct) algorithm.
    """

    name: str
    pattern: str
    group: Group
    payload_bytes: Bytes
    wire_bytes: Bytes
    kernel: str = "message"
    math: str = ""
    tensor_flops: Flops = 0.0
    vector_flops: Flops = 0.0
    exponentials: Count = 0.0
    model_flops: Flops = 0.0
    flops: Flops = 0.0
    hbm_bytes: Bytes = 0.0
    live_bytes: Bytes = 0.0
    saved_bytes: Bytes = 0.0
    launches: Count = 1.0

    @property
    def impl(self) -> str:
        """Messages are calibrated by pattern."""
        return self.pattern

    @property
    def family(self) -> tuple[str, str, str]:
        """What is calibrated together."""
        return (self.kernel, self.pattern, self.math)


@dataclass(slots=True, eq=False)
class Serial:
    """One after the other."""

    parts: Sequence[Work]


@dataclass(slots=True, eq=False)
class Overlap:
    """Together; they share the resources they both use."""

    parts: Sequence[Work]


@dataclass(slots=True, eq=False)
class Repeat:
    """`work`, `count` times.  With `runs`, the leading axis of `count` enumerates runs of equal steps whose
    quantities may differ along that axis, and the value is the sum over it.
    """

    count: Num
    work: Work
    runs: bool = False


@dataclass(slots=True, eq=False)
class Select:
    """`a` where an engine's or a paper's rule holds, else `b`.  Never "whichever is faster": that is two plans."""

    mask: Any
    a: Work
    b: Work


@dataclass(slots=True, eq=False)
class Flow:
    """`count` equal microbatches through the stages of a pipeline.  With `runs`, as in `Repeat`, runs follow each other and the
    values are means of runs whose steps grow linearly between their neighbours.

    `steady`: the same microbatches go round without end (decoding): one round, not a filled and drained pipeline.
    `times`: how many equal stages each stands for (None: one each).
    """

    count: Num
    stages: Sequence[Work]
    runs: bool = False
    steady: bool = False
    times: Sequence[float] | None = None
    alike: Sequence[Run] = field(init=False)

    def __post_init__(self) -> None:
        """Work out the runs once for all stages and folds."""
        self.alike = growing(self.count) if self.runs else equal(self.count)


@dataclass(slots=True, eq=False)
class Pipeline:
    """Microbatches through stages, forward only: the flows one after the other, `rounds` times (prompts in turn).

    The time is that of `schedule.makespan`, or of `schedule.turn` for a steady flow.
    """

    flows: Sequence[Flow]
    rounds: Num = 1.0


@dataclass(slots=True, eq=False)
class Later:
    """Work made when it is evaluated, and forgotten after: a sweep then holds the arrays of one layer, not of a model.
    Occurring several times in a tree, it is evaluated once.
    """

    make: Callable[[], Work]


Leaf = Op | Message
Work = Op | Message | Serial | Overlap | Repeat | Select | Pipeline | Later


class Algebra(Protocol):
    """What a tree is worth: one method per kind of node."""

    def leaf(self, op: Leaf) -> Any:
        """Value of one op."""

    def serial(self, values: list[Any]) -> Any:
        """Value of parts one after the other."""

    def overlap(self, parts: Sequence[Work], values: list[Any]) -> Any:
        """Value of parts together."""

    def repeat(self, count: Num, value: Any, *, runs: bool) -> Any:
        """Value of `count` repetitions."""

    def select(self, mask: Any, a: Any, b: Any) -> Any:
        """Value of the branch taken."""

    def pipeline(self, pipe: Pipeline, values: list[list[Any]]) -> Any:
        """Value of a pipeline, `values[flow][stage]`."""


#: Values of parts made when they are evaluated, for folds of several trees that share them.
Known = dict[int, tuple["Later", Any]]


def fold(work: Work, algebra: Algebra, known: Known | None = None) -> Any:
    """Evaluate `work` under `algebra`.  Folds of trees with parts in common may share what is `known` under one algebra."""
    return _Fold(algebra, {} if known is None else known).value(work)


class _Fold:
    """An evaluation under way."""

    __slots__ = ("algebra", "known", "leaf", "serial")

    def __init__(self, algebra: Algebra, known: Known) -> None:
        self.algebra, self.known = algebra, known
        self.leaf, self.serial = algebra.leaf, algebra.serial

    def value(self, node: Work) -> Any:
        """What a part is worth."""
        if isinstance(node, (Op, Message)):
            return self.leaf(node)
        if isinstance(node, Serial):
            return self.serial([self.value(part) for part in node.parts])
        if isinstance(node, Repeat):
            if type(node.count) is float and node.count == 1.0:
                return self.value(node.work)
            return self.algebra.repeat(node.count, self.value(node.work), runs=node.runs)
        if isinstance(node, Later):
            if id(node) not in self.known:
                self.known[id(node)] = (node, self.value(node.make()))
            return self.known[id(node)][1]
        if isinstance(node, Overlap):
            return self.algebra.overlap(node.parts, [self.value(part) for part in node.parts])
        if isinstance(node, Select):
            if isinstance(node.mask, (bool, np.bool_)):
                return self.value(node.a if node.mask else node.b)
            return self.algebra.select(node.mask, self.value(node.a), self.value(node.b))
        return self.algebra.pipeline(node, [self.staged(flow.stages) for flow in node.flows])

    def staged(self, stages: Sequence[Work]) -> list[Any]:
        """Stages that are one node are evaluated once."""
        found = {key: self.value(stage) for key, stage in {id(stage): stage for stage in stages}.items()}
        return [found[id(stage)] for stage in stages]


class Together:
    """Several algebras in one pass: the value is the tuple of theirs."""

    def __init__(self, *algebras: Algebra) -> None:
        self.algebras = algebras
        self.leaves = [algebra.leaf for algebra in algebras]

    def leaf(self, op: Leaf) -> tuple[Any, ...]:
        """Each on its own."""
        return tuple([leaf(op) for leaf in self.leaves])

    def serial(self, values: list[Any]) -> tuple[Any, ...]:
        """Each on its own."""
        if not values:
            return tuple([a.serial([]) for a in self.algebras])
        return tuple([a.serial(each) for a, each in zip(self.algebras, map(list, zip(*values, strict=True)), strict=True)])

    def overlap(self, parts: Sequence[Work], values: list[Any]) -> tuple[Any, ...]:
        """Each on its own."""
        return tuple([a.overlap(parts, [v[i] for v in values]) for i, a in enumerate(self.algebras)])

    def repeat(self, count: Num, value: Any, *, runs: bool) -> tuple[Any, ...]:
        """Each on its own."""
        return tuple([a.repeat(count, v, runs=runs) for a, v in zip(self.algebras, value, strict=True)])

    def select(self, mask: Any, a: Any, b: Any) -> tuple[Any, ...]:
        """Each on its own."""
        return tuple([algebra.select(mask, x, y) for algebra, x, y in zip(self.algebras, a, b, strict=True)])

    def pipeline(self, pipe: Pipeline, values: list[list[Any]]) -> tuple[Any, ...]:
        """Each on its own."""
        return tuple([
            a.pipeline(pipe, [[stage[i] for stage in stages] for stages in values]) for i, a in enumerate(self.algebras)
        ])


def _sum(values: Sequence[Num]) -> Num:
    """Sum, adding values of few axes first, so that broadcasting happens once."""
    plain: Num = 0.0
    arrays: dict[int, Num] = {}
    for value in values:
        if type(value) is float or type(value) is int:
            plain += value
        else:
            axes = np.ndim(value)
            arrays[axes] = arrays[axes] + value if axes in arrays else value
    if not arrays:
        return plain
    for axes in sorted(arrays):
        plain = arrays[axes] + plain if type(plain) is not float or plain != 0.0 else arrays[axes]
    return plain


def _repeated(count: Num, value: Num, *, runs: bool) -> Num:
    if not runs:
        return count * value
    if type(value) is not float and np.ndim(value) >= np.ndim(count):
        summed: Num = np.add.reduce(count * value, axis=0)
    else:
        summed = np.add.reduce(count, axis=0) * value
    return float(summed) if isinstance(summed, np.float64) else summed


def _scaled(count: Num, value: Num) -> Num:
    """Count x value, leaving alone what is counted once."""
    return value if isinstance(count, float) and count == 1.0 else count * value


def _largest(values: Sequence[Num]) -> Num:
    result = values[0]
    for value in values[1:]:
        result = maximum(result, value)
    return result


class Quantity:
    """Sum of an attribute of the ops; of a pipeline, that of the rank with the most."""

    def __init__(self, name: str) -> None:
        self.name = name

    def leaf(self, op: Leaf) -> Num:
        """The attribute itself."""
        value: Num = getattr(op, self.name)
        return value

    def serial(self, values: list[Num]) -> Num:
        """Sum."""
        return _sum(values)

    def overlap(self, parts: Sequence[Work], values: list[Num]) -> Num:  # noqa: ARG002 (the protocol's signature)
        """Sum: overlapping moves no less."""
        return _sum(values)

    def repeat(self, count: Num, value: Num, *, runs: bool) -> Num:
        """Count times value."""
        return _repeated(count, value, runs=runs)

    def select(self, mask: Any, a: Num, b: Num) -> Num:
        """The branch taken."""
        return where(mask, a, b)

    def pipeline(self, pipe: Pipeline, values: list[list[Num]]) -> Num:
        """Of the stage with the most."""
        totals = [
            _sum([self.repeat(flow.count, stages[s], runs=flow.runs) for flow, stages in zip(pipe.flows, values, strict=True)])
            for s in range(len(values[0]))
        ]
        return _scaled(pipe.rounds, _largest(totals))


def quantity(name: str) -> Quantity:
    """The algebra that adds up one attribute of the ops: flops, model_flops, hbm_bytes, wire_bytes, ..."""
    return Quantity(name)


class SecondsSerial(Quantity):
    """Seconds when nothing overlaps: each leaf at `leaf_seconds`, everything one after the other."""

    def __init__(self, leaf_seconds: Callable[[Leaf], Seconds]) -> None:
        self.leaf = leaf_seconds  # type: ignore[assignment]

    def pipeline(self, pipe: Pipeline, values: list[list[Num]]) -> Num:
        """Stages do overlap across GPUs."""
        seconds: Num = _scheduled(pipe, values)
        return seconds


def _scheduled(pipe: Pipeline, values: Sequence[Sequence[Any]]) -> Any:
    """The time of a pipeline under the seconds of its stages."""
    flow = pipe.flows[0]
    if flow.steady:
        return _scaled(pipe.rounds, turn(flow.count, values[0], _alike(flow)))
    return makespan(_lines(pipe, values), pipe.rounds)


def _alike(flow: Flow) -> Sequence[float]:
    return flow.times or [1.0] * len(flow.stages)


def _lines(pipe: Pipeline, values: Sequence[Sequence[Any]]) -> list[Line]:
    """The stages with what they take of all flows."""
    stages = [
        [crossing for flow, each in zip(pipe.flows, values, strict=True) for crossing in _crossed(flow, each[s])] for s in range(len(values[0]))
    ]
    wholes = [
        _sum([_repeated(flow.count, each[s], runs=flow.runs) for flow, each in zip(pipe.flows, values, strict=True)]) for s in range(len(stages))
    ]
    return lines(stages, _alike(pipe.flows[0]), wholes)


def _crossed(flow: Flow, seconds: Any) -> list[Crossing]:
    """The crossings of a flow on one stage."""
    return crossings(flow.alike, by_run(seconds, flow.count) if flow.runs else [seconds])


class SecondsOverlapped(SecondsSerial):
    """Seconds with overlap: of parts together, the longest, or the busiest shared resource if that takes longer.

    `demand(op)` gives the seconds one op occupies each resource at its full rate, or is the `Demands` of another such algebra.
    """

    def __init__(
        self, leaf_seconds: Callable[[Leaf], Seconds], demand: Callable[[Leaf], Mapping[str, Seconds]] | Demands
    ) -> None:
        super().__init__(leaf_seconds)
        self.demands = demand if isinstance(demand, Demands) else Demands(demand)

    def overlap(self, parts: Sequence[Work], values: list[Num]) -> Num:
        """max(longest part, for each resource the sum of its demand)."""
        longest = _largest(values)
        # the host shares nothing with its GPU
        sharing = [part for part in parts if not _on_host(part)]
        demands = [self.demands.of(part) for part in sharing] if len(sharing) > 1 else []
        for resource in RESOURCES:
            shared = [d[resource] for d in demands if resource in d]
            if len(shared) > 1:
                longest = maximum(longest, _sum(shared))
        return longest


def _on_host(work: Work) -> bool:
    """Whether it is a step of the host."""
    return _on_host(work.work) if isinstance(work, Repeat) else isinstance(work, Op) and work.kernel == "host"


class Demands:
    """Seconds each resource is occupied, as a mapping; worked out once for a part however many algebras ask."""

    def __init__(self, demand: Callable[[Leaf], Mapping[str, Seconds]]) -> None:
        self.leaf = demand
        self._known: Known = {}
        self._parts: dict[int, tuple[Work, Mapping[str, Num]]] = {}

    def of(self, part: Work) -> Mapping[str, Num]:
        """The demand of a part."""
        if id(part) not in self._parts:
            self._parts[id(part)] = (part, fold(part, self, self._known))
        return self._parts[id(part)][1]

    def serial(self, values: list[Mapping[str, Num]]) -> Mapping[str, Num]:
        """Sum by resource."""
        total: dict[str, Num] = {}
        for value in values:
            for resource, seconds in value.items():
                total[resource] = total[resource] + seconds if resource in total else seconds
        return total

    def overlap(self, parts: Sequence[Work], values: list[Mapping[str, Num]]) -> Mapping[str, Num]:  # noqa: ARG002
        """Sum by resource."""
        return self.serial(values)

    def repeat(self, count: Num, value: Mapping[str, Num], *, runs: bool) -> Mapping[str, Num]:
        """Times count."""
        return {r: _repeated(count, v, runs=runs) for r, v in value.items()}

    def select(self, mask: Any, a: Mapping[str, Num], b: Mapping[str, Num]) -> Mapping[str, Num]:
        """The branch taken."""
        return {r: where(mask, a.get(r, 0.0), b.get(r, 0.0)) for r in {*a, *b}}

    def pipeline(self, pipe: Pipeline, values: list[list[Mapping[str, Num]]]) -> Mapping[str, Num]:
        """Of the stage with the most."""
        stages = [
            self.serial([self.repeat(f.count, v[s], runs=f.runs) for f, v in zip(pipe.flows, values, strict=True)])
            for s in range(len(values[0]))
        ]
        return {r: _scaled(pipe.rounds, _largest([s.get(r, 0.0) for s in stages])) for r in RESOURCES}


class PeakBytes:
    """Activation memory as the monoid (net, peak): what remains after a part, and the most held during it.

    serial: (n1 + n2, max(p1, n1 + p2)).  repeat k: (k n, (k - 1) n + p if n >= 0 else p).  overlap: both at once.
    A pipeline in forward-only service holds one microbatch: the most of any stage.
    Where a backward pass follows, what an earlier op keeps counts twice while a later one of the forward reads it; the widest
    moment lies in the backward, which counts gradients beside what is kept.
    """

    def __init__(self, *, keeps_saved: bool) -> None:
        self.keeps_saved = keeps_saved

    def leaf(self, op: Leaf) -> tuple[Num, Num]:
        """Saved bytes remain when a backward pass follows; live bytes are held while it runs."""
        if not self.keeps_saved:
            return 0.0, op.live_bytes
        return op.saved_bytes, maximum(op.saved_bytes, op.live_bytes)

    def serial(self, values: list[tuple[Num, Num]]) -> tuple[Num, Num]:
        """Fold from the left."""
        net: Num = 0.0
        peak: Num = 0.0
        for n, p in values:
            if type(net) is float and net == 0.0:
                peak, net = maximum(peak, p), n
            else:
                peak, net = maximum(peak, net + p), net + n
        return net, peak

    def overlap(self, parts: Sequence[Work], values: list[tuple[Num, Num]]) -> tuple[Num, Num]:  # noqa: ARG002
        """Both at once."""
        return _sum([n for n, _ in values]), _sum([p for _, p in values])

    def repeat(self, count: Num, value: tuple[Num, Num], *, runs: bool) -> tuple[Num, Num]:
        """In closed form; over runs, run after run."""
        net, peak = value
        if runs:
            shape = np.broadcast_shapes(np.shape(count), np.shape(net), np.shape(peak))
            counts, nets, peaks = (np.broadcast_to(x, shape) for x in (count, net, peak))
            return self.serial([self.repeat(c, (n, p), runs=False) for c, n, p in zip(counts, nets, peaks, strict=True)])
        if type(net) is float and net == 0.0:
            return 0.0, where(count > 0, peak, 0.0)
        grown = where(net >= 0, (count - 1) * net + peak, peak)
        return count * net, where(count > 0, grown, 0.0)

    def select(self, mask: Any, a: tuple[Num, Num], b: tuple[Num, Num]) -> tuple[Num, Num]:
        """The branch taken."""
        return where(mask, a[0], b[0]), where(mask, a[1], b[1])

    def pipeline(self, pipe: Pipeline, values: list[list[tuple[Num, Num]]]) -> tuple[Num, Num]:
        """The most of any stage and flow, of runs and flows that there are."""
        there = [
            (flow, net, peak if type(flow.count) is float else where(flow.count > 0, peak, 0.0))
            for flow, stages in zip(pipe.flows, values, strict=True)
            for net, peak in stages
        ]
        flat = [(net, np.max(peak, axis=0) if flow.runs and np.ndim(peak) == np.ndim(flow.count) else peak) for flow, net, peak in there]
        return _largest([n for n, _ in flat]), _largest([p for _, p in flat])


def peak_bytes(work: Work, *, keeps_saved: bool = False) -> Bytes:
    """The most activation bytes held at any moment of `work`; `keeps_saved` when a backward pass follows."""
    peak: Bytes = fold(work, PeakBytes(keeps_saved=keeps_saved))[1]
    return peak


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
        return Passed(_sum([value.seconds for value in values]), values)

    def overlap(self, parts: Sequence[Work], values: list[Passed]) -> Passed:  # noqa: ARG002
        """The part that takes longest, and the others beside it."""
        longest = max(values, key=lambda value: total(value.seconds))
        return Passed(longest.seconds, [longest], waiting=[value for value in values if value is not longest])

    def repeat(self, count: Num, value: Passed, *, runs: bool) -> Passed:
        """Times count."""
        return Passed(_repeated(count, value.seconds, runs=runs), [value], count)

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
        return [rounds * np.array(turns(flow.count, seconds[0], _alike(flow)))[:, None]]
    ends = np.cumsum([len(flow.alike) for flow in pipe.flows])
    spans = [slice(end - len(flow.alike), end) for end, flow in zip(ends, pipe.flows, strict=True)]
    each = np.eye(ends[-1])
    shares = [crossing for flow, span in zip(pipe.flows, spans, strict=True) for crossing in crossings(flow.alike, list(each[span]))]
    found = longest(_lines(pipe, seconds), shares, rounds)
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
