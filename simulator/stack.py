"""A stack written by hand: a file that lists layers by registry name, fields named as in the dataclasses.

    name = "my model"
    hidden_size = 4096
    vocab_size = 128256
    [[blocks]]
    count = 32
    layers = [
      { kind = "Attention", num_attention_heads = 32, num_key_value_heads = 8, head_dim = 128, rotary_dim = 128 },
      { kind = "GatedMLP", intermediate_size = 14336 },
    ]

TOML and JSON always; YAML where PyYAML is installed.  `hidden_size` is every layer's unless it says otherwise.  A mask is
`{ kind = "Window", width = 4096 }`, a format its name.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simulator.dtypes import CacheFormat, DType, WeightFormat, cache_format, dtype, weight_format
from simulator.kernels import attention, sparse_attention
from simulator.layers import REGISTRY, Embedding, Head
from simulator.model import Block, ModelSpec, Reach

#: Masks by name.
MASKS: dict[str, type] = {
    name: kind
    for module in (attention, sparse_attention)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, "cumulative") and kind.__module__ == module.__name__
}
LAYERS: dict[str, type] = {kind.__name__: kind for kind in REGISTRY if kind not in (Embedding, Head)}
_TOP = {"name", "hidden_size", "vocab_size", "blocks", "tie_word_embeddings", "max_position_embeddings", "cache", "embedding", "head", "streams"}


def _toml(file: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{file}: not TOML ({error}); correct the file"
        raise ValueError(message) from error



def _yaml(file: Path) -> Mapping[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]  # noqa: PLC0415 (not a dependency)
    except ImportError as error:
        message = f"{file}: YAML needs PyYAML; pip install pyyaml, or write the same as TOML or JSON"
        raise ValueError(message) from error
    try:
        found: Any = yaml.safe_load(file.read_text("utf-8"))
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        message = f"{file}: not YAML ({told}); correct the file"
        raise ValueError(message) from error
    return found if isinstance(found, Mapping) else {}


#: Readers by a file's ending.
SUFFIXES: dict[str, Callable[[Path], Mapping[str, Any]]] = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml}


def read_stack(source: Mapping[str, Any], name: str) -> ModelSpec:
    """The model that a listing describes."""
    where = str(source.get("name") or name)
    _known(where, "", source, _TOP)
    width, vocabulary = _integer(source, "hidden_size", where), _integer(source, "vocab_size", where)
    listed = source.get("blocks")
    if not isinstance(listed, list) or not listed:
        message = f"{where}: blocks is not a list of blocks; write [[blocks]] with count and layers"
        raise ValueError(message)
    runs: list[tuple[int, Block]] = []
    for i, entry in enumerate(listed):
        at = f"blocks[{i}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("layers"), list) or not entry["layers"]:
            message = f"{where}: {at} has no layers; write layers = [{{ kind = ... }}, ...]"
            raise ValueError(message)
        _known(where, at, entry, {"count", "layers"})
        layers = tuple(_made(where, f"{at}.layers[{j}]", layer, LAYERS, width) for j, layer in enumerate(entry["layers"]))
        runs.append((_integer(entry, "count", f"{where}: {at}", default=1), layers))
    ends = {"vocab_size": vocabulary, "hidden_size": width}
    embedding = _filled(where, "embedding", Embedding, {**ends, **_mapping(source, "embedding", where)})
    tied = {"tied": bool(source.get("tie_word_embeddings", False))}
    head = _filled(where, "head", Head, {**ends, **tied, **_mapping(source, "head", where)})
    cache: CacheFormat = cache_format(str(source.get("cache", "bf16")))
    reach = Reach(_integer(source, "max_position_embeddings", where, default=0) or None)
    return ModelSpec(
        name=where, hidden_size=width, vocab_size=vocabulary, blocks=tuple(runs), embedding=embedding, head=head, cache=cache,
        checkpoint_cache=cache, reach=reach, model_type="stack", streams=_integer(source, "streams", where, default=1),
    )  # fmt: skip


def _known(where: str, at: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            message = f"{where}: {at + '.' if at else ''}{key}: no such field; {hint}use {', '.join(sorted(known))}"
            raise ValueError(message)


def _integer(given: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < (1 if default is None or default == 1 else 0):
        message = f"{where}: {key} = {value!r} is not a positive integer; write one"
        raise ValueError(message)
    return value


def _mapping(given: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = given.get(key, {})
    if not isinstance(value, Mapping):
        message = f"{where}: {key} = {value!r} is not a table of fields; write {key} = {{ ... }}"
        raise ValueError(message)  # noqa: TRY004 (a user's mistake, not ours)
    return value


def _made(where: str, at: str, given: Any, kinds: Mapping[str, type], width: int) -> Any:
    """A dataclass of one of `kinds` from a table with `kind` and its fields."""
    if not isinstance(given, Mapping) or str(given.get("kind")) not in kinds:
        told = given.get("kind") if isinstance(given, Mapping) else given
        near = difflib.get_close_matches(str(told), kinds, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        message = f"{where}: {at}: kind {told!r} is not known; {hint}use one of {', '.join(sorted(kinds))}"
        raise ValueError(message)
    kind = kinds[str(given["kind"])]
    fields = {k: v for k, v in given.items() if k != "kind"}
    if any(f.name == "hidden_size" for f in dataclasses.fields(kind)):
        fields.setdefault("hidden_size", width)
    return _filled(where, f"{at} ({kind.__name__})", kind, fields, width)


def _filled(where: str, at: str, kind: type, given: Mapping[str, Any], width: int = 0) -> Any:
    """`kind` with fields checked against their declared types."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _known(where, at, given, set(fields))
    missing = [n for n, f in fields.items() if n not in given and f.default is dataclasses.MISSING]
    if missing:
        message = f"{where}: {at} lacks {', '.join(missing)}; write them"
        raise ValueError(message)
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(where, f"{at}.{key}", value, hints[key], width) for key, value in given.items()})


def _value(where: str, at: str, value: Any, hint: Any, width: int) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted = next(o for o in options if o is not type(None))
    if wanted is WeightFormat:
        return weight_format(str(value))
    if wanted is DType:
        return dtype(str(value))
    if wanted is attention.Mask:
        return _made(where, at, value, MASKS, 0)
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, list) or not value:
            message = f"{where}: {at} = {value!r} is not a list of layers; write a list"
            raise ValueError(message)
        return tuple(_made(where, f"{at}[{i}]", entry, LAYERS, width) for i, entry in enumerate(value))
    right = isinstance(value, bool) if wanted is bool else isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if wanted in (bool, int) and not right:
        told = "true or false" if wanted is bool else "an integer of at least 0"
        message = f"{where}: {at} = {value!r} is not {told}; correct it"
        raise ValueError(message)
    return value


__all__ = ["LAYERS", "MASKS", "SUFFIXES", "read_stack"]
