"""The mixer of every layer, from the keys that lay a stack out.

Layouts are told by: hybrid_override_pattern (a letter a layer), block_configs (a search's own choice per layer),
compress_ratios, linear_attn_config, attn_type_list, attn_layer_period, mb_per_layer, layer_types,
full_attention_interval, indexer_types, no_rope_layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simulator.dtypes import BF16, FP16, FP32, DType
from simulator.hf.formats import Formats
from simulator.hf.keys import Keys
from simulator.kernels.attention import Causal, Chunked, DualChunk, Mask, Sinks, Window
from simulator.kernels.sparse_attention import Banded, BigBird
from simulator.layers import (
    Attention,
    CompressedAttention,
    GatedDeltaNet,
    IndexedLatentAttention,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    LightningAttention,
    Linear,
    Mamba,
    Mamba2,
    Mixer,
    MixtureOfBlockAttention,
    NativeSparseAttention,
    ParallelMixers,
    ShortConv,
)  # fmt: skip

#: Layers of nemotron_h by letter; a channel mixer's letter is read in `channels`.
LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}

#: What entries of `layer_types` mean.
TYPES = {
    "full_attention": "attention", "attention": "attention", "sliding_attention": "sliding", "chunked_attention": "chunked",
    "linear_attention": "linear", "conv": "conv", "mamba": "mamba", "mamba2": "mamba2", "moe": "moe", "mlp": "mlp",
    "deepseek_sparse_attention": "attention", "indexed_attention": "attention", "lightning_attention": "lightning",
    "compressed_sparse_attention": "attention", "heavily_compressed_attention": "attention", "hybrid": "parallel",
}  # fmt: skip


def layout(keys: Keys, layers: int) -> list[str]:
    """What every layer is: attention, sliding, chunked, linear, lightning, mamba, mamba2, conv, none, mlp, moe, or an
    unknown type as the config calls it.
    """
    pattern = keys.text("hybrid_override_pattern")
    if pattern:
        if len(pattern) != layers or set(pattern) - set(LETTERS):
            letters = ", ".join(sorted(LETTERS))
            message = f"{keys.name}: hybrid_override_pattern has {len(pattern)} letters for {layers} layers; write one of {letters} per layer"
            raise ValueError(message)
        return [LETTERS[letter] for letter in pattern]
    kinds = keys.listing("attn_type_list")
    if kinds:
        return ["attention" if kind else "lightning" for kind in keys.by_layer("attn_type_list", layers)]
    linear = keys.mapping("linear_attn_config")
    if linear or keys.flag("kda"):
        full = Keys(linear, keys.name).listing("full_attn_layers") or [i + 1 for i in range(1, layers) if i % 4 == 0]
        return ["attention" if i + 1 in full else "linear" for i in range(layers)]
    if keys.get("only"):
        return [keys.text("only")] * layers
    if keys.get("attn_layer_period"):
        period, offset = keys.count("attn_layer_period"), keys.count("attn_layer_offset", default=0, least=0)
        return ["attention" if i % period == offset else "mamba" for i in range(layers)]
    if keys.get("mb_per_layer"):
        every = keys.count("mb_per_layer")
        return ["mamba" if i % every == 0 else "sliding" for i in range(layers)]
    if keys.flag("parallel_mamba"):
        return ["parallel"] * layers
    if keys.kind == "lfm2":
        full = keys.listing("full_attn_idxs")
        if full:
            return ["attention" if i in full else "conv" for i in range(layers)]
    types = [str(kind) for kind in keys.listing("layer_types")]
    if len(types) == layers and keys.kind != "smollm3":
        return [TYPES.get(kind, kind) for kind in types]
    if keys.get("linear_num_value_heads"):
        every = keys.count("full_attention_interval", default=4)
        return ["attention" if (i + 1) % every == 0 else "linear" for i in range(layers)]
    return [_windowed(keys, i) for i in range(layers)]


def _windowed(keys: Keys, index: int) -> str:
    """Full, sliding or chunked attention where only conventions of the class tell them apart."""
    if keys.flag("chunked_layers"):
        return "chunked" if rotates(keys, index) else "attention"
    uses = keys.flag("use_sliding_window", default=True)
    if not keys.get("sliding_window") or not uses:
        return "attention"
    rule = keys.text("windowed_layers")
    if rule == "even":
        return "sliding" if index % 2 == 0 else "attention"
    if rule == "pattern":
        return "attention" if (index + 1) % keys.count("sliding_window_pattern") == 0 else "sliding"
    if keys.flag("window_from_layer"):
        return "sliding" if index >= keys.count("max_window_layers", default=0, least=0) else "attention"
    return "sliding"


def rotates(keys: Keys, index: int) -> bool:
    """Whether a layer rotates queries and keys."""
    if not keys.flag("rotary", default=True):
        return False
    if not keys.flag("nope_layers"):
        return True
    layers = keys.count("num_hidden_layers")
    pattern = keys.listing("no_rope_layers")
    if pattern and len(pattern) != layers:
        message = f"{keys.name}: no_rope_layers has {len(pattern)} entries for {layers} layers; correct the config"
        raise ValueError(message)
    every = keys.count("no_rope_layer_interval", default=4)
    return bool(pattern[index]) if pattern else (index + 1) % every != 0


def mixer(keys: Keys, formats: Formats, what: str, index: int) -> Layer | None:
    """The mixer of layer `index`, None where there is none, full attention where `what` is not known."""
    if keys.listing("block_configs"):
        return _searched(keys, formats, keys.entry("block_configs", index), index)
    if what in ("mlp", "moe", "none"):
        return None
    return READERS.get(what, _attention_like)(keys, formats, what, index)


def _attention_like(keys: Keys, formats: Formats, what: str, index: int) -> Layer:
    if keys.get("compress_ratios") is not None:
        return _compressed(keys, formats, index)
    if keys.get("kv_lora_rank"):
        return _latent(keys, formats, index)
    if keys.get("moba_topk"):
        return _moba(keys, formats, index)
    if keys.kind == "nsa":
        return _native_sparse(keys, formats, index)
    return _attention(keys, formats, what, index)


def _heads(keys: Keys) -> tuple[int, int, int, int]:
    """Width, heads, key-value heads, head width."""
    width, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    shared = keys.count("num_key_value_heads", default=heads)
    if heads % shared:
        message = f"{keys.name}: {heads} attention heads do not divide over {shared} key-value heads; correct the config"
        raise ValueError(message)
    return width, heads, shared, keys.count("head_dim", default=max(1, width // heads))


def _rotary_dim(keys: Keys, head_dim: int, index: int) -> int:
    if not rotates(keys, index):
        return 0
    if keys.get("rotary_dim"):
        return min(keys.count("rotary_dim"), head_dim)
    partial = keys.get("partial_rotary_factor") or keys.mapping("rope_parameters").get("partial_rotary_factor") or 1.0
    return int(head_dim * keys.share(partial, "partial_rotary_factor"))


def _attention(keys: Keys, formats: Formats, what: str, index: int) -> Attention:
    width, heads, shared, head_dim = _heads(keys)
    return Attention(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=shared, head_dim=head_dim, mask=_mask(keys, what, index),
        rotary_dim=_rotary_dim(keys, head_dim, index), attention_bias=keys.flag("attention_bias"),
        output_bias=keys.flag("output_bias") and keys.flag("attention_bias"),
        qk_norm=keys.text("qk_norm") == "head" or (keys.text("qk_norm") == "asked" and keys.flag("use_qk_norm")), qk_norm_full=keys.text("qk_norm") == "full",
        learned_sinks=keys.flag("learned_sinks"), weight=formats.of("attention", index),
        output_gate=keys.flag("attn_output_gate", default=keys.flag("output_gate")),
        global_projections=keys.get("attention_window") is not None, norm_parameters=keys.count("norm_parameters", default=1),
    )  # fmt: skip


def _mask(keys: Keys, what: str, index: int) -> Mask:
    if keys.text("encoder") == "bare":
        windows = keys.get("attention_window")
        if isinstance(windows, list):
            windows = keys.by_layer("attention_window", keys.count("num_hidden_layers"))[index] if windows else 1
        return Banded(Keys({"attention_window": windows}, keys.name).count("attention_window"), 1)
    if keys.text("encoder") == "scored" and keys.text("attention_type") == "block_sparse":
        return BigBird(keys.count("block_size"), keys.count("num_random_blocks"))
    if what == "sliding":
        return Window(keys.count("sliding_window"))
    if what == "chunked":
        return Chunked(keys.count("attention_chunk_size"))
    dual = Keys(keys.mapping("dual_chunk_attention_config"), keys.name)
    return DualChunk(dual.count("chunk_size"), dual.count("local_size", default=0, least=0)) if dual.config else Causal()


def _latent(keys: Keys, formats: Formats, index: int) -> LatentAttention:
    rank = keys.get("q_lora_rank")
    common: dict[str, Any] = {
        "hidden_size": keys.count("hidden_size"), "num_attention_heads": keys.count("num_attention_heads"),
        "q_lora_rank": keys.count("q_lora_rank") if rank else None, "kv_lora_rank": keys.count("kv_lora_rank"),
        "qk_nope_head_dim": keys.count("qk_nope_head_dim"), "qk_rope_head_dim": keys.count("qk_rope_head_dim"),
        "v_head_dim": keys.count("v_head_dim"), "rotary": not keys.flag("mla_use_nope"), "weight": formats.of("attention", index),
    }  # fmt: skip
    if not keys.get("index_n_heads"):
        return LatentAttention(**common)
    kinds = keys.by_layer("indexer_types", keys.count("num_hidden_layers"))
    return IndexedLatentAttention(
        **common, index_n_heads=keys.count("index_n_heads"), index_head_dim=keys.count("index_head_dim"), index_topk=keys.count("index_topk"),
        indexer_shared=bool(kinds) and str(kinds[index]) == "shared", index_weight=formats.of("indexer", index),
    )  # fmt: skip


def _compressed(keys: Keys, formats: Formats, index: int) -> CompressedAttention:
    ratios = keys.by_layer("compress_ratios", keys.count("num_hidden_layers"))
    ratio = Keys({"compress_ratios": ratios[index] if ratios else 0}, keys.name).count("compress_ratios", default=0, least=0)
    return CompressedAttention(
        hidden_size=keys.count("hidden_size"), num_attention_heads=keys.count("num_attention_heads"), head_dim=keys.count("head_dim"),
        qk_rope_head_dim=keys.count("qk_rope_head_dim"), q_lora_rank=keys.count("q_lora_rank"), o_groups=keys.count("o_groups"),
        o_lora_rank=keys.count("o_lora_rank"), sliding_window=keys.count("sliding_window"), compress_ratio=ratio,
        index_n_heads=keys.count("index_n_heads"), index_head_dim=keys.count("index_head_dim"), index_topk=keys.count("index_topk"),
        weight=formats.of("attention", index),
    )  # fmt: skip


def _moba(keys: Keys, formats: Formats, index: int) -> MixtureOfBlockAttention:
    width, heads, shared, head_dim = _heads(keys)
    return MixtureOfBlockAttention(
        width, heads, shared, head_dim, keys.count("moba_chunk_size"), keys.count("moba_topk"), _rotary_dim(keys, head_dim, index),
        formats.of("attention", index),
    )  # fmt: skip


def _native_sparse(keys: Keys, formats: Formats, index: int) -> NativeSparseAttention:
    width, heads, shared, head_dim = _heads(keys)
    block = keys.count("block_size", default=64)
    return NativeSparseAttention(
        width, heads, shared, head_dim, head_dim, compress_block=block, compress_stride=block, select_block=block,
        select_blocks=keys.count("block_counts", default=16), sliding_window=keys.count("window_size", default=512),
        rotary_dim=_rotary_dim(keys, head_dim, index), weight=formats.of("attention", index),
    )  # fmt: skip


def _state_dtype(keys: Keys, default: DType) -> DType:
    """The recurrent state's element type: what the config names, else the engine's default."""
    named = keys.text("mamba_ssm_dtype") or keys.text("mamba_ssm_cache_dtype")
    return {"float32": FP32, "bfloat16": BF16, "float16": FP16}.get(named.removeprefix("torch."), default)


def _linear(keys: Keys, formats: Formats, what: str, index: int) -> Layer:
    if keys.flag("kda") or keys.mapping("linear_attn_config"):
        own = Keys(keys.mapping("linear_attn_config"), keys.name)
        return KimiDeltaAttention(
            keys.count("hidden_size"), own.count("num_heads", default=keys.count("linear_num_heads", default=32)),
            own.count("head_dim", default=keys.count("linear_head_dim", default=128)),
            own.count("short_conv_kernel_size", default=keys.count("linear_conv_kernel_dim", default=4)), _state_dtype(keys, FP32),
            formats.of("linear", index),
        )  # fmt: skip
    if keys.get("linear_num_value_heads"):
        return GatedDeltaNet(
            keys.count("hidden_size"), keys.count("linear_num_key_heads"), keys.count("linear_num_value_heads"),
            keys.count("linear_key_head_dim"), keys.count("linear_value_head_dim"), keys.count("linear_conv_kernel_dim"),
            _state_dtype(keys, BF16), formats.of("linear", index),
        )  # fmt: skip
    if keys.get("lightning_block"):
        return _lightning(keys, formats, what, index)
    return _attention(keys, formats, "attention", index)


def _lightning(keys: Keys, formats: Formats, what: str, index: int) -> Layer:  # noqa: ARG001 (one signature)
    width, heads, _, head_dim = _heads(keys)
    return LightningAttention(width, heads, head_dim, keys.count("lightning_block", default=256), BF16, formats.of("linear", index))


def _mamba(keys: Keys, formats: Formats, what: str, index: int) -> Layer:  # noqa: ARG001 (one signature)
    width = keys.count("hidden_size")
    expand = keys.number("mamba_expand", keys.number("expand", 2.0))
    inner = max(1, int(expand * width))
    if keys.kind in ("mamba", "ov_mamba", "falcon_mamba"):
        inner = keys.count("intermediate_size", default=inner)
    rank = next((n for n in ("mamba_dt_rank", "time_step_rank") if keys.get(n) not in (None, "auto")), "")
    return Mamba(
        width, inner, keys.count("mamba_d_state", "state_size", "ssm_state_size", default=16),
        keys.count("mamba_d_conv", "conv_kernel", default=4), keys.count(rank) if rank else -(-width // 16),
        use_conv_bias=keys.flag("mamba_conv_bias", default=keys.flag("use_conv_bias", default=True)),
        use_bias=keys.flag("mamba_proj_bias", default=keys.flag("use_bias")), inner_norms=keys.flag("inner_norms"),
        ssm_dtype=_state_dtype(keys, BF16), weight=formats.of("linear", index),
    )  # fmt: skip


def _mamba2(keys: Keys, formats: Formats, what: str, index: int) -> Layer:  # noqa: ARG001 (one signature)
    width = keys.count("hidden_size")
    head_dim = keys.count("mamba_head_dim", "mamba_d_head", "head_dim", default=64)
    heads = keys.count("mamba_num_heads", "mamba_n_heads", "num_heads", default=max(1, int(keys.number("expand", 2.0) * width) // head_dim))
    return Mamba2(
        width, heads, head_dim, keys.count("ssm_state_size", "mamba_d_state", "state_size", default=128),
        keys.count("n_groups", "mamba_n_groups", default=1), keys.count("conv_kernel", "mamba_d_conv", default=4),
        keys.count("chunk_size", "mamba_chunk_size", default=256), keys.flag("use_conv_bias", default=True), _state_dtype(keys, BF16),
        formats.of("linear", index),
    )  # fmt: skip


def _conv(keys: Keys, formats: Formats, what: str, index: int) -> Layer:  # noqa: ARG001 (one signature)
    return ShortConv(keys.count("hidden_size"), keys.count("conv_L_cache"), keys.flag("conv_bias"), formats.of("linear", index))


def _parallel(keys: Keys, formats: Formats, what: str, index: int) -> Layer:
    branches: tuple[Mixer, ...] = (_attention(keys, formats, "attention", index), _mamba2(keys, formats, what, index))  # type: ignore[assignment]
    return ParallelMixers(branches)


def _searched(keys: Keys, formats: Formats, block: Keys, index: int) -> Layer | None:
    """One entry of block_configs: no attention, a plain projection, or attention with its own groups and window."""
    found = Keys(block.mapping("attention"), keys.name)
    if found.flag("no_op"):
        return None
    if found.flag("replace_with_linear"):
        return Linear(keys.count("hidden_size"), formats.of("attention", index))
    group = found.count("n_heads_in_group")
    own = keys.only(num_key_value_heads=max(1, keys.count("num_attention_heads") // group))
    layer = _attention(own, formats, "attention", index)
    window, sinks = found.count("window_length", default=0, least=0), found.count("num_sink_tokens", default=0, least=0)
    if not window:
        return layer
    mask: Mask = Sinks(sinks, window) if sinks else Window(window)
    return Attention(layer.hidden_size, layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim, mask, layer.rotary_dim, weight=layer.weight)


READERS: dict[str, Callable[[Keys, Formats, str, int], Layer]] = {
    "attention": _attention_like, "sliding": _attention_like, "chunked": _attention_like, "linear": _linear, "lightning": _lightning,
    "mamba": _mamba, "mamba2": _mamba2, "conv": _conv, "parallel": _parallel,
}  # fmt: skip

__all__ = ["LETTERS", "READERS", "TYPES", "layout", "mixer", "rotates"]
