"""Context parallelism of prefill as an engine has it: every rank keeps the whole cache; and what `size` says of it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from simulator import Calibration, Layout, estimate
from simulator.engines import Vllm
from simulator.engines.prefill_context import kinds, sglang_offer, vllm_refuses
from simulator.estimate import bare
from simulator.kernels.attention import Segment
from simulator.layers import LatentAttention, MoE
from simulator.layers.layer import Direction
from simulator.parallel.context import Context
from simulator.passes import Passes, rows
from simulator.phases import Decode, Prefill, System
from simulator.planner import Plan, layouts, refusals, size
from simulator.serving import Request
from simulator.work import fold, quantity
from tests.support import EVERY, machine, model
from tests.test_context import messages

V3, DSA, LLAMA = "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3.2", "meta-llama/Meta-Llama-3.1-70B"
M1 = 2.0**20
ENGINE = Vllm()
LATENT_BYTES = (512 + 64) * 2


def split(cp: int, **degrees: int) -> Layout:
    return ENGINE.arranged(Layout(cp=cp, ep=degrees.pop("ep", cp), **degrees))


def total(work: Any, name: str) -> float:
    return float(fold(work, quantity(name)))


def planned(name: str, gpus: int, request: Request, **given: Any) -> Plan:
    return size(model(name), machine("h200", gpus), request, engine=ENGINE, **given)


# ---- what a rank holds


@pytest.mark.parametrize("name", [V3, DSA])
@pytest.mark.parametrize("cp", [2, 8])
def test_every_rank_keeps_the_whole_cache_and_a_share_of_the_experts(name: str, cp: int) -> None:
    spec = model(name)
    alone, shared = (System(spec, layout).resident(sequences=3.0, context=M1) for layout in (Layout(), split(cp)))
    assert shared.cache == alone.cache
    experts = sum(n * layer.modules(layer.whole(()))[0].parameters * layer.expert_weight.bytes(1.0) for n, layer in spec.counted if isinstance(layer, MoE))
    assert alone.weights - shared.weights == pytest.approx(experts * 1.5 * (1 - 1 / cp), rel=1e-6)


@pytest.mark.parametrize("name", [V3, DSA])
def test_the_engine_allocates_a_request_on_every_rank(name: str) -> None:
    here = machine("h200", 16)
    alone, shared = (ENGINE.capacity(model(name), layout, here, 2**20) for layout in (Layout(pp=2, dp=8), split(8, pp=2)))
    assert shared.per_sequence_bytes == alone.per_sequence_bytes
    assert shared.replicas == 1
    assert alone.replicas == 8


# ---- what is sent, what is done


@pytest.mark.parametrize("past", [0.0, 524_288.0])
def test_a_prefill_gathers_only_the_rows_of_new_tokens(past: float) -> None:
    spec, cp, new = model(V3), 4, 65_536.0
    found = messages(System(spec, split(cp)).work(Prefill(past + new, 1.0, past)))["gather keys and values"]
    sent = sum(count * float(op.payload_bytes) for count, op in found)
    assert sent == len(spec.order) * new * LATENT_BYTES


def test_an_indexers_keys_travel_beside_the_latents() -> None:
    spec, new = model(DSA), 65_536.0
    found = messages(System(spec, split(4)).work(Prefill(new)))
    assert sum(n * float(op.payload_bytes) for n, op in found["gather rows"]) == len(spec.order) * new * LATENT_BYTES
    assert sum(n * float(op.payload_bytes) for n, op in found["gather index"]) == len(spec.order) * new * 128 * 2


@pytest.mark.parametrize("name", [V3, DSA])
def test_decoding_sequences_belong_to_one_rank_each(name: str) -> None:
    spec, cp, batch = model(name), 4, 8.0
    alone, shared = (System(spec, layout).work(Decode(131_072.0, batch)) for layout in (Layout(), split(cp)))
    cores = [sum(row.count * float(row.op.model_flops) for row in rows(fold(work, Passes(lambda _: 0.0)), lambda _: 0.0) if row.op.name == "core") for work in (alone, shared)]
    assert cores[1] * cp == pytest.approx(cores[0], rel=1e-12)
    sent = messages(shared)["gather new rows"]
    assert sum(n * float(op.payload_bytes) for n, op in sent) == len(spec.order) * batch * LATENT_BYTES


@pytest.mark.parametrize("past", [0.0, 100_000.0])
def test_an_indexers_work_over_all_positions_is_the_whole(past: float) -> None:
    spec, cp, segment = model(DSA), 4, Segment(1.0, 65_536.0, past)
    layout = split(cp).place(spec)
    for layer in dict.fromkeys(layer for _, layer in spec.mixers):
        whole, parts = total(layer.work(layer.whole((segment,)), cache=spec.cache), "model_flops"), []
        for position in range(cp):
            scheme = Context(layout)
            scheme.position = position
            held = scheme.shard(layer.whole((segment,)), layer)
            parts.append(total(scheme.around(layer.work(held, cache=spec.cache), layer, held, spec.cache, Direction.FORWARD), "model_flops"))
        assert sum(parts) == pytest.approx(whole, rel=1e-12)


def test_experts_see_every_ranks_tokens_once() -> None:
    spec, cp = model(V3), 8
    layer = next(layer for layer in spec.layers if isinstance(layer, MoE))
    placed, segment = split(cp).place(spec), Segment(1.0, 65_536.0, 0.0)
    held = placed.shard(layer, (segment,))
    assert held.tokens * held.token_ranks == segment.tokens
    rows, _ = layer.routed(held)
    assert segment.tokens * layer.num_experts_per_tok / cp <= float(rows) < 1.2 * segment.tokens * layer.num_experts_per_tok / cp
    sent = {op.name for _, op in [pair for found in messages(placed.work(layer, held, spec.cache)).values() for pair in found]}
    assert {"dispatch", "combine"} <= sent


@pytest.mark.parametrize("phase", [Prefill(M1, 1.0, 0.0, 8192.0), Decode(M1, 8.0)], ids=str)
def test_one_rank_that_holds_everything_sends_nothing(phase: Any) -> None:
    assert total(System(model(V3), split(1)).work(phase), "wire_bytes") == 0


@pytest.mark.parametrize("name", [V3, DSA])
@pytest.mark.parametrize("phase", [Prefill(131_072.0, 1.0, 0.0, 8192.0), Decode(131_072.0, 16.0)], ids=str)
def test_an_array_of_splits_is_each_of_them(name: str, phase: Any) -> None:
    here, spec = machine("h200", 64), model(name)
    calibration = Calibration.load(here.gpu)
    several = ENGINE.arranged(Layout(cp=np.array([2.0, 4.0, 8.0]), ep=np.array([2.0, 4.0, 8.0])))
    found = bare(spec, here, several, phase, calibration=calibration).seconds
    each = [float(bare(spec, here, split(cp), phase, calibration=calibration).seconds) for cp in (2, 4, 8)]
    assert list(found) == pytest.approx(each, rel=1e-12)


# ---- the engine's rules


@pytest.mark.parametrize("name", EVERY)
def test_only_stacks_of_latent_attention_are_split(name: str) -> None:
    spec = model(name)
    latent = all(isinstance(layer, LatentAttention) for _, layer in spec.mixers)
    assert ENGINE.splits_prompts(spec) is latent
    assert (vllm_refuses(spec) is None) is latent
    offered = [layout for layout in layouts(spec, 8, ENGINE) if layout.cp > 1]
    assert bool(offered) is latent
    offer = sglang_offer(spec)
    assert offer is None or "--enable-prefill-cp" in offer.flags
    if kinds(spec) == ["Attention"]:
        assert offer is not None
        assert "zigzag" in offer.flags


@pytest.mark.parametrize(
    ("name", "layout", "told"),
    [
        (LLAMA, ENGINE.arranged(Layout(cp=4)), "not Attention"), (V3, Layout(cp=4, ep=4), "--cp-passing kv: vLLM"),
        (V3, ENGINE.arranged(Layout(cp=4)), "add --ep 4"), (V3, split(2, dp_attention=2), "not counted together"),
        (LLAMA, Layout(ulysses=4), "--ulysses 4: vLLM"), (LLAMA, Layout(tp=8, helix=4), "--helix 4: vLLM"),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", ENGINE.arranged(Layout(cp=4, ep=4)), "not KimiDeltaAttention"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_engine_does_not_split_is_refused_with_its_rule(name: str, layout: Layout, told: str) -> None:
    assert any(told in line and line.startswith("--") for line in refusals(model(name), layout, ENGINE))


def test_ranks_that_hold_the_whole_cache_gather() -> None:
    assert any("--cp-passing kv" in told for told in Layout(cp=4, holds="whole").refusals(model(LLAMA)))
    assert any("--cp-holds half" in told for told in Layout(cp=4, holds="half").refusals(model(LLAMA)))


# ---- what size says


def test_splitting_prompts_wins_where_an_indexer_scores_a_million_tokens() -> None:
    found = planned(DSA, 16, Request(2**20))
    best = found.best.layout
    assert best.cp > 1
    assert found.prefill_context is not None
    assert " won: " in found.prefill_context
    command, _ = ENGINE.command(found.model, best, found.cluster, context=2**20, concurrency=1)
    assert command is not None
    assert f"--prefill-context-parallel-size {int(best.cp)}" in command
    assert "--enable-expert-parallel" in command
    assert found.service is not None
    assert found.best.speed is not None
    assert found.service.cold.seconds.value == pytest.approx(float(found.best.speed.ttft_s), rel=1e-9)
    without = [float(c.speed.latency_s) for c in found.candidates if c.speed is not None and c.layout.cp == 1]
    assert float(found.best.speed.latency_s) < min(without)


def test_splitting_prompts_loses_where_every_rank_expands_the_context() -> None:
    found = planned(V3, 16, Request(131_072))
    assert found.best.layout.cp == 1
    assert found.prefill_context is not None
    assert re.search(r" lost: .* longer", found.prefill_context)


@pytest.mark.parametrize(
    ("name", "context", "offered"), [("openai/gpt-oss-120b", 131_072, True), ("moonshotai/Kimi-Linear-48B-A3B-Instruct", 2**19, False)]
)
def test_where_the_engine_splits_nothing_a_ring_that_would_save_much_is_named(name: str, context: int, offered: bool) -> None:
    found = planned(name, 8, Request(context))
    assert found.prefill_context is not None
    assert found.prefill_context.startswith("A ring over the prompt's tokens (")
    assert "compare-cp" in found.prefill_context
    assert ("SGLang" in found.prefill_context) is offered
    assert planned(LLAMA, 1, Request(8192)).prefill_context is None


@pytest.mark.parametrize("cp", [2, 4])
def test_a_split_the_user_insists_on_is_kept_and_gets_its_experts(cp: int) -> None:
    found = planned(V3, 16, Request(65_536), fixed={"cp": cp, "tp": 4})
    assert all((c.layout.cp, c.layout.tp, c.layout.ep, c.layout.holds) == (cp, 4, 4 * cp, "whole") for c in found.candidates)


def test_an_engines_split_is_an_estimate_of_its_layout() -> None:
    found = planned(V3, 16, Request(65_536), fixed={"cp": 4, "tp": 4})
    assert found.service is not None
    phase = Prefill(65_536.0 - 1024, 1.0, 0.0, float(ENGINE.step_tokens(found.cluster.gpu)))
    again = estimate(found.model, found.cluster, found.best.layout, phase, engine=ENGINE)
    assert again.seconds.value == pytest.approx(found.service.cold.seconds.value, rel=1e-12)
