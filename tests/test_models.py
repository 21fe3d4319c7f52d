"""config.json -> model: parameter counts of transformers, cache bytes of the papers, and errors that help."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import load_model
from simulator.data import data_path
from simulator.dtypes import CACHE_FORMATS, weight_format
from simulator.hf import catalog, read_config, with_formats
from simulator.hf.catalog import find
from simulator.kernels.attention import Causal, Chunked, Segment, Window
from simulator.layers import REGISTRY, Attention, Embedding, GatedMLP, Head, LatentAttention, MoE
from simulator.model import ModelSpec
from simulator.parallel import Layout
from tests.support import EVERY, MAIN, model

M1, K128 = 1_048_576, 131_072


def published() -> dict[str, dict[str, str]]:
    with data_path("published", "transformers_parameters.csv").open(encoding="utf-8") as file:
        return {row["file"].removesuffix(".json").replace("--", "/", 1): row for row in csv.DictReader(file)}


PUBLISHED = published()


def file_of(name: str) -> Path:
    return data_path("models", name.replace("/", "--") + ".json")


def config_of(name: str) -> dict[str, Any]:
    return json.loads(file_of(name).read_text("utf-8"))


# ---- counts


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_transformers_counts(name: str) -> None:
    """transformers 5.23.0 on the meta device, text model without multi-token-prediction layers."""
    assert model(name).parameters() == int(PUBLISHED[name]["total"])


def test_every_published_count_belongs_to_a_file() -> None:
    # Samba is a lit-gpt config: no class of transformers builds it
    assert set(EVERY) - set(PUBLISHED) == {"microsoft/Samba-1.3B"}
    assert set(PUBLISHED) <= set(EVERY)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_stack_has_the_layers_transformers_builds(name: str) -> None:
    """Runs of equal layers in transformers' own plan ("[A3B58] Ax3=... | Bx58=...") have as many layers as ours."""
    kinds = [int(part.strip().split("=")[0].split("x")[1]) for part in PUBLISHED[name]["layer_plan"].split("] ", 1)[1].split(" | ")]
    spec = model(name)
    assert sum(kinds) == spec.num_layers
    # transformers splits classes further than costs differ, never the other way round; but it knows no formats of layers
    if spec.quantization == "none" or spec.model_type == "deepseek_v4":
        assert len(spec.kinds) <= len(kinds)
    assert sum(count for count, _ in spec.blocks) == spec.num_layers == len(spec.order)


@pytest.mark.parametrize("name", EVERY)
def test_weights_take_their_parameters_times_their_widths(name: str) -> None:
    spec = model(name)
    assert 4.25 / 8 * spec.parameters() <= spec.weight_bytes() <= 2 * spec.parameters()
    if spec.quantization == "none":
        assert spec.weight_bytes() == 2 * spec.parameters()


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("meta-llama/Meta-Llama-3.1-70B", 327_680), ("meta-llama/Meta-Llama-3.1-8B", 131_072), ("meta-llama/Meta-Llama-3.1-405B", 516_096),
        ("deepseek-ai/DeepSeek-V3", 70_272), ("deepseek-ai/DeepSeek-V2", 69_120), ("moonshotai/Kimi-K2-Instruct", 70_272),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 49_152), ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", 49_152),
        ("mistralai/Mistral-7B-v0.1", 0), ("mistralai/Mixtral-8x7B-v0.1", 131_072), ("openai/gpt-oss-120b", 36_864), ("openai/gpt-oss-20b", 24_576),
        ("Qwen/Qwen3-235B-A22B", 192_512), ("Qwen/Qwen2.5-14B-Instruct-1M", 196_608), ("Qwen/Qwen2.5-7B-Instruct-1M", 57_344),
        ("HuggingFaceTB/SmolLM3-3B", 73_728), ("zai-org/GLM-4.7", 92 * 2 * 8 * 128 * 2),
    ],
)  # fmt: skip
def test_one_more_token_adds_the_bytes_of_the_papers(name: str, slope: int) -> None:
    assert model(name).cache_slope(float(M1)) == slope


