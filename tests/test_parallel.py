"""Laws of sharding, over every scheme and every kind of layer: what is split adds up, what is not is named."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from simulator.calibration import Calibration
from simulator.dtypes import CACHE_FORMATS
from simulator.estimate import bare
from simulator.kernels.attention import Segment
from simulator.layers import Attention, Direction, Embedding, GatedMLP, Head, LatentAttention, MoE
from simulator.layers.layer import Layer
from simulator.parallel import REGISTRY, Layout
from simulator.parallel.expert import distinct_nodes
from simulator.phases import Decode, Prefill, System
from simulator.work import Message, Overlap, Serial, fold, quantity
from tests.support import EVERY, MAIN, allows, leaves, legal, machine, model

CACHE = CACHE_FORMATS["bf16"]
SEGMENTS = (Segment(1.0, 512.0, 1024.0),)

V3 = "deepseek-ai/DeepSeek-V3"
LLAMA = "meta-llama/Meta-Llama-3.1-70B"


def held(name: str, layer: Layer, **degrees: int) -> Any:
    return Layout(**degrees).place(model(name)).shard(layer, SEGMENTS)


def tensor_degrees(name: str) -> list[int]:
    return [t for t in (1, 2, 4, 8, 16, 32, 64) if allows(model(name), Layout(tp=t))]


every_layer = pytest.mark.parametrize(
    ("name", "layer"), [(n, layer) for n in MAIN for _, layer in model(n).counted], ids=lambda x: x if isinstance(x, str) else type(x).__name__
)


# ---- weights


@every_layer
def test_sharded_parameters_add_up_to_the_whole(name: str, layer: Layer) -> None:
    """But for modules marked replicated, and key-value heads once there are more ranks than heads."""
    whole = {m.name: m for m in layer.modules(layer.whole(SEGMENTS))}
    for t in tensor_degrees(name):
        here = held(name, layer, tp=t)
        copies = max(1.0, t / layer.num_key_value_heads) if isinstance(layer, Attention) else 1.0
        for module in layer.modules(here):
            expected = whole[module.name].parameters
            if module.replicated:
                assert module.parameters == expected, module.name
            elif module.name == "kv_proj":
                assert module.parameters * t == expected * copies
            elif module.name == "qkv_bias" and isinstance(layer, Attention):
                assert module.parameters * t == (layer.num_attention_heads + 2 * layer.num_key_value_heads * copies) * layer.head_dim
            else:
                assert module.parameters * t == pytest.approx(expected, rel=1e-12), (module.name, t)


@pytest.mark.parametrize("name", [n for n in MAIN if any(isinstance(layer, MoE) for layer in model(n).layers)])
def test_experts_over_expert_ranks_add_up_to_the_whole(name: str) -> None:
    experts = next(layer for layer in model(name).layers if isinstance(layer, MoE))
    whole = {m.name: m for m in experts.modules(experts.whole(SEGMENTS))}
    for layout in legal(name):
        if layout.ep == 1:
            continue
        here = layout.place(model(name)).shard(experts, SEGMENTS)
        assert here.experts * layout.ep == experts.num_experts
        assert here.intermediate == experts.moe_intermediate_size
        for module in experts.modules(here):
            if module.name.startswith("experts."):
                assert module.parameters * layout.ep == whole[module.name].parameters
            elif module.name == "shared_experts":
                assert module.parameters * layout.tp == whole[module.name].parameters
            else:
                assert module.replicated
                assert module.parameters == whole[module.name].parameters


@pytest.mark.parametrize("name", EVERY)
def test_the_most_loaded_rank_holds_at_least_its_share_of_the_weights(name: str) -> None:
    spec = model(name)
    for layout in legal(name, 16)[::3]:
        found = System(spec, layout).footprint(sequences=0.0, context=1.0, step_tokens=1.0).weights
        ranks = layout.tp * layout.pp * layout.dp_attention
        assert spec.weight_bytes() / ranks * (1 - 1e-12) <= found <= spec.weight_bytes() * (1 + 1e-12)
        if ranks == 1:
            assert found == pytest.approx(spec.weight_bytes(), rel=1e-12)


# ---- flops


def matrix_flops_of_replicated(layer: Layer, here: Any) -> float:
    """Products that every rank of a tensor group runs whole."""
    if isinstance(layer, LatentAttention):
        latent = layer.kv_lora_rank + layer.qk_rope_head_dim
        return 2.0 * here.tokens * layer.hidden_size * (latent + (layer.q_lora_rank or 0))
    return 2.0 * here.tokens * layer.hidden_size * layer.num_experts if isinstance(layer, MoE) else 0.0


@every_layer
@pytest.mark.parametrize("direction", Direction)
def test_sharded_flops_add_up_to_the_whole(name: str, layer: Layer, direction: Direction) -> None:
    flops = quantity("tensor_flops")
    whole = layer.whole(SEGMENTS)
    once = fold(layer.work(whole, direction, cache=CACHE), flops)
    for t in tensor_degrees(name):
        here = held(name, layer, tp=t)
        repeated = matrix_flops_of_replicated(layer, here) * (1 if direction is Direction.FORWARD else 2)
        if isinstance(layer, Attention) and t > layer.num_key_value_heads:
            keys = 2.0 * here.tokens * layer.hidden_size * 2 * layer.head_dim * (1 if direction is Direction.FORWARD else 2)
            repeated = keys * (t - layer.num_key_value_heads) / (t - 1)
        found = fold(layer.work(here, direction, cache=CACHE), flops)
        assert found * t - repeated * (t - 1) == pytest.approx(once, rel=1e-9), t


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("phase", [Prefill(4096.0, 4.0), Decode(4096.0, 16.0)], ids=["prefill", "decode"])
def test_replicas_share_the_sequences_and_the_flops(name: str, phase: Any) -> None:
    flops = quantity("tensor_flops")
    alone = fold(System(model(name), Layout()).work(phase), flops)
    for dp in (2, 4):
        assert fold(System(model(name), Layout(dp=dp)).work(phase), flops) * dp == pytest.approx(alone, rel=1e-12)
    # requests are dealt out whole: 3 replicas of 4 or 16 sequences wait for the one that has one more
    assert fold(System(model(name), Layout(dp=3)).work(phase), flops) == pytest.approx(alone * -(-phase.batch // 3) / phase.batch, rel=1e-12)


@pytest.mark.parametrize("name", MAIN)
def test_stages_share_the_flops(name: str) -> None:
    """Over a pipeline, flops of the busiest stage are those of its layers: never less than the mean."""
    flops = quantity("tensor_flops")
    alone = fold(System(model(name), Layout()).work(Prefill(4096.0)), flops)
    for pp in (2, 3, 4):
        system = System(model(name), Layout(pp=pp))
        stages = [fold(stage, flops) for stage in system.step((Segment(1.0, 4096.0, 0.0),))]
        assert np.dot(stages, system.times) == pytest.approx(alone, rel=1e-12)
        assert fold(system.work(Prefill(4096.0)), flops) == pytest.approx(max(stages), rel=1e-12)


# ---- caches


def cache_of(name: str, layout: Layout) -> float:
    return bare(model(name), machine("h200", int(layout.gpus)), layout, Decode(100_000.0, 16.0), calibration=Calibration.none()).cache_bytes


@pytest.mark.parametrize("name", MAIN)
def test_a_cache_over_tensor_ranks_adds_up_but_for_heads_beyond_their_number(name: str) -> None:
    spec = model(name)
    heads = {layer.num_key_value_heads if isinstance(layer, Attention) else 1 for _, layer in spec.mixers}
    assert len(heads) == 1
    shared = heads.pop()
    whole = 16 * spec.cache_bytes(100_000.0)
    assert cache_of(name, Layout()) == whole
    for t in tensor_degrees(name):
        assert cache_of(name, Layout(tp=t)) * t == pytest.approx(whole * max(1, t / shared), rel=1e-12)


@pytest.mark.parametrize("name", MAIN)
def test_ranks_that_share_a_cache_hold_a_share_each(name: str) -> None:
    found = [layout for layout in legal(name) if layout.dcp > 1 and layout.pp == 1]
    for layout in found:
        without = Layout(layout.tp, layout.pp, layout.dp, layout.ep, 1, layout.dp_attention)
        assert cache_of(name, layout) * layout.dcp == pytest.approx(cache_of(name, without), rel=1e-12)
    windowed = any(layer.stored_tokens(2.0**40) < 2**40 for _, layer in model(name).mixers)
    copies = any(allows(model(name), Layout(tp=2 * layer.num_key_value_heads)) for _, layer in model(name).mixers if isinstance(layer, Attention))
    latent = any(isinstance(layer, LatentAttention) for _, layer in model(name).mixers)
    assert bool(found) == ((copies or latent) and not windowed)


@pytest.mark.parametrize("name", [V3, "moonshotai/Kimi-K2-Instruct"])
def test_a_latent_row_is_copied_by_tensor_ranks_and_by_nothing_else(name: str) -> None:
    one = cache_of(name, Layout())
    assert cache_of(name, Layout(tp=16)) == one
    assert cache_of(name, Layout(tp=16, dcp=16)) == one / 16
    assert cache_of(name, Layout(dp_attention=16, ep=16)) == one / 16


# ---- messages


@pytest.mark.parametrize("scheme", REGISTRY, ids=lambda s: s.field)
@pytest.mark.parametrize("phase", [Prefill(4096.0, 2.0), Prefill(9000.0, chunk=2048.0), Decode(4096.0, 8.0)], ids=["whole", "chunked", "decode"])
def test_one_rank_sends_nothing(scheme: type, phase: Any) -> None:
    """Neither as a plain degree nor as a cell of an array beside degrees that do send."""
    wire = quantity("wire_bytes")
    together = {"ep": {"tp": 2, "ep": 2}, "dcp": {"tp": 2, "dcp": 2}, "dp_attention": {"dp_attention": 2, "ep": 2}, "helix": {"tp": 2, "helix": 2}, "sp": {"tp": 2, "sp": 2}}.get(scheme.field, {scheme.field: 2})
    degrees = {field: np.array([1.0, float(degree), 1.0]) for field, degree in together.items()}
    assert fold(System(model(V3), Layout()).work(phase), wire) == 0
    found = np.broadcast_to(fold(System(model(V3), Layout(**degrees)).work(phase), wire), 3)  # type: ignore[arg-type]
    assert found[0] == found[2] == 0
    assert (found[1] > 0) == (scheme.field != "dp")


@pytest.mark.parametrize("name", MAIN)
def test_a_tensor_group_reduces_the_output_of_every_layer_and_of_the_embedding(name: str) -> None:
    """FORMULAS 5.2: two all-reduces a block of T D e, and the logits gathered."""
    spec, t, tokens = model(name), tensor_degrees(name)[-1], 4096.0
    (work,) = System(spec, Layout(tp=t)).step((Segment(1.0, tokens, 0.0),))
    messages = [(n, op) for n, op in leaves(work) if isinstance(op, Message)]
    reduced = sum(n for n, op in messages if op.pattern == "all_reduce")
    assert reduced == 2 * spec.num_layers + 1
    assert {op.payload_bytes for _, op in messages if op.pattern == "all_reduce"} == {tokens * spec.hidden_size * 2}
    gathered = [(n, op.payload_bytes) for n, op in messages if op.pattern == "all_gather"]
    assert gathered == [(1.0, spec.vocab_size * 2)]


def test_experts_are_reached_by_two_all_to_alls_of_the_busiest_ranks_rows() -> None:
    """FORMULAS 5.4: T k D e each way, dispatch in fp8 (V3's activations), combine in bf16."""
    (work,) = System(model(V3), Layout(dp_attention=16, ep=16)).step((Segment(16 * 64.0, 1.0, 4095.0, split_kv=True),))
    sent = {op.name: (n, op) for n, op in leaves(work) if isinstance(op, Message)}
    assert {name: (n, op.pattern) for name, (n, op) in sent.items()} == {"dispatch": (58.0, "all_to_all"), "combine": (58.0, "all_to_all")}
    mean = 64 * 8 * 7168
    assert 1.0 < sent["dispatch"][1].payload_bytes / mean < 1.3
    assert sent["combine"][1].payload_bytes == 2 * sent["dispatch"][1].payload_bytes


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_a_stage_sends_its_tokens_once_and_the_last_sends_nothing(pp: int) -> None:
    wire = quantity("wire_bytes")
    alone, shared = System(model(LLAMA), Layout(pp=pp)), System(model(LLAMA), Layout(tp=2, pp=pp))
    segments = (Segment(1.0, 1000.0, 0.0),)
    stages = [fold(stage, wire) for stage, equal in zip(alone.step(segments), alone.times, strict=True) for _ in range(int(equal))]
    assert stages == [1000 * 2 * 8192 * 2] * (pp - 1) + [0]
    sends = [
        op.payload_bytes
        for stage, equal in zip(shared.step(segments), shared.times, strict=True)
        for times, op in leaves(stage) * int(equal)
        if isinstance(op, Message) and op.pattern == "send" and times
    ]
    assert sends == [1000 * 8192 * 2] * (pp - 1)


# ---- stages


def vllm_stages(layers: int, stages: int) -> list[int]:
    """vLLM's get_pp_indices (vllm/distributed/utils.py): the remainder goes to the stages before the last."""
    parts = [layers // stages] * stages
    for i in range(2, layers % stages + 2):
        parts[-i] += 1
    return parts


def stage_sizes(name: str, pp: Any) -> list[Any]:
    return [sum(np.asarray(c, dtype=float) for c in stage.counts) for stage in Layout(pp=pp).pipeline.stages(model(name))]


@pytest.mark.parametrize(("pp", "sizes"), [(1, [61]), (2, [31, 30]), (3, [20, 21, 20]), (4, [15, 15, 16, 15]), (8, [7, 7, 8, 8, 8, 8, 8, 7])])
def test_61_layers_are_split_as_vllm_splits_them(pp: int, sizes: list[int]) -> None:
    assert vllm_stages(61, pp) == sizes
    assert stage_sizes(V3, pp) == sizes


@pytest.mark.parametrize("name", EVERY)
def test_stages_add_up_to_all_layers_and_follow_vllms_rule(name: str) -> None:
    layers = model(name).num_layers
    for pp in range(1, min(layers, 20) + 1):
        stages = Layout(pp=pp).pipeline.stages(model(name))
        assert stage_sizes(name, pp) == vllm_stages(layers, pp)
        for kind, (total, _) in enumerate(itertools.groupby(model(name).kinds)):
            assert sum(stage.counts[kind] for stage in stages) == model(name).order.count(kind), total
        assert [s.first for s in stages] == [1.0] + [0.0] * (pp - 1)
        assert [s.last for s in stages] == [0.0] * (pp - 1) + [1.0]


@pytest.mark.parametrize("name", MAIN)
def test_an_array_of_pipelines_is_each_pipeline(name: str) -> None:
    degrees = np.array([4, 1, 3, 2, 4], dtype=float)
    together = Layout(pp=degrees).pipeline.stages(model(name))
    for cell, pp in enumerate(degrees):
        for s, stage in enumerate(together):
            alone = Layout(pp=int(pp)).pipeline.stages(model(name))
            expected = alone[s] if s < pp else None
            counts = [float(np.broadcast_to(c, 5)[cell]) for c in stage.counts]
            ends = [float(np.broadcast_to(getattr(stage, end), 5)[cell]) for end in ("first", "last", "present")]
            assert counts == ([0.0] * len(counts) if expected is None else list(expected.counts))
            assert ends == ([0.0] * 3 if expected is None else [expected.first, expected.last, expected.present])


@pytest.mark.parametrize("name", MAIN)
def test_rank_classes_are_the_distinct_stages(name: str) -> None:
    assert [r.name for r in Layout(tp=2).ranks(model(name))] == ["only"]
    for pp in (2, 4):
        classes = Layout(pp=pp).ranks(model(name))
        assert 2 <= len(classes) <= pp
        assert classes[0].stage.first == 1


# ---- extents


@pytest.mark.parametrize("name", MAIN)
def test_heads_and_widths_are_divided_by_the_tensor_degree(name: str) -> None:
    for t, layer in itertools.product(tensor_degrees(name), model(name).layers):
        here = held(name, layer, tp=t)
        if isinstance(layer, Attention):
            assert here.heads * t == layer.num_attention_heads
            assert here.kv_heads == max(1.0, layer.num_key_value_heads / t)
        elif isinstance(layer, LatentAttention):
            assert here.heads * t == layer.num_attention_heads
            assert here.kv_heads == 1
        elif isinstance(layer, GatedMLP):
            assert here.intermediate * t == layer.intermediate_size
        elif isinstance(layer, MoE):
            assert (here.experts, here.intermediate * t) == (layer.num_experts, layer.moe_intermediate_size)
        assert here.tokens == layer.whole(SEGMENTS).tokens
    for end in (model(name).embedding, model(name).head):
        assert isinstance(end, (Embedding, Head))
        assert held(name, end, tp=4).vocabulary * 4 == model(name).vocab_size


@pytest.mark.parametrize("degree", [0, -1, 1.5, True, float("nan"), float("inf")])
def test_a_degree_is_a_positive_integer(degree: Any) -> None:
    for scheme in REGISTRY:
        with pytest.raises(ValueError, match=r"--[a-z-]+ .*a degree is a positive integer"):
            Layout(**{scheme.field: degree})


def test_gpus_are_the_product_of_degrees_that_need_their_own() -> None:
    assert Layout(tp=8, pp=2, dp=3).gpus == 48
    assert Layout(tp=16, dcp=16).gpus == 16
    assert Layout(tp=4, dp_attention=4, ep=16).gpus == 16
    assert str(Layout()) == "one GPU"
    assert str(Layout(tp=8, pp=2, dcp=2)) == "TP8 x PP2 + DCP2"
    assert str(Layout(dp_attention=16, ep=16)) == "DP-attention16 + EP16"


# ---- refusals


def refusals(name: str, **degrees: int) -> list[str]:
    return list(Layout(**degrees).refusals(model(name)))


@pytest.mark.parametrize(
    ("name", "degrees", "words"),
    [
        (LLAMA, {"tp": 6}, ["--tp 6", "64 attention heads", "use a divisor: 1, 2, 4, 8, 16, 32, 64"]),
        (V3, {"tp": 6}, ["--tp 6", "128 attention heads", "1, 2, 4, 8, 16, 32, 64, 128"]),
        (LLAMA, {"ep": 8}, ["--ep 8", "no experts", "leave --ep out"]),
        (V3, {"tp": 8, "ep": 3}, ["--ep 3", "256 experts", "use a divisor"]),
        (V3, {"tp": 8, "ep": 4}, ["--ep 4", "tp x dp-attention = 8", "use --ep 8"]),
        (LLAMA, {"tp": 8, "dcp": 3}, ["--dcp 3", "tensor group of 8", "use a divisor: 1, 2, 4, 8"]),
        (LLAMA, {"tp": 8, "dcp": 2}, ["--dcp 2", "8 key-value heads", "at most 1"]),
        (LLAMA, {"tp": 16, "dcp": 4}, ["--dcp 4", "8 key-value heads", "at most 2"]),
        ("mistralai/Mistral-7B-v0.1", {"tp": 16, "dcp": 2}, ["--dcp 2", "windowed or chunked", "use --dcp 1"]),
        (LLAMA, {"dp_attention": 4}, ["--dp-attention 4", "no experts to share", "use --dp 4"]),
        (V3, {"tp": 2, "dp_attention": 8}, ["--dp-attention 8", "add --ep 16"]),
        (LLAMA, {"pp": 81}, ["--pp 81", "80 layers", "at most 80"]),
        ("Qwen/Qwen3-235B-A22B-FP8", {"tp": 8}, ["--tp 8", "scale blocks", "smaller degree, or --ep"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_refusal_names_the_value_the_rule_and_the_remedy(name: str, degrees: dict[str, int], words: list[str]) -> None:
    found = refusals(name, **degrees)
    assert found
    assert all("\n" not in line for line in found)
    assert any(all(word in line for word in words) for line in found), found


@pytest.mark.parametrize("name", EVERY)
def test_every_remedy_of_a_tensor_degree_is_accepted(name: str) -> None:
    units = model(name).mixers[0][1].splits[0]
    (told,) = [line for line in refusals(name, tp=7 if units.units % 7 else 11) if units.name in line]
    for degree in told.rsplit(": ", 1)[1].split(", "):
        assert not any(units.name in line for line in refusals(name, tp=int(degree)))


@pytest.mark.parametrize("name", EVERY)
def test_one_gpu_is_never_refused(name: str) -> None:
    assert refusals(name) == []


@pytest.mark.parametrize("scheme", REGISTRY, ids=lambda s: s.field)
def test_every_scheme_is_a_degree_of_a_layout(scheme: type) -> None:
    layout = Layout(**{scheme.field: 2})
    assert getattr(layout, scheme.field) == 2
    assert next(s for s in layout.schemes if isinstance(s, scheme)).degree == 2


def test_what_tp_splits_beyond_scale_blocks_ep_does_not() -> None:
    assert refusals("Qwen/Qwen3-235B-A22B-FP8", tp=4) == []
    assert refusals("Qwen/Qwen3-235B-A22B-FP8", tp=8, ep=8) == []


# ---- experts over nodes


def test_a_row_crosses_once_for_each_distinct_node() -> None:
    """FORMULAS 5.4: 8 nodes, top 8 of 256: 5.295; DeepSeek-V3 caps them at 4: 28.7 kB a token in fp8 at most."""
    random = np.random.default_rng(3)
    drawn = [len({int(e) // 32 for e in random.choice(256, 8, replace=False)}) for _ in range(4000)]
    assert distinct_nodes(nodes=8, experts=256, top_k=8) == pytest.approx(np.mean(drawn), rel=0.01)
    assert distinct_nodes(nodes=8, experts=256, top_k=8) == pytest.approx(5.29465, rel=1e-5)
    assert distinct_nodes(nodes=1, experts=256, top_k=8) == 1
    capped = distinct_nodes(nodes=8, experts=256, top_k=8, limit=4)
    assert capped * 7168 < 4 * 7168 == pytest.approx(28.672e3)
    assert capped == pytest.approx(distinct_nodes(nodes=4, experts=128, top_k=8), rel=1e-12)


def test_experts_over_nodes_send_less_between_them_and_the_same_inside() -> None:
    segment = (Segment(64 * 128.0, 1.0, 4095.0, split_kv=True),)
    flat, nodes = (
        {op.name: op for (work,) in [System(model(V3), Layout(dp_attention=64, ep=64, ep_nodes=n)).step(segment)] for _, op in leaves(work) if isinstance(op, Message)}
        for n in (1, 8)
    )
    assert set(nodes) == {"dispatch between nodes", "dispatch inside", "combine inside", "combine between nodes"}
    assert nodes["dispatch inside"].payload_bytes == flat["dispatch"].payload_bytes
    share = nodes["dispatch between nodes"].payload_bytes / flat["dispatch"].payload_bytes
    assert share == pytest.approx(distinct_nodes(nodes=8, experts=256, top_k=8) / 8, rel=1e-9)
    assert (nodes["dispatch between nodes"].group.ranks, nodes["dispatch between nodes"].group.stride) == (8, 8)
    assert nodes["combine between nodes"].payload_bytes == 2 * nodes["dispatch between nodes"].payload_bytes


def test_nodes_that_do_not_share_expert_ranks_equally_are_refused() -> None:
    assert any(line.startswith("--ep-nodes 3: ") for line in Layout(dp_attention=16, ep=16, ep_nodes=3).refusals(model(V3)))


def test_sequence_parallelism_sends_the_bytes_of_tensor_parallelism() -> None:
    """FORMULAS 5.2: an all-reduce is a reduce-scatter and an all-gather; TP8, 8,192 tokens, D 8,192: 448 MiB a layer."""
    wire = quantity("wire_bytes")
    spec = model(LLAMA)
    layers = [layer for _, layer in spec.counted if isinstance(layer, (Attention, GatedMLP))]
    for sp in (1, 8):
        placed = Layout(tp=8, sp=sp).place(spec)
        found = sum(fold(placed.work(layer, placed.shard(layer, (Segment(1.0, 8192.0, 0.0),)), CACHE), wire) for layer in layers)
        assert found == 448 * 2**20
    assert System(spec, Layout(tp=8, sp=8)).residual_bytes(8192.0) * 8 == System(spec, Layout(tp=8)).residual_bytes(8192.0)
    assert list(Layout(tp=8, sp=4).refusals(spec))


@pytest.mark.parametrize("sp", [1, 8])
def test_backward_sums_run_beside_the_weight_gradient_of_the_product_that_read_the_input(sp: int) -> None:
    """Megatron-LM: with sequence parallelism the input is gathered again beside the other gradient, half the bytes more."""
    spec, segment = model(LLAMA), (Segment(1.0, 8192.0, 0.0),)
    placed = Layout(tp=8, sp=sp).place(spec)
    for layer in (layer for _, layer in spec.counted if isinstance(layer, (Attention, GatedMLP))):
        held = placed.shard(layer, segment)
        there, back = (placed.work(layer, held, CACHE, direction) for direction in Direction)
        assert fold(back, quantity("wire_bytes")) == fold(there, quantity("wire_bytes")) * (1.0 if sp == 1 else 1.5)
        assert fold(back, quantity("tensor_flops")) == fold(layer.work(held, Direction.BACKWARD, cache=CACHE), quantity("tensor_flops"))
        beside = {}
        for part in (part for product in back.parts if isinstance(product, Serial) for part in product.parts if isinstance(part, Overlap)):
            sent, computed = part.parts
            beside[computed.name.split()[-1]] = [op.pattern for _, op in leaves(sent) if op.payload_bytes]
        assert beside == ({"dW": ["all_reduce"]} if sp == 1 else {"dX": ["all_gather"], "dW": ["reduce_scatter"]})
