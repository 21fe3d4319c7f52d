"""States shared among data-parallel ranks: bytes held and bytes sent."""

from __future__ import annotations

import itertools

import pytest

from simulator.kernels.gemm import gemm
from simulator.layers import Direction
from simulator.parallel.sharded_data import STAGES, ShardedData
from simulator.work import Group, Overlap

P = 405e9


def sent(states: ShardedData) -> float:
    return sum(m.wire_bytes for direction in Direction for m in states.messages(P, direction))


@pytest.mark.parametrize(("stage", "bytes_of"), [(0, lambda n: 16), (1, lambda n: 4 + 12 / n), (2, lambda n: 2 + 14 / n), (3, lambda n: 16 / n)])
@pytest.mark.parametrize("n", [1, 8, 1024])
def test_bytes_a_parameter_are_those_of_the_stage(stage: int, bytes_of: object, n: int) -> None:
    """FORMULAS 4.3."""
    assert ShardedData(stage, n).footprint(P).total == pytest.approx(P * bytes_of(n), rel=1e-12)  # type: ignore[operator]


def test_a_gathered_layer_is_held_beside_the_shard() -> None:
    assert ShardedData(3, 8).footprint(P, gathered=1e9).weights == P / 8 * 2 + 2e9
    assert ShardedData(3, 8, keeps_weights=True).footprint(P, gathered=1e9).weights == P / 8 * 2 + P * 2
    assert ShardedData(2, 8).footprint(P, gathered=1e9).weights == P * 2


@pytest.mark.parametrize(("states", "times"), [
    (ShardedData(0, 8), 2), (ShardedData(1, 8), 2), (ShardedData(2, 8), 2), (ShardedData(3, 8), 3), (ShardedData(3, 8, keeps_weights=True), 2),
])  # fmt: skip
def test_bytes_sent_are_those_of_the_stage(states: ShardedData, times: int) -> None:
    """FORMULAS 5.2: (n - 1) / n P e, two or three times."""
    assert sent(states) == pytest.approx(times * 7 / 8 * P * 2, rel=1e-12)


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_sends_nothing(stage: int) -> None:
    assert sent(ShardedData(stage, 1)) == 0


def test_a_hybrid_reduces_its_shard_across_groups() -> None:
    """Of 64 ranks in groups of 8: shards are gathered inside a group and only 1 / 8 of the gradients leaves it."""
    states = ShardedData(3, 8, replicas=8)
    (across,) = [m for m in states.messages(P, Direction.BACKWARD) if m.name == "reduce shards"]
    assert across.wire_bytes == pytest.approx(2 * 7 / 8 * P / 8 * 2, rel=1e-12)
    assert (across.group.ranks, across.group.stride) == (8, 8)
    assert states.footprint(P).total == ShardedData(3, 8).footprint(P).total


@pytest.mark.parametrize(("stage", "direction"), list(itertools.product(STAGES, Direction)))
def test_messages_run_beside_the_layer_that_computes(stage: int, direction: Direction) -> None:
    layer = gemm("layer", m=8.0, n=8.0, k=8.0)
    found = ShardedData(stage, 8).around(layer, 1e9, direction)
    assert (found is layer) == (stage < 3 and direction is Direction.FORWARD)
    assert found is layer or isinstance(found, Overlap)


def test_unknown_stages_are_refused() -> None:
    (told,) = ShardedData(4, 8).refusals()
    assert told.startswith("--zero 4: ")
    assert list(ShardedData(0, 8, replicas=2).refusals())
    assert not list(ShardedData(3, 8, replicas=2).refusals())


def test_groups_lie_beside_each_other() -> None:
    states = ShardedData(3, 4, replicas=2, stride=8)
    assert isinstance(states.group, Group)
    assert (states.group.stride, states.across.stride) == (8, 32)