@pytest.mark.parametrize(
    ("name", "tokens", "total"),
    [
        ("meta-llama/Meta-Llama-3.1-70B", M1, 343_597_383_680), ("meta-llama/Meta-Llama-3.1-70B", K128, 40 * 2**30),
        ("meta-llama/Meta-Llama-3.1-405B", M1, 504 * 2**30), ("deepseek-ai/DeepSeek-V3", M1, 70_272 * M1),
        ("mistralai/Mistral-7B-v0.1", M1, 512 * 2**20), ("mistralai/Mistral-7B-v0.1", 4096, 512 * 2**20), ("mistralai/Mistral-7B-v0.1", 4095, 4095 * 2**17),
        ("openai/gpt-oss-120b", M1, 36_864 * M1 + 9 * 2**19), ("openai/gpt-oss-20b", K128, 24_576 * K128 + 3 * 2**20),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", M1, 49_152 * M1 + 1152 * 2**20), ("meta-llama/Meta-Llama-3.1-8B", 1, 131_072),
    ],
)  # fmt: skip
def test_a_sequence_keeps_the_bytes_of_the_papers(name: str, tokens: int, total: int) -> None:
    assert model(name).cache_bytes(float(tokens)) == total


@pytest.mark.parametrize("name", MAIN)
def test_a_cache_never_shrinks_and_an_array_of_contexts_is_each_context(name: str) -> None:
    contexts = np.array([0.0, 1.0, 127, 128, 129, 4095, 4096, 8191, 8192, 8193, 1e5, M1])
    kept = model(name).cache_bytes(contexts)
    assert (np.diff(kept) >= 0).all()
    assert list(kept) == [model(name).cache_bytes(float(c)) for c in contexts]
    assert kept[0] == 0


def test_a_latent_cache_in_fp8_takes_656_bytes_a_layer() -> None:
    spec = model("deepseek-ai/DeepSeek-V3")
    assert spec.cache_slope(1.0, CACHE_FORMATS["fp8_ds_mla"]) == 61 * 656
    assert spec.cache_slope(1.0, CACHE_FORMATS["fp8"]) == 61 * 576


def test_llama_4_scout_has_12_global_and_36_chunked_layers() -> None:
    spec = model("meta-llama/Llama-4-Scout-17B-16E-Instruct")
    found = {type(mixer.mask): (count, mixer) for count, mixer in spec.mixers}
    assert found[Causal][0] == 12
    assert found[Chunked][0] == 36
    assert found[Chunked][1].mask.width == 8192
    assert found[Causal][1].rotary_dim == 0
    assert found[Chunked][1].rotary_dim == 128
    globally = [i for i, kind in enumerate(spec.order) if isinstance(spec.kinds[kind][0].mask, Causal)]
    assert globally == list(range(3, 48, 4))


