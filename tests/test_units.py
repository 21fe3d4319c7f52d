"""Text becomes a base unit and a base unit becomes text, without loss."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import units
from simulator.units import (
    BYTES,
    BYTES_PER_SECOND,
    FLOPS,
    FLOPS_PER_SECOND,
    HERTZ,
    JOULES,
    MAX_TOKENS,
    SECONDS,
    WATTS,
    Unit,
    gib,
    parse_seconds,
    parse_tokens,
    show_tokens,
    significant,
)

UNITS = (BYTES, BYTES_PER_SECOND, FLOPS, FLOPS_PER_SECOND, SECONDS, WATTS, JOULES, HERTZ)
SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
ordinary = st.floats(min_value=1e-12, max_value=1e17, allow_nan=False)
finite = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)


# ---- tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1M", 1_048_576), ("1m", 1_000_000), ("1k", 1_000), ("1K", 1_024), ("128K", 131_072), ("25.6k", 25_600), ("1.5m", 1_500_000),
        ("1g", 10**9), ("1G", 2**30), ("4096", 4096), ("1,048,576", 1_048_576), ("1_000", 1_000), (" 8K ", 8192), (8192, 8192), (8192.0, 8192),
        ("10M", 10_485_760), ("1", 1), ("2.0k", 2000), ("1.0M", 2**20),
    ],
)  # fmt: skip
def test_tokens_are_read_as_vllm_reads_them(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@given(st.sampled_from(sorted(SCALES)), st.integers(1, 900))
def test_a_whole_number_with_a_suffix_is_that_many_of_them(suffix: str, count: int) -> None:
    assert parse_tokens(f"{count}{suffix}") == count * SCALES[suffix]


@given(st.sampled_from("kmg"), st.integers(1, 10**6))
def test_a_decimal_fraction_of_a_lower_case_suffix_is_exact(suffix: str, tokens: int) -> None:
    """25.6k is 25,600, and 1.001k is 1,001: the text is decimal, so no count of tokens is lost to binary fractions."""
    whole, rest = divmod(tokens, 1000)
    assert parse_tokens(f"{whole}.{rest:03d}{suffix}") == tokens * SCALES[suffix] // 1000


@given(st.integers(1, MAX_TOKENS))
def test_what_is_shown_of_tokens_reads_back(tokens: int) -> None:
    shown = show_tokens(tokens)
    for part in shown.removesuffix(" tokens").split(" = "):
        assert parse_tokens(part) == tokens
    assert f"{tokens:,} tokens" in shown


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5M", "1.5K", "25.6", "1e6", "nan", "inf", "1MB", "1 Mi", "M", "1.0005k", "two", "1T", True, False, None, "1..2k", "9999999G"]
)
def test_what_is_no_number_of_tokens_is_refused_with_a_remedy(text: object) -> None:
    with pytest.raises(ValueError, match=r"(?s)^(?!.*\n).{10,}$") as refused:
        parse_tokens(text)  # type: ignore[arg-type]
    assert repr(text) in str(refused.value)
    assert any(word in str(refused.value) for word in ("write", "fractions go with", "outside"))


# ---- units


@pytest.mark.parametrize(
    ("unit", "text", "value"),
    [
        (BYTES_PER_SECOND, "4.8 TB/s", 4.8e12), (BYTES_PER_SECOND, "450GB/s", 450e9), (BYTES_PER_SECOND, "1e9", 1e9), (BYTES_PER_SECOND, 3, 3.0),
        (BYTES, "141 GB", 141e9), (BYTES, "80 GiB", 80 * 2**30), (BYTES, "1,024 B", 1024.0), (FLOPS_PER_SECOND, "989 TFLOP/s", 989e12),
        (FLOPS, "2 GFLOP", 2e9), (SECONDS, "3.4 us", 3.4e-6), (SECONDS, "5 ms", 5e-3), (WATTS, "700 W", 700.0), (HERTZ, "1.98 GHz", 1.98e9),
    ],
)  # fmt: skip
def test_a_number_with_its_unit_becomes_the_base_unit(unit: Unit, text: str | float, value: float) -> None:
    assert unit.parse(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        (BYTES_PER_SECOND, "4.8 TFLOP/s"), (BYTES_PER_SECOND, "4.8 TB"), (BYTES_PER_SECOND, "4.8 TiB/s"), (FLOPS_PER_SECOND, "989 TB/s"),
        (FLOPS_PER_SECOND, "989 TFLOP"), (BYTES, "80 GHz"), (BYTES, "80 Gb"), (SECONDS, "5 B"), (WATTS, "700 J"), (BYTES, "eighty"), (BYTES, ""),
        (BYTES, "-1 GB"), (BYTES, True), (HERTZ, "2 Gi"),
    ],
)  # fmt: skip
def test_another_unit_is_refused_by_name(unit: Unit, text: str) -> None:
    with pytest.raises(ValueError, match="write for example") as refused:
        unit.parse(text)
    assert repr(text) in str(refused.value)
    assert unit.symbol in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.sampled_from(UNITS), ordinary, st.integers(2, 6))
def test_what_is_shown_has_no_exponent(unit: Unit, value: float, digits: int) -> None:
    shown = unit.show(value, digits)
    number = shown.split(" ")[0].replace(",", "")
    assert all(c in "0123456789." for c in number), shown
    assert shown.split(" ")[-1].endswith(unit.symbol) or shown.split(" ")[-1] in ("h", "min", "us", "ms", "ns")


@given(st.sampled_from([u for u in UNITS if u is not SECONDS]), st.floats(1.0, 1e15), st.integers(3, 6))
def test_what_is_shown_reads_back_to_its_digits(unit: Unit, value: float, digits: int) -> None:
    assert unit.parse(unit.show(value, digits)) == pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits))


@given(st.floats(1e-8, 1e7), st.integers(3, 6))
def test_a_duration_shown_reads_back_to_its_digits(value: float, digits: int) -> None:
    assert parse_seconds(SECONDS.show(value, digits)) == pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits))


@given(st.floats(1e-9, 1e14), st.integers(1, 6))
def test_significant_digits_are_kept_and_no_more(value: float, digits: int) -> None:
    shown = significant(value, digits)
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits))
    assert len(shown.replace(",", "").replace(".", "").lstrip("0").rstrip("0")) <= digits


def test_endless_and_undefined_are_words() -> None:
    assert BYTES.show(float("inf")) == "unbounded"
    assert SECONDS.show(float("nan")) == "undefined"
    assert BYTES.show(0.0) == "0 B"
    assert SECONDS.show(0.0) == "0 s"


@pytest.mark.parametrize(("text", "seconds"), [("2 h", 7200.0), ("5 min", 300.0), ("1.5 h", 5400.0), ("3 s", 3.0), (4, 4.0), ("20 ms", 0.02)])
def test_durations_may_be_minutes_and_hours(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["1.2.3 h", "two min", "-1 h", "5 B", ". h"])
def test_what_is_no_duration_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(ValueError, match="write for example"):
        parse_seconds(text)


def test_memory_is_always_in_gib_and_rates_are_decimal() -> None:
    assert gib(2**20) == "0.000977 GiB"
    assert gib(320 * 2**30) == "320 GiB"
    assert BYTES.show(2**30) == "1.00 GiB"
    assert BYTES_PER_SECOND.show(4.8e12) == "4.80 TB/s"


# ---- helpers


@given(finite, finite)
def test_helpers_of_one_number_equal_numpy(x: float, y: float) -> None:
    assert units.ceil(x) == np.ceil(x)
    assert units.floor(x) == np.floor(x)
    assert units.minimum(x, y) == np.minimum(x, y)
    assert units.maximum(x, y) == np.maximum(x, y)
    assert units.where(x < y, x, y) == np.where(x < y, x, y)
    assert units.where(np.bool_(x < y), x, y) == np.where(x < y, x, y)


@given(st.lists(st.tuples(st.floats(0, 1e12), st.floats(0, 1e12)), min_size=1, max_size=9), st.sampled_from([1, 2, 4, 8]))
def test_helpers_of_an_array_equal_those_of_its_numbers(pairs: list[tuple[float, float]], power: int) -> None:
    x, y = np.array(pairs).T
    for function, arguments in (
        (units.ceil, (x,)), (units.floor, (x,)), (units.minimum, (x, y)), (units.maximum, (x, y)), (units.minimum, (x, 7.0)),
        (units.maximum, (3.0, y)), (units.tri, (x,)),
    ):  # fmt: skip
        one_by_one = [function(*(float(a[i]) if isinstance(a, np.ndarray) else a for a in arguments)) for i in range(len(x))]
        assert np.array_equal(function(*arguments), one_by_one), function
    assert np.array_equal(units.where(x < y, x, y), np.where(x < y, x, y))
    assert np.allclose(units.root(x, power), x ** (1 / power), rtol=1e-14, atol=0)
    assert np.allclose(units.raise_to(x, power), x**power, rtol=1e-14, atol=0)
    assert [units.root(float(v), power) for v in x] == list(units.root(x, power))


def test_ceil_and_floor_give_floats() -> None:
    for function, value in itertools.product((units.ceil, units.floor), (3, 3.2, -0.5)):
        assert type(function(value)) is float


@given(st.integers(0, 3000))
def test_tri_counts_the_pairs_of_a_causal_square(n: int) -> None:
    assert units.tri(float(n)) == sum(range(n + 1))
