"""What one number costs to keep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.dtypes import (
    CACHE_FORMATS,
    DTYPES,
    WEIGHT_FORMATS,
    CacheRow,
    cache_format,
    dtype,
    weight_format,
)

BITS = {"fp32": 32, "tf32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4, "int4": 4}
#: FORMULAS 2.3: b + scale bits / group.
STORED_BITS = {
    "fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "fp8_block": 8 + 32 / 128**2, "mxfp4": 4.25, "nvfp4": 4.5, "int8": 8,
    "int4": 4 + 20 / 128, "int4_g32": 4.5, "mxfp4_fp8": 4.25,
}  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_an_element_has_its_bits(name: str) -> None:
    assert dtype(name).bits == BITS[name]
    assert dtype(name).bytes == BITS[name] / 8


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_weight_has_its_bits_and_its_share_of_the_scale(name: str) -> None:
    assert weight_format(name).bytes_per_element * 8 == STORED_BITS[name]


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_bytes_of_weights_are_linear_in_their_number(name: str) -> None:
    one = weight_format(name)
    assert one.bytes(7_000_000.0) == pytest.approx(7e6 * one.bytes(1.0), rel=1e-15)
    assert one.bytes(0.0) == 0
    assert one.name == name


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_product_is_computed_in_a_type_that_exists_and_is_no_narrower_than_its_weight(name: str) -> None:
    one = weight_format(name)
    assert one.math.name in DTYPES
    assert one.activation.name in DTYPES
    assert one.math.bits >= min(one.bits, 16)
    assert one.activation.bits >= one.math.bits


def test_weight_only_formats_multiply_in_bf16_and_w4a4_does_not() -> None:
    assert weight_format("mxfp4").math.name == "bf16"
    assert weight_format("int4").math.name == "bf16"
    assert weight_format("nvfp4").math.name == "fp4"
    assert weight_format("fp8_block").math.name == "fp8"


def test_a_latent_row_in_deepseeks_fp8_takes_656_bytes() -> None:
    """512 e4m3 + 4 fp32 scales + 64 bf16: FMLA-0012, FlashMLA README."""
    row = CacheRow(512, 64, latent=True)
    assert cache_format("fp8_ds_mla").bytes(1, row) == 656
    assert cache_format("bf16").bytes(1, row) == 1152
    assert cache_format("fp8").bytes(1, row) == 576


def test_a_row_of_llama_70b_takes_4_kib_per_layer() -> None:
    assert cache_format("bf16").bytes(1, CacheRow(2 * 8 * 128)) == 4096
    assert 80 * cache_format("bf16").bytes(131_072, CacheRow(2 * 8 * 128)) == 40 * 2**30


@pytest.mark.parametrize("name", CACHE_FORMATS)
@given(tokens=st.integers(0, 2**30), elements=st.integers(0, 10**5))
def test_cache_bytes_are_linear_in_tokens(name: str, tokens: int, elements: int) -> None:
    one, row = cache_format(name), CacheRow(float(elements))
    assert one.bytes(float(tokens), row) == tokens * one.row_bytes(row)
    assert one.bytes(0.0, row) == 0


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_only_formats_made_for_latents_are_latent_only(name: str) -> None:
    assert cache_format(name).latent_only == ("mla" in name)


@pytest.mark.parametrize("look_up", [weight_format, cache_format, dtype])
@pytest.mark.parametrize("name", ["", "fp9", "BF16", "float16"])
def test_an_unknown_format_is_refused_with_those_known(look_up: object, name: str) -> None:
    with pytest.raises(ValueError, match="unknown; use one of .*bf16") as refused:
        look_up(name)  # type: ignore[operator]
    assert repr(name) in str(refused.value)
    assert "\n" not in str(refused.value)
