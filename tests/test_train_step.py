"""A training step: useful work, what is computed again, schedules, traffic and memory of shared states."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from simulator import Calibration, Layout, estimate, report, train_step
from simulator.dtypes import FP32
from simulator.hf import with_formats
from simulator.layers import Head, MoE
from simulator.layers.layer import parameters
from simulator.model import ModelSpec
from simulator.parallel.schedules import Schedule
from simulator.passes import Passes, Row, rows
from simulator.phases import System, TrainStep
from simulator.work import Leaf, Message, Op, SecondsOverlapped, fold, quantity
from tests.support import HYBRID, MAIN, machine, model

LLAMA, BIG = "meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-70B"
TOKENS = 8192.0


def trained(name: str) -> ModelSpec:
    return with_formats(model(name), "bf16", None)


def tree(name: str, layout: Layout, **asked: Any) -> Any:
    return train_step.work(System(trained(name), layout), TrainStep(TOKENS, **asked))


def total(work: Any, name: str) -> float:
    return float(fold(work, quantity(name)))


def seconds(work: Any, each: dict[str, float]) -> float:
    """The time of a tree whose ops take `each` by name, others none."""

    def leaf(op: Leaf) -> float:
        return 0.0 if isinstance(op, Message) else each.get(op.name, 0.0)

    return float(fold(work, SecondsOverlapped(leaf, lambda _: {})))


# ---- work


@pytest.mark.parametrize("batch", [1.0, 4.0])
def test_useful_work_is_six_flops_a_matrix_parameter_and_token_and_the_pairs_thrice(batch: float) -> None:
    """FORMULAS 4.6: 6 N T + 6 L n_q d S (S + 1) a sequence of S; the embedding multiplies nothing."""
    spec = trained(LLAMA)
    matrices = sum(
        n * sum(float(module.parameters) for module in layer.modules(layer.whole(())) if "norm" not in module.name)
        for n, layer in spec.counted
        if layer is not spec.embedding
    )
    pairs = 6 * 32 * 32 * 128 * TOKENS * (TOKENS + 1) * batch
    assert total(tree(LLAMA, Layout(), batch=batch), "model_flops") == pytest.approx(6 * matrices * TOKENS * batch + pairs, rel=2e-3)


@pytest.mark.parametrize("name", [LLAMA, "openai/gpt-oss-120b", "Qwen/Qwen3-Next-80B-A3B"])
def test_recomputing_runs_every_block_forward_once_more_and_nothing_else(name: str) -> None:
    spec = trained(name)
    once, twice = (total(tree(name, Layout(), recompute=how), "tensor_flops") for how in ("none", "full"))
    blocks = 0.0
    for count, layer in spec.counted:
        if layer in (spec.embedding, spec.head) or isinstance(layer, Head):
            continue
        held = layer.whole(train_step._Passes(System(spec, Layout()), TrainStep(TOKENS)).segments)
        blocks += count * total(layer.work(held, cache=spec.cache), "tensor_flops")
    assert twice - once == pytest.approx(blocks, rel=1e-9)


@pytest.mark.parametrize("name", [*MAIN, *HYBRID])
def test_every_architecture_takes_a_step_between_its_bound_and_no_overlap(name: str) -> None:
    here = machine("h200", 8)
    found = estimate(trained(name), here, Layout(cp=4, dp=2), TrainStep(TOKENS, 4.0, "full", 3), calibration=Calibration.load(here.gpu))
    assert 0 < found.lower <= found.seconds.value <= found.upper * (1 + 1e-9)
    assert found.model_flops <= found.flops * (1 + 1e-9)
    assert 0 < found.model_flops / found.seconds.value < here.gpu.peak_flops_per_s("bf16")


# ---- schedules

#: A norm is once in every mixer: a clock of blocks.
FORWARD, BACKWARD = {"attention norm": 1.0}, {"attention norm backward": 2.0}


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("m", [8, 16])
@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)])
def test_a_step_over_stages_takes_what_its_schedule_says(pp: int, m: int, name: str, chunks: int) -> None:
    work = tree(LLAMA, Layout(pp=pp), batch=float(m), schedule=name, chunks=chunks)
    layers = 32 / pp
    plan = Schedule(name, pp, m, chunks)
    assert seconds(work, FORWARD | BACKWARD) == pytest.approx(plan.makespan_s(forward_s=layers, backward_s=2 * layers), rel=1e-12)


def test_one_stage_has_no_bubble() -> None:
    assert seconds(tree(LLAMA, Layout(), batch=5.0), FORWARD | BACKWARD) == 5 * 32 * 3


# ---- traffic


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_states_travel_once_a_step_or_with_every_microbatch(zero: int, m: int) -> None:
    """Stages 0 and 1: 2 (n - 1) / n P e a step; 2: gradients with every microbatch; 3: weights twice too."""
    n = 4
    work = tree(LLAMA, Layout(dp=n), batch=float(n * m), zero=zero)
    one = (n - 1) / n * trained(LLAMA).parameters() * 2
    times = {0: 2, 1: 2, 2: m + 1, 3: 3 * m}[zero]
    assert total(work, "wire_bytes") == pytest.approx(times * one, rel=0.08 if zero == 3 else 1e-3)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_one_rank_sends_nothing(zero: int) -> None:
    assert total(tree(LLAMA, Layout(), batch=2.0, zero=zero), "wire_bytes") == 0


@pytest.mark.parametrize("layout", [Layout(dp=4), Layout(cp=4), Layout(cp=2, dp=2), Layout(ulysses=2, dp=2)], ids=str)
def test_ranks_with_the_same_weights_share_their_gradients(layout: Layout) -> None:
    assert train_step.states(layout, TrainStep(TOKENS)).ranks == 4


@pytest.mark.parametrize("name", [*MAIN, *HYBRID])
def test_a_line_of_a_step_is_of_one_direction_and_a_message_or_a_kernel(name: str) -> None:
    spec = trained(name)
    experts = any(isinstance(layer, MoE) for layer in spec.layers)
    layout = Layout(dp_attention=2, ep=2) if experts else Layout(dp=2)
    passed = fold(train_step.work(System(spec, layout), TrainStep(TOKENS, 2.0)), Passes(lambda _: 1.0))
    ops = [op for op in {**passed.longest, **passed.beside} if isinstance(op, Op)]
    sent = {op.name for op in {**passed.longest, **passed.beside} if isinstance(op, Message)}
    assert sent.isdisjoint(op.name for op in ops)
    back = {op.name for op in ops if op.kernel == "attention_backward" or "backward" in (*op.shape, op.impl)}
    assert back
    assert all(name.endswith("backward") for name in back)


def test_replicas_that_share_experts_have_microbatches_of_their_own() -> None:
    found = estimate(trained(SPARSE), machine("h200", 8), Layout(dp_attention=8, ep=8), TrainStep(TOKENS, 64.0), calibration=Calibration.none())
    assert report.training(found)["microbatches"] == 8
    assert report.training(found)["tokens"] == 64 * TOKENS


def test_larger_microbatches_do_the_same_work_in_fewer_runs() -> None:
    """Two sequences at once: the FLOPs of one after the other, half the gathers of ZeRO-3, twice what a microbatch keeps."""
    layout = Layout(dp=4)
    single, double = (tree(LLAMA, layout, batch=16.0, zero=3, micro=micro) for micro in (1.0, 2.0))
    assert total(single, "model_flops") == pytest.approx(total(double, "model_flops"), rel=1e-12)
    assert total(single, "wire_bytes") == pytest.approx(2 * total(double, "wire_bytes"), rel=1e-12)
    kept = [float(train_step.footprint(System(trained(LLAMA), layout), TrainStep(TOKENS, 16.0, micro=m)).activations) for m in (1.0, 2.0)]
    assert kept[1] == pytest.approx(2 * kept[0], rel=1e-9)


def test_gradients_in_fp32_take_and_send_four_bytes() -> None:
    """ZeRO-1 over 4: (n - 1) / n P (4 + 2) bytes a step; the update reads 2 more."""
    spec, layout = trained(LLAMA), Layout(dp=4)
    count = float(spec.parameters())
    work = tree(LLAMA, layout, batch=4.0, gradient=FP32)
    assert total(work, "wire_bytes") == pytest.approx(3 / 4 * count * 6, rel=1e-3)
    assert train_step.footprint(System(spec, layout), TrainStep(TOKENS, 4.0, gradient=FP32)).gradients == pytest.approx(4 * count)
    (update,) = [row for row in _ops(tree(LLAMA, Layout(), zero=0, gradient=FP32)) if row.name == "optimizer"]
    assert float(update.hbm_bytes) == pytest.approx(30 * count, rel=1e-6)


def test_states_shared_by_neighbours_are_held_once_by_each_group() -> None:
    """8 replicas, states over 2: 12 / 2 bytes of optimizer a parameter; shards are then summed over the 4 groups."""
    spec, layout = trained(LLAMA), Layout(dp=8)
    step = TrainStep(TOKENS, 8.0, sharers=2.0)
    assert train_step.footprint(System(spec, layout), step).optimizer == pytest.approx(12 * spec.parameters() / 2)
    sent = float(spec.parameters()) * 2 * (1 / 2 + 2 * 3 / 4 / 2 + 1 / 2)
    assert total(train_step.work(System(spec, layout), step), "wire_bytes") == pytest.approx(sent, rel=1e-3)


SPARSE = "Qwen/Qwen3-30B-A3B"


def sparse_counts() -> tuple[float, float]:
    """(weights of the layers with experts, all others) of the whole model."""
    spec = trained(SPARSE)
    experts = sum(n * float(parameters(layer, layer.whole(()))) for n, layer in spec.counted if isinstance(layer, MoE))
    return experts, float(spec.parameters()) - experts


def test_experts_over_ranks_are_shared_by_fewer_than_the_rest() -> None:
    """2 x 4 replicas, experts over 4: every rank holds a quarter of them, its optimizer shared by 2; the rest by 8."""
    layout, step = Layout(dp=2, dp_attention=4, ep=4), TrainStep(TOKENS, 8.0)
    experts = next(layer for layer in trained(SPARSE).layers if isinstance(layer, MoE))
    assert (train_step.states(layout, step).ranks, train_step.states(layout, step, experts).ranks) == (8, 2)
    spread, whole = sparse_counts()
    held = train_step.footprint(System(trained(SPARSE), layout), step)
    router = 48 * (128 * 2048 + 2048)
    assert held.weights == pytest.approx(2 * (whole + (spread - router) / 4 + router), rel=1e-6)
    assert held.optimizer == pytest.approx(12 * (whole / 8 + ((spread - router) / 4 + router) / 2), rel=1e-6)


def test_rows_travel_to_experts_and_back_in_both_directions() -> None:
    spec, layout = trained(SPARSE), Layout(dp_attention=4, ep=4)
    sent = Counter[str]()
    for row in _rows(train_step.work(System(spec, layout), TrainStep(TOKENS, 4.0))):
        sent[row.op.name] += round(float(row.count)) if isinstance(row.op, Message) else 0
    assert sent["dispatch"] == sent["combine"] == 2 * 48
    assert "dispatch" not in {op.name for op in _ops(train_step.work(System(spec, Layout(dp=4)), TrainStep(TOKENS, 4.0)))}


def test_sharers_are_not_taken_with_experts_over_ranks() -> None:
    (line,) = train_step.refusals(System(trained(SPARSE), Layout(dp_attention=4, ep=4)), TrainStep(TOKENS, 4.0, sharers=2.0))
    assert line.startswith("sharers 2: not modelled with experts over 4 ranks")


def test_traffic_of_states_is_hidden_only_where_it_overlaps() -> None:
    spec, on = trained(LLAMA), machine(gpus=8)
    beside, after = (
        estimate(spec, on, Layout(dp=8), TrainStep(TOKENS, 8.0, overlaps=how), calibration=Calibration.load(on.gpu)) for how in (True, False)
    )
    assert after.wire_bytes == beside.wire_bytes
    sent = sum(float(row.seconds) for row in after.rows if row.op.name == "scatter gradients")
    assert 0.5 * sent < after.seconds.value - beside.seconds.value <= sent * (1 + 1e-9)


def test_a_model_in_fp8_multiplies_all_three_products_in_fp8() -> None:
    work = train_step.work(System(with_formats(model(LLAMA), "fp8", None), Layout()), TrainStep(TOKENS))
    products = {op.name: op.family[2] for op in _ops(work) if op.family[0] == "gemm"}
    assert {products[name] for name in ("gate up", "gate up dX", "gate up dW", "down dW", "qkv dX", "o dW")} == {"fp8"}
    assert {products[name] for name in ("lm head", "lm head dW")} == {"bf16"}


# ---- memory


def test_states_take_sixteen_bytes_a_parameter_and_shards_the_rest() -> None:
    spec = trained(LLAMA)
    alone = train_step.footprint(System(spec, Layout()), TrainStep(TOKENS, zero=0))
    assert alone.weights + alone.gradients + alone.optimizer == pytest.approx(16 * spec.parameters(), rel=1e-6)
    shared = train_step.footprint(System(spec, Layout(dp=8)), TrainStep(TOKENS, 8.0, zero=1))
    assert shared.optimizer == pytest.approx(12 * spec.parameters() / 8, rel=1e-6)
    assert shared.gradients == alone.gradients
    muon = train_step.footprint(System(spec, Layout()), TrainStep(TOKENS, zero=0, optimizer="muon"))
    ends = 2 * 128_256 * 4096
    assert muon.optimizer == pytest.approx(8 * (spec.parameters() - ends) + 12 * ends, rel=1e-3)


def test_what_a_layer_keeps_of_a_token_is_the_handbooks() -> None:
    """FORMULAS 4.2: 139,392 B of Llama-3-8B; recomputing keeps the block's input, 2 D."""
    spec, few, many = trained(LLAMA), 8192.0, 65_536.0
    per_token = []
    for how in ("none", "full"):
        held = [float(train_step.footprint(System(spec, Layout()), TrainStep(s, recompute=how, zero=0)).activations) for s in (few, many)]
        per_token.append((held[1] - held[0]) / (many - few))
    # beside 32 layers: the widest op and the head's logits, or the one block that runs again
    assert 32 * 139_392 <= per_token[0] < 32 * 139_392 + 8 * 128_256 + 8 * 4096
    assert 32 * 8192 <= per_token[1] < 32 * 8192 + 139_392 + 8 * 128_256


