"""One optimizer step of training: microbatches through stages forward and backward, shared states, the update.

Legend: n ranks share the states of one replica's weights (data x context x Ulysses), p stages, m microbatches of `micro`
sequences a replica each, v model chunks of a stage, P parameters of a rank.
Forward and backward of every layer are those of serving and of its gradient, with every scheme's messages around them; the
head scores every token.  Schedules: gpipe and 1f1b take the same time, m (F + B) + (p - 1)(F + B) where stages are equal;
interleaved passes m v microbatches of 1 / v of a stage.  They differ in what they keep (`Schedule.in_flight`).
Recomputing "full" keeps a block's input and runs it forward once more before its backward.
Weights are bf16 and gradients what the phase says; AdamW reads and writes 28 bytes a parameter (gradient, weight, master and two
moments; 30 with fp32 gradients).  A model whose weights are in fp8 is trained in fp8: all three products of a linear layer.
Neglected: Newton-Schulz of Muon (its bound is told), gradient norm and clipping, an optimizer in several kernels, adding a microbatch's
gradients to those before, casts to fp8 and what fp8 keeps, ring messages' buffers; groups of data x context ranks are placed as if
evenly spaced.  Experts over ranks: dispatch and combine of the busiest rank's rows, forward and backward.
Source: FORMULAS 4.1 to 4.5, 5.2; schedules and shared states in `parallel.schedules` and `parallel.sharded_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from simulator.dtypes import BF16, FP32, INT8
from simulator.footprint import Footprint
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import elementwise
from simulator.kernels.messages import message
from simulator.layers import Attention, LatentAttention, MoE
from simulator.layers.layer import Direction, Layer, parameters
from simulator.parallel.layout import Layout
from simulator.parallel.pipeline import Stage
from simulator.parallel.schedules import Schedule
from simulator.parallel.scheme import is_one
from simulator.parallel.sequence import Sequence as SequenceParallel
from simulator.parallel.sharded_data import ADAM_BYTES, ShardedData
from simulator.phases import System, TrainStep
from simulator.units import Bytes, Count, Num, maximum
from simulator.work import Flow, Later, PeakBytes, Pipeline, Repeat, Serial, Work, fold, run_by

RECOMPUTE = ("none", "full")
#: Schedules that are a flow through the stages; the others' bubbles stand in `parallel.schedules`.
SCHEDULES = ("gpipe", "1f1b", "interleaved")
#: Bytes a parameter of an optimizer's states: fp32 master and moments.  Muon keeps one, but two for embedding and head.
OPTIMIZERS = {"adamw": ADAM_BYTES, "muon": 8.0}


def schedule(layout: Layout, phase: TrainStep) -> Schedule:
    """The pipeline's schedule."""
    return Schedule(phase.schedule, layout.pp, phase.batch / (replicas(layout) * phase.micro), float(phase.chunks))


def replicas(layout: Layout) -> Num:
    """Groups of ranks with sequences of their own; those of attention-data parallelism share one set of experts."""
    return layout.dp * layout.dp_attention


def states(layout: Layout, phase: TrainStep, layer: Layer | None = None) -> ShardedData:
    """Who shares weights, gradients and optimizer states: all ranks that hold the same weights, or `sharers` neighbours of them.

    Of experts over e ranks 1 / e as many do as of the rest; router and shared experts are taken with them.
    """
    ranks, stride = replicas(layout) * layout.cp * layout.ulysses * 1.0, layout.tp * layout.pp * 1.0
    if apart(layout, layer):
        ranks, stride = ranks * layout.tp / layout.ep, layout.ep * layout.pp * 1.0
    sharers = ranks if phase.sharers is None else phase.sharers * 1.0
    return ShardedData(
        phase.zero, sharers, ranks / sharers, stride=stride, gradient=phase.gradient, optimizer_bytes=OPTIMIZERS[phase.optimizer]
    )


def apart(layout: Layout, layer: Layer | None) -> bool:
    """Whether the layer is experts spread over ranks that hold the rest whole."""
    return isinstance(layer, MoE) and not is_one(layout.ep)


