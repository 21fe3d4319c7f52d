"""How far a model reads: what it was trained on, what its config declares, what it was shown to use, and what its positions say.

Published effective lengths stand in data/published/effective_length.csv, each with its measure and source.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from simulator.data import data_path
from simulator.kernels.attention import Causal, Sinks, Window
from simulator.layers import Attention, CompressedAttention, LatentAttention
from simulator.layers.layer import Layer
from simulator.model import ModelSpec
from simulator.position import Alibi, Encoding, Learned, NoPosition, Plain, Position, Rotary


@dataclass(frozen=True, slots=True)
class Effective:
    """A length a model was shown to use: exactly, or at least (the longest that was tried)."""

    tokens: int
    at_least: bool
    measure: str
    scores: str
    source_url: str
    notes: str

    def show(self) -> str:
        """For people: a bound is marked."""
        return f"{'at least ' if self.at_least else ''}{self.tokens:,}"


@cache
def _published() -> dict[str, Effective]:
    with data_path("published", "effective_length.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: Effective(
            int(row["effective_tokens"]), row["bound"] == "at least", row["measure"], row["scores"], row["source_url"], row["notes"]
        )
        for row in rows
        for name in row["catalog_ids"].split(";")
        if name
    }


def effective(model: ModelSpec) -> Effective | None:
    """The published effective length of a catalog model; None where nobody published one."""
    return _published().get(model.name)


class Positioned(NamedTuple):
    """A way of telling positions apart and the layers that use it; `most` is the largest distance a layer with a window sees."""

    layers: int
    what: str
    position: Position
    heads: int
    kv_heads: int
    most: int | None = None


def positions(model: ModelSpec) -> list[Positioned]:
    """How each kind of attention layer tells positions apart, equal ones together; none for recurrent layers."""
    found: dict[tuple[str, Position, int, int, int | None], int] = {}
    for count, layer in model.mixers:
        told = _position(layer, model.reach.encoding)
        if told is not None:
            key = (*told, getattr(getattr(layer, "mask", None), "most", None))
            found[key] = found.get(key, 0) + count
    return [Positioned(count, *told) for told, count in found.items()]


def _position(layer: Layer, encoding: Encoding) -> tuple[str, Position, int, int] | None:
    if isinstance(layer, LatentAttention):
        return ("MLA", Rotary(layer.qk_rope_head_dim, encoding.theta, encoding.scaling), layer.num_attention_heads, 1)
    if isinstance(layer, CompressedAttention):
        over = layer.compress_ratio and encoding.compressed
        theta, scaling = over or (encoding.theta, Plain())
        return ("compressed" if over else "window", Rotary(layer.qk_rope_head_dim, theta, scaling), layer.num_attention_heads, 1)
    if not isinstance(layer, Attention):
        return None
    heads, shared = layer.num_attention_heads, layer.num_key_value_heads
    windowed = isinstance(layer.mask, (Window, Sinks))
    what = "window" if windowed else "full" if isinstance(layer.mask, Causal) else type(layer.mask).__name__.lower()
    if encoding.scheme == "alibi":
        return (what, Alibi(heads, encoding.bias_max), heads, shared)
    if encoding.scheme == "learned":
        return (what, Learned(encoding.positions, layer.hidden_size), heads, shared)
    if not layer.rotary_dim:
        return (what, NoPosition(), heads, shared)
    local = windowed and encoding.local_theta is not None
    theta = encoding.local_theta if local and encoding.local_theta else encoding.theta
    return (what, Rotary(layer.rotary_dim, theta, Plain() if local else encoding.scaling), heads, shared)


def trained_tokens(model: ModelSpec) -> int | None:
    """Tokens its rotary frequencies were trained on before any scaling: the config's own, else what it declares."""
    return model.reach.trained_tokens or model.reach.declared_tokens


def warnings(model: ModelSpec, context: int) -> list[str]:
    """What the asked context exceeds: the declared length, the length shown to work."""
    found = []
    declared, shown = model.reach.declared_tokens, effective(model)
    if declared is not None and context > declared:
        found.append(
            f"{context:,} tokens are beyond the {declared:,} that {model.name} declares; "
            f"the engine needs an override (see launch) and the answers' quality there is not claimed by anyone"
        )
    if shown is not None and context > shown.tokens:
        limit = "longer contexts were not tried" if shown.at_least else "at longer ones its score fell below the threshold"
        found.append(
            f"{model.name} was shown to use {shown.show()} tokens effectively ({shown.measure}: {shown.scores}); "
            f"{limit}: {shown.source_url}"
        )
    return found


def describe(held: Positioned, model: ModelSpec, context: int) -> str:
    """One line on positions for people: scheme, base, scaling, what training did not show, temperature."""
    position, encoding = held.position, model.reach.encoding
    told = f"{held.layers} x {held.what}: {position.name}"
    if isinstance(position, Learned):
        return f"{told}, a table of {position.positions:,}"
    if isinstance(position, Alibi):
        far = position.horizon()
        return f"{told}; a token of equal content weighs 0.1 % at {far.min():,.0f} to {far.max():,.0f} tokens, by head"
    if isinstance(position, NoPosition) and encoding.temperature is not None:
        return f"{told}; queries x {float(encoding.temperature.factor(float(context))):.4g} at {context:,} tokens"
    if not isinstance(position, Rotary):
        return told
    pairs, periods, slowed = position.rotary_dim // 2, position.periods(float(context)), position.interpolation(float(context))
    told += f", theta {position.theta:,.0f}, {pairs} pairs"
    if slowed.max() > 1:
        told += f", {int((slowed > 1).sum())} of them up to {slowed.max():.3g} x slower"
    trained, declared = trained_tokens(model), model.reach.declared_tokens
    if trained:
        before = " before scaling" if model.reach.trained_tokens and not isinstance(position.scaling, Plain) else ""
        told += f"; {position.incomplete(float(trained))} never completed a turn in {trained:,} tokens{before}"
    distance = context if held.most is None else min(context, held.most)
    if declared and distance > declared:
        told += f"; {int((periods > declared).sum())} meet angles beyond the declared {declared:,}"
    if position.logit_factor != 1:
        told += f"; scores x {position.logit_factor:.4g}"
    return told


def document(model: ModelSpec, context: int) -> dict[str, object]:
    """For JSON: lengths and positions, in tokens and plain factors."""
    shown = effective(model)
    return {
        "trained_tokens": trained_tokens(model), "declared_tokens": model.reach.declared_tokens,
        "effective_tokens": None if shown is None else shown.tokens, "effective_at_least": None if shown is None else shown.at_least,
        "effective_measure": None if shown is None else shown.measure, "effective_source": None if shown is None else shown.source_url,
        "positions": [
            {"layers": held.layers, "kind": held.what, "scheme": held.position.name, **_rotary(held.position, model, context)}
            for held in positions(model)
        ],
    }  # fmt: skip


def _rotary(position: Position, model: ModelSpec, context: int) -> dict[str, object]:
    if not isinstance(position, Rotary):
        return {}
    trained = trained_tokens(model)
    return {
        "theta": position.theta, "rotary_dim": position.rotary_dim, "wavelengths": position.periods(float(context)).tolist(),
        "interpolation": position.interpolation(float(context)).tolist(),
        "pairs_without_a_period": None if trained is None else position.incomplete(float(trained)), "logit_factor": position.logit_factor,
    }  # fmt: skip


__all__ = ["Effective", "Positioned", "describe", "document", "effective", "positions", "trained_tokens", "warnings"]
