"""Sequences split over ranks: what each computes, what it sends, and which position waits for which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from simulator.calibration import Calibration
from simulator.dtypes import CACHE_FORMATS
from simulator.kernels.attention import Bidirectional, Block, Causal, Chunked, Segment, Window
from simulator.layers import Attention, Direction, LatentAttention
from simulator.layers.layer import Layer, is_mixer
from simulator.parallel import Layout
from simulator.parallel.context import (
    ORDERS,
    PASSING,
    Context,
    block_tokens_to_hide,
    halo_rows,
    halo_tokens,
    imbalance,
    passes_kv,
    pieces,
    tokens_to_hide_kv,
    tokens_to_hide_q,
)
from simulator.phases import Decode, Prefill, System
from simulator.timing import Clock
from simulator.work import Message, Op, fold, quantity
from tests.support import EVERY, MAIN, allows, leaves, machine, model

CACHE = CACHE_FORMATS["bf16"]
LLAMA, BIG, V3 = "meta-llama/Meta-Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-405B", "deepseek-ai/DeepSeek-V3"
M1 = 2.0**20
MIXERS = [pytest.param(name, layer, id=f"{name.split('/')[1]}-{type(layer).__name__}") for name in MAIN for _, layer in model(name).counted if is_mixer(layer)]


def messages(work: Any) -> dict[str, list[tuple[float, Message]]]:
    found: dict[str, list[tuple[float, Message]]] = {}
    for times, op in leaves(work):
        if isinstance(op, Message):
            found.setdefault(op.name, []).append((times, op))
    return found


def layer_work(name: str, layer: Layer, layout: Layout, segment: Segment, direction: Direction = Direction.FORWARD) -> Any:
    placed = layout.place(model(name))
    return placed.work(layer, placed.shard(layer, (segment,)), CACHE, direction)


def core(work: Any) -> float:
    """Matrix flops of the attention cores alone."""
    return sum(times * float(np.sum(op.tensor_flops)) for times, op in leaves(work) if isinstance(op, Op) and "attention" in op.kernel)


# ---- who works on what


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("tokens", "past", "ranks"), [(64, 0, 4), (96, 17, 6), (32, 100, 1)])
def test_a_positions_pairs_are_those_of_its_tokens(order: str, tokens: int, past: int, ranks: int) -> None:
    """Brute force over tokens."""
    half = tokens // ranks // 2
    owner = {
        "contiguous": lambda i: i // (tokens // ranks), "striped": lambda i: i % ranks,
        "zigzag": lambda i: min(i // half, 2 * ranks - 1 - i // half),
    }[order]  # fmt: skip
    for position in range(ranks):
        expected = sum(past + i + 1 for i in range(tokens) if owner(i) == position)
        own = pieces(order, Segment(1.0, float(tokens), float(past)), ranks, position)
        assert sum(Causal().seen(s).pairs for s in own) == expected
        assert sum(s.new_tokens for s in own) == tokens / ranks


@pytest.mark.parametrize("ranks", [1, 2, 16, 64])
def test_imbalance_is_the_busiest_position_over_the_mean(ranks: int) -> None:
    tokens = 131_072.0
    for order in ORDERS:
        work = [sum(Causal().seen(s).pairs for s in pieces(order, Segment(1.0, tokens, 0.0), ranks, p)) for p in range(ranks)]
        assert max(work) / np.mean(work) == pytest.approx(imbalance(order, tokens, ranks), rel=1e-12)
        if order == "zigzag":
            assert len(set(work)) == 1
    assert imbalance("contiguous", tokens, 16) == pytest.approx(1.937, abs=1e-3)
    assert imbalance("striped", tokens, 16) == pytest.approx(1.000114, abs=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "layer"), MIXERS)
def test_flops_over_all_positions_add_up_to_the_whole(name: str, layer: Any, order: str) -> None:
    """Scores exactly, under every mask that a position's segments can express; linear layers exactly.  Latents are
    expanded by every rank: the one thing repeated.
    """
    segment, flops, n = Segment(1.0, 65536.0, 0.0), quantity("tensor_flops"), 8
    if order == "striped" and not isinstance(layer.mask, Causal):
        pytest.skip("a stripe of a window is not a segment of one")
    whole = layer.work(layer.whole((segment,)), cache=CACHE)
    layout = Layout(cp=n, order=order, passing="gather").place(model(name))
    parts = []
    for position in range(n):
        scheme = Context(layout)
        scheme.position = position
        held = scheme.shard(layer.whole((segment,)), layer)
        parts.append(scheme.around(layer.work(held, cache=CACHE), layer, held, CACHE, Direction.FORWARD))
    assert sum(core(part) for part in parts) == pytest.approx(core(whole), rel=1e-12)
    if isinstance(layer, Attention):
        assert sum(fold(part, flops) for part in parts) == pytest.approx(fold(whole, flops), rel=1e-12)


@pytest.mark.parametrize("passing", PASSING)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("past", [0.0, 100_000.0])
def test_steps_of_a_ring_score_the_pairs_of_the_busiest_position(passing: str, order: str, direction: Direction, past: float) -> None:
    segment, n = Segment(2.0, 65536.0, past), 8
    layer = next(layer for _, layer in model(LLAMA).mixers)
    found = core(layer_work(LLAMA, layer, Layout(cp=n, cp_inner=4, order=order, passing=passing), segment, direction))
    busiest = sum(core(layer.work(layer.whole((s,)), direction, cache=CACHE)) for s in pieces(order, segment, n, n - 1))
    assert found == pytest.approx(busiest, rel=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_mask_every_position_scores_its_share(order: str) -> None:
    layer = replace(next(layer for _, layer in model(LLAMA).mixers), mask=Bidirectional())
    found = core(layer_work(LLAMA, layer, Layout(cp=8, order=order), Segment(1.0, 65536.0, 0.0)))
    assert found * 8 == pytest.approx(core(layer.work(layer.whole((Segment(1.0, 65536.0, 0.0),)), cache=CACHE)), rel=1e-12)


@pytest.mark.parametrize("name", [LLAMA, V3, "openai/gpt-oss-120b"])
def test_degrees_in_an_array_are_each_degree(name: str) -> None:
    wire, flops = quantity("wire_bytes"), quantity("tensor_flops")
    degrees = np.array([1.0, 2.0, 4.0, 8.0])
    for passing in ("kv", "q", "gather"):
        for phase in (Prefill(131072.0, prefix=4096.0), Decode(131072.0, 8.0)):
            together = System(model(name), Layout(cp=degrees, passing=passing)).work(phase)
            # a gather makes two pieces of a zigzag rank, and each expands its latents: one rank alone expands once
            for cell, n in list(enumerate(degrees))[name == V3 and passing == "gather" :]:
                alone = System(model(name), Layout(cp=int(n), passing=passing)).work(phase)
                for algebra in (wire, flops):
                    assert np.broadcast_to(fold(together, algebra), 4)[cell] == pytest.approx(fold(alone, algebra), rel=1e-12)


# ---- what travels


def test_a_ring_sends_each_rank_the_keys_and_values_of_all_others() -> None:
    """FORMULAS 5.5: (n - 1) S / n x 2 n_kv d e; 1M over 16, Llama 405B: 4.03 GB a layer."""
    layer = next(layer for _, layer in model(BIG).mixers)
    sent = messages(layer_work(BIG, layer, Layout(cp=16), Segment(1.0, M1, 0.0)))["ring keys and values"]
    assert sum(times for times, _ in sent) == 15
    assert sum(times * op.wire_bytes for times, op in sent) == 15 * (M1 / 16) * 2 * 8 * 128 * 2 == pytest.approx(4.02653e9, rel=1e-5)
    both = messages(layer_work(BIG, layer, Layout(tp=8, cp=16), Segment(1.0, M1, 0.0)))["ring keys and values"]
    assert sum(times * op.wire_bytes for times, op in both) * 8 == sum(times * op.wire_bytes for times, op in sent)


def test_backward_sends_keys_and_values_again_and_their_gradients_in_fp32_once_more_than_that() -> None:
    layer, n = next(layer for _, layer in model(BIG).mixers), 16
    sent = messages(layer_work(BIG, layer, Layout(cp=n), Segment(1.0, M1, 0.0), Direction.BACKWARD))
    block = M1 / n * 2 * 8 * 128
    assert sum(times * op.wire_bytes for times, op in sent["ring keys and values"]) == (n - 1) * block * 2
    assert sum(times * op.wire_bytes for times, op in sent["ring gradients"]) == n * block * 4


def test_queries_travel_and_outputs_return() -> None:
    """FORMULAS 5.5: (n - 1) T / n n_q d e round the ring, (n - 1) T / n (D e + 4 n_q) back."""
    layer, n, new = next(layer for _, layer in model(BIG).mixers), 16, 16384.0
    sent = messages(layer_work(BIG, layer, Layout(cp=n, passing="q"), Segment(1.0, new, M1 - new)))
    assert sum(times * op.wire_bytes for times, op in sent["ring queries"]) == (n - 1) * new / n * 16384 * 2
    assert sum(times * op.wire_bytes for times, op in sent["return outputs"]) == (n - 1) * new / n * (16384 * 2 + 128 * 4)


def test_a_gather_moves_the_bytes_of_a_ring_at_once() -> None:
    layer = next(layer for _, layer in model(LLAMA).mixers)
    wire = quantity("wire_bytes")
    found = {p: fold(layer_work(LLAMA, layer, Layout(cp=8, cp_inner=4, passing=p), Segment(1.0, M1, 0.0)), wire) for p in ("kv", "gather", "double")}
    assert found["kv"] == pytest.approx(found["gather"], rel=1e-12)
    sent = messages(layer_work(LLAMA, layer, Layout(cp=8, cp_inner=4, passing="double"), Segment(1.0, M1, 0.0)))
    assert sum(times for times, _ in sent["outer ring"]) == 1
    assert sum(times for times, _ in sent["inner ring"]) == 2 * 3


def test_a_latent_travels_as_a_latent() -> None:
    layer = next(layer for _, layer in model(V3).mixers)
    assert isinstance(layer, LatentAttention)
    sent = messages(layer_work(V3, layer, Layout(cp=8), Segment(1.0, M1, 0.0)))["ring keys and values"]
    assert sum(times * op.wire_bytes for times, op in sent) == 7 * M1 / 8 * (512 + 64) * 2


@pytest.mark.parametrize("mask", [Window(4096), Chunked(8192)])
def test_a_window_fetches_a_halo_whatever_the_context(mask: Any) -> None:
    plain = next(layer for _, layer in model(LLAMA).mixers)
    layer = replace(plain, mask=mask)
    assert halo_tokens(layer, layer.whole((Segment(1.0, 1.0, 0.0),))) == mask.width - 1
    row = 2 * 8 * 128 * 2
    for context in (M1, 4 * M1):
        for order, parts in (("contiguous", 1), ("zigzag", 2)):
            sent = messages(layer_work(LLAMA, layer, Layout(cp=8, order=order), Segment(1.0, context, 0.0)))
            assert {name: sum(t * op.wire_bytes for t, op in ops) for name, ops in sent.items()} == {"halo": parts * (mask.width - 1) * row}


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("reach", [0, 1, 3, 4, 7, 8, 11, 17, 100])
@pytest.mark.parametrize("past", [0, 5])
def test_a_halo_is_what_the_busiest_rank_must_ask_others_for(order: str, reach: int, past: int) -> None:
    for n in (1, 2, 3, 4, 8):
        chunk = 8 if order == "contiguous" else 4
        own = [{r} if order == "contiguous" else {r, 2 * n - 1 - r} for r in range(n)]
        asked = []
        for chunks in own:
            held = {past + c * chunk + i for c in chunks for i in range(chunk)}
            seen = {row for c in chunks for row in range(max(0, past + c * chunk - reach), past + c * chunk)}
            asked.append(len(seen - held))
        segment = Segment(1.0, 8.0 * n, float(past))
        assert [halo_rows(order, segment, float(n), float(reach), float(r)) for r in range(n)] == asked
        if n > 1:
            assert halo_rows(order, segment, float(n), float(reach)) == max(asked)


def test_one_layer_in_a_stack_fetches_what_its_own_mask_reaches() -> None:
    sent = messages(System(model("openai/gpt-oss-120b"), Layout(cp=4)).work(Prefill(M1)))
    assert sum(t for t, _ in sent["halo"]) == 18
    assert sum(t for t, _ in sent["ring keys and values"]) == 18 * 3


# ---- the rule


def test_thresholds_are_those_of_the_papers() -> None:
    """Ring Attention table 2 and 2411.01783 eq. 2; FORMULAS 5.5."""
    mha = {"kv_heads": 32.0, "heads": 32.0, "element_bytes": 2.0}
    assert block_tokens_to_hide(flops_per_s=312e12, bytes_per_s=300e9, **mha) == pytest.approx(1040)
    assert block_tokens_to_hide(flops_per_s=312e12, bytes_per_s=12.5e9, **mha) == pytest.approx(24_960)
    assert 6 * block_tokens_to_hide(flops_per_s=312e12, bytes_per_s=300e9, **mha) == pytest.approx(6240)
    assert block_tokens_to_hide(flops_per_s=312e12, bytes_per_s=300e9, share=0.5, **mha) == pytest.approx(2080)
    assert tokens_to_hide_kv(ranks=16, flops_per_s=8 * 800e12, bytes_per_s=400e9, kv_heads=8, heads=128, element_bytes=2) == 16_000
    assert tokens_to_hide_q(ranks=16, flops_per_s=8 * 800e12, bytes_per_s=400e9, element_bytes=2) == 16 * 2 * 6.4e15 / (4 * 400e9)
    assert passes_kv(12_500, 87_500, kv_heads=8, heads=128)
    assert not passes_kv(12_499, 87_501, kv_heads=8, heads=128)
    assert passes_kv(1, 10**6, kv_heads=8, heads=128, hidden_from=1)


@pytest.mark.parametrize(("gpu", "kv_heads"), [("a100_sxm_80", 32), ("h100", 8), ("h200", 1)])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_a_send_hides_behind_a_block_from_the_threshold_on(gpu: str, kv_heads: int, order: str) -> None:
    """The papers' threshold is where a ring's own tree turns at peak rates, products alone: below it the send is the longer."""
    here, ranks, layer = machine(gpu, 8), 8, Attention(4096, 32, kv_heads, 128)
    clock = Clock(here, Calibration.none())
    least = block_tokens_to_hide(
        flops_per_s=here.gpu.peak_flops_per_s("bf16"), bytes_per_s=here.tiers[0].bytes_per_s, kv_heads=kv_heads, heads=32, element_bytes=2.0,
        share=0.5 if order == "zigzag" else 1.0,
    )  # fmt: skip
    for factor, hidden in ((0.98, False), (1.02, True)):
        work = layer_work(LLAMA, layer, Layout(cp=ranks, order=order), Segment(1.0, float(least) * factor * ranks, 0.0))
        sends = {op.name: clock.bound(op) for _, op in leaves(work) if isinstance(op, Message) and op.name == "ring keys and values"}
        steps = [clock.demand(op)["tensor"] for _, op in leaves(work) if isinstance(op, Op) and op.kernel == "attention"]
        assert (steps[1] >= sends["ring keys and values"]) is hidden


@pytest.mark.parametrize("name", [BIG, LLAMA])
def test_the_choice_follows_the_rule_of_a_select_in_every_fold(name: str) -> None:
    layer, n = next(layer for _, layer in model(name).mixers), 8
    share = 2 * layer.num_key_value_heads / layer.num_attention_heads
    for new in (0.5 * share, 2 * share):
        segment = Segment(1.0, new * M1, (1 - new) * M1)
        wire = {p: fold(layer_work(name, layer, Layout(cp=n, passing=p), segment), quantity("wire_bytes")) for p in ("auto", "kv", "q")}
        assert wire["auto"] == wire["kv" if new >= share else "q"]
    fewest = fold(layer_work(name, layer, Layout(cp=n, passing="auto", hidden_from=1.0), segment), quantity("wire_bytes"))
    assert fewest == wire["kv"]


# ---- Ulysses, Helix


def test_ulysses_turns_tokens_into_heads_and_back() -> None:
    """FORMULAS 5.7: 1M over 8, 64 / 8 heads: 4.23 GB a layer, a ring 3.76 GB."""
    layer, wire = next(layer for _, layer in model(LLAMA).mixers), quantity("wire_bytes")
    found = fold(layer_work(LLAMA, layer, Layout(ulysses=8), Segment(1.0, M1, 0.0)), wire)
    assert found == pytest.approx(7 / 8 * M1 / 8 * (2 * 64 + 2 * 8) * 128 * 2, rel=1e-12)
    assert found == pytest.approx(4.22786e9, rel=1e-5)
    assert fold(layer_work(LLAMA, layer, Layout(cp=8), Segment(1.0, M1, 0.0)), wire) == pytest.approx(3.75810e9, rel=1e-5)
    more = fold(layer_work(LLAMA, layer, Layout(ulysses=16), Segment(1.0, M1, 0.0)), wire)
    assert more == pytest.approx(15 / 16 * M1 / 16 * (2 * 64 + 2 * 16) * 128 * 2, rel=1e-12)


@pytest.mark.parametrize(("ulysses", "cp"), [(2, 4), (4, 2), (8, 1), (1, 8)])
def test_usp_scores_the_same_pairs_however_it_is_split(ulysses: int, cp: int) -> None:
    layer, segment = next(layer for _, layer in model(LLAMA).mixers), Segment(1.0, M1, 0.0)
    found = core(layer_work(LLAMA, layer, Layout(ulysses=ulysses, cp=cp), segment))
    assert found * 8 == pytest.approx(core(layer.work(layer.whole((segment,)), cache=CACHE)), rel=1e-12)
    sent = messages(layer_work(LLAMA, layer, Layout(ulysses=ulysses, cp=cp), segment))
    ring = sum(t * op.wire_bytes for t, op in sent.get("ring keys and values", []))
    assert ring == (cp - 1) * M1 / cp * 2 * max(8 / ulysses, 1) * 128 * 2


def test_ulysses_ends_at_the_heads_of_a_rank_and_a_ring_does_not() -> None:
    spec = model(LLAMA)
    assert allows(spec, Layout(ulysses=64))
    assert allows(spec, Layout(tp=8, ulysses=8))
    (told,) = Layout(tp=8, ulysses=16).refusals(spec)
    assert told.startswith("--ulysses 16: ")
    assert "8 attention heads" in told
    assert "--cp" in told
    assert allows(spec, Layout(cp=4096))


@pytest.mark.parametrize("name", [LLAMA, V3])
def test_helix_sends_the_same_whatever_the_context(name: str) -> None:
    wire = quantity("wire_bytes")
    layout = Layout(tp=16, helix=16) if name == V3 else Layout(tp=32, helix=8)
    sent = [fold(System(model(name), layout).work(Decode(context, 8.0)), wire) for context in (1e4, 1e6)]
    assert sent[0] == sent[1] > 0


def test_helix_hands_over_the_partial_outputs_of_its_share_of_heads() -> None:
    """FORMULAS 5.8: absorbed latent, 128 heads x 512, 8 ranks: 115,584 bytes a layer and token."""
    layer = next(layer for _, layer in model(V3).mixers)
    sent = messages(layer_work(V3, layer, Layout(tp=8, helix=8), Segment(1.0, 1.0, 1e6, split_kv=True)))
    assert [op.wire_bytes for _, op in sent["hand over outputs"]] == [115_584]


@pytest.mark.parametrize("name", [LLAMA, V3])
def test_helix_ranks_share_a_cache_and_repeat_only_queries(name: str) -> None:
    spec, layer = model(name), next(layer for _, layer in model(name).mixers)
    t, h = (8, 8) if name == V3 else (32, 4)
    stored = (Segment(1.0, 0.0, 1e6),)
    whole = layer.state_bytes(layer.whole(stored), CACHE)
    here = Layout(tp=t, helix=h).place(spec).shard(layer, stored)
    assert layer.state_bytes(here, CACHE) * t == whole
    modules = {m.name: m.parameters for m in layer.modules(layer.whole(stored))}
    mine = {m.name: m.parameters for m in layer.modules(here)}
    queries = "q_b_proj" if name == V3 else "q_proj"
    assert mine[queries] * t == modules[queries] * h
    assert mine["o_proj"] * t == modules["o_proj"]


def test_helix_refuses_copies_of_key_value_heads() -> None:
    told = list(Layout(tp=32, helix=2).refusals(model(LLAMA)))
    assert told
    assert "--helix 4" in told[0]


def test_a_tree_reduces_three_times_whatever_the_context() -> None:
    sent = messages(System(model(LLAMA), Layout(cp=8, merge="tree")).work(Decode(M1, 4.0)))
    sizes = {name: {op.payload_bytes for _, op in sent[name]} for name in ("maximum", "numerator", "denominator")}
    assert sizes == {"maximum": {4 * 64 * 4.0}, "numerator": {4 * 64 * 128 * 2.0}, "denominator": {4 * 64 * 4.0}}


@pytest.mark.parametrize("merge", ["gather", "tree"])
def test_decoding_ranks_score_the_whole_cache_once(merge: str) -> None:
    whole = core(System(model(LLAMA), Layout()).work(Decode(M1, 8.0)))
    assert core(System(model(LLAMA), Layout(cp=8, merge=merge)).work(Decode(M1, 8.0))) * 8 == pytest.approx(whole, rel=1e-12)


# ---- what is held


@pytest.mark.parametrize("name", MAIN)
def test_ranks_of_a_ring_hold_a_share_of_every_cache_and_of_no_weight(name: str) -> None:
    spec = model(name)
    alone, shared = (System(spec, layout).resident(sequences=3.0, context=M1) for layout in (Layout(), Layout(cp=8)))
    assert shared.cache * 8 == pytest.approx(alone.cache, rel=1e-12)
    assert shared.weights == alone.weights
    assert System(spec, Layout(cp=8)).residual_bytes(M1) * 8 == System(spec, Layout()).residual_bytes(M1)


def test_positions_are_classes_where_they_differ() -> None:
    spec = model(LLAMA)
    assert [r.name for r in Layout(cp=8).ranks(spec)] == ["only"]
    assert [r.position for r in Layout(cp=8, order="contiguous").ranks(spec)] == list(range(8))
    assert len(Layout(cp=4, pp=2, order="striped").ranks(spec)) == 8


@pytest.mark.parametrize(
    "layout", [Layout(cp=4, order="spiral"), Layout(cp=4, passing="x"), Layout(cp=6, cp_inner=4), Layout(cp=4, passing="double"), Layout(cp=2, tp=16, dcp=2)],
    ids=str,
)
def test_what_makes_no_ring_is_refused_with_its_remedy(layout: Layout) -> None:
    told = list(layout.refusals(model(LLAMA)))
    assert told
    assert all(line.startswith("--") and ": " in line for line in told)


def test_a_block_is_seen_whole_by_every_query() -> None:
    seen = Block(100.0).seen(Segment(2.0, 7.0, 3.0))
    assert (seen.pairs, seen.live, seen.keys) == (700.0, 100.0, 100.0)
    assert Block(100.0).cumulative(7.0) == 700.0


# ---- mixers without a ring


@pytest.mark.parametrize("name", ["Qwen/Qwen3-Next-80B-A3B", "deepseek-ai/DeepSeek-V3.2", "MiniMaxAI/MiniMax-M1"])
def test_a_mixer_without_a_ring_gathers_what_grows_and_hands_over_states_and_halos(name: str) -> None:
    """Bytes of states and halos do not depend on the context; those of rows, entries and indexer keys do."""
    spec = model(name)
    seen = set()
    for _, layer in spec.mixers:
        kept = layer.kept(layer.whole((Segment(1.0, 1.0, 0.0),)))
        if type(layer) in (Attention, LatentAttention):
            continue
        sizes = []
        for context in (M1, 2 * M1):
            sent = messages(layer_work(spec.name, layer, Layout(cp=8, order="contiguous"), Segment(1.0, context, 0.0)))
            sizes.append({key: sum(t * op.wire_bytes for t, op in ops) for key, ops in sent.items()})
        for key in sizes[0]:
            assert sizes[1][key] == pytest.approx(sizes[0][key] * (2 if key.startswith("gather") and key != "gather states" else 1), rel=1e-6), key
        seen |= {item.keep for item in kept}
        assert ("gather states" in sizes[0]) == any(item.every == 0 for item in kept)
    assert seen


@pytest.mark.parametrize("name", EVERY)
def test_every_model_of_the_catalog_can_share_its_tokens(name: str) -> None:
    spec = model(name)
    told = list(Layout(cp=4).refusals(spec))
    if told:
        assert "encoder" in told[0]
        return
    assert fold(System(spec, Layout(cp=4)).work(Prefill(131072.0)), quantity("wire_bytes")) > 0
    alone, shared = (fold(System(spec, layout).work(Decode(131072.0, 8.0)), quantity("tensor_flops")) for layout in (Layout(), Layout(cp=4)))
    assert shared * 4 == pytest.approx(alone, rel=0.02)
    assert System(spec, Layout(cp=4)).resident(sequences=1.0, context=M1).cache <= System(spec, Layout()).resident(sequences=1.0, context=M1).cache