def refusals(system: System, phase: TrainStep) -> Iterator[str]:
    """What cannot be trained so, one line each."""
    layout = system.layout
    for name, value, known in (
        ("recompute", phase.recompute, RECOMPUTE), ("optimizer", phase.optimizer, tuple(OPTIMIZERS)), ("schedule", phase.schedule, SCHEDULES),
    ):  # fmt: skip
        if value not in known:
            yield f"--{name} {value}: not modelled in a step; use one of {', '.join(known)}"
            return
    for name in ("dcp", "helix"):
        if getattr(layout, name) > 1:
            yield f"--{name} {int(getattr(layout, name))}: not modelled in training; use --tp, --sp, --cp, --ulysses, --pp, --dp, --ep"
            return
    if layout.dp_attention > 1 and is_one(layout.ep):
        yield f"--dp-attention {int(layout.dp_attention)}: in training it is the replicas that share experts; use --ep with it, or --dp"
        return
    if phase.sharers is not None and not is_one(layout.ep):
        yield f"sharers {int(phase.sharers)}: not modelled with experts over {int(layout.ep)} ranks; leave it out"
        return
    if layout.cp > 1 and layout.passing in ("q", "auto"):
        yield f"--cp-passing {layout.passing}: queries go round in serving alone, no backward pass does so; use kv, gather or double"
        return
    whole = int(replicas(layout) * phase.micro)
    if phase.batch % whole:
        each = f"--dp {whole}" if whole == layout.dp else f"{whole} (replicas x sequences of a microbatch)"
        yield f"--batch {int(phase.batch)}: replicas take equal numbers of sequences; use a multiple of {each}"
        return
    ranks = replicas(layout) * layout.cp * layout.ulysses
    if phase.sharers is not None and ranks % phase.sharers:
        yield f"sharers {int(phase.sharers)}: {int(ranks)} ranks hold the same weights; use a divisor"
        return
    if phase.chunks > 1 and phase.schedule != "interleaved":
        yield f"--model-chunks {phase.chunks}: only --schedule interleaved splits stages into chunks; leave it out"
    yield from states(layout, phase).refusals()
    yield from schedule(layout, phase).refusals()


def _travel(shared: ShardedData) -> bool:
    """Whether more than one rank holds the same weights."""
    return not is_one(shared.ranks * shared.replicas)


#: What frameworks run of attention, forward and backward: Transformer Engine prefers cuDNN's kernels on Hopper and Blackwell, before
#: FlashAttention's (its docs/examples/attention/attention.ipynb at 0f60e59); where none was measured of them, what stands for attention.
TRAINED = {"attention": "cudnn", "attention_backward": "cudnn"}


class _Passes:
    """Every layer's forward and backward on one rank, each made once."""

    def __init__(self, system: System, phase: TrainStep) -> None:
        self.system, self.phase, self.states = system, phase, states(system.layout, phase)
        #: Those of experts that are spread over ranks.
        self.experts = next((states(system.layout, phase, x) for x in system.model.layers if apart(system.layout, x)), self.states)
        self.segments = (Segment(replicas(system.layout) * phase.micro * 1.0, phase.context, 0.0),)
        self.made: dict[tuple[str, Layer], Later] = {}
        self.shared = _travel(self.states)

    def parameters(self, layer: Layer) -> Count:
        """Weights of one rank."""
        return parameters(layer, self.system.layout.shard(layer, self.segments))

    def plain(self, layer: Layer, direction: Direction) -> Work:
        """The layer without traffic of its states."""
        layout, cache = self.system.layout, self.system.cache
        held = layout.shard(layer, self.segments)
        if layer is not self.system.model.head:
            return run_by(layout.work(layer, held, cache, direction), TRAINED)
        # every token is scored, and ranks of a split vocabulary need the largest logit, the sum and the label's
        every = held._replace(segments=(Segment(held.tokens, 1.0, 0.0),), asked=())
        loss = elementwise("cross entropy", rows=held.tokens, read=held.vocabulary, written=held.vocabulary, impl="activation", dtype=FP32)
        parts: list[Work] = [layer.work(every, direction, cache=cache), loss]
        if not is_one(layout.tp) and direction is Direction.FORWARD:
            payload = held.tokens * (3 * FP32.bytes)
            parts.append(message("combine logits", "all_reduce", group=layout.groups["tp"], payload_bytes=payload))
        return Serial(parts if direction is Direction.FORWARD else parts[::-1])

    def _with_states(self, layer: Layer, direction: Direction, *, last: bool) -> Work:
        work = self.plain(layer, direction)
        shared = self.experts if apart(self.system.layout, layer) else self.states
        if not _travel(shared):
            return work
        each = self.phase.zero >= 2 if direction is Direction.BACKWARD else self.phase.zero == 3  # noqa: PLR2004 (ZeRO's stages)
        if not each and not (last and direction is Direction.BACKWARD):
            return work
        if self.phase.overlaps:
            return shared.around(work, self.parameters(layer), direction)
        return Serial([work, *shared.beside(self.parameters(layer), direction)])

    def _later(self, name: str, layer: Layer, make: Callable[[], Work]) -> Later:
        return self.made.setdefault((name, layer), Later(make))

    def forward(self, layers: Sequence[Layer]) -> Work:
        """A block's forward."""
        return Serial([self._later("forward", x, partial(self._with_states, x, Direction.FORWARD, last=False)) for x in layers])

    def backward(self, layers: Sequence[Layer], *, last: bool) -> Work:
        """A block's backward, after a forward where nothing but its input was kept."""
        again = [self.forward(layers)] if self.phase.recompute == "full" else []
        return Serial([*again, self.gradients(layers, last=last)])

    def gradients(self, layers: Sequence[Layer], *, last: bool) -> Work:
        """Their gradients from the top down; `last`: of the last microbatch."""
        name = "last backward" if last and self.phase.zero < 2 else "backward"  # noqa: PLR2004
        return Serial([self._later(name, x, partial(self._with_states, x, Direction.BACKWARD, last=last)) for x in reversed(layers)])


