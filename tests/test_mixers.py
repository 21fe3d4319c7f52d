"""Every way to mix tokens: pairs against brute force, the handbook's worked examples, laws over all kinds of mixers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import Calibration, Decode, Layout, Prefill, estimate, load_model
from simulator.dtypes import BF16, CACHE_FORMATS, CacheRow
from simulator.estimate import bare
from simulator.kernels.attention import Causal, Chunked, DualChunk, Mask, Segment, Sinks, Window, pairs
from simulator.kernels.scan import (
    delta_chunk_flops,
    delta_step_flops,
    linear_chunk_flops,
    linear_step_flops,
    recurrent,
    selective_scan,
    ssd_chunk_flops,
)
from simulator.kernels.sparse_attention import (
    Banded,
    BigBird,
    Blocks,
    Columns,
    Pooled,
    Summaries,
    TopK,
    floors,
    floors_capped,
    index_scores,
    sparse_attention,
)  # fmt: skip
from simulator.launch import LAUNCHES, launch
from simulator.layers import (
    MLP,
    REGISTRY,
    S4,
    Attention,
    CompressedAttention,
    Direction,
    Embedding,
    GatedDeltaNet,
    GatedMLP,
    Head,
    HyperConnection,
    IndexedLatentAttention,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    LightningAttention,
    Linear,
    Mamba,
    Mamba2,
    MixtureOfBlockAttention,
    MoE,
    NativeSparseAttention,
    ParallelMixers,
    Retention,
    ShortConv,
)  # fmt: skip
from simulator.layers.layer import is_mixer, parameters
from simulator.model import ModelSpec
from simulator.phases import System
from simulator.timing import Clock
from simulator.work import Op, fold, quantity
from tests.support import leaves, machine, model, relative

M1, N = 1_048_576, 131_072
CACHE = CACHE_FORMATS["bf16"]

#: One of each kind, small enough to count and wide enough to split eight ways.
EACH: dict[str, Layer] = {
    "gated": Attention(512, 16, 8, 32, rotary_dim=32, output_gate=True, qk_norm=True),
    "shared k v": Attention(512, 16, 8, 32, rotary_dim=32, shared_kv=True),
    "shared cache": Attention(512, 16, 8, 32, rotary_dim=32, shares_cache=True),
    "mha with biases": Attention(512, 16, 16, 32, attention_bias=True, output_bias=True, norm_parameters=2),
    "full qk norm": Attention(512, 16, 8, 32, rotary_dim=16, qk_norm_full=True),
    "sinks": Attention(512, 16, 8, 32, mask=Sinks(4, 60), rotary_dim=32),
    "dual chunk": Attention(512, 16, 8, 32, mask=DualChunk(80, 16), rotary_dim=32),
    "strided": Attention(512, 16, 16, 32, mask=Window(17), second_mask=Columns(16)),
    "fixed": Attention(512, 16, 16, 32, mask=Chunked(16), second_mask=Summaries(16, 4)),
    "dsa": IndexedLatentAttention(512, 16, 128, 64, 32, 16, 32, index_n_heads=8, index_head_dim=32, index_topk=48),
    "dsa shared": IndexedLatentAttention(512, 16, 128, 64, 32, 16, 32, index_topk=48, indexer_shared=True),
    "swa": CompressedAttention(512, 16, 64, 16, 128, 8, 32, 32),
    "csa": CompressedAttention(512, 16, 64, 16, 128, 8, 32, 32, 4, 8, 32, 24),
    "hca": CompressedAttention(512, 16, 64, 16, 128, 8, 32, 32, 32),
    "nsa": NativeSparseAttention(512, 16, 8, 32, 32, 16, 8, 16, 4, 64, 32),
    "moba": MixtureOfBlockAttention(512, 16, 8, 32, 32, 4, 32),
    "lightning": LightningAttention(512, 16, 32, 64),
    "retention": Retention(512, 8, 32, 64, 64),
    "gated deltanet": GatedDeltaNet(512, 8, 16, 32, 32, 4),
    "kda": KimiDeltaAttention(512, 16, 32, 4),
    "mamba": Mamba(512, 1024, 16, 4, 32, inner_norms=True),
    "mamba2": Mamba2(512, 16, 64, 32, 8, 4, 64),
    "s4": S4(512),
    "short conv": ShortConv(512, 3),
    "parallel": ParallelMixers((Attention(512, 16, 8, 32, rotary_dim=32), Mamba2(512, 16, 64, 32, 8, 4, 64))),
    "plain mlp": MLP(512, 2048, mlp_bias=True),
    "latent experts": MoE(512, 16, 2, 128, 256, gated=False, latent_size=128),
    "hashed experts": MoE(512, 16, 2, 128, 128, hash_routed=True),
    "linear": Linear(512),
    "hyper": HyperConnection(512, 4),
}  # fmt: skip
MIXERS = {name: layer for name, layer in EACH.items() if is_mixer(layer)}
every_layer = pytest.mark.parametrize("name", EACH)
every_mixer = pytest.mark.parametrize("name", MIXERS)


def stack(*layers: Layer) -> ModelSpec:
    return ModelSpec("stack", 512, 1024, ((4, layers),), Embedding(1024, 512), Head(1024, 512))


def with_mlp(name: str) -> ModelSpec:
    return stack(EACH[name], GatedMLP(512, 2048))


def amount(work: Any, name: str) -> float:
    return float(np.sum(fold(work, quantity(name))))


def test_every_kind_of_layer_is_tried() -> None:
    tried = {type(layer) for layer in EACH.values()} | {GatedMLP, LatentAttention, Embedding, Head}
    assert tried == set(REGISTRY)


# ---- pairs against brute force


def sees(mask: Mask, i: int, j: int, n: int) -> bool:
    """The definition of each mask for 0-indexed query i and key j of n."""
    if isinstance(mask, Banded):
        half, cross = mask.window // 2, mask.global_tokens
        return abs(i - j) <= half or i < cross or j < cross
    if j > i:
        return False
    if isinstance(mask, Sinks):
        return i - j < mask.width or (j < mask.sinks and i - j >= mask.width) or i < mask.sinks + mask.width
    if isinstance(mask, Columns):
        return (i - j) % mask.stride == 0
    if isinstance(mask, Summaries):
        return j % mask.block >= mask.block - mask.columns
    assert isinstance(mask, (Causal, DualChunk))
    return True


small = st.integers(1, 14)
static = st.one_of(
    st.builds(Columns, small), st.builds(lambda b, c: Summaries(b, min(b, c)), small, small), st.builds(lambda h, g: Banded(2 * h, g), st.integers(0, 9), st.integers(0, 12)),
    st.builds(lambda b, c: DualChunk(b + c, c), small, small),
)  # fmt: skip


@settings(max_examples=300)
@given(static, st.integers(1, 60))
def test_pairs_of_a_static_mask_are_those_of_its_definition(mask: Any, n: int) -> None:
    assert mask.cumulative(float(n)) == sum(sees(mask, i, j, n) for i in range(n) for j in range(n))


@given(st.integers(0, 6), small, st.integers(1, 60))
def test_a_query_sees_its_sinks_and_its_window_and_no_more(sinks: int, width: int, n: int) -> None:
    """StreamingLLM: the first keys and the last, min(t, s + W) of them."""
    assert Sinks(sinks, width).cumulative(float(n)) == sum(
        sum(j < sinks or i - j < width for j in range(i + 1)) for i in range(n)
    )


def keys_of(mask: Any, t: int) -> int:
    """What the t-th query of a dynamic mask sees, 1-indexed."""
    if isinstance(mask, TopK):
        return t // mask.every if mask.k is None else min(t // mask.every, mask.k)
    if isinstance(mask, Pooled):
        return (t - mask.block) // mask.stride + 1 if t >= mask.block else 0
    return (t - 1) % mask.block + 1 + min(mask.k - 1, (t - 1) // mask.block) * mask.block


dynamic = st.one_of(
    st.builds(TopK, st.one_of(st.none(), st.integers(1, 12)), st.integers(1, 9)), st.builds(lambda d, f: Pooled(d * f, d), st.integers(1, 6), st.integers(1, 4)),
    st.builds(Blocks, st.integers(1, 12), st.integers(1, 8)),
)  # fmt: skip


@settings(max_examples=300)
@given(dynamic, st.integers(0, 300), st.integers(1, 300), st.integers(1, 4))
def test_pairs_of_a_dynamic_mask_are_those_of_its_definition_after_any_prefix(mask: Any, prefix: int, new: int, chunks: int) -> None:
    truth = sum(keys_of(mask, t) for t in range(prefix + 1, prefix + chunks * new + 1)) / chunks
    assert pairs(mask, Segment(1.0, float(new), float(prefix), chunks=float(chunks))) == pytest.approx(truth, rel=1e-12)


@settings(max_examples=200)
@given(st.one_of(dynamic, static.filter(lambda m: not isinstance(m, Banded))), st.integers(0, 200), st.integers(1, 50))
def test_a_mask_reads_no_more_keys_than_there_are_and_no_fewer_than_a_query_sees(mask: Any, prefix: int, new: int) -> None:
    seen = mask.seen(Segment(1.0, float(new), float(prefix)))
    assert seen.live <= prefix + new + 1e-9
    assert seen.keys <= seen.live + 1e-9
    assert seen.pairs <= new * seen.keys + 1e-9 or isinstance(mask, Blocks)
    one = mask.seen(Segment(1.0, 1.0, float(prefix), split_kv=True))
    if not isinstance(mask, (Columns, Summaries)):
        assert one.pairs == one.keys


@given(st.integers(1, 400), st.integers(1, 20), st.integers(0, 20))
def test_sums_of_floors_are_their_closed_forms(n: int, m: int, k: int) -> None:
    assert floors(float(n), m) == sum(t // m for t in range(1, n + 1))
    assert floors_capped(float(n), m, k) == sum(min(t // m, k) for t in range(1, n + 1))


@pytest.mark.parametrize("blocks", [12, 13, 20, 64])
def test_bigbird_is_its_blocks(blocks: int) -> None:
    """First and last block see all; the second and last but one 4 + r blocks, the others 5 + r (transformers' kernel)."""
    b, r = 64, 3
    rows = [blocks if i in (0, blocks - 1) else 4 + r if i in (1, blocks - 2) else 5 + r for i in range(blocks)]
    assert BigBird(b, r).cumulative(float(blocks * b)) == b * b * sum(rows)
    assert BigBird(b, r).cumulative(704.0) == 704**2


# ---- the handbook's worked examples (FORMULAS sections 1 and 2), our number beside it


@pytest.mark.parametrize(
    ("section", "ours", "truth"),
    [
        ("1.5 window 4,096 at 128K", pairs(Window(4096), Segment(1.0, N, 0.0)), 528_484_352), ("1.6 sinks 4 + 2,044 at 1M", Sinks(4, 2044).cumulative(float(M1)), 2_145_387_520),
        ("1.7 chunks of 8,192 at 1M", Chunked(8192).cumulative(float(M1)), 4_295_491_584), ("1.8 strided A1", Window(129).cumulative(16_384.0), 2_105_280),
        ("1.8 strided A2", Columns(128).cumulative(16_384.0), 1_056_768), ("1.8 fixed A1", Chunked(128).cumulative(16_384.0), 1_056_768), ("1.8 fixed A2", Summaries(128, 8).cumulative(16_384.0), 8_327_680),
        ("1.9 Longformer", Banded(512, 1).cumulative(4096.0), 2_043_134), ("1.10 BigBird", BigBird(64, 3).cumulative(4096.0), 2_547_712),
        ("1.11 NSA compressed at 64K", Pooled(32, 16).cumulative(65_536.0), 134_123_535), ("1.13 CSA selected at 1M", TopK(1024, 4).cumulative(float(M1)), 1_071_643_648),
        ("1.13 CSA indexer at 1M", TopK(None, 4).cumulative(float(M1)), 137_438_691_328), ("1.13 HCA at 1M", TopK(None, 128).cumulative(float(M1)), 4_294_451_200),
        ("1.14 MoBA at 1M", Blocks(4096, 12).cumulative(float(M1)), 48_285_351_936), ("1.15 lightning prefill", linear_chunk_flops(d_k=128, d_v=128, chunk=256), 196_608),
        ("1.15 lightning decode", linear_step_flops(d_k=128, d_v=128), 65_536), ("1.17 SSD", ssd_chunk_flops(head_dim=64, state=128, chunk=256, heads=80, groups=1), 5_313_536),
        ("1.18 GDN chunked", delta_chunk_flops(d_k=128, d_v=128, chunk=64), 180_224), ("1.18 GDN recurrent", delta_step_flops(d_k=128, d_v=128), 131_072),
    ],
)  # fmt: skip
def test_a_worked_example_of_the_handbook_is_our_number(section: str, ours: float, truth: int) -> None:
    assert ours == truth, section


def test_a_strided_pair_of_heads_scores_a_fortieth_of_causal() -> None:
    """O(N sqrt N) at l = sqrt N: 2.36 % of causal at 16K where one pair of heads does both."""
    both = Window(129).cumulative(16_384.0) + Columns(128).cumulative(16_384.0)
    assert both / Causal().cumulative(16_384.0) == pytest.approx(0.0236, abs=5e-5)


def named(work: Any, kernel: str) -> list[Op]:
    return [op for _, op in leaves(work) if isinstance(op, Op) and op.kernel == kernel]


def decoded(layer: Layer, context: int) -> Any:
    return layer.work(layer.whole((Segment(1.0, 1.0, float(context - 1), split_kv=True),)), cache=CACHE)


@pytest.mark.parametrize(("context", "paper", "ratio"), [(8192, 2048, 4.0), (16_384, 2560, 6.4), (32_768, 3584, 9.1), (65_536, 5632, 11.6)])
def test_nsa_reads_the_keys_of_its_table_4(context: int, paper: int, ratio: float) -> None:
    """The paper counts s / d compressed keys; floor((s - l) / d) + 1 is one fewer."""
    layer = NativeSparseAttention(2560, 64, 4, 192, 128)
    ops = [op for _, op in leaves(decoded(layer, context)) if isinstance(op, Op) and "keys" in op.shape]
    read = sum(float(op.shape["keys"]) for op in ops)
    assert read == paper - 1
    assert round(context / paper, 1) == ratio


def test_dsa_at_a_million_tokens_is_indexing() -> None:
    layer = next(layer for _, layer in model("deepseek-ai/DeepSeek-V3.2").mixers if isinstance(layer, IndexedLatentAttention))
    work = decoded(layer, M1)
    assert named(work, "index_scores")[0].tensor_flops == 17_179_869_184
    assert named(work, "sparse_attention")[0].tensor_flops == 570_425_344
    assert named(work, "index_scores")[0].math == "fp8"


def test_the_sparse_core_costs_the_absorbed_form_per_pair() -> None:
    layer = next(layer for _, layer in model("deepseek-ai/DeepSeek-V3.2").mixers if isinstance(layer, IndexedLatentAttention))
    core = named(layer.work(layer.whole((Segment(1.0, 100.0, 0.0),)), cache=CACHE), "sparse_attention")[0]
    assert core.tensor_flops == 278_528 * 5050


def test_mamba_1_scans_on_the_vector_pipes() -> None:
    op = selective_scan("scan", Segment(1.0, 1.0, 0.0), channels=8192, state=16)
    assert (op.tensor_flops, op.math) == (917_504, "fp32")


#: "Equivalent FP8" operations per decoded token at 1M (FORMULAS 1.13): linear 1, bf16 cores 2, the fp4 indexer 1/2.
def spent(name: str) -> dict[str, float]:
    found = {"linear": 0.0, "core": 0.0, "indexer": 0.0, "grouped": 0.0}
    for times, op in leaves(System(model(name), Layout()).work(Decode(float(M1)))):
        part = {"sparse_attention": "core", "index_scores": "indexer"}.get(op.kernel, "linear")
        found[part] += times * float(op.model_flops)
        if op.name == "o a":
            found["grouped"] += times * float(op.model_flops)
    return found


@pytest.mark.parametrize(("name", "linear", "indexer", "core"), [("V4-Pro", 97.7, 128.8, 76.7), ("V4-Flash", 26.6, 90.2, 23.6), ("V3.2", 75.0, 1048, 34.8)])
def test_decoding_at_a_million_tokens_takes_the_operations_of_the_handbook(name: str, linear: float, indexer: float, core: float) -> None:
    found = spent(f"deepseek-ai/DeepSeek-{name}")
    # the handbook counts the mixing of residual streams, which no tensor core does, among the linear: 0.04 and 0.02
    mixed = {"V4-Pro": 61 * 96 * 7168, "V4-Flash": 43 * 96 * 4096, "V3.2": 0}[name] / 1e9
    assert found["linear"] / 1e9 + mixed == pytest.approx(linear, abs=0.05)
    assert found["indexer"] / 1e9 == pytest.approx(indexer, rel=8e-4)
    assert found["core"] / 1e9 == pytest.approx(core, rel=8e-4)


def test_v4_decodes_with_27_and_10_per_cent_of_v32s_operations() -> None:
    pro, flash, older = (spent(f"deepseek-ai/DeepSeek-{name}") for name in ("V4-Pro", "V4-Flash", "V3.2"))
    base = older["linear"] + 2 * older["core"] + older["indexer"]

    def share(found: dict[str, float], *, grouped: float) -> float:
        return (found["linear"] + grouped * found["grouped"] + 2 * found["core"] + 0.5 * found["indexer"]) / base

    assert share(pro, grouped=0) == pytest.approx(0.2646, abs=2e-4)
    assert share(flash, grouped=0) == pytest.approx(0.0997, abs=2e-4)
    # the grouped output projection in bf16
    assert round(share(pro, grouped=1), 2) == 0.27
    assert round(share(flash, grouped=1), 2) == 0.10


def test_hyper_connections_cost_480_d_a_layer() -> None:
    layer = HyperConnection(7168, 4)
    work = layer.work(layer.whole((Segment(1.0, 1.0, 0.0),)), cache=CACHE)
    assert 2 * amount(work, "flops") == 480 * 7168


def test_the_linear_work_of_v4_is_the_handbooks_sum() -> None:
    for _, layer in model("deepseek-ai/DeepSeek-V4-Pro").mixers:
        assert isinstance(layer, CompressedAttention)
        d, n, c, r, g, rank = 7168, 128, 512, 1536, 16, 1024
        truth = 2 * d * r + 2 * r * n * c + 2 * d * c + 2 * n * c * rank + 2 * g * rank * d
        truth += 8 * d * (c + 128) + 2 * r * 64 * 128 + 2 * d * 64 if layer.selects else 4 * d * c
        work = decoded(layer, M1)
        assert sum(float(op.tensor_flops) for _, op in leaves(work) if op.kernel in ("gemm", "grouped_gemm")) == truth


# ---- limit cases


@given(st.integers(1, 200))
def test_a_selection_of_everything_is_dense_and_one_of_nothing_more_is_itself(n: int) -> None:
    assert TopK(n).cumulative(float(n)) == TopK(None).cumulative(float(n)) == Causal().cumulative(float(n))
    assert Blocks(7, n + 1).cumulative(float(n)) == Causal().cumulative(float(n))
    assert Sinks(0, n).cumulative(float(n)) == Causal().cumulative(float(n)) == DualChunk(9, 2).cumulative(float(n))
    assert Columns(1).cumulative(float(n)) == Causal().cumulative(float(n)) == Summaries(5, 5).cumulative(float(n))
    assert Banded(2 * n, 0).cumulative(float(n)) == n * n
    assert Pooled(1, 1).cumulative(float(n)) == Causal().cumulative(float(n))


def test_a_top_k_beyond_the_context_leaves_the_dense_core_and_the_indexer() -> None:
    wide = IndexedLatentAttention(512, 16, 128, 64, 32, 16, 32, index_n_heads=8, index_head_dim=32, index_topk=10**6)
    dense = LatentAttention(512, 16, 128, 64, 32, 16, 32)
    core = named(decoded(wide, 5000), "sparse_attention")[0]
    assert core.tensor_flops == named(decoded(dense, 5000), "latent_attention")[0].tensor_flops
    assert named(decoded(wide, 5000), "index_scores")


def test_grouped_attention_with_a_head_each_is_mha_and_shared_keys_halve_the_cache() -> None:
    one, other = Attention(512, 16, 16, 32), Attention(512, 16, 16, 32, shared_kv=True)
    assert 2 * other.state_bytes(other.whole((Segment(1.0, 0.0, 99.0),)), CACHE) == one.state_bytes(one.whole((Segment(1.0, 0.0, 99.0),)), CACHE)
    assert named(decoded(one, 99), "decode_attention")[0].tensor_flops == named(decoded(other, 99), "decode_attention")[0].tensor_flops
    assert parameters(one, one.whole((Segment(0.0, 0.0, 0.0),))) - parameters(other, other.whole((Segment(0.0, 0.0, 0.0),))) == 512 * 512


# ---- laws over every kind of layer


@every_mixer
def test_decoding_token_by_token_is_as_useful_as_prefill(name: str) -> None:
    if name == "s4":
        pytest.skip("a convolution and a recurrence are two algorithms: no pairs to compare")
    n, layer = 131, MIXERS[name]
    one = sum(amount(decoded(layer, t + 1), "model_flops") for t in range(n))
    whole = amount(layer.work(layer.whole((Segment(1.0, float(n), 0.0),)), cache=CACHE), "model_flops")
    assert one == pytest.approx(whole, rel=1e-12)


@every_mixer
def test_a_prefix_and_the_rest_are_the_whole(name: str) -> None:
    if name == "s4":
        pytest.skip("a convolution grows with N log N: a prefix is convolved again")
    layer = MIXERS[name]
    for cut in (1.0, 16.0, 64.0, 1000.0):
        parts = [(cut, 0.0), (3000.0 - cut, cut)]
        for what in ("model_flops", "tensor_flops", "exponentials"):
            halves = sum(amount(layer.work(layer.whole((Segment(1.0, new, prefix),)), cache=CACHE), what) for new, prefix in parts)
            assert halves == pytest.approx(amount(layer.work(layer.whole((Segment(1.0, 3000.0, 0.0),)), cache=CACHE), what), rel=1e-12), (cut, what)


@every_layer
def test_useful_is_no_more_than_executed_forward_and_backward(name: str) -> None:
    layer = EACH[name]
    for direction in Direction:
        for _, op in leaves(layer.work(layer.whole((Segment(2.0, 300.0, 0.0),)), direction, cache=CACHE)):
            assert 0 <= op.model_flops <= op.flops * (1 + 1e-12), op.name
            assert op.hbm_bytes > 0, op.name
            assert op.tensor_flops >= 0


@every_layer
def test_backward_is_twice_as_useful_as_forward(name: str) -> None:
    layer = EACH[name]
    held = layer.whole((Segment(2.0, 300.0, 0.0),))
    there, back = (amount(layer.work(held, d, cache=CACHE), "model_flops") for d in (Direction.FORWARD, Direction.BACKWARD))
    assert back == pytest.approx(2 * there, rel=1e-12)


@every_layer
def test_backward_frees_what_forward_saved(name: str) -> None:
    layer = EACH[name]
    held = layer.whole((Segment(2.0, 300.0, 0.0),))
    saved, freed = (amount(layer.work(held, d, cache=CACHE), "saved_bytes") for d in (Direction.FORWARD, Direction.BACKWARD))
    assert saved >= 0
    assert saved == pytest.approx(-freed, rel=1e-12)


@every_layer
def test_no_tokens_cost_nothing(name: str) -> None:
    layer = EACH[name]
    for split in (False, True):
        work = layer.work(layer.whole((Segment(1.0, 0.0, 500.0, split_kv=split),)), cache=CACHE)
        assert amount(work, "tensor_flops") == amount(work, "exponentials") == amount(work, "model_flops") == 0


@every_layer
def test_arrays_are_their_numbers(name: str) -> None:
    layer = EACH[name]
    prefixes = np.array([0.0, 1.0, 7, 63, 64, 1000, 5e5])
    for split, new in ((False, 96.0), (True, 1.0), (True, 3.0)):
        together = layer.work(layer.whole((Segment(2.0, new, prefixes, split_kv=split),)), cache=CACHE)
        for what in ("tensor_flops", "model_flops", "exponentials", "hbm_bytes", "vector_flops", "live_bytes"):
            found = np.broadcast_to(fold(together, quantity(what)), prefixes.shape)
            for i, prefix in enumerate(prefixes):
                alone = amount(layer.work(layer.whole((Segment(2.0, new, float(prefix), split_kv=split),)), cache=CACHE), what)
                assert relative(float(found[i]), alone) < 1e-14, (what, prefix)


@every_layer
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_shards_add_up_to_the_whole_but_for_what_is_replicated(name: str, ranks: int) -> None:
    spec = stack(EACH[name])
    layout = Layout(tp=ranks)
    assert not list(layout.refusals(spec))
    placed, nothing = layout.place(spec), (Segment(0.0, 0.0, 0.0),)
    layer = EACH[name]
    own, whole = layer.modules(placed.shard(layer, nothing)), layer.modules(layer.whole(nothing))
    for mine, all_of in zip(own, whole, strict=True):
        assert mine.parameters == pytest.approx(all_of.parameters / (1 if all_of.replicated else ranks), rel=1e-12), mine.name
        assert mine.name == all_of.name
    if is_mixer(layer):
        rest = (Segment(1.0, 0.0, 1000.0),)
        held, total = layer.state_bytes(placed.shard(layer, rest), CACHE), layer.state_bytes(layer.whole(rest), CACHE)
        assert total / ranks - 1e-9 <= held <= total + 1e-9


@every_mixer
def test_heads_that_do_not_divide_are_refused_by_rule(name: str) -> None:
    refused = list(Layout(tp=7).refusals(stack(MIXERS[name])))
    assert refused
    assert "--tp 7" in refused[0]
    assert "divi" in refused[0]


@pytest.mark.parametrize("name", [n for n, layer in MIXERS.items() if not isinstance(layer, Attention)])
def test_caches_are_shared_out_only_where_an_engine_does(name: str) -> None:
    assert any("--dcp 2: not offered" in told for told in Layout(tp=8, dcp=2).refusals(stack(MIXERS[name])))


@every_layer
@pytest.mark.parametrize("gpu", ["h200", "b200", "a100", "mi300x"])
def test_every_kernel_has_a_tiling_and_a_time_between_its_bounds(name: str, gpu: str) -> None:
    spec, part = with_mlp(name), machine(gpu, 8)
    for phase in (Prefill(4096.0), Prefill(4096.0, chunk=512.0), Decode(50_000.0, 8.0), Decode(4096.0, 8.0, 4.0)):
        for layout in (Layout(), Layout(tp=8), Layout(pp=2)):
            found = estimate(spec, part, layout, phase)
            assert 0 < found.lower <= found.seconds.value * (1 + 1e-12) <= found.upper * (1 + 1e-12)
    clock = Clock(part, Calibration.load(part.gpu))
    for direction in Direction:
        for _, op in leaves(EACH[name].work(EACH[name].whole((Segment(2.0, 256.0, 0.0),)), direction, cache=CACHE)):
            assert isinstance(op, Op)
            assert op.kernel in LAUNCHES
            assert launch(op, part.gpu).hbm_bytes >= op.hbm_bytes
            assert 0 < clock.bound(op) <= clock.expected(op)


@every_mixer
def test_a_later_token_and_a_larger_batch_cost_no_less(name: str) -> None:
    spec, part = with_mlp(name), machine("h200", 1)
    contexts = [bare(spec, part, Layout(), Decode(c, 4.0), calibration=Calibration.none()) for c in (10.0, 100.0, 1000.0, 1e4, 1e5, 1e6)]
    batches = [bare(spec, part, Layout(), Decode(1e5, b), calibration=Calibration.none()) for b in (1.0, 16.0, 64.0)]
    for found in (contexts, batches):
        for figure in ("lower", "total_bytes"):
            values = [float(getattr(x, figure)) for x in found]
            assert values == sorted(values), figure


@every_mixer
def test_runs_of_chunks_are_the_sum_over_their_chunks(name: str) -> None:
    if name == "s4":
        pytest.skip("a convolution grows with N log N")
    system = System(with_mlp(name), Layout())
    together = system.work(Prefill(20_000.0, chunk=1024.0))
    for what in ("tensor_flops", "model_flops", "exponentials"):
        parts = sum(amount(system.work(Prefill(min(s + 1024.0, 20_000.0), prefix=s)), what) for s in np.arange(0.0, 20_000.0, 1024.0))
        ours = amount(together, what)
        assert ours == pytest.approx(parts, rel=1e-6 if what == "model_flops" else 1e-12), what


def test_rows_read_by_a_sparse_decode_are_its_selection() -> None:
    row = CacheRow(448.0, 64.0, latent=True)
    op = sparse_attention("core", Segment(3.0, 1.0, 99_999.0, split_kv=True), masks=(Window(128), TopK(1024, 4)), heads=128, kv_heads=1.0, head_dim=512, v_head_dim=512, row=row, shared_kv=True)
    assert op.shape["live"] == op.shape["gathered"] == 3 * (128 + 1024)
    assert op.hbm_bytes == 3 * ((128 + 1024) * 1024 + 128 * 1024 * 2 + (128 + 1024) * 4)


def test_scores_of_an_indexer_are_launched_traffic() -> None:
    op = index_scores("i", Segment(1.0, 1.0, 999.0, split_kv=True), mask=TopK(None), heads=64, head_dim=128, row=CacheRow(128.0, index=True), dtype=BF16)
    assert launch(op, machine().gpu).hbm_bytes == op.hbm_bytes + 8 * 1000


def test_a_recurrent_step_reads_and_writes_its_state() -> None:
    op = recurrent("r", Segment(5.0, 1.0, 10.0, split_kv=True), heads=32.0, d_k=128, d_v=128, chunk=64, chunk_flops=1.0, step_flops=1.0, inputs=0.0, outputs=0.0)
    assert op.hbm_bytes == 5 * 2 * 32 * 128 * 128 * 4


def test_a_config_of_moba_nsa_lfm2_and_falcon_h1_is_read() -> None:
    base = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 32, "intermediate_size": 1024, "vocab_size": 1000}
    for changed, kind in (
        ({"model_type": "llama", "moba_chunk_size": 4096, "moba_topk": 12}, MixtureOfBlockAttention), ({"model_type": "nsa", "block_size": 64, "block_counts": 16, "window_size": 512}, NativeSparseAttention),
        ({"model_type": "lfm2", "layer_types": ["conv", "conv", "full_attention", "conv"]}, ShortConv),
        ({"model_type": "falcon_h1", "mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 32}, ParallelMixers),
    ):
        spec = load_model({**base, **changed})
        assert any(isinstance(layer, kind) for layer in spec.layers), kind
        assert not spec.warnings
