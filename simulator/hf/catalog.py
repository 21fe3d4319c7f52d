"""Where configs come from: the catalog that ships with the tool, files, folders, dicts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

from simulator.data import data_path
from simulator.hf.config import read_config
from simulator.hf.keys import Config
from simulator.model import ModelSpec
from simulator.stack import SUFFIXES, read_stack


def load_model(source: str | Path | Config) -> ModelSpec:
    """A model from a catalog id (short forms work when unambiguous), a config.json, its folder, a file that lists layers
    (stack.toml, .json, .yaml), a dict, or the id of another model of the Hugging Face hub, whose config.json is fetched.
    """
    if isinstance(source, Mapping):
        name = str(source.get("_name_or_path") or source.get("name") or source.get("model_type") or "model")
        return read_stack(source, name) if "blocks" in source else read_config(source, name)
    text = str(source)
    path = _path(text)
    if path is not None:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            message = f"{text}: no config.json in this folder; give a folder or file that holds the model's config.json"
            raise ValueError(message)
        name = path.resolve().name if path.is_dir() else path.stem
        if file.suffix in SUFFIXES:
            return read_stack(SUFFIXES[file.suffix](file), name)
        config = parse(file)
        return read_stack(config, name) if "blocks" in config else read_config(config, name)
    try:
        identifier = find(text)
    except ValueError as unknown:
        return _from_hub(text.strip(), unknown)
    return read_config(parse(data_path("models", identifier.replace("/", "--") + ".json")), identifier)


def _from_hub(text: str, unknown: ValueError) -> ModelSpec:
    """A model that does not ship, by its hub id; what was wrong with the name where it has not the form of one."""
    from simulator.hf import hub  # noqa: PLC0415 (known models need no network)

    if not hub.is_id(text) or "several match" in str(unknown):
        raise unknown
    try:
        config = hub.fetched(text)
    except hub.Unreachable as reason:
        message = f"{unknown} ({reason})"
        raise ValueError(message) from reason
    return read_config(config, text)


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
    """The catalog id meant by `text`: the id itself, or a part of exactly one, or of one and of that one stored otherwise."""
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
        # the hub calls Meta-Llama-3.1 Llama-3.1 now
        [n for n in known if n.lower().replace("/meta-llama-", "/llama-") == wanted],
    ):
        bare = sorted((n.lower().split("/", 1)[-1], n) for n in fits)
        # "X-FP8-dynamic" is X stored otherwise
        if bare and all(name.startswith(f"{bare[0][0]}-") for name, _ in bare[1:]):
            return bare[0][1]
        if fits:
            message = f"model {text!r}: several match ({', '.join(fits[:6])}); write one of them"
            raise ValueError(message)
    near = difflib.get_close_matches(wanted, [*lowered, *(n.split("/", 1)[-1] for n in lowered)], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(dict.fromkeys(lowered.get(n) or find(n) for n in near))}? " if near else ""
    message = f"model {text!r}: not in the catalog and no such path; {hint}give its config.json or the folder that holds it"
    raise ValueError(message)


def parse(file: Path) -> Config:
    """A JSON object from a file."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        message = f"{file}: not JSON ({error}); give the model's own config.json"
        raise ValueError(message) from error
    if not isinstance(config, dict):
        message = f"{file}: holds a {type(config).__name__}, not an object; give the model's own config.json"
        raise ValueError(message)  # noqa: TRY004 (a user's mistake, not ours)
    return config
