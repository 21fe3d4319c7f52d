"""vLLM: what it allocates, what it prints, how it is started."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import Decode, Layout, Prefill
from simulator.dtypes import CACHE_FORMATS
from simulator.engines import REGISTRY, Vllm
from simulator.hf import with_formats
from simulator.kernels.attention import Window
from simulator.layers import LatentAttention
from simulator.planner import refusals, stack
from tests.support import MAIN, eight, legal, machine, model

M1, K128 = 1_048_576, 131_072
V3 = "deepseek-ai/DeepSeek-V3"
SCOUT = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
#: vllm/config/cache.py, CacheDType, as far as this version models formats.
CACHE_DTYPES = {"auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4", "int8_per_token_head", "fp8_per_token_head"}
#: Flags of `vllm serve` (https://docs.vllm.ai/en/latest/cli/serve) that the command may use, and whether they take a value.
FLAGS = {
    "tensor-parallel-size": True, "pipeline-parallel-size": True, "data-parallel-size": True, "enable-expert-parallel": False,
    "decode-context-parallel-size": True, "max-model-len": True, "hf-overrides": True, "kv-cache-dtype": True, "block-size": True,
    "gpu-memory-utilization": True, "max-num-batched-tokens": True, "max-num-seqs": True, "data-parallel-size-local": True,
    "data-parallel-address": True, "data-parallel-rpc-port": True, "nnodes": True, "node-rank": True, "master-addr": True,
}  # fmt: skip


# ---- blocks


@pytest.mark.parametrize(
    ("name", "tokens", "blocks"),
    [
        ("openai/gpt-oss-20b", K128, 8192 + 1033), ("openai/gpt-oss-120b", K128, 8192 + 1033), (SCOUT, M1, 65_536 + 3 * 1536), ("mistralai/Mistral-7B-v0.1", 32_768, 1281),
        ("mistralai/Mistral-7B-v0.1", M1, 1281), ("meta-llama/Meta-Llama-3.1-70B", K128, 8192), ("meta-llama/Meta-Llama-3.1-70B", K128 + 1, 8193),
        (V3, M1, 65_536), (SCOUT, 8192, 4 * 512), ("openai/gpt-oss-20b", 128, 8 + 9),
    ],
)  # fmt: skip
def test_a_request_takes_the_blocks_vllm_gives_it(name: str, tokens: int, blocks: int) -> None:
    """Windows and chunks hold what is live plus two batches of 8,192 tokens in flight."""
    engine = Vllm(chunk=8192)
    assert engine.blocks_per_sequence(model(name), Layout(), machine("h100").gpu, float(tokens)) == blocks


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("openai/gpt-oss-20b", [12, 12]), ("openai/gpt-oss-120b", [18, 18]), (SCOUT, [12, 12, 12, 12]), ("mistralai/Mistral-7B-v0.1", [32]),
        ("meta-llama/Meta-Llama-3.1-70B", [80]), (V3, [61]),
    ],
)  # fmt: skip
def test_layers_are_grouped_by_what_they_keep_in_groups_of_equal_size(name: str, groups: list[int]) -> None:
    assert [len(group.layers) for group in Vllm().groups(model(name))] == groups


@pytest.mark.parametrize("name", MAIN)
def test_every_layer_is_in_one_group_with_its_like(name: str) -> None:
    spec, groups = model(name), Vllm().groups(model(name))
    assert sorted(index for group in groups for index in group.layers) == list(range(spec.num_layers))
    for group in groups:
        masks = {type(spec.kinds[spec.order[i]][0].mask) for i in group.layers}  # type: ignore[attr-defined]
        assert len(masks) == 1
        assert (group.window is None) == (masks.pop().__name__ in ("Causal", "DualChunk"))


@pytest.mark.parametrize("name", MAIN)
@given(tokens=st.integers(1, 2**21))
def test_a_longer_request_takes_no_fewer_blocks_and_enough_for_what_it_keeps(name: str, tokens: int) -> None:
    engine, spec, gpu = Vllm(), model(name), machine("h200").gpu
    here, more = (engine.blocks_per_sequence(spec, Layout(), gpu, float(t)) for t in (tokens, tokens + 1))
    assert here <= more <= here + len(engine.groups(spec))
    capacity = engine.capacity(spec, Layout(tp=1), machine("h200", 1), tokens)
    assert capacity.per_sequence_bytes >= spec.cache_bytes(float(tokens)) * (1 - 1e-12)


@pytest.mark.parametrize(("dcp", "blocks"), [(1, 65_536), (2, 32_768), (16, 4096)])
def test_ranks_that_share_a_cache_share_its_blocks(dcp: int, blocks: int) -> None:
    assert Vllm().blocks_per_sequence(model(V3), Layout(tp=16, dcp=dcp), machine("h200").gpu, float(M1)) == blocks


# ---- capacity


@pytest.mark.parametrize(
    ("layout", "least", "most"),
    [(Layout(tp=16), 0.9, 1.5), (Layout(tp=8, pp=2), 2.0, 2.9), (Layout(dp_attention=16, ep=16), 15.0, 16.5), (Layout(tp=16, dcp=16), 18.0, 21.5)],
    ids=str,
)
def test_deepseek_v3_at_a_million_tokens_on_16_h200(layout: Layout, least: float, most: float) -> None:
    """FORMULAS 7.3: 1 on TP16 (the latent is copied), 2 on TP8 x PP2, about 16 and 20 where it is not."""
    capacity = Vllm().capacity(model(V3), layout, machine("h200", 16), M1)
    assert least < capacity.concurrency * capacity.replicas < most


@pytest.mark.parametrize("name", MAIN)
def test_what_is_resident_and_what_is_left_is_what_the_engine_may_use(name: str) -> None:
    for layout in legal(name)[::9]:
        part = machine("h200", int(layout.gpus))
        capacity = Vllm().capacity(model(name), layout, part, K128)
        held = capacity.footprint
        assert capacity.available_bytes + held.weights + held.activations + held.workspace + held.engine == pytest.approx(0.92 * part.gpu.usable_bytes)
        assert 0 <= capacity.blocks * capacity.block_bytes <= max(capacity.available_bytes, 0)
        assert capacity.blocks == 0 or (capacity.blocks + 1) * capacity.block_bytes > capacity.available_bytes
        assert capacity.whole_sequences <= capacity.concurrency * capacity.replicas
        assert capacity.replicas == layout.dp * layout.dp_attention
        assert held.cache == 0
        assert (held.workspace > 0) <= any(isinstance(layer, LatentAttention) for _, layer in model(name).mixers)


@pytest.mark.parametrize("name", MAIN)
def test_a_pool_block_of_all_ranks_is_a_block_of_every_layers_rows(name: str) -> None:
    """On tensor ranks that copy nothing, per group: 16 tokens of the rows of its layers."""
    spec, engine = model(name), Vllm(block_size=16)
    layers = len(engine.groups(spec)[0].layers)
    row = max(spec.cache.row_bytes(item.row) for *_, item in spec.rows())
    assert engine.capacity(spec, Layout(), machine("h200"), 1000).block_bytes == 16 * layers * row


@pytest.mark.parametrize("name", MAIN)
def test_more_memory_shorter_requests_and_smaller_formats_hold_more(name: str) -> None:
    layout = eight(name)

    def concurrency(tokens: int = K128, fraction: float = 0.9, gpu: str = "h200", cache: str | None = None) -> float:
        return float(Vllm(fraction, chunk=8192).capacity(with_formats(model(name), None, cache), layout, machine(gpu, 8), tokens).concurrency)

    base = concurrency()
    assert concurrency(fraction=0.95) >= base
    assert concurrency(gpu="h100") <= base
    assert concurrency(K128 // 4) >= base
    assert concurrency(cache="fp8") >= 1.7 * base


@pytest.mark.parametrize("name", MAIN)
def test_an_array_of_layouts_holds_what_each_holds(name: str) -> None:
    chosen = [layout for layout in legal(name, 16) if layout.gpus == 16][:24]
    engine, part = Vllm(), machine("h200", 16)
    together = engine.capacity(model(name), stack(chosen), part, K128)
    longest = engine.longest(model(name), stack(chosen), part, together, 4)
    for i, layout in enumerate(chosen):
        alone = engine.capacity(model(name), layout, part, K128)
        here = together.at(i)
        for what in ("blocks", "block_bytes", "blocks_per_sequence", "available_bytes", "concurrency", "whole_sequences", "replicas"):
            assert float(getattr(here, what)) == pytest.approx(float(getattr(alone, what)), rel=1e-12), what
        assert float(np.broadcast_to(longest, len(chosen))[i]) == float(engine.longest(model(name), layout, part, alone, 4))


# ---- what it prints


@pytest.mark.parametrize("name", MAIN)
def test_log_lines_are_those_vllm_prints(name: str) -> None:
    capacity = Vllm().capacity(model(name), eight(name), machine("h200", 8), K128)
    size, most = capacity.log_lines
    tokens = re.fullmatch(r"GPU KV cache size: ([\d,]+) tokens", size)
    times = re.fullmatch(r"Maximum concurrency for 131,072 tokens per request: (\d+\.\d\d)x", most)
    assert tokens
    assert times
    assert int(tokens[1].replace(",", "")) == int(capacity.concurrency * K128)
    assert float(times[1]) == pytest.approx(float(capacity.concurrency), abs=0.00501)


# ---- the longest context


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("sequences", [1, 3, 17])
def test_the_longest_context_is_the_largest_that_fits(name: str, sequences: int) -> None:
    engine, part = Vllm(), machine("h200", 8)
    for layout in [x for x in legal(name, 8) if x.gpus == 8][::3]:
        spec = model(name)
        capacity = engine.capacity(spec, layout, part, M1)
        longest = float(engine.longest(spec, layout, part, capacity, sequences))

        def fits(tokens: float, layout: Layout = layout) -> bool:
            return float(engine.capacity(model(name), layout, part, int(tokens)).whole_sequences) >= sequences

        if longest == 0:
            assert not fits(1)
            continue
        assert fits(longest)
        if longest >= 2**34:
            assert all(isinstance(layer.mask, Window) for _, layer in spec.mixers)  # type: ignore[attr-defined]
            continue
        assert not any(fits(longest + more) for more in (1, 2, 15, 16, 17, 1000, 10**6))


# ---- starting it


def parsed(command: str) -> tuple[str, dict[str, str | None]]:
    words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    served, rest, found = words[2], words[3:], {}
    while rest:
        name = rest.pop(0)
        assert name.startswith("--"), name
        name = name.removeprefix("--")
        assert name in FLAGS, name
        assert name not in found, f"{name} twice"
        found[name] = rest.pop(0) if FLAGS[name] else None
    return served, found


def allowed(name: str, most: int = 64) -> list[Layout]:
    return [layout for layout in legal(name, most) if not refusals(model(name), layout, Vllm())]


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("context", [8192, K128, M1, 1_000_000])
def test_a_command_says_what_the_layout_is(name: str, context: int) -> None:
    engine = Vllm()
    for layout in allowed(name)[::3]:
        part = machine("h200", int(layout.gpus))
        command, notes = engine.command(model(name), layout, part, context=context, concurrency=4)
        assert "\n" not in command
        assert all("\n" not in note for note in notes)
        served, flags = parsed(command)
        assert served in (name, f"./{name.split('/')[1]}")
        degrees = {"tensor-parallel-size": layout.tp, "pipeline-parallel-size": layout.pp, "data-parallel-size": layout.dp_attention, "decode-context-parallel-size": layout.dcp}
        for flag, degree in degrees.items():
            assert int(flags.get(flag) or 1) == degree, flag
        assert ("enable-expert-parallel" in flags) == (layout.ep > 1)
        assert int(flags["max-model-len"] or 0) == context
        assert float(flags["gpu-memory-utilization"] or 0) == engine.fraction
        assert int(flags["max-num-batched-tokens"] or 0) == engine.step_tokens(part.gpu)
        assert 1 <= int(flags["max-num-seqs"] or 0) <= int(flags["max-num-batched-tokens"] or 0)
        assert any("load balancer" in note for note in notes) == (layout.dp > 1)


@pytest.mark.parametrize("gpu", ["h200", "mi300x", "tpu7x", "gaudi3"])
def test_a_command_for_a_plugin_says_that_it_was_not_read(gpu: str) -> None:
    command, notes = Vllm().command(model(V3), Layout(tp=8), machine(gpu, 8), context=8192, concurrency=1)
    assert command
    assert any("plugin" in note for note in notes) == (gpu in ("tpu7x", "gaudi3"))


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("context", [8192, K128, 200_000, M1, 4 * M1, 20 * M1])
def test_a_context_beyond_the_models_reach_comes_with_an_override_that_reaches_it(name: str, context: int) -> None:
    declared = model(name).reach.declared_tokens
    assert declared is not None
    _, flags = parsed(Vllm().command(model(name), eight(name), machine("h200", 8), context=context, concurrency=1)[0])
    assert ("hf-overrides" in flags) == (context > declared)
    if context > declared:
        override = json.loads(flags["hf-overrides"] or "")
        rope = override.get("rope_parameters")
        if rope is None:
            assert override["max_position_embeddings"] >= context
        else:
            assert rope["rope_type"] == "yarn"
            assert rope["factor"] * rope["original_max_position_embeddings"] >= context
            assert "rope_theta" in rope


@pytest.mark.parametrize("name", [V3, "meta-llama/Meta-Llama-3.1-405B", "moonshotai/Kimi-K2-Instruct"])
def test_servers_over_several_nodes_share_their_ranks_out(name: str) -> None:
    for layout in allowed(name, 128):
        nodes = -(-int(layout.tp * layout.pp * layout.dp_attention) // 8)
        if nodes == 1:
            continue
        command, notes = Vllm().command(model(name), layout, machine("h200", int(layout.gpus)), context=K128, concurrency=1)
        _, flags = parsed(command)
        assert any("node" in note for note in notes)
        if layout.dp_attention > 1:
            local = int(flags["data-parallel-size-local"] or 0)
            assert local >= 1, f"{layout}: {local} of {flags['data-parallel-size']} data-parallel ranks on a node"
            assert local * nodes == layout.dp_attention, layout
            assert "data-parallel-address" in flags
        else:
            assert int(flags["nnodes"] or 0) == nodes
            assert {"node-rank", "master-addr"} <= set(flags)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("cache", CACHE_FORMATS)
def test_a_cache_format_is_one_that_vllm_takes(name: str, cache: str) -> None:
    if CACHE_FORMATS[cache].refusal(model(name).cache_rows()):
        return
    spec = with_formats(model(name), None, cache)
    told, notes = Vllm().command(spec, eight(name), machine("h200", 8), context=8192, concurrency=1)
    if told is None:
        assert any(f"has no {cache} cache" in note for note in notes)
        return
    _, flags = parsed(told)
    written = flags.get("kv-cache-dtype", "auto")
    assert written in CACHE_DTYPES, f"--kv-cache-dtype {written}: vLLM knows {sorted(CACHE_DTYPES)}"
    if cache != model(name).cache.name:
        assert written != "auto"


def test_a_checkpoint_with_an_fp8_cache_asked_for_bf16_says_so() -> None:
    name = next(n for n in ("nvidia/Llama-3.1-70B-Instruct-FP8", "nvidia/DeepSeek-V3-0324-NVFP4", "nvidia/Kimi-K2.5-NVFP4", "nvidia/Qwen3-32B-NVFP4") if model(n).cache.name == "fp8")
    _, flags = parsed(Vllm().command(with_formats(model(name), None, "bf16"), Layout(tp=8), machine("h200", 8), context=8192, concurrency=1)[0])
    assert flags.get("kv-cache-dtype") in ("bfloat16", "bf16")


@pytest.mark.parametrize("name", ["openai/gpt-oss-120b", "openai/gpt-oss-20b"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_gpt_oss_is_split_up_to_8_ways(name: str, tp: int) -> None:
    """vLLM shares the 90 scale blocks of 32 out unevenly (gpt_oss.py load_weights: ceil(90 / tp) a rank) and runs TP4 and TP8."""
    assert refusals(model(name), Layout(tp=tp), Vllm()) == []


def test_more_requests_than_the_engine_takes_at_once_come_with_a_note() -> None:
    _, notes = Vllm(max_num_seqs=16).command(model(V3), eight(V3), machine("h200", 8), context=8192, concurrency=17)
    assert any("--max-num-seqs" in note for note in notes)


# ---- engines


@pytest.mark.parametrize("name", REGISTRY)
def test_an_engine_says_which_version_it_speaks_of(name: str) -> None:
    engine = REGISTRY[name]()
    assert engine.name == name
    assert re.fullmatch(r"\d+(\.\d+)+", engine.version)


@pytest.mark.parametrize(("gpu", "tokens", "sequences"), [("h200", 8192, 1024), ("h100", 8192, 1024), ("a100", 2048, 256), ("b200", 16_384, 1024), ("mi300x", 16_384, 1024)])
def test_defaults_follow_the_memory_of_the_gpu(gpu: str, tokens: int, sequences: int) -> None:
    assert Vllm().step_tokens(machine(gpu).gpu) == tokens
    assert Vllm().sequences(machine(gpu).gpu) == sequences
    assert Vllm(chunk=100).sequences(machine(gpu).gpu) == 100


@pytest.mark.parametrize(("gpu", "cache", "tokens"), [("h200", "bf16", 16), ("h200", "fp8", 64), ("h200", "fp8_ds_mla", 64), ("b200", "bf16", 32), ("a100", "bf16", 16)])
def test_blocks_of_latent_caches_are_what_their_kernels_take(gpu: str, cache: str, tokens: int) -> None:
    assert Vllm().block_tokens(with_formats(model(V3), None, cache), machine(gpu).gpu) == tokens
    assert Vllm(block_size=128).block_tokens(with_formats(model(V3), None, cache), machine(gpu).gpu) == 128
    assert Vllm().block_tokens(model("meta-llama/Meta-Llama-3.1-8B"), machine(gpu).gpu) == 16


def test_a_replayed_graph_launches_once_and_an_eager_step_launches_every_kernel() -> None:
    graph, eager = Vllm().host(Decode(1000.0)), Vllm().host(Prefill(1000.0))
    assert graph(1000.0, 64.0).shape["seconds"] == graph(10.0, 64.0).shape["seconds"]
    assert graph(1000.0, 5000.0).shape["seconds"] == eager(1000.0, 5000.0).shape["seconds"]
    assert eager(1000.0, 64.0).shape["seconds"] > eager(10.0, 64.0).shape["seconds"]


def test_counts_of_groups_are_whole() -> None:
    assert Counter(len(g.layers) for g in Vllm().groups(model("meta-llama/Llama-4-Maverick-17B-128E-Instruct"))) == Counter({12: 4})
