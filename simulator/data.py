"""Where the data folder is: the one function that knows the repository from the wheel."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path


@cache
def _root() -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package / "_data", package.parent / "data"):
        if folder.is_dir():
            return folder
    message = f"{package / '_data'}: the data folder is missing; reinstall the package, or run from a full checkout"
    raise FileNotFoundError(message)


def data_path(*parts: str) -> Path:
    """The path of a data file or folder: `simulator/_data` in the wheel, `data` beside the package in a checkout.

    >>> data_path("hardware", "links.toml").name
    'links.toml'
    """
    return _root().joinpath(*parts)


@cache
def _observed() -> dict[str, dict[str, float | str]]:
    return tomllib.loads(data_path("calibration", "observed.toml").read_text(encoding="utf-8"))


def observed(name: str) -> float:
    """A number of the world from data/calibration/observed.toml, where its source and date stand.

    >>> observed("raster")
    1.3
    """
    return float(_observed()[name]["value"])
