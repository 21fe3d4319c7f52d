"""The channel mixer of every layer: gated or plain MLP, experts."""

from __future__ import annotations

from simulator.hf.formats import Formats
from simulator.hf.keys import MAX_COUNT, Keys
from simulator.layers import MLP, GatedMLP, Layer, MoE

#: DeciLM rounds a searched width up to a multiple of this.
_SEARCHED_MULTIPLE = 256


def channel(keys: Keys, formats: Formats, what: str, index: int) -> Layer | None:
    """The channel mixer of layer `index`, None where there is none."""
    if keys.flag("single"):
        # one sub-block a layer
        return _experts(keys, formats, index) if what == "moe" else _dense(keys, formats, index) if what == "mlp" else None
    if keys.get("only"):
        return None
    blocks = keys.listing("block_configs")
    if blocks:
        return _searched(keys, formats, index)
    if keys.count("num_experts", default=0, least=0) and routed(keys, index):
        return _experts(keys, formats, index)
    return _dense(keys, formats, index)


def _dense(keys: Keys, formats: Formats, index: int) -> Layer:
    width = keys.count("hidden_size")
    names = ("intermediate_size_mlp", "intermediate_size") if keys.kind == "llama4_text" else ("intermediate_size",)
    inner = keys.count(*names, default=keys.count("expansion_ratio", default=4) * width)
    stored, norms = formats.of("dense", index), keys.count("norm_parameters", default=1)
    if keys.text("mlp", "gated") == "plain":
        return MLP(width, inner, keys.flag("mlp_bias"), stored, norms)
    return GatedMLP(width, inner, stored, norms)


def _searched(keys: Keys, formats: Formats, index: int) -> Layer | None:
    """One entry of block_configs: width = 2/3 x ffn_mult x D, rounded up to 256."""
    found = Keys(keys.entry("block_configs", index).mapping("ffn"), keys.name)
    if found.flag("no_op"):
        return None
    width = keys.count("hidden_size")
    inner = int(2 * found.number("ffn_mult", 4.0, most=MAX_COUNT / width) * width / 3)
    if inner < 1:
        message = f"{keys.name}: ffn_mult = {found.get('ffn_mult')!r} leaves no width; correct the config"
        raise ValueError(message)
    return GatedMLP(width, -(-inner // _SEARCHED_MULTIPLE) * _SEARCHED_MULTIPLE, formats.of("dense", index))


def _experts(keys: Keys, formats: Formats, index: int) -> MoE:
    inner = keys.count("moe_intermediate_size", "intermediate_size")
    shared = keys.count("shared_expert_intermediate_size", default=0, least=0)
    if keys.get("n_shared_experts") and not shared:
        shared = keys.count("n_shared_experts") * inner
    if keys.kind == "llama4_text":
        shared = inner
    experts, top = keys.count("num_experts"), keys.count("num_experts_per_tok")
    if top > experts:
        message = f"{keys.name}: {top} experts per token of {experts} experts; correct the config"
        raise ValueError(message)
    stored = formats.of("dense", index)
    return MoE(
        hidden_size=keys.count("hidden_size"), num_experts=experts, num_experts_per_tok=top, moe_intermediate_size=inner,
        shared_intermediate_size=shared, router_bias=keys.flag("router_bias"), expert_bias=keys.flag("expert_bias"),
        shared_gate=keys.flag("shared_gate", default=keys.kind == "qwen2_moe") and shared > 0, weight=stored,
        expert_weight=formats.of("experts", index), gated=keys.text("mlp", "gated") == "gated",
        latent_size=keys.count("moe_latent_size", default=0, least=0) or None, hash_routed=index < keys.count("num_hash_layers", default=0, least=0),
        shared_weight=formats.of("shared", index) if shared else None,
    )  # fmt: skip


def routed(keys: Keys, index: int) -> bool:
    """Whether layer `index` has experts."""
    kinds = keys.listing("mlp_layer_types")
    if len(kinds) > index:
        return str(kinds[index]) in ("sparse", "moe", "hash_moe")
    if keys.get("moe_layers"):
        return index in keys.listing("moe_layers")
    if index in keys.listing("mlp_only_layers"):
        return False
    if index < keys.count("first_k_dense_replace", default=0, least=0):
        return False
    if keys.get("expert_layer_period"):
        return index % keys.count("expert_layer_period") == keys.count("expert_layer_offset", default=0, least=0)
    per_layer = isinstance(keys.get("moe_layer_freq"), list)
    if per_layer:
        kinds = keys.by_layer("moe_layer_freq", keys.count("num_hidden_layers"))
        return bool(kinds[index]) if kinds else True
    every = keys.count("interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_freq", default=1)
    return (index + 1) % every == 0
