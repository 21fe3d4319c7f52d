"""Our side of every claim: functions that `data/published/claims.toml` names, with its inputs.

Each asks the simulator; none holds a figure of its own.  Shares are fractions, memory is in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from simulator import compare, figures, reach, training
from simulator.calibration import Calibration
from simulator.dtypes import CACHE_FORMATS, DTYPES, cache_format, kivi
from simulator.engines import Vllm
from simulator.engines.paging import paged_waste, reserved_waste
from simulator.estimate import estimate
from simulator.hardware import catalog as gpus
from simulator.hardware import cluster
from simulator.hardware import gpu as accelerator
from simulator.hf import load_model, with_formats
from simulator.kernels.attention import Bidirectional, Causal, Chunked, Mask, Segment, Sinks, Window, attention
from simulator.kernels.blocked_attention import blocked_attention_bytes
from simulator.kernels.sparse_attention import Banded, BigBird, Columns
from simulator.kernels.unfused_attention import unfused_attention
from simulator.layers import Attention, NativeSparseAttention
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.parallel.context import block_tokens_to_hide, pieces
from simulator.parallel.sharded_data import ADAM_BYTES, MUON_BYTES, ShardedData
from simulator.phases import Decode, Prefill, System
from simulator.position import NoPosition, Rotary, Temperature
from simulator.published import measurements
from simulator.published.kernels import TERA
from simulator.published.table import machine
from simulator.timing import Clock, calibrated
from simulator.work import Serial, Work, fold, quantity

Source = str | Mapping[str, Any]


def _model(source: Source, cache: str | None = None, weights: str | None = None) -> ModelSpec:
    return with_formats(load_model(source if isinstance(source, str) else dict(source)), weights, cache)


# ---- length


def pairs_growth(*, short: float, long: float) -> float:
    """Causal pairs of a prompt of `long` tokens over those of one of `short`."""
    return float(Causal().cumulative(long) / Causal().cumulative(short))


def prompt_growth(*, model: Source, short: float, long: float) -> float:
    """The same of all useful FLOPs of a prompt: attention and everything else."""
    few, many = (float(fold(System(_model(model), Layout()).work(Prefill(n)), quantity("model_flops"))) for n in (short, long))
    return many / few


def exponent(*, of: str, tokens: float) -> float:
    """How a cost grows at `tokens`: log4 of what four times as many cost over what they cost."""
    cost = _COSTS[of]
    return math.log(cost(4 * tokens) / cost(tokens), 4)


def _strided(tokens: float) -> float:
    """Both halves of Sparse Transformer's strided pattern, with a stride of sqrt N."""
    stride = math.isqrt(int(tokens))
    return float(Window(stride + 1).cumulative(tokens) + Columns(stride).cumulative(tokens))


def _of_mask(mask: Mask) -> Callable[[float], float]:
    return lambda tokens: float(mask.cumulative(tokens))


def _of_llama(cost: Callable[[ModelSpec, float], Any]) -> Callable[[float], float]:
    return lambda tokens: float(cost(load_model("meta-llama/Meta-Llama-3.1-70B"), tokens))


_COSTS: Mapping[str, Callable[[float], float]] = {
    "fused attention's FLOPs": _of_llama(lambda model, tokens: figures.attention_flops(model, tokens, Causal())),
    "fused attention's memory": _of_llama(figures.statistic_bytes), "written scores": _of_llama(figures.score_bytes), "strided": _strided,
    "Longformer": _of_mask(Banded(512, 1)), "BigBird": _of_mask(BigBird(64, 3)),
    "blocked traffic": lambda tokens: blocked_traffic(tokens=tokens, heads=1.0, head_dim=64, gpu="a100", backward=False),
}  # fmt: skip


# ---- memory


def cache_bytes(*, model: Source, context: float, cache: str | None = None) -> float:
    """Cache of one sequence."""
    return float(_model(model, cache).cache_bytes(context))


def rows_bytes(*, model: Source, context: float) -> float:
    """What grows with the context of one sequence: keys and values alone."""
    return float(_model(model).slope()) * context


def weight_bytes(*, model: Source) -> float:
    """Weights in the checkpoint's format."""
    return float(_model(model).weight_bytes())


def largest_accelerators(*, model: Source, context: float, weights: str | None = None, cache: str | None = None) -> float:
    """Weights and the cache of one sequence over the memory of the largest accelerator known here."""
    spec = _model(model, cache, weights)
    return float(spec.weight_bytes() + spec.cache_bytes(context)) / max(float(accelerator(name).capacity_bytes) for name in gpus())


