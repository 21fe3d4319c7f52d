"""What a system does: prefill as runs of chunks, decode, and mixed steps; and what it holds while doing it.

A step is the same for all of them: every stage of the pipeline runs its blocks over the segments.  Only the segments
differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from simulator.dtypes import BF16, CacheFormat, DType
from simulator.footprint import Footprint
from simulator.kernels.attention import Mask, Segment
from simulator.layers.layer import Direction, Layer, is_mixer, weight_bytes
from simulator.model import ModelSpec
from simulator.parallel.layout import DEGREES, Layout
from simulator.parallel.pipeline import Stage
from simulator.runs import runs
from simulator.units import Bytes, Count, Num, Tokens, ceil, floor, maximum, minimum, where
from simulator.work import Flow, Known, Later, Op, Overlap, Pipeline, Repeat, Serial, Work, fold, peak_bytes, quantity

#: Host work of one step of one stage: from the number of kernels launched to an op on resource `host`.
Host = Callable[[Count, Tokens], Op]


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """`batch` prompts of `context` tokens, of which `prefix` are already cached, in chunks of `chunk` tokens a step
    (None: the whole prompt at once).  A chunk is shared by the prompts that run together: one prompt at a time.
    """

    context: Num
    batch: Num = 1.0
    prefix: Num = 0.0
    chunk: Num | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """One step of `batch` sequences that each add `new_tokens` (1, or k verified) to end at `context` tokens."""

    context: Num
    batch: Num = 1.0
    new_tokens: Num = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """One step that carries any segments together: a prefill chunk beside decoding sequences."""

    segments: tuple[Segment, ...]


Phase = Prefill | Decode | Mixed
#: Numbers of a segment that are the runs of one question, not the cells of a sweep.
_FEW = 32


@dataclass(frozen=True, slots=True, eq=False)
class TrainStep:
    """One optimizer step over `batch` sequences of `context` tokens; a microbatch is `micro` sequences of every replica.

    `recompute`: "none" keeps every activation, "full" a block's input.  `zero`: the stage of shared states, shared by `sharers`
    neighbours (None: by all that hold the same weights).  `schedule` of the pipeline, with `chunks` model chunks of a stage if it is
    interleaved.  `gradient`: the element that gradients are kept and sent in.  `overlaps`: the states' traffic passes beside the
    layers.  `train_step` makes the tree.
    """

    context: Num
    batch: Num = 1.0
    recompute: str = "none"
    zero: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    optimizer: str = "adamw"
    micro: Num = 1.0
    gradient: DType = BF16
    sharers: Num | None = None
    overlaps: bool = True


class System:
    """A model on a layout: shards every kind of layer once per step and composes stages.

    Holds no result: only the model, the layout placed on it and the cache's format.
    """

    def __init__(self, model: ModelSpec, layout: Layout, cache: CacheFormat | None = None) -> None:
        self.model, self.layout, self.cache = model, layout.place(model), cache or model.cache
        self.stages: list[Stage] = self.layout.pipeline.distinct(model)
        self.times = [stage.times for stage in self.stages]
        self._plain = not any(isinstance(getattr(layout, degree), np.ndarray) for degree in DEGREES)
        shares = [stage[1:-1] for stage in self.stages]
        #: For each stage the first that is equal to it.
        self.alike = [i if isinstance(self.layout.pp, np.ndarray) else shares.index(share) for i, share in enumerate(shares)]
        self.masks: list[Mask] = list(dict.fromkeys(layer.mask for _, layer in model.mixers if hasattr(layer, "mask")))

    def _layer(self, layer: Layer, segments: tuple[Segment, ...], direction: Direction) -> Work:
        """One layer's work on one rank."""
        return self.layout.work(layer, self.layout.shard(layer, segments), self.cache, direction=direction)

    def step(
        self, segments: tuple[Segment, ...], *, host: Host | None = None, direction: Direction = Direction.FORWARD
    ) -> list[Work]:
        """The work of one step on each stage; equal neighbours are one (`times`), equal others one node."""
        shared: dict[Layer, Later] = {}

        # the work of one question is small enough to keep for the next fold; that of a sweep is not
        keep = cache if self._plain and all(np.size(number) <= _FEW for segment in segments for number in segment) else _forget

        def later(*layers: Layer) -> Work:
            """Equal layers of different blocks are one node: a fold evaluates them once."""
            return Serial([shared.setdefault(layer, Later(keep(partial(self._layer, layer, segments, direction)))) for layer in layers])

        # blocks of several stages are evaluated once, too
        blocks = [Later(cache(partial(later, *block))) for block in self.model.kinds]
        tokens = self.layout.shard(self.model.embedding, segments).tokens
        embedding, head = later(self.model.embedding), later(self.model.head)
        # hyper-connections hand their streams over, in the place of the residual and the block output
        streams = self.model.streams
        send = self.layout.pipeline.hand_over(tokens if streams == 1 else tokens * (streams / 2))
        launches, known = quantity("launches"), Known()

        def stage_work(stage: Stage) -> Work:
            parts: list[Work] = [
                Repeat(count, block)
                for count, block in zip(stage.counts, blocks, strict=True)
                if isinstance(count, np.ndarray) or count
            ]
            if isinstance(stage.first, np.ndarray) or stage.first:
                parts.insert(0, Repeat(stage.first, embedding))
            if isinstance(stage.last, np.ndarray) or stage.last:
                parts.append(Repeat(stage.last, head))
            sends = (1 - stage.last) * stage.present
            if send is not None and (isinstance(sends, np.ndarray) or sends):
                parts.append(Repeat(sends, send))
            work: Work = Serial(parts)
            return work if host is None else Overlap([Repeat(stage.present, host(fold(work, launches, known), tokens)), work])

        works: list[Work] = []
        for number, alike in enumerate(self.alike):
            works.append(works[alike] if alike < number else stage_work(self.stages[number]))
        return works

    def work(self, phase: Phase, *, host: Host | None = None) -> Work:
        """The tree of a phase."""
        if isinstance(phase, Mixed):
            return Pipeline([Flow(1.0, self.step(phase.segments, host=host), times=self.times)])
        if isinstance(phase, Decode):
            return self._decode(phase, host)
        return self._prefill(phase, host)

    def _decode(self, phase: Decode, host: Host | None) -> Work:
        """One token for every sequence.  Over p stages the batch goes round as min(p, B) groups without end: a sequence's
        next token is ready when its group has passed all stages and the groups before it have had their turn.
        """
        replicas = self.layout.dp * self.layout.dp_attention
        local = ceil(phase.batch / replicas)
        groups = minimum(self.layout.pp * 1.0, local)
        prefix = phase.context - phase.new_tokens
        share = ceil(local / groups) * replicas
        segments = (Segment(share, phase.new_tokens, prefix, split_kv=True),)
        works = self.step(segments, host=host)
        return works[0] if len(works) == 1 else Pipeline([Flow(groups, works, steady=True, times=self.times)])

    def _prefill(self, phase: Prefill, host: Host | None) -> Work:
        """Runs of whole chunks at their mean prefix, then the ragged last chunk.

        Over p > 1 stages a run's chunks lie on a line between its neighbours' means: within 0.2 % of schedules simulated chunk by chunk
        (0.3 % where few key-value heads outgrow the L2 on the way), at 2 to 16 stages and random questions.
        """
        new = phase.context - phase.prefix
        chunk = new if phase.chunk is None else minimum(phase.chunk, new)
        if phase.chunk is None:
            flows = [Flow(1.0, self.step((Segment(phase.batch, new, phase.prefix),), host=host), times=self.times)]
            return flows[0].stages[0] if len(flows[0].stages) == 1 else Pipeline(flows)
        # a sequence at a time: chunks of different prompts follow each other
        replicas = self.layout.dp * self.layout.dp_attention
        prompts = ceil(phase.batch / replicas)
        whole = floor(new / chunk)
        last = new - whole * chunk
        whole_of_all = whole + 0.0 * (phase.batch + new + self.layout.gpus * self.layout.ep * self.layout.dcp)
        counts, before = runs(self.masks, prefix=phase.prefix, chunk=chunk, whole=whole_of_all)
        segments = Segment(replicas, chunk, phase.prefix + before * chunk, chunks=np.maximum(counts, 1e-9))
        ragged = Segment(replicas, maximum(last, 1.0), phase.prefix + whole * chunk - where(last > 0, 0.0, 1.0))
        flows = [Flow(counts, self.step((segments,), host=host), runs=True, times=self.times)]
        if np.any(last > 0):
            flows.append(Flow(where(last > 0, 1.0, 0.0), self.step((ragged,), host=host), times=self.times))
        if len(self.stages) == 1:
            return Repeat(prompts, Serial([Repeat(f.count, f.stages[0], runs=f.runs) for f in flows]))
        return Pipeline(flows, prompts)

    def footprint(self, *, sequences: Num, context: Num, step_tokens: Num) -> Footprint:
        """What the most demanding rank holds: weights, the caches of `sequences` at `context` tokens, and the
        activations of a step of `step_tokens` new tokens.
        """
        return replace(self.resident(sequences=sequences, context=context), activations=self.activation_bytes(step_tokens))

    def resident(self, *, sequences: Num, context: Num) -> Footprint:
        """Weights and caches of the stage that holds most of both."""
        stored = (Segment(sequences, 0.0, context),)
        kinds = [self._resident(block, stored) for block in self.model.kinds]
        ends = [self._resident((layer,), stored)[0] for layer in (self.model.embedding, self.model.head)]
        tied = ends[0] if self.model.head.tied else 0.0
        largest: Footprint | None = None
        for stage in self.stages:
            # a last stage apart from the first holds a tied embedding once more
            weights: Bytes = _times(stage.first, ends[0]) + _times(stage.last, ends[1] + (1 - stage.first) * tied)
            cache: Bytes = 0.0
            for count, (held, kept) in zip(stage.counts, kinds, strict=True):
                weights, cache = weights + count * held, cache + count * kept
            if largest is None:
                largest = Footprint(weights=weights, cache=cache)
            else:
                more = weights + cache > largest.weights + largest.cache
                largest = Footprint(weights=where(more, weights, largest.weights), cache=where(more, cache, largest.cache))
        assert largest is not None
        return largest

    def _resident(self, block: Sequence[Layer], stored: tuple[Segment, ...]) -> tuple[Bytes, Bytes]:
        """Weights and cache of one block on one rank."""
        weights: Bytes = 0.0
        cache: Bytes = 0.0
        for layer in block:
            held = self.layout.shard(layer, stored)
            weights = weights + weight_bytes(layer, held)
            if is_mixer(layer):
                cache = cache + layer.state_bytes(held, self.cache)
        return weights, cache

    def residual_bytes(self, step_tokens: Num) -> Bytes:
        """The residual streams and the block output beside them: tensors of T D."""
        return step_tokens * ((1 + self.model.streams) * self.model.hidden_size * BF16.bytes) / self.layout.token_ranks

    def activation_bytes(self, step_tokens: Num) -> Bytes:
        """The most activations held in one step of `step_tokens`: the residual stream and the widest op of any layer.
        Attention keeps no score matrix; its cost is the kernel's inputs and outputs.
        """
        segments = (Segment(self.layout.dp * self.layout.dp_attention * 1.0, step_tokens, 0.0),)
        peak: Bytes = 0.0
        for layer in (*self.model.layers, self.model.embedding):
            peak = maximum(peak, peak_bytes(self._layer(layer, segments, Direction.FORWARD)))
        return peak + self.residual_bytes(step_tokens)


def _forget(make: Callable[[], Work]) -> Callable[[], Work]:
    """Made anew each time."""
    return make


def _times(share: Num, value: Num) -> Num:
    """Share x value, without touching arrays where the share is plainly nothing."""
    return 0.0 if isinstance(share, float) and share == 0.0 else share * value
