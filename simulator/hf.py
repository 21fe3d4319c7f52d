"""config.json -> ModelSpec: the only file that knows Hugging Face's keys.

A config is data: it is read, never run.  What is not recognised is named in a warning with its effect bounded;
only what cannot be read at all is refused.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulator.data import data_path
from simulator.dtypes import CACHE_FORMATS, W_BF16, WEIGHT_FORMATS, CacheFormat, WeightFormat
from simulator.kernels.attention import Causal, Chunked, Mask, Window
from simulator.layers import Attention, Embedding, GatedMLP, Head, LatentAttention, Layer, MoE
from simulator.model import Block, ModelSpec, Reach

Config = Mapping[str, Any]

#: Keys that announce a mixer this version does not model; its layers count as full attention.
_UNMODELLED = {
    "index_topk": "sparse attention by an indexer (DSA)",
    "compress_ratios": "compressed attention (CSA, HCA)",
    "linear_num_key_heads": "gated DeltaNet layers",
    "linear_attn_config": "linear attention layers",
    "attn_type_list": "lightning attention layers",
    "hybrid_override_pattern": "Mamba-2 layers",
    "attn_layer_period": "Mamba layers",
    "mamba_d_state": "Mamba layers",
    "state_size": "Mamba layers",
    "ssm_cfg": "Mamba layers",
    "attention_window": "windowed attention with global tokens",
    "block_configs": "per-layer blocks (NAS)",
    "mb_per_layer": "Mamba layers",
}
_MAX_COUNT = 10**9
_MAX_LAYERS = 10_000


def load_model(source: str | Path | Config) -> ModelSpec:
    """A model from a catalog id (short forms work when unambiguous), a config.json, its folder, or a dict."""
    if isinstance(source, Mapping):
        return read_config(source, str(source.get("_name_or_path") or source.get("model_type") or "model"))
    text = str(source)
    path = _path(text)
    if path is not None:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            message = f"{text}: no config.json in this folder; give a folder or file that holds the model's config.json"
            raise ValueError(message)
        return read_config(_parse(file), path.resolve().name if path.is_dir() else path.stem)
    identifier = find(text)
    return read_config(_parse(data_path("models", identifier.replace("/", "--") + ".json")), identifier)


def _path(text: str) -> Path | None:
    """The path meant by `text`, if there is one."""
    if not text.strip():
        return None
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long for a file name, or no home folder
        return None


def catalog() -> list[str]:
    """Every model id whose config ships with the tool."""
    return sorted(file.stem.replace("--", "/", 1) for file in data_path("models").glob("*.json"))


def find(text: str) -> str:
    """The catalog id meant by `text`: the id itself, or a part of exactly one."""
    known = catalog()
    lowered = {name.lower(): name for name in known}
    wanted = text.strip().lower()
    if wanted in lowered:
        return lowered[wanted]
    for fits in (
        [n for n in known if n.lower().split("/", 1)[-1] == wanted],
        [n for n in known if n.lower().endswith(f"-{wanted}")],
        [n for n in known if n.lower().split("/", 1)[-1].startswith(f"{wanted}-")],
        [n for n in known if wanted and wanted in n.lower()],
    ):
        if len(fits) == 1:
            return fits[0]
        if fits:
            message = f"model {text!r}: several match ({', '.join(fits[:6])}); write one of them"
            raise ValueError(message)
    near = difflib.get_close_matches(wanted, [*lowered, *(n.split("/", 1)[-1] for n in lowered)], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(dict.fromkeys(lowered.get(n) or find(n) for n in near))}? " if near else ""
    message = f"model {text!r}: not in the catalog and no such path; {hint}give its config.json or the folder that holds it"
    raise ValueError(message)


def _parse(file: Path) -> Config:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        message = f"{file}: not JSON ({error}); give the model's own config.json"
        raise ValueError(message) from error
    if not isinstance(config, dict):
        message = f"{file}: holds a {type(config).__name__}, not an object; give the model's own config.json"
        raise ValueError(message)  # noqa: TRY004 (a user's mistake, not ours)
    return config


class _Keys:
    """A config read key by key: every value checked, every alias in one place."""

    def __init__(self, config: Config, name: str) -> None:
        self.config, self.name = config, name

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A positive integer under any of `names`."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value != int(value):
                message = f"{self.name}: {name} = {value!r} is not an integer; correct the config"
                raise ValueError(message)
            if not least <= value <= _MAX_COUNT:
                message = f"{self.name}: {name} = {value!r} is outside {least} to {_MAX_COUNT:,}; correct the config"
                raise ValueError(message)
            return int(value)
        if default is not None:
            return default
        message = f"{self.name}: the config has no {' or '.join(names)}; give the model's full config.json"
        raise ValueError(message)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A boolean."""
        value = self.config.get(name)
        return default if value is None else bool(value)

    def get(self, name: str) -> Any:
        """Whatever stands there."""
        return self.config.get(name)

    def mapping(self, name: str) -> Config:
        """An object, empty where there is none."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, Mapping):
            message = f"{self.name}: {name} = {value!r} is not an object; correct the config"
            raise ValueError(message)
        return value or {}

    def listing(self, name: str) -> list[Any]:
        """A list, empty where there is none."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, list):
            message = f"{self.name}: {name} = {value!r} is not a list; correct the config"
            raise ValueError(message)
        return value or []

    def share(self, value: Any, name: str) -> float:
        """A number from 0 to 1."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            message = f"{self.name}: {name} = {value!r} is not a share between 0 and 1; correct the config"
            raise ValueError(message)
        return float(value)


def read_config(config: Config, name: str) -> ModelSpec:
    """The model a config describes."""
    warnings: list[str] = []
    outer = config
    for wrapper in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(wrapper), Mapping):
            config = {**{k: v for k, v in outer.items() if k in ("quantization_config", "torch_dtype", "tie_word_embeddings")}, **config[wrapper]}
            left = sorted(k for k in outer if k.endswith("_config") and k not in (wrapper, "quantization_config", "generation_config"))
            if left:
                warnings.append(f"text model only: {', '.join(left)} left out (weights and tokens of other modalities are not counted)")
            break
    keys = _Keys(config, name)
    width, vocabulary = keys.count("hidden_size", "n_embd", "d_model"), keys.count("vocab_size")
    layers = keys.count("num_hidden_layers", "n_layer", "n_layers")
    if layers > _MAX_LAYERS:
        message = f"{name}: num_hidden_layers = {layers} is more than {_MAX_LAYERS:,}; correct the config"
        raise ValueError(message)
    formats = _Formats(config, name, warnings)
    unmodelled = sorted(k for k in _UNMODELLED if config.get(k) is not None)
    if unmodelled:
        told = ", ".join(f"{k} ({_UNMODELLED[k]})" for k in unmodelled)
        warnings.append(
            f"not modelled: {told}; every layer counts as full attention, so cache and attention work are upper bounds "
            f"(the layers concerned could cost nothing at all)"
        )
    blocks = [_block(keys, formats, i, layers) for i in range(layers)]
    runs: list[tuple[int, Block]] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0] + 1, block)
        else:
            runs.append((1, block))
    tied = keys.flag("tie_word_embeddings", default=str(config.get("model_type")) in _TIED_BY_CLASS)
    return ModelSpec(
        name=name, hidden_size=width, vocab_size=vocabulary, blocks=tuple(runs),
        embedding=Embedding(vocabulary, width, formats.plain), head=Head(vocabulary, width, tied, formats.plain),
        cache=formats.cache, checkpoint_cache=formats.cache, reach=_reach(keys), model_type=str(config.get("model_type", "")),
        quantization=formats.method, warnings=tuple(warnings),
    )  # fmt: skip


_TIED_BY_CLASS = {"gemma", "gemma2", "gemma3_text", "smollm3"}
_BIASED_BY_CLASS = {"qwen2", "qwen2_moe"}
_NORMED_BY_CLASS = {"qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text", "gemma3_text"}


def _block(keys: _Keys, formats: _Formats, index: int, layers: int) -> Block:
    mixer: Layer = _latent(keys, formats) if keys.get("kv_lora_rank") else _attention(keys, formats, index, layers)
    return (mixer, _channel(keys, formats, index))


def _attention(keys: _Keys, formats: _Formats, index: int, layers: int) -> Attention:
    kind = str(keys.get("model_type"))
    heads = keys.count("num_attention_heads", "n_head", "n_heads")
    width = keys.count("hidden_size", "n_embd", "d_model")
    shared = keys.count("num_key_value_heads", default=heads)
    head_dim = keys.count("head_dim", default=max(1, width // heads))
    if heads % shared:
        message = f"{keys.name}: {heads} attention heads do not divide over {shared} key-value heads; correct the config"
        raise ValueError(message)
    mask, rotates = _mask(keys, index, layers)
    partial = keys.get("partial_rotary_factor") or keys.mapping("rope_parameters").get("partial_rotary_factor") or 1.0
    return Attention(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=shared, head_dim=head_dim, mask=mask,
        rotary_dim=int(head_dim * keys.share(partial, "partial_rotary_factor")) if rotates else 0,
        attention_bias=keys.flag("attention_bias", default=kind in _BIASED_BY_CLASS),
        output_bias=kind == "gpt_oss" and keys.flag("attention_bias"),
        qk_norm=kind in _NORMED_BY_CLASS or (kind == "glm4_moe" and keys.flag("use_qk_norm")),
        learned_sinks=kind == "gpt_oss", weight=formats.attention,
    )  # fmt: skip


def _mask(keys: _Keys, index: int, layers: int) -> tuple[Mask, bool]:
    """The mask of a layer, and whether it rotates queries and keys."""
    kind, types = str(keys.get("model_type")), keys.listing("layer_types")
    rotates = True
    if kind == "llama4_text":
        pattern = keys.listing("no_rope_layers")
        if pattern and len(pattern) != layers:
            message = f"{keys.name}: no_rope_layers has {len(pattern)} entries for {layers} layers; correct the config"
            raise ValueError(message)
        every = keys.count("no_rope_layer_interval", default=4)
        rotates = bool(pattern[index]) if pattern else (index + 1) % every != 0
        return (Chunked(keys.count("attention_chunk_size", default=8192)) if rotates else Causal()), rotates
    width = keys.get("sliding_window")
    uses = keys.flag("use_sliding_window", default=kind not in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"))
    if not width or not uses:
        return Causal(), rotates
    window = Window(keys.count("sliding_window"))
    if len(types) == layers:
        return (window if "sliding" in str(types[index]) else Causal()), rotates
    if kind in ("qwen2", "qwen3"):
        return (window if index >= keys.count("max_window_layers", default=0, least=0) else Causal()), rotates
    if kind == "gpt_oss":
        return (window if index % 2 == 0 else Causal()), rotates
    if kind == "gemma2":
        return (window if index % 2 == 0 else Causal()), rotates
    if kind == "gemma3_text":
        every = keys.count("sliding_window_pattern", default=6)
        return (Causal() if (index + 1) % every == 0 else window), rotates
    return window, rotates


def _latent(keys: _Keys, formats: _Formats) -> LatentAttention:
    rank = keys.get("q_lora_rank")
    return LatentAttention(
        hidden_size=keys.count("hidden_size"), num_attention_heads=keys.count("num_attention_heads"),
        q_lora_rank=keys.count("q_lora_rank") if rank else None, kv_lora_rank=keys.count("kv_lora_rank"),
        qk_nope_head_dim=keys.count("qk_nope_head_dim"), qk_rope_head_dim=keys.count("qk_rope_head_dim"),
        v_head_dim=keys.count("v_head_dim"), weight=formats.attention,
    )  # fmt: skip


def _channel(keys: _Keys, formats: _Formats, index: int) -> Layer:
    kind = str(keys.get("model_type"))
    width = keys.count("hidden_size", "n_embd", "d_model")
    experts = keys.count("n_routed_experts", "num_local_experts", "num_experts", default=0, least=0)
    if not experts or not _routed(keys, index):
        dense = keys.get("intermediate_size_mlp") if kind == "llama4_text" else None
        inner = int(dense) if dense else keys.count("intermediate_size", "n_inner", default=4 * width)
        return GatedMLP(width, inner, formats.dense)
    inner = keys.count("moe_intermediate_size", "intermediate_size")
    shared = keys.count("shared_expert_intermediate_size", default=0, least=0)
    if keys.get("n_shared_experts"):
        shared = keys.count("n_shared_experts") * inner
    if kind == "llama4_text":
        shared = inner
    top = keys.count("num_experts_per_tok", "num_experts_per_token", "experts_per_token")
    if top > experts:
        message = f"{keys.name}: {top} experts per token of {experts} experts; correct the config"
        raise ValueError(message)
    return MoE(
        hidden_size=width, num_experts=experts, num_experts_per_tok=top, moe_intermediate_size=inner,
        shared_intermediate_size=shared, router_bias=kind == "gpt_oss", expert_bias=kind == "gpt_oss",
        shared_gate=kind in ("qwen2_moe", "qwen3_next"), weight=formats.dense, expert_weight=formats.experts,
    )  # fmt: skip


def _routed(keys: _Keys, index: int) -> bool:
    """Whether layer `index` has experts."""
    if keys.get("moe_layers"):
        return index in keys.listing("moe_layers")
    if index in keys.listing("mlp_only_layers"):
        return False
    if index < keys.count("first_k_dense_replace", default=0, least=0):
        return False
    every = keys.count("interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_freq", default=1) if not isinstance(
        keys.get("moe_layer_freq"), list
    ) else 1  # fmt: skip
    return (index + 1) % every == 0


def _reach(keys: _Keys) -> Reach:
    scaling = keys.mapping("rope_scaling") or keys.mapping("rope_parameters")
    chunks = keys.mapping("dual_chunk_attention_config")
    before = {**chunks, **{k: v for k, v in scaling.items() if v is not None}}
    trained = _Keys(before, keys.name).count("original_max_position_embeddings", default=0, least=0)
    declared = keys.count("max_position_embeddings", "max_seq_len", "n_positions", default=0, least=0) or None
    rope = {k: v for k, v in scaling.items() if v is not None}
    if keys.get("rope_theta") is not None:
        rope.setdefault("rope_theta", keys.get("rope_theta"))
    if chunks:
        rope["dual_chunk_attention_config"] = dict(chunks)
    return Reach(declared, trained or None, rope)


class _Formats:
    """How a checkpoint stores its modules, from `quantization_config` and its ignore list."""

    def __init__(self, config: Config, name: str, warnings: list[str]) -> None:
        plain = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
        short = {"float16": "fp16", "float32": "fp32"}.get(plain, "bf16")
        # engines load fp32 checkpoints in half precision
        self.plain = WEIGHT_FORMATS["fp16" if short == "fp16" else "bf16"]
        self.cache: CacheFormat = CACHE_FORMATS["fp16" if short == "fp16" else "bf16"]
        found = config.get("quantization_config")
        quantized = found if isinstance(found, Mapping) else {}
        self.method = "none"
        weight = self.plain
        if quantized:
            weight, self.method = _checkpoint_format(quantized, name, warnings, self.plain)
        reader = _Keys(quantized, name)
        ignored = [str(x) for x in reader.listing("modules_to_not_convert") or reader.listing("ignore")]
        whole = any(word in entry for entry in ignored for word in ("self_attn", "attn*"))
        self.attention = self.plain if whole else weight
        self.dense = self.plain if self.method == "mxfp4" else weight
        self.experts = weight
        scheme = quantized.get("kv_cache_quant_algo") or quantized.get("kv_cache_scheme") or ""
        if isinstance(scheme, Mapping):
            scheme = scheme.get("num_bits", "")
        if str(scheme).lower() in ("fp8", "8"):
            self.cache = CACHE_FORMATS["fp8"]


def _checkpoint_format(quantized: Config, name: str, warnings: list[str], plain: WeightFormat) -> tuple[WeightFormat, str]:
    method = str(quantized.get("quant_method") or "").lower()
    algorithm = str(quantized.get("quant_algo") or "").upper()
    if method == "fp8":
        return WEIGHT_FORMATS["fp8_block" if quantized.get("weight_block_size") else "fp8"], "fp8"
    if method == "mxfp4":
        return WEIGHT_FORMATS["mxfp4"], "mxfp4"
    if method == "modelopt" or algorithm:
        if "NVFP4" in algorithm:
            return WEIGHT_FORMATS["nvfp4"], "nvfp4"
        if "FP8" in algorithm:
            return WEIGHT_FORMATS["fp8"], "fp8"
    if method in ("awq", "gptq"):
        return WEIGHT_FORMATS["int4"], method
    if method == "compressed-tensors":
        groups = _Keys(quantized, name).mapping("config_groups")
        weights = [_Keys(_Keys(groups, name).mapping(group), name).mapping("weights") for group in groups]
        bits = {group.get("num_bits"): group.get("type") for group in weights}
        if set(bits) == {8}:
            return WEIGHT_FORMATS["fp8" if bits[8] == "float" else "int8"], "compressed-tensors"
        if set(bits) == {4}:
            return WEIGHT_FORMATS["nvfp4" if bits[4] == "float" else "int4"], "compressed-tensors"
    warnings.append(f"{name}: quantization {method or algorithm or 'unnamed'} is not known; weights counted as {plain.name} (an upper bound)")
    return plain, method or "unknown"


def with_formats(model: ModelSpec, weights: str | None, cache: str | None) -> ModelSpec:
    """The model with weights or cache stored as asked, or as its checkpoint says."""
    from simulator.dtypes import cache_format, weight_format  # noqa: PLC0415 (names parsed at the edge only)

    changed = model.with_formats(
        weight=weight_format(weights) if weights else None, cache=cache_format(cache) if cache else None
    )
    latent = all(isinstance(mixer, LatentAttention) for _, mixer in model.mixers)
    if changed.cache.latent_only and not latent:
        message = f"cache format {cache}: only for models with a latent cache (MLA); use fp8 or bf16 for {model.name}"
        raise ValueError(message)
    return replace(changed, quantization=weights) if weights else changed


__all__ = ["W_BF16", "catalog", "find", "load_model", "read_config", "with_formats"]
