"""A tree's time as intervals, and the ways to share a prompt side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from simulator.calibration import Calibration
from simulator.cli import main
from simulator.compare_cp import compare, exposed, ring_timeline, tensor_degree
from simulator.estimate import estimate
from simulator.hf import with_formats
from simulator.kernels.gemm import gemm
from simulator.kernels.messages import message
from simulator.parallel import Layout
from simulator.phases import Prefill, System
from simulator.timeline import document, seconds_of, timeline
from simulator.timing import Clock, seconds_expected
from simulator.work import Group, Overlap, Repeat, Serial
from tests.support import machine, model

LLAMA, BIG = "meta-llama/Meta-Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-405B"


def clock(gpus: int = 8) -> Clock:
    part = machine("h200", gpus)
    return Clock(part, Calibration.load(part.gpu))


def test_a_timeline_ends_when_the_tree_does() -> None:
    here = clock(64)
    for layout in (Layout(tp=8), Layout(tp=8, cp=8), Layout(tp=8, cp=8, order="contiguous"), Layout(tp=8, ulysses=4, cp=2), Layout(tp=8, pp=4)):
        work = System(model(LLAMA), layout).work(Prefill(131072.0, chunk=16384.0 if layout.pp > 1 else None))
        spans = timeline(work, here, position=3 if layout.cp > 1 else None)
        # runs of chunks stand for their mean; as microbatches each has a length of its own
        assert max(s.end_s for s in spans) == pytest.approx(seconds_expected(work, here), rel=0.03 if layout.pp > 1 else 1e-6)
        assert all(s.end_s >= s.start_s >= 0 for s in spans)


def test_what_ends_first_in_an_overlap_waits() -> None:
    here = clock()
    product, send = gemm("product", m=64.0, n=64.0, k=64.0), message("send", "send", group=Group("cp", 2.0), payload_bytes=1e9)
    spans = timeline(Serial([Overlap([send, product]), Repeat(3.0, product)]), here, unroll=1)
    assert [(s.lane, s.name) for s in spans] == [
        ("send", "send"), ("compute", "product"), ("wait", "for the send beside it"), ("compute", "product"), ("compute", "product"),
    ]  # fmt: skip
    assert spans[1].start_s == spans[0].start_s == 0
    assert spans[2].end_s == spans[0].end_s == spans[3].start_s
    assert spans[-1].times == 2


@pytest.fixture(scope="module")
def ways() -> Any:
    return compare(model(LLAMA), machine("h200", 64), 2**20)


def test_an_unbalanced_ring_waits_and_a_balanced_one_does_not(ways: Any) -> None:
    found = {way.name: way for way in ways}
    for name, idle in (("ring pass-KV contiguous", True), ("ring pass-KV zigzag", False)):
        spans = ring_timeline(found[name])
        waits = [seconds_of([s for s in spans if s.rank == f"ring {p}"], "wait") for p in range(8)]
        assert (waits[0] > 2 * waits[6] > 0) == idle
        assert len({s.rank for s in spans}) == 8
        assert json.loads(json.dumps(document(spans)))


def test_exposed_time_is_what_free_messages_would_save(ways: Any) -> None:
    part = machine("h200", 64)
    for way in ways:
        if way.estimate is not None:
            assert 0 <= way.exposed_s < way.estimate.seconds.value
            assert way.exposed_s == pytest.approx(exposed(way.estimate))
    alone = estimate(model(LLAMA), part, Layout(), Prefill(8192.0), calibration=Calibration.load(part.gpu))
    assert exposed(alone) == 0


def test_the_ways_come_in_the_order_of_their_times_and_the_refused_say_why(ways: Any) -> None:
    fitting = [way.estimate.seconds.value for way in ways if not way.limit]
    assert fitting == sorted(fitting)
    assert {"ring pass-KV zigzag", "ring pass-Q zigzag", "all-gather zigzag", "Ulysses 8", "USP 2 x ring 4", "tensor parallel alone"} <= {w.name for w in ways}
    found = compare(model(LLAMA), machine("h200", 128), 2**20)
    (ulysses,) = [way for way in found if way.name == "Ulysses 16"]
    assert ulysses.estimate is None
    assert "8 attention heads on a rank of --tp 8" in ulysses.limit
    assert found.index(ulysses) >= sum(way.estimate is not None for way in found)


def test_tensor_parallelism_stays_in_the_node() -> None:
    assert tensor_degree(model(LLAMA), machine("h200", 64)) == 8
    assert tensor_degree(model("Qwen/Qwen2.5-14B-Instruct-1M"), machine("h200", 4)) == 4


def test_a_million_tokens_on_128_h100_from_first_principles() -> None:
    """Llama 3.1 405B, TP8 x CP16 pass-KV, fp8 weights.  2411.01783 reports 77 s and 63 % of the 800 TFLOP/s it gives for its H100 of
    500 W with HBM2e (2.4 TB/s: torchtitan's rows of the same machines state it).  Told so much, the interval holds it; the 700 W board
    that is sold would be faster.  Nothing here was fitted to it.
    """
    full = machine("h100", 128)
    peak = 800e12 / (full.gpu.units * full.gpu.flops_per_clock["bf16"])
    boards = [replace(full.gpu, max_clock_hz=peak), replace(full.gpu, max_clock_hz=peak, tdp_w=500.0, hbm_bytes_per_s=2.4e12), full.gpu]
    model_, layout, phase = with_formats(model(BIG), "fp8", None), Layout(tp=8, cp=16), Prefill(1e6)
    by_peak, theirs, sold = (
        estimate(model_, replace(full, gpu=board), layout, phase, calibration=Calibration.load(board)) for board in boards
    )  # fmt: skip
    for found in (by_peak, theirs):
        assert found.lower < 77
        assert found.seconds.low < 77 < found.seconds.high
        assert exposed(found) < 0.05 * found.seconds.value
        assert float(found.footprint.total) < float(full.gpu.usable_bytes)
    assert by_peak.flops / by_peak.lower > 0.9 * 800e12
    assert sold.seconds.value < 77


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["compare-cp", *words])


def test_the_verb_answers_in_json_and_writes_a_timeline(tmp_path: Any) -> None:
    file = tmp_path / "ranks.json"
    told = json.loads(run("Meta-Llama-3.1-70B", "--gpus", "16", "--context", "128K", "--timeline", str(file), "--json").stdout)
    assert told["inputs"]["gpus"] == 16
    ring = next(way for way in told["ways"] if way["name"] == "ring pass-KV zigzag")
    assert ring["layout"] == "TP8 x CP2"
    assert ring["prefill_s"]["low"] < ring["prefill_s"]["value"] < ring["prefill_s"]["high"]
    assert {"wire_bytes", "exposed_s", "memory_bytes_per_gpu", "limit"} <= set(ring)
    spans = json.loads(file.read_text())["spans"]
    assert {s["rank"] for s in spans} == {"ring 0", "ring 1"}
    assert {"compute", "send"} <= {s["lane"] for s in spans}


def test_the_verb_prints_one_line_for_each_way() -> None:
    text = run("Meta-Llama-3.1-70B", "--gpus", "16", "--context", "128K").stdout
    for name in ("ring pass-KV zigzag", "Ulysses 2", "all-gather", "pipeline of chunks"):
        assert text.count(name) == 1, name


@pytest.mark.parametrize("words", [("--gpus", "8"), ("--gpus", "12", "--tp", "8"), ("--gpus", "16", "--prefix", "2M"), ("--gpus", "16", "--tp", "3")])
def test_what_cannot_be_compared_is_said(words: tuple[str, ...]) -> None:
    found = run("Meta-Llama-3.1-70B", "--context", "1M", *words)
    assert isinstance(found.exception, ValueError)
    assert str(found.exception).startswith("--")
