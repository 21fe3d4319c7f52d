"""Schedules of a pipeline against the same schedules run step by step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from simulator.parallel.schedules import SCHEDULES, Schedule, gpipe_makespan_s, one_f_one_b_least_s, one_f_one_b_most_s

#: An op is (kind, microbatch, ...); a pair of ops runs together.  F forward, B backward, I its input half, W its weight half.
Orders = list[list[Any]]


def run(orders: Orders, seconds: Callable[[int, Any], float], needs: Callable[[int, Any], list[Any]]) -> float:
    """Seconds until every rank has run its list in order, each op once what it needs is done."""
    done: dict[Any, float] = {}
    at, free = [0] * len(orders), [0.0] * len(orders)
    left = sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                op = order[at[rank]]
                parts = op if isinstance(op[0], tuple) else (op,)
                waits = [need for part in parts for need in needs(rank, part)]
                if any(need not in done for need in waits):
                    break
                free[rank] = max([free[rank], *(done[need] for need in waits)]) + seconds(rank, op)
                for part in parts:
                    done[rank, part] = free[rank]
                    if part[0] in "BI":
                        done[rank, ("gradient", *part[1:])] = free[rank]
                at[rank] += 1
                left -= 1
        assert left < before, "a deadlock"
    return max(free)


def straight(p: int) -> Callable[[int, Any], list[Any]]:
    def needs(rank: int, op: Any) -> list[Any]:
        if op[0] == "F":
            return [(rank - 1, op)] if rank else []
        return [(rank, ("F", op[1])), *([(rank + 1, op)] if rank < p - 1 else [])]

    return needs


def gpipe(p: int, m: int) -> Orders:
    return [[("F", i) for i in range(m)] + [("B", i) for i in range(m)] for _ in range(p)]


def one_f_one_b(p: int, m: int) -> Orders:
    found = []
    for rank in range(p):
        warm = min(m, p - rank - 1)
        order = [("F", i) for i in range(warm)]
        for i in range(m - warm):
            order += [("F", warm + i), ("B", i)]
        found.append(order + [("B", i) for i in range(m - warm, m)])
    return found


def interleaved(p: int, m: int, v: int) -> Orders:
    def unit(k: int, *, back: bool) -> tuple[int, int]:
        chunk = k // p % v
        return k // (p * v) * p + k % p, v - 1 - chunk if back else chunk

    found = []
    for rank in range(p):
        warm = min(m * v, 2 * (p - rank - 1) + (v - 1) * p)
        order: list[Any] = [("F", *unit(k, back=False)) for k in range(warm)]
        for k in range(m * v - warm):
            order += [("F", *unit(warm + k, back=False)), ("B", *unit(k, back=True))]
        found.append(order + [("B", *unit(k, back=True)) for k in range(m * v - warm, m * v)])
    return found


def through_chunks(p: int, v: int) -> Callable[[int, Any], list[Any]]:
    def needs(rank: int, op: Any) -> list[Any]:
        kind, batch, chunk = op
        if kind == "F":
            if rank:
                return [(rank - 1, op)]
            return [(p - 1, ("F", batch, chunk - 1))] if chunk else []
        after = [(rank + 1, op)] if rank < p - 1 else [(0, ("B", batch, chunk + 1))] if chunk < v - 1 else []
        return [(rank, ("F", batch, chunk)), *after]

    return needs


def zero_bubble_makespan(p: int, m: int, forward: float, inputs: float, weights: float) -> float:
    """Greedy: whatever can start first; of equals a backward, then a forward within 1F1B's number in flight, then weights."""
    done: dict[Any, float] = {}
    free, ran = [0.0] * p, {kind: [0] * p for kind in "FBW"}
    lasts = {"F": forward, "B": inputs, "W": weights}
    while min(ran["W"]) < m:
        ready = []
        for r in range(p):
            f, b, w = (ran[kind][r] for kind in "FBW")
            if b < f and (r == p - 1 or (r + 1, "B", b) in done):
                ready.append((max(free[r], done[r, "F", b], done.get((r + 1, "B", b), 0.0)), 0, r, "B"))
            if f < m and f - b < p - r and (r == 0 or (r - 1, "F", f) in done):
                ready.append((max(free[r], done.get((r - 1, "F", f), 0.0)), 1, r, "F"))
            if w < b:
                ready.append((max(free[r], done[r, "B", w]), 2, r, "W"))
        start, _, r, kind = min(ready)
        done[r, kind, ran[kind][r]] = free[r] = start + lasts[kind]
        ran[kind][r] += 1
    return max(free)


