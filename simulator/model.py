"""A model: embeddings and an ordered run of blocks.  Heterogeneous stacks are the normal case."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from simulator.dtypes import C_BF16, CacheFormat, CacheRow, WeightFormat
from simulator.kernels.attention import Segment
from simulator.layers.embedding import Embedding, Head
from simulator.layers.layer import ARCHITECTURE, Kept, Layer, Mixer, StateRules, is_mixer, parameters, weight_bytes
from simulator.position import Encoding
from simulator.units import Bytes, Count, Num

Block = tuple[Layer, ...]


@dataclass(frozen=True)
class Reach:
    """How far a model claims to read: `declared_tokens` by its config, `trained_tokens` before its rotary scaling.

    `rope` is what the config says of rotary scaling, as it says it; `encoding` what that means.
    """

    declared_tokens: int | None = None
    trained_tokens: int | None = None
    rope: dict[str, object] = field(default_factory=dict)
    encoding: Encoding = Encoding()


@dataclass(frozen=True)
class ModelSpec:
    """`blocks` is the stack from the bottom as (count, layers): runs of equal blocks.  `cache` is how the cache is stored,
    `checkpoint_cache` how its config asks for it.

    `streams` residual streams of `hidden_size` pass between blocks (hyper-connections).  `warnings` name what a config said
    that is not modelled, with its bounded effect; `floor` is then the same model with the unknown mixers left out, the
    other bound.  `extra` are modules beside the stack (multi-token prediction), counted apart.
    """

    name: str
    hidden_size: int
    vocab_size: int
    blocks: tuple[tuple[int, Block], ...]
    embedding: Embedding
    head: Head
    cache: CacheFormat = C_BF16
    checkpoint_cache: CacheFormat = C_BF16
    reach: Reach = Reach()
    model_type: str = ""
    quantization: str = "none"
    warnings: tuple[str, ...] = ()
    streams: int = 1
    floor: ModelSpec | None = None
    extra: tuple[tuple[int, Block], ...] = ()

    @cached_property
    def kinds(self) -> tuple[Block, ...]:
        """The distinct blocks, in order of first appearance."""
        return tuple(dict.fromkeys(block for _, block in self.blocks))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The kind of every block from the bottom up."""
        index = {block: k for k, block in enumerate(self.kinds)}
        return tuple(index[block] for count, block in self.blocks for _ in range(count))

    @cached_property
    def cumulative(self) -> list[npt.NDArray[np.int64]]:
        """For each kind, how many of it lie below layer i, for i = 0..L."""
        order = np.array(self.order)
        return [np.concatenate([[0], np.cumsum(order == k)]) for k in range(len(self.kinds))]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The distinct layers of the stack."""
        return tuple(dict.fromkeys(layer for block in self.kinds for layer in block))

    @cached_property
    def counted(self) -> tuple[tuple[int, Layer], ...]:
        """Every layer with how often it occurs, both ends included."""
        counts: dict[Layer, int] = {}
        for count, block in self.blocks:
            for layer in block:
                counts[layer] = counts.get(layer, 0) + count
        return ((1, self.embedding), *((n, layer) for layer, n in counts.items()), (1, self.head))

    @property
    def num_layers(self) -> int:
        """Blocks in the stack."""
        return len(self.order)

    @property
    def mixers(self) -> list[tuple[int, Mixer]]:
        """The layers that remember tokens, with their counts."""
        return [(count, layer) for count, layer in self.counted if is_mixer(layer)]

    def parameters(self) -> Count:
        """All weights of the text model."""
        return sum(count * parameters(layer, layer.whole(_NOTHING)) for count, layer in self.counted)

    def extra_parameters(self) -> Count:
        """Weights of the modules beside the stack."""
        return sum(count * parameters(layer, layer.whole(_NOTHING)) for count, block in self.extra for layer in block)

    def cache_bounds(self, context: Num, cache: CacheFormat | None = None) -> tuple[Bytes, Bytes]:
        """Least and most bytes of one sequence: unknown mixers keeping nothing, and keeping every token."""
        most = self.cache_bytes(context, cache)
        return (most if self.floor is None else self.floor.cache_bytes(context, cache or self.cache), most)

    def weight_bytes(self) -> Bytes:
        """All weights in their checkpoint formats."""
        return sum(count * weight_bytes(layer, layer.whole(_NOTHING)) for count, layer in self.counted)

    def cache_bytes(self, context: Num, cache: CacheFormat | None = None, rules: StateRules = ARCHITECTURE) -> Bytes:
        """What the architecture (or another holder, by its `rules`) remembers of one sequence of `context` tokens."""
        total: Bytes = 0.0
        for count, layer in self.mixers:
            total = total + count * layer.state_bytes(layer.whole((Segment(1.0, 0.0, context),)), cache or self.cache, rules)
        return total

    def slope(self, cache: CacheFormat | None = None) -> Bytes:
        """Bytes a token adds in the long run: every row that grows, over the tokens it stands for."""
        total: Bytes = 0.0
        for count, layer in self.mixers:
            for item in layer.kept(layer.whole(_NOTHING)):
                if item.grows:
                    total = total + count * (cache or self.cache).row_bytes(item.row) / item.every
        return total

    def constant(self, cache: CacheFormat | None = None, rules: StateRules = ARCHITECTURE) -> Bytes:
        """Bytes of a sequence that stop growing: windows, states, tails, what a residual window takes beyond stored rows."""
        total: Bytes = 0.0
        for count, layer in self.mixers:
            for item in layer.kept(layer.whole(_NOTHING), rules):
                stored = cache or self.cache
                if not item.grows and item.cycle is None:
                    total = total + count * item.bytes(1e18, stored, rules)
                elif item.grows and item.dtype is None:
                    total = total + count * stored.residual_bytes(item.row)
        return total

    def cache_slope(self, context: Num, cache: CacheFormat | None = None) -> Bytes:
        """Bytes per token at `context`, in the mean over the tokens an entry stands for."""
        total: Bytes = 0.0
        for count, layer in self.mixers:
            for item in layer.kept(layer.whole(_NOTHING)):
                if item.every:
                    row = (cache or self.cache).row_bytes(item.row) if item.dtype is None else item.row.elements * item.dtype.bytes
                    total = total + count * row * item.rate(context)
        return total

    def rows(self) -> list[tuple[int, Mixer, Kept]]:
        """Everything kept, by kind of mixer: count, layer, item."""
        return [(count, layer, item) for count, layer in self.mixers for item in layer.kept(layer.whole(_NOTHING))]

    def cache_rows(self) -> list[CacheRow]:
        """The distinct rows that the cache's format stores."""
        kept = [item for _, layer in self.mixers for item in layer.kept(layer.whole(_NOTHING)) if item.dtype is None]
        return list(dict.fromkeys(item.row for item in kept))

    def with_formats(self, *, weight: WeightFormat | None = None, cache: CacheFormat | None = None) -> ModelSpec:
        """The same architecture stored otherwise: linear layers in `weight`, embeddings and head untouched."""
        blocks = self.blocks
        if weight is not None:
            changed = {layer: _stored(layer, weight) for layer in self.layers}
            blocks = tuple((count, tuple(changed[layer] for layer in block)) for count, block in self.blocks)
        floor = self.floor.with_formats(weight=weight, cache=cache) if self.floor is not None else None
        return replace(self, blocks=blocks, cache=cache or self.cache, floor=floor)


def _stored(layer: Layer, weight: WeightFormat) -> Layer:
    names = [name for name in ("weight", "expert_weight", "index_weight", "shared_weight") if getattr(layer, name, None) is not None]
    changed: Layer = replace(layer, **dict.fromkeys(names, weight))  # type: ignore[type-var]
    return changed


_NOTHING = (Segment(0.0, 0.0, 0.0),)
