"""How a checkpoint stores its modules, from `quantization_config`, its groups and its ignore list.

A module's format is that of the first group or exception that names it; precision is never read from a model's name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

from simulator.dtypes import CACHE_FORMATS, WEIGHT_FORMATS, CacheFormat, WeightFormat
from simulator.hf.keys import Config, Keys

_LAYER = re.compile(r"layers\.(\d+)(?=\.|\*|$)")

#: Modules that a kind of layer is made of, under the names of the model families.
PATHS = {
    "attention": ("self_attn.o_proj", "attn.wo_b", "self_attn.q_proj", "mixer.o_proj", "attn.o_proj"),
    "linear": ("linear_attn.out_proj", "mixer.out_proj", "self_attn.out_proj", "mamba.out_proj"),
    "indexer": ("self_attn.indexer.wq_b", "attn.indexer.wq_b"),
    "dense": ("mlp.down_proj", "mixer.down_proj", "feed_forward.down_proj"),
    "experts": (
        "mlp.experts.0.down_proj", "mlp.experts", "ffn.experts", "ffn.experts.0.down_proj", "mixer.experts.0.down_proj",
        "block_sparse_moe.experts.0.w2", "feed_forward.experts.down_proj",
    ),
    "shared": (
        "mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj", "ffn.shared_experts.down_proj", "mixer.shared_experts.down_proj",
        "feed_forward.shared_expert.down_proj",
    ),
}  # fmt: skip


class Patterns:
    """Names of modules: whole names, prefixes, `*` patterns, `re:` expressions; found by layer number first."""

    def __init__(self, names: Iterable[str]) -> None:
        self.by_layer: dict[int, list[str]] = {}
        self.general: list[str] = []
        for name in names:
            found = None if name.startswith("re:") else _LAYER.search(name)
            if found:
                self.by_layer.setdefault(int(found[1]), []).append(name[found.start() :])
            else:
                self.general.append(name)

    def match(self, layer: int, path: str) -> bool:
        """Whether a module of a layer is named."""
        full = f"layers.{layer}.{path}"
        return any(_named(name, full) for name in self.by_layer.get(layer, ())) or any(_named(name, full) for name in self.general)


def _named(name: str, full: str) -> bool:
    if name.startswith("re:"):
        return re.search(name[3:], full) is not None
    if "*" in name:
        start = name.find("layers.")
        pattern = name[start:] if start > 0 else name
        return fnmatch.fnmatchcase(full, pattern) or fnmatch.fnmatchcase(full, pattern + ".*")
    return full == name or full.startswith(name + ".") or f".{name}." in f".{full}."


class Formats:
    """The formats of a checkpoint's modules by layer."""

    def __init__(self, config: Config, name: str, warnings: list[str]) -> None:
        plain = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
        # engines load fp32 checkpoints in half precision
        short = "fp16" if plain == "float16" else "bf16"
        self.plain = WEIGHT_FORMATS[short]
        self.cache: CacheFormat = CACHE_FORMATS[short]
        found = config.get("quantization_config")
        self._quantized: Config = found if isinstance(found, Mapping) else {}
        self._name = name
        self.method, self._base = "none", self.plain
        self._rules: list[tuple[Patterns, WeightFormat]] = []
        self._ignored = Patterns(())
        self._experts: WeightFormat | None = None
        if self._quantized:
            self._read(warnings)
        if str(config.get("expert_dtype") or "") == "fp4" and self._experts is None and not self._rules and self.method == "fp8":
            self._experts = WEIGHT_FORMATS["mxfp4_fp8"]
        scheme = self._quantized.get("kv_cache_quant_algo") or self._quantized.get("kv_cache_scheme") or ""
        if isinstance(scheme, Mapping):
            scheme = scheme.get("num_bits", "")
        if str(scheme).lower() in ("fp8", "8"):
            self.cache = CACHE_FORMATS["fp8"]

    def _read(self, warnings: list[str]) -> None:
        quantized, reader = self._quantized, Keys(self._quantized, self._name)
        self._ignored = Patterns(str(x) for x in reader.listing("modules_to_not_convert") or reader.listing("ignore"))
        method = str(quantized.get("quant_method") or "").lower()
        algorithm = str(quantized.get("quant_algo") or "").upper()
        layers = reader.mapping("quantized_layers")
        groups = [Keys(reader.mapping("config_groups"), self._name).mapping(g) for g in reader.mapping("config_groups")]
        self.method = "nvfp4" if "NVFP4" in algorithm else method or "modelopt"
        if method == "fp8":
            self._base, self.method = WEIGHT_FORMATS["fp8_block" if quantized.get("weight_block_size") else "fp8"], "fp8"
            if str(quantized.get("moe_quant_algo") or "").upper() == "NVFP4":
                # the exceptions concern the experts' format: attention stays in that of the checkpoint it was made from
                self._experts, self._ignored, self.method = WEIGHT_FORMATS["nvfp4"], Patterns(()), "nvfp4"
            return
        if method == "mxfp4":
            self._base = WEIGHT_FORMATS["mxfp4"]
            return
        if method in ("awq", "gptq"):
            self._base = WEIGHT_FORMATS["int4"]
            return
        self._by_algorithm(layers)
        for group in groups:
            stored = _format_of(Keys(group, self._name).mapping("weights"))
            targets = [str(t) for t in Keys(group, self._name).listing("targets")]
            if stored is None:
                continue
            if not targets or targets == ["Linear"]:
                self._base = stored
            else:
                self._rules.append((Patterns(targets), stored))
        if self._base is self.plain and not self._rules:
            if "NVFP4" in algorithm:
                self._base = WEIGHT_FORMATS["nvfp4"]
            elif "FP8" in algorithm:
                self._base, self.method = WEIGHT_FORMATS["fp8"], "fp8"
            else:
                told = method or algorithm or "unnamed"
                warnings.append(f"{self._name}: quantization {told} is not known; weights counted as {self.plain.name} (an upper bound)")
                self.method = method or "unknown"

    def _by_algorithm(self, layers: Config) -> None:
        for algorithm, stored in (("NVFP4", "nvfp4"), ("FP8", "fp8")):
            names = [str(n) for n, told in layers.items() if isinstance(told, Mapping) and algorithm in str(told.get("quant_algo")).upper()]
            if names:
                self._rules.append((Patterns(names), WEIGHT_FORMATS[stored]))

    def of(self, group: str, layer: int) -> WeightFormat:
        """The format of a group of modules (`PATHS`) in a layer."""
        if group == "experts" and self._experts is not None:
            return self._experts
        paths = PATHS[group]
        for patterns, stored in self._rules:
            if any(patterns.match(layer, path) for path in paths):
                return stored
        if self._base is self.plain or any(self._ignored.match(layer, path) for path in paths):
            return self.plain
        return self._base

    @property
    def head(self) -> WeightFormat:
        """The LM head is quantised only where a group names it."""
        return next((stored for patterns, stored in self._rules if "lm_head" in patterns.general), self.plain)


def _format_of(weights: Config) -> WeightFormat | None:
    """A compressed-tensors or modelopt group's weights."""
    bits, kind, group = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if bits == 8:  # noqa: PLR2004
        blocks = weights.get("block_structure") or weights.get("strategy") == "block"
        return WEIGHT_FORMATS["int8" if kind == "int" else "fp8_block" if blocks else "fp8"]
    if bits == 4:  # noqa: PLR2004
        if kind == "float":
            return WEIGHT_FORMATS["mxfp4" if group == 32 else "nvfp4"]  # noqa: PLR2004
        return WEIGHT_FORMATS["int4_g32" if group == 32 else "int4"]  # noqa: PLR2004
    return None


__all__ = ["PATHS", "Formats"]
