"""What one number costs to keep."""

from __future__ import annotations

import numpy as np
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
    kivi,
    weight_format,
)
from simulator.hf import with_formats
from simulator.kernels.attention import Segment
from tests.support import model

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


HEADS = CacheRow(2 * 8 * 128.0, vectors=16.0)
V3, V4, INDEX = CacheRow(512.0, 64.0, latent=True), CacheRow(448.0, 64.0, latent=True), CacheRow(128.0, index=True)


@pytest.mark.parametrize("name", CACHE_FORMATS)
@given(tokens=st.integers(0, 2**30), elements=st.integers(0, 10**5))
def test_beyond_its_residual_window_a_cache_grows_by_a_row_per_token(name: str, tokens: int, elements: int) -> None:
    one, row = cache_format(name), CacheRow(float(elements))
    assert one.bytes(0.0, row) == 0
    held = max(tokens, one.residual_tokens)
    assert one.bytes(held + 1.0, row) - one.bytes(float(held), row) == pytest.approx(one.row_bytes(row), rel=1e-6, abs=1e-3)
    if not one.residual_tokens:
        assert one.bytes(float(tokens), row) == tokens * one.row_bytes(row)


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_bytes_of_a_cache_are_the_same_for_arrays(name: str) -> None:
    tokens = np.array([0.0, 1.0, 127.0, 128.0, 129.0, 2.0**20])
    one = cache_format(name)
    assert one.bytes(tokens, HEADS).tolist() == [one.bytes(t, HEADS) for t in tokens.tolist()]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_no_format_is_larger_than_16_bits_nor_smaller_than_its_codes(name: str) -> None:
    one = cache_format(name)
    for row in (HEADS, V3, V4):
        plain = (row.elements + row.rope) * 2
        assert row.elements * one.bits / 8 <= one.row_bytes(row) <= plain


@pytest.mark.parametrize(
    ("bits", "group", "residual", "tokens", "expected"),
    [(2, 32, 128, 32_768, 3.0508), (2, 128, 128, 131_072, 16 / 7.0689), (4, 32, 0, 4096, 5.0), (2, 32, 0, 4096, 3.0)],
)
def test_kivi_keeps_the_bits_its_papers_print(bits: int, group: int, residual: int, tokens: int, expected: float) -> None:
    """FORMULAS 2.3 and 8.11; KVQuant's table prints 3.05 for KIVI-2 with groups of 32 and 128 recent tokens at 32K."""
    stored = kivi(bits, group, residual).bytes(float(tokens), HEADS) * 8 / (tokens * HEADS.elements)
    assert stored == pytest.approx(expected, rel=1e-4)


def test_within_its_residual_window_kivi_stores_16_bits() -> None:
    assert cache_format("kivi-2").bytes(128.0, HEADS) == cache_format("bf16").bytes(128.0, HEADS)


@pytest.mark.parametrize(("width", "bits"), [(2 * 4096.0, 3.33), (2 * 1024.0, 3.35)])
def test_kvquant_keeps_3_bits_its_outliers_and_two_pointers(width: float, bits: float) -> None:
    """FORMULAS 2.3: 3.32 to 3.35 bits, 4.8 x."""
    stored = cache_format("kvquant-3").row_bytes(CacheRow(width)) * 8 / width
    assert stored == pytest.approx(bits, abs=0.005)
    assert round(16 / stored, 1) == 4.8


@pytest.mark.parametrize(("name", "bits"), [("int4", 4.5), ("nvfp4", 4.5), ("mxfp4", 4.25), ("fp8", 8.0), ("bf16", 16.0), ("kivi-4", 5.0), ("int8", 8.25)])
def test_an_element_of_a_cache_has_its_bits_and_its_share_of_the_scale(name: str, bits: float) -> None:
    assert cache_format(name).row_bytes(HEADS) * 8 / HEADS.elements == bits


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("fp8_ds_mla", V3, 656), ("fp8_ds_mla", INDEX, 132), ("fp8_ds_v4", V4, 584), ("fp8_ds_v4", INDEX, 132), ("fp8_ds_v4_fp4_index", V4, 584),
        ("fp8_ds_v4_fp4_index", INDEX, 68), ("bf16", INDEX, 256), ("bf16", V4, 1024),
    ],
)
def test_deepseeks_layouts_are_byte_exact(name: str, row: CacheRow, expected: int) -> None:
    assert cache_format(name).row_bytes(row) == expected


def test_a_v4_page_is_a_multiple_of_576_bytes() -> None:
    assert cache_format("fp8_ds_v4").page_bytes(64.0, V4) == 65 * 576
    assert cache_format("fp8_ds_v4").page_bytes(2.0, V4) == 3 * 576
    assert cache_format("fp8_ds_mla").page_bytes(64.0, V3) == 64 * 656


def test_a_v4_token_takes_what_the_report_counts() -> None:
    """FORMULAS 2.2: Pro 5,031.4 B a token, Flash 3,514.3; one sequence of 1M tokens 4.92 GiB with its windows."""
    four = cache_format("fp8_ds_v4_fp4_index")
    assert model("deepseek-ai/DeepSeek-V4-Pro").slope(four) == pytest.approx(5031.4, rel=1e-5)
    assert model("deepseek-ai/DeepSeek-V4-Flash").slope(four) == pytest.approx(3514.3, rel=2e-5)
    rows = sum(
        n * item.bytes(2.0**20, four)
        for n, layer in model("deepseek-ai/DeepSeek-V4-Pro").mixers for item in layer.kept(layer.whole((Segment(1.0, 0.0, 1.0),))) if item.dtype is None
    )  # fmt: skip
    assert rows / 2**30 == pytest.approx(4.92, abs=0.005)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("deepseek-ai/DeepSeek-V3", "kivi-2"), ("deepseek-ai/DeepSeek-V3", "fp8_ds_v4"), ("deepseek-ai/DeepSeek-V4-Pro", "fp8_ds_mla"),
        ("meta-llama/Meta-Llama-3.1-8B", "fp8_ds_mla"), ("deepseek-ai/DeepSeek-V4-Flash", "int4"),
    ],
)
def test_a_format_a_model_cannot_use_is_refused_in_one_line_with_one_it_can(name: str, cache: str) -> None:
    with pytest.raises(ValueError, match=f"cache format {cache}: .*; use ") as refused:
        with_formats(model(name), None, cache)
    assert "\n" not in str(refused.value)
    offered = str(refused.value).split("; use ")[1].split(" for ")[0].replace(" or ", ", ").split(", ")
    for other in offered:
        assert with_formats(model(name), None, other).cache.name == other


@pytest.mark.parametrize("look_up", [weight_format, cache_format, dtype])
@pytest.mark.parametrize("name", ["", "fp9", "BF16", "float16"])
def test_an_unknown_format_is_refused_with_those_known(look_up: object, name: str) -> None:
    with pytest.raises(ValueError, match="unknown; use one of .*bf16") as refused:
        look_up(name)  # type: ignore[operator]
    assert repr(name) in str(refused.value)
    assert "\n" not in str(refused.value)
