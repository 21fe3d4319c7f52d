"""A config read key by key: every value checked, every alias in one place, class defaults filled in."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from typing import Any

from simulator.data import data_path

Config = Mapping[str, Any]

#: Where the names are kept under which the config itself spells its keys.
SPELLED = "spelled as"
MAX_COUNT = 10**9
MAX_LAYERS = 10_000

#: Other names of the same key: GPT-2's, MPT's and BLOOM's own, DeepSeek's inference configs, lit-gpt's.
ALIASES = {
    "n_embd": "hidden_size", "n_embed": "hidden_size", "d_model": "hidden_size", "dim": "hidden_size",
    "n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers", "num_layers": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_heads": "num_attention_heads",
    "n_query_groups": "num_key_value_heads", "n_inner": "intermediate_size", "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size", "n_dense_layers": "first_k_dense_replace", "n_activated_experts": "num_experts_per_tok",
    "num_experts_per_token": "num_experts_per_tok", "experts_per_token": "num_experts_per_tok",
    "num_local_experts": "num_experts", "n_routed_experts": "num_experts",
    "num_shared_experts": "n_shared_experts", "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "attention_head_dim": "head_dim", "n_positions": "max_position_embeddings", "max_seq_len": "max_position_embeddings",
    "seq_length": "max_position_embeddings", "local_window": "sliding_window",
}  # fmt: skip


@functools.cache
def _classes() -> dict[str, dict[str, Any]]:
    """Defaults of every model type: what its class assumes where a config is silent, and traits no config says."""
    rows = tomllib.loads(data_path("hf_classes.toml").read_text("utf-8"))["class"]
    return {name: {k: v for k, v in row.items() if k not in ("model_type", "source")} for row in rows for name in row["model_type"]}


def class_of(config: Config) -> str:
    """The model type that decides defaults: the config's own, or what its keys give away where it has none."""
    kind = str(config.get("model_type") or "")
    if kind:
        return kind
    for key, told in (("index_n_heads", "deepseek_v32"), ("kv_lora_rank", "deepseek_v3"), ("mb_per_layer", "samba")):
        if config.get(key) is not None:
            return told
    return "gpt2" if config.get("position") == "learned_absolute" else ""


def with_defaults(config: Config) -> dict[str, Any]:
    """The config under the names used here, its class's defaults beneath."""
    named: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in config.items():
        name = ALIASES.get(key, key)
        if value is None and name != key:
            continue
        if name == key or config.get(name) is None:
            named[name], spelled[name] = value, key
    kind = class_of(named)
    defaults = _classes().get(kind, {})
    for key, value in defaults.items():
        if named.get(key) is None:
            named[key] = value
    named["model_type"] = named.get("is_a", kind)
    named[SPELLED] = spelled
    return named


class Keys:
    """A config whose every value is checked when it is read."""

    def __init__(self, config: Config, name: str) -> None:
        self.config, self.name = config, name

    def spelled(self, name: str) -> str:
        """The name a key has in the config itself."""
        return str(self.mapping(SPELLED).get(name, name))

    @property
    def kind(self) -> str:
        """The model type."""
        return str(self.config.get("model_type") or "")

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A positive integer under any of `names`."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value != int(value):
                message = f"{self.name}: {self.spelled(name)} = {value!r} is not an integer; correct the config"
                raise ValueError(message)
            if not least <= value <= MAX_COUNT:
                message = f"{self.name}: {self.spelled(name)} = {value!r} is outside {least} to {MAX_COUNT:,}; correct the config"
                raise ValueError(message)
            return int(value)
        if default is not None:
            return default
        message = f"{self.name}: the config has no {' or '.join(names)}; give the model's full config.json"
        raise ValueError(message)

    def number(self, name: str, default: float, most: float = MAX_COUNT) -> float:
        """A finite number from 0 to `most`."""
        value = self.config.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= most:
            message = f"{self.name}: {name} = {value!r} is not a number from 0 to {most:,.0f}; correct the config"
            raise ValueError(message)
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A boolean."""
        value = self.config.get(name)
        return default if value is None else bool(value)

    def get(self, name: str) -> Any:
        """Whatever stands there."""
        return self.config.get(name)

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self.config.get(name)
        return default if value is None else str(value)

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

    def by_layer(self, name: str, layers: int) -> list[Any]:
        """A list with an entry per layer (more are those of MTP modules), empty where there is none."""
        found = self.listing(name)
        if found and len(found) < layers:
            message = f"{self.name}: {name} has {len(found)} entries for {layers} layers; correct the config"
            raise ValueError(message)
        return found[:layers]

    def entry(self, name: str, index: int) -> Keys:
        """The object that a list holds for one layer."""
        found = self.by_layer(name, self.count("num_hidden_layers"))[index]
        if not isinstance(found, Mapping):
            message = f"{self.name}: {name}[{index}] = {found!r} is not an object; correct the config"
            raise ValueError(message)  # noqa: TRY004 (a user's mistake, not ours)
        return Keys(found, self.name)

    def share(self, value: Any, name: str) -> float:
        """A number from 0 to 1."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            message = f"{self.name}: {name} = {value!r} is not a share between 0 and 1; correct the config"
            raise ValueError(message)
        return float(value)

    def only(self, **changed: Any) -> Keys:
        """The same keys with some changed: a layer's own values."""
        return Keys({**self.config, **changed}, self.name)
