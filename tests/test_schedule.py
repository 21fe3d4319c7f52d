"""A pipeline's schedule against one simulated microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.schedule import Line, Run, crossings, equal, growing, lines, longest, makespan, turn

Found = Sequence[tuple[int, int, int]]
stages = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6), st.integers(1, 3)), min_size=1, max_size=5)


def simulated(found: Found, number: int, rounds: int = 1) -> float:
    """Microbatch j takes a + j g on a stage: every one through every stage, one by one, each stage one at a time."""
    done = [0.0] * sum(alike for *_, alike in found)
    for _ in range(rounds):
        for j in range(number):
            ready, place = 0.0, 0
            for a, g, alike in found:
                for _ in range(alike):
                    ready = done[place] = max(ready, done[place]) + a + j * g
                    place += 1
    return done[-1]


def between(number: int) -> list[Run]:
    """A run between two that are empty."""
    return [Run(0.0, alone=True), Run(float(number), number == 1, 1.0, 1.0), Run(0.0, alone=True)]


def means(a: float, g: float, number: int) -> list[float]:
    """Of the run and, on its line, of its first and its last microbatch."""
    return [a, a + g * (number - 1) / 2, a + g * (number - 1)]


def grown(found: Found, number: int) -> list[Line]:
    return lines([crossings(between(number), means(a, g, number)) for a, g, _ in found], [float(n) for *_, n in found])


@given(stages, st.integers(1, 2), st.integers(1, 2))
def test_two_growing_microbatches_take_what_a_simulation_takes(found: Found, number: int, rounds: int) -> None:
    assert makespan(grown(found, number), float(rounds)) == pytest.approx(simulated(found, number, rounds), rel=1e-12)


@given(stages, st.integers(3, 60))
def test_many_growing_microbatches_are_never_long_and_short_by_no_more_than_is_said(found: Found, number: int) -> None:
    took, exact = makespan(grown(found, number)), simulated(found, number)
    steepest = max(abs(g - h) for _, g, _ in found for _, h, _ in found)
    assert took <= exact * (1 + 1e-12) <= (took + (len(found) - 1) * steepest * (number - 1) ** 2 / 8) * (1 + 1e-9)


@given(stages, st.integers(1, 60))
def test_a_run_is_crossed_first_at_its_first_microbatch_and_in_all_takes_the_whole(found: Found, number: int) -> None:
    for a, g, _ in found:
        crossed = crossings(between(number), means(a, g, number))[1:-1]
        assert crossed[0] == (None, a)
        assert sum((since or 0.0) + own for since, own in crossed) == pytest.approx(sum(a + j * g for j in range(number)))


@given(stages, st.integers(1, 40), st.integers(1, 9))
def test_the_longest_path_takes_the_makespan(found: Found, number: int, rounds: int) -> None:
    shares = crossings(between(number), list(np.eye(3)))
    passes = longest(grown(found, number), shares, float(rounds))
    seconds = np.array([means(a, g, number) for a, g, _ in found])
    assert np.sum(passes * seconds) == pytest.approx(makespan(grown(found, number), float(rounds)), rel=1e-9)


def test_of_equally_long_paths_the_one_that_stays_is_told() -> None:
    """Whatever rounding makes of them."""
    for first, second in ((0.3, 0.1 + 0.2), (0.1 + 0.2, 0.3)):
        stages = lines([crossings(equal(3.0), [t]) for t in (first, second)], [1.0, 1.0])
        assert longest(stages, crossings(equal(3.0), [np.ones(1)]), 1.0).tolist() == [[1.0], [3.0]]


def test_a_run_lies_on_a_line_between_its_neighbours() -> None:
    first, run, last = growing(np.array([1.0, 8.0, 1.0]))
    assert (first, last) == (Run(1.0, alone=True), Run(1.0, alone=True))
    _, begin, end, _ = crossings([first, run, last], [10.0, 14.5, 19.0])
    assert (begin[1], end[1]) == (pytest.approx(11), pytest.approx(18))
    assert begin[1] + sum(end) == pytest.approx(8 * 14.5)
    assert [own for _, own in crossings([first, run, last], [3.0] * 3)] == [3.0] * 4


def test_a_run_that_stops_growing_does_not_overshoot() -> None:
    """A window that is full: 4 chunks that grow from 10 to 13, then 20 of 13."""
    *_, (_, grows), (_, first_full), (_, full), _ = crossings(growing(np.array([1.0, 3.0, 19.0, 1.0])), [10.0, 12.0, 13.0, 13.0])
    assert max(grows, first_full) <= 13
    assert full == 13


@given(st.integers(0, 9), st.integers(1, 6))
def test_no_microbatches_take_no_time(seconds: int, rounds: int) -> None:
    empty = crossings(equal(0.0), [float(seconds)])
    assert makespan(lines([empty, empty], [1.0, 1.0]), float(rounds)) == 0
    both = [[*empty, *crossings(equal(1.0), [t])] for t in (2.0, 3.0)]
    assert makespan(lines(both, [1.0, 1.0])) == 5


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 8))
def test_a_turn_is_every_stage_once_or_the_slowest_for_all(seconds: list[int], groups: int) -> None:
    ones = [1.0] * len(seconds)
    assert turn(float(groups), seconds, ones) == max(sum(seconds), groups * max(seconds))
    merged = turn(float(groups), [seconds[0]], [4.0])
    assert merged == turn(float(groups), [seconds[0]] * 4, [1.0] * 4)
