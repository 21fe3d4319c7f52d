"""Both ends of the stack: token embedding, final norm and LM head.

Legend: D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.dtypes import W_BF16, CacheFormat, WeightFormat
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import backward, copy, norm
from simulator.kernels.gemm import gemm, gemm_backward
from simulator.layers.layer import Direction, Module, Slice
from simulator.work import Serial, Work


@dataclass(frozen=True, slots=True)
class Embedding:
    """Gather of T rows; parameters V D, split over the vocabulary."""

    vocab_size: int
    hidden_size: int
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The whole vocabulary."""
        return Slice(segments, vocabulary=float(self.vocab_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """The local rows."""
        return [Module("embed_tokens", held.vocabulary * self.hidden_size, self.weight)]

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """One gather."""
        gather = copy("embedding", rows=held.tokens, width=float(self.hidden_size))
        return backward(gather) if direction is Direction.BACKWARD else gather


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and logits of the last token of each sequence (serving).  `tied` weights are the embedding's.

    flops 2 D V per scored token.  Source: FORMULAS 1.20.
    """

    vocab_size: int
    hidden_size: int
    tied: bool = False
    weight: WeightFormat = W_BF16

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The whole vocabulary."""
        return Slice(segments, vocabulary=float(self.vocab_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """Norm, and the matrix unless it is the embedding's."""
        found = [Module("norm", float(self.hidden_size), W_BF16, replicated=True)]
        if not self.tied:
            found.append(Module("lm_head", held.vocabulary * self.hidden_size, self.weight))
        return found

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """Norm of every token, logits of one token per sequence; of every token when training."""
        width = float(self.hidden_size)
        first = norm("final norm", tokens=held.tokens, width=width)
        if direction is Direction.BACKWARD:
            return Serial([gemm_backward("lm head", m=held.tokens, n=held.vocabulary, k=width, weight=self.weight), backward(first)])
        logits = gemm("lm head", m=held.sequences, n=held.vocabulary, k=width, weight=self.weight)
        return Serial([first, logits])
