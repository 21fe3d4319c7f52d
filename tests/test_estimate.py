"""Where the two sides meet: intervals against Monte Carlo, rows against totals, questions that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import Calibration, Decode, Layout, Mixed, Prefill, estimate
from simulator.calibration import Constants
from simulator.engines import SCHEDULED
from simulator.estimate import Estimate, Interval, binding_resource, interval
from simulator.hardware import catalog
from simulator.kernels.attention import Segment
from simulator.timing import Clock
from simulator.work import Op, fold, quantity
from tests.support import MAIN, eight, legal, machine, model

BASES = ("measured", "calibrated", "analytic", "assumed")
Z80 = 1.2815515655446004
LLAMA = "meta-llama/Meta-Llama-3.1-70B"


def calibration(sigmas: list[float], common: float = 0.0, bases: list[str] | None = None) -> Calibration:
    names = bases or ["measured"] * len(sigmas)
    return Calibration("gpu", {(f"k{i}", "", ""): Constants(sigma=s, basis=b) for i, (s, b) in enumerate(zip(sigmas, names, strict=True))}, common)


def families(seconds: list[float]) -> dict[tuple[str, str, str], Any]:
    return {(f"k{i}", "", "bf16"): s for i, s in enumerate(seconds)}


# ---- intervals


@pytest.mark.parametrize(
    ("seconds", "sigmas", "common"),
    [
        ([1.0], [0.1], 0.0), ([1.0], [0.2], 0.1), ([1.0, 1.0], [0.1, 0.1], 0.0), ([3.0, 1.0], [0.05, 0.2], 0.03), ([1.0] * 6, [0.15] * 6, 0.05),
        ([10.0, 1.0, 0.1], [0.04, 0.3, 0.3], 0.1), ([5.0, 4.0, 1.0], [0.0, 0.0, 0.0], 0.08),
    ],
)  # fmt: skip
def test_an_interval_is_what_monte_carlo_finds(seconds: list[float], sigmas: list[float], common: float) -> None:
    """Every family's times share one log-normal error, families are independent, one more error is common to all."""
    random = np.random.default_rng(20261123)
    draws = 200_000
    errors = np.exp(np.array(sigmas) * random.standard_normal((draws, len(sigmas))))
    total = (errors @ np.array(seconds)) * np.exp(common * random.standard_normal(draws))
    found = interval(families(seconds), calibration(sigmas, common), sum(seconds))
    assert math.log(found.high / found.value) / Z80 == pytest.approx(np.log(total).std(), rel=0.04)
    covered = np.mean((total >= found.low) & (total <= found.high))
    assert covered == pytest.approx(0.80, abs=0.02)
    assert found.value == sum(seconds)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 0.5)), min_size=1, max_size=6), st.floats(0, 0.3))
def test_an_interval_holds_its_value_and_is_no_wider_than_its_worst_family(parts: list[tuple[float, float]], common: float) -> None:
    seconds, sigmas = [s for s, _ in parts], [e for _, e in parts]
    found = interval(families(seconds), calibration(sigmas, common), sum(seconds))
    assert found.low <= found.value <= found.high
    assert found.high <= sum(seconds) * math.exp(Z80 * math.hypot(max(sigmas), common)) * (1 + 1e-9)
    assert found.high >= sum(seconds) * math.exp(Z80 * common) * (1 - 1e-9)


def test_independent_families_make_a_total_surer_than_one_family_of_the_same_size() -> None:
    one = interval(families([4.0]), calibration([0.2]), 4.0)
    four = interval(families([1.0] * 4), calibration([0.2] * 4), 4.0)
    assert math.log(four.high / 4) == pytest.approx(math.log(one.high / 4) / 2)


def test_the_low_end_is_no_less_than_the_bound() -> None:
    assert interval(families([1.0]), calibration([0.5]), 1.0, lower=0.95).low == 0.95
    assert interval(families([1.0]), calibration([0.01]), 1.0, lower=0.2).low > 0.98
    assert interval(families([1.0]), calibration([0.5]), 1.0, lower=1.0) == Interval(1.0, 1.0, math.exp(Z80 * 0.5), "measured")