def test_gpt_oss_alternates_windows_from_the_first_layer() -> None:
    for name, layers in (("openai/gpt-oss-20b", 24), ("openai/gpt-oss-120b", 36)):
        spec = model(name)
        masks = [spec.kinds[kind][0].mask for kind in spec.order]
        assert masks == [Window(128), Causal()] * (layers // 2)
        assert all(mixer.learned_sinks for _, mixer in spec.mixers)
        assert (spec.quantization, spec.layers[0].weight.name, spec.layers[1].expert_weight.name) == ("mxfp4", "bf16", "mxfp4")


def test_deepseek_v3_has_three_dense_layers_and_58_of_experts() -> None:
    spec = model("deepseek-ai/DeepSeek-V3")
    assert [(count, type(block[1])) for count, block in spec.blocks] == [(3, GatedMLP), (58, MoE)]
    assert {type(mixer) for _, mixer in spec.mixers} == {LatentAttention}
    assert spec.layers[0].weight.name == "fp8_block"


def test_every_rank_of_a_tensor_group_holds_the_down_projections_of_deepseek_v3() -> None:
    """q_a and kv_a over 61 layers: 0.92 GB in fp8 that TP8 does not divide."""
    spec = model("deepseek-ai/DeepSeek-V3")
    layout = Layout(tp=8).place(spec)
    held = [
        (count, module)
        for count, layer in spec.counted
        if isinstance(layer, LatentAttention)
        for module in layer.modules(layout.shard(layer, (Segment(1.0, 1.0, 0.0),)))
        if module.name in ("q_a_proj", "kv_a_proj")
    ]
    assert all(module.replicated for _, module in held)
    assert sum(count * module.parameters for count, module in held) == 61 * 7168 * (1536 + 576)
    assert sum(count * module.weight.bytes(module.parameters) for count, module in held) / 1e9 == pytest.approx(0.9235, rel=1e-3)


def test_windows_that_a_config_names_but_does_not_use_are_no_windows() -> None:
    assert config_of("Qwen/Qwen2.5-7B-Instruct")["sliding_window"]
    assert all(isinstance(mixer.mask, Causal) for _, mixer in model("Qwen/Qwen2.5-7B-Instruct").mixers)
    assert all(mixer.mask == Window(4096) for _, mixer in model("mistralai/Mistral-7B-v0.1").mixers)


#: Kinds that no config of the catalog has: written by hand, or in configs that are not collected.
ELSEWHERE = {"NativeSparseAttention", "MixtureOfBlockAttention", "Retention", "S4", "ShortConv", "ParallelMixers", "Linear"}


@pytest.mark.parametrize("kind", REGISTRY)
def test_a_kind_of_layer_occurs_in_the_catalog_or_is_known_not_to(kind: type) -> None:
    found = any(isinstance(layer, kind) for name in EVERY for _, layer in model(name).counted)
    assert found == (kind.__name__ not in ELSEWHERE)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_is_whole(name: str) -> None:
    spec = model(name)
    assert spec.name == name
    assert isinstance(spec.embedding, Embedding)
    assert isinstance(spec.head, Head)
    assert len(spec.mixers) == len({mixer for _, mixer in spec.mixers})
    if all(len(block) == 2 for block in spec.kinds):
        assert sum(count for count, _ in spec.mixers) == spec.num_layers
    assert spec.reach.declared_tokens is None or spec.reach.declared_tokens > 1000
    assert all(isinstance(told, str) and "\n" not in told for told in spec.warnings)


# ---- formats


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("stored", ["bf16", "fp8", "nvfp4", "int4"])
def test_storing_weights_otherwise_changes_bytes_and_not_parameters(name: str, stored: str) -> None:
    spec = model(name)
    other = with_formats(spec, stored, None)
    assert other.parameters() == spec.parameters()
    assert other.cache_bytes(1000.0) == spec.cache_bytes(1000.0)
    linear = sum(
        count * module.parameters
        for count, layer in spec.counted
        if not isinstance(layer, (Embedding, Head))
        for module in layer.modules(layer.whole((Segment(0.0, 0.0, 0.0),)))
        if module.name.endswith("proj") or module.name in ("shared_experts",)
    )
    assert other.weight_bytes() == pytest.approx(linear * weight_format(stored).bytes_per_element + (spec.parameters() - linear) * 2, rel=1e-9)


@pytest.mark.parametrize("name", MAIN)
def test_an_fp8_cache_is_half_of_a_bf16_one(name: str) -> None:
    assert 2 * with_formats(model(name), None, "fp8").cache_bytes(1e5) == with_formats(model(name), None, "bf16").cache_bytes(1e5)


@pytest.mark.parametrize("name", [n for n in MAIN if "DeepSeek" not in n and "Kimi" not in n])
def test_a_format_made_for_latents_is_refused_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="fp8_ds_mla.*stores latents of 512 and the model keeps keys and values by head; use fp8"):
        with_formats(model(name), None, "fp8_ds_mla")


