"""The quantities behind four pictures of long context, and a recipe priced choice by choice.

Every answer is of models of the catalog and published tables; nothing here knows a GPU.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

import numpy as np

from simulator import compare, reach, training
from simulator.data import data_path
from simulator.dtypes import BF16, CACHE_FORMATS
from simulator.hf import load_model, with_formats
from simulator.kernels.attention import Causal, Mask, Segment, Window, pairs
from simulator.layers import Attention, LatentAttention
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import Prefill, System
from simulator.position import NoPosition, Rotary
from simulator.reach import Effective
from simulator.units import BYTES, FLOPS, Array, Bytes, Flops, Tokens, gib, significant
from simulator.work import fold, quantity

#: Bytes of a row statistic that a fused kernel keeps: the logarithm of a sum, in fp32.
_STATISTIC_BYTES = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One line: what it is, how it grows, its values over lengths or distances, and a length worth marking on it."""

    name: str
    growth: str
    along: Array
    mark: int | None = None


# ---- cost over length


def attention_flops(model: ModelSpec, tokens: Tokens, mask: Mask) -> Flops:
    """FLOPs of scores and values of all plain attention layers for one prompt, every layer under `mask`.

    F = sum over layers of 4 n_q d x pairs(mask, tokens); causal: pairs = N (N + 1) / 2.  Neglected: softmax.  Source: `kernels.attention`.
    """
    total: Flops = 0.0
    for count, layer in model.counted:
        if isinstance(layer, Attention):
            scored = pairs(mask, Segment(1.0, tokens, 0.0))
            total = total + count * 4 * layer.num_attention_heads * layer.head_dim * scored
    return total


def score_bytes(model: ModelSpec, tokens: Tokens) -> Bytes:
    """The score matrix of one layer, as a kernel that is not fused writes it: n_q N^2 elements of bf16."""
    heads = max(layer.num_attention_heads for layer in model.layers if isinstance(layer, Attention))
    return heads * BF16.bytes * tokens * tokens


def statistic_bytes(model: ModelSpec, tokens: Tokens) -> Bytes:
    """What a fused kernel keeps of one layer's scores instead: one fp32 per query and head, 4 n_q N (FlashAttention-2, 2307.08691, section 3)."""
    heads = max(layer.num_attention_heads for layer in model.layers if isinstance(layer, Attention))
    return heads * _STATISTIC_BYTES * tokens


@dataclass(frozen=True, slots=True, eq=False)
class LengthCost:
    """What one prompt costs at each length: FLOPs to prefill it, bytes to hold."""

    model: ModelSpec
    tokens: Array
    compute: list[Series]
    memory: list[Series]


def length_cost(name: str = "meta-llama/Meta-Llama-3.1-70B", window: int = 4096) -> LengthCost:
    """Compute and memory of one prompt of 2K to 2M tokens.

    Compute: attention over every pair, the same under a sliding window, and everything else (what is left of the prefill's useful FLOPs).
    Memory: one layer's scores written out, what a fused kernel keeps of them, the cache of all layers, the weights.
    """
    model, tokens = load_model(name), np.array([2.0**k for k in range(11, 22)])
    whole = np.asarray(fold(System(model, Layout()).work(Prefill(tokens)), quantity("model_flops")), dtype=np.float64)
    dense = np.asarray(attention_flops(model, tokens, Causal()), dtype=np.float64)
    compute = [
        Series("attention, every pair", "N²", dense),
        Series(f"attention, window of {window:,}", "N", np.asarray(attention_flops(model, tokens, Window(window)), dtype=np.float64)),
        Series("everything else", "N", whole - dense),
    ]
    memory = [
        Series("scores of one layer, written out", "N²", np.asarray(score_bytes(model, tokens))),
        Series("KV cache, all layers", "N", np.asarray(model.cache_bytes(tokens), dtype=np.float64)),
        Series("fused kernel's statistics, one layer", "N", np.asarray(statistic_bytes(model, tokens))),
        Series("weights", "1", np.full(tokens.shape, float(model.weight_bytes()))),
    ]
    return LengthCost(model, tokens, compute, memory)


# ---- decay over distance


#: Models whose rotary embeddings are drawn: an early base, a larger one, a very large one.
ROTARY = ("meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3.1-70B", "Qwen/Qwen2.5-14B-Instruct-1M")
#: A model with layers that have no position.
POSITION_FREE = "meta-llama/Llama-4-Scout-17B-16E-Instruct"


