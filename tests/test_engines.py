"""What vLLM, SGLang and TensorRT-LLM allocate for every kind of model."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import Layout
from simulator.dtypes import CACHE_FORMATS
from simulator.engines import REGISTRY, Allocation, Sglang, TensorrtLlm, Vllm
from simulator.engines.paging import Demand, by_kind, stage_of, stored_as
from simulator.engines.vllm_pages import groups, pool_bytes
from simulator.hf import with_formats
from simulator.layers import CompressedAttention
from simulator.model import ModelSpec
from tests.support import EVERY, machine, model

K128, M1 = 131_072, 1_048_576
GIB = 2**30
#: One of each kind of cache: dense, windows, chunks, latent, latent with indexer, compressed, recurrent beside attention (three kinds).
KINDS = (
    "meta-llama/Meta-Llama-3.1-8B", "openai/gpt-oss-20b", "google/gemma-3-27b-it", "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V3.2", "deepseek-ai/DeepSeek-V4-Flash", "Qwen/Qwen3.6-35B-A3B", "ai21labs/Jamba-v0.1",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct", "MiniMaxAI/MiniMax-M1", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
)  # fmt: skip
every_kind = pytest.mark.parametrize("name", KINDS)
every_engine = pytest.mark.parametrize("engine", REGISTRY)


def answer(engine: str, spec: ModelSpec, layout: Layout | None = None, tokens: int = K128, gpu: str = "h200") -> Allocation | None:
    settings = {"chunk": 8192} if engine == "vllm" else {}
    try:
        return REGISTRY[engine](**settings).allocation(spec, layout or Layout(tp=8), machine(gpu, 16), tokens)
    except ValueError:
        return None


@every_engine
@every_kind
def test_an_engine_holds_at_least_what_the_architecture_needs(engine: str, name: str) -> None:
    spec = model(name)
    held = answer(engine, spec, Layout())
    if held is None:
        assert (engine, name) == ("tensorrt_llm", "deepseek-ai/DeepSeek-V4-Flash")
        return
    stored = with_formats(spec, None, stored_as(spec).name) if stored_as(spec) is not spec.cache else spec
    rows = sum(
        n * float(item.bytes(float(K128), stored.cache)) for n, _, item in stored.rows() if not item.row.index and item.keep.name != "TAIL"
    )  # fmt: skip
    assert held.per_sequence_bytes >= rows * (1 - 1e-9)
    assert held.note
    assert held.prefix_tokens >= 1


@every_engine
@every_kind
def test_more_memory_holds_more_and_longer_requests_take_more(engine: str, name: str) -> None:
    spec, layout = model(name), Layout(tp=2)
    if answer(engine, spec, layout) is None:
        return
    held = {gpu: answer(engine, spec, layout, gpu=gpu) for gpu in ("h200", "b200")}
    longer = answer(engine, spec, layout, tokens=M1, gpu="b200")
    assert held["h200"] is not None
    assert held["b200"] is not None
    assert longer is not None
    assert held["b200"].max_concurrency >= held["h200"].max_concurrency
    assert longer.per_sequence_bytes >= held["b200"].per_sequence_bytes
    assert longer.max_concurrency <= held["b200"].max_concurrency


@every_engine
@pytest.mark.parametrize("cache", CACHE_FORMATS)
def test_a_format_is_offered_by_name_or_refused_in_one_line(engine: str, cache: str) -> None:
    name = {512: "deepseek-ai/DeepSeek-V3.2", 448: "deepseek-ai/DeepSeek-V4-Flash"}.get(CACHE_FORMATS[cache].latent_width or 0, KINDS[0])
    spec = with_formats(model(name), None, cache)
    try:
        held = REGISTRY[engine]().allocation(spec, Layout(tp=8, ep=8) if "DeepSeek" in name else Layout(), machine("h200", 8), K128)
    except ValueError as refused:
        assert str(refused).startswith(REGISTRY[engine].title)
        assert "\n" not in str(refused)
        return
    assert held.per_sequence_bytes > 0


@every_engine
def test_a_model_that_keeps_nothing_has_no_cache_to_allocate(engine: str) -> None:
    with pytest.raises(ValueError, match="keeps no cache"):
        REGISTRY[engine]().allocation(model("allenai/longformer-base-4096"), Layout(), machine("h200"), 4096)


# ---- vLLM


@pytest.mark.parametrize("name", EVERY)
def test_every_cache_of_a_model_is_in_one_group(name: str) -> None:
    spec = model(name)
    kinds = by_kind(spec, Layout())
    wanted = {(index, slot) for index, kind in enumerate(spec.order) for slot in range(len(kinds[kind]))}
    found = [member for group in groups(spec) for member in group.members]
    assert len(found) == len(set(found))
    assert set(found) == wanted


@every_kind
def test_pages_of_a_hybrid_are_equal_and_hold_a_state(name: str) -> None:
    spec = model(name)
    found = Vllm().tables(spec, Layout(), machine("h100").gpu)
    if any(isinstance(layer, CompressedAttention) for _, layer in spec.mixers) or len(found) == 1:
        return
    pages = {float(page) for table in found for page in table.pages.values()}
    assert len(pages) == 1
    state = max((float(h.row_bytes) for kind in by_kind(spec, Layout()) for h in kind if h.demand is Demand.STATE), default=0.0)
    assert pages.pop() >= state
    blocks = {float(table.block) for table in found if table.group.demand is not Demand.STATE}
    assert all(block % 16 == 0 for block in blocks)


@pytest.mark.parametrize(
    ("name", "block", "shapes"),
    [
        ("Qwen/Qwen3.6-35B-A3B", 1056, [10, 10, 10, 10]), ("ai21labs/Jamba-v0.1", 80, [4] * 8),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", 1920, [6, 7, 7, 7]), ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 2096, [5, 6, 6, 6, 6]),
    ],
)
def test_attention_blocks_grow_over_the_recurrent_state(name: str, block: int, shapes: list[int]) -> None:
    """block = step x ceil(state / (step x row)), step 16, 128 with MLA."""
    found = Vllm().tables(model(name), Layout(), machine("h100").gpu)
    assert {float(table.block) for table in found} == {block}
    assert sorted(len(table.group.members) for table in found) == shapes


def test_states_take_three_blocks_with_a_prefix_cache_two_until_0_28_and_one_without() -> None:
    spec, gpu = model("Qwen/Qwen3.6-35B-A3B"), machine("h100").gpu
    counts = [
        {float(t.count(float(K128))) for t in engine.tables(spec, Layout(), gpu) if t.group.demand is Demand.STATE}
        for engine in (Vllm(), Vllm(prefix_caching=False), Vllm(release="0.28"))
    ]
    assert counts == [{3.0}, {1.0}, {2.0}]


def test_a_log_of_a_hybrid_that_prints_tokens_by_group() -> None:
    """Qwen3.5 of 24 layers, 6 of them attention, 5.95 GiB at 262,144 tokens without a prefix cache: 1.97 x, printed as 129,472 tokens."""
    state, row, block = 16 * 128 * 128 * 4 + 3 * 6144 * 2, 2 * 2 * 256 * 2, 544
    assert block == 16 * math.ceil(state / (16 * row))
    blocks = 5.95 * GIB // (6 * block * row)
    assert blocks // 4 * block == 129_472
    assert blocks / (math.ceil(262_144 / block) + 3) == pytest.approx(1.97, abs=0.005)


def test_v4_packs_its_pages_in_the_widest_group() -> None:
    """21 x (65 + 15) + 20 x 3 units of 576 bytes: entries, indexer keys and the 128-fold entries of Flash."""
    spec = with_formats(model("deepseek-ai/DeepSeek-V4-Flash"), None, "fp8_ds_v4")
    found = Vllm().tables(spec, Layout(), machine("h200").gpu)
    assert pool_bytes(spec, Layout(), found) == 576 * (21 * (65 + 15) + 20 * 3)
    assert sorted(len(table.group.members) for table in found) == [20, 21, 22, 42, 62]
    assert Vllm().capacity(spec, Layout(tp=8), machine("h200", 8), K128).prefix_tokens == 256


def _v4_layers(spec: ModelSpec) -> list[tuple[str, int, int]]:
    """(group, tokens of a block, page) of every cache of every layer, from the ratios alone."""
    pages = {"window": 64 * 584, "entries": 64 * 584, "keys": 64 * 132, "far": 2 * 584, "ring": 32_768, "key ring": 8192}
    page = {name: -(-size // 576) * 576 for name, size in pages.items()}
    found = []
    for ratio in (layer.compress_ratio for kind in spec.order for layer in spec.kinds[kind] if isinstance(layer, CompressedAttention)):
        found.append(("window", 64, page["window"]))
        if ratio == 4:
            found += [("full", 256, page["entries"]), ("full", 256, page["keys"]), ("ring 8", 4, page["ring"]), ("ring 8", 4, page["key ring"])]
        elif ratio == 128:
            found += [("full", 256, page["far"]), ("ring 128", 8, page["ring"])]
    return found


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Pro"])
@pytest.mark.parametrize("release", ["0.20", "0.22", "0.23", "0.25", "0.26", "0.27", "0.33"])
@given(tokens=st.integers(1, 2**20), blocks=st.integers(1, 10**6))
def test_every_release_packs_v4_as_its_source_does(name: str, release: str, tokens: int, blocks: int) -> None:
    """Layer by layer in plain loops: page sizes, the block, blocks of a request, and the concurrency that is printed."""
    spec = with_formats(model(name), None, "fp8_ds_v4")
    minor = int(release.split(".")[1])
    layers = _v4_layers(spec)
    full = {page for group, _, page in layers if group == "full"}
    if minor <= 26:
        layers = [(group, block, min(size for size in full if size >= page)) for group, block, page in layers]
    windows = [one for one in layers if one[0] == "window"]
    least, *others = (max(Counter(page for group, _, page in layers if group == g).values()) for g in ("full", "ring 8", "ring 128"))
    values = [least, len(windows), *others] if minor <= 28 else [len(windows), *others]
    least = least if minor <= 28 else others[0]
    repeats = min(range(least, max(values) + 1), key=lambda n: (sum(-value % n for value in values), -n))
    parts = -(-len(windows) // repeats)
    groups_ = {group: [one for one in layers if one[0] == group] for group in ("full", "ring 8", "ring 128")}
    groups_ |= {f"window {i}": windows[i::parts] for i in range(parts)}
    sizes = {group: Counter(page for *_, page in part) for group, part in groups_.items()}
    if minor <= 22:
        block = sum(full) * max(max(size.values()) for size in sizes.values())
    elif minor <= 26:
        block = sum(page * max(size[page] for size in sizes.values()) for page in {page for *_, page in layers})
    else:
        block = max(sum(page * times for page, times in size.items()) for size in sizes.values())
    step = 8192 * (1 if minor <= 25 else 2)
    width = {"ring 8": 8, "ring 128": 128}
    needed = {
        group: math.ceil(tokens / 256) if group == "full" else math.ceil(min(width.get(group, 128) - 1 + step, tokens) / part[0][1]) + 1
        for group, part in groups_.items()
    }
    weight = {group: sum(page for *_, page in part) for group, part in groups_.items()}
    counted = math.ceil(sum(needed[g] * weight[g] for g in groups_) / weight["full"]) if minor <= 26 else sum(needed.values())
    held = Vllm(release=release, chunk=8192).capacity(spec, Layout(), machine("h200"), tokens, available_bytes=float(blocks * block))
    assert held.block_bytes == block
    assert held.blocks == blocks
    assert held.blocks_per_sequence == sum(needed.values())
    assert held.log_lines[1].endswith(f" {blocks / counted:.2f}x")
    assert held.tokens == int(blocks / counted * tokens)


@pytest.mark.parametrize("name", ["moonshotai/Kimi-Linear-48B-A3B-Instruct", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "openai/gpt-oss-20b"])
@pytest.mark.parametrize("release", ["0.22", "0.26"])
def test_groups_of_equal_pages_weigh_alike_however_many_layers_they_have(name: str, release: str) -> None:
    held = Vllm(release=release).capacity(model(name), Layout(), machine("h200"), K128, available_bytes=40.0 * GIB)
    assert held.log_lines[1].endswith(f" {held.blocks / held.blocks_per_sequence:.2f}x")


def test_v4s_groups_are_those_that_were_seen_in_a_running_engine() -> None:
    """https://github.com/vllm-project/vllm/issues/54703, comment of 2026-09-06 (0.28.1): layers and page bytes of the five groups of V4-Flash."""
    spec = with_formats(model("deepseek-ai/DeepSeek-V4-Flash"), None, "fp8_ds_v4")
    found = Vllm(release="0.28").tables(spec, Layout(), machine("h200").gpu)
    seen = {(62, 256): 1_002_240, (22, 64): 823_680, (21, 64): 786_240, (42, 4): 870_912, (20, 8): 656_640}
    ours = {
        (len(t.group.members), int(t.block)): sum(t.pages[spec.order[index], slot] for index, slot in t.group.members) for t in found
    }  # fmt: skip
    assert ours == seen