@pytest.mark.parametrize(
    ("quantized", "weight", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block", "fp8"), ({"quant_method": "fp8"}, "fp8", "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4", "awq"), ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", "nvfp4"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8", "compressed-tensors"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}}, "int4", "compressed-tensors"),
        (None, "bf16", "none"),
    ],
)  # fmt: skip
def test_the_format_of_weights_is_what_the_config_says(quantized: dict[str, Any] | None, weight: str, method: str) -> None:
    config = {k: v for k, v in config_of("meta-llama/Meta-Llama-3.1-8B").items() if k != "quantization_config"}
    spec = read_config({**config, **({"quantization_config": quantized} if quantized else {})}, "quantized")
    assert (spec.layers[0].weight.name, spec.quantization) == (weight, method)
    assert spec.embedding.weight.name == "bf16"


def test_an_unknown_quantization_is_an_upper_bound_with_a_warning() -> None:
    spec = read_config({**config_of("meta-llama/Meta-Llama-3.1-8B"), "quantization_config": {"quant_method": "zip"}}, "odd")
    assert spec.weight_bytes() == 2 * spec.parameters()
    assert any("zip" in told and "upper bound" in told for told in spec.warnings)


def test_the_cache_precision_of_a_checkpoint_is_kept() -> None:
    for scheme in ({"kv_cache_quant_algo": "FP8"}, {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}):
        spec = read_config({**config_of("meta-llama/Meta-Llama-3.1-8B"), "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", **scheme}}, "x")
        assert spec.cache.name == "fp8"


# ---- ways to name a model


def test_a_model_is_an_id_a_short_form_a_file_a_folder_or_a_dict(tmp_path: Path) -> None:
    truth = model("meta-llama/Meta-Llama-3.1-70B")
    text = file_of("meta-llama/Meta-Llama-3.1-70B").read_text("utf-8")
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(text, "utf-8")
    for source in (
        "meta-llama/Meta-Llama-3.1-70B", "Meta-Llama-3.1-70B", "meta-llama-3.1-70b", "Llama-3.1-70B", folder, str(folder),
        folder / "config.json", json.loads(text), file_of("meta-llama/Meta-Llama-3.1-70B"),
    ):  # fmt: skip
        found = load_model(source)
        assert found.blocks == truth.blocks
        assert found.parameters() == truth.parameters()
    assert load_model(folder).name == "my-model"
    assert load_model("DEEPSEEK-V3").name == "deepseek-ai/DeepSeek-V3"


@pytest.mark.parametrize("name", EVERY)
def test_an_id_without_its_owner_names_its_model(name: str) -> None:
    assert load_model(name.split("/", 1)[1]).name == name
    assert load_model(f" {name.upper()} ").name == name


@pytest.mark.parametrize(("text", "named"), [("meta-llama/Meta-Lama-3.1-70B", "meta-llama/Meta-Llama-3.1-70B"), ("DeepSeek-V33", "deepseek-ai/DeepSeek-V3"), ("gpt-os-120b", "openai/gpt-oss-120b")])
def test_an_unknown_id_names_the_nearest(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="not in the catalog.*did you mean") as refused:
        load_model(text)
    assert named in str(refused.value)
    assert repr(text) in str(refused.value)
    assert "config.json" in str(refused.value)


@pytest.mark.parametrize("text", ["Qwen3", "Llama", "Instruct"])
def test_an_id_that_fits_several_lists_them(text: str) -> None:
    with pytest.raises(ValueError, match="several match") as refused:
        load_model(text)
    assert sum(name in str(refused.value) for name in catalog()) >= 2


def test_a_part_of_a_name_means_the_checkpoint_that_others_store_otherwise() -> None:
    assert find("Llama-4-Scout") == "meta-llama/Llama-4-Scout-17B-16E-Instruct"
    assert find("meta-llama/Llama-3.1-405B") == "meta-llama/Meta-Llama-3.1-405B"
    with pytest.raises(ValueError, match="several match"):
        find("Kimi-K2")


