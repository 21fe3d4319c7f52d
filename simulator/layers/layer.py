"""The nouns every layer shares: the slice it is asked about, the modules it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from simulator.dtypes import CacheFormat, CacheRow, WeightFormat
from simulator.kernels.attention import Segment
from simulator.units import Bytes, Count, Num, Tokens, maximum
from simulator.work import Work

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Direction(Enum):
    """The only phase a layer knows."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Module(NamedTuple):
    """A weight of one rank: how many parameters, stored how, and whether every rank of the group holds it whole."""

    name: str
    parameters: Count
    weight: WeightFormat
    replicated: bool = False


class Slice(NamedTuple):
    """What one rank holds of one layer in one pass.

    `tensor_ranks` ranks share the layer's heads and widths (`heads`, `kv_heads`, `intermediate`, `vocabulary` are the
    extents left on this one).  `cache_ranks` ranks share the cached tokens of one sequence: each attends with the
    `heads` of all of them to its share.  `experts` are local, on one of `expert_ranks`; `token_ranks` attention ranks
    send them tokens.
    """

    segments: tuple[Segment, ...]
    heads: Num = 0.0
    kv_heads: Num = 0.0
    intermediate: Num = 0.0
    experts: Num = 0.0
    vocabulary: Num = 0.0
    tensor_ranks: Num = 1.0
    cache_ranks: Num = 1.0
    expert_ranks: Num = 1.0
    token_ranks: Num = 1.0

    @property
    def tokens(self) -> Tokens:
        """New tokens of this rank's sequences."""
        first, *rest = self.segments
        total = first.tokens
        for segment in rest:
            total = total + segment.tokens
        return total

    @property
    def sequences(self) -> Count:
        """Sequences of this rank."""
        first, *rest = self.segments
        total = first.sequences
        for segment in rest:
            total = total + segment.sequences
        return total


class Layer(Protocol):
    """One residual sub-block: norm, mixing, residual addition."""

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The slice of a rank that holds everything."""

    def modules(self, held: Slice) -> Sequence[Module]:
        """The weights of a rank."""

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """What a rank does with its tokens."""


class Mixer(Layer, Protocol):
    """A layer that mixes tokens and so remembers them."""

    @property
    def gathers_past(self) -> bool:
        """Whether prefill over shared caches gathers the past (latents) instead of the queries."""

    def query_elements(self, held: Slice) -> Num:
        """Elements of one token's queries on this rank, as the core takes them."""

    def output_elements(self, held: Slice) -> Num:
        """Elements of one token's core output on this rank."""

    def cache_row(self, held: Slice) -> CacheRow:
        """What one token leaves in this layer's cache on one rank."""

    def stored_tokens(self, context: Num) -> Tokens:
        """How many tokens' rows are kept after `context` tokens."""

    def state_bytes(self, held: Slice, cache: CacheFormat) -> Bytes:
        """Bytes kept on this rank for all sequences of the slice, after their new tokens."""


def is_mixer(layer: Layer) -> TypeIs[Mixer]:
    """Whether a layer remembers tokens."""
    return hasattr(layer, "cache_row")


def weight_bytes(layer: Layer, held: Slice) -> Bytes:
    """Bytes of a rank's weights in their checkpoint formats."""
    total: Bytes = 0.0
    for module in layer.modules(held):
        total = total + module.weight.bytes(module.parameters)
    return total


def parameters(layer: Layer, held: Slice) -> Count:
    """Number of a rank's weights."""
    total: Count = 0.0
    for module in layer.modules(held):
        total = total + module.parameters
    return total


def cached_bytes(layer: Mixer, held: Slice, cache: CacheFormat) -> Bytes:
    """Sum over segments of sequences x stored tokens / cache_ranks x row."""
    row = cache.row_bytes(layer.cache_row(held))
    total: Bytes = 0.0
    for segment in held.segments:
        total = total + segment.sequences * layer.stored_tokens(segment.prefix + segment.new_tokens) * row
    return total / held.cache_ranks


def shared_share(segment: Segment, cache_ranks: Num) -> Segment:
    """The keys of a segment that one of `cache_ranks` ranks holds: (P + C) / r, at least the new tokens."""
    if type(cache_ranks) is float and cache_ranks == 1.0:
        return segment
    held = maximum((segment.prefix + segment.new_tokens) / cache_ranks, segment.new_tokens)
    return segment._replace(prefix=held - segment.new_tokens)
