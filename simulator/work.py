"""A model on a machine is a tree of ops; every answer is a fold over it.

Leaves are `Op` (one kernel on one GPU) and `Message` (one transfer of one GPU with its group).  Branches are
`Serial`, `Overlap`, `Repeat`, `Select` and `Pipeline`.  `fold(work, algebra)` is the only evaluator: an `Algebra`
says what a leaf is worth and how values combine.  The algebras here know no GPU; those that turn work into seconds
take the leaf's time as a function (`simulator.timing` makes it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from simulator.schedule import Crossing, Line, Run, by_run, crossings, equal, growing, lines, makespan, turn
from simulator.units import Bytes, Count, Flops, Num, Seconds, maximum, where

RESOURCES = ("tensor", "vector", "special", "hbm", "l2", "link", "host")


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


def summed(values: Sequence[Num]) -> Num:
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


def repeated(count: Num, value: Num, *, runs: bool) -> Num:
    """Count x value, of runs their sum."""
    if not runs:
        return count * value
    if type(value) is not float and np.ndim(value) >= np.ndim(count):
        whole: Num = np.add.reduce(count * value, axis=0)
    else:
        whole = np.add.reduce(count, axis=0) * value
    return float(whole) if isinstance(whole, np.float64) else whole


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
        return summed(values)

    def overlap(self, parts: Sequence[Work], values: list[Num]) -> Num:  # noqa: ARG002 (the protocol's signature)
        """Sum: overlapping moves no less."""
        return summed(values)

    def repeat(self, count: Num, value: Num, *, runs: bool) -> Num:
        """Count times value."""
        return repeated(count, value, runs=runs)

    def select(self, mask: Any, a: Num, b: Num) -> Num:
        """The branch taken."""
        return where(mask, a, b)

    def pipeline(self, pipe: Pipeline, values: list[list[Num]]) -> Num:
        """Of the stage with the most."""
        totals = [
            summed([self.repeat(flow.count, stages[s], runs=flow.runs) for flow, stages in zip(pipe.flows, values, strict=True)])
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


def run_by(work: Work, implementations: Mapping[str, str]) -> Work:
    """The same tree, its ops whose implementation is open named by kernel."""

    def name(op: Leaf) -> float:
        if isinstance(op, Op) and not op.impl:
            op.impl = implementations.get(op.kernel, "")
        return 0.0

    fold(work, SecondsSerial(name))
    return work


def _scheduled(pipe: Pipeline, values: Sequence[Sequence[Any]]) -> Any:
    """The time of a pipeline under the seconds of its stages."""
    flow = pipe.flows[0]
    if flow.steady:
        return _scaled(pipe.rounds, turn(flow.count, values[0], alike_stages(flow)))
    return makespan(lines_of(pipe, values), pipe.rounds)


def alike_stages(flow: Flow) -> Sequence[float]:
    """How many equal stages each of a flow's stands for."""
    return flow.times or [1.0] * len(flow.stages)


def lines_of(pipe: Pipeline, values: Sequence[Sequence[Any]]) -> list[Line]:
    """The stages with what they take of all flows."""
    stages = [
        [crossing for flow, each in zip(pipe.flows, values, strict=True) for crossing in _crossed(flow, each[s])] for s in range(len(values[0]))
    ]
    wholes = [
        summed([repeated(flow.count, each[s], runs=flow.runs) for flow, each in zip(pipe.flows, values, strict=True)]) for s in range(len(stages))
    ]
    return lines(stages, alike_stages(pipe.flows[0]), wholes)


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
                longest = maximum(longest, summed(shared))
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
        return {r: repeated(count, v, runs=runs) for r, v in value.items()}

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
        return summed([n for n, _ in values]), summed([p for _, p in values])

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
