"""Chunks of a prefill as runs: which neighbours stand together for their mean.

Legend: P cached prefix, C tokens of a chunk, n whole chunks between the first and the last, numbered from 1.
The first whole chunk and the last are alone: they fill and drain a pipeline.  Those between are cut at fixed shares, where a
window fills up, and round the fullest chunk of a block: a path through a pipeline changes stage where a chunk takes longest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from simulator.kernels.attention import Chunked, Mask, Segment, Window, pairs
from simulator.units import Array, Count, Num, Tokens, ceil, floor, maximum, minimum, where

#: Shares of the chunks between the first and the last whole one; each is a run of whole chunks that stands for its mean.
#: Pairs are exact whatever the shares; time is within 0.2 % of the sum over chunks (a law; the worst are those
#: where the cache outgrows the L2 on the way).
SHARES = (0.12, 0.2, 0.22, 0.23, 0.23)
#: Windows of up to so many tokens are full after a chunk or two, and no run is cut for them.
_NARROW = 1024


def runs(masks: Iterable[Mask], *, prefix: Tokens, chunk: Tokens, whole: Count) -> tuple[Array, Array]:
    """How many chunks each run has and how many lie before it, along a leading axis.

    >>> counts, before = runs([], prefix=0.0, chunk=2048.0, whole=12.0)
    >>> counts, before
    (array([1., 1., 2., 2., 3., 2., 1.]), array([ 0.,  1.,  2.,  4.,  6.,  9., 11.]))
    >>> counts, before = runs([Chunked(8192)], prefix=0.0, chunk=2048.0, whole=12.0)
    >>> [int(b) for n, b in zip(counts, before) if n == 1 and b % 4 == 3]
    [3, 7, 11]
    """
    between, one = maximum(whole - 2, 0.0), np.ones_like(whole)
    cuts = [floor(share * between + 0.5) for share in np.cumsum(SHARES[:-1])]
    for mask in masks:
        if isinstance(mask, Window) and mask.width > _NARROW:
            cuts = _inserted(cuts, minimum(maximum(ceil((mask.width - prefix) / chunk), 0.0), between))
        if isinstance(mask, Chunked):
            cuts = _crests(mask, prefix, chunk, between, [*cuts, between])
    edges = [0 * one, *cuts, between * one]
    counts = np.stack([one, *(end - start for start, end in itertools.pairwise(edges)), one * (whole > 1)])
    return counts, np.stack([0 * one, *(1 + start for start in edges[:-1]), one * maximum(whole - 1, 0.0)])


def _inserted(cuts: list[Num], cut: Num) -> list[Num]:
    """`cut` in its place among ascending cuts."""
    found: list[Num] = []
    for other in cuts:
        found.append(minimum(other, cut))
        cut = maximum(other, cut)
    return [*found, cut]


def _crests(mask: Chunked, prefix: Tokens, chunk: Tokens, between: Count, ends: list[Num]) -> list[Num]:
    """Cuts before and behind the fullest chunk at each of `ends`, in place of these: the last chunk there, the last that lies
    whole in the block before, or the one after it, which may reach over that block's end.
    """

    def scored(number: Num) -> Count:
        return pairs(mask, Segment(1.0, chunk, prefix + number * chunk))

    found: list[Num] = []
    reached: Num = 0.0
    for end in ends:
        inside = floor((floor((prefix + (1 + end) * chunk) / mask.width) * mask.width - prefix) / chunk) - 1
        most, best = scored(end), end
        for number in (inside, inside + 1):
            candidate = minimum(maximum(number, 1.0), maximum(between, 1.0))
            more = scored(candidate)
            best, most = where(more > most, candidate, best), maximum(more, most)
        before, behind = maximum(minimum(best - 1, between), reached), maximum(minimum(best, between), reached)
        found += [before, behind]
        reached = behind
    return found
