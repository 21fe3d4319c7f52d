"""The same request across models, and across ways to share keys and values.

Quantities need no GPU: parameters, what a sequence keeps, the work of a prefill and of one more token on one device that holds all.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator import reach
from simulator.dtypes import DTYPES, CacheFormat
from simulator.kernels.attention import Causal, Segment
from simulator.layers import Attention, IndexedLatentAttention, LatentAttention, MoE
from simulator.layers.layer import Keep, Layer, Mixer, parameters
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import Decode, Prefill, System
from simulator.units import Bytes, Count, Flops
from simulator.work import Leaf, Quantity, Together, fold, quantity

_NOTHING = (Segment(0.0, 0.0, 0.0),)


def active_parameters(model: ModelSpec) -> Count:
    """Weights one token meets: of each layer's experts those it is sent to, everything else, both embedding matrices."""
    total: Count = 0.0
    for count, layer in model.counted:
        held = layer.whole(_NOTHING)
        if isinstance(layer, MoE):
            held = held._replace(experts=float(layer.num_experts_per_tok))
        total = total + count * parameters(layer, held)
    return total


@dataclass(frozen=True, slots=True)
class Quantities:
    """What a model costs at one context, before any GPU is named."""

    model: ModelSpec
    context: int
    parameters: float
    active: float
    cache_bytes_per_token: float
    cache_fixed_bytes: float
    cache_bytes: float
    prefill_flops: float
    decode_flops: float
    decode_bytes: float


def quantities(model: ModelSpec, context: int) -> Quantities:
    """One prompt of `context` tokens prefilled whole, then one more token; useful FLOPs, compulsory bytes."""
    system, tokens = System(model, Layout()), float(context)
    (prefill,) = fold(system.work(Prefill(tokens)), Together(quantity("model_flops")))
    decode, moved = fold(system.work(Decode(tokens)), Together(quantity("model_flops"), quantity("hbm_bytes")))
    total, slope = float(model.cache_bytes(tokens)), float(model.slope())
    return Quantities(
        model=model, context=context, parameters=float(model.parameters()), active=float(active_parameters(model)),
        cache_bytes_per_token=slope, cache_fixed_bytes=float(model.constant()), cache_bytes=total, prefill_flops=float(prefill),
        decode_flops=float(decode), decode_bytes=float(moved),
    )  # fmt: skip


class _EightBit(Quantity):
    """Useful FLOPs, each counted by the width of its math: 2 in 16 bits, 1 in 8, 1/2 in 4."""

    def leaf(self, op: Leaf) -> Flops:
        """Model FLOPs x bits / 8."""
        return op.model_flops * (DTYPES[op.math].bits / 8) if op.math in DTYPES else 0.0


def eight_bit_flops(model: ModelSpec, context: float) -> Flops:
    """What one more token costs at `context` in FLOPs of 8-bit math, for models whose parts compute in different widths.

    Assumes that a rate halves as the width doubles.  DeepSeek-V4's report compares "equivalent FP8 FLOPs" and does not define
    them; this weighting gives its 27 % and 10 % of V3.2 (DeepSeek-V4 report, section 1).
    """
    found: Flops = fold(System(model, Layout()).work(Decode(context)), _EightBit("model_flops"))
    return found


# ---- in words


def mixers(model: ModelSpec) -> str:
    """The mixers of a model: counts and kinds, shortest form."""
    found: dict[str, int] = {}
    for count, layer in model.mixers:
        name = kind(layer, rotary=model.reach.encoding.scheme == "rotary")
        found[name] = found.get(name, 0) + count
    return " + ".join(f"{count} {name}" for name, count in found.items())


_SHORT = {
    "CompressedAttention": "CSA/HCA", "GatedDeltaNet": "GDN", "KimiDeltaAttention": "KDA", "LightningAttention": "lightning", "Mamba": "Mamba-1",
    "Mamba2": "Mamba-2", "NativeSparseAttention": "NSA", "MixtureOfBlockAttention": "MoBA", "ParallelMixers": "parallel",
}  # fmt: skip


