"""What is said of long context: every claim of section 8 beside our number, and the handbook's worked examples no other test has."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from simulator import claims as told
from simulator import training
from simulator.claims import Claim, claims, ours
from simulator.compare import active_parameters, quantities
from simulator.data import data_path
from simulator.dtypes import CACHE_FORMATS
from simulator.engines import Vllm
from simulator.engines.paging import paged_waste, reserved_waste
from simulator.hardware import cluster, gpu
from simulator.hf import with_formats
from simulator.kernels.attention import Causal, Segment, Window, attention, pairs
from simulator.kernels.blocked_attention import blocked_attention_bytes
from simulator.kernels.latent_attention import latent_attention
from simulator.kernels.sparse_attention import BigBird, Blocks, TopK
from simulator.kernels.unfused_attention import unfused_attention
from simulator.layers import CompressedAttention
from simulator.layers.layer import Direction
from simulator.parallel import Layout
from simulator.parallel.sharded_data import MUON_BYTES, ShardedData
from simulator.phases import System
from simulator.work import fold, quantity
from tests.support import model
from tests.test_cli import Say, say  # noqa: F401 (a fixture)

M1, K128 = 1_048_576.0, 131_072.0
LLAMA, BIG = "meta-llama/Meta-Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-405B"
V3 = "deepseek-ai/DeepSeek-V3"
CLAIMS = claims()
numbered = [c for c in CLAIMS if c.verdict != "open"]


def name(claim: Claim) -> str:
    return claim.says[:70]


# ---- every claim


@pytest.mark.parametrize("claim", numbered, ids=name)
def test_a_claim_holds_or_differs_as_is_said(claim: Claim) -> None:
    assert claim.agrees is (claim.verdict == "holds"), f"stated {claim.stated}, ours {claim.show(claim.ours)}"


@pytest.mark.parametrize("claim", CLAIMS, ids=name)
def test_a_claim_is_told_whole(claim: Claim) -> None:
    assert claim.verdict in told.VERDICTS
    assert claim.says
    assert claim.source
    # what does not hold, or cannot be told, is explained
    assert claim.why or claim.verdict == "holds"
    # a number of theirs has one of ours, made by a function; without one nothing is computed
    assert (claim.ours is None) == (claim.low is None) == (claim.by == "") == (claim.verdict == "open")
    if claim.ours is not None:
        assert math.isfinite(claim.ours)
        assert claim.within <= 0.15
    for cell in (claim.says, claim.why, claim.source, claim.stated, claim.show(claim.ours)):
        assert "|" not in cell
        assert "\n" not in cell


def test_claims_are_told_once() -> None:
    assert len({c.says for c in CLAIMS}) == len(CLAIMS)
    topics = [topic for topic, _ in told.by_topic(CLAIMS)]
    assert len(set(topics)) == len(topics), "claims of a topic stand together"


def test_an_entry_has_no_key_that_nobody_reads() -> None:
    with data_path("published", "claims.toml").open("rb") as file:
        entries = tomllib.load(file)["claims"]
    read = {"topic", "says", "stated", "at_least", "at_most", "reading", "unit", "within", "by", "inputs", "verdict", "why", "source"}
    for entry in entries:
        assert entry.keys() <= read, entry["says"]
        assert "by" not in entry or {"stated", "at_least", "at_most"} & entry.keys(), entry["says"]


def test_every_function_is_asked() -> None:
    assert {c.by for c in CLAIMS} - {""} == set(ours.FUNCTIONS)


@pytest.mark.parametrize(
    ("low", "high", "within", "value", "agrees"),
    [
        (10.0, 10.0, 0.02, 10.19, True), (10.0, 10.0, 0.02, 10.3, False), (10.0, 10.0, 0.02, 9.7, False), (1.0, math.inf, 0.0, 1e9, True),
        (1.0, math.inf, 0.0, 0.99, False), (-math.inf, 4.0, 0.0, 4.1, False), (60.0, 80.0, 0.0, 75.0, True), (60.0, 80.0, 0.0, 81.0, False),
    ],
)  # fmt: skip
def test_agreement_is_within_the_range_or_the_share(low: float, high: float, within: float, value: float, agrees: bool) -> None:
    assert Claim("t", "s", "holds", "", "x", low=low, high=high, within=within, ours=value).agrees is agrees


def test_the_page_says_what_the_command_computes() -> None:
    """`longctx claims --markdown > docs/claims.md` writes it anew."""
    assert (data_path().parent / "docs" / "claims.md").read_text(encoding="utf-8") == told.markdown()


def test_the_command_prints_every_claim_and_refuses_two_forms(say: Say) -> None:  # noqa: F811
    document = say("claims", "--json").document
    assert [entry["claim"] for entry in document["claims"]] == [c.says for c in CLAIMS]
    assert say("claims", "--markdown").out == told.markdown()
    shown = say("claims")
    assert shown.code == 0
    assert all(topic in shown.out for topic, _ in told.by_topic(CLAIMS))
    refused = say("claims", "--markdown", "--json")
    assert refused.code == 2
    assert "leave out either" in refused.err


def test_the_recipe_is_printed_whole_from_the_function_of_the_page(say: Say) -> None:  # noqa: F811
    from simulator import figures

    found = say("compare", "--recipe", "--context", "128K", "--json").document["recipe"]
    assert [(c["choice"], c["then"], c["now"], c["number"], c["factor"]) for c in found] == [
        (c.what, c.then, c.now, c.number, c.factor) for c in figures.recipe(2**17)
    ]
    shown = " ".join(say("compare", "--recipe").out.split())
    for line in ("positions", "grouped heads", "quantized cache", "fused attention", "mixture of experts", "stages of training", "evaluation at each stage"):
        assert line in shown
    for words, part in ((["compare", "--recipe", LLAMA], "leave out"), (["compare", "--recipe", "--head-types"], "one at a time")):
        refused = say(*words)
        assert refused.code == 2
        assert part in refused.err


# ---- the handbook's numbers of section 8, computed there by hand and here by the functions that claims name

SECTION_8: list[tuple[str, Callable[[], Any], float, float]] = [
    ("attention 2,048 to 1M, squares", lambda: ours.pairs_growth(short=2048.0, long=M1), 262_144, 5e-4),
    ("attention 2,048 to 10^6, squares", lambda: ours.pairs_growth(short=2048.0, long=1e6), 238_419, 5e-4),
    ("70B at 128K, GiB", lambda: ours.cache_bytes(model=LLAMA, context=K128) / 2**30, 40.0, 0),
    ("70B weights, GB", lambda: ours.weight_bytes(model=LLAMA) / 1e9, 141.2, 1e-3),
    ("70B at 1M, GiB", lambda: ours.cache_bytes(model=LLAMA, context=M1) / 2**30, 320.0, 0),
    ("weights and cache at 1M, GB", lambda: (ours.weight_bytes(model=LLAMA) + ours.cache_bytes(model=LLAMA, context=M1)) / 1e9, 484.797, 1e-3),
    ("the same cache in NVFP4, GB", lambda: ours.cache_bytes(model=LLAMA, context=M1, cache="nvfp4") / 1e9, 96.64, 1e-4),
    # the handbook takes every weight to 4.5 bits; embedding and head stay in bf16: 3.03 GB more
    ("weights in NVFP4, GB", lambda: float(with_formats(model(LLAMA), "nvfp4", None).weight_bytes()) / 1e9 - 2 * 128_256 * 8192 * (2 - 4.5 / 8) / 1e9, 39.71, 2e-3),
    ("GQA", lambda: ours.head_type(name="GQA", heads=128, head_dim=128, kv_heads=8, latent=512, rope=64), 16, 0),
    ("MLA", lambda: ours.head_type(name="MLA", heads=128, head_dim=128, kv_heads=8, latent=512, rope=64), 56.8889, 1e-5),
    ("MQA", lambda: ours.head_type(name="MQA", heads=128, head_dim=128, kv_heads=8, latent=512, rope=64), 128, 0),
    ("V3's own twin", lambda: ours.own_twin(model=V3, context=131_072), 71.1111, 1e-5),
    ("28 is half of it", lambda: ours.head_type(name="MLA", heads=128, head_dim=128, kv_heads=8, latent=512, rope=64) / 2, 28.4444, 1e-5),
    ("FP8", lambda: ours.compression(cache="fp8"), 2, 0),
    ("KIVI-2 g32", lambda: ours.compression(cache="kivi-2"), 5.3333, 1e-4),
    ("KIVI-2 g128", lambda: ours.compression(cache="kivi-2", group=128), 7.1111, 1e-4),
    ("nuq3-1%", lambda: ours.compression(cache="kvquant-3"), 4.8, 6e-3),
    ("the printed ratio of HBM bytes, two versions", lambda: ours.traffic_ratio(sequences=64.0, tokens=1024.0, heads=16.0, head_dim=64, gpu="a100"), (40.3 + 35.3) / 2 / 4.4, 0.08),
    ("FA2 on A100, 225 of 312", lambda: ours.utilisation(gpu="a100", impl="flash2", tokens=16_384.0, hidden=2048, head_dim=128, backward=False), 225 / 312, 0.10),
    ("FA3 on H100, 740 of 989", lambda: ours.utilisation(gpu="h100", impl="flash3", tokens=16_384.0, hidden=2048, head_dim=256, backward=False), 740 / 989, 0.05),
    ("FA3 on H100, charted", lambda: ours.charted(source="flashattention-3-readme", kernel="FlashAttention-3", gpu="h100"), 740 / 989, 0.05),
    ("N sqrt N at 16K", lambda: ours.strided_share(tokens=16_384.0), 0.0235577, 1e-5),
    ("StreamingLLM, MiB", lambda: ours.sink_bytes(sinks=4, window=2044, layers=32, heads=32, head_dim=128, context=2048.0) / 2**20, 1024, 0),
    ("NSA at 64K", lambda: ours.selected_ratio(hidden_size=2560, num_attention_heads=64, num_key_value_heads=4, head_dim=192, v_head_dim=128, context=65_536.0), 11.6364, 3e-4),
    ("Jamba at 256K, GiB", lambda: ours.rows_bytes(model="ai21labs/Jamba-v0.1", context=262_144.0) / 2**30, 4.0, 0),
    ("Mixtral at 256K, GiB", lambda: ours.rows_bytes(model="mistralai/Mixtral-8x7B-v0.1", context=262_144.0) / 2**30, 32.0, 0),
    # 4.6: the handbook rounds the weights to 405e9 and counts the embedding among them
    ("405B, a token at 8K", lambda: training.token_flops(model(BIG), 8192.0), 2.5315e12, 4e-3),
    ("405B, a token at 128K", lambda: training.token_flops(model(BIG), K128), 4.0535e12, 3e-3),
    ("405B, 128K over 8K", lambda: ours.token_cost_ratio(model=BIG, short=8192.0, long=K128), 1.6012, 2e-3),
    ("800B at 128K, FLOPs", lambda: ours.training_flops(model=BIG, tokens=800e9, length=K128), 3.2428e24, 3e-3),
    ("800B at 128K of 6 N T", lambda: ours.training_flops(model=BIG, tokens=800e9, length=K128) / (15.6e12 * 6 * 405e9), 0.08554, 3e-3),
    ("V3's stages, tokens", lambda: ours.stage_tokens(steps=1000, sequences=1920, length=32_768), 62_914_560_000, 0),
    ("CP 16", lambda: ours.rank_tokens(tokens=K128, ranks=16, order="zigzag"), 8192, 0),
    ("Ring, NVLink", lambda: ours.block_to_hide(gpu="a100", kind="nvlink"), 1040, 1e-3),
    ("Ring, InfiniBand", lambda: ours.block_to_hide(gpu="a100", kind="network", rate=12.5e9), 24_960, 1e-3),
    ("PagedAttention, Orca (Max), of what is reserved", lambda: ours.reserved(prompt=161.31, output=337.99, slots=2048.0), 1 - 20.4 / (20.4 + 13.3 + 57.3), 0.03),
    ("PagedAttention, Orca (Oracle), of what is reserved", lambda: ours.reserved(prompt=161.31, output=337.99), 1 - 38.2 / (38.2 + 25.2), 0.03),
    ("Llama 4, layers without positions", lambda: ours.position_free_share(model="meta-llama/Llama-4-Scout-17B-16E-Instruct"), 0.25, 0),
    ("RoPE's bound at 4,096 over that at 0", lambda: ours.bound_ratio(base=1e4, head_dim=128, near=0.0, far=4096.0), 4.88279 / 32.5, 1e-5),
    ("V4-Pro's operations", lambda: ours.operations_ratio(model="deepseek-ai/DeepSeek-V4-Pro", base="deepseek-ai/DeepSeek-V3.2", context=M1), 0.264574, 5e-3),
    ("V4-Flash's operations", lambda: ours.operations_ratio(model="deepseek-ai/DeepSeek-V4-Flash", base="deepseek-ai/DeepSeek-V3.2", context=M1), 0.0996728, 8e-3),
    ("V4-Pro at 1M, GiB", lambda: ours.cache_bytes(model="deepseek-ai/DeepSeek-V4-Pro", context=M1, cache="fp8_ds_v4_fp4_index") / 2**30, 4.9178, 5e-3),
    ("405B in AdamW, TB", lambda: ours.state_bytes(parameters=405e9, optimizer="adam") / 1e12, 6.48, 0),
    ("405B over 1,024 ranks, GB", lambda: ours.state_bytes(parameters=405e9, optimizer="adam", ranks=1024) / 1e9, 6.328, 1e-4),
    ("Muon, bytes a parameter", lambda: float(ShardedData(3, 1, optimizer_bytes=MUON_BYTES).footprint(1.0).total), 12, 0),
    ("Newton-Schulz of 4096 x 14336", lambda: training.newton_schulz_flops(rows=4096, columns=14_336), 5_497_558_138_880, 0),
]  # fmt: skip


@pytest.mark.parametrize(("what", "computed", "truth", "within"), SECTION_8, ids=[row[0] for row in SECTION_8])
def test_a_number_of_section_8_is_ours(what: str, computed: Callable[[], Any], truth: float, within: float) -> None:
    assert float(computed()) == pytest.approx(truth, rel=within or 1e-12), what


# ---- worked examples of sections 1, 2 and 6 that stand in no other test


def rows_of(name: str, cache: str, compress_ratio: int) -> float:
    """Bytes a token adds in one layer of a kind."""
    stored = CACHE_FORMATS[cache]
    layer = next(layer for _, layer in model(name).mixers if isinstance(layer, CompressedAttention) and layer.compress_ratio == compress_ratio)
    return sum(float(stored.row_bytes(item.row)) / item.every for item in layer.kept(layer.whole((Segment(0.0, 0.0, 0.0),))) if item.grows)


def multiplied(version: str) -> float:
    """Weights a token meets but for its row of the embedding."""
    spec = model(f"deepseek-ai/DeepSeek-{version}")
    return float(active_parameters(spec)) - spec.vocab_size * spec.hidden_size


def decoded(version: str) -> float:
    """Useful FLOPs of one more token at a million."""
    return quantities(model(f"deepseek-ai/DeepSeek-{version}"), 2**20).decode_flops


ONE = Segment(1.0, 1.0, 0.0)
PRO, FP4 = "deepseek-ai/DeepSeek-V4-Pro", "fp8_ds_v4_fp4_index"
EXAMPLES: list[tuple[str, Callable[[], Any], float, float]] = [
    ("1.2 a backward pass of a Llama 70B layer at 128K", lambda: attention("a", Segment(1.0, K128, 0.0), heads=64.0, kv_heads=8.0, head_dim=128, backward=True).tensor_flops, 7.0369281e14, 1e-8),
    ("1.2 half a difference of squares over exact, 8,192 after 122,880", lambda: (K128**2 - 122_880**2) / 2 / pairs(Causal(), Segment(1.0, 8192.0, 122_880.0)), 0.9999961, 1e-7),
    ("1.4 a pair absorbed over expanded", lambda: latent_attention("a", ONE, heads=128.0, kv_lora_rank=512, rope_head_dim=64).tensor_flops / attention("a", ONE, heads=128.0, kv_heads=128.0, head_dim=192, v_head_dim=128).tensor_flops, 3.4, 0),
    ("1.5 a window of 4,096 at 128K", lambda: Causal().cumulative(K128) / Window(4096).cumulative(K128), 16.25, 5e-4),
    ("1.5 N W over exact at N = 2 W", lambda: 8192 * 4096 / Window(4096).cumulative(8192.0), 1.33322, 1e-5),
    ("1.10 BigBird's share of N^2", lambda: BigBird(64, 3).cumulative(4096.0) / 4096**2, 0.151855, 1e-5),
    ("1.12 V3.2, bytes a token and layer", lambda: model("deepseek-ai/DeepSeek-V3.2").slope(CACHE_FORMATS["fp8_ds_mla"]) / 61, 788, 0),
    ("1.13 whole squares of the indexer over exact", lambda: M1 * (M1 // 4) / TopK(None, 4).cumulative(M1), 2.0, 1e-4),
    ("1.13 weights that multiply a token of V4-Pro, published 49B", lambda: multiplied("V4-Pro"), 48.87e9, 2e-3),
    ("1.13 of V4-Flash, published 13B", lambda: multiplied("V4-Flash"), 13.2766e9, 2e-3),
    ("1.13 of V3.2, published 37B", lambda: multiplied("V3.2"), 37.5e9, 2e-3),
    ("1.13 FLOPs of one more token at 1M, V4-Pro over V3.2", lambda: decoded("V4-Pro") / decoded("V3.2"), 0.26195, 1e-3),
    ("1.13 V4-Flash over V3.2", lambda: decoded("V4-Flash") / decoded("V3.2"), 0.12123, 1e-3),
    ("1.14 MoBA at 1M", lambda: Causal().cumulative(M1) / Blocks(4096, 12).cumulative(M1), 11.3856, 1e-5),
    ("2.1 Llama 70B at 128K, GB", lambda: model(LLAMA).cache_bytes(K128) / 1e9, 42.9497, 1e-6),
    ("2.2 FlashMLA's 62 layers at 128K, GiB", lambda: model(V3).slope() / 61 * 62 * K128 / 2**30, 8.71875, 0),
    ("2.2 V4-Pro in bf16 at 1M, GiB", lambda: model(PRO).slope() * M1 / 2**30, 9.6171875, 0),
    ("2.2 a CSA layer, bytes a token", lambda: rows_of(PRO, FP4, 4), 163.0, 0),
    ("2.2 an HCA layer", lambda: rows_of(PRO, FP4, 128), 4.5625, 0),
    ("2.2 V4-Pro with FP8 index keys", lambda: model(PRO).slope(CACHE_FORMATS["fp8_ds_v4"]), 5511.4375, 0),
    ("2.2 windows over compressed entries, no indexer, of 128 tokens", lambda: 61 * 584 / (30 * (rows_of(PRO, FP4, 4) - 68 / 4) + 31 * rows_of(PRO, FP4, 128)), 7.880, 2e-4),
    ("2.3 NVFP4, bits", lambda: CACHE_FORMATS["nvfp4"].bits_per_element, 4.5, 0),
    ("2.3 MXFP4", lambda: CACHE_FORMATS["mxfp4"].bits_per_element, 4.25, 0),
    ("2.4 blocks of 16 at 1,024 tokens, %", lambda: 100 * paged_waste(1024.0, 0.0, 16), 0.72710, 1e-4),
    ("2.4 a V4 page holds whole entries of both kinds, every 4 and every 128 tokens", lambda: Vllm().allocation(model(PRO), Layout(tp=8), cluster("b300", 8), 2**20).prefix_tokens % 128, 0, 0),
    ("2.6 TP16 over 8 key-value heads", lambda: 16 * System(model(LLAMA), Layout(tp=16)).resident(sequences=1.0, context=1.0).cache / model(LLAMA).cache_bytes(1.0), 2.0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("what", "computed", "truth", "within"), EXAMPLES, ids=[row[0] for row in EXAMPLES])
def test_a_worked_example_is_ours(what: str, computed: Callable[[], Any], truth: float, within: float) -> None:
    assert float(computed()) == pytest.approx(truth, rel=within or 1e-12), what


# ---- what the claims needed


def test_unfused_attention_moves_four_squares_forward_and_dropout_five_more_both_ways() -> None:
    """FORMULAS 3.1: (4 N^2 + 4 N d) e forward without mask and dropout: 9.13 GB for GPT-2 medium."""
    asked, square = Segment(64.0, 1024.0, 0.0), 1024 * 64 * 16 * 1024 * 2

    def moved(**options: bool) -> float:
        return float(fold(unfused_attention("a", asked, heads=16.0, head_dim=64, **options), quantity("hbm_bytes")))

    # each head reads its own keys and values: we count those of one, 3 % less
    keys_and_values = (64 * 16 - 1) * 2 * 1024 * 64 * 2
    assert moved(causal=False) + keys_and_values == pytest.approx(9.1268e9, rel=1e-5)
    assert moved(dropout=True) - moved() == 2.5 * square
    assert moved(dropout=True, backward=True) - moved(backward=True) == 5 * square


def test_the_first_flash_attention_moves_what_a_walk_over_its_loops_moves() -> None:
    """Algorithm 1 and 4 of 2205.14135, block by block; FORMULAS 3.2: 1.913 GB with statistics in 16 bits."""
    n, d, sram = 1000, 64, 100 * 1024
    block = math.ceil(sram / 2 / (4 * d))
    forward = backward = 0
    for start in range(0, n, block):
        keys = min(block, n - start)
        forward += 2 * keys * d * 2 + 3 * n * d * 2 + 4 * n * 4
        backward += 2 * 2 * keys * d * 2 + 5 * n * d * 2 + 2 * n * 4
    shape = {"tokens": float(n), "heads": 1.0, "head_dim": d, "sram_bytes": float(sram)}
    assert blocked_attention_bytes(**shape) == forward  # type: ignore[arg-type]
    assert blocked_attention_bytes(**shape, backward=True) == backward  # type: ignore[arg-type]
    sram_bytes = gpu("a100").shared_memory_bytes_per_unit
    assert sram_bytes is not None
    assert blocked_attention_bytes(tokens=1024.0, heads=1024.0, head_dim=64, sram_bytes=sram_bytes) / 1e9 == pytest.approx(1.9126, rel=0.02)


def test_twice_the_sram_halves_the_traffic_and_twice_the_width_quadruples_it() -> None:
    one = blocked_attention_bytes(tokens=2.0**20, heads=1.0, head_dim=64, sram_bytes=2.0**17)
    assert blocked_attention_bytes(tokens=2.0**20, heads=1.0, head_dim=64, sram_bytes=2.0**18) == pytest.approx(one / 2, rel=0.06)
    assert blocked_attention_bytes(tokens=2.0**20, heads=1.0, head_dim=128, sram_bytes=2.0**17) == pytest.approx(4 * one, rel=0.12)


@pytest.mark.parametrize("lengths", [(161, 338), (19, 58), (1024, 1)])
def test_waste_is_what_a_simulation_of_running_requests_wastes(lengths: tuple[int, int]) -> None:
    """A slot-by-slot replay: requests with geometric outputs run one after the other; tokens held and slots taken are summed over time."""
    import numpy as np

    prompt, output = lengths
    rng = np.random.default_rng(8)
    outputs = rng.geometric(1 / output, size=40_000)
    held = paged = exact = time = 0.0
    for n in outputs.tolist():
        steps = np.arange(prompt + 1, prompt + n + 1)
        held += float(steps.sum())
        paged += float((np.ceil(steps / 16) * 16).sum())
        exact += float(n * (prompt + n))
        time += n
    assert held / time == pytest.approx(prompt + output, rel=0.02)
    assert 1 - held / exact == pytest.approx(reserved_waste(prompt, output), abs=0.01)
    assert 1 - held / (2048 * time) == pytest.approx(reserved_waste(prompt, output, 2048), abs=0.01)
    if output > 16:
        assert 1 - held / paged == pytest.approx(paged_waste(prompt, output, 16), rel=0.05)


@pytest.mark.parametrize("name", [LLAMA, V3, "Qwen/Qwen3-Next-80B-A3B"])
@pytest.mark.parametrize("length", [4096.0, K128])
def test_training_on_a_token_is_three_forward_passes_that_score_every_token(name: str, length: float) -> None:
    """Forward, twice as much backward, and the logits that a forward step leaves out."""
    spec = model(name)
    (forward,) = System(spec, Layout()).step((Segment(1.0, length, 0.0),), direction=Direction.FORWARD)
    rest = 2 * spec.hidden_size * spec.vocab_size * (length - 1)
    assert training.token_flops(spec, length) == pytest.approx(3 * (float(fold(forward, quantity("model_flops"))) + rest) / length, rel=1e-12)


def test_training_on_a_token_is_six_weights_and_its_share_of_the_pairs() -> None:
    """FORMULAS 4.6: 6 N + 6 L n_q d (S + 1)."""
    spec, s = model(LLAMA), 8192.0
    weights = float(spec.parameters()) - 128_256 * 8192 - (2 * 80 + 1) * 8192
    assert training.token_flops(spec, s) == pytest.approx(6 * weights + 6 * 80 * 64 * 128 * (s + 1), rel=1e-12)
