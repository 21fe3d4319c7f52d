"""When a pipeline is done: microbatches pass its stages in order, each stage one at a time (a permutation flow shop).

The time is the longest path through the grid of microbatches and stages, one step right (next stage) or down (next
microbatch) at a time.  It is closed enough for arrays because a path changes stage only at the first or the last microbatch
of a job of equal ones, and nearly so in one that grows slowly.  Knows neither ops nor GPUs: a stage is its seconds.
Source: flow shops as longest paths, e.g. Pinedo, Scheduling, chapter 6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from simulator.units import Count, Num, maximum, minimum, where

#: Chooses the later of two times.
Choose = Callable[[Any, Any], Any]


class Job(NamedTuple):
    """`number` microbatches in a row: by stage their mean seconds and those of the first and of the last (None: they are equal),
    and for how many equal stages a stage stands.
    """

    number: Count
    means: Sequence[Any]
    ends: Sequence[tuple[Any, Any]] | None
    times: Sequence[float]


class Passage(NamedTuple):
    """A job on one stage: seconds of all microbatches up to those at which a path may change stage (the first and the last, or
    the only one), of each of those alone, and of those before each, negative (None: there are none).
    """

    upto: list[Any]
    alone: list[Any]
    before: list[Any]


def jobs_of(count: Count, stages: Sequence[Any], times: Sequence[float], *, runs: bool) -> list[Job]:
    """The jobs of a flow.  With `runs`, the leading axis enumerates them: means are joined by straight lines from the middle of a run
    to the middle of the next, on which the first and the last of a run between two others lie; the first and the last run
    are equal microbatches.

    Exact where all grow alike.  Where they stop growing (a window is full) no line overshoots.
    """
    if not runs:
        return [Job(count, stages, None, times)]
    counts = _by_run(count, count)
    means = list(zip(*(_by_run(t, count) for t in stages), strict=True))
    found = [Job(number, mean, None, times) for number, mean in zip(counts, means, strict=True)]
    # steps from one middle to the next, and from a run's middle to its ends
    apart = [1 / maximum(0.5 * (a + b), 0.5) for a, b in itertools.pairwise(counts)]
    for r in range(1, len(found) - 1):
        half = 0.5 * (counts[r] - minimum(counts[r], 1.0))
        back, on = half * apart[r - 1], half * apart[r]
        neighbours = zip(*means[r - 1 : r + 2], strict=True)
        found[r] = found[r]._replace(ends=[(mean - (mean - a) * back, mean + (b - mean) * on) for a, mean, b in neighbours])
    return found


def _by_run(value: Any, counts: Any) -> list[Any]:
    """The value in each run: plain numbers where they are numbers, the same in all where it has no axis for runs."""
    if np.ndim(value) < np.ndim(counts):
        return [value] * len(counts)
    found: list[Any] = value.tolist() if value.ndim == 1 else list(value)
    return found


def makespan(jobs: Sequence[Job], rounds: Num = 1.0, later: Choose = maximum) -> Any:
    """Seconds until the last stage is done with the last microbatch of `rounds` times all `jobs`.

    With C_s(j) the time of stage s for all microbatches of a job up to j and t_s(j) that for j alone, stage s is done with j at
    V_s(j) = C_s(j) + max(D_s, max over i <= j of V_(s-1)(i) - C_s(i) + t_s(i)), D_s when it is done with the job before.
    Of m equal stages a path crosses the inner m - 1 at its longest microbatch there, all at once.

    i is the first or the last microbatch of a job: exact for equal microbatches and for up to two growing ones; for n that grow
    linearly never too long, and short by at most g (n - 1)^2 / 8 a stage, g the difference of two stages' growths.
    For n > 2 rounds every stage repeats the n - 2 between the first and the last on its own: the longest
    max_s (first_s + (n - 2) d_s + last_s), where d_s is a round on stage s alone, first_s the longest path of the first round
    that ends on s, last_s that of the last that begins there.  It is the path of a real schedule, so never too long; paths
    that change stage in three rounds or more are left out, worth less than (S - 1) (M - max d_s) in all with M the time of
    one round, however many the rounds.
    `later` chooses between two times; one that keeps what it chose traces the path.

    >>> makespan([Job(3.0, [2.0, 5.0], None, [1.0, 1.0])])
    17.0
    """
    passed = [(passages(job), job.times) for job in jobs]
    never = 0.0 * passed[0][0][0].alone[0]
    first = _ends(passed, [(never, never)] * len(jobs[0].times), later)
    if np.ndim(rounds) == 0 and rounds == 1:
        return first[-1][1]
    between = maximum(rounds - 2, 0.0)
    alone = [between * sum(stages[s].upto[-1] for stages, _ in passed) for s in range(len(first))]
    last = _ends(passed, [(a + d, b + d) for (a, b), d in zip(first, alone, strict=True)], later)
    return where(rounds > 1, last[-1][1], first[-1][1])


def turn(count: Count, stages: Sequence[Any], times: Sequence[float], later: Choose = maximum) -> Any:
    """Seconds of one round of m microbatches that go round without end: max(sum(t_s), m max(t_s)).

    >>> turn(2.0, [3.0, 4.0], [1.0, 1.0]), turn(1.0, [3.0, 4.0], [1.0, 1.0])
    (8.0, 7.0)
    """
    every, busiest = times[0] * stages[0], stages[0]
    for n, seconds in zip(times[1:], stages[1:], strict=True):
        every, busiest = every + n * seconds, later(busiest, seconds)
    return later(every, count * busiest)


def passages(job: Job) -> list[Passage]:
    """The job on every stage.

    Less than one microbatch is one that is so much shorter.  Up to the first it is the first alone.
    """
    n, one = job.number, minimum(job.number, 1.0)
    if n <= 1 if type(n) is float else isinstance(n, np.ndarray) and not np.any(n > 1):
        return [Passage([n * mean], [n * mean], [None]) for mean in job.means]
    ends = [(mean, mean) for mean in job.means] if job.ends is None else job.ends
    alone = [[one * first, one * last] for first, last in ends]
    every = [n * mean for mean in job.means]
    return [Passage([first, whole], [first, last], [None, last - whole]) for (first, last), whole in zip(alone, every, strict=True)]


def _ends(
    jobs: Sequence[tuple[Sequence[Passage], Sequence[float]]], done: list[tuple[Any, Any]], later: Choose
) -> list[tuple[Any, Any]]:
    """When each stage, the first and the last of its equals, is done with all jobs, having been busy until `done`."""
    for stages, times in jobs:
        ended: list[tuple[Any, Any]] = []
        reached: list[Any] = []
        for stage, equal, (before, after) in zip(stages, times, done, strict=True):
            reached = _through(stage, reached, before, 1.0, later) if reached else [before + total for total in stage.upto]
            first = reached[-1]
            if equal > 1:
                reached = _through(stage, reached, after, equal - 1, later)
            ended.append((first, reached[-1]))
        done = ended
    return done


def _through(stage: Passage, reached: Sequence[Any], busy: Any, times: float, later: Choose) -> list[Any]:
    """When the last of `times` equal stages, busy until `busy`, is done with each crossing that the stage before did at
    `reached`.
    """
    found = []
    for at, total, one, before in zip(reached, *stage, strict=True):
        ready = at if before is None else at + before
        busy = later(busy, ready if times == 1 else ready + (times - 1) * one)
        found.append(busy + total)
    return found
