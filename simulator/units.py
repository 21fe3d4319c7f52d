"""Numbers with units: the one place where text becomes a base unit and a base unit becomes text.

Inside the simulator every quantity is in a base unit (byte, FLOP, second, token) and is a `Num`: a Python float
or a float64 array.  Names carry the unit as a suffix (`hbm_bytes`, `seconds`, `flops`, `bytes_per_s`).
GB means 1e9 bytes and GiB 2**30 bytes; memory is shown in GiB, rates in decimal units, link rates per direction.

The functions `ceil`, `floor`, `minimum`, `maximum`, `where` and `total` are numpy's, with a short path for plain
floats (about 20 times faster), so a formula is written once and serves one number or a million.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Num = float | Array


@dataclass(frozen=True, slots=True)
class Unit:
    """A base unit with the prefixes it may be written with."""

    symbol: str
    binary: bool = False

    def parse(self, text: str | float) -> float:
        """Read `text` ("4.8 TB/s", 1e9) in this unit; refuse another unit by name."""
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            return float(text)
        match = re.fullmatch(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*(.*?)\s*", str(text))
        if match is None:
            message = f"{text!r}: not a number with a unit; write for example '1.5 G{self.symbol}'"
            raise ValueError(message)
        number, suffix = float(match[1].replace(",", "").replace("_", "")), match[2]
        if suffix in ("", self.symbol):
            return number
        scale = _PREFIXES.get(suffix.removesuffix(self.symbol)) if suffix.endswith(self.symbol) else None
        if scale is None or ("i" in suffix.removesuffix(self.symbol) and not self.binary):
            message = f"{text!r}: unit {suffix!r} is not a multiple of {self.symbol}; write for example '1.5 G{self.symbol}'"
            raise ValueError(message)
        return number * scale

    def show(self, value: float, digits: int = 3) -> str:
        """Write `value` with the prefix that leaves one to three digits before the point."""
        if not math.isfinite(value):
            return "unbounded" if value > 0 else "undefined"
        if self.symbol == "s":
            return _show_seconds(value, digits)
        steps = [("", 1.0), ("Ki", 2.0**10), ("Mi", 2.0**20), ("Gi", 2.0**30), ("Ti", 2.0**40)]
        if not self.binary:
            steps = [("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15), ("E", 1e18)]
        prefix, scale = steps[0]
        for candidate, size in steps:
            if abs(value) >= size:
                prefix, scale = candidate, size
        return f"{significant(value / scale, digits)} {prefix}{self.symbol}"


_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2.0**10, "Mi": 2.0**20,
             "Gi": 2.0**30, "Ti": 2.0**40, "m": 1e-3, "u": 1e-6, "n": 1e-9}  # fmt: skip

BYTES = Unit("B", binary=True)
BYTES_PER_SECOND = Unit("B/s")
FLOPS = Unit("FLOP")
FLOPS_PER_SECOND = Unit("FLOP/s")
SECONDS = Unit("s")
WATTS = Unit("W")
JOULES = Unit("J")
HERTZ = Unit("Hz")

Bytes = Annotated[Num, BYTES]
Flops = Annotated[Num, FLOPS]
Seconds = Annotated[Num, SECONDS]
BytesPerSecond = Annotated[Num, BYTES_PER_SECOND]
FlopsPerSecond = Annotated[Num, FLOPS_PER_SECOND]
Watts = Annotated[Num, WATTS]
Joules = Annotated[Num, JOULES]
Hertz = Annotated[Num, HERTZ]
Tokens = Annotated[Num, "tokens"]
Fraction = Annotated[Num, "fraction"]
Count = Annotated[Num, "count"]


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, thousands separated, no exponent below 1e15."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    rounded = round(value, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    return f"{rounded:,.{decimals}f}"


def _show_seconds(value: float, digits: int) -> str:
    if abs(value) >= 7200:  # noqa: PLR2004 (two hours)
        return f"{significant(value / 3600, digits)} h"
    if abs(value) >= 600:  # noqa: PLR2004 (ten minutes)
        return f"{significant(value / 60, digits)} min"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            return f"{significant(value / scale, digits)} {unit}"
    return "0 s" if value == 0 else f"{significant(value / 1e-9, digits)} ns"


_TOKEN_SCALE = {"k": 1e3, "m": 1e6, "g": 1e9, "K": 2**10, "M": 2**20, "G": 2**30}
MAX_TOKENS = 2**40


def parse_tokens(text: str | float) -> int:
    """Read a number of tokens as vLLM does: 1k = 1,000, 1K = 1,024, 1m = 1,000,000, 1M = 1,048,576.

    Lower-case suffixes may carry a fraction (25.6k), upper-case ones may not.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_,]*)(\.[0-9]+)?\s*([kKmMgG]?)\s*", str(text))
    if match is None or isinstance(text, bool):
        message = f"{text!r}: not a number of tokens; write an integer, or 128K (131,072), 1M (1,048,576), 25.6k (25,600)"
        raise ValueError(message)
    whole, fraction, suffix = match[1].replace(",", "").replace("_", ""), match[2] or "", match[3]
    value = Decimal(whole + fraction) * int(_TOKEN_SCALE.get(suffix, 1))
    if value != int(value) or (fraction.strip(".0") and suffix.isupper()):
        message = f"{text!r}: not a whole number of tokens; fractions go with k, m, g only (25.6k = 25,600)"
        raise ValueError(message)
    if not 1 <= value <= MAX_TOKENS:
        message = f"{text!r}: {value:,.0f} tokens is outside 1 to {MAX_TOKENS:,}"
        raise ValueError(message)
    return int(value)