@pytest.mark.parametrize("release", ["0.34", "1.0", "newest"])
def test_a_release_that_was_not_read_is_refused(release: str) -> None:
    with pytest.raises(ValueError, match=r"leave the release out|write it as 0\.22"):
        Vllm(release=release).rules  # noqa: B018


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "meta-llama/Meta-Llama-3.1-70B", "Qwen/Qwen3.6-35B-A3B", "deepseek-ai/DeepSeek-V4-Flash"])
def test_the_newest_release_by_name_counts_as_the_newest(name: str) -> None:
    newest, named = (Vllm(release=r).capacity(model(name), Layout(tp=8), machine("h200", 8), K128) for r in (None, Vllm().version))
    assert newest.log_lines == named.log_lines
    assert (newest.blocks, newest.per_sequence_bytes) == (named.blocks, named.per_sequence_bytes)


def test_v4_is_stored_in_its_own_format_whatever_was_asked() -> None:
    plain, packed = model("deepseek-ai/DeepSeek-V4-Flash"), with_formats(model("deepseek-ai/DeepSeek-V4-Flash"), None, "fp8_ds_v4")
    for engine in ("vllm", "sglang"):
        held = [answer(engine, spec) for spec in (plain, packed)]
        assert held[0] is not None
        assert held[1] is not None
        assert held[0].per_sequence_bytes == held[1].per_sequence_bytes


