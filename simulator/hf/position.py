"""The rotary part of a config: which scheme, which base, which scaling.

Keys: rope_theta, rope_scaling or rope_parameters (by layer type since transformers 5), rope_local_base_freq, compress_rope_theta, attn_temperature_tuning,
floor_scale, attn_scale, alibi, attn_config, positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from simulator.hf.keys import Keys
from simulator.position import DynamicNtk, Encoding, Linear, Llama3, LongRope, Plain, Scaling, Temperature, Yarn

#: Classes whose softmax scale takes YaRN's mscale_all_dim squared (transformers modeling_deepseek_v3.py, DeepSeek-V3 inference/model.py).
_SCALES_SOFTMAX = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2")


def encoding(keys: Keys) -> Encoding:
    """How the model tells positions apart."""
    bias = keys.mapping("attn_config")
    if keys.flag("alibi") or bias.get("alibi") or keys.text("model_type") == "bloom":
        return Encoding("alibi", bias_max=_number(bias.get("alibi_bias_max"), 8.0))
    if keys.flag("positions"):
        return Encoding("learned", positions=keys.count("max_position_embeddings", default=0, least=0))
    parameters = keys.mapping("rope_scaling") or keys.mapping("rope_parameters")
    by_type = {k: v for k, v in parameters.items() if isinstance(v, Mapping)}
    whole: Mapping[str, Any] = by_type.get("full_attention") or by_type.get("main") or parameters
    local: Mapping[str, Any] = by_type.get("sliding_attention") or {}
    theta = _number(whole.get("rope_theta") or keys.get("rope_theta"), 10_000.0)
    base = _number(local.get("rope_theta") or keys.get("rope_local_base_freq"), 0.0)
    scaling = _scaling(whole, keys)
    tuned = keys.get("attn_temperature_tuning")
    warm = keys.text("model_type") == "llama4_text" and (tuned is None or bool(tuned))
    temperature = Temperature(_number(keys.get("attn_scale"), 0.1), int(_number(keys.get("floor_scale"), 8192))) if warm else None
    if keys.get("compress_rope_theta") is not None:
        # YaRN on the compressed layers alone, without growth of the scores (transformers configuration_deepseek_v4.py)
        stretched = _scaling({**whole, "attention_factor": 1.0}, keys)
        return Encoding(theta=theta, compressed=(_number(keys.get("compress_rope_theta"), theta), stretched))
    return Encoding(theta=theta, scaling=scaling, local_theta=base or None, temperature=temperature)


def _number(value: object, default: float) -> float:
    return float(value) if _is_number(value) and 0 < float(value) < math.inf else default  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scaling(told: Mapping[str, Any], keys: Keys) -> Scaling:
    """The scaling a rope dictionary names; unknown names count as none."""
    kind = str(told.get("rope_type") or told.get("type") or "default").lower()
    factor, declared = _number(told.get("factor"), 1.0), keys.count("max_position_embeddings", default=0, least=0)
    original = int(_number(told.get("original_max_position_embeddings") or keys.get("original_max_position_embeddings"), 0.0) or declared or 1)
    if kind == "linear":
        return Linear(factor)
    if kind == "dynamic":
        return DynamicNtk(factor, original)
    if kind == "llama3":
        return Llama3(factor, original, _number(told.get("low_freq_factor"), 1.0), _number(told.get("high_freq_factor"), 4.0))
    if kind == "yarn":
        grown = told.get("attention_factor")
        return Yarn(
            factor, original, _number(told.get("beta_fast"), 32.0), _number(told.get("beta_slow"), 1.0),
            truncate=told.get("truncate") is not False, attention=_number(grown, 0.0) or None,
            mscale=_number(told.get("mscale"), 0.0) or None, mscale_all_dim=_number(told.get("mscale_all_dim"), 0.0) or None,
            scales_softmax=keys.text("model_type") in _SCALES_SOFTMAX,
        )  # fmt: skip
    short, long = told.get("short_factor"), told.get("long_factor")
    if kind in ("longrope", "su") and isinstance(short, list) and isinstance(long, list) and all(map(_is_number, [*short, *long])):
        return LongRope(declared / original, original, tuple(map(float, short)), tuple(map(float, long)))
    return Plain()


__all__ = ["encoding"]
