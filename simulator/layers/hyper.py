"""Layers around layers: hyper-connections, mixers side by side, a plain projection in the place of a mixer.

Legend: D hidden_size, n_hc residual streams, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import W_BF16, CacheFormat, WeightFormat
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import elementwise
from simulator.layers.layer import ARCHITECTURE, Direction, Kept, Mixer, Module, Remembers, Slice, Split, StateRules, tensor_share
from simulator.layers.steps import Steps
from simulator.units import Num
from simulator.work import Serial, Work


@dataclass(frozen=True, slots=True)
class HyperConnection:
    """Manifold-constrained hyper-connections of one sub-block: n_hc residual streams mixed into its input, its output
    and the streams mixed back.

    Parameters: (2 + n_hc) n_hc (n_hc D + 1) + 3.  flops per token 240 D at n_hc = 4: the mixing coefficients
    2 n_hc D (2 + n_hc) n_hc, in and out 2 n_hc D each, stream to stream 2 n_hc^2 D.  HBM: the streams read twice and
    written once.  Neglected: 20 Sinkhorn iterations on n_hc x n_hc.  Held whole by every rank.
    Source: FORMULAS 1.13; DeepSeek-V4 report 2.2; transformers 5.23.0 deepseek_v4.
    """

    hidden_size: int
    hc_mult: int

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """Every rank holds all of it."""
        return Slice(segments)

    def modules(self, held: Slice) -> Sequence[Module]:  # noqa: ARG002 (the same on every rank)
        """Coefficients' projection, base and scale."""
        streams = self.hc_mult
        mixed = (2 + streams) * streams
        return [Module("hyper_connection", float(mixed * (streams * self.hidden_size + 1) + 3), W_BF16, replicated=True)]

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """Coefficients, streams into the input, output into the streams."""
        tokens, width, streams = held.tokens, float(self.hidden_size), float(self.hc_mult)
        steps = Steps(direction)
        steps.linear("hyper coefficients", m=tokens, n=(2 + streams) * streams, k=streams * width)
        mixed = 2.0 * (2 * streams + streams * streams) * width
        steps.stream(elementwise(
            "hyper mix", rows=tokens, read=2 * streams * width, written=streams * width, impl="norm",
            flops_per_element=mixed / (2 * streams * width), kept=streams * width,
        ))  # fmt: skip
        return steps.serial()


@dataclass(frozen=True, slots=True)
class Linear:
    """One square projection where a search put it in place of attention (Nemotron NAS, `replace_with_linear`).

    Parameters: D^2 and the block's norm.  Source: NVIDIA's DeciLM modelling code (block_configs).
    """

    hidden_size: int
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The full width."""
        return Slice(segments, intermediate=float(self.hidden_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """The matrix by columns."""
        return [
            Module("linear", held.intermediate * self.hidden_size, self.weight),
            Module("input_layernorm", float(self.hidden_size), W_BF16, replicated=True),
        ]

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """norm, product."""
        steps = Steps(direction)
        steps.norm("linear norm", tokens=held.tokens, width=float(self.hidden_size))
        steps.linear("linear", m=held.tokens, n=float(self.hidden_size), k=held.intermediate, weight=self.weight)
        return steps.serial()


@dataclass(frozen=True, slots=True)
class ParallelMixers(Remembers):
    """Several mixers that read the same input and add their outputs (Falcon-H1, Hymba: attention beside an SSM).

    Parameters, work and state are the sums of the branches', less the norms they share.
    Source: 2411.13676 section 2.1; tiiuae Falcon-H1 modelling code.
    """

    branches: tuple[Mixer, ...]

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The extents of the first branch; every branch works out its own from the tensor ranks."""
        return self.branches[0].whole(segments)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those of all branches."""
        return tuple(split for branch in self.branches for split in branch.splits)

    def inner_elements(self, held: Slice) -> Num:
        """The sum over branches."""
        total: Num = 0.0
        for branch, own in self._own(held):
            total = total + branch.inner_elements(own)
        return total

    def _own(self, held: Slice) -> list[tuple[Mixer, Slice]]:
        """Every branch with its own slice of this rank."""
        plain = isinstance(held.tensor_ranks, float) and held.tensor_ranks == 1.0
        found = []
        for branch in self.branches:
            whole = branch.whole(held.segments)
            own = whole if plain else tensor_share(whole, held.tensor_ranks)
            found.append((branch, own._replace(cache_ranks=held.cache_ranks)))
        return found

    def modules(self, held: Slice) -> Sequence[Module]:
        """Those of all branches, numbered; one block norm for all."""
        found: list[Module] = []
        for i, (branch, own) in enumerate(self._own(held)):
            found += [m._replace(name=f"{i}.{m.name}") for m in branch.modules(own) if i == 0 or m.name != "input_layernorm"]
        return found

    def kept(self, held: Slice, rules: StateRules = ARCHITECTURE) -> tuple[Kept, ...]:
        """Those of all branches."""
        return tuple(item for branch, own in self._own(held) for item in branch.kept(own, rules))

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:
        """One branch after the other: engines run them on one stream."""
        return Serial([branch.work(own, direction, cache=cache) for branch, own in self._own(held)])