def dualpipe(p: int, m: int) -> Orders:
    """Both ends inject m / 2 microbatches; rank r and p - 1 - r mirror each other.  As the README's figure has it."""
    half, found = p // 2, []
    for rank in range(p):
        k, flip = min(rank, p - 1 - rank), rank >= half
        sent = {"F": [0, 0], "B": [0, 0]}
        order: list[Any] = []
        waiting: list[Any] = []

        def take(kind: str, way: int, flip: bool = flip, sent: Any = sent) -> Any:
            way ^= flip
            sent[kind][way] += 1
            return kind, way, sent[kind][way] - 1

        def back(way: int, *, split: bool = False, order: Any = order, waiting: Any = waiting, take: Any = take) -> None:
            _, direction, i = take("B", way)
            order.append(("I" if split else "B", direction, i))
            if split:
                waiting.append((direction, i))

        def weigh(order: Any = order, waiting: Any = waiting) -> None:
            order.append(("W", *waiting.pop(0)))

        order += [take("F", 0) for _ in range(2 * (half - k - 1))]
        for _ in range(k + 1):
            order += [take("F", 0), take("F", 1)]
        for _ in range(half - k - 1):
            back(1, split=True)
            weigh()
            order.append(take("F", 1))
        for i in range(m // 2 - p + k + 1):
            if i == 0 and k == half - 1:
                order.append(take("F", 0))
                back(1)
            else:
                order.append((take("F", 0), take("B", 1)))
            order.append((take("F", 1), take("B", 0)))
        for _ in range(half - k - 1):
            back(1)
            order.append((take("F", 1), take("B", 0)))
        split = False
        for i in range(k + 1):
            split |= i == (k + 1) // 2 and k % 2 == 1
            back(1, split=split)
            split |= i == (k + 1) // 2 and k % 2 == 0
            back(0, split=split)
        for _ in range(half - k - 1):
            weigh()
            back(0, split=True)
        for _ in range(k + 1):
            weigh()
        assert not waiting
        found.append(order)
    return found


def both_ways(p: int) -> Callable[[int, Any], list[Any]]:
    def needs(rank: int, op: Any) -> list[Any]:
        kind, way, i = op
        before, after = (rank - 1, rank + 1) if way == 0 else (rank + 1, rank - 1)
        if kind == "F":
            return [(before, op)] if 0 <= before < p else []
        if kind == "W":
            return [(rank, ("I", way, i))]
        return [(rank, ("F", way, i)), *([(after, ("gradient", way, i))] if 0 <= after < p else [])]

    return needs


def most_in_flight(order: list[Any]) -> int:
    held = most = 0
    for op in order:
        for part in op if isinstance(op[0], tuple) else (op,):
            held += (part[0] == "F") - (part[0] in "BI")
            most = max(most, held)
    return most


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("times", [1, 2, 4])
def test_gpipe_and_1f1b_take_as_long_as_when_run(p: int, times: int) -> None:
    m = p * times
    for name, orders in (("gpipe", gpipe(p, m)), ("1f1b", one_f_one_b(p, m))):
        plan = Schedule(name, p, m)
        assert run(orders, lambda _, op: 3.0 if op[0] == "F" else 5.0, straight(p)) == plan.makespan_s(forward_s=3.0, backward_s=5.0)
        assert [most_in_flight(order) for order in orders] == [plan.in_flight(stage) for stage in range(p)]


@pytest.mark.parametrize("p", [2, 3, 4, 6])
@pytest.mark.parametrize("v", [1, 2, 3])
def test_interleaved_takes_as_long_as_when_run(p: int, v: int) -> None:
    for m in (p, 2 * p, 4 * p):
        orders, plan = interleaved(p, m, v), Schedule("interleaved", p, m, v)
        found = run(orders, lambda _, op: (2.0 if op[0] == "F" else 4.0) / v, through_chunks(p, v))
        assert found == pytest.approx(plan.makespan_s(forward_s=2.0, backward_s=4.0), rel=1e-12)
        assert most_in_flight(orders[0]) / v == pytest.approx(plan.in_flight(), rel=1e-12)


@pytest.mark.parametrize("p", [2, 3, 4, 6, 8])
def test_zero_bubble_takes_as_long_as_when_run(p: int) -> None:
    for m in (p, 2 * p, 3 * p):
        plan = Schedule("zero_bubble", p, m)
        assert zero_bubble_makespan(p, m, 1.0, 1.0, 1.0) == plan.makespan_s(forward_s=1.0, backward_s=2.0, weight_s=1.0)


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("together", [6.0, 5.0])
def test_dualpipe_idles_as_long_as_when_run(p: int, together: float) -> None:
    times = {"F": 2.0, "B": 4.0, "I": 2.0, "W": 2.0}

    def seconds(_: int, op: Any) -> float:
        return together if isinstance(op[0], tuple) else times[op[0]]

    for m in (2 * p, 4 * p):
        orders, plan = dualpipe(p, m), Schedule("dualpipe", p, m)
        found = run(orders, seconds, both_ways(p))
        idle = [found - sum(seconds(0, op) for op in order) for order in orders]
        assert max(idle) == plan.bubble_s(forward_s=2.0, backward_s=4.0, weight_s=2.0, together_s=together)
        assert {most_in_flight(order) for order in orders} == {plan.in_flight()} == {p + 1}
        if together == 6.0:
            assert set(idle) == {max(idle)}
            assert found == plan.makespan_s(forward_s=2.0, backward_s=4.0, weight_s=2.0)


def test_uneven_stages_under_gpipe_are_exact_and_under_1f1b_between_two_bounds() -> None:
    draw = random.Random(7)
    for _ in range(300):
        p = draw.randint(1, 7)
        m = draw.randint(p, 14)
        ahead, back = ([float(draw.randint(1, 9)) for _ in range(p)] for _ in range(2))

        def seconds(rank: int, op: Any, ahead: Any = ahead, back: Any = back) -> float:
            return (ahead if op[0] == "F" else back)[rank]

        assert run(gpipe(p, m), seconds, straight(p)) == gpipe_makespan_s(ahead, back, m)
        found = run(one_f_one_b(p, m), seconds, straight(p))
        assert one_f_one_b_least_s(ahead, back, m) <= found
        doubled = [2 * x for x in ahead]
        found = run(one_f_one_b(p, m), lambda rank, op, a=ahead: a[rank] * (1 if op[0] == "F" else 2), straight(p))
        assert one_f_one_b_least_s(ahead, doubled, m) <= found <= one_f_one_b_most_s(ahead, doubled, m)
    even = [4.0] * 5
    assert one_f_one_b_least_s(even, even, 9) == one_f_one_b_most_s(even, even, 9) == Schedule("1f1b", 5, 9).makespan_s(forward_s=4.0, backward_s=4.0)


def test_bubbles_are_those_papers_print() -> None:
    """FORMULAS 4.4: p 16, m 64: 23.4 %; v 8: 2.93 % and 1.117 x the activations."""
    assert Schedule("1f1b", 16, 64).bubble_fraction() == pytest.approx(15 / 64)
    assert Schedule("interleaved", 16, 64, 8).bubble_fraction() == pytest.approx(0.0293, abs=5e-5)
    assert Schedule("interleaved", 16, 64, 8).in_flight() / 16 == pytest.approx(1.117, abs=5e-4)
    assert [Schedule(name, 8, 16).weight_copies for name in SCHEDULES] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(("plan", "told"), [
    (Schedule("interleaved", 4, 6, 2), "use 8"), (Schedule("dualpipe", 4, 6), "2 x stages = 8"), (Schedule("dualpipe", 3, 6), "even"),
    (Schedule("other", 2, 2), "unknown"),
])  # fmt: skip
def test_what_a_schedule_cannot_run_is_refused(plan: Schedule, told: str) -> None:
    (line,) = plan.refusals()
    assert line.startswith("--schedule ")
    assert told in line


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_can_run_is_not_refused(name: str) -> None:
    assert not list(Schedule(name, 4, 8).refusals())