@pytest.mark.parametrize("text", ["", "   ", "/nowhere/at/all", "zzzzzzzz", "a" * 300, "a\0b"], ids=range(6))
def test_what_is_no_model_at_all_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)^(?!.*\n).*$"):
        load_model(text)


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", '"text"', "null", "\x00\x01", "{'a': 1}", "3"])
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content, "utf-8")
    with pytest.raises(ValueError, match="give the model's own config.json") as refused:
        load_model(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text_and_a_folder_without_config_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json in this folder"):
        load_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not JSON"):
        load_model(file)


# ---- configs that are wrong

LLAMA = config_of("meta-llama/Meta-Llama-3.1-8B")
V3 = config_of("deepseek-ai/DeepSeek-V3")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"mine: the config has no .*{key}.*give the model's full config.json"):
        read_config({k: v for k, v in LLAMA.items() if k != key}, "mine")


def test_an_empty_config_is_refused() -> None:
    with pytest.raises(ValueError, match="the config has no hidden_size"):
        load_model({})


BAD = [-1, 0, True, float("nan"), float("inf"), -float("inf"), 10**12, 1.5, "32", [32], {"a": 1}]
COUNTS = (
    "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim",
)  # fmt: skip


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", BAD, ids=repr)
def test_an_absurd_number_is_refused_with_its_key_its_value_and_a_remedy(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="correct the config") as refused:
        read_config({**LLAMA, key: value}, "mine")
    assert key in str(refused.value)
    assert repr(value) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace"])
@pytest.mark.parametrize("value", [-1, True, float("nan"), 10**12, "32"], ids=repr)
def test_an_absurd_number_of_a_latent_or_routed_model_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="correct the config") as refused:
        read_config({**V3, key: value}, "mine")
    assert key in str(refused.value)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="32 attention heads do not divide over 5 key-value heads"):
        read_config({**LLAMA, "num_key_value_heads": 5}, "mine")
    with pytest.raises(ValueError, match="300 experts per token of 256 experts"):
        read_config({**V3, "num_experts_per_tok": 300}, "mine")


def test_more_layers_than_any_model_has_are_refused_rather_than_built() -> None:
    """Layers are read one by one: a stack of a hundred million would never be."""
    with pytest.raises(ValueError, match="num_hidden_layers"):
        read_config({**LLAMA, "num_hidden_layers": 100_000}, "mine")


junk = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 300), st.floats(allow_nan=True), st.sampled_from([10**9, 10**30, -(10**9), math.inf]), st.text(max_size=6),
    st.lists(st.integers(-3, 40), max_size=4), st.dictionaries(st.sampled_from(["factor", "rope_type", "original_max_position_embeddings", "partial_rotary_factor", "x"]), st.one_of(st.integers(-4, 4), st.text(max_size=3)), max_size=3),
)  # fmt: skip
EXTRA = (
    "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval", "attention_chunk_size",
    "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "quantization_config", "moe_layers", "mlp_only_layers",
    "moe_layer_freq", "decoder_sparse_step", "dual_chunk_attention_config", "shared_expert_intermediate_size", "intermediate_size_mlp", "text_config",
    "model_type", "torch_dtype", "dtype", "tie_word_embeddings", "kv_lora_rank", "num_experts", "max_position_embeddings", "interleave_moe_layer_step",
    "hybrid_override_pattern", "attn_type_list", "linear_attn_config", "attn_layer_period", "block_configs", "compress_ratios", "indexer_types", "mlp_layer_types",
    "attention_window", "mamba_expand", "mamba_dt_rank", "time_step_rank", "mamba_ssm_dtype", "state_size", "n_groups", "hc_mult", "moe_latent_size", "num_hash_layers",
    "moba_topk", "expert_dtype", "num_nextn_predict_layers", "full_attention_interval", "conv_kernel", "expansion_ratio", "kda", "only", "spelled as",
)  # fmt: skip
#: A stack of 10**9 layers is a test of its own; here it would only be slow.
CHANGEABLE = {name: sorted(({*config_of(name), *EXTRA}) - {"num_hidden_layers", "n_layer", "n_layers"}) for name in (
    "meta-llama/Meta-Llama-3.1-8B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-Next-80B-A3B", "deepseek-ai/DeepSeek-V4-Flash",
    "ai21labs/Jamba-v0.1", "moonshotai/Kimi-Linear-48B-A3B-Instruct", "nvidia/Nemotron-3-Nano", "MiniMaxAI/MiniMax-M1", "allenai/longformer-base-4096", "zai-org/GLM-5.2",
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1", "state-spaces/mamba-2.8b.ov_mirror", "mosaicml/mpt-7b-storywriter", "google/bigbird-roberta-base", "microsoft/Samba-1.3B",
)}