def cache_growth(*, model: Source, short: float, long: float) -> float:
    """Cache of a sequence of `long` tokens over that of one of `short`."""
    spec = _model(model)
    return float(spec.cache_bytes(long) / spec.cache_bytes(short))


def sink_bytes(*, sinks: int, window: int, layers: int, heads: int, head_dim: int, context: float) -> float:
    """What layers with `sinks` first and `window` last keys keep."""
    layer = Attention(heads * head_dim, heads, heads, head_dim, mask=Sinks(sinks, window))
    return layers * float(layer.state_bytes(layer.whole((Segment(1.0, 0.0, context),)), CACHE_FORMATS["bf16"]))


def head_type(*, name: str, **twin: int) -> float:
    """Times fewer elements than multi-head attention."""
    found = compare.head_types(**twin, layers=1, context=1, cache=CACHE_FORMATS["bf16"])
    return next(t.reduction for t in found if t.name == name)


def own_twin(*, model: Source, context: int) -> float:
    """Cache if every query head kept its own key and value, as wide as they are, over the model's."""
    spec = _model(model)
    return figures.twin_bytes(spec, context) / float(spec.cache_bytes(float(context)))


def cache_reduction(*, model: Source, base: Source, bits: float = 16.0) -> float:
    """By how much a token's cache is smaller than the base's in 16 bits, stored in `bits` bits."""
    return 1 - float(_model(model).slope()) * bits / 16 / float(_model(base).slope())


def cache_ratio(*, model: Source, cache: str, base: Source, base_cache: str) -> float:
    """Bytes a token adds over those it adds in the base."""
    return float(_model(model, cache).slope() / _model(base, base_cache).slope())


def compression(*, cache: str, group: int | None = None) -> float:
    """Llama 70B's cache in 16 bits over the same in a format (KIVI with groups of `group`), scales included, per token added."""
    stored = cache_format(cache) if group is None else kivi(int(cache_format(cache).bits), group)
    model = load_model("meta-llama/Meta-Llama-3.1-70B")
    return float(model.slope() / model.slope(stored))


def operations_ratio(*, model: Source, base: Source, context: float) -> float:
    """FLOPs of one more token in 8-bit equivalents over those of the base."""
    return float(compare.eight_bit_flops(_model(model), context) / compare.eight_bit_flops(_model(base), context))


def reserved(*, prompt: float, output: float, slots: float | None = None) -> float:
    """Waste of contiguous reservations."""
    return float(reserved_waste(prompt, output, slots))


def paged(*, prompt: float, output: float, block: int) -> float:
    """Waste of blocks taken as needed."""
    return float(paged_waste(prompt, output, block))


# ---- attention


def unfused_traffic(*, sequences: float, tokens: float, heads: float, head_dim: int) -> float:
    """HBM bytes of attention in separate kernels, forward and backward, with mask and dropout."""
    asked = Segment(sequences, tokens, 0.0)
    work = unfused_attention("attention", asked, heads=heads, head_dim=head_dim, backward=True, dropout=True)
    return float(fold(work, quantity("hbm_bytes")))


def blocked_traffic(*, tokens: float, heads: float, head_dim: int, gpu: str, sequences: float = 1.0, backward: bool = True) -> float:
    """HBM bytes of the first FlashAttention on a GPU's shared memory, forward (and backward)."""
    sram = accelerator(gpu).shared_memory_bytes_per_unit
    assert sram is not None, gpu
    ways = (False, True) if backward else (False,)
    return float(sum(blocked_attention_bytes(tokens=tokens, heads=sequences * heads, head_dim=head_dim, sram_bytes=sram, backward=b) for b in ways))


def traffic_ratio(*, gpu: str, **shape: Any) -> float:
    """The one over the other."""
    return unfused_traffic(**shape) / blocked_traffic(gpu=gpu, **shape)


