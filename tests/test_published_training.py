"""Training runs that others published: each source's convention by hand, and that every row is compared or says what it lacks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from simulator import train_step
from simulator.calibration import Calibration
from simulator.data import data_path
from simulator.hardware import cluster, gpu
from simulator.layers import Attention
from simulator.published import Measurement, NotComparableError, measurements, question
from simulator.published.table import spec
from simulator.published.training import MPT, SOURCES, _joined, _running, cut, internlm, mpt
from simulator.training import token_flops
from simulator.validate import Compared, Refused, compare

TRAINING = ("throughput", "train_mfu", "train_step", "train_memory", "ratio", "gpu_hours")
ROWS = {row.id: row for row in measurements() if row.source in SOURCES}


@cache
def answered() -> tuple[list[Compared], list[Refused]]:
    return compare(sources=tuple(SOURCES))


def measured(identifier: str) -> float:
    return question(ROWS[identifier]).measured


def changed(identifier: str, **fields: str) -> Measurement:
    return replace(ROWS[identifier], **fields)


# ---- the contract


def test_every_training_row_is_compared_or_says_what_it_lacks() -> None:
    compared, refused = answered()
    assert len(compared) + len(refused) == len(ROWS)
    assert all(one.reason.startswith(("a training step: ", "GPU ", "model ")) and "not converted" not in one.reason for one in refused)
    assert {one.source for one in compared} == {
        "activation-recomputation-paper", "internevo", "llm-foundry", "megatron-bridge", "megatron-lm-llama-fp8", "simumax-b200",
    }  # fmt: skip


def test_the_readme_counts_the_steps_compared_and_their_error() -> None:
    times = [one for one in answered()[0] if one.unit == "s"]
    memories = [one for one in answered()[0] if one.unit == "B" and one.source == "simumax-b200"]
    error, held = np.median([abs(one.error) for one in times]), np.mean([one.covered for one in times])
    told = (data_path().parent / "README.md").read_text(encoding="utf-8")
    assert f"On {len(times)} published rows" in told
    assert f"the median error is {error * 100:.0f} %, mostly too fast, and the 80 % interval holds {held * 100:.0f} %" in told
    assert f"of {len(memories)} peak memories the median error is {np.median([abs(one.error) for one in memories]) * 100:.0f} %" in told
    assert np.median([one.error for one in times]) < 0


def test_no_step_beats_every_op_at_its_bound() -> None:
    """A step faster than peak rates allow is a wrong conversion."""
    for one in answered()[0]:
        if one.unit == "s":
            assert one.measured > question(ROWS[one.id]).answer(Calibration.none()).value, one.id


def test_rows_of_kinds_that_only_training_has_belong_to_these_sources() -> None:
    rows = [row for row in measurements() if row.kind in ("train_mfu", "train_step", "train_memory", "gpu_hours")]
    assert {row.source for row in rows} <= SOURCES.keys()


# ---- llm-foundry


@pytest.mark.parametrize("identifier", sorted(row.id for row in ROWS.values() if row.source == "llm-foundry"))
def test_an_mpt_has_the_parameters_that_its_row_prints(identifier: str) -> None:
    row = ROWS[identifier]
    assert mpt(row.model, int(row.number("seq_len"))).parameters() == row.number("params")


def test_mosaics_utilisation_counts_all_parameters_and_attention_in_full() -> None:
    """70B on 512 H100: 41.25 % of 989.5 TFLOP/s over 6 x 64862437376 + 12 x 80 x 8192 x 2048 FLOPs a token, and 8,388,608 tokens a step."""
    rate = 0.4125 * 989.5e12 / (6 * 64862437376 + 12 * 80 * 8192 * 2048)
    assert rate == pytest.approx(1007, rel=0.001)  # the tokens/s/GPU of the README's table
    assert measured("MOSAIC-0001") == pytest.approx(4096 * 2048 / (512 * rate), rel=1e-3)


def test_mosaics_rate_is_tokens_a_second_and_gpu() -> None:
    assert measured("MOSAIC-0010") == pytest.approx(2048 * 2048 / (2148 * 256))


def test_fp8_is_a_share_of_the_fp8_rate() -> None:
    """3B of 2048: 27.7 % of 1979 TFLOP/s is 30586 tokens/s/GPU in the same line of the README."""
    rate = 480 * 2048 / (measured("MOSAIC-0110") * 8)
    assert rate == pytest.approx(30586, rel=0.002)


def test_an_unknown_mpt_is_refused() -> None:
    with pytest.raises(NotComparableError, match="its layers are not known"):
        question(changed("MOSAIC-0001", model="MPT-2b"))
    assert len(MPT) == 9


def test_another_implementation_of_attention_changes_attention_alone() -> None:
    plain = Calibration.load(gpu("a100"))
    ran = _running(plain, "triton")
    for kernel in ("attention", "attention_backward"):
        named = (kernel, train_step.TRAINED[kernel], "bf16")
        assert ran.constants(named) == plain.constants((kernel, "triton", "bf16")) != plain.constants(named)
    assert ran.constants(("gemm", "", "bf16")) == plain.constants(("gemm", "", "bf16"))
    assert _running(plain, "") is plain


# ---- Megatron


def test_megatrons_model_flops_are_causal_and_leave_out_the_input_embedding() -> None:
    """26.02, 70B on GB300 in MXFP8: 4596 tokens/s/GPU and 2064 TFLOP/s stand in one line, 449 GFLOP a token."""
    row = ROWS["MBRIDGE-0406"]
    assert pytest.approx(449.1e9, rel=1e-3) == 2064e12 / 4596
    assert measured("MBRIDGE-0406") == pytest.approx(measured("MBRIDGE-0405"), rel=0.002)
    assert measured("MBRIDGE-0405") == pytest.approx(256 * 8192 / (4596 * 64))
    by_hand = 6 * (80 * (8192 * (8192 + 2 * 1024 + 8192) + 3 * 8192 * 28672) + 8192 * 128256) + 6 * 80 * 8192 * 8193
    assert float(token_flops(cut("llama3_70b", 80), 8192.0)) == pytest.approx(by_hand, rel=1e-4)
    assert row.unit.startswith("TFLOP/s/GPU")


@pytest.mark.parametrize(
    ("identifier", "changes", "told"),
    [
        ("MBRIDGE-0003", {}, "recipe of DeepSeekV3 recomputes"), ("MBRIDGE-0127", {}, "SFT packs"), ("MBRIDGE-0139", {}, "LoRA"),
        ("MBRIDGE-0152", {}, "NVFP4"), ("MBRIDGE-0148", {}, "to the host"),
        ("MBRIDGE-0405", {"n_gpus": "66"}, "no multiple of the stated degrees"), ("MBRIDGE-0405", {"batch": "global=255;micro=1"}, "equal numbers"),
    ],
)  # fmt: skip
def test_what_a_step_does_not_do_is_named(identifier: str, changes: dict[str, str], told: str) -> None:
    with pytest.raises(NotComparableError, match=told):
        question(changed(identifier, **changes))


def test_megatron_lms_example_is_the_same_run_in_both_figures() -> None:
    """70B: 1621 tokens/s/GPU; 780 TFLOP/s count more a token than Megatron-Bridge's 449 GFLOP: attention in full."""
    assert measured("MLM-0003") == pytest.approx(128 * 8192 / (1621 * 64))
    assert measured("MLM-0001") == pytest.approx(128 * 8192 / (13812 * 8))
    assert pytest.approx(6 * 69.5e9 + 12 * 80 * 8192 * 8192, rel=0.005) == 780e12 / 1621


