"""When a pipeline is done: microbatches pass its stages in order, each stage one at a time (a permutation flow shop).

The time is the longest path through the grid of microbatches and stages, one step right (next stage) or down (next
microbatch) at a time.  It is closed enough for arrays because a path changes stage only at the first or the last microbatch
of a run of equal ones, and nearly so in one that grows slowly.  Knows neither ops nor GPUs: a stage is its seconds.
Source: flow shops as longest paths, e.g. Pinedo, Scheduling, chapter 6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.units import Count, Num, maximum, minimum, where


class Run(NamedTuple):
    """Microbatches in a row: their number, whether that is one or less, and the shares of the way to the middle of the run before
    and after on which the first and the last lie (None: all are equal).
    """

    number: Count
    alone: bool
    back: Num | None = None
    on: Num | None = None


#: A microbatch at which a path may change stage: on a stage, the seconds of those since the crossing before (None: there are none)
#: and its own.
Crossing = tuple[Any, Any]


class Line(NamedTuple):
    """A stage, or the last of `again` + 2 equal ones: those between the first and it are crossed at one microbatch."""

    stage: int
    crossed: Sequence[Crossing]
    again: float
    #: A round on it alone.
    whole: Any


def equal(number: Count) -> list[Run]:
    """Equal microbatches."""
    alone = number <= 1 if type(number) is float else isinstance(number, np.ndarray) and not np.any(number > 1)
    return [Run(number, bool(alone))]


def growing(count: Count) -> list[Run]:
    """The runs along the leading axis of `count`, of which the first and the last have one microbatch or none.

    Means are joined by straight lines from the middle of a run to the middle of the next.  Exact where all grow alike.  Where they
    stop growing (a window is full) no line overshoots.

    >>> growing(np.array([1.0, 9.0, 1.0]))[1]
    Run(number=9.0, alone=False, back=0.8, on=0.8)
    """
    first, *between, last = counts = by_run(count, count)
    # steps from one middle to the next, and from a run's middle to its ends
    apart = [1 / maximum(0.5 * (a + b), 0.5) for a, b in itertools.pairwise(counts)]
    found = [Run(first, alone=True)]
    for number, (before, after) in zip(between, itertools.pairwise(apart), strict=True):
        half = 0.5 * (number - minimum(number, 1.0))
        found.append(equal(number)[0]._replace(back=half * before, on=half * after))
    return [*found, Run(last, alone=True)]


def by_run(value: Any, count: Count) -> list[Any]:
    """The value in each run: plain numbers where they are numbers, the same in all where it has no axis for runs."""
    if np.ndim(value) < np.ndim(count):
        return [value] * len(count)  # type: ignore[arg-type]
    found: list[Any] = value.tolist() if value.ndim == 1 else list(value)
    return found


def crossings(runs: Sequence[Run], means: Sequence[Any]) -> list[Crossing]:
    """The first and the last microbatch of every run, or its only one, on a stage that takes `means` in the mean of each.
    Less than one microbatch is one that is so much shorter.

    >>> crossings(equal(3.0), [5.0])
    [(None, 5.0), (5.0, 5.0)]
    """
    found: list[Crossing] = []
    for r, (run, mean) in enumerate(zip(runs, means, strict=True)):
        whole = run.number * mean
        if run.alone:
            found.append((None, whole))
            continue
        one = minimum(run.number, 1.0)
        first = last = one * mean
        if run.back is not None and run.on is not None:
            first, last = one * (mean - (mean - means[r - 1]) * run.back), one * (mean + (means[r + 1] - mean) * run.on)
        found += [(None, first), (whole - first - last, last)]
    return found


def lines(stages: Sequence[Sequence[Crossing]], times: Sequence[float], wholes: Sequence[Any] | None = None) -> list[Line]:
    """The stages, of which each stands for so many equal ones; `wholes` where it is known what each takes in all."""
    found: list[Line] = []
    for number, (crossed, alike, whole) in enumerate(zip(stages, times, wholes or map(_alone, stages), strict=True)):
        found.append(Line(number, crossed, 0.0, whole))
        if alike > 1:
            found.append(Line(number, crossed, alike - 2.0, whole))
    return found


def makespan(stages: Sequence[Line], rounds: Num = 1.0) -> Any:
    """Seconds until the last stage is done with the last microbatch of `rounds` times all crossed.

    With t_s(k) the own time of crossing k on stage s and c_s(k) that since the crossing before, stage s is done with k at
    V_s(k) = max(V_s(k-1) + c_s(k), V_(s-1)(k)) + t_s(k), V_s(0) when it is done with the round before.
    Of m equal stages a path crosses the inner m - 1 at its longest microbatch there, all at once.

    Exact for equal microbatches and for up to two growing ones; for n that grow linearly never too long, and short by at most
    g (n - 1)^2 / 8 a stage, g the difference of two stages' growths.
    For n > 2 rounds every stage repeats the n - 2 between the first and the last on its own: the longest
    max_s (first_s + (n - 2) d_s + last_s), where d_s is a round on stage s alone, first_s the longest path of the first round
    that ends on s, last_s that of the last that begins there.  It is the path of a real schedule, so never too long; paths
    that change stage in three rounds or more are left out, worth less than (S - 1) (M - max d_s) in all with M the time of
    one round, however many the rounds.

    >>> makespan(lines([crossings(equal(3.0), [t]) for t in (2.0, 5.0)], [1.0, 1.0]))
    17.0
    """
    plain = type(rounds) is float and all(type(own) is float for line in stages for _, own in line.crossed)
    later: Callable[[Any, Any], Any] = max if plain else maximum
    first = [done[-1] for done in _passed(stages, [0.0] * len(stages), later)]
    if type(rounds) is float and rounds == 1.0:
        return first[-1]
    last = [done[-1] for done in _passed(stages, _waiting(stages, first, rounds), later)]
    return where(rounds > 1, last[-1], first[-1])


def _passed(stages: Sequence[Line], busy: Sequence[Any], later: Callable[[Any, Any], Any]) -> Iterator[list[Any]]:
    """When each stage, busy until then, is done with each crossing of a round; of a sweep, one stage's arrays at a time."""
    reached = None
    for line, done in zip(stages, busy, strict=True):
        reached = _through(line, reached, done, later)
        yield reached