def decay(length: int = 2**20, points: int = 160, samples: int = 16) -> tuple[Array, list[Series]]:
    """Distances, and per model the bound on how a score can depend on them, relative to distance 0: B(m) / B(0), the largest of
    `samples` distances per point (B oscillates), marked at the length its frequencies were trained on.
    It is an upper bound over all queries and keys, not a score; NoPE has none: 1.
    """
    edges = np.geomspace(1.0, float(length), points + 1)
    inside = edges[:-1, None] * (edges[1:] / edges[:-1])[:, None] ** np.linspace(0.0, 1.0, samples)
    lines = []
    for name in ROTARY:
        model = load_model(name)
        held = next(p for p in reach.positions(model) if isinstance(p.position, Rotary))
        rotary = held.position
        assert isinstance(rotary, Rotary)
        bound = np.asarray(rotary.decay_bound(inside, float(length))).max(axis=1)
        start = float(np.asarray(rotary.decay_bound(np.array([0.0]), float(length)))[0])
        lines.append(Series(f"{name.split('/')[-1]}: θ = {rotary.theta:,.0f}", rotary.name, bound / start, reach.trained_tokens(model)))
    free = next(p for p in reach.positions(load_model(POSITION_FREE)) if isinstance(p.position, NoPosition))
    lines.append(Series(f"{POSITION_FREE.rsplit('/', maxsplit=1)[-1]}: {free.layers} NoPE layers", free.position.name, np.ones(points)))
    return edges[:-1], lines


@dataclass(frozen=True, slots=True)
class Reach:
    """How far one kind of layer of a model reaches, in tokens and pairs of dimensions."""

    model: str
    layers: str
    trained_tokens: int | None
    declared_tokens: int | None
    effective: str
    pairs_without_a_period: int | None
    told: str


def reaches(length: int = 2**20) -> list[Reach]:
    """For the models of `decay`: what training showed of their positions."""
    found = []
    for name in (*ROTARY, POSITION_FREE, "HuggingFaceTB/SmolLM3-3B", "deepseek-ai/DeepSeek-V3.2"):
        model = load_model(name)
        shown, trained = reach.effective(model), reach.trained_tokens(model)
        for held in reach.positions(model):
            rotary = held.position if isinstance(held.position, Rotary) else None
            unfinished = rotary.incomplete(float(trained)) if rotary and trained else None
            found.append(Reach(
                name.split("/")[-1], f"{held.layers} x {held.what}, {held.position.name}", trained, model.reach.declared_tokens,
                shown.show() if shown else "", unfinished, reach.describe(held, model, length),
            ))  # fmt: skip
    return found


# ---- windows over time


@dataclass(frozen=True, slots=True)
class ContextWindow:
    """What a model's maker offered, when, and what the model was shown to use of it."""

    date: str
    model: str
    tokens: int
    effective_tokens: int | None
    effective_at_least: bool
    measure: str
    record: bool
    source_url: str
    notes: str


@cache
def context_windows() -> list[ContextWindow]:
    """data/published/context_windows.csv in order of date; `record` marks the largest window so far."""
    shown = _effective()
    with data_path("published", "context_windows.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["date"])
    found: list[ContextWindow] = []
    most = 0
    for row in rows:
        tokens, known = int(row["window_tokens"]), shown.get(row["effective_model"])
        found.append(ContextWindow(
            row["date"], row["model"], tokens, known.tokens if known else None, bool(known and known.at_least), known.measure if known else "",
            tokens > most, row["source_url"], row["notes"],
        ))  # fmt: skip
        most = max(most, tokens)
    return found


def _effective() -> dict[str, Effective]:
    """Published effective lengths by the name the source gives the model."""
    with data_path("published", "effective_length.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["model"]: Effective(
                int(row["effective_tokens"]), row["bound"] == "at least", row["measure"], row["scores"], row["source_url"], row["notes"]
            )
            for row in csv.DictReader(file)
        }


# ---- the recipe


@dataclass(frozen=True, slots=True)
class Choice:
    """One line of the recipe: what was chosen in 2020, what is chosen now, and what it changes here, `factor` times; None where the choice
    does not change what a context costs.
    """

    what: str
    then: str
    now: str
    number: str
    factor: float | None = None


def recipe(context: int = 2**20) -> list[Choice]:
    """A recent million-token model against GPT-3 (2020), each choice with its number at `context` tokens."""
    gpt3, llama, scout = (load_model(n) for n in ("openai/gpt3-175b.paper", "meta-llama/Meta-Llama-3.1-70B", POSITION_FREE))
    latent, sparse = load_model("deepseek-ai/DeepSeek-V3"), load_model("deepseek-ai/DeepSeek-V3.2")
    hybrid = load_model("moonshotai/Kimi-Linear-48B-A3B-Instruct")
    found = [_positions(gpt3, scout), *_heads(llama, latent, context), _quantized(llama, context), *_algorithms(llama, latent, sparse, context)]
    moe = compare.quantities(latent, context)
    per_token, shared = float(hybrid.cache_slope(float(context))), float(llama.cache_slope(float(context)))
    found += [
        Choice(
            "mixture of experts", "dense", f"{latent.name.split('/')[-1]}, {compare.channels(latent)}",
            f"{moe.parameters / 1e9:,.0f}B weights held, {moe.active / 1e9:,.0f}B met by a token", moe.parameters / moe.active,
        ),
        Choice(
            "hybrid of attention and recurrence", "every layer attends", f"{hybrid.name.split('/')[-1]}: {compare.mixers(hybrid)}",
            f"{BYTES.show(per_token)} of cache per token, {BYTES.show(shared)} in {llama.name.split('/')[-1]}", shared / per_token,
        ),
        _curriculum(llama, context),
        _spread(llama, context),
        _evaluation(),
        Choice("optimizer and stability", "Adam, cosine", "AdamW or Muon, WSD, z-loss, QK-norm", "does not change with the length of a context"),
    ]  # fmt: skip
    return found