def utilisation(*, gpu: str, impl: str, tokens: float, hidden: int, head_dim: int, backward: bool, dtype: str = "fp16") -> float:
    """Rate we expect of an attention kernel over the GPU's datasheet, without a mask; backward counts 2.5 forwards."""
    on, shape = cluster(gpu), {"heads": hidden / head_dim, "kv_heads": hidden / head_dim, "head_dim": head_dim}
    calls: list[Work] = [
        attention("core", Segment(1.0, tokens, 0.0), mask=Bidirectional(), dtype=DTYPES[dtype], impl=impl, backward=b, **shape)  # type: ignore[arg-type]
        for b in ((False, True) if backward else (False,))
    ]
    work = Serial(calls)
    seconds = float(fold(work, calibrated(Clock(on, Calibration.load(on.gpu)))))
    return float(fold(work, quantity("tensor_flops"))) / seconds / float(on.gpu.datasheet_flops_per_s(dtype))


def charted(*, source: str, kernel: str, gpu: str) -> float:
    """The best published rate of a kernel on a GPU over the GPU's datasheet."""
    on = accelerator(gpu)
    rows = [row for row in measurements() if row.source == source and row.kernel_or_engine == kernel and machine(row).gpu.name == on.name]
    return max(float(row.value) for row in rows) * TERA / float(on.datasheet_flops_per_s("fp16"))


def strided_share(*, tokens: float) -> float:
    """Pairs of the strided pattern, one pair of heads doing both halves, over all causal pairs."""
    return _strided(tokens) / float(Causal().cumulative(tokens))


def selected_ratio(*, context: float, **layer: Any) -> float:
    """Keys that full attention reads to decode one token over those that NSA reads."""
    sparse = NativeSparseAttention(**layer)
    segment = Segment(1.0, 1.0, context - 1, split_kv=True)
    return context / sum(float(mask.seen(segment).keys) for mask in sparse.masks)


def attention_share(*, model: Source) -> float:
    """Layers that attend over all mixing layers."""
    mixers = _model(model).mixers
    return sum(n for n, layer in mixers if isinstance(layer, Attention)) / sum(n for n, _ in mixers)


def chunked_share(*, model: Source) -> float:
    """Layers that attend inside chunks only, over all."""
    mixers = _model(model).mixers
    return sum(n for n, layer in mixers if isinstance(layer, Attention) and isinstance(layer.mask, Chunked)) / sum(n for n, _ in mixers)


def throughput_ratio(
    *, model: Source, base: Source, gpu: str, prompt: float, output: float, most: float, with_prompt: bool = False
) -> float:
    """Generated tokens per second over those of the base on one GPU, each with as many sequences as its memory holds, up to `most`.

    `with_prompt` counts the prefill too.  Times are expected ones without host work; the batch is vLLM's.
    """
    on, engine, rates = cluster(gpu), Vllm(), []
    for spec in (_model(model), _model(base)):
        held = float(engine.capacity(spec, Layout(), on, int(prompt + output)).whole_sequences)
        batch = min(most, held)
        seconds = output * estimate(spec, on, Layout(), Decode(prompt + output / 2, batch)).seconds.value
        if with_prompt:
            seconds += estimate(spec, on, Layout(), Prefill(prompt, batch)).seconds.value
        rates.append(batch * output / seconds)
    return rates[0] / rates[1]


# ---- positions


def position_free_share(*, model: Source) -> float:
    """Attention layers without positions over all."""
    kinds = reach.positions(_model(model))
    return sum(p.layers for p in kinds if isinstance(p.position, NoPosition)) / sum(p.layers for p in kinds)


def declared_tokens(*, model: Source) -> float:
    """The length a config declares."""
    return float(_model(model).reach.declared_tokens or 0)


def rope_base(*, model: Source) -> float:
    """The base of its rotary frequencies."""
    return _model(model).reach.encoding.theta


def bound_ratio(*, base: float, head_dim: int, near: float, far: float) -> float:
    """The bound on a score `far` away over that `near`: RoFormer's."""
    rotary = Rotary(head_dim, base)
    return float(rotary.decay_bound(far) / rotary.decay_bound(near))


def unfinished_pairs(*, base: float, head_dim: int, trained: int) -> float:
    """Rotary pairs that never completed a period in training."""
    return float(Rotary(head_dim, base).incomplete(trained))


def temperature(*, tokens: float) -> float:
    """By how much Llama 4 sharpens attention of its position-free layers."""
    return float(Temperature().factor(tokens))


def largest_window() -> float:
    """The largest window of the table."""
    return float(max(w.tokens for w in figures.context_windows()))


def used_in_part() -> float:
    """Of the windows with a published RULER, the share not shown to be used whole."""
    measured = [w for w in figures.context_windows() if w.effective_tokens is not None]
    short = [w for w in measured if not w.effective_at_least and w.effective_tokens is not None and w.effective_tokens < w.tokens]
    return len(short) / len(measured)