def test_qwen3_counts_active_experts_and_its_replicas_share_them() -> None:
    """26.02 on GB300: 30376 tokens/s/GPU and 699 TFLOP/s in one line, 23.0 GFLOP a token with 8 of 128 experts."""
    assert pytest.approx(float(token_flops(spec("Qwen/Qwen3-30B-A3B"), 4096.0)), rel=0.005) == 699e12 / 30376
    assert measured("MBRIDGE-0447") == pytest.approx(512 * 4096 / (30376 * 8))


# ---- SimuMax


def test_simumax_prints_milliseconds_and_gib() -> None:
    assert measured("SIMU-0037") == pytest.approx(2.9646)
    assert measured("SIMU-0038") == pytest.approx(39.07 * 2**30)


def test_deepseek_is_cut_to_one_dense_layer_and_three_of_experts() -> None:
    for name in ("deepseekv2", "deepseekv3"):
        assert [count for count, _ in cut(name, 4).blocks] == [1, 3]


def test_a_model_cut_to_a_few_layers_keeps_its_ends() -> None:
    """70B: 12 layers of 855,654,400 and two matrices of 128256 x 8192."""
    assert cut("llama3_70b", 12).parameters() == 12 * 855_654_400 + 2 * 128256 * 8192 + 8192
    ((layers, (mixer, _)),) = cut("llama3_405b", 4).blocks
    assert isinstance(mixer, Attention)
    assert (layers, mixer.num_key_value_heads) == (4, 16)


