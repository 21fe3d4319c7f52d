"""A layout is an ordered composition of schemes with degrees.

Rank order, innermost first: tensor, pipeline, attention-data, data.  Decode-context and expert groups lie inside the
tensor and the tensor x attention-data group.  GPUs = tp x pp x dp_attention x dp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simulator.dtypes import CacheFormat
from simulator.footprint import Footprint
from simulator.kernels.attention import Segment
from simulator.layers.layer import Layer, Slice
from simulator.model import ModelSpec
from simulator.parallel.attention_data import AttentionData
from simulator.parallel.data import Data
from simulator.parallel.decode_context import DecodeContext
from simulator.parallel.expert import Expert
from simulator.parallel.pipeline import Pipeline, Stage
from simulator.parallel.scheme import Scheme, is_one
from simulator.parallel.tensor import Tensor
from simulator.units import Num
from simulator.work import Group, Work

#: Order of sharding: what splits requests first, then experts (they decide who splits widths), then widths, then caches.
REGISTRY: tuple[type[Scheme], ...] = (Data, AttentionData, Expert, Tensor, DecodeContext, Pipeline)


#: The fields of a layout that are degrees, in the order of its constructor.
DEGREES = ("tp", "pp", "dp", "ep", "dcp", "dp_attention")


class RankClass(NamedTuple):
    """Ranks that do the same: a stage of the pipeline (its busiest expert rank, its busiest replica)."""

    name: str
    stage: Stage


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Degrees of each scheme, numbers or arrays.  `hidden_size`, `groups` and `active`, the schemes that do something,
    are set when a model is placed on it.
    """

    tp: Num = 1
    pp: Num = 1
    dp: Num = 1
    ep: Num = 1
    dcp: Num = 1
    dp_attention: Num = 1
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
        return self.tp * self.pp * self.dp * self.dp_attention

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
        degrees = {"tp": (self.tp, 1.0), "dcp": (self.dcp, 1.0), "ep": (self.ep, 1.0), "pp": (2.0, self.tp * 1.0)}
        groups = {name: Group(name, ranks * 1.0, stride) for name, (ranks, stride) in degrees.items() if not is_one(getattr(self, name))}
        placed = Layout(self.tp, self.pp, self.dp, self.ep, self.dcp, self.dp_attention)
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

    def work(self, layer: Layer, held: Slice, cache: CacheFormat, **direction: object) -> Work:
        """The layer's work on one rank with every scheme's messages around it."""
        work: Work = layer.work(held, cache=cache, **direction)  # type: ignore[arg-type]
        for scheme in self.active:
            work = scheme.around(work, layer, held, cache)
        return work

    def ranks(self, model: ModelSpec) -> list[RankClass]:
        """The distinct rank classes.  Memory and time are maxima over them, never means."""
        found: list[RankClass] = []
        seen: set[tuple[object, ...]] = set()
        for stage in self.pipeline.stages(model):
            key = (*stage.counts, stage.first, stage.last) if isinstance(self.pp, (int, float)) else (stage.number,)
            if key not in seen:
                seen.add(key)
                name = "only" if stage.number == 0 and np.all(self.pp == 1) else f"stage {stage.number}"
                found.append(RankClass(name, stage))
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
        shown = [f"{name}{int(degree)}" for name, degree in names if not isinstance(degree, np.ndarray) and degree > 1]
        multiply = [text for text in shown if not text.startswith(("EP", "DCP"))]
        return " + ".join([" x ".join(multiply), *(text for text in shown if text not in multiply)]) if shown else "one GPU"