def test_indexer_keys_are_fp8_beside_a_bf16_cache() -> None:
    (_, index) = by_kind(model("deepseek-ai/DeepSeek-V3.2"), Layout())[0]
    assert index.row_bytes == 132


@pytest.mark.parametrize("tokens", [8192, K128])
def test_what_a_window_costs_follows_the_tokens_in_flight(tokens: int) -> None:
    """hf-mem#70: at 8,192 tokens gpt-oss keeps all of every layer, at 131,072 its windows keep the 16,384 in flight."""
    held = Vllm(chunk=8192).allocation(model("openai/gpt-oss-20b"), Layout(), machine("h200"), tokens)
    whole, window = math.ceil(tokens / 16), math.ceil(min(127 + 16_384, tokens) / 16) + 1
    assert held.per_sequence_bytes == (whole + window) * 12 * 16 * 2048


@every_kind
def test_a_pipeline_splits_pages_over_its_stages(name: str) -> None:
    spec = model(name)
    for stages in (1, 2, 4):
        where = stage_of(spec, stages)
        assert len(where) == spec.num_layers
        assert where == sorted(where)
        assert set(where) == set(range(stages))
    whole, half = (Vllm().capacity(spec, Layout(pp=p), machine("h200", 2), K128) for p in (1, 2))
    assert float(half.block_bytes) <= float(whole.block_bytes)


