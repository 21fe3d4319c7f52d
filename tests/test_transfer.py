"""Caches that move between machines, or are read back instead of computed again."""

from __future__ import annotations

import pytest

from simulator.calibration import Calibration
from simulator.kernels.gemm import gemm
from simulator.parallel import Layout
from simulator.parallel.transfer import (
    exposed_hand_over_s,
    handed_over_bytes,
    prefill_and_hand_over,
    recompute_flops,
    restore_crossover_tokens,
    restores,
    send_cache,
)
from simulator.phases import System
from simulator.planner import size
from simulator.serving import Request
from simulator.timing import Clock, seconds_expected
from simulator.work import fold, quantity
from tests.support import machine, model

LLAMA, V3 = "meta-llama/Meta-Llama-3.1-70B", "deepseek-ai/DeepSeek-V3"
#: Llama 70B on 8 H100 at half their rate; FORMULAS 5.9.
HERE = {"flops_per_s": 8 * 989e12 * 0.5, "matrix_parameters": 70.6e9, "layers": 80, "query_width": 8192}


@pytest.mark.parametrize(("name", "layout"), [
    (LLAMA, Layout(tp=8)), (LLAMA, Layout(tp=4, pp=2)), (LLAMA, Layout(tp=8, cp=4)), (LLAMA, Layout(tp=16)), (V3, Layout(tp=8)), (V3, Layout(tp=8, dcp=8)),
], ids=str)  # fmt: skip
def test_all_ranks_together_hand_over_the_cache_once(name: str, layout: Layout) -> None:
    """Whatever copies they hold."""
    sent = handed_over_bytes(model(name), layout, 131072.0) * layout.gpus
    assert sent == pytest.approx(model(name).cache_bytes(131072.0), rel=1e-12)


def test_reading_back_128k_takes_a_tenth_of_computing_it() -> None:
    """FORMULAS 5.9: Llama 70B, PCIe 5 at 55 GB/s 0.78 s, 10.4 s to compute; NVMe at 7 GB/s pays beyond 33.6K tokens."""
    assert pytest.approx(0.781, abs=1e-3) == 327680 * 131072 / 55e9
    again = recompute_flops(tokens=131072, matrix_parameters=70.6e9, layers=80, query_width=8192) / HERE["flops_per_s"]
    assert again == pytest.approx(10.375, rel=2e-3)
    assert restore_crossover_tokens(token_bytes=327680, bytes_per_s=7e9, **HERE) == pytest.approx(33_558.66, rel=1e-4)


@pytest.mark.parametrize("rate", [3e9, 7e9, 14e9])
def test_the_rule_turns_at_its_crossover(rate: float) -> None:
    there = restore_crossover_tokens(token_bytes=327680, bytes_per_s=rate, **HERE)
    assert restores(tokens=there * 1.001 + 1, token_bytes=327680, bytes_per_s=rate, **HERE)
    assert not restores(tokens=there * 0.999 - 1, token_bytes=327680, bytes_per_s=rate, **HERE)
    assert restore_crossover_tokens(token_bytes=327680, bytes_per_s=1e12, **HERE) == 0


def test_a_hand_over_layer_by_layer_hides_all_but_one_layer() -> None:
    clock = Clock(machine("h200", 16), Calibration.none())
    layer, layers, payload = gemm("layer", m=65536.0, n=8192.0, k=8192.0), 80, 8e9
    each = seconds_expected(layer, clock)
    tree = prefill_and_hand_over(layer, layers, payload, 8.0)
    assert fold(tree, quantity("wire_bytes")) == pytest.approx(payload, rel=1e-12)
    exposed = seconds_expected(tree, clock) - layers * each
    assert exposed == pytest.approx(seconds_expected(send_cache(payload / layers, 8.0), clock), rel=1e-9)
    slow = exposed_hand_over_s(cache_bytes=payload, prefill_s=1e-3, layers=layers, bytes_per_s=50e9)
    assert slow == pytest.approx(payload / 50e9 - (layers - 1) / layers * 1e-3, rel=1e-12)
    assert exposed_hand_over_s(cache_bytes=payload, prefill_s=10.0, layers=layers, bytes_per_s=50e9) == payload / layers / 50e9


@pytest.mark.parametrize("name", [LLAMA, V3, "ai21labs/Jamba-v0.1"])
def test_size_tells_what_moving_a_cache_takes_beside_computing_it(name: str) -> None:
    """The share of one GPU over its host link, and over its NIC while layers compute."""
    here, request = machine("h200", 16), Request(131_072)
    found = size(model(name), here, request)
    moved, layout = found.moves, found.best.layout
    assert moved is not None
    assert found.service is not None
    assert moved.cached == found.service.cached_tokens
    held = float(System(found.model, layout).resident(sequences=1.0, context=float(moved.cached)).cache)
    assert moved.restored_bytes == held
    assert moved.restore_s is not None
    assert moved.restore_s >= held / here.gpu.host_bytes_per_s
    assert moved.recompute_s is not None
    assert moved.restore_s < moved.recompute_s < found.service.cold.seconds.value
    assert moved.sent_bytes * layout.replica_gpus == pytest.approx(float(found.model.cache_bytes(float(request.prompt))), rel=1e-9)
    assert moved.send_s is not None
    assert moved.exposed_s is not None
    assert moved.send_s >= moved.sent_bytes / 50e9
    assert moved.send_s / len(found.model.order) * 0.99 < moved.exposed_s <= moved.send_s
    assert len(moved.lines()) == 2
