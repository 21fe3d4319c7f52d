"""A pipeline's schedule against one simulated microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.schedule import Job, jobs_of, makespan, passages, turn


def simulated(job: Job, rounds: int = 1) -> float:
    """Every microbatch through every stage, one by one, each stage one at a time."""
    assert job.ends is not None
    n, done = int(job.number), [0.0] * int(sum(job.times))
    for _ in range(rounds):
        for j in range(n):
            ready, place = 0.0, 0
            for (first, last), equal in zip(job.ends, job.times, strict=True):
                for _ in range(int(equal)):
                    ready = done[place] = max(ready, done[place]) + first + (last - first) * j / max(n - 1, 1)
                    place += 1
    return done[-1]


stages = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6), st.integers(1, 3)), min_size=1, max_size=5)


def grown(found: Sequence[tuple[int, int, int]], number: int) -> Job:
    """A job whose microbatch j takes a + j g on a stage."""
    grows = number - 1
    return Job(float(number), [a + g * grows / 2 for a, g, _ in found], [(float(a), float(a + g * grows)) for a, g, _ in found], [float(n) for *_, n in found])


@given(stages, st.integers(1, 2), st.integers(1, 2))
def test_two_growing_microbatches_take_what_a_simulation_takes(found: list[tuple[int, int, int]], number: int, rounds: int) -> None:
    job = grown(found, number)
    assert makespan([job], float(rounds)) == pytest.approx(simulated(job, rounds), rel=1e-12)


@given(stages, st.integers(3, 60))
def test_many_growing_microbatches_are_never_long_and_short_by_no_more_than_is_said(found: list[tuple[int, int, int]], number: int) -> None:
    job = grown(found, number)
    took, exact = makespan([job]), simulated(job)
    steepest = max(abs(g - h) for _, g, _ in found for _, h, _ in found)
    assert took <= exact * (1 + 1e-12) <= (took + (len(found) - 1) * steepest * (number - 1) ** 2 / 8) * (1 + 1e-9)


@given(stages, st.integers(1, 60))
def test_a_passage_ends_with_the_whole_job_and_begins_with_its_first_microbatch(found: list[tuple[int, int, int]], number: int) -> None:
    job = grown(found, number)
    for stage, mean, (first, *_) in zip(passages(job), job.means, found, strict=True):
        assert stage.upto[-1] == pytest.approx(number * mean)
        assert stage.upto[0] == stage.alone[0] == pytest.approx(first)


def test_a_run_lies_on_a_line_between_its_neighbours() -> None:
    first, between, last = jobs_of(np.array([1.0, 8.0, 1.0]), [np.array([10.0, 14.5, 19.0]), np.array([3.0, 3.0, 3.0])], [1.0, 1.0], runs=True)
    assert (first.ends, last.ends) == (None, None)
    assert between.ends == [pytest.approx((11.0, 18.0)), (3.0, 3.0)]
    assert (between.number, list(between.means)) == (8, [14.5, 3.0])


def test_a_run_that_stops_growing_does_not_overshoot() -> None:
    """A window that is full: 4 chunks that grow from 10 to 13, then 20 of 13."""
    _, grows, full, _ = jobs_of(np.array([1.0, 3.0, 19.0, 1.0]), [np.array([10.0, 12.0, 13.0, 13.0])], [1.0], runs=True)
    assert grows.ends is not None
    assert full.ends is not None
    assert grows.ends[0][1] <= 13
    assert full.ends[0][1] == 13


def test_a_stage_that_costs_the_same_in_every_run_needs_no_axis() -> None:
    counts = np.array([1.0, 6.0, 1.0])
    told, plain = jobs_of(counts, [np.full(3, 5.0), np.arange(3.0)], [1.0, 1.0], runs=True), jobs_of(counts, [5.0, np.arange(3.0)], [1.0, 1.0], runs=True)
    assert makespan(told) == makespan(plain)


def test_a_job_of_no_microbatches_takes_no_time() -> None:
    job = Job(0.0, [5.0, 7.0], None, [1.0, 1.0])
    assert makespan([job], 4.0) == 0
    assert makespan([job, Job(1.0, [2.0, 3.0], None, [1.0, 1.0])]) == 5


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 8))
def test_a_turn_is_every_stage_once_or_the_slowest_for_all(seconds: list[int], groups: int) -> None:
    ones = [1.0] * len(seconds)
    assert turn(float(groups), seconds, ones) == max(sum(seconds), groups * max(seconds))
    merged = turn(float(groups), [seconds[0]], [4.0])
    assert merged == turn(float(groups), [seconds[0]] * 4, [1.0] * 4)