def work(system: System, phase: TrainStep) -> Work:
    """The tree of a step."""
    passes, layout = _Passes(system, phase), system.layout
    plan = schedule(layout, phase)
    tokens = layout.shard(system.model.embedding, passes.segments).tokens
    send = layout.pipeline.hand_over(tokens * system.model.streams / 2 if system.model.streams > 1 else tokens)
    head, embedding = system.model.head, system.model.embedding

    def stage_work(stage: Stage, way: Callable[[Sequence[Layer]], Work], ends: Callable[[Sequence[Layer]], Work], *, ahead: bool) -> Work:
        """`ends` for embedding and head, which are not run again."""
        blocks: list[Work] = [Repeat(count, way(block)) for count, block in zip(stage.counts, system.model.kinds, strict=True) if count]
        if stage.first:
            blocks.insert(0, ends((embedding,)))
        if stage.last:
            blocks.append(ends((head,)))
        if send is not None and not (stage.last if ahead else stage.first):
            blocks.append(send)
        return Serial(blocks)

    def back_through(*, last: bool) -> list[Work]:
        ways = partial(passes.backward, last=last), partial(passes.gradients, last=last)
        return [stage_work(s, *ways, ahead=False) for s in system.stages][::-1]

    m = plan.microbatches
    forwards = [stage_work(s, passes.forward, passes.forward, ahead=True) for s in system.stages]
    once = passes.shared and phase.zero < 2  # noqa: PLR2004
    flows = [Flow(m, forwards, times=system.times)]
    back = [Flow(m - 1.0 if once else m, back_through(last=False), times=system.times[::-1])]
    if once:
        back.append(Flow(1.0, back_through(last=True), times=system.times[::-1]))
    update = _update(passes, max((_owned(passes, s) for s in system.stages), key=lambda owned: float(sum(count for _, count in owned))))
    if len(system.stages) == 1 and is_one(layout.pp):
        return Serial([*(Repeat(f.count, f.stages[0]) for f in (*flows, *back)), *update])
    if phase.schedule == "interleaved":
        v = float(phase.chunks)
        flows, back = ([replace(f, count=f.count * v, stages=[Repeat(1 / v, s) for s in f.stages]) for f in some] for some in (flows, back))
    return Serial([Pipeline(flows), Pipeline(back), *update])


def _owned(passes: _Passes, stage: Stage) -> list[tuple[ShardedData, Count]]:
    """Weights of a rank of one stage, by who shares them: experts over ranks last.  The last of several stages holds a tied embedding
    once more.
    """
    model, layout = passes.system.model, passes.system.layout
    whole: Count = stage.first * passes.parameters(model.embedding) + stage.last * passes.parameters(model.head)
    if model.head.tied:
        whole = whole + stage.last * (1 - stage.first) * passes.parameters(model.embedding)
    spread: Count = 0.0
    for count, block in zip(stage.counts, model.kinds, strict=True):
        whole = whole + count * sum(float(passes.parameters(layer)) for layer in block if not apart(layout, layer))
        spread = spread + count * sum(float(passes.parameters(layer)) for layer in block if apart(layout, layer))
    return [(passes.states, whole)] if passes.experts is passes.states else [(passes.states, whole), (passes.experts, spread)]


def _update(passes: _Passes, owned: Sequence[tuple[ShardedData, Count]]) -> list[Work]:
    """Read gradient, master and moments, write weight, master and moments of this rank's share; then weights return."""
    zero, kept = passes.phase.zero, OPTIMIZERS[passes.phase.optimizer]
    rows = sum(count / (shared.ranks if zero else 1.0) for shared, count in owned)
    update: list[Work] = [
        elementwise(
            "optimizer", rows=rows, read=kept + passes.phase.gradient.bytes, written=kept + BF16.bytes, impl="activation", dtype=INT8,
            handed=False,
        )
    ]
    if zero in (1, 2):
        update += [
            message("updated weights", "all_gather", group=shared.group, payload_bytes=count * BF16.bytes)
            for shared, count in owned
            if _travel(shared) and float(count)
        ]
    return update


