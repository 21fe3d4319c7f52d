"""The nouns every layer shares: the slice it is asked about, the modules it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from simulator.dtypes import FP32, CacheFormat, CacheRow, DType, WeightFormat
from simulator.kernels.attention import Segment
from simulator.units import Bytes, Count, Num, Tokens, floor, maximum, minimum, where
from simulator.work import Serial, Work

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Direction(Enum):
    """The only phase a layer knows."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(slots=True, eq=False)
class Mixing(Serial):
    """The part of a mixer's work that reads other tokens: what schemes that split a sequence replace."""


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
    send them tokens.  `query_ranks` ranks each make the queries of all of them.  Where ranks share the tokens of a
    sequence, `asked` holds the segments of all of them and `segments` those of this one.
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
    query_ranks: Num = 1.0
    asked: tuple[Segment, ...] = ()

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


class Keep(Enum):
    """What kind of thing a mixer keeps of a sequence.  Engines page the first three and hold the others per request."""

    ROWS = "rows"  # one row per token: keys and values, or a latent
    ENTRIES = "entries"  # one row per several tokens: compressed keys and values, block means
    INDEX = "index"  # keys an indexer scores, one per token or per entry
    TAIL = "tail"  # tokens waiting to be compressed into an entry
    SSM = "ssm"  # recurrent state of a state space or delta rule
    LINEAR = "linear"  # recurrent state of plain linear attention
    CONV = "conv"  # last inputs of a short convolution


@dataclass(frozen=True, slots=True)
class Kept:
    """One thing a mixer keeps of one sequence on one rank: `rows(context)` rows of `row` elements.

    A row comes with every `every`-th token after the first `late`; `most` rows are kept (None: all).  A state is one row
    that is there from the first token (`every` 0).  With a `cycle` only the t mod cycle newest are kept.  `dtype` is the
    element type of what no cache format touches, None what the cache's format stores.
    """

    keep: Keep
    row: CacheRow
    every: int = 1
    most: int | None = None
    cycle: int | None = None
    dtype: DType | None = None
    late: int = 0

    def rows(self, context: Num, rules: StateRules | None = None) -> Num:
        """Rows kept after `context` tokens: min(floor((t - late) / every), most), one for a state."""
        if self.every == 0:
            return minimum(context, 1.0)
        if self.cycle is not None:
            return context - floor(context / self.cycle) * self.cycle
        held = context if self.every == 1 else floor(maximum(context - self.late, 0.0) / self.every)
        if self.most is None:
            return held
        spare = rules.window_spare if rules is not None and self.keep is Keep.ROWS else 0
        return minimum(held, self.most - spare)

    def bytes(self, context: Num, cache: CacheFormat, rules: StateRules | None = None) -> Bytes:
        """Bytes kept of a sequence of `context` tokens."""
        dtype = rules.dtype_of(self) if rules is not None else self.dtype
        rows = self.rows(context, rules)
        return cache.bytes(rows, self.row) if dtype is None else rows * ((self.row.elements + self.row.rope) * dtype.bytes)

    def rate(self, context: Num) -> Num:
        """Rows per token at `context`, in the mean: 1 / every, nothing once `most` are there or for what comes and goes."""
        if self.every == 0 or self.cycle is not None:
            return 0.0
        if self.most is None:
            return 1.0 / self.every
        return where(context < self.most * self.every, 1.0 / self.every, 0.0)

    @property
    def grows(self) -> bool:
        """Whether it grows with the context without end."""
        return self.every > 0 and self.most is None and self.cycle is None


@dataclass(frozen=True, slots=True)
class StateRules:
    """How whoever holds the state counts it.

    `window_spare` rows of a window are not kept (1: the newest token's key comes from the step itself);
    `conv_spare` columns of a convolution's kernel are not kept (1: the current input); `ssm` is the element type of
    recurrent states (None: what the config or the engine's default says); `tails` is how tokens waiting for compression
    are held (`ring`: always, in fp32; `buffer`: those there are, in the model's type); `twice` whether a window without
    compression stores a shared key-value row twice.
    """

    name: str
    window_spare: int = 0
    conv_spare: int = 1
    ssm: DType | None = None
    tails: str = "ring"
    twice: bool = False
    source: str = ""

    def dtype_of(self, kept: Kept) -> DType | None:
        """The element type it is held in; None leaves it to the cache's format."""
        return self.ssm if kept.keep is Keep.SSM and self.ssm is not None else kept.dtype