# ---- training


def token_cost_ratio(*, model: Source, short: float, long: float) -> float:
    """FLOPs to train on a token in a sequence of `long` tokens over those in one of `short`."""
    spec = _model(model)
    return float(training.token_flops(spec, long) / training.token_flops(spec, short))


def training_flops(*, model: Source, tokens: float, length: float) -> float:
    """FLOPs to train on `tokens` in sequences of `length`."""
    return float(tokens * training.token_flops(_model(model), length))


def stage_share(*, model: Source, tokens: float, length: float, base_tokens: float, base_length: float) -> float:
    """FLOPs of a stage over those of all the training before it."""
    return training_flops(model=model, tokens=tokens, length=length) / training_flops(model=model, tokens=base_tokens, length=base_length)


def stages_share(*, model: Source, stages: list[list[float]], base_tokens: float, base_length: float) -> float:
    """FLOPs of stages of (steps, sequences, length) over those of the training before them."""
    spec = _model(model)
    return sum(float(training.Stage(*s).flops(spec)) for s in stages) / training_flops(model=model, tokens=base_tokens, length=base_length)


def stage_tokens(*, steps: float, sequences: float, length: float) -> float:
    """Tokens of a stage."""
    return float(training.Stage(steps, sequences, length).tokens)


def state_bytes(*, parameters: float, optimizer: str, ranks: int = 1) -> float:
    """Weights, gradients and optimizer of one of `ranks` that share them."""
    kept = {"adam": ADAM_BYTES, "muon": MUON_BYTES}[optimizer]
    return float(ShardedData(3, ranks, optimizer_bytes=kept).footprint(parameters).total)


def orthogonalising_share(*, rows: int, columns: int, iterations: int, step_tokens: float) -> float:
    """Muon's own products over those of a step with the matrix it updates, 6 m n per token."""
    return float(training.newton_schulz_flops(rows=rows, columns=columns, iterations=iterations)) / (6 * rows * columns * step_tokens)


# ---- many GPUs


def rank_tokens(*, tokens: float, ranks: int, order: str) -> float:
    """Tokens of one rank of a context-parallel group."""
    return float(sum(float(piece.new_tokens) for piece in pieces(order, Segment(1.0, tokens, 0.0), ranks, 0)))


def block_to_hide(*, gpu: str, kind: str, rate: float | None = None) -> float:
    """Tokens of a block from which attention hides the next block's transfer, as many key-value heads as heads, 16 bits."""
    part = accelerator(gpu)
    link = next(link for link in part.links if link.kind == kind)
    return float(block_tokens_to_hide(
        flops_per_s=part.datasheet_flops_per_s("bf16"), bytes_per_s=rate or link.bytes_per_s, kv_heads=1, heads=1, element_bytes=2,
    ))  # fmt: skip


def block_over_needed(*, gpu: str, kind: str, tokens: float, ranks: int, rate: float | None = None) -> float:
    """A rank's block over the block that hides the transfer."""
    return rank_tokens(tokens=tokens, ranks=ranks, order="contiguous") / block_to_hide(gpu=gpu, kind=kind, rate=rate)


def rank_cache_ratio(*, model: Source, few: list[float], many: list[float]) -> float:
    """Cache of one rank of (tokens, ranks) `many` over that of `few`."""
    held = [float(System(_model(model), Layout(cp=int(n))).resident(sequences=1.0, context=tokens).cache) for tokens, n in (few, many)]
    return held[1] / held[0]


#: By the name a claim gives.
FUNCTIONS: Mapping[str, Callable[..., float]] = {
    function.__name__: function for function in (
        pairs_growth, prompt_growth, exponent, cache_bytes, rows_bytes, weight_bytes, largest_accelerators, cache_growth,
        sink_bytes, head_type, own_twin, cache_reduction, cache_ratio, compression, operations_ratio, reserved, paged, unfused_traffic,
        blocked_traffic, traffic_ratio, utilisation, charted, strided_share, selected_ratio, attention_share, chunked_share, throughput_ratio,
        position_free_share, declared_tokens, rope_base, bound_ratio, unfinished_pairs, temperature, largest_window, used_in_part,
        token_cost_ratio, training_flops, stage_share, stages_share, stage_tokens, state_bytes, orthogonalising_share, rank_tokens,
        block_to_hide, block_over_needed, rank_cache_ratio,
    )
}  # fmt: skip