def kind(layer: Mixer, *, rotary: bool = True) -> str:
    """What kind of mixer, in a word or two; `rotary`: a layer that does not rotate has no positions."""
    if isinstance(layer, IndexedLatentAttention):
        return "MLA+DSA"
    if isinstance(layer, LatentAttention):
        return "MLA"
    if not isinstance(layer, Attention):
        return _SHORT.get(type(layer).__name__, type(layer).__name__)
    heads, shared = layer.num_attention_heads, layer.num_key_value_heads
    name = "MHA" if shared == heads else "MQA" if shared == 1 else f"GQA-{shared}"
    if not isinstance(layer.mask, Causal):
        name += f" {type(layer.mask).__name__.lower()} {layer.mask.most:,}" if layer.mask.most else f" {type(layer.mask).__name__.lower()}"
    return name if layer.rotary_dim or not rotary else f"{name} NoPE"


def channels(model: ModelSpec) -> str:
    """Dense or experts."""
    experts = next((layer for layer in model.layers if isinstance(layer, MoE)), None)
    return "dense" if experts is None else f"MoE, {experts.num_experts_per_tok} of {experts.num_experts}"


def positions(model: ModelSpec) -> str:
    """The position schemes of a model."""
    names = dict.fromkeys(held.position.name for held in reach.positions(model))
    warm = " + temperature" if model.reach.encoding.temperature is not None else ""
    return (" and ".join(names) or "none (recurrent)") + warm


# ---- head types


@dataclass(frozen=True, slots=True)
class HeadType:
    """One way to share keys and values: what a token leaves in one layer, against full multi-head attention."""

    name: str
    what: str
    elements: float
    reduction: float
    cache_bytes: Bytes


def head_types(
    *, heads: int, head_dim: int, kv_heads: int, latent: int, rope: int, layers: int, context: int, cache: CacheFormat
) -> list[HeadType]:
    """MHA, GQA, MLA and MQA of one twin: elements per token and layer, and the cache of `layers` layers at `context` tokens.

    MHA 2 n d, GQA 2 n_kv d, MLA r + d_r, MQA 2 d.  The twin of an MLA model has wider keys than values and so a larger ratio;
    here all heads are `head_dim` wide.

    >>> from simulator.dtypes import CACHE_FORMATS
    >>> twin = {"heads": 128, "head_dim": 128, "kv_heads": 8, "latent": 512, "rope": 64, "layers": 61, "context": 131072}
    >>> [(t.name, t.elements, round(t.reduction, 1)) for t in head_types(**twin, cache=CACHE_FORMATS["bf16"])]
    [('MHA', 32768.0, 1.0), ('GQA', 2048.0, 16.0), ('MLA', 576.0, 56.9), ('MQA', 256.0, 128.0)]
    """
    if heads % kv_heads:
        message = f"--kv-heads {kv_heads}: must divide --heads {heads}"
        raise ValueError(message)

    def attention(shared: int) -> Layer:
        return Attention(heads * head_dim, heads, shared, head_dim)

    made: list[tuple[str, str, Layer]] = [
        ("MHA", f"{heads} heads, each its own keys and values", attention(heads)),
        ("GQA", f"{kv_heads} key-value heads", attention(kv_heads)),
        ("MLA", f"a latent of {latent} and {rope} rotary", LatentAttention(heads * head_dim, heads, None, latent, head_dim, rope, head_dim)),
        ("MQA", "1 key-value head", attention(1)),
    ]
    found: list[HeadType] = []
    for name, what, layer in made:
        (kept,) = (item for item in layer.kept(layer.whole(_NOTHING)) if item.keep is Keep.ROWS)  # type: ignore[attr-defined]
        elements = float(kept.row.elements + kept.row.rope)
        refused = cache.refusal([kept.row])
        stored = float("nan") if refused else layers * float(cache.bytes(float(context), kept.row))
        found.append(HeadType(name, what, elements, found[0].elements / elements if found else 1.0, stored))
    return found
