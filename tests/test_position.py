"""Cost and reach of position schemes: FORMULAS section 6, transformers' conventions, brute force."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.hf import load_model
from simulator.position import (
    Alibi,
    BucketBias,
    DynamicNtk,
    Learned,
    Linear,
    Llama3,
    LongRope,
    NoPosition,
    NtkAware,
    Plain,
    Position,
    RelativeVectors,
    Rotary,
    Scaling,
    SinusoidBias,
    Temperature,
    Yarn,
    magnitude,
    stretched_base,
    wavelengths,
)

SCHEMES: tuple[Position, ...] = (
    NoPosition(), Learned(2048, 12_288), BucketBias(64), RelativeVectors(64, 16), SinusoidBias(1024, 16, 64), Alibi(32), Rotary(128, 5e5), Rotary(64, 1e7),
)  # fmt: skip
SCALINGS: tuple[Scaling, ...] = (
    Plain(), Linear(8.0), NtkAware(8.0), DynamicNtk(4.0, 4096), Yarn(40.0, 4096), Yarn(32.0, 4096, truncate=False), Llama3(8.0, 8192),
    LongRope(32.0, 4096, (1.0,) * 64, tuple(np.linspace(1, 60, 64))),
)  # fmt: skip
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.name)


# ---- FORMULAS 6, row by row


def test_the_slowest_pair_of_llama_3_turns_once_in_2_6_million_tokens() -> None:
    assert wavelengths(128, 5e5)[-1] == pytest.approx(2.559e6, rel=1e-3)
    assert wavelengths(128, 5e5)[0] == pytest.approx(2 * math.pi)


@pytest.mark.parametrize(("theta", "trained", "pairs"), [(1e4, 4096, 18), (5e5, 8192, 29), (5e5, 1_048_576, 5), (5e6, 65_536, 25)])
def test_pairs_that_never_completed_a_period(theta: float, trained: int, pairs: int) -> None:
    rotary = Rotary(128, theta)
    assert rotary.incomplete(trained) == pairs
    assert rotary.incomplete(trained) == sum(2 * math.pi * theta ** (2 * i / 128) > trained for i in range(64))


def test_a_base_stretched_eight_times() -> None:
    assert stretched_base(1e4, 8, 128) == pytest.approx(82_685, abs=0.5)


def test_yarn_of_deepseek_v3() -> None:
    yarn = Yarn(40, 4096)
    assert yarn.ramp(64, 1e4) == (10, 23)
    assert yarn.attention_factor == pytest.approx(1.36889, abs=1e-5)
    assert Rotary(64, 1e4, yarn).logit_factor == pytest.approx(1.87385, abs=1e-5)


def test_v3_scales_its_softmax_instead_of_its_cosines() -> None:
    """Either way the logits grow 1.87385 times."""
    v3 = Yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0, scales_softmax=True)
    assert v3.attention_factor == 1
    assert v3.softmax_factor == pytest.approx(1.87385, abs=1e-5)
    assert Rotary(64, 1e4, v3).logit_factor == pytest.approx(Rotary(64, 1e4, Yarn(40, 4096)).logit_factor)


def test_longrope_grows_scores() -> None:
    assert LongRope(32, 4096, (), ()).attention_factor == pytest.approx(1.19024, abs=1e-5)


@pytest.mark.parametrize(("tokens", "factor"), [(8191, 1.0), (1_048_576, 1.4860), (10_000_000, 1.7107)])
def test_the_temperature_of_llama_4(tokens: int, factor: float) -> None:
    assert Temperature().factor(float(tokens)) == pytest.approx(factor, abs=5e-5)


@pytest.mark.parametrize(
    ("theta", "distance", "bound"),
    [(1e4, 0, 32.5), (1e4, 50, 12.63), (1e4, 256, 6.54), (1e4, 4096, 4.88), (1e4, 65_536, 4.89), (5e5, 256, 12.16), (5e5, 4096, 7.16), (5e5, 1_048_576, 4.71)],
)  # fmt: skip
def test_the_long_term_bound_falls_and_then_oscillates(theta: float, distance: int, bound: float) -> None:
    assert Rotary(128, theta).decay_bound(float(distance)) == pytest.approx(bound, abs=0.005)


def test_the_bound_is_the_mean_of_partial_sums_and_bounds_every_score() -> None:
    """RoFormer eq. 36 by hand; and |sum over i of h_i e^(i m theta_i)| <= max |h_(i+1) - h_i| x d / 2 x B(m) for random h."""
    rotary, m = Rotary(32, 1e4), 77.0
    angles = [m * 1e4 ** (-2 * i / 32) for i in range(16)]
    partial = [abs(sum(cmath.exp(1j * a) for a in angles[: j + 1])) for j in range(16)]
    assert rotary.decay_bound(m) == pytest.approx(sum(partial) / 16)
    rng = np.random.default_rng(0)
    for _ in range(100):
        h = rng.normal(size=16) + 1j * rng.normal(size=16)
        score = abs(np.sum(h * np.exp(1j * np.array(angles))))
        steps = np.abs(np.diff(np.append(h, 0)))
        assert score <= steps.max() * sum(partial) * (1 + 1e-12)


# ---- laws


@every_scheme
def test_a_scheme_costs_nothing_negative_and_scales_with_heads(scheme: Position) -> None:
    assert scheme.parameters() >= 0
    assert scheme.pair_flops() >= 0
    assert scheme.token_flops(64.0, 8.0) >= scheme.token_flops(32.0, 8.0) >= 0
    assert scheme.limit is None or scheme.limit > 0


@every_scaling
def test_a_scaling_never_speeds_a_pair_up_nor_slows_it_beyond_its_factor(scaling: Scaling) -> None:
    most = getattr(scaling, "factor", 1.0)
    if isinstance(scaling, DynamicNtk):
        most = scaling.factor * 1_048_576 / scaling.original_tokens - (scaling.factor - 1)
    if isinstance(scaling, LongRope):
        most = max(scaling.long_factor)
    slowed = scaling.interpolation(128, 1e4, 1_048_576.0)
    assert slowed.shape == (64,)
    assert np.all(slowed >= 1 - 1e-12)
    assert np.all(slowed <= most * (1 + 1e-12))


@every_scaling
def test_the_slowest_pair_is_slowed_most(scaling: Scaling) -> None:
    slowed = scaling.interpolation(128, 1e4, 1_048_576.0)
    assert np.all(np.diff(slowed) >= -1e-9)
    if not isinstance(scaling, (Plain, LongRope, DynamicNtk)):
        assert slowed[-1] == pytest.approx(getattr(scaling, "factor"))  # noqa: B009


@given(theta=st.floats(1e3, 1e8), trained=st.integers(512, 2**20), more=st.floats(1.01, 64))
def test_stretching_by_s_makes_no_pair_new_at_s_times_the_length(theta: float, trained: int, more: float) -> None:
    """PI keeps every angle within those of training; the plain embedding shows its incomplete pairs new ones."""
    assert Rotary(128, theta, Linear(more * 1.0001)).unseen(trained, trained * more) == 0
    assert Rotary(128, theta).unseen(trained, trained * more) == Rotary(128, theta).incomplete(trained)
    assert Rotary(128, theta).unseen(trained, trained) == 0


@pytest.mark.parametrize("original", [2048, 8192])
def test_dynamic_ntk_is_plain_up_to_its_length_and_ntk_beyond(original: int) -> None:
    dynamic = DynamicNtk(1.0, original)
    assert np.all(dynamic.interpolation(128, 1e4, float(original)) == 1)
    assert dynamic.interpolation(128, 1e4, 4.0 * original) == pytest.approx(NtkAware(4.0).interpolation(128, 1e4, 0.0))


def test_llama_3_keeps_fast_pairs_and_slows_slow_ones() -> None:
    slowed, waves = Llama3(8.0, 8192).interpolation(128, 5e5, 0.0), wavelengths(128, 5e5)
    assert np.all(slowed[waves < 8192 / 4] == 1)
    assert np.all(slowed[waves > 8192] == pytest.approx(8))
    between = (waves >= 8192 / 4) & (waves <= 8192)
    assert between.any()
    assert np.all((slowed[between] > 1) & (slowed[between] < 8))


def test_an_untruncated_ramp_lies_inside_the_truncated_one() -> None:
    whole, exact = Yarn(32, 4096).ramp(64, 150_000), Yarn(32, 4096, truncate=False).ramp(64, 150_000)
    assert whole[0] <= exact[0] <= exact[1] <= whole[1]
    assert whole != exact


def test_a_given_attention_factor_wins() -> None:
    assert Yarn(16, 65_536, attention=1.0).attention_factor == 1
    assert magnitude(1.0) == magnitude(0.5) == 1


@given(heads=st.integers(1, 256))
def test_alibi_slopes_fall_between_one_and_the_least(heads: int) -> None:
    slopes = Alibi(heads).slopes()
    assert slopes.shape == (heads,)
    assert len(set(slopes.tolist())) == heads
    assert np.all((slopes < 1) & (slopes >= 2.0**-8))
    assert np.all(np.exp(-slopes * Alibi(heads).horizon(0.5)) == pytest.approx(0.5))


@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_alibi_slopes_of_a_power_of_two_are_a_geometric_sequence(heads: int) -> None:
    assert Alibi(heads).slopes() == pytest.approx([2 ** (-8 * k / heads) for k in range(1, heads + 1)])


def test_buckets_cover_every_distance_once_and_saturate() -> None:
    bias = BucketBias(8)
    found = [bias.bucket(float(m)) for m in range(2000)]
    assert found == sorted(found)
    assert set(found) == set(range(32))
    assert {b for m, b in enumerate(found) if m >= 128} == {31}
    assert bias.bucket(np.arange(200.0)).tolist() == found[:200]  # type: ignore[union-attr]


def test_what_schemes_weigh() -> None:
    assert Learned(2048, 12_288).parameters() == 2048 * 12_288
    assert BucketBias(64).parameters() == 64 * 32
    assert RelativeVectors(64, 16).parameters() == 2 * 33 * 64
    assert SinusoidBias(1024, 16, 64).parameters() == 1024 * 1024 + 2 * 1024
    assert Rotary(128, 5e5).token_flops(64.0, 8.0) == 3 * 128 * 72
    assert Rotary(128, 5e5).table_bytes(131_072.0) == 131_072 * 128 * 4


def test_only_a_table_ends() -> None:
    assert [scheme.name for scheme in SCHEMES if scheme.limit is not None] == ["learned absolute"]


@pytest.mark.parametrize("told", [[None], "8", True, -1, float("inf")])
def test_a_bias_that_is_no_number_counts_as_none(told: object) -> None:
    config = {
        "architectures": ["MPTForCausalLM"], "model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128, "max_seq_len": 128,
        "expansion_ratio": 4, "attn_config": {"alibi": True, "alibi_bias_max": told},
    }  # fmt: skip
    assert load_model(config).reach.encoding.bias_max == 8.0