#: What the architecture needs, in the element types its config or the engine's default names.
ARCHITECTURE = StateRules("architecture", source="MODELS: W tokens, kernel - 1 columns; vLLM v1/kv_cache_interface.py, mamba_utils.py")
#: What transformers 5.23.0 holds.
TRANSFORMERS = StateRules(
    "transformers", window_spare=1, conv_spare=0, ssm=FP32, tails="buffer", twice=True, source="transformers 5.23.0 cache_utils.py"
)


class Split(NamedTuple):
    """Something of a layer that tensor ranks share out: `units` called `name`.

    With `copied`, more ranks than units hold copies, as many of each.
    """

    name: str
    units: int
    copied: bool = False


def tensor_share(held: Slice, ranks: Num) -> Slice:
    """What one of `ranks` ranks holds of a mixer: heads / t, key-value heads (or groups) / t but at least one."""
    return held._replace(heads=held.heads / ranks, kv_heads=maximum(held.kv_heads / ranks, 1.0), tensor_ranks=ranks)


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

    @property
    def splits(self) -> tuple[Split, ...]:
        """What tensor ranks divide."""

    def inner_elements(self, held: Slice) -> Num:
        """Elements per token that tensor ranks must sum before the mixer can go on."""

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """The state plan: everything kept of one sequence on one rank."""

    def cache_row(self, held: Slice) -> CacheRow:
        """What one token leaves in this layer's cache on one rank."""

    def stored_tokens(self, context: Num) -> Tokens:
        """How many tokens' rows are kept after `context` tokens."""

    def state_bytes(self, held: Slice, cache: CacheFormat, rules: StateRules = ARCHITECTURE) -> Bytes:
        """Bytes kept on this rank for all sequences of the slice, after their new tokens."""


class Remembers:
    """What every mixer derives from its state plan, `kept`."""

    __slots__ = ()

    #: A rank that shares caches gathers queries, not the past, unless a mixer says otherwise.
    gathers_past = False

    @property
    def splits(self) -> tuple[Split, ...]:
        """What tensor ranks divide: none of it may be cut, some may be copied."""
        raise NotImplementedError

    def inner_elements(self, held: Slice) -> Num:  # noqa: ARG002 (most mixers sum only their output)
        """Elements per token that tensor ranks must sum before the mixer can go on."""
        return 0.0

    def query_elements(self, held: Slice) -> Num:  # noqa: ARG002 (only mixers whose caches are shared out are asked)
        """Elements of one token's queries on this rank, as the core takes them."""
        return 0.0

    def output_elements(self, held: Slice) -> Num:  # noqa: ARG002
        """Elements of one token's core output on this rank."""
        return 0.0

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The slice of a rank that holds everything."""
        raise NotImplementedError

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """The state plan: everything kept of one sequence on one rank."""
        raise NotImplementedError

    def cache_row(self, held: Slice) -> CacheRow:
        """What one token leaves among the rows; nothing where there are none."""
        return next((item.row for item in self.kept(held) if item.keep is Keep.ROWS), CacheRow(0.0))

    def stored_tokens(self, context: Num) -> Tokens:
        """How many tokens' rows are kept after `context` tokens."""
        held = self.whole((Segment(0.0, 0.0, 0.0),))
        return next((item.rows(context) for item in self.kept(held) if item.keep is Keep.ROWS), 0.0 * context)

    def state_bytes(self, held: Slice, cache: CacheFormat, rules: StateRules = ARCHITECTURE) -> Bytes:
        """Sum over segments and kept things of sequences x bytes; ranks that share caches split all that has rows."""
        total: Bytes = 0.0
        for item in self.kept(held, rules):
            split = held.cache_ranks if item.every else 1.0
            for segment in held.segments:
                context = segment.prefix + segment.new_tokens
                total = total + segment.sequences * item.bytes(context, cache, rules) / split
        return total


def is_mixer(layer: Layer) -> TypeIs[Mixer]:
    """Whether a layer remembers tokens."""
    return hasattr(layer, "kept")


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


def shared_share(segment: Segment, cache_ranks: Num) -> Segment:
    """The keys of a segment that one of `cache_ranks` ranks holds: (P + C) / r, at least the new tokens."""
    if type(cache_ranks) is float and cache_ranks == 1.0:
        return segment
    held = maximum((segment.prefix + segment.new_tokens) / cache_ranks, segment.new_tokens)
    return segment._replace(prefix=held - segment.new_tokens)
