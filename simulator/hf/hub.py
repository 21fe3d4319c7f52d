"""The config of a model that does not ship: one short request to the Hugging Face hub, kept for the next time.

Only `config.json` is fetched, never code or weights.  LONGCTX_HUB names another address; HF_HUB_OFFLINE=1 asks nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from simulator.hf.keys import Config

ADDRESS = "https://huggingface.co"
SECONDS = 3.0
#: A config.json is a few kilobytes; those with long quantization lists reach hundreds.
MOST_BYTES = 4 * 2**20
_REFUSALS = {401: "it is gated or does not exist", 403: "it is gated", 404: "the hub has no config.json of it"}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class Unreachable(Exception):  # noqa: N818 (it says why, and is no error by itself)
    """Why a config was not fetched, and what to do about it."""


def is_id(text: str) -> bool:
    """Whether `text` has the form of a hub id, owner/name.

    >>> is_id("Qwen/Qwen3-8B"), is_id("Qwen3-8B"), is_id("../x"), is_id("a/b/c")
    (True, False, False, False)
    """
    return _NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


def cache_file(identifier: str) -> Path:
    """Where a fetched config is kept: $XDG_CACHE_HOME/longctx/configs."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "longctx" / "configs" / (identifier.replace("/", "--") + ".json")


def fetched(identifier: str) -> Config:
    """The config.json of `identifier`: the kept one, else the hub's.  Unreachable where there is neither."""
    file = cache_file(identifier)
    try:
        return _parsed(file.read_bytes())
    except (OSError, ValueError):
        text = _get(identifier)
    try:
        config = _parsed(text)
    except ValueError as error:
        message = f"its config.json is not a JSON object ({error})"
        raise Unreachable(message) from error
    _keep(file, text)
    return config


def _parsed(text: bytes) -> Config:
    config: Any = json.loads(text)
    if not isinstance(config, Mapping):
        message = f"it holds a {type(config).__name__}"
        raise ValueError(message)  # noqa: TRY004 (what a server sent)
    return config


def _get(identifier: str) -> bytes:
    """One request, nothing repeated."""
    if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on"):
        message = "HF_HUB_OFFLINE is set, so it was not looked for on the hub"
        raise Unreachable(message)
    from http.client import HTTPException  # noqa: PLC0415 (known models need no network)
    from urllib.request import Request, urlopen  # noqa: PLC0415

    base = os.environ.get("LONGCTX_HUB") or ADDRESS
    if urlsplit(base).scheme not in ("http", "https"):
        message = f"LONGCTX_HUB = {base!r} is not an http or https address"
        raise Unreachable(message)
    request = Request(f"{base.rstrip('/')}/{identifier}/resolve/main/config.json", headers={"User-Agent": "longctx"})  # noqa: S310 (checked above)
    try:
        with urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            text: bytes = answer.read(MOST_BYTES + 1)
    except HTTPError as error:
        why = _REFUSALS.get(error.code, f"the hub answered {error.code}")
        error.close()
        raise Unreachable(why) from error
    except (URLError, HTTPException, OSError, ValueError) as error:
        message = f"the hub could not be reached within {SECONDS:g} s"
        raise Unreachable(message) from error
    if len(text) > MOST_BYTES:
        message = f"its config.json is larger than {MOST_BYTES // 2**20} MiB"
        raise Unreachable(message)
    return text


def _keep(file: Path, text: bytes) -> None:
    """Keep a config for the next time; a cache that cannot be written is done without."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(text)
        part.replace(file)
    except OSError:
        return


__all__ = ["Unreachable", "cache_file", "fetched", "is_id"]
