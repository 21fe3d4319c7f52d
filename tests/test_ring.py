"""The algorithms that share a sequence between ranks give what one device gives, and say what the simulator says they say."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from microbench.case import Case  # noqa: E402
from microbench.ring import block, context, fit, halo, processes, suite, trace, ulysses  # noqa: E402
from microbench.ring.program import over, payloads  # noqa: E402
from microbench.ring.transport import Local, Loopback, Silent, Transport  # noqa: E402
from simulator.kernels.attention import Segment  # noqa: E402
from simulator.parallel.context import halo_rows  # noqa: E402
from simulator.work import Overlap, Work  # noqa: E402

CPU = torch.device("cpu")
RANKS = (1, 2, 3, 4, 8)
#: Ranks of an inner ring, and of those that exchange heads in usp.
INNER = {1: 1, 2: 2, 3: 3, 4: 2, 8: 4}


def cases_of(n: int, past: int, impl: str) -> list[Case]:
    """Both directions, two sequences, grouped heads; head exchange with more, as many and fewer key-value heads than ranks."""
    layouts = [(4, 2, 8)] if impl in context.IMPLS else [(4 * n, 2 * n, 8), (4 * n, n, 8), (2 * n, 1, 8)]
    more = {"inner": INNER[n]} if impl in ("double.zigzag", "usp") else {}
    return [
        over(impl, layout, ranks=n, tokens=8, past=past * n, sequences=2, backward=way, **more)
        for layout in layouts
        for way in ((False,) if impl.startswith("ring_q") else (False, True))
    ]


def module_of(impl: str) -> ModuleType:
    return context if impl in context.IMPLS else ulysses


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


each = pytest.mark.parametrize("impl", [*context.IMPLS, *ulysses.IMPLS])
for_ranks = pytest.mark.parametrize("ranks", RANKS)
with_past = pytest.mark.parametrize("past", [0, 4], ids=["cold", "prefix"])


@each
@for_ranks
@with_past
def test_ranks_together_give_what_one_device_gives(impl: str, ranks: int, past: int) -> None:
    for which in cases_of(ranks, past, impl):
        errors = Local.run(ranks, lambda transport, w=which: module_of(impl).error(w, transport, CPU, torch.float64))
        assert all(error < 1e-12 for error in errors), (which.key, errors)


@each
@for_ranks
@with_past
def test_a_rank_hands_over_what_the_simulator_says(impl: str, ranks: int, past: int) -> None:
    for which in cases_of(ranks, past, impl):
        predicted = payloads(module_of(impl).work(which))
        assert bool(predicted) == (ranks > 1)
        for rank in {0, ranks - 1}:
            transport = Silent(rank, ranks)
            once = module_of(impl).build(which, transport, CPU)
            transport.counted.clear()
            once()
            assert dict(transport.counted) == predicted, which.key


def test_processes_agree_with_one_device_and_with_the_simulator() -> None:
    found = processes.run(4, processes.agreement, [4, 3, 2])
    seen, sent = set(), Counter()  # type: ignore[var-annotated]
    predicted = {w.key: payloads(m.work(w)) for size in (2, 3, 4) for m in processes.MODULES for w in m.cases("tiny", size)}
    uneven = {w.key: w for size in (2, 3, 4) for m in processes.UNEVEN for w in m.cases("tiny", size)}
    for rank, rows in enumerate(found):
        for row in rows:
            assert row["error"] < 1e-12, (rank, row)
            if row["case"] in uneven:
                sent[row["case"]] += row["counted"].get("send", 0)
            else:
                assert row["counted"] == predicted[row["case"]], (rank, row)
            seen.add((rank, row["size"], row["case"]))
    modules = (*processes.MODULES, *processes.UNEVEN)
    assert len(seen) == sum(size * len(m.cases("tiny", size)) for size in (2, 3, 4) for m in modules)
    assert sent == {key: sum(lacking_bytes(which)) for key, which in uneven.items()}


# ---- windows


def lacking_bytes(which: Case) -> list[float]:
    """What the simulator says each rank lacks, fetched once and, backward, returned once."""
    segment = Segment(float(which["sequences"]), float(which["ranks"] * which["tokens"]), 0.0)
    row = 2 * which["kv_heads"] * which["head_dim"] * 2 * which["sequences"] * (2 if halo.is_backward(which) else 1)
    rows = (halo_rows(halo.order_of(which), segment, float(which["ranks"]), which["window"] - 1.0, float(r)) for r in range(which["ranks"]))
    return [float(found * row) for found in rows]


def windows(ranks: int) -> list[Case]:
    """Windows of two tokens, of a chunk, over several ranks, and over everything; two sequences."""
    return [
        over(impl, (4, 2, 8), ranks=ranks, tokens=8, sequences=2, backward=way, window=window)
        for impl in halo.IMPLS for window in (2, 5, 9, 14, 200) for way in (False, True)
    ]  # fmt: skip


@for_ranks
def test_ranks_that_fetch_a_halo_give_what_one_device_gives(ranks: int) -> None:
    for which in windows(ranks):
        errors = Local.run(ranks, lambda transport, w=which: halo.error(w, transport, CPU, torch.float64))
        assert all(error < 1e-12 for error in errors), (which.key, errors)


@for_ranks
def test_a_halo_moves_what_the_simulator_says_of_every_rank(ranks: int) -> None:
    for which in windows(ranks):
        said = lacking_bytes(which)
        assert payloads(halo.work(which)).get("send", 0.0) == max(said), which.key
        sent = []
        for rank in range(ranks):
            transport = Silent(rank, ranks)
            once = halo.build(which, transport, CPU)
            transport.counted.clear()
            once()
            sent.append(transport.counted["send"])
        assert sum(sent) == sum(said), which.key
        assert set(transport.counted) <= {"send"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_halo_costs_no_more_precision_than_its_rounding(dtype: str) -> None:
    kind = getattr(torch, dtype)
    for which in windows(4):
        errors = Local.run(4, lambda transport, w=which, k=kind: halo.error(w, transport, CPU, k))
        assert max(errors) < 4 * torch.finfo(kind).eps, which.key


def test_a_window_with_a_past_is_refused() -> None:
    which = over("halo.zigzag", (4, 2, 8), ranks=2, tokens=8, past=4, window=3)
    with pytest.raises(ValueError, match="use ranks x tokens"):
        halo.build(which, Silent(0, 2), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each
def test_lower_precision_costs_no_more_than_its_rounding(impl: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    for which in cases_of(4, 4, impl):
        errors = Local.run(4, lambda transport, w=which, k=kind: module_of(impl).error(w, transport, CPU, k))
        assert max(errors) < 4 * torch.finfo(kind).eps, which.key


@each
@pytest.mark.parametrize("kind", [Silent, Loopback], ids=["silent", "loopback"])
def test_one_rank_alone_plays_its_part_as_often_as_asked(impl: str, kind: type[Transport]) -> None:
    for which in cases_of(4, 0, impl):
        transport = Loopback.of(1, 4, CPU) if kind is Loopback else Silent(1, 4)
        once = module_of(impl).build(which, transport, CPU)
        transport.counted.clear()
        once()
        handed = dict(transport.counted)
        once()
        assert handed
        assert dict(transport.counted) == {pattern: 2 * value for pattern, value in handed.items()}


@pytest.mark.parametrize("order", ["zigzag", "contiguous", "striped"])
@for_ranks
def test_every_pair_is_scored_once_and_only_by_whom_it_concerns(order: str, ranks: int) -> None:
    own, past = 6, 2
    positions = [context.tokens_of(order, r, ranks, own) for r in range(ranks)]
    assert sorted(torch.cat(positions).tolist()) == list(range(own * ranks))
    for asking in range(ranks):
        for owner in range(ranks):
            scored = torch.zeros(own, past + own, dtype=torch.int)
            for part in context.parts(order, asking, owner, own, past):
                q, k = part.queries.stop - part.queries.start, part.keys.stop - part.keys.start
                shape = torch.ones(q, k, dtype=torch.int)
                scored[part.queries, part.keys] += shape.tril(k - q) if part.causal else shape
            assert (scored[:, :past] == 1).all()
            assert (scored[:, past:] == (positions[asking][:, None] >= positions[owner][None, :]).int()).all()


@for_ranks
def test_zigzag_steps_are_equal_and_half_a_block(ranks: int) -> None:
    own = 8
    for asking in range(ranks):
        for owner in set(range(ranks)) - {asking}:
            (part,) = context.parts("zigzag", asking, owner, own, 0)
            assert not part.causal
            assert (part.queries.stop - part.queries.start) * (part.keys.stop - part.keys.start) == own * own // 2


def test_partial_outputs_join_to_the_whole_in_any_order() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    whole = block.forward(q, k, v, causal=False)
    pieces = [block.forward(q, k[:, s], v[:, s], causal=False) for s in (slice(0, 1), slice(1, 3), slice(3, 5))]
    nothing = block.Partial(torch.zeros_like(q), torch.full((2, 4, 5), float("-inf"), dtype=torch.float64))
    for order in ((0, 1, 2), (2, 0, 1)):
        total = block.Sum(block.Partial(*(t.clone() for t in pieces[order[0]])))
        for index in order[1:]:
            total.add(pieces[index], slice(0, 5))
        total.add(nothing, slice(0, 5), last=True)
        assert torch.allclose(total.result().out, whole.out, atol=1e-14)
        assert torch.allclose(total.result().lse, whole.lse, atol=1e-14)


def _overlaps(work: Work) -> int:
    parts = [part for name in ("parts", "work") if hasattr(work, name) for part in (getattr(work, name) if name == "parts" else [work.work])]
    return isinstance(work, Overlap) + sum(_overlaps(part) for part in parts)


def test_predicted_work_has_its_sends_beside_its_steps() -> None:
    assert _overlaps(context.work(over("ring_kv.zigzag", (4, 2, 8), ranks=4, tokens=8))) >= 2
    assert _overlaps(context.work(over("gather.zigzag", (4, 2, 8), ranks=4, tokens=8))) == 0


@pytest.mark.parametrize("ranks", RANKS)
def test_cases_are_distinct_and_fit_their_ranks(ranks: int) -> None:
    for module in (*processes.MODULES, *processes.UNEVEN):
        for name in ("tiny", "ring"):
            found = module.cases(name, ranks)
            assert len({which.key for which in found}) == len(found)
            assert found or (module, name, ranks) == (ulysses, "ring", 3), "three ranks divide no layout's heads"
            for which in found:
                assert which.kernel in module.KERNELS
                assert which["context"] >= which["ranks"] * which["tokens"]
                assert bool(payloads(module.work(which))) == (ranks > 1)


def test_the_error_of_a_median_is_how_much_medians_scatter() -> None:
    random = np.random.default_rng(1)
    drawn = random.normal(3.0, 0.5, (2000, 60))
    told = float(np.mean([suite.error_of_median(row) for row in drawn]))
    assert told == pytest.approx(float(np.median(drawn, axis=1).std()), rel=0.05)


def test_a_row_without_turns_says_nothing_of_exposed_communication() -> None:
    line = {"kernel": "collective", "impl": "send", "dtype": "bf16", "regime": "steady", "shape": "ranks=2 payload_bytes=8", "held": "", "backend": "nccl"}
    old = fit.Row.of({**line, "p50_s": "3", "silent_s": "2"})
    new = fit.Row.of({**line, "p50_s": "3", "silent_s": "2", "exposed_s": "0.9", "exposed_se_s": "0.01"})
    assert (old.exposed_s, old.sharp) == (1.0, False)
    assert (new.exposed_s, new.sharp) == (0.9, True)


def test_a_trace_tells_what_each_rank_did(tmp_path: Path) -> None:
    which = over("ring_kv.zigzag", (4, 2, 16), ranks=3, tokens=32)

    def program(transport: Transport) -> list[trace.Span]:
        traced = trace.Traced.over(transport, CPU)
        once = context.build(which, traced, CPU)
        traced.begin()
        start = time.perf_counter()
        once()
        took = time.perf_counter() - start
        spans = trace.everyone(traced)
        assert all(0 <= span.start_s < span.end_s <= took + 1 for span in spans)
        assert sum(s.end_s - s.start_s for s in spans if s.lane in ("compute", "wait")) <= took
        return spans

    spans = [span for found in Local.run(3, program) for span in found]
    for rank in range(3):
        lanes = [span.lane for span in spans if span.rank == f"rank {rank}"]
        assert (lanes.count("compute"), lanes.count("send"), lanes.count("wait")) == (3, 2, 2)
    trace.write(tmp_path / "t.json", spans)
    assert {key for row in json.loads((tmp_path / "t.json").read_text()) for key in row} == {"rank", "lane", "name", "start_s", "end_s", "times"}


def test_a_trace_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    spans = [trace.Span("rank 0", lane, "x", 0.0, 1.0) for lane in ("compute", "send", "wait")]
    trace.draw(tmp_path / "t.html", spans)
    assert "vega" in (tmp_path / "t.html").read_text()


@pytest.mark.parametrize(
    ("impl", "change", "told"),
    [
        ("ring_kv.zigzag", {"tokens": 7}, "even number"), ("ring_kv.zigzag", {"past": 3}, "use a multiple"),
        ("ulysses", {"ranks": 3}, "use a divisor"),
    ],
)  # fmt: skip
def test_refusals_state_the_rule(impl: str, change: dict[str, int], told: str) -> None:
    shape = {"ranks": 2, "tokens": 8, "past": 0} | change
    which = over(impl, (4, 2, 8), **shape)
    with pytest.raises(ValueError, match=told):
        module_of(impl).build(which, Silent(0, which["ranks"]), CPU)