@pytest.mark.parametrize("basis", BASES)
def test_the_basis_is_the_weakest_of_what_matters(basis: str) -> None:
    """A family counts from 5 % of the time on."""
    pair = calibration([0.1, 0.1], bases=["measured", basis])
    assert interval(families([94.0, 6.0]), pair, 100.0).basis == basis
    assert interval(families([95.0, 5.0]), pair, 100.0).basis == basis
    assert interval(families([96.0, 4.0]), pair, 100.0).basis == "measured"


def test_nothing_has_no_interval() -> None:
    assert interval({}, calibration([0.1]), 0.0) == Interval(0.0, 0.0, 0.0, "analytic")


@given(st.floats(0.01, 100), st.floats(1, 3), st.floats(0.01, 50))
def test_rates_and_multiples_keep_their_intervals(value: float, spread: float, factor: float) -> None:
    one = Interval(value, value / spread, value * spread, "measured")
    assert one.scaled(factor) == Interval(value * factor, value / spread * factor, value * spread * factor, "measured")
    rate = one.inverse(factor)
    assert rate.low <= rate.value <= rate.high
    assert rate.value == pytest.approx(factor / value)
    assert rate.high == pytest.approx(factor / one.low)
    other = Interval(1.0, 0.5, 2.0, "assumed")
    assert one.plus(other) == Interval(value + 1, value / spread + 0.5, value * spread + 2, "assumed")
    assert one.plus(other).basis == other.plus(one).basis
    assert one.overlaps(one.scaled(spread))
    assert not one.overlaps(one.scaled(spread * spread * 1.01))
    assert one.document() == {"value": value, "low": one.low, "high": one.high, "basis": "measured"}


def test_no_time_is_an_endless_rate() -> None:
    assert Interval(0.0, 0.0, 0.0, "analytic").inverse().value == math.inf


# ---- rows


def questions(name: str) -> list[Estimate]:
    found = []
    for layout in legal(name, 16)[::6]:
        part = machine("h200", int(layout.gpus))
        phases = (Prefill(20_000.0), Prefill(20_000.0, chunk=4096.0), Prefill(20_000.0, prefix=16_000.0, chunk=2000.0), Decode(30_000.0, 12.0))
        found += [estimate(model(name), part, layout, phase) for phase in phases]
    return found


@pytest.mark.parametrize("name", MAIN)
def test_rows_add_up_to_the_time(name: str) -> None:
    """On one stage and over a pipeline alike."""
    for found in questions(name):
        total = sum(float(np.sum(row.seconds)) for row in found.rows)
        assert total == pytest.approx(found.seconds.value, rel=1e-9), (found.layout, found.phase)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("what", ["flops", "model_flops", "hbm_bytes", "wire_bytes"])
def test_rows_add_up_to_the_quantities_of_one_stage(name: str, what: str) -> None:
    for found in questions(name):
        if found.layout.pp == 1:
            total = sum(row.count * float(np.sum(getattr(row.op, what))) for row in found.rows)
            assert total == pytest.approx(getattr(found, what), rel=1e-9), (found.layout, found.phase)


@pytest.mark.parametrize("name", MAIN)
def test_rows_are_distinct_and_each_has_a_reason(name: str) -> None:
    for found in questions(name)[:8]:
        clock = Clock(found.cluster, found.calibration)
        for row in found.rows:
            assert row.count > 0
            assert binding_resource(clock, row.op) in ("tensor", "special", "hbm", "l2", "link", "launch", "host")
        keys = [(row.op.name, row.op.family, float(np.sum(row.op.flops)), float(np.sum(row.op.hbm_bytes)), float(np.sum(row.op.wire_bytes))) for row in found.rows]
        assert len(keys) == len(set(keys))
        assert found.binding().endswith("of the time)")


@pytest.mark.parametrize("name", MAIN)
def test_the_work_of_an_estimate_is_what_it_says(name: str) -> None:
    for found in questions(name)[:8]:
        for what in ("flops", "model_flops", "hbm_bytes", "wire_bytes"):
            assert float(np.sum(fold(found.work, quantity(what)))) == pytest.approx(getattr(found, what), rel=1e-12)


# ---- engines