@pytest.mark.parametrize("degrees", [{"cp": 4}, {"ulysses": 4}, {"tp": 4, "sp": 4}], ids=str)
def test_ranks_that_share_tokens_share_what_is_kept(degrees: dict[str, int]) -> None:
    spec = trained(LLAMA)
    alone, shared = (train_step.footprint(System(spec, x), TrainStep(131_072.0, recompute="full")).activations for x in (Layout(), Layout(**degrees)))
    assert shared * 4 == pytest.approx(alone, rel=0.05)


@pytest.mark.parametrize(("name", "more"), [("gpipe", 8), ("1f1b", 4)])
def test_the_first_stage_keeps_the_microbatches_in_flight(name: str, more: int) -> None:
    spec, layout = trained(BIG), Layout(pp=4)
    one = train_step.footprint(System(spec, layout), TrainStep(TOKENS, 1.0, schedule=name)).activations
    several = train_step.footprint(System(spec, layout), TrainStep(TOKENS, 8.0, schedule=name)).activations
    assert 0.8 * more < several / one <= more


# ---- rules


@pytest.mark.parametrize(
    ("layout", "asked", "told"),
    [
        (Layout(dp=4), {"batch": 6.0}, "--batch 6"), (Layout(), {"recompute": "half"}, "--recompute half"), (Layout(), {"optimizer": "sgd"}, "--optimizer sgd"),
        (Layout(pp=4), {"schedule": "dualpipe"}, "--schedule dualpipe"), (Layout(pp=4), {"schedule": "interleaved", "batch": 6.0}, "no multiple of 4"),
        (Layout(tp=8, dcp=2), {}, "--dcp 2"), (Layout(), {"chunks": 2}, "--model-chunks 2"), (Layout(), {"zero": 4}, "--zero 4"),
        (Layout(cp=4, passing="q"), {}, "--cp-passing q"), (Layout(cp=4, passing="auto"), {}, "--cp-passing auto"),
        (Layout(dp=4), {"batch": 12.0, "micro": 2.0}, "use a multiple of 8 (replicas x sequences of a microbatch)"),
        (Layout(dp_attention=4), {"batch": 4.0}, "--dp-attention 4: in training it is the replicas that share experts"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_trained_so_is_refused(layout: Layout, asked: dict[str, Any], told: str) -> None:
    lines = list(train_step.refusals(System(trained(BIG), layout), TrainStep(TOKENS, **asked)))
    assert any(told in line and line.startswith("--") for line in lines)


def test_sharers_that_do_not_divide_those_with_the_same_weights_are_refused() -> None:
    (line,) = train_step.refusals(System(trained(LLAMA), Layout(dp=8)), TrainStep(TOKENS, 8.0, sharers=3))
    assert line == "sharers 3: 8 ranks hold the same weights; use a divisor"


def test_the_update_reads_and_writes_every_state_once() -> None:
    ops = [row for row in _ops(tree(LLAMA, Layout(), zero=0)) if row.name == "optimizer"]
    assert len(ops) == 1
    assert float(ops[0].hbm_bytes) == pytest.approx(28 * trained(LLAMA).parameters(), rel=1e-6)


def _ops(work: Any) -> list[Op]:
    return [row.op for row in _rows(work)]  # type: ignore[misc]


def _rows(work: Any) -> list[Row]:
    return rows(fold(work, Passes(lambda _: 0.0)), lambda _: 0.0)
