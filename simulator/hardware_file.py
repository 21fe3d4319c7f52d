"""A GPU of the user's own: a TOML file, checked and brought into the form of `data/hardware`.

    name = "my_gpu"
    like = "h200"                      # what is not given is that GPU's
    price_usd_per_gpu_hour = 3.20
    [figures]
    capacity_bytes = "192 GiB"
    hbm_bytes_per_s = "6.0 TB/s"

A figure is a number in base units, a text with its unit, or a table with value, source and date.  A rate given in one of
`datasheet` and `flops_per_clock` is worked out in the other: datasheet = units x FLOP per clock x boost clock.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from simulator.units import BYTES, BYTES_PER_SECOND, FLOPS_PER_SECOND, HERTZ, WATTS, Unit

#: A figure and its unit; None: a plain number.
FIGURES: dict[str, Unit | None] = {
    "units": None, "max_clock_hz": HERTZ, "boost_clock_hz": HERTZ, "sustained_clock_hz": HERTZ, "sfu_per_clock": None, "capacity_bytes": BYTES,
    "usable_bytes": BYTES, "hbm_bytes_per_s": BYTES_PER_SECOND, "l2_bytes": BYTES, "shared_memory_bytes_per_unit": BYTES, "tdp_w": WATTS,
    "gpus_per_node": None,
}  # fmt: skip
_LINK: dict[str, Unit | None] = {"bytes_per_s": BYTES_PER_SECOND, "peer_bytes_per_s": BYTES_PER_SECOND, "domain": None}
_DTYPES = ("bf16", "fp16", "fp8", "fp4", "int8", "tf32", "fp32")
_WORDS = ("name", "title", "vendor", "architecture", "compute_capability", "borrows", "like")
_TOP = (*_WORDS, "aliases", "price_usd_per_gpu_hour", "figures", "flops_per_clock", "datasheet", "attained", "links")
_WHOLE = ("units", "gpus_per_node", "domain")
_CLOCKS = ("units", "max_clock_hz", "boost_clock_hz")


def user_folder() -> Path:
    """Where a user's own GPUs lie: $XDG_DATA_HOME/longctx/hardware."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "longctx" / "hardware"


def owned(folder: Path) -> dict[str, Path]:
    """Every spelling of the GPUs in `folder`: file name, name and aliases.  A file that cannot be read answers to its file
    name, and says why when it is asked for.
    """
    known: dict[str, Path] = {}
    for file in sorted(folder.glob("*.toml")) if folder.is_dir() else []:
        known[plain(file.stem)] = file
        try:
            head = _toml(file)
        except ValueError:
            continue
        aliases = head.get("aliases", [])
        names = [head.get("name"), *(aliases if isinstance(aliases, list) else [])]
        known |= {plain(name): file for name in names if isinstance(name, str)}
    return known


def plain(spelling: str) -> str:
    """A spelling as the catalog compares it.

    >>> plain("NVIDIA H200-SXM")
    'h200_sxm'
    """
    key = spelling.strip().lower().replace("-", "_").replace(" ", "_")
    for maker in ("nvidia_", "amd_", "instinct_", "intel_", "google_"):
        key = key.removeprefix(maker)
    return key


def read(file: Path, shipped: Callable[[str], Mapping[str, Any]], kinds: Iterable[str]) -> dict[str, Any]:
    """The file's GPU in the form of `data/hardware`; `shipped(name)` gives that form of a GPU it is like.

    Errors: ValueError with the field, the rule and the remedy.
    """
    given = _toml(file)
    _known(file, "", given, _TOP)
    _check_words(file, given)
    own = {
        "figures": _figures(file, "figures", _table(file, given, "figures"), FIGURES),
        "flops_per_clock": _figures(file, "flops_per_clock", _table(file, given, "flops_per_clock"), dict.fromkeys(_DTYPES)),
        "datasheet": _figures(file, "datasheet", _table(file, given, "datasheet"), dict.fromkeys(_DTYPES, FLOPS_PER_SECOND)),
        "attained": _figures(file, "attained", _table(file, given, "attained"), dict.fromkeys(_DTYPES, FLOPS_PER_SECOND)),
    }
    links = _links(file, given, sorted(kinds))
    base: Mapping[str, Any] = {}
    if "like" in given:
        try:
            base = shipped(given["like"])
        except ValueError as error:
            raise _wrong(file, "like", given["like"], str(error)) from error
    found: dict[str, Any] = {key: base.get(key, "") for key in ("vendor", "architecture", "compute_capability")}
    found |= {"title": given["name"], "aliases": [], "borrows": base.get("borrows") or base.get("name", "")}
    found |= {key: given[key] for key in (*_WORDS, "aliases", "price_usd_per_gpu_hour") if key in given}
    found["figures"] = {**base.get("figures", {}), **own["figures"]}
    if "capacity_bytes" in own["figures"] and "usable_bytes" not in own["figures"]:
        found["figures"].pop("usable_bytes", None)
    found["links"] = links or base.get("links", [])
    _clocks(file, found["figures"], own["figures"])
    _rates(found, base, own)
    _complete(file, found)
    return found