@pytest.mark.parametrize("engine", SCHEDULED)
@pytest.mark.parametrize("name", MAIN[:3])
def test_an_engine_adds_host_work_that_overlaps_the_gpus(engine: str, name: str) -> None:
    for layout in legal(name, 8)[::4]:
        part = machine("h200", 8)
        for phase in (Prefill(8192.0, chunk=2048.0), Decode(8192.0, 4.0)):
            bare, hosted = (estimate(model(name), part, layout, phase, engine=e) for e in (None, SCHEDULED[engine]()))
            assert hosted.seconds.value >= bare.seconds.value * (1 - 1e-12)
            assert hosted.upper > bare.upper
            assert hosted.flops == pytest.approx(bare.flops)
            assert any(row.op.kernel == "host" for row in hosted.rows) or hosted.seconds.value > bare.seconds.value * 0.999
            assert not any(row.op.kernel == "host" for row in bare.rows)


# ---- memory


@pytest.mark.parametrize("name", MAIN)
def test_memory_grows_with_sequences_context_and_step(name: str) -> None:
    layout = eight(name)
    part = machine("h200", 8)
    base = estimate(model(name), part, layout, Decode(10_000.0, 4.0)).footprint
    more = estimate(model(name), part, layout, Decode(10_000.0, 8.0)).footprint
    assert more.cache == 2 * base.cache
    assert more.weights == base.weights
    assert more.activations >= base.activations
    small, large = (estimate(model(name), part, layout, Prefill(16_384.0, chunk=c)).footprint for c in (2048.0, 16_384.0))
    assert small.cache == large.cache
    assert small.activations < large.activations
    assert large.total == pytest.approx(large.weights + large.cache + large.activations)


# ---- refusals


@pytest.mark.parametrize(
    ("layout", "gpus", "words"),
    [
        (Layout(tp=6), 8, "--tp 6: .* use a divisor: 1, 2, 4, 8"), (Layout(ep=4, tp=4), 4, "--ep 4: .* has no experts"), (Layout(tp=8), 4, "needs 8 GPUs and there are 4"),
        (Layout(tp=8, pp=2, dp=2), 16, "needs 32 GPUs and there are 16"), (Layout(dp_attention=2), 2, "--dp-attention 2"), (Layout(tp=8, dcp=8), 8, "--dcp 8"),
        (Layout(pp=100), 128, "--pp 100: .* 80 layers"),
    ],
    ids=str,
)  # fmt: skip
def test_a_layout_that_breaks_a_rule_is_refused_in_one_line(layout: Layout, gpus: int, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        estimate(model(LLAMA), machine("h200", gpus), layout, Decode(1000.0))
    assert "\n" not in str(refused.value)


# ---- machines


@pytest.mark.parametrize("gpu", catalog())
@pytest.mark.parametrize("name", MAIN)
def test_every_gpu_runs_every_model(name: str, gpu: str) -> None:
    layout = eight(name)
    for phase in (Prefill(4096.0), Decode(4096.0, 8.0), Mixed((Segment(4.0, 1.0, 4095.0, split_kv=True), Segment(1.0, 512.0, 0.0)))):
        found = estimate(model(name), machine(gpu, 8), layout, phase)
        assert 0 < found.lower <= found.seconds.value <= found.upper * (1 + 1e-12)
        assert found.seconds.basis in BASES
        assert math.isfinite(found.upper)


@pytest.mark.parametrize("name", MAIN)
def test_a_faster_gpu_is_no_slower(name: str) -> None:
    layout = eight(name)
    for phase in (Prefill(65_536.0, chunk=8192.0), Decode(65_536.0, 8.0)):
        bounds = [estimate(model(name), machine(g, 8), layout, phase, calibration=Calibration.none()).lower for g in ("a100", "h100", "h200", "b200")]
        assert bounds == sorted(bounds, reverse=True)


def test_ops_are_all_there_is() -> None:
    found = estimate(model(LLAMA), machine("h200", 8), Layout(tp=8), Decode(1000.0))
    assert any(isinstance(row.op, Op) for row in found.rows)
    assert any(not isinstance(row.op, Op) for row in found.rows)
