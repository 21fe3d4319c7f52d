"""A whole config -> ModelSpec: wrappers, the run of blocks, both ends, what is left out and what is not known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simulator.dtypes import cache_format, weight_format
from simulator.hf.channels import channel
from simulator.hf.formats import Formats
from simulator.hf.keys import MAX_LAYERS, Config, Keys, with_defaults
from simulator.hf.mixers import READERS, layout, mixer
from simulator.hf.position import encoding
from simulator.layers import CompressedAttention, Embedding, Head, HyperConnection, Layer
from simulator.layers.layer import is_mixer
from simulator.model import Block, ModelSpec, Reach

_WRAPPERS = ("text_config", "llm_config", "language_config")
_KEPT_OF_WRAPPER = ("quantization_config", "torch_dtype", "dtype", "tie_word_embeddings")

#: Words in a key's name that announce a way to mix tokens.
_ANNOUNCES = re.compile(
    r"(mamba|(^|_)ssm|rwkv|retention|hyena|delta|lightning|linear_attn|linear_attention|sparse|moba|(^|_)nsa(_|$)|compress|recurrent"
    r"|(^|_)conv(_|$)|state_size|attn_type|attention_type|layer_types|layers_block_type|hybrid|(^|_)index|chunk_size|kv_shar)"
)

#: Keys of that sort whose meaning is read, or that change nothing counted here.
_UNDERSTOOD = frozenset((
    "attn_type_list", "attention_type", "layer_types", "hybrid_override_pattern", "linear_attn_config", "compress_ratios",
    "compress_rope_theta", "compress_rope_parameters", "compress_rates", "index_topk", "index_n_heads", "index_head_dim", "indexer_types",
    "indexer_rope_interleave",
    "index_share_for_mtp_iteration", "index_skip_topk_offset", "index_topk_freq", "index_topk_pattern", "conv_kernel", "conv_L_cache", "conv_bias",
    "linear_conv_kernel_dim", "chunk_size", "attention_chunk_size", "moba_chunk_size", "moba_topk", "state_size", "ssm_state_size", "ssm_cfg",
    "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_conv_bias", "mamba_proj_bias", "mamba_head_dim", "mamba_num_heads",
    "mamba_hidden_act", "mamba_ssm_dtype", "mamba_ssm_cache_dtype", "mamba_d_ssm", "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_chunk_size",
    "mamba_norm_before_gate", "mamba_rms_norm", "use_mamba_kernels", "use_conv_bias", "mtp_hybrid_override_pattern", "decoder_sparse_step", "mlp_layer_types",
    "ssm_multipliers", "ssm_in_multiplier", "ssm_out_multiplier", "layernorm_linear_attention_alpha", "layernorm_linear_attention_beta", "parallel_mamba",
    "for_llm_compressor",
))  # fmt: skip


def read_config(config: Config, name: str) -> ModelSpec:
    """The model a config describes."""
    warnings: list[str] = []
    config = _unwrapped(config, warnings)
    keys = Keys(with_defaults(config), name)
    width, vocabulary, layers = keys.count("hidden_size"), keys.count("vocab_size"), keys.count("num_hidden_layers")
    if layers > MAX_LAYERS:
        message = f"{name}: num_hidden_layers = {layers} is more than {MAX_LAYERS:,}; correct the config"
        raise ValueError(message)
    formats = Formats(keys.config, name, warnings)
    plan = layout(keys, layers)
    unknown = _unknown(config, plan)
    streams = keys.count("hc_mult", default=1)
    blocks = [_block(keys, formats, what, i, streams) for i, what in enumerate(plan)]
    spec = ModelSpec(
        name=name, hidden_size=width, vocab_size=vocabulary, blocks=_runs(blocks), embedding=_embedding(keys, formats),
        head=_head(keys, formats), cache=formats.cache, checkpoint_cache=formats.cache, reach=_reach(keys),
        model_type=keys.kind, quantization=formats.method, streams=streams, extra=_extra(keys, blocks),
    )  # fmt: skip
    if unknown.keys:
        bare = [tuple(x for x in b if not (is_mixer(x) and i in unknown.layers)) for i, b in enumerate(blocks)]
        spec = replace(spec, floor=replace(spec, blocks=_runs(bare)))
        warnings.append(_told(spec, unknown))
    return replace(spec, warnings=tuple(warnings))


def _unwrapped(config: Config, warnings: list[str]) -> Config:
    """The text model inside a multimodal wrapper."""
    for wrapper in _WRAPPERS:
        inner = config.get(wrapper)
        if isinstance(inner, Mapping):
            left = sorted(k for k in config if k.endswith("_config") and k not in (wrapper, "quantization_config", "generation_config"))
            if left:
                warnings.append(f"text model only: {', '.join(left)} left out (weights and tokens of other modalities are not counted)")
            return {**{k: v for k, v in config.items() if k in _KEPT_OF_WRAPPER}, **inner}
    return config


class _Unknown:
    """Keys that announce mixers not known here, and the layers they may concern."""

    def __init__(self, keys: list[str], layers: set[int]) -> None:
        self.keys, self.layers = keys, layers


def _unknown(config: Config, plan: list[str]) -> _Unknown:
    named = sorted(k for k, v in config.items() if v not in (None, False, 0) and _ANNOUNCES.search(str(k)) and k not in _UNDERSTOOD)
    strange = {i for i, what in enumerate(plan) if what not in READERS and what not in ("mlp", "moe", "none")}
    if strange:
        kinds = ", ".join(sorted({plan[i] for i in strange}))
        return _Unknown([f"layer_types ({kinds})", *named], strange)
    return _Unknown(named, set(range(len(plan))) if named else set())


def _told(spec: ModelSpec, unknown: _Unknown) -> str:
    least, most = spec.floor.slope() if spec.floor is not None else 0.0, spec.slope()
    return (
        f"not modelled: {', '.join(unknown.keys)}; {len(unknown.layers)} of {spec.num_layers} layers count as full attention: the cache takes "
        f"between {least:,.0f} (those layers keep nothing) and {most:,.0f} B/token (they keep every token), attention work likewise"
    )


def _block(keys: Keys, formats: Formats, what: str, index: int, streams: int) -> Block:
    parts: list[Layer] = [layer for layer in (mixer(keys, formats, what, index), channel(keys, formats, what, index)) if layer is not None]
    if streams > 1:
        width = keys.count("hidden_size")
        return tuple(layer for part in parts for layer in (HyperConnection(width, streams), part))
    return tuple(parts)


def _runs(blocks: list[Block]) -> tuple[tuple[int, Block], ...]:
    runs: list[tuple[int, Block]] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0] + 1, block)
        else:
            runs.append((1, block))
    return tuple(runs)


def _embedding(keys: Keys, formats: Formats) -> Embedding:
    return Embedding(
        keys.count("vocab_size"), keys.count("hidden_size"), formats.plain,
        positions=keys.count("max_position_embeddings", default=0, least=0) if keys.flag("positions") else 0,
        token_types=keys.count("type_vocab_size", default=0, least=0),
        norm_parameters=keys.count("embedding_norm_parameters", default=0, least=0),
    )  # fmt: skip


def _head(keys: Keys, formats: Formats) -> Head:
    encoder = keys.text("encoder")
    return Head(
        keys.count("vocab_size"), keys.count("hidden_size"), keys.flag("tie_word_embeddings"), formats.head,
        norm_parameters=keys.count("final_norm_parameters", default=1, least=0), transform=encoder == "scored", pooler=bool(encoder),
        scores=encoder != "bare", hc_mult=keys.count("hc_mult", default=1),
    )  # fmt: skip


def _extra(keys: Keys, blocks: list[Block]) -> tuple[tuple[int, Block], ...]:
    """Multi-token prediction modules, each like the last block (DeepSeek-V3's and its kin) but for its own entry of compress_ratios
    (DeepSeek-V4's: 0, a window alone); a joining projection of 2 D x D is not counted.
    """
    count = keys.count("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers", default=0, least=0)
    if not count or not blocks:
        return ()
    ratios = keys.listing("compress_ratios")
    own = ratios[len(blocks)] if len(ratios) > len(blocks) else None
    return ((count, tuple(replace(x, compress_ratio=own) if own is not None and isinstance(x, CompressedAttention) else x for x in blocks[-1])),)


def _reach(keys: Keys) -> Reach:
    scaling = keys.mapping("rope_scaling") or keys.mapping("rope_parameters")
    chunks = keys.mapping("dual_chunk_attention_config")
    before = {**chunks, **{k: v for k, v in scaling.items() if v is not None}}
    trained = Keys(before, keys.name).count("original_max_position_embeddings", default=0, least=0)
    declared = keys.count("max_position_embeddings", default=0, least=0) or None
    rope: dict[str, Any] = {k: v for k, v in scaling.items() if v is not None}
    if keys.get("rope_theta") is not None:
        rope.setdefault("rope_theta", keys.get("rope_theta"))
    if chunks:
        rope["dual_chunk_attention_config"] = dict(chunks)
    return Reach(declared, trained or None, rope, encoding(keys))


def with_formats(model: ModelSpec, weights: str | None, cache: str | None) -> ModelSpec:
    """The model with weights or cache stored as asked, or as its checkpoint says."""
    changed = model.with_formats(
        weight=weight_format(weights) if weights else None, cache=cache_format(cache) if cache else None
    )
    refused = changed.cache.refusal(changed.cache_rows())
    if refused:
        message = f"cache format {changed.cache.name}: {refused} for {model.name}"
        raise ValueError(message)
    return replace(changed, quantization=weights) if weights else changed