# ---- SGLang, TensorRT-LLM


def test_sglang_prices_a_token_by_its_rows() -> None:
    held = Sglang(memory_fraction=0.93).allocation(model("Qwen/Qwen3-235B-A22B-FP8"), Layout(tp=4), machine("h100", 4), 40_960)
    assert held.per_sequence_bytes == 40_960 * 48_128
    assert held.capacity_tokens == held.available_bytes // 48_128


def test_sglang_gives_windows_their_own_pool_only_where_it_knows_the_model() -> None:
    oss = Sglang().allocation(model("openai/gpt-oss-20b"), Layout(), machine("h200"), K128)
    gemma = Sglang().allocation(model("google/gemma-3-27b-it"), Layout(), machine("h200"), K128)
    assert oss.per_sequence_bytes == pytest.approx(K128 * 2048 * (12 + 0.8 * 12))
    assert gemma.per_sequence_bytes == K128 * 8192 * 62
    assert "held in full" in gemma.note


def test_sglang_holds_five_states_per_request_for_its_prefix_cache() -> None:
    spec = model("Qwen/Qwen3.6-35B-A3B")
    held = Sglang().allocation(spec, Layout(), machine("h200"), K128)
    assert held.per_sequence_bytes == K128 * 10 * 2048 + 5 * 30 * 2_146_304


@pytest.mark.parametrize(("gpu", "least", "most"), [("h100", 0.82, 0.85), ("h200", 0.89, 0.92), ("b200", 0.82, 0.92)])
def test_sglangs_share_leaves_what_its_heuristic_reserves(gpu: str, least: float, most: float) -> None:
    assert least < Sglang().fraction(model(KINDS[0]), Layout(), machine(gpu)) < most


def test_tensorrt_llm_takes_its_share_of_what_is_free() -> None:
    full, part = (TensorrtLlm(memory_fraction=f).allocation(model(KINDS[0]), Layout(), machine("h100"), K128) for f in (0.9, 0.45))
    assert full.available_bytes == pytest.approx(2 * part.available_bytes)
    assert full.per_sequence_bytes == K128 * 131_072
    assert full.capacity_tokens % 32 == 0


def test_tensorrt_llm_holds_windows_in_full() -> None:
    held = TensorrtLlm().allocation(model("openai/gpt-oss-20b"), Layout(), machine("h200"), K128)
    assert held.per_sequence_bytes == K128 * 24 * 2048


@pytest.mark.parametrize(("engine", "tp", "copies"), [("vllm", 16, 16), ("sglang", 16, 16), ("tensorrt_llm", 16, 16)])
def test_a_latent_is_copied_to_every_tensor_rank(engine: str, tp: int, copies: int) -> None:
    held = answer(engine, model("deepseek-ai/DeepSeek-V3"), Layout(tp=tp))
    assert held is not None
    assert held.per_sequence_bytes * tp == pytest.approx(copies * model("deepseek-ai/DeepSeek-V3").cache_bytes(float(K128)))
