"""What every architecture keeps and is made of: layer plans, slopes, constants, caches of transformers."""

from __future__ import annotations

import csv
import functools
import json
import math
import re
from typing import Any

import numpy as np
import pytest

from simulator import load_model
from simulator.data import data_path
from simulator.dtypes import CACHE_FORMATS, FP32, CacheFormat, CacheRow, DType
from simulator.hf import read_config
from simulator.kernels.attention import Bidirectional, Causal, Chunked, DualChunk, Segment, Sinks, Window
from simulator.kernels.sparse_attention import Banded, BigBird
from simulator.layers import (
    MLP,
    Attention,
    CompressedAttention,
    GatedDeltaNet,
    GatedMLP,
    IndexedLatentAttention,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    LightningAttention,
    Mamba,
    Mamba2,
    MoE,
    NativeSparseAttention,
    ShortConv,
)  # fmt: skip
from simulator.layers.layer import ARCHITECTURE, TRANSFORMERS, Keep, is_mixer
from simulator.model import ModelSpec
from tests.support import EVERY, model

M1 = 1_048_576
BF16_CACHE = CACHE_FORMATS["bf16"]
NOTHING = (Segment(0.0, 0.0, 0.0),)


def table(name: str) -> list[dict[str, str]]:
    with data_path("published", name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


PLANS = table("layer_plans.csv")
CACHES = table("transformers_caches.csv")


def id_of(file: str) -> str:
    return file.removesuffix(".json").replace("--", "/", 1)


def product(text: str) -> int:
    """A sum of products as MODELS writes its constants: "36*(2*3+1)*2"."""
    assert re.fullmatch(r"[0-9+*() ]+", text)
    return int(eval(text, {"__builtins__": {}}))


# ---- layer plans


def kind_of(layer: Layer) -> str:
    if isinstance(layer, Attention):
        mask = layer.mask
        named = {Causal: "full", DualChunk: "dual-chunk", Banded: "encoder", BigBird: "encoder", Bidirectional: "encoder"}
        return f"window-{mask.width}" if isinstance(mask, Window) else f"chunk-{mask.width}" if isinstance(mask, Chunked) else named[type(mask)]
    if isinstance(layer, IndexedLatentAttention):
        return "dsa"
    if isinstance(layer, CompressedAttention):
        return {0: "swa", 4: "csa", 128: "hca"}[layer.compress_ratio]
    names = {LatentAttention: "mla", GatedDeltaNet: "gdn", KimiDeltaAttention: "kda", LightningAttention: "lightning", Mamba: "mamba", Mamba2: "mamba2", MLP: "mlp", GatedMLP: "mlp", MoE: "moe"}
    return names[type(layer)]


def plan_of(spec: ModelSpec) -> list[str]:
    """The mixer of every layer, or its channel mixer where it has no mixer."""
    found = []
    for kind in spec.order:
        block = spec.kinds[kind]
        found.append(kind_of(next((layer for layer in block if is_mixer(layer)), block[-1])))
    return found


def expanded(text: str) -> list[str]:
    """ "12*(3 gdn,1 full)" -> the kind of every layer."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text + ","):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    found: list[str] = []
    for part in parts:
        group = re.fullmatch(r"(\d+)\*\((.*)\)", part)
        if group:
            found += expanded(group[2]) * int(group[1])
        else:
            count, kind = part.split(" ")
            found += [kind] * int(count)
    return found


@pytest.mark.parametrize("row", PLANS, ids=lambda row: row["model"])
def test_the_stack_is_laid_out_as_published(row: dict[str, str]) -> None:
    assert plan_of(model(row["model"])) == expanded(row["plan"])


@pytest.mark.parametrize("row", PLANS, ids=lambda row: row["model"])
def test_slope_and_constant_are_those_published_to_the_byte(row: dict[str, str]) -> None:
    """W tokens, kernel - 1 columns, states in the type the config or the engine's default names."""
    spec = model(row["model"])
    assert spec.slope(BF16_CACHE) == int(row["slope_bytes_per_token"])
    assert spec.constant(BF16_CACHE) == product(row["constant_bytes"])
    if spec.mixers and spec.slope(BF16_CACHE):
        total = spec.cache_bytes(float(M1), BF16_CACHE)
        assert total == M1 * int(row["slope_bytes_per_token"]) + product(row["constant_bytes"])


# ---- transformers' caches


@pytest.mark.parametrize("row", CACHES, ids=lambda row: f"{row['file']}-{row['tokens']}")
def test_a_cache_of_transformers_has_the_bytes_of_its_tensors(row: dict[str, str]) -> None:
    """W - 1 tokens, convolutions as wide as the kernel, fp32 recurrent states, buffers of what waits for compression."""
    spec = model(id_of(row["file"]))
    assert spec.cache_bytes(float(row["tokens"]), BF16_CACHE, TRANSFORMERS) == float(row["total_bytes"])
    if row["slope_bytes_per_token"] != "-":
        assert spec.slope(BF16_CACHE) == float(row["slope_bytes_per_token"])
        assert spec.constant(BF16_CACHE, TRANSFORMERS) == float(row["fixed_bytes"])


@functools.cache
def measured_layers() -> dict[str, list[tuple[str, dict[str, int]]]]:
    """Architecture -> (file, bytes by length) of every layer that transformers ran on a CPU, at full widths and few layers."""
    found: dict[str, list[tuple[str, dict[str, int]]]] = {}
    with data_path("published", "transformers_caches_by_layer.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["architecture"], []).append((row["file"], json.loads(row["bytes_by_length"])))
    return found


def test_thirty_architectures_were_run() -> None:
    assert len(measured_layers()) >= 30


@pytest.mark.parametrize("architecture", measured_layers())
def test_a_layer_run_by_transformers_keeps_what_one_of_ours_does(architecture: str) -> None:
    """Real tensors of models with few layers: at every length the bytes of one of the model's kinds of mixers."""
    for file, measured in measured_layers()[architecture]:
        mixers = [layer for _, layer in model(id_of(file)).mixers]
        ours = [
            {length: layer.state_bytes(layer.whole((Segment(1.0, 0.0, float(length)),)), BF16_CACHE, TRANSFORMERS) for length in measured}
            for layer in mixers
        ]
        assert measured in ours or not any(measured.values()), (architecture, measured, ours[:4])


def test_a_compressed_layer_of_transformers_buffers_what_waits() -> None:
    """Shrunk models of transformers 5.23.0 run on the CPU: bytes of one layer of V4-Pro at 40, 80 and 1,024 tokens."""
    layers = {layer.compress_ratio: layer for _, layer in model("deepseek-ai/DeepSeek-V4-Pro").mixers if isinstance(layer, CompressedAttention)}
    for ratio, truth in ((128, {40: 122_880, 80: 245_760, 256: 132_096, 1024: 138_240}), (4, {40: 64_000, 80: 117_760, 256: 222_208, 1024: 467_968})):
        layer = layers[ratio]
        for tokens, total in truth.items():
            assert layer.state_bytes(layer.whole((Segment(1.0, 0.0, float(tokens)),)), BF16_CACHE, TRANSFORMERS) == total


@pytest.mark.parametrize("name", EVERY)
def test_a_state_plan_adds_up_to_the_cache(name: str) -> None:
    spec = model(name)
    for tokens in (1.0, 100.0, 4095.0, 5000.0, 1e6):
        whole = sum(count * item.bytes(tokens, spec.cache) for count, _, item in spec.rows())
        assert spec.cache_bytes(tokens) == pytest.approx(whole, rel=1e-15)
    assert spec.cache_bytes(0.0) == 0
    growing = sum(count * spec.cache.row_bytes(item.row) / item.every for count, _, item in spec.rows() if item.grows)
    assert spec.cache_slope(1e9) == growing == spec.slope()
    assert spec.cache_bounds(1e5) == (spec.cache_bytes(1e5), spec.cache_bytes(1e5))


@pytest.mark.parametrize("name", EVERY)
def test_an_array_of_contexts_keeps_what_each_keeps(name: str) -> None:
    contexts = np.array([0.0, 1.0, 3.0, 4.0, 127, 128, 129, 4096, 8193, 1e5, M1])
    for rules in (ARCHITECTURE, TRANSFORMERS):
        kept = model(name).cache_bytes(contexts, BF16_CACHE, rules)
        assert list(np.broadcast_to(kept, contexts.shape)) == [model(name).cache_bytes(float(c), BF16_CACHE, rules) for c in contexts]


def test_states_are_kept_once_whatever_the_context_and_in_their_own_type() -> None:
    spec = model("Qwen/Qwen3.5-397B-A17B")
    states = [item for _, _, item in spec.rows() if item.keep is Keep.SSM]
    assert states
    assert all(item.rows(1e6) == item.rows(1.0) == 1 and item.dtype == FP32 for item in states)
    eight = spec.with_formats(cache=CACHE_FORMATS["fp8"])
    assert eight.cache_bytes(1e5) - eight.constant() == (spec.cache_bytes(1e5, BF16_CACHE) - spec.constant(BF16_CACHE)) / 2
    assert eight.constant() == spec.constant(BF16_CACHE)


def test_four_gib_of_jamba_at_256k_are_thirty_two_of_mixtral() -> None:
    """The blog's "4 vs 32 GB" and Jamba-1.5's Table 1."""
    attention = [(n, layer) for n, layer in model("ai21labs/Jamba-v0.1").mixers if isinstance(layer, Attention)]
    jamba = sum(n * layer.state_bytes(layer.whole((Segment(1.0, 0.0, 262_144.0),)), BF16_CACHE) for n, layer in attention)
    assert jamba == 4 * 2**30
    assert model("mistralai/Mixtral-8x7B-v0.1").cache_bytes(262_144.0, BF16_CACHE) == 32 * 2**30


#: V4's 584 B entries (448 fp8 + 64 bf16 + 7 scales + 1 pad) and 68 B fp4 index keys; V3.2's 656 + 132 (FORMULAS 2.2).
def stored(spec: ModelSpec, entry: float, key: float) -> float:
    total = 0.0
    for count, _, item in spec.rows():
        if item.grows:
            total += count * (key if item.keep is Keep.INDEX else entry) / item.every
    return total


def test_v4_keeps_a_tenth_of_v32s_cache_and_flash_seven_hundredths() -> None:
    pro, flash, older = (stored(model(f"deepseek-ai/DeepSeek-{name}"), entry, key) for name, entry, key in (("V4-Pro", 584, 68), ("V4-Flash", 584, 68), ("V3.2", 656, 132)))
    assert (pro, flash, older) == (5031.4375, 3514.25, 48_068)
    assert round(pro / older, 2) == 0.10
    assert round(flash / older, 2) == 0.07
    assert pro / (61 * 4096) == pytest.approx(0.0201, abs=1e-4)
    assert stored(model("deepseek-ai/DeepSeek-V4-Pro"), 584, 132) == 5511.4375


@pytest.mark.parametrize(
    ("formula", "name", "tokens", "truth"),
    [
        ("Llama-2-7B, 2,048 slots", "meta-llama/Llama-2-7b-hf", 2048, 2**30), ("MiniMax-M2, 1e6 tokens", "MiniMaxAI/MiniMax-M2", 10**6, 253_952 * 10**6),
        ("Kimi-Linear's 7 MLA layers", "moonshotai/Kimi-Linear-48B-A3B-Instruct", M1, 8064 * M1 + 20 * (3 * 4096 * 3 * 2 + 32 * 128 * 128 * 4)),
        ("V4-Pro in bf16 at 1M", "deepseek-ai/DeepSeek-V4-Pro", M1, 9848 * M1 + 61 * 128 * 1024 + 18_710_528), ("Yi-34B, 2,048 tokens", "01-ai/Yi-34B", 2048, 480 * 2**20),
    ],
)  # fmt: skip
def test_published_cache_sizes_are_ours(formula: str, name: str, tokens: int, truth: int) -> None:
    assert model(name).cache_bytes(float(tokens), BF16_CACHE) == truth, formula


def test_nsa_keeps_three_branches() -> None:
    """n_kv (d_k + d_v)(1 + 1/stride) per token, a window and a raw tail of its own (FORMULAS 2.1)."""
    layer = NativeSparseAttention(2560, 64, 4, 192, 128)
    held = layer.whole(NOTHING)
    assert sum(BF16_CACHE.row_bytes(item.row) / item.every for item in layer.kept(held) if item.grows) == 4 * 320 * 2 * (1 + 1 / 16)
    tokens = 65_536
    rows = tokens + ((tokens - 32) // 16 + 1) + 512 + 32
    assert layer.state_bytes(layer.whole((Segment(1.0, 0.0, float(tokens)),)), BF16_CACHE) == rows * 4 * 320 * 2


def test_mamba_2_keeps_the_bytes_of_the_handbook() -> None:
    layer = Mamba2(2560, 80, 64, 128, 1, 4, ssm_dtype=DType("fp32", 32))
    kept = layer.state_bytes(layer.whole((Segment(1.0, 0.0, 1.0),)), BF16_CACHE)
    assert kept == 80 * 64 * 128 * 4 + (5120 + 256) * 3 * 2 == 2_653_696


def test_a_short_convolution_keeps_its_last_inputs() -> None:
    layer = ShortConv(2048, 3)
    assert layer.state_bytes(layer.whole((Segment(1.0, 0.0, 9.0),)), BF16_CACHE) == 2048 * 2 * 2


def test_an_encoder_and_a_layer_that_shares_a_cache_keep_nothing() -> None:
    for layer in (Attention(768, 12, 12, 64, mask=Bidirectional()), Attention(768, 12, 12, 64, shares_cache=True)):
        assert layer.kept(layer.whole(NOTHING)) == ()
        assert layer.state_bytes(layer.whole((Segment(1.0, 0.0, 1e6),)), BF16_CACHE) == 0
    shared = Attention(768, 12, 4, 64, shared_kv=True)
    assert 2 * BF16_CACHE.row_bytes(shared.cache_row(shared.whole(NOTHING))) == BF16_CACHE.row_bytes(CacheRow(2 * 4 * 64.0))


# ---- what is not known


def config(**changed: Any) -> dict[str, Any]:
    plain = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 4096, "vocab_size": 32000, "model_type": "llama"}
    return {**plain, **changed}


@pytest.mark.parametrize(
    ("changed", "named", "layers"),
    [
        ({"rwkv_head_size": 64}, "rwkv_head_size", 8), ({"hyena_order": 2, "ssm_rank": 4}, "hyena_order, ssm_rank", 8),
        ({"layer_types": ["full_attention"] * 6 + ["holographic"] * 2}, r"layer_types \(holographic\)", 2),
    ],
)  # fmt: skip
def test_an_unknown_mixer_is_named_and_bounded_from_both_sides(changed: dict[str, Any], named: str, layers: int) -> None:
    spec, plain = read_config(config(**changed), "new"), read_config(config(), "plain")
    assert len(spec.warnings) == 1
    assert re.search(named, spec.warnings[0])
    low, high = spec.cache_bounds(1e5)
    assert high == plain.cache_bytes(1e5) == spec.cache_bytes(1e5)
    assert low == plain.cache_bytes(1e5) * (8 - layers) / 8
    assert f"{spec.slope():,.0f} B/token" in spec.warnings[0]
    assert f"{spec.floor.slope():,.0f}" in spec.warnings[0]  # type: ignore[union-attr]
    assert f"{layers} of 8 layers" in spec.warnings[0]


def test_every_config_of_the_catalog_is_understood() -> None:
    for name in EVERY:
        assert all("text model only" in told for told in model(name).warnings), name
        assert model(name).floor is None


@pytest.mark.parametrize("name", EVERY)
def test_multi_token_modules_are_counted_apart(name: str) -> None:
    spec = model(name)
    assert math.isfinite(spec.extra_parameters())
    assert (spec.extra_parameters() > 0) == bool(spec.extra)
    if name == "deepseek-ai/DeepSeek-V3":
        assert spec.extra_parameters() == 11_507_286_016


def test_formats_are_read_module_by_module() -> None:
    spec = model("nvidia/Qwen3.6-27B-NVFP4")
    kinds = {type(layer).__name__: layer.weight.name for layer in spec.layers}  # type: ignore[attr-defined]
    assert kinds == {"GatedDeltaNet": "fp8", "Attention": "fp8", "GatedMLP": "nvfp4"}
    assert spec.head.weight.name == "nvfp4"
    pro = model("deepseek-ai/DeepSeek-V4-Pro")
    experts = next(layer for layer in pro.layers if isinstance(layer, MoE))
    assert (experts.expert_weight.name, experts.weight.name, experts.shared_weight and experts.shared_weight.name) == ("mxfp4_fp8", "fp8_block", "fp8_block")
    converted = next(layer for layer in model("nvidia/DeepSeek-V4-Pro-NVFP4").layers if isinstance(layer, MoE))
    assert (converted.expert_weight.name, converted.weight.name) == ("nvfp4", "fp8_block")
    mixed = next(layer for layer in model("RedHatAI/DeepSeek-V4-Flash-NVFP4-FP8").layers if isinstance(layer, MoE))
    assert mixed.expert_weight.name == "nvfp4"
    kimi = next(layer for layer in model("moonshotai/Kimi-K2.5").layers if isinstance(layer, MoE))
    assert kimi.expert_weight.name == "int4_g32"


@pytest.mark.parametrize("name", EVERY)
def test_a_model_of_the_catalog_loads_by_its_file(name: str) -> None:
    assert load_model(data_path("models", name.replace("/", "--") + ".json")).blocks == model(name).blocks


def test_a_plain_format_stores_an_index_key_like_any_row() -> None:
    assert CacheFormat("bf16", 16, DType("bf16", 16)).row_bytes(CacheRow(128.0, index=True)) == 256


# ---- claims about mixers and caches (FORMULAS section 8), our number beside each


def test_a_token_takes_32768_floats_of_mha_2048_of_gqa_576_of_mla_256_of_mqa() -> None:
    """The blog's figure 4: 1, 16, 56.9 and 128 times fewer than V3's 128 heads of 128."""
    heads = [Attention(7168, 128, g, 128) for g in (128, 8, 1)]
    floats = [float(layer.cache_row(layer.whole(NOTHING)).elements) for layer in heads]
    latent = next(layer for _, layer in model("deepseek-ai/DeepSeek-V3").mixers).cache_row(heads[0].whole(NOTHING))
    assert [*floats, latent.elements + latent.rope] == [32_768, 2048, 256, 576]
    assert (32_768 / 2048, 32_768 / 256) == (16, 128)
    assert round(32_768 / 576, 1) == 56.9


def test_attention_from_2048_to_a_million_tokens_grows_a_quarter_million_times() -> None:
    assert Causal().cumulative(float(M1)) / Causal().cumulative(2048.0) == pytest.approx(262_144, rel=5e-4)


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM3-3B", "meta-llama/Llama-4-Scout-17B-16E-Instruct"])
def test_every_fourth_layer_has_no_positions(name: str) -> None:
    spec = model(name)
    turned = [spec.kinds[kind][0].rotary_dim > 0 for kind in spec.order]  # type: ignore[union-attr]
    assert turned == [True, True, True, False] * (spec.num_layers // 4)


def test_four_sinks_and_a_window_keep_2048_slots_of_llama_2_in_one_gib() -> None:
    layer = Attention(4096, 32, 32, 128, mask=Sinks(4, 2044))
    for tokens in (2048.0, 1e6):
        assert 32 * layer.state_bytes(layer.whole((Segment(1.0, 0.0, tokens),)), BF16_CACHE) == 2**30


def test_kimi_linear_keeps_a_quarter_of_its_layers_caches() -> None:
    full = sum(count for count, layer in model("moonshotai/Kimi-Linear-48B-A3B-Instruct").mixers if isinstance(layer, LatentAttention))
    assert 1 - full / 27 == pytest.approx(0.741, abs=1e-3)
