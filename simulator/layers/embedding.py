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
    """Gather of T rows; parameters V D, split over the vocabulary.

    `positions` learned positions and `token_types` add a row each; `norm_parameters` vectors of D in a norm after them.
    """

    vocab_size: int
    hidden_size: int
    weight: WeightFormat = W_BF16
    positions: int = 0
    token_types: int = 0
    norm_parameters: int = 0

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The whole vocabulary."""
        return Slice(segments, vocabulary=float(self.vocab_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """The local rows."""
        found = [Module("embed_tokens", held.vocabulary * self.hidden_size, self.weight)]
        rest = self.positions + self.token_types + self.norm_parameters
        if rest:
            found.append(Module("positions_types_norm", float(rest * self.hidden_size), W_BF16, replicated=True))
        return found

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """One gather, of as many tables as there are."""
        tables = 1.0 + (self.positions > 0) + (self.token_types > 0)
        gather = copy("embedding", rows=held.tokens, width=tables * self.hidden_size)
        return backward(gather) if direction is Direction.BACKWARD else gather


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and logits of the last token of each sequence (serving).  `tied` weights are the embedding's.

    flops 2 D V per scored token.  `norm_parameters` vectors of D in the final norm; `transform`: a square layer with its
    norm and a bias per word (BERT); `pooler`: one more square layer over the first token; `scores` false: no logits
    (a bare encoder); `hc_mult` residual streams are mixed into one (DeepSeek-V4).  Source: FORMULAS 1.20.
    """

    vocab_size: int
    hidden_size: int
    tied: bool = False
    weight: WeightFormat = W_BF16
    norm_parameters: int = 1
    transform: bool = False
    pooler: bool = False
    scores: bool = True
    hc_mult: int = 1

    def whole(self, segments: tuple[Segment, ...]) -> Slice:
        """The whole vocabulary."""
        return Slice(segments, vocabulary=float(self.vocab_size))

    def modules(self, held: Slice) -> Sequence[Module]:
        """Norm, and the matrix unless it is the embedding's."""
        width, streams = self.hidden_size, self.hc_mult
        square = float(width * (width + 1))
        found = [Module("norm", float(self.norm_parameters * width), W_BF16, replicated=True)]
        if self.transform:
            found += [Module("transform", square + 2 * width, W_BF16, replicated=True), Module("logit_bias", held.vocabulary, W_BF16)]
        if self.pooler:
            found.append(Module("pooler", square, W_BF16, replicated=True))
        if streams > 1:
            found.append(Module("hyper_head", float(streams * (streams * width + 1) + 1), W_BF16, replicated=True))
        if self.scores and not self.tied:
            found.append(Module("lm_head", held.vocabulary * self.hidden_size, self.weight))
        return found

    def work(self, held: Slice, direction: Direction = Direction.FORWARD, *, cache: CacheFormat) -> Work:  # noqa: ARG002
        """Norm of every token, logits of one token per sequence; of every token when training."""
        width = float(self.hidden_size)
        first = norm("final norm", tokens=held.tokens, width=width * self.hc_mult)
        if not self.scores:
            return backward(first) if direction is Direction.BACKWARD else first
        if direction is Direction.BACKWARD:
            return Serial([gemm_backward("lm head", m=held.tokens, n=held.vocabulary, k=width, weight=self.weight), backward(first)])
        logits = gemm("lm head", m=held.sequences, n=held.vocabulary, k=width, weight=self.weight)
        return Serial([first, logits])
