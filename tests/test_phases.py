"""Steps of a system: what a pipeline makes of decoding, and that rows are what the time is made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import Calibration, Decode, Layout, Prefill, cluster, estimate, load_model
from simulator.work import Flow, Op, Pipeline, SecondsSerial, fold


def leaf(seconds: float) -> Op:
    return Op("work", "elementwise", shape={"seconds": seconds})


def seconds_of(pipeline: Pipeline) -> float:
    return float(fold(pipeline, SecondsSerial(lambda op: op.shape["seconds"])))


def ring_period(stages: list[float], groups: int, rounds: int = 400) -> float:
    """Groups go round a pipeline: a group enters the first stage again when it has left the last.  Brute force."""
    free = [0.0] * len(stages)
    ready = [0.0] * groups
    ends = []
    for _ in range(rounds):
        for g in range(groups):
            now = ready[g]
            for s, t in enumerate(stages):
                now = max(now, free[s]) + t
                free[s] = now
            ready[g] = now
        ends.append(max(ready))
    half = rounds // 2
    return (ends[-1] - ends[half]) / (rounds - 1 - half)


@given(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=5), st.integers(1, 7))
def test_a_round_of_decoding_is_the_period_of_the_simulated_ring(stages: list[float], groups: int) -> None:
    period = seconds_of(Pipeline([Flow(float(groups), [leaf(t) for t in stages], steady=True)]))
    assert period == pytest.approx(ring_period(stages, groups), rel=1e-6)


def test_one_sequence_pays_every_stage_and_a_full_pipeline_one_turn_each() -> None:
    model, machine = load_model("Meta-Llama-3.1-8B"), cluster("h200", 4)
    alone, split = Layout(), Layout(pp=4)
    whole = estimate(model, machine, alone, Decode(65536.0, 1.0)).seconds.value
    staged = estimate(model, machine, split, Decode(65536.0, 1.0)).seconds.value
    assert whole <= staged <= 1.05 * whole


@pytest.mark.parametrize("layout", [Layout(tp=8), Layout(tp=4, pp=2), Layout(tp=2, pp=4)])
@pytest.mark.parametrize("phase", [Decode(131072.0, 1.0), Decode(131072.0, 16.0), Prefill(131072.0, 1.0, 0.0, 8192.0), Prefill(8192.0)])
def test_rows_are_what_the_time_is_made_of(layout: Layout, phase: Decode | Prefill) -> None:
    machine = cluster("h200", 8)
    found = estimate(load_model("Meta-Llama-3.1-70B"), machine, layout, phase, calibration=Calibration.load(machine.gpu))
    assert sum(float(np.sum(row.seconds)) for row in found.rows) == pytest.approx(found.seconds.value, rel=2e-3)