def _wrong(file: Path, field: str, value: Any, rule: str) -> ValueError:
    return ValueError(f"{file}: {field} = {value!r}: {rule}")


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        message = f"{file}: cannot be read ({error.strerror}); give a TOML file that describes a GPU, or a name that longctx gpus lists"
        raise ValueError(message) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{file}: not TOML ({' '.join(str(error).split())}); correct the file"
        raise ValueError(message) from error


def _known(file: Path, where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            message = f"{file}: {where}{key}: no such field; {hint}use {', '.join(known)}"
            raise ValueError(message)


def _check_words(file: Path, given: Mapping[str, Any]) -> None:
    for key in _WORDS:
        value = given.get(key, "-")
        if not isinstance(value, str) or not value.strip():
            raise _wrong(file, key, value, "must be a text; write it in quotes")
    if "name" not in given:
        message = f"{file}: has no name; write name = {file.stem!r}"
        raise ValueError(message)
    aliases = given.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise _wrong(file, "aliases", aliases, 'must be a list of texts; write aliases = ["mine"]')
    price = given.get("price_usd_per_gpu_hour", 1.0)
    if isinstance(price, bool) or not isinstance(price, (int, float)) or not 0 <= price < math.inf:
        raise _wrong(file, "price_usd_per_gpu_hour", price, "must be US dollars, 0 or more; write for example 3.20")


def _table(file: Path, given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = given.get(key, {})
    if not isinstance(value, Mapping):
        raise _wrong(file, key, value, f"must be a table; write [{key}] and a figure on each line below")
    return value


def _figures(file: Path, where: str, given: Mapping[str, Any], units: Mapping[str, Unit | None]) -> dict[str, dict[str, Any]]:
    """Every figure as {value, source, date}, in base units."""
    _known(file, f"{where}.", given, units)
    found = {}
    for key, entry in given.items():
        told = dict(entry) if isinstance(entry, Mapping) else {"value": entry}
        _known(file, f"{where}.{key}.", told, ("value", "source", "date", "basis", "note"))
        value = _number(file, f"{where}.{key}", told.get("value"), units[key])
        if key in _WHOLE and value != int(value):
            raise _wrong(file, f"{where}.{key}", value, "must be a whole number")
        found[key] = {"source": file.name, "date": "undated", **told, "value": value}
    return found


def _number(file: Path, field: str, given: Any, unit: Unit | None) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        raise _wrong(file, field, given, f"must be a number{f' or a text with its unit, such as 1.5 G{unit.symbol}' if unit else ''}")
    try:
        value = unit.parse(given) if unit else float(given)
    except ValueError as error:
        raise _wrong(file, field, given, str(error)) from error
    if not 0 < value < math.inf:
        raise _wrong(file, field, given, "must be above 0 and finite; leave out what is not known")
    return value


def _links(file: Path, given: Mapping[str, Any], kinds: list[str]) -> list[dict[str, Any]]:
    listed = given.get("links", [])
    if not isinstance(listed, list) or not all(isinstance(row, Mapping) for row in listed):
        raise _wrong(file, "links", listed, "must be tables; write [[links]] with name, kind and bytes_per_s")
    found = []
    for i, row in enumerate(listed):
        where = f"links[{i}]"
        _known(file, f"{where}.", row, ("name", "kind", *_LINK))
        if row.get("kind") not in kinds:
            raise _wrong(file, f"{where}.kind", row.get("kind"), f"use one of {', '.join(kinds)}")
        quoted = _figures(file, where, {key: value for key, value in row.items() if key in _LINK}, _LINK)
        if "bytes_per_s" not in quoted:
            message = f"{file}: {where} has no bytes_per_s; write the rate of one GPU in one direction, such as '450 GB/s'"
            raise ValueError(message)
        if row["kind"] in ("pcie", "c2c", "network") or "domain" in quoted:
            found.append({"name": str(row.get("name", row["kind"])), "kind": row["kind"], **quoted})
            continue
        message = f"{file}: {where} has no domain; write how many GPUs the {row['kind']} joins, such as 8"
        raise ValueError(message)
    return found


def _clocks(file: Path, figures: dict[str, Any], own: Mapping[str, Any]) -> None:
    """One clock stands for both where only one is given."""
    for one, other in (("max_clock_hz", "boost_clock_hz"), ("boost_clock_hz", "max_clock_hz")):
        if one in own and other not in own:
            figures[other] = figures[one]
    if "max_clock_hz" in figures and figures["boost_clock_hz"]["value"] > figures["max_clock_hz"]["value"]:
        raise _wrong(file, "figures.boost_clock_hz", figures["boost_clock_hz"]["value"], "must not exceed max_clock_hz; exchange the two")
    if {"max_clock_hz", "boost_clock_hz"} & own.keys():
        figures.pop("sustained_clock_hz", None)
        figures |= {key: entry for key, entry in own.items() if key == "sustained_clock_hz"}


def _rates(found: dict[str, Any], base: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Rates per clock and datasheet rates that agree; a ceiling measured on another GPU is not kept once these change."""
    figures = found["figures"]
    product = figures["units"]["value"] * figures["boost_clock_hz"]["value"] if {"units", "boost_clock_hz"} <= figures.keys() else 0.0
    changed = bool({*_CLOCKS} & own["figures"].keys() or own["flops_per_clock"] or own["datasheet"])
    per_clock, datasheet = dict(base.get("flops_per_clock", {})), dict(base.get("datasheet", {}))
    if product and changed:
        datasheet = {d: {**e, "value": e["value"] * product, "source": "units x FLOP per clock x boost clock"} for d, e in per_clock.items()}
    per_clock |= own["flops_per_clock"]
    datasheet |= own["datasheet"]
    if product:
        given, known = own["datasheet"], own["flops_per_clock"]
        per_clock |= {d: {**e, "value": e["value"] / product} for d, e in given.items() if d not in known}
        datasheet |= {d: {**e, "value": e["value"] * product} for d, e in known.items() if d not in given}
    found["flops_per_clock"], found["datasheet"] = per_clock if product else {}, datasheet
    found["attained"] = own["attained"] if changed else {**base.get("attained", {}), **own["attained"]}


def _complete(file: Path, found: dict[str, Any]) -> None:
    for key, example in (("capacity_bytes", "80 GiB"), ("hbm_bytes_per_s", "3.35 TB/s")):
        if key not in found["figures"]:
            message = f"{file}: figures.{key} is missing; write {key} = {example!r}, or like = 'h100' to start from another GPU"
            raise ValueError(message)
    if "bf16" not in found["datasheet"]:
        message = f"{file}: datasheet.bf16 is missing; write bf16 = '989 TFLOP/s' (dense), or like = 'h100' to start from another GPU"
        raise ValueError(message)
    if not any(row["kind"] == "network" or "domain" in row for row in found["links"]):
        missing = "no link joins GPUs" if found["links"] else "links is missing"
        message = f"{file}: {missing}; write [[links]] with kind = 'network' and bytes_per_s, or like = 'h100'"
        raise ValueError(message)
    found["figures"].setdefault("gpus_per_node", {"value": 8.0, "source": "the usual host", "date": "undated", "basis": "assumed"})
    for dtype, entry in found["attained"].items():
        if dtype not in found["datasheet"] or entry["value"] > found["datasheet"][dtype]["value"]:
            raise _wrong(file, f"attained.{dtype}", entry["value"], "must not exceed datasheet of the same type; it is the best product measured")


__all__ = ["owned", "plain", "read", "user_folder"]