@settings(max_examples=400)
@given(st.sampled_from(sorted(CHANGEABLE)), st.data())
def test_a_config_is_read_or_refused_and_nothing_else(name: str, data: st.DataObject) -> None:
    config = config_of(name)
    for key in data.draw(st.lists(st.sampled_from(CHANGEABLE[name]), min_size=1, max_size=3, unique=True)):
        if data.draw(st.booleans()) or key not in config:
            config[key] = data.draw(junk)
        else:
            del config[key]
    _read_or_refused(config)


def _read_or_refused(config: dict[str, Any]) -> None:
    try:
        spec = read_config(config, "fuzzed")
    except ValueError as refused:
        assert "\n" not in str(refused)
        assert "fuzzed" in str(refused)
        return
    assert isinstance(spec, ModelSpec)
    assert math.isfinite(spec.parameters())
    assert math.isfinite(spec.cache_bytes(1000.0))
    assert spec.parameters() > 0


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("meta-llama/Meta-Llama-3.1-8B", "partial_rotary_factor", [1]), ("meta-llama/Meta-Llama-3.1-8B", "partial_rotary_factor", "half"),
        ("meta-llama/Meta-Llama-3.1-8B", "rope_parameters", [1]), ("meta-llama/Meta-Llama-3.1-8B", "rope_parameters", "yarn"),
        ("meta-llama/Meta-Llama-3.1-8B", "rope_scaling", {"original_max_position_embeddings": "far"}), ("meta-llama/Meta-Llama-3.1-8B", "dual_chunk_attention_config", [1]),
        ("Qwen/Qwen3-30B-A3B", "mlp_only_layers", 5), ("Qwen/Qwen3-30B-A3B", "moe_layers", 5), ("Qwen/Qwen3-30B-A3B", "decoder_sparse_step", 0),
        ("deepseek-ai/DeepSeek-V3", "quantization_config", {"quant_method": "compressed-tensors", "config_groups": [1]}),
        ("deepseek-ai/DeepSeek-V3", "quantization_config", {"quant_method": "compressed-tensors", "config_groups": {"g": 3}}),
        ("deepseek-ai/DeepSeek-V3", "quantization_config", {"quant_method": "fp8", "modules_to_not_convert": 7}),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "no_rope_layers", [1, 1, 1, 0]), ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "no_rope_layers", 4),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "intermediate_size_mlp", "wide"), ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", "intermediate_size_mlp", -5),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_of_the_wrong_kind_is_read_or_refused(name: str, key: str, value: Any) -> None:
    config = config_of(name)
    inner = config.get("text_config", config)
    inner[key] = value
    _read_or_refused(config)


def test_reading_changes_nothing_in_the_config() -> None:
    for name in MAIN:
        config = config_of(name)
        read_config(config, name)
        assert config == config_of(name)


def test_a_model_of_another_modality_counts_its_text_and_says_so() -> None:
    spec = model("Qwen/Qwen3-VL-235B-A22B-Instruct")
    assert any("text model only" in told for told in spec.warnings) or "text_config" not in config_of(spec.name)


def test_queries_of_no_heads_width_follow_the_width_of_the_model() -> None:
    spec = read_config({k: v for k, v in LLAMA.items() if k != "head_dim"}, "mine")
    assert isinstance(spec.layers[0], Attention)
    assert spec.layers[0].head_dim == 4096 // 32