def test_memory_of_steps_that_recompute_nothing_is_met_within_a_tenth() -> None:
    found = sorted(abs(one.error) for one in answered()[0] if one.source == "simumax-b200" and one.kind == "train_memory")
    assert len(found) == 27
    assert found[13] <= 0.03
    assert found[-1] <= 0.10


# ---- activation recomputation


@pytest.mark.parametrize(("identifier", "width", "layers", "gpus"), [("KORTH-0003", 6144, 48, 8), ("KORTH-0012", 12288, 96, 64), ("KORTH-0030", 25600, 128, 512)])
def test_states_of_gpts_layers_take_eighteen_bytes_a_parameter(identifier: str, width: int, layers: int, gpus: int) -> None:
    asked = question(ROWS[identifier])
    assert asked.measured == float(ROWS[identifier].value) * 2**30
    ours = asked.answer(Calibration.none()).value
    assert ours == pytest.approx(18 * layers * (12 * width**2 + 13 * width) / gpus)
    assert ours == pytest.approx(asked.measured, rel=5e-4)


# ---- InternEvo


def test_internevos_tflops_are_megatrons_of_2021_with_what_is_recomputed() -> None:
    """3217 tokens/s/GPU and 188 TFLOP/s stand in one line with checkpoints, 3944 and 174 in one without."""
    for rate, tflops, identifier, gpus in ((3217, 188, "IEVO-0040", 64), (3944, 174, "IEVO-0062", 64)):
        assert measured(identifier) == pytest.approx(16384 * gpus / (rate * gpus), rel=0.01)
        passes = 4 if identifier == "IEVO-0040" else 3
        assert tflops * 1e12 / rate == pytest.approx(passes * 32 * (24 * 4096**2 + 4 * 2048 * 4096) + 6 * 4096 * 103168, rel=0.01)


def test_internlm_has_seven_billion_parameters() -> None:
    """32 x (4 x 4096^2 + 4 x 4096 of bias + 3 x 4096 x 11008 + 2 x 4096), two matrices of 103168 x 4096, the last norm."""
    assert internlm().parameters() == 32 * (4 * 4096**2 + 4 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 103168 * 4096 + 4096


def test_a_node_with_four_ports_of_100_gb_shares_them() -> None:
    assert _joined(cluster("a100", 16), 4 * 12.5e9).tiers[-1].bytes_per_s == 6.25e9
    assert _joined(cluster("a100", 16), 4 * 12.5e9).tiers[0] == cluster("a100", 16).tiers[0]