def _positions(gpt3: ModelSpec, scout: ModelSpec) -> Choice:
    table, kinds = gpt3.reach.declared_tokens or 0, reach.positions(scout)
    free = sum(p.layers for p in kinds if isinstance(p.position, NoPosition))
    declared = scout.reach.declared_tokens or 0
    return Choice(
        "positions", f"learned, a table of {table:,}", f"iRoPE: {free} of {sum(p.layers for p in kinds)} layers have none",
        f"{declared:,} tokens declared, no layer with a table", declared / table if table else None,
    )  # fmt: skip


def _heads(llama: ModelSpec, latent: ModelSpec, context: int) -> list[Choice]:
    """Each against its own multi-head twin: as many key-value heads as query heads."""
    found = []
    for model, what in ((llama, "grouped heads"), (latent, "latent heads")):
        held, heads = float(model.cache_bytes(float(context))), twin_bytes(model, context)
        now = f"{model.name.split('/')[-1]}: {compare.mixers(model)}"
        found.append(Choice(what, "one key and value per head", now, f"{gib(held)} of cache, {gib(heads)} with a key and value per head", heads / held))
    return found


def twin_bytes(model: ModelSpec, context: int) -> float:
    """The cache if every query head kept its own key and value: layers x n_q (d_k + d_v) elements of bf16 per token."""
    total = 0.0
    for count, layer in model.mixers:
        if isinstance(layer, LatentAttention):
            width = layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim
        else:
            assert isinstance(layer, Attention)
            width = 2 * layer.head_dim
        total += count * layer.num_attention_heads * width * BF16.bytes * context
    return total


def _quantized(llama: ModelSpec, context: int) -> Choice:
    whole = float(llama.cache_bytes(float(context)))
    stored = {name: float(with_formats(llama, None, name).cache_bytes(float(context))) for name in ("fp8", "kivi-2") if name in CACHE_FORMATS}
    told = ", ".join(f"{gib(held)} in {name}" for name, held in stored.items())
    return Choice("quantized cache", "16 bits", " or ".join(stored), f"{gib(whole)} in bf16, {told}", whole / min(stored.values()))


def _algorithms(llama: ModelSpec, latent: ModelSpec, sparse: ModelSpec, context: int) -> list[Choice]:
    written, kept = float(score_bytes(llama, float(context))), float(statistic_bytes(llama, float(context)))
    dense, window = (float(attention_flops(llama, float(context), mask)) for mask in (Causal(), Window(4096)))
    every, chosen = (compare.quantities(model, context) for model in (latent, sparse))
    return [
        Choice(
            "fused attention", "scores written to memory", "FlashAttention",
            f"{BYTES.show(written)} of scores per layer, {BYTES.show(kept)} kept", written / kept,
        ),
        Choice("sliding window", "every pair", "4,096 tokens", f"{FLOPS.show(dense)} of attention per prompt, {FLOPS.show(window)}", dense / window),
        Choice(
            "sparse attention", f"{latent.name.split('/')[-1]}, dense", f"{sparse.name.split('/')[-1]}, top 2,048",
            f"{FLOPS.show(every.prefill_flops)} per prompt, {FLOPS.show(chosen.prefill_flops)}", every.prefill_flops / chosen.prefill_flops,
        ),
    ]  # fmt: skip


def _curriculum(llama: ModelSpec, context: int) -> Choice:
    """The price of training on length: useful FLOPs per token, at 8K and at `context`."""
    short, long = (float(training.token_flops(llama, float(n))) for n in (8192, context))
    return Choice(
        "stages of training", "one length, 2K", "8K first, then 128K and more",
        f"a token costs {significant(long / short, 3)} x as much in a sequence of {context:,} as in one of 8,192", long / short,
    )  # fmt: skip


def _spread(llama: ModelSpec, context: int, ranks: int = 16, block: int = 16) -> Choice:
    whole, slope = float(llama.cache_bytes(float(context))), float(llama.cache_slope(float(context)))
    return Choice(
        "context parallelism, pages", "one GPU holds a sequence", f"{ranks} ranks share it, blocks of {block}",
        f"{gib(whole)} of cache become {gib(whole / ranks)} per rank; a page wastes at most {BYTES.show(slope * (block - 1))}", float(ranks),
    )  # fmt: skip


def _evaluation() -> Choice:
    measured = [w for w in context_windows() if w.effective_tokens is not None]
    short = [w for w in measured if not w.effective_at_least and w.effective_tokens is not None and w.effective_tokens < w.tokens]
    return Choice(
        "evaluation at each stage", "perplexity", "needles, RULER, LongBench",
        f"{len(short)} of the {len(measured)} windows with a published RULER are shown to be used only in part",
    )  # fmt: skip