def _through(line: Line, reached: Sequence[Any] | None, busy: Any, later: Callable[[Any, Any], Any]) -> list[Any]:
    """When a stage is done with each crossing that the stage before did at `reached`."""
    found = []
    for k, (since, own) in enumerate(line.crossed):
        if since is not None:
            busy = busy + since
        if reached is not None:
            busy = later(busy, reached[k] + line.again * own if line.again else reached[k])
        busy = busy + own
        found.append(busy)
    return found


def _waiting(stages: Sequence[Line], first: Sequence[Any], rounds: Num) -> list[Any]:
    """When each stage is done with the last round but one, of which those after the first pass it on its own."""
    between = maximum(rounds - 2, 0.0)
    return [done + between * line.whole for line, done in zip(stages, first, strict=True)]


def _alone(crossed: Sequence[Crossing]) -> Any:
    """A round on one stage alone."""
    return sum(own if since is None else since + own for since, own in crossed)


#: Of paths that are equally long but for rounding, the one that stays on its stage is told.
_LONGER = 1 + 1e-12


def longest(stages: Sequence[Line], shares: Sequence[Crossing], rounds: float) -> npt.NDArray[np.float64]:
    """How often the longest path of plain numbers passes each run on each stage: that of `makespan`, from its end back to its beginning.

    `shares` are the crossings of a stage on which each run takes a vector of its own.
    """
    starts = [[0.0] * len(stages)]
    done = [list(_passed(stages, starts[0], max))]
    if rounds > 1:
        starts.append(_waiting(stages, [reached[-1] for reached in done[0]], rounds))
        done.append(list(_passed(stages, starts[1], max)))
    passes = np.zeros((stages[-1].stage + 1, len(shares[0][1])))
    at = len(stages) - 1
    for reached, busy in zip(done[::-1], starts[::-1], strict=True):
        k = len(shares) - 1
        while k >= 0:
            stage, crossed, again, _ = stages[at]
            since, own = crossed[k]
            stayed = (reached[at][k - 1] if k else busy[at]) + (since or 0.0)
            before, there = shares[k]
            passes[stage] += there
            if at and reached[at - 1][k] + again * own > stayed * _LONGER:
                passes[stage] += again * there
                at -= 1
                continue
            if before is not None:
                passes[stage] += before
            k -= 1
        if busy is not starts[0]:
            passes[stages[at].stage] += max(rounds - 2, 0.0) * _alone(shares)
    return passes


def turn(count: Count, stages: Sequence[Any], times: Sequence[float]) -> Any:
    """Seconds of one round of m microbatches that go round without end: max(sum(t_s), m max(t_s)).

    >>> turn(2.0, [3.0, 4.0], [1.0, 1.0]), turn(1.0, [3.0, 4.0], [1.0, 1.0])
    (8.0, 7.0)
    """
    every, busiest = times[0] * stages[0], stages[0]
    for n, seconds in zip(times[1:], stages[1:], strict=True):
        every, busiest = every + n * seconds, maximum(busiest, seconds)
    return maximum(every, count * busiest)


def turns(count: Count, stages: Sequence[Any], times: Sequence[float]) -> Sequence[Any]:
    """How often that of plain numbers passes each stage: every one once, or the busiest for all.

    >>> turns(2.0, [3.0, 4.0], [1.0, 1.0]), turns(1.0, [3.0, 4.0], [1.0, 1.0])
    ([0.0, 2.0], [1.0, 1.0])
    """
    busiest = int(np.argmax(stages))
    if sum(n * seconds for n, seconds in zip(times, stages, strict=True)) >= count * stages[busiest]:
        return times
    return [count if number == busiest else 0.0 for number in range(len(stages))]
