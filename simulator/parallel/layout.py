"""A layout is an ordered composition of schemes with degrees.

Rank order, innermost first: tensor, Ulysses, context, pipeline, attention-data, data: the chattiest group gets neighbours.
Decode-context, Helix and expert groups lie inside the tensor and the tensor x attention-data group.
GPUs = tp x ulysses x cp x pp x dp_attention x dp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from simulator.dtypes import CacheFormat
from simulator.footprint import Footprint
from simulator.kernels.attention import Segment
from simulator.layers.layer import Direction, Layer, Slice
from simulator.model import ModelSpec
from simulator.parallel.attention_data import AttentionData
from simulator.parallel.context import Context
from simulator.parallel.data import Data
from simulator.parallel.decode_context import DecodeContext
from simulator.parallel.expert import Expert
from simulator.parallel.helix import Helix
from simulator.parallel.pipeline import Pipeline, Stage
from simulator.parallel.scheme import Scheme, is_one
from simulator.parallel.sequence import Sequence
from simulator.parallel.tensor import Tensor
from simulator.parallel.ulysses import Ulysses
from simulator.units import Num, maximum
from simulator.work import Group, Work

#: Order of sharding: what splits requests first, then tokens, experts (they decide who splits widths), widths, caches.
REGISTRY: tuple[type[Scheme], ...] = (
    Data, AttentionData, Context, Ulysses, Sequence, Expert, Tensor, Helix, DecodeContext, Pipeline,
)  # fmt: skip


#: The fields of a layout that are degrees, in the order of its constructor.
DEGREES = ("tp", "pp", "dp", "ep", "dcp", "dp_attention", "cp", "ulysses", "cp_inner", "helix", "sp", "ep_nodes")


class RankClass(NamedTuple):
    """Ranks that do the same: a stage of the pipeline (its busiest expert rank, its busiest replica), and where their
    order is not balanced a position in the ring of context parallelism.
    """

    name: str
    stage: Stage
    position: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Degrees of each scheme, numbers or arrays.  `hidden_size`, `groups` and `active`, the schemes that do something,
    are set when a model is placed on it.

    `ep_nodes` nodes over which expert ranks send a row once for each.  Of context parallelism: `order` of tokens,
    `passing` (what goes round), `cp_inner` ranks of a double ring, `merge` of decoded outputs, and `hidden_from`, the new
    tokens from which "auto" passes keys and values; `holds` is what a rank keeps of a cache: its tokens' "share", or the "whole".
    """

    tp: Num = 1
    pp: Num = 1
    dp: Num = 1
    ep: Num = 1
    dcp: Num = 1
    dp_attention: Num = 1
    cp: Num = 1
    ulysses: Num = 1
    cp_inner: Num = 1
    helix: Num = 1
    sp: Num = 1
    ep_nodes: Num = 1
    order: str = "zigzag"
    passing: str = "kv"
    merge: str = "gather"
    holds: str = "share"
    hidden_from: Num = math.inf
    hidden_size: int = dataclasses.field(default=0, init=False)
    groups: Mapping[str, Group] = dataclasses.field(default_factory=dict, init=False)
    active: tuple[Scheme, ...] = dataclasses.field(default=(), init=False)

    def __post_init__(self) -> None:
        """Refuse degrees that are not positive integers."""
        for name in DEGREES:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                continue
            if isinstance(value, bool) or not math.isfinite(value) or value != int(value) or value < 1:
                flag = name.replace("_", "-")
                message = f"--{flag} {value}: a degree is a positive integer"
                raise ValueError(message)

    @property
    def gpus(self) -> Num:
        """Product of the degrees that need their own GPUs."""
        product: Num = self.tp * self.pp * self.dp * self.dp_attention
        return product if is_one(self.cp) and is_one(self.ulysses) else product * self.cp * self.ulysses

    @property
    def replica_gpus(self) -> Num:
        """GPUs that serve one request together: those of a replica, and of one share of attention-data parallelism."""
        return self.tp * self.pp * self.cp * self.ulysses

    @property
    def expert_shares(self) -> Num:
        """Groups with tokens of their own that share one set of experts: those of attention-data parallelism, and of context
        parallelism where experts are split over its ranks too.  The others hold the same tokens.
        """
        return 1.0 if is_one(self.ep) else maximum(self.ep / self.tp, 1.0)

    @property
    def token_ranks(self) -> Num:
        """Ranks that share the tokens of one replica's residual stream."""
        return self.cp * self.ulysses * self.sp

    @property
    def schemes(self) -> list[Scheme]:
        """The composition, in order of sharding."""
        return [scheme(self) for scheme in REGISTRY]

    @property
    def pipeline(self) -> Pipeline:
        """The scheme that makes stages."""
        return Pipeline(self)

    def place(self, model: ModelSpec) -> Layout:
        """This layout, told the width of the model's residual stream."""
        degrees = {
            "tp": (self.tp, 1.0), "dcp": (self.dcp, 1.0), "helix": (self.helix, 1.0), "ep": (self.ep, 1.0), "ep_nodes": (self.ep_nodes, 1.0),
            "pp": (2.0, self.tp * 1.0),
        }  # fmt: skip
        if not (is_one(self.cp) and is_one(self.ulysses)):
            ring, blocks = self.tp * self.ulysses, self.tp * self.ulysses * self.cp_inner
            degrees |= {
                "ulysses": (self.ulysses, self.tp * 1.0), "cp": (self.cp, ring * 1.0), "cp_inner": (self.cp_inner, ring * 1.0),
                "pp": (2.0, ring * self.cp * 1.0),
            }  # fmt: skip
        groups = {name: Group(name, ranks * 1.0, stride) for name, (ranks, stride) in degrees.items() if not is_one(getattr(self, name))}
        if "ep_nodes" in groups:
            near = self.ep / self.ep_nodes
            groups |= {"ep_nodes": Group("ep_nodes", self.ep_nodes * 1.0, near * 1.0), "ep_local": Group("ep_local", near * 1.0)}
        if "cp_inner" in groups:
            groups["cp_outer"] = Group("cp_outer", self.cp / self.cp_inner * 1.0, blocks * 1.0)
        placed = replace(self)
        # the schemes look their degrees up in the layout they are part of
        active = tuple(scheme(placed) for scheme in REGISTRY if not is_one(getattr(self, scheme.field)))
        for name, value in (("hidden_size", model.hidden_size), ("groups", groups), ("active", active)):
            object.__setattr__(placed, name, value)
        return placed

    def shard(self, layer: Layer, segments: tuple[Segment, ...]) -> Slice:
        """What one rank holds of `layer` when the whole system runs `segments`."""
        held = layer.whole(segments)
        for scheme in self.active:
            held = scheme.shard(held, layer)
        return held

    def spread(self, held: Slice) -> Slice:
        """A slice as a core sees it that exchanges tokens for heads."""
        return held if is_one(self.ulysses) else Ulysses(self).spread(held)

    def work(self, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction = Direction.FORWARD) -> Work:
        """The layer's work on one rank with every scheme's messages around it."""
        work: Work = layer.work(held, direction, cache=cache)
        for scheme in self.active:
            work = scheme.around(work, layer, held, cache, direction)
        return work

    def ranks(self, model: ModelSpec) -> list[RankClass]:
        """The distinct rank classes.  Memory and time are maxima over them, never means."""
        found: list[RankClass] = []
        rings = Context(self).classes()
        seen: set[tuple[object, ...]] = set()
        for stage in self.pipeline.stages(model):
            key = (*stage.counts, stage.first, stage.last) if isinstance(self.pp, (int, float)) else (stage.number,)
            if key not in seen:
                seen.add(key)
                name = "only" if stage.number == 0 and np.all(self.pp == 1) else f"stage {stage.number}"
                for position, ring in enumerate(rings):
                    told = " ".join(part for part in (name if not ring or name != "only" else "", ring) if part)
                    found.append(RankClass(told, stage, position if ring else None))
        return found

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """Every rule the model breaks on this layout."""
        for scheme in self.schemes:
            yield from scheme.refusals(model)

    def footprint(self, parts: list[Footprint]) -> Footprint:
        """The part of a uniform machine that must hold the most demanding rank."""
        return max(parts, key=lambda part: float(np.max(part.total)))

    def __str__(self) -> str:
        """TP8 x PP2, leaving out degrees of one."""
        names = [("TP", self.tp), ("PP", self.pp), ("DP-attention", self.dp_attention), ("DP", self.dp), ("EP", self.ep), ("DCP", self.dcp)]
        names[1:1] = [("Ulysses", self.ulysses), ("CP", self.cp)]
        names += [("Helix", self.helix), ("SP", self.sp)]
        shown = [f"{name}{int(degree)}" for name, degree in names if not isinstance(degree, np.ndarray) and degree > 1]
        multiply = [text for text in shown if not text.startswith(("EP", "DCP", "Helix", "SP"))]
        return " + ".join([" x ".join(multiply), *(text for text in shown if text not in multiply)]) if shown else "one GPU"
