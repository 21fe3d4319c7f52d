"""The folds, each against a brute-force replay of the tree it folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.passes import Passes, by_kernel, rows
from simulator.runs import SHARES
from simulator.work import (
    Aside,
    Flow,
    Group,
    Message,
    Op,
    Overlap,
    PeakBytes,
    Pipeline,
    Repeat,
    SecondsOverlapped,
    SecondsSerial,
    Select,
    Serial,
    Work,
    fold,
    peak_bytes,
    quantity,
)

KERNELS = ("gemm", "attention", "elementwise")
AMOUNTS = ("tensor_flops", "vector_flops", "exponentials", "model_flops", "hbm_bytes", "wire_bytes", "flops", "launches")


def op(seconds: float = 1.0, kernel: str = "gemm", *, live: Any = 0.0, saved: Any = 0.0, vector: float = 0.0, **amounts: float) -> Op:
    """An op whose time, memory and amounts are given outright."""
    return Op(kernel, kernel, shape={"t": seconds}, aside=lambda: Aside(vector, live, saved), **amounts)  # type: ignore[arg-type]


def seconds(leaf: Any) -> float:
    return leaf.shape["t"] if isinstance(leaf, Op) else leaf.payload_bytes


def demand(leaf: Any) -> Mapping[str, float]:
    return {"hbm": leaf.hbm_bytes, "tensor": leaf.tensor_flops} if isinstance(leaf, Op) else {"link": leaf.wire_bytes}


serial_seconds, overlapped_seconds = SecondsSerial(seconds), SecondsOverlapped(seconds, demand)
whole = st.integers(0, 1000).map(float)
#: Saved bytes may be negative: backward frees what forward kept.
ops = st.builds(
    lambda t, kernel, live, saved, flops, hbm: op(t, kernel, live=live, saved=saved, tensor_flops=flops, vector=1.0, hbm_bytes=hbm),
    whole, st.sampled_from(KERNELS), whole, st.integers(-500, 500).map(float), whole, whole,
)  # fmt: skip
serial_trees = st.recursive(
    ops,
    lambda inner: st.one_of(
        st.builds(Serial, st.lists(inner, max_size=4)), st.builds(Repeat, st.integers(0, 4).map(float), inner),
        st.builds(Select, st.booleans(), inner, inner),
    ),
    max_leaves=8,
)  # fmt: skip
trees = st.recursive(
    ops,
    lambda inner: st.one_of(
        st.builds(Serial, st.lists(inner, min_size=1, max_size=3)), st.builds(Repeat, st.integers(1, 3).map(float), inner),
        st.builds(Overlap, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)  # fmt: skip


def replay(work: Work) -> list[Op]:
    """Every op of a serial tree in the order it runs."""
    if isinstance(work, Op):
        return [work]
    if isinstance(work, Repeat):
        return replay(work.work) * int(work.count)
    if isinstance(work, Select):
        return replay(work.a if work.mask else work.b)
    assert isinstance(work, Serial)
    return [leaf for part in work.parts for leaf in replay(part)]


# ---- memory


def held(run: Sequence[Op], *, keeps_saved: bool) -> tuple[float, float]:
    """(what remains, the most held) by walking through the ops."""
    now = most = 0.0
    for leaf in run:
        if keeps_saved:
            most = max(most, now + max(leaf.live_bytes, leaf.saved_bytes))
            now += leaf.saved_bytes
        else:
            most = max(most, leaf.live_bytes)
    return now, most


@given(serial_trees, st.booleans())
def test_peak_memory_is_that_of_a_replay(work: Work, keeps_saved: bool) -> None:
    assert fold(work, PeakBytes(keeps_saved=keeps_saved)) == held(replay(work), keeps_saved=keeps_saved)
    assert peak_bytes(work, keeps_saved=keeps_saved) == held(replay(work), keeps_saved=keeps_saved)[1]


@given(st.lists(st.tuples(st.integers(0, 4), whole, st.integers(-500, 500)), min_size=1, max_size=5), st.booleans())
def test_peak_memory_over_runs_is_that_of_run_after_run(runs: list[tuple[int, float, int]], keeps_saved: bool) -> None:
    counts, live, saved = (np.array(column, dtype=float) for column in zip(*runs, strict=True))
    together = Repeat(counts, op(live=live, saved=saved), runs=True)
    apart = [op(live=b, saved=float(s)) for n, b, s in runs for _ in range(n)]
    assert fold(together, PeakBytes(keeps_saved=keeps_saved)) == held(apart, keeps_saved=keeps_saved)


@given(trees, trees)
def test_two_at_once_hold_the_sum_and_no_less_than_one_after_the_other(a: Work, b: Work) -> None:
    both, alone = peak_bytes(Overlap([a, b])), (peak_bytes(a), peak_bytes(b))
    assert both == sum(alone)
    assert both >= max(peak_bytes(Serial([a, b])), peak_bytes(Serial([b, a])))


# ---- time


def test_parts_one_after_the_other_add_up_and_parts_together_take_the_longest() -> None:
    a, b = op(3.0), op(5.0)
    assert fold(Serial([a, b]), overlapped_seconds) == 8
    assert fold(Overlap([a, b]), overlapped_seconds) == 5
    assert fold(Overlap([a, b]), serial_seconds) == 8


def test_parts_together_share_the_resource_they_both_use() -> None:
    a, b = op(3.0, hbm_bytes=4.0), op(5.0, hbm_bytes=4.0, tensor_flops=1.0)
    assert fold(Overlap([a, b]), overlapped_seconds) == 8
    assert fold(Overlap([a, op(5.0, tensor_flops=4.0)]), overlapped_seconds) == 5
    assert fold(Overlap([Repeat(3.0, op(1.0, hbm_bytes=2.0)), Serial([b, b])]), overlapped_seconds) == 14


@given(trees)
def test_overlap_takes_no_longer_than_serial_and_no_less_than_its_longest_part(work: Work) -> None:
    def bounded(leaf: Any) -> float:
        return max(demand(leaf).values())

    together, apart = SecondsOverlapped(bounded, demand), SecondsSerial(bounded)
    assert fold(work, together) <= fold(work, apart) * (1 + 1e-12)
    if isinstance(work, Overlap):
        assert fold(work, together) >= max(fold(part, together) for part in work.parts)


def flow_shop(jobs: Sequence[Sequence[float]]) -> float:
    """Makespan of jobs that pass the stages in order, each stage one job at a time."""
    done = [0.0] * len(jobs[0])
    for job in jobs:
        ready = 0.0
        for s, taken in enumerate(job):
            ready = done[s] = max(ready, done[s]) + taken
    return done[-1]


def pipelined(jobs: Sequence[Sequence[float]], counts: Sequence[int], algebra: Any = overlapped_seconds) -> float:
    return fold(Pipeline([Flow(float(n), [op(t) for t in job]) for n, job in zip(counts, jobs, strict=True)]), algebra)


stage_times = st.lists(st.integers(0, 50).map(float), min_size=1, max_size=6)


@given(stage_times, st.integers(1, 12))
def test_a_pipeline_of_equal_microbatches_takes_what_a_simulation_takes(stages: list[float], count: int) -> None:
    for algebra in (serial_seconds, overlapped_seconds):
        assert pipelined([stages], [count], algebra) == flow_shop([stages] * count)


microbatches = st.lists(st.tuples(st.lists(st.integers(0, 30).map(float), min_size=5, max_size=5), st.integers(0, 4)), min_size=1, max_size=5)


def ordered(runs: Sequence[tuple[list[float], int]], times: Sequence[int]) -> list[list[float]]:
    """Every microbatch with the time of every stage, equal stages one by one."""
    return [[t for t, n in zip(job, times, strict=False) for _ in range(n)] for job, count in runs for _ in range(count)]


@given(microbatches, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 2))
def test_a_pipeline_of_any_microbatches_takes_what_a_simulation_takes(
    runs: list[tuple[list[float], int]], times: list[int], rounds: int
) -> None:
    flows = [Flow(float(n), [op(t) for t in job[: len(times)]], times=[float(n) for n in times]) for job, n in runs]
    jobs = ordered(runs, times) * rounds
    assert fold(Pipeline(flows, float(rounds)), serial_seconds) == pytest.approx(flow_shop(jobs) if jobs else 0.0, rel=1e-12)


@given(microbatches, st.integers(2, 5), st.integers(3, 9))
def test_many_rounds_are_never_long_and_short_by_no_more_than_is_said(runs: list[tuple[list[float], int]], depth: int, rounds: int) -> None:
    jobs = ordered(runs, [1] * depth)
    if not jobs:
        return
    flows = [Flow(float(n), [op(t) for t in job[:depth]]) for job, n in runs]
    found, simulated = fold(Pipeline(flows, float(rounds)), serial_seconds), flow_shop(jobs * rounds)
    most = max(sum(column) for column in zip(*jobs, strict=True))
    assert found <= simulated * (1 + 1e-12) <= (found + (depth - 1) * (flow_shop(jobs) - most)) * (1 + 1e-9)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=5), st.integers(4, 60), st.integers(1, 2))
def test_chunks_that_grow_through_uneven_stages_take_what_a_simulation_takes(stages: list[tuple[int, int]], chunks: int, rounds: int) -> None:
    """Stage s takes a_s + j c_s for chunk j, told by the means of runs: never long, and short by at most g n^2 / 8 for each change of
    stage, with n the chunks of the longest run."""
    ends = np.round(np.cumsum([0.0, *SHARES]) * (chunks - 2))
    counts = np.array([1.0, *np.diff(ends), 1.0])
    middle = np.cumsum(counts) - counts / 2 - 0.5
    work = Pipeline([Flow(counts, [op(a + middle * c) for a, c in stages], runs=True)], float(rounds))  # type: ignore[arg-type]
    found = fold(work, serial_seconds)
    simulated = flow_shop([[float(a + j * c) for a, c in stages] for j in range(chunks)] * rounds)
    apart = max(np.diff(ends))
    growth = max(abs(c - d) for _, c in stages for _, d in stages)
    assert found <= simulated * (1 + 1e-9)
    assert simulated <= (found + rounds * (len(stages) - 1) * growth * apart**2 / 8) * (1 + 1e-9)
    assert sum(float(np.sum(row.seconds)) for row in rows(fold(work, Passes(seconds)), seconds)) == pytest.approx(found)
    assert sum(by_kernel(fold(work, Passes(seconds)), seconds).values()) == pytest.approx(found)


@given(microbatches, st.integers(2, 5))
def test_pipelines_as_arrays_are_each_pipeline(runs: list[tuple[list[float], int]], depth: int) -> None:
    factors, rounds, times = np.array([1.0, 2.0, 0.5]), np.array([1.0, 2.0, 7.0]), [1.0, 3.0, 2.0, 1.0, 4.0]
    together = Pipeline([Flow(n * (factors > 0.7), [op(t * factors) for t in job[:depth]], times=times[:depth]) for job, n in runs], rounds)  # type: ignore[arg-type]
    found = np.broadcast_to(fold(together, serial_seconds), factors.shape)
    for i, factor in enumerate(factors):
        alone = [Flow(float(n * (factor > 0.7)), [op(t * float(factor)) for t in job[:depth]], times=times[:depth]) for job, n in runs]
        assert found[i] == pytest.approx(fold(Pipeline(alone, float(rounds[i])), serial_seconds), rel=1e-12)


def test_one_stage_is_no_pipeline() -> None:
    assert pipelined([[7.0]], [5]) == 35


@pytest.mark.parametrize("name", AMOUNTS)
def test_a_pipeline_moves_what_its_busiest_rank_moves(name: str) -> None:
    few, many = op(hbm_bytes=1.0), op(tensor_flops=5.0, vector=1.0, exponentials=2.0, model_flops=3.0, hbm_bytes=4.0, wire_bytes=6.0)
    work = Pipeline([Flow(3.0, [few, many]), Flow(2.0, [few, many])])
    assert fold(work, quantity(name)) == 5 * getattr(many, name)


# ---- every algebra


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.allclose(a, b, rtol=1e-12, atol=1e-9))


def summed_rows(work: Work) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows(fold(work, Passes(seconds)), seconds):
        found[row.op.kernel] = found.get(row.op.kernel, 0.0) + float(np.sum(row.seconds))
    return found


FOLDS: dict[str, Callable[[Work], Any]] = {
    "serial seconds": lambda work: fold(work, serial_seconds),
    "overlapped seconds": lambda work: fold(work, overlapped_seconds),
    "peak bytes": lambda work: fold(work, PeakBytes(keeps_saved=True)),
    "peak bytes of inference": lambda work: fold(work, PeakBytes(keeps_saved=False)),
    "by kernel": lambda work: by_kernel(fold(work, Passes(seconds)), seconds),
    "rows": summed_rows,
    **{name: lambda work, name=name: fold(work, quantity(name)) for name in AMOUNTS},
}
every_fold = pytest.mark.parametrize("value", FOLDS.values(), ids=FOLDS.keys())


@every_fold
@given(work=trees, count=st.integers(1, 5))
def test_repeating_is_writing_it_out(value: Callable[[Work], Any], work: Work, count: int) -> None:
    assert same(value(Repeat(float(count), work)), value(Serial([work] * count)))


@every_fold
@given(work=trees, other=trees, mask=st.booleans())
def test_a_choice_is_the_branch_taken(value: Callable[[Work], Any], work: Work, other: Work, mask: bool) -> None:
    chosen = work if mask else other
    assert same(value(Select(mask, work, other)), value(chosen))
    assert same(value(Select(np.bool_(mask), work, other)), value(chosen))


@every_fold
@given(parts=st.lists(serial_trees, min_size=1, max_size=4))
def test_grouping_parts_changes_nothing(value: Callable[[Work], Any], parts: list[Work]) -> None:
    assert same(value(Serial(parts)), value(Serial([Serial(parts[:1]), Serial(parts[1:])])))


@pytest.mark.parametrize("name", [n for n in FOLDS if n not in ("by kernel", "rows")])
@given(work=trees, other=trees, masks=st.lists(st.booleans(), min_size=1, max_size=5))
def test_a_choice_for_many_cells_takes_each_cells_branch(name: str, work: Work, other: Work, masks: list[bool]) -> None:
    value = FOLDS[name]
    found = value(Select(np.array(masks), work, other))
    for i, mask in enumerate(masks):
        here = tuple(np.broadcast_to(x, len(masks))[i] for x in found) if isinstance(found, tuple) else np.broadcast_to(found, len(masks))[i]
        assert same(here, value(work if mask else other))


@given(serial_trees)
def test_rows_of_a_serial_tree_sum_to_its_time(work: Work) -> None:
    lines = rows(fold(work, Passes(seconds)), seconds)
    assert sum(row.seconds for row in lines) == pytest.approx(fold(work, serial_seconds))
    assert sum(row.count * row.op.hbm_bytes for row in lines) == pytest.approx(fold(work, quantity("hbm_bytes")))


@given(serial_trees)
def test_families_of_a_serial_tree_sum_to_its_time(work: Work) -> None:
    families = by_kernel(fold(work, Passes(seconds)), seconds)
    assert sum(families.values()) == pytest.approx(fold(work, serial_seconds))
    for kernel in KERNELS:
        ran = [leaf.shape["t"] for leaf in replay(work) if leaf.kernel == kernel]
        assert families.get((kernel, "", "bf16"), 0.0) == pytest.approx(sum(ran))


@given(stage_times, st.integers(1, 9), st.booleans())
def test_rows_and_families_of_a_pipeline_sum_to_its_time(stages: list[float], count: int, steady: bool) -> None:
    work = Pipeline([Flow(float(count), [Serial([op(t), op(1.0, "attention")]) for t in stages], steady=steady)])
    told = fold(work, serial_seconds)
    assert sum(float(np.sum(row.seconds)) for row in rows(fold(work, Passes(seconds)), seconds)) == pytest.approx(told)
    assert sum(by_kernel(fold(work, Passes(seconds)), seconds).values()) == pytest.approx(told)


def test_families_of_an_overlap_are_those_of_the_part_that_takes_longest() -> None:
    work = Serial([op(2.0), Overlap([op(3.0, "attention"), op(5.0, "elementwise")])])
    assert by_kernel(fold(work, Passes(seconds)), seconds) == {("gemm", "", "bf16"): 2.0, ("elementwise", "", "bf16"): 5.0}


@pytest.mark.parametrize("name", ["flops", "hbm_bytes", "exponentials", "launches"])
def test_runs_add_up_with_their_counts(name: str) -> None:
    counts, amounts = np.array([1.0, 3.0, 0.0]), np.array([2.0, 5.0, 100.0])
    work = Repeat(counts, op(tensor_flops=amounts, hbm_bytes=amounts, exponentials=amounts), runs=True)  # type: ignore[arg-type]
    assert fold(work, quantity(name)) == (4 if name == "launches" else 17)
    lines = rows(fold(work, Passes(lambda leaf: leaf.hbm_bytes)), lambda leaf: leaf.hbm_bytes)
    assert [row.count for row in lines] == [4]
    assert lines[0].seconds == 17
    assert lines[0].op.hbm_bytes == 17 / 4


def test_a_message_carries_bytes_and_no_flops() -> None:
    message = Message("all-reduce", "all_reduce", Group("tp", 8.0), payload_bytes=8.0, wire_bytes=14.0)
    assert fold(Repeat(2.0, message), quantity("wire_bytes")) == 28
    assert all(fold(message, quantity(name)) == 0 for name in ("flops", "model_flops", "hbm_bytes", "exponentials"))
    assert by_kernel(fold(message, Passes(seconds)), seconds) == {("message", "all_reduce", ""): 8.0}


def test_a_shared_part_counts_each_time_it_occurs() -> None:
    shared = Serial([op(2.0), op(3.0)])
    assert fold(Serial([shared, Repeat(2.0, shared), shared]), overlapped_seconds) == 20


def test_nothing_is_nothing() -> None:
    for work in (Serial([]), Repeat(0.0, op(5.0, live=3.0, hbm_bytes=1.0)), Repeat(np.zeros(3), op(5.0, live=3.0), runs=True)):
        assert fold(work, overlapped_seconds) == 0
        assert fold(work, serial_seconds) == 0
        assert fold(work, quantity("hbm_bytes")) == 0
        assert peak_bytes(work) == 0