def parse_seconds(text: str | float) -> float:
    """Read a duration: a number of seconds, or with s, ms, us, min, h."""
    if isinstance(text, str):
        match = re.fullmatch(r"(.*[0-9.].*?)(min|h)\s*", text)
        if match:
            return SECONDS.parse(match[1]) * {"min": 60.0, "h": 3600.0}[match[2]]
    return SECONDS.parse(text)


def show_tokens(tokens: float) -> str:
    """`tokens` in full, with the power-of-two short form where it is exact: "1M = 1,048,576 tokens"."""
    value = int(tokens)
    for suffix, scale in (("M", 2**20), ("K", 2**10)):
        if value >= scale and value % scale == 0:
            return f"{value // scale}{suffix} = {value:,} tokens"
    return f"{value:,} tokens"


def gib(value: float, digits: int = 3) -> str:
    """Memory in GiB, whatever its size: one unit for every memory figure of a table."""
    return f"{significant(value / 2**30, digits)} GiB"


_PLAIN = (float, int)


def ceil(x: Num) -> Num:
    """Smallest integer not below `x`, as a float."""
    return float(math.ceil(x)) if type(x) in _PLAIN else np.ceil(x)


def floor(x: Num) -> Num:
    """Largest integer not above `x`, as a float."""
    return float(math.floor(x)) if type(x) in _PLAIN else np.floor(x)


def minimum(x: Num, y: Num) -> Num:
    """Elementwise smaller of `x` and `y`."""
    if type(x) in _PLAIN and type(y) in _PLAIN:
        return min(x, y)
    return np.minimum(x, y)


def maximum(x: Num, y: Num) -> Num:
    """Elementwise larger of `x` and `y`."""
    if type(x) in _PLAIN and type(y) in _PLAIN:
        return max(x, y)
    return np.maximum(x, y)


def where(condition: Any, x: Num, y: Num) -> Num:
    """`x` where `condition` holds, else `y`."""
    if type(condition) in (bool, np.bool_):
        return x if condition else y
    return np.where(condition, x, y)


def total(x: Num) -> float:
    """Sum of all elements of `x`."""
    return float(x) if type(x) in _PLAIN else float(np.add.reduce(x, axis=None))


def log2(x: Num) -> Num:
    """Logarithm to base two."""
    return math.log2(x) if type(x) in _PLAIN else np.log2(x)


def root(x: Num, power: int) -> Num:
    """The `power`-th root for a power of two, by square roots."""
    while power > 1:
        x = math.sqrt(x) if type(x) in _PLAIN else np.sqrt(x)
        power //= 2
    return x


def raise_to(x: Num, power: int) -> Num:
    """`x` to a `power` that is a power of two, by squaring."""
    while power > 1:
        x = x * x
        power //= 2
    return x


def tri(n: Num) -> Num:
    """n(n+1)/2, the pairs of a causal square of side n."""
    return n * (n + 1) * 0.5
