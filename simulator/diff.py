"""Which term moved between two answers: op by op, part by part, the differences adding up to that of the totals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.report import SCHEMA_VERSION, _head, _table
from simulator.units import BYTES, FLOPS, SECONDS, gib

if TYPE_CHECKING:
    from rich.console import Console

#: What is not a part of the memory of a GPU but a limit to it, or their sum.
_NO_PARTS = ("total", "usable")
_TIMES = ("ttft_s", "ttft_cached_s", "tpot_s")
#: Kinds of terms in the order they are told, with what writes their numbers.
_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("Time", lambda value: SECONDS.show(value, 3)), "answer": ("Answers", lambda value: SECONDS.show(value, 3)),
    "bytes per GPU": ("Memory per GPU", gib),
}  # fmt: skip
_AMOUNTS = ("flops", "hbm_bytes", "wire_bytes")


def read(file: Path) -> dict[str, Any]:
    """A document that --json wrote.  Errors: ValueError where it is none of size, estimate or explain."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file}: not a JSON document ({' '.join(str(error).split())}); give a file that longctx size or estimate wrote with --json"
        raise ValueError(message) from error
    if not isinstance(found, dict) or not isinstance(found.get("memory_bytes_per_gpu"), dict) or found.get("schema_version") != SCHEMA_VERSION:
        message = f"{file}: holds no answer of longctx size or estimate of schema {SCHEMA_VERSION}; write one with --json"
        raise ValueError(message)
    return found


def document(before: Mapping[str, Any], after: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of `diff`.

    `terms` hold time by op where both answers have ops, and memory by part; each kind of term adds up to the difference of
    its total.  What overlapping saves is a term of its own.  `inputs` that differ are listed.
    """
    terms = _memory(before, after)
    if "rows" in before and "rows" in after:
        terms = [*_ops(before, after), *terms]
    else:
        terms = [*_answers(before, after), *terms]
    terms.sort(key=lambda term: (list(_SHOWN).index(term["kind"]), -abs(term["difference"])))
    totals = {}
    for kind in dict.fromkeys(term["kind"] for term in terms if term["kind"] != "answer"):
        sums = {end: sum(term[end] for term in terms if term["kind"] == kind) for end in ("before", "after", "difference")}
        totals[kind] = sums
    changed = {
        key: {"before": before["inputs"].get(key), "after": after["inputs"].get(key)}
        for key in dict.fromkeys([*before["inputs"], *after["inputs"]])
        if before["inputs"].get(key) != after["inputs"].get(key)
    }
    warnings = [f"{name}: {text}" for name, side in (("before", before), ("after", after)) for text in side["warnings"]]
    return {**_head(inputs, warnings), "changed": changed, "terms": terms, "totals": totals}


def _term(kind: str, name: str, before: float, after: float, **more: Any) -> dict[str, Any]:
    """What rounding alone moved did not move."""
    moved = after - before
    return {"kind": kind, "name": name, "before": before, "after": after, "difference": moved if abs(moved) > 1e-9 * abs(before) else 0.0, **more}


def _value(seconds: Any) -> float:
    """Seconds of a row of `estimate` (a number) or of `explain` (an interval)."""
    return float(seconds["value"] if isinstance(seconds, dict) else seconds)


def _ops(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds op by op, and what overlapping saves."""
    sides = []
    for answer in (before, after):
        found: dict[tuple[str, str], dict[str, float]] = {}
        for row in answer["rows"]:
            held = found.setdefault((row["name"], row["kernel"]), dict.fromkeys(("seconds", *_AMOUNTS), 0.0))
            held["seconds"] += _value(row["seconds"])
            for amount in _AMOUNTS:
                held[amount] += float(row.get(amount, 0.0))
        sides.append(found)
    terms = []
    nothing = dict.fromkeys(("seconds", *_AMOUNTS), 0.0)
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        one, two = (side.get(key, nothing) for side in sides)
        amounts = {f"{amount}_difference": two[amount] - one[amount] for amount in _AMOUNTS}
        terms.append(_term("seconds", key[0], one["seconds"], two["seconds"], **amounts))
    saved = [answer["seconds"]["value"] - sum(_value(row["seconds"]) for row in answer["rows"]) for answer in (before, after)]
    if any(abs(s) > 1e-9 * abs(answer["seconds"]["value"]) for s, answer in zip(saved, (before, after), strict=True)):
        terms.append(_term("seconds", "overlapped", *saved))
    return terms


def _memory(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bytes per GPU part by part."""
    one, two = before["memory_bytes_per_gpu"], after["memory_bytes_per_gpu"]
    parts = [part for part in dict.fromkeys([*one, *two]) if part not in _NO_PARTS]
    return [_term("bytes per GPU", part, one.get(part, 0.0), two.get(part, 0.0)) for part in parts if one.get(part) or two.get(part)]


def _answers(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The times of two sizes, which are no parts of one sum."""
    return [
        _term("answer", name, before[name]["value"], after[name]["value"])
        for name in _TIMES
        if before.get(name) is not None and after.get(name) is not None
    ]




def print_diff(told: dict[str, Any], console: Console) -> None:
    """What was changed, then what it moved, the largest first."""
    changed = ", ".join(f"{key} {ends['before']} -> {ends['after']}" for key, ends in told["changed"].items())
    console.print(f"[bold]changed[/]: {changed or 'nothing'}", highlight=False, soft_wrap=True)
    for warning in told["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    console.print()
    for kind in dict.fromkeys(term["kind"] for term in told["terms"]):
        title, tell = _SHOWN[kind]

        def signed(value: float, tell: Callable[[float], str] = tell) -> str:
            return ("+" if value > 0 else "-" if value < 0 else "") + tell(abs(value))

        terms = [term for term in told["terms"] if term["kind"] == kind and term["difference"]]
        still = [term["name"] for term in told["terms"] if term["kind"] == kind and not term["difference"]]

        def plain(value: float, tell: Callable[[float], str] = tell) -> str:
            return ("-" if value < 0 else "") + tell(abs(value))

        rows = [
            [term["name"], plain(term["before"]), plain(term["after"]), signed(term["difference"]), _relative(term), _moved(term)] for term in terms
        ]
        if kind in told["totals"]:
            total = told["totals"][kind]
            rows.append(["total", plain(total["before"]), plain(total["after"]), signed(total["difference"]), _relative(total), ""])
        _table(console, title, ["term", "before", "after", "difference", "of before", "work that moved"], rows)
        if still:
            console.print(f"did not move: {', '.join(dict.fromkeys(still))}\n", style="dim", highlight=False, soft_wrap=True)


def _relative(term: Mapping[str, Any]) -> str:
    return f"{term['difference'] / term['before']:+.0%}" if term["before"] else ""


def _moved(term: Mapping[str, Any]) -> str:
    """The quantities behind a difference in time."""
    units = {"flops_difference": FLOPS, "hbm_bytes_difference": BYTES, "wire_bytes_difference": BYTES}
    words = {"flops_difference": "", "hbm_bytes_difference": " HBM", "wire_bytes_difference": " wire"}
    told = [f"{'+' if term[key] > 0 else '-'}{unit.show(abs(term[key]), 3)}{words[key]}" for key, unit in units.items() if term.get(key)]
    return ", ".join(told)


__all__ = ["document", "print_diff", "read"]