def footprint(system: System, phase: TrainStep) -> Footprint:
    """What the fullest rank holds: states, the microbatches in flight, and the block whose backward runs.

    What a microbatch keeps on a stage is that of its layers on the rank's own tokens ("full": each block's input); the block at
    work holds what its ops hold in turn, forward and backward, beside the gradient of the residual stream.
    """
    passes, layout = _Passes(system, phase), system.layout
    plan, shared = schedule(layout, phase), passes.states
    tokens = layout.shard(system.model.embedding, passes.segments).tokens / layout.sp
    inputs = tokens * (system.model.hidden_size * system.model.streams * BF16.bytes)
    kept = [_kept(passes, block) for block in system.model.kinds]
    heads = fold(passes.plain(system.model.head, Direction.FORWARD), PeakBytes(keeps_saved=True))[1]
    gathered = 2 * max(sum(float(passes.parameters(layer)) for layer in block) for block in system.model.kinds)
    held: list[Footprint] = []
    first = 0.0
    for stage in system.stages:
        saved: Bytes = 0.0
        running: Bytes = 0.0
        for count, (net, peak) in zip(stage.counts, kept, strict=True):
            saved = saved + count * (inputs if phase.recompute == "full" else net)
            if count:
                running = maximum(running, inputs + (peak if phase.recompute == "full" else peak - net))
        running = maximum(running, stage.last * heads)
        part, *more = (who.footprint(count, gathered if who is shared else 0.0) for who, count in _owned(passes, stage))
        for other in more:
            part = replace(
                part, weights=part.weights + other.weights, gradients=part.gradients + other.gradients, optimizer=part.optimizer + other.optimizer
            )
        if phase.optimizer == "muon":
            ends = stage.first * passes.parameters(system.model.embedding) + stage.last * passes.parameters(system.model.head)
            part = replace(part, optimizer=part.optimizer + ends * (ADAM_BYTES - OPTIMIZERS["muon"]) / (shared.ranks if phase.zero else 1.0))
        held.append(replace(part, activations=plan.in_flight(first) * saved + running))
        first += stage.times
    return layout.footprint(held)


def _kept(passes: _Passes, block: Sequence[Layer]) -> tuple[Bytes, Bytes]:
    """(kept after its forward, most during forward and backward) of a block on the rank's own tokens; sequence parallelism shares
    its norms.
    """
    layout, cache = passes.system.layout, passes.system.cache

    def way(layer: Layer, direction: Direction) -> Work:
        held = layout.shard(layer, passes.segments)
        own = held._replace(segments=(Segment(1.0, held.tokens, 0.0),), asked=())
        return SequenceParallel(layout).around(layer.work(own, direction, cache=cache), layer, own, cache, direction)

    forward = Serial([way(layer, Direction.FORWARD) for layer in block])
    both = Serial([forward, *(way(layer, Direction.BACKWARD) for layer in reversed(block))])
    algebra = PeakBytes(keeps_saved=True)
    return fold(forward, algebra)[0], fold(both, algebra)[1]


def warnings(system: System, phase: TrainStep) -> list[str]:
    """What is left out, with its bound."""
    found = [f"training in bf16 with {phase.gradient.name} gradients: the checkpoint's own formats are not trained in"]
    if phase.optimizer == "muon":
        share = 5 * system.model.hidden_size / float(phase.batch * phase.context)
        found.append(f"Muon's Newton-Schulz iterations are not counted: at most {share:.1%} of the step's matrix products (5 D / tokens)")
    experts = any(isinstance(layer, MoE) for layer in system.model.layers)
    if experts and is_one(system.layout.ep):
        found.append("experts are held whole by every replica, split over tensor ranks only; --ep with --dp-attention spreads them")
    if any(not isinstance(layer, (Attention, LatentAttention)) for _, layer in system.model.mixers) and not is_one(system.layout.cp):
        found.append("mixers without a ring gather their rows again in the backward; their gradients' way back is not counted")
    return found


def tokens_of(phase: TrainStep) -> Num:
    """Tokens of a step."""
    return phase.batch * phase.context


__all__ = ["OPTIMIZERS", "RECOMPUTE", "SCHEDULES", "footprint", "refusals", "schedule", "states", "tokens_of", "warnings", "work"]
