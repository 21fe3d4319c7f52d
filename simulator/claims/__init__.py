"""What is said of long context, recomputed: every statement beside our own number, and whether it holds.

The statements stand in `data/published/claims.toml`; `ours` has the functions they name.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from simulator.claims.ours import FUNCTIONS
from simulator.data import data_path
from simulator.report import _head, _table
from simulator.units import significant

if TYPE_CHECKING:
    from rich.console import Console

VERDICTS = ("holds", "differs", "open")
#: How far from a stated number is still it, where a claim does not say.
_WITHIN = 0.02


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement, from `low` to `high` (None: without a number), and `ours`.

    Ours agrees within the range, widened by the share `within` where a single number is stated.  `reading`: the source has words
    only; the range is how we take them.
    """

    topic: str
    says: str
    verdict: str
    why: str
    source: str
    by: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    within: float = 0.0
    reading: bool = False
    ours: float | None = None

    @property
    def agrees(self) -> bool | None:
        """Whether our number is what is stated; None without one."""
        if self.ours is None or self.low is None or self.high is None:
            return None
        return self.low * (1 - self.within) <= self.ours <= self.high * (1 + self.within)

    @property
    def stated(self) -> str:
        """The range, for people; in brackets where it is our reading."""
        if self.low is None or self.high is None:
            return ""
        if self.low == self.high:
            told = self.show(self.low)
        elif self.high == math.inf:
            told = f"at least {self.show(self.low)}"
        elif self.low == -math.inf:
            told = f"at most {self.show(self.high)}"
        else:
            told = f"{_number(self.low, self.unit)} to {self.show(self.high)}"
        return f"({told})" if self.reading else told

    def show(self, value: float | None) -> str:
        """A value in the claim's unit."""
        if value is None:
            return ""
        return f"N^{value:.2f}" if self.unit == "power of N" else f"{_number(value, self.unit)} {self.unit}".strip()


_SCALES = {"GiB": 2.0**30, "GB": 1e9, "%": 0.01}
#: Units of things that are counted.
_WHOLE = ("tokens", "")


def _number(value: float, unit: str) -> str:
    if unit in _WHOLE:
        return f"{value:,.0f}"
    scaled = value / _SCALES.get(unit, 1.0)
    return f"{scaled:.3g}" if abs(scaled) >= 1e15 else significant(scaled, 3)  # noqa: PLR2004 (beyond what digits show)


@cache
def claims() -> tuple[Claim, ...]:
    """Every statement with our number, in the order of the file."""
    with data_path("published", "claims.toml").open("rb") as file:
        found = tomllib.load(file)
    known = {name: {k: v for k, v in spec.items() if k != "source"} for name, spec in found["models"].items()}
    return tuple(_read(entry, known) for entry in found["claims"])


def _read(entry: Mapping[str, Any], known: Mapping[str, Any]) -> Claim:
    told = {key: entry.get(key, "") for key in ("topic", "says", "verdict", "why", "source", "unit", "by")}
    if "by" not in entry:
        return Claim(**told)
    stated = entry.get("stated", [entry.get("at_least", -math.inf), entry.get("at_most", math.inf)])
    low, high = stated if isinstance(stated, list) else (stated, stated)
    inputs = {key: known.get(value, value) if key in ("model", "base") and isinstance(value, str) else value for key, value in entry.get("inputs", {}).items()}
    within = entry.get("within", 0.0 if isinstance(stated, list) else _WITHIN)
    ours = float(FUNCTIONS[entry["by"]](**inputs))
    return Claim(**told, low=float(low), high=float(high), within=within, reading=entry.get("reading", False), ours=ours)


def by_topic(found: Iterable[Claim]) -> list[tuple[str, list[Claim]]]:
    """Claims of one topic together, in their order."""
    return [(topic, list(group)) for topic, group in groupby(found, key=lambda claim: claim.topic)]


def document() -> dict[str, Any]:
    """The keys of `longctx claims`."""
    told = [
        {
            "topic": c.topic, "claim": c.says, "stated_low": c.low, "stated_high": c.high, "reading": c.reading, "ours": c.ours, "unit": _unit(c.unit),
            "verdict": c.verdict, "why": c.why, "source": c.source, "by": c.by,
        }
        for c in claims()
    ]  # fmt: skip
    return {**_head({}, []), "claims": told}


def _unit(unit: str) -> str:
    """The base unit that a shown one stands for."""
    return {"GiB": "B", "GB": "B", "%": "fraction"}.get(unit, unit)


def print_claims(console: Console) -> None:
    """A table per topic."""
    for topic, found in by_topic(claims()):
        rows = [[c.says, c.stated, c.show(c.ours), c.verdict, c.why] for c in found]
        _table(console, topic, ["what is said", "stated", "ours", "verdict", "why"], rows)
    console.print(_summary(), style="dim", highlight=False, soft_wrap=True)


def _summary() -> str:
    counts = {verdict: sum(c.verdict == verdict for c in claims()) for verdict in VERDICTS}
    return (
        f"{len(claims())} statements: {counts['holds']} hold, {counts['differs']} do not or not as they stand, {counts['open']} are about "
        "something no cost model can tell."
    )


def markdown() -> str:
    """The same as a page (docs/claims.md)."""
    lines = [
        "# What is said of long context, recomputed", "",
        "Written by `longctx claims --markdown`; a test refuses a page that says otherwise. What is said stands in `data/published/claims.toml`, in our own",
        "words, with its source; our number is computed by the functions it names in `simulator/claims/ours.py`. In brackets: the source has words only,",
        'and the number is how we take them. Source "essay": "The path to 1M context window" (2026).', "", _summary(),
    ]  # fmt: skip
    for topic, found in by_topic(claims()):
        lines += ["", f"## {topic}", "", "| what is said | stated | ours | | why | source |", "|---|---|---|---|---|---|"]
        lines += [f"| {c.says} | {c.stated} | {c.show(c.ours)} | {c.verdict} | {c.why} | {c.source} |" for c in found]
    return "\n".join(lines) + "\n"


__all__ = ["VERDICTS", "Claim", "by_topic", "claims", "document", "markdown", "print_claims"]
