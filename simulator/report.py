"""Answers as tables for people and as one document for programs.  No arithmetic on quantities beyond their sums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simulator import train_step
from simulator.calibration import Calibration
from simulator.compare_cp import Contender
from simulator.engines.vllm import Capacity, Vllm
from simulator.estimate import Estimate, Interval, binding_resource
from simulator.footprint import Footprint
from simulator.hardware import Cluster
from simulator.kernels.attention import Chunked, DualChunk, Sinks, Window
from simulator.layers import (
    Attention,
    CompressedAttention,
    GatedDeltaNet,
    IndexedLatentAttention,
    KimiDeltaAttention,
    LatentAttention,
    LightningAttention,
    Mamba,
    Mamba2,
    ParallelMixers,
)  # fmt: skip
from simulator.layers.layer import Keep, Mixer
from simulator.model import ModelSpec
from simulator.phases import TrainStep
from simulator.planner import UNLIMITED_TOKENS, Candidate, Plan, reason
from simulator.timing import Clock, seconds_bound, seconds_expected, seconds_no_overlap
from simulator.units import BYTES, FLOPS, SECONDS, gib, show_tokens, significant
from simulator.work import Leaf, Op

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = "1"


def emit(document: dict[str, Any]) -> str:
    """One JSON document; infinities become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return None if value != value or value in (float("inf"), float("-inf")) else value  # noqa: PLR0124
    return value


def _head(inputs: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    from simulator import __version__  # noqa: PLC0415

    return {"schema_version": SCHEMA_VERSION, "tool_version": __version__, "inputs": inputs, "warnings": list(warnings)}


def digits(interval: Interval) -> int:
    """As many significant digits as the interval allows: two when it is wider than 10 %, else three."""
    if interval.value <= 0:
        return 2
    return 2 if interval.high / interval.value > 1.1 else 3  # noqa: PLR2004


def show(interval: Interval, unit: str = "s") -> str:
    """A value at the precision its interval allows."""
    n = digits(interval)
    if unit == "s":
        return SECONDS.show(interval.value, n)
    if unit == "$":
        return _dollars(interval.value, n)
    return f"{significant(interval.value, n)} {unit}".strip()


def span(interval: Interval, unit: str = "s") -> str:
    """The 80 % interval, both ends in the value's unit."""
    n = digits(interval)
    if unit == "s":
        return f"{SECONDS.show(interval.low, n)} to {SECONDS.show(interval.high, n)}"
    if unit == "$":
        low, high = _dollars(interval.low, n), _dollars(interval.high, n)
        return low if low == high else f"{low} to {high}"
    return f"{significant(interval.low, n)} to {significant(interval.high, n)}"


def _dollars(value: float, n: int) -> str:
    """Dollars; nobody is billed a thousandth of a cent."""
    return f"${significant(value, n)}" if value >= 0.001 or value == 0 else "below $0.001"  # noqa: PLR2004


def _requests(plan: Plan) -> str:
    count = plan.request.concurrency
    return f"{count} request{'s' if count > 1 else ''}"


def _length(tokens: int) -> str:
    """A longest context in words."""
    return "any length (every layer's cache is bounded)" if tokens >= UNLIMITED_TOKENS else f"{tokens:,} tokens"


# ---- size


def verdict(plan: Plan) -> str:
    """The first line: what one came for."""
    machine, request = plan.cluster, plan.request
    gpus = f"{machine.gpus} x {machine.gpu.title}"
    asked = f"{request.concurrency} x {show_tokens(request.context)}"
    if plan.fits:
        spare = -plan.best.short_bytes
        holds = int(plan.best.capacity.whole_sequences)
        return f"FITS  {plan.best.layout} on {gpus}: {asked}, {gib(spare)} of cache free per GPU (holds {holds:,})"
    short = gib(plan.best.short_bytes)
    what = "weights and activations" if plan.binding_constraint == "weights" else "KV cache"
    longest = f"longest context that fits = {_length(plan.longest.longest)}" if plan.longest.longest else "no context fits"
    cluster = f"smallest cluster that works = {plan.smallest_gpus} GPUs" if plan.smallest_gpus else "no cluster up to 1,024 GPUs works"
    return f"DOES NOT FIT  {asked} on {gpus}: {what} short by {short} per GPU ({plan.best.layout}); {longest}; {cluster}"


def _memory(capacity: Capacity, cache_bytes: float) -> dict[str, float]:
    held: Footprint = capacity.footprint
    parts = {
        "weights": held.weights, "cache": cache_bytes, "activations": held.activations, "workspace": held.workspace,
        "engine": held.engine,
    }  # fmt: skip
    numbers = {name: float(value) for name, value in parts.items()}
    return {**numbers, "total": sum(numbers.values()), "usable": float(capacity.usable_bytes)}


def _needed(plan: Plan) -> float:
    """Cache bytes per GPU that the asked requests take as vLLM allocates them."""
    capacity = plan.best.capacity
    each = -(-plan.request.concurrency // int(capacity.replicas))
    return float(each * capacity.per_sequence_bytes)


def size_document(plan: Plan, inputs: dict[str, Any], engines: dict[str, Any]) -> dict[str, Any]:
    """The keys of `size`; times and prices are null where nothing fits; `engines` as every engine answers for the chosen layout."""
    model, capacity, service = plan.model, plan.best.capacity, plan.service
    context = float(plan.request.context)
    slope = float(model.cache_slope(context))
    total = float(model.cache_bytes(context))
    command, notes = launch(plan)

    def doc(interval: Interval | None) -> dict[str, Any] | None:
        return None if interval is None else interval.document()

    return {
        **_head(inputs, plan.warnings),
        "fits": plan.fits,
        "verdict": verdict(plan),
        "binding_constraint": plan.binding_constraint,
        "layout": _layout_document(plan.best.layout),
        "memory_bytes_per_gpu": _memory(capacity, _needed(plan)),
        "cache": {
            "bytes_per_token": slope, "fixed_bytes": total - slope * context, "bytes_per_sequence": total,
            "engines": engines,
        },
        "max_context_tokens": plan.longest.longest,
        "max_context_layout": str(plan.longest.layout),
        "max_concurrency": float(capacity.concurrency * capacity.replicas),
        "whole_sequences": int(capacity.whole_sequences),
        "smallest_gpus": plan.smallest_gpus,
        "ttft_s": doc(service.cold.seconds if service else None),
        "ttft_cached_s": doc(service.hit.seconds if service else None),
        "tpot_s": doc(service.decode.seconds if service else None),
        "tokens_per_s_per_gpu": doc(service.output_tokens_per_s_per_gpu if service else None),
        "input_tokens_per_s_per_gpu": doc(service.input_tokens_per_s_per_gpu if service else None),
        "cost_usd_per_million_tokens": {
            "input": doc(service.usd_per_million_input if service else None),
            "cached": doc(service.usd_per_million_cached if service else None),
            "output": doc(service.usd_per_million_output if service else None),
        },
        "cost_usd_per_request": doc(service.usd_per_request if service else None),
        "energy_j_per_token": doc(service.joules_per_output_token if service else None),
        "energy_j_per_input_token": doc(service.joules_per_input_token if service else None),
        "alternatives": [_candidate_document(plan, c) for c in plan.candidates],
        "tie": plan.tie,
        "refused_layouts": plan.refused,
        "prefill_context": plan.prefill_context,
        "cache_moves": plan.moves.document() if plan.moves else None,
        "launch": {"vllm": command, "notes": notes},
        "calibration": (plan.service.cold.calibration if plan.service else Calibration.load(plan.cluster.gpu)).description,
    }  # fmt: skip


def _layout_document(layout: Any) -> dict[str, Any]:
    names = {
        "tensor_parallel_size": "tp", "prefill_context_parallel_size": "cp", "pipeline_parallel_size": "pp", "data_parallel_size": "dp",
        "expert_parallel_size": "ep", "decode_context_parallel_size": "dcp", "attention_data_parallel_size": "dp_attention",
    }  # fmt: skip
    return {"name": str(layout), **{long: int(getattr(layout, short)) for long, short in names.items()}}


def _candidate_document(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    speed = candidate.speed
    return {
        "layout": str(candidate.layout), "fits": candidate.fits, "short_bytes_per_gpu": max(candidate.short_bytes, 0.0),
        "reason": None if candidate.fits else reason(candidate, plan.model, plan.cluster, plan.request),
        "max_context_tokens": candidate.longest, "whole_sequences": int(candidate.capacity.whole_sequences),
        "max_concurrency": float(candidate.capacity.concurrency * candidate.capacity.replicas),
        "ttft_s": None if speed is None else float(speed.ttft_s), "tpot_s": None if speed is None else float(speed.tpot_s),
        "request_s": None if speed is None else float(speed.latency_s),
    }  # fmt: skip


def launch(plan: Plan) -> tuple[str | None, list[str]]:
    """The command that starts the chosen layout; none where it would not start."""
    if not plan.fits:
        return None, ["no command: this request does not fit, and vLLM would refuse to start"]
    return plan.engine.command(
        plan.model, plan.best.layout, plan.cluster, context=plan.request.context, concurrency=plan.request.concurrency
    )


def print_size(plan: Plan, inputs: dict[str, Any], console: Console) -> None:
    """The whole answer, verdict first."""
    from rich.text import Text  # noqa: PLC0415

    style = "bold green" if plan.fits else "bold red"
    console.print(Text(verdict(plan), style=style), soft_wrap=True)
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    console.print()
    _print_memory(plan, console)
    _print_cache(plan, console)
    if plan.service:
        _print_service(plan, inputs, console)
    _print_choice(plan, console)
    command, notes = launch(plan)
    console.print("[bold]Launch[/]")
    if command:
        console.print(Text(command), soft_wrap=True)
    for note in notes:
        console.print(Text(f"  # {note}"), soft_wrap=True)
    console.print()
    _print_inputs(inputs, console)


def _table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column in _LEFT else "right", style="default", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()


_LEFT = {
    "basis", "what binds", "what it is", "formula", "layout", "verdict", "log", "kernel", "implementation", "bound by", "2020", "now", "here", "why",
}  # fmt: skip


def _print_memory(plan: Plan, console: Console) -> None:
    capacity = plan.best.capacity
    memory = _memory(capacity, _needed(plan))
    gpu = plan.cluster.gpu
    explained = {
        "weights": f"{plan.model.quantization if plan.model.quantization != 'none' else plan.model.embedding.weight.name} checkpoint"
        + (f", fullest GPU of {plan.best.layout}" if plan.best.layout.gpus > 1 else ""),
        "cache": f"{_requests(plan)} of {plan.request.context:,} tokens in {plan.model.cache.name}, as vLLM allocates it",
        "activations": f"profile run of {plan.engine.step_tokens(gpu):,} tokens",
        "workspace": "expansion of latents during prefill" if memory["workspace"] else "",
        "engine": "allocator, CUDA graphs (assumed)",
        "total": "",
        "usable": f"{plan.engine.fraction:g} of the {gib(float(gpu.usable_bytes), 4)} the driver offers",
    }
    rows = [[name, gib(value), f"{value / memory['usable']:.0%}", explained[name]] for name, value in memory.items() if value or name == "cache"]
    _table(console, "Memory per GPU", ["part", "size", "of usable", "what it is"], rows)


def _print_cache(plan: Plan, console: Console) -> None:
    model, context = plan.model, float(plan.request.context)
    slope, total = float(model.cache_slope(context)), float(model.cache_bytes(context))
    capacity = plan.best.capacity
    ranks = float(plan.best.layout.replica_gpus)
    allocated = float(capacity.per_sequence_bytes) * ranks
    fixed = total - slope * context
    rows = [
        ["architecture", f"{slope:,.0f} B", BYTES.show(fixed) if fixed else "0", gib(total)],
        [f"vLLM {plan.engine.version} ({plan.best.layout})", f"{allocated / context:,.0f} B", "", gib(allocated)],
    ]
    from simulator import tables  # noqa: PLC0415 (it builds on this module)

    others = tables.engines(model, plan.best.layout, plan.cluster, plan.request.context)
    rows += [
        [f"{held['title']} {held['version']}", f"{held['bytes_per_sequence'] / context:,.0f} B", "", gib(held["bytes_per_sequence"])]
        for name, held in others.items() if name != "vllm" and "refused" not in held
    ]  # fmt: skip
    _table(console, "Cache of one sequence", ["counted", "per token", "fixed", "at the asked context"], rows)
    if allocated > 1.02 * total > 0:
        console.print(f"  vLLM holds {allocated / total:.2f} x the architecture's bytes: copies of the cache over ranks, whole blocks, tokens in flight")
    for line in capacity.log_lines:
        console.print(f"  {line}" + (f"   (each of {int(capacity.replicas)} engines)" if capacity.replicas > 1 else ""), highlight=False)
    console.print(f"  longest context for {plan.request.concurrency} at once: {_length(plan.longest.longest)} ({plan.longest.layout})", highlight=False)
    console.print()


def _print_service(plan: Plan, inputs: dict[str, Any], console: Console) -> None:
    service, request = plan.service, plan.request
    assert service is not None
    hit, at = f"TTFT, {service.cached_tokens:,} tokens cached", f"TPOT, {request.concurrency} at {request.context:,}"
    times = [("TTFT, cold prompt", service.cold), (hit, service.hit), (at, service.decode)]
    rows = [[name, show(e.seconds), span(e.seconds), e.seconds.basis, e.binding()] for name, e in times]
    rates = [("input tokens/s/GPU", service.input_tokens_per_s_per_gpu), ("output tokens/s/GPU", service.output_tokens_per_s_per_gpu)]
    rows += [[name, show(rate, ""), span(rate, ""), rate.basis, ""] for name, rate in rates]
    named = [
        ("$ per request", service.usd_per_request), ("$ per million input tokens", service.usd_per_million_input),
        ("$ per million cached tokens", service.usd_per_million_cached),
        ("$ per million output tokens", service.usd_per_million_output),
    ]  # fmt: skip
    rows += [[name, show(value, "$"), span(value, "$"), value.basis, ""] for name, value in named if value is not None]
    energy = service.joules_per_output_token
    if energy is not None:
        rows.append(["J per output token (all GPUs at TDP)", show(energy, "J"), span(energy, ""), energy.basis, ""])
    _table(console, "Speed and price", ["", "value", "80 % interval", "basis", "what binds"], rows)
    console.print(
        f"  prices assume {_requests(plan)} at a time, {request.output:,} output tokens each, no idle GPUs; "
        f"no time is below its bound: cold prefill {SECONDS.show(service.cold.lower, 2)}, decode step {SECONDS.show(service.decode.lower, 2)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for line in plan.moves.lines() if plan.moves else ():
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    if inputs["price_usd_per_gpu_hour"] is not None:
        console.print(f"  at ${inputs['price_usd_per_gpu_hour']:.2f} per GPU-hour ({inputs['price_source']})", highlight=False, soft_wrap=True)
    console.print(f"  calibration: {service.cold.calibration.description}", highlight=False, soft_wrap=True)
    console.print()


def _print_choice(plan: Plan, console: Console) -> None:
    rows = []
    for candidate in plan.candidates[:5]:
        speed = candidate.speed
        told = "chosen" if candidate is plan.best or candidate.layout is plan.best.layout else ""
        if not candidate.fits:
            told = reason(candidate, plan.model, plan.cluster, plan.request)
        rows.append([
            str(candidate.layout), f"{float(candidate.capacity.concurrency * candidate.capacity.replicas):.1f}",
            SECONDS.show(float(speed.ttft_s), 2) if speed else "", SECONDS.show(float(speed.tpot_s), 2) if speed else "",
            SECONDS.show(float(speed.latency_s), 2) if speed else "", told,
        ])  # fmt: skip
    _table(console, "Layouts", ["layout", "max concurrency", "TTFT", "TPOT", "mean request", "verdict"], rows)
    if plan.runner_up and plan.best.speed and plan.runner_up.speed:
        gap = float(plan.runner_up.speed.latency_s) / float(plan.best.speed.latency_s) - 1
        if plan.tie:
            console.print(
                f"  {plan.runner_up.layout} is a tie: {abs(gap):.0%} apart, inside the interval; fewer kinds of parallelism are preferred",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        else:
            console.print(f"  {plan.runner_up.layout} lost: {gap:.0%} more time for the mean request", highlight=False, soft_wrap=True)
    if plan.prefill_context:
        console.print(f"  {plan.prefill_context}", highlight=False, soft_wrap=True)
    if plan.fits:
        _print_lost(plan, console)
    if plan.refused:
        console.print("  left out by a rule: " + ", ".join(f"{n} by {rule}" for rule, n in plan.refused.items()), highlight=False)
    if plan.refused or len(plan.candidates) > 1:
        console.print()


def _print_lost(plan: Plan, console: Console) -> None:
    """The layouts that do not hold the request: how many, and the plainest of them with their reasons."""
    lost = [c for c in plan.candidates if not c.fits]
    if not lost:
        return
    console.print(f"  {len(lost)} of {len(plan.candidates)} layouts do not hold the request, among them:", highlight=False)
    for candidate in sorted(lost, key=lambda c: (len(str(c.layout).split()), c.short_bytes))[:3]:
        console.print(f"    {candidate.layout}: {reason(candidate, plan.model, plan.cluster, plan.request)}", highlight=False, soft_wrap=True)


def _print_inputs(inputs: dict[str, Any], console: Console) -> None:
    told = ", ".join(f"{name} {value}" for name, value in inputs.items() if value is not None)
    console.print(f"Inputs and defaults: {told}", style="dim", highlight=False, soft_wrap=True)


# ---- kv


def _mixer_name(layer: Mixer) -> str:
    if isinstance(layer, IndexedLatentAttention):
        chosen = "a shared selection" if layer.indexer_shared else f"an indexer's top {layer.index_topk:,}"
        return f"MLA, latent {layer.kv_lora_rank} + {layer.qk_rope_head_dim}, {chosen}"
    if isinstance(layer, LatentAttention):
        return f"MLA, latent {layer.kv_lora_rank} + {layer.qk_rope_head_dim}"
    if isinstance(layer, ParallelMixers):
        return " beside ".join(_mixer_name(branch) for branch in layer.branches)
    if not isinstance(layer, Attention):
        return _named(layer)
    heads = layer.num_key_value_heads
    kind = "MHA" if heads == layer.num_attention_heads else "MQA" if heads == 1 else "GQA"
    if isinstance(layer.mask, Window):
        kind += f", window {layer.mask.width:,}"
    elif isinstance(layer.mask, Chunked):
        kind += f", chunks of {layer.mask.width:,}"
    elif isinstance(layer.mask, DualChunk):
        kind += f", dual chunks of {layer.mask.chunk_size:,}"
    elif isinstance(layer.mask, Sinks):
        kind += f", {layer.mask.sinks} sinks + window {layer.mask.width:,}"
    rotates = "" if layer.rotary_dim else ", NoPE"
    return f"{kind}, {heads} x {layer.head_dim}{rotates}"


def _named(layer: Mixer) -> str:
    """Mixers that keep no rows of keys and values, or compressed ones."""
    if isinstance(layer, CompressedAttention):
        if not layer.compress_ratio:
            return f"MQA 1 x {layer.head_dim}, window {layer.sliding_window:,}"
        return f"{'CSA' if layer.selects else 'HCA'} 1/{layer.compress_ratio}, 1 x {layer.head_dim}, window {layer.sliding_window:,}"
    if isinstance(layer, GatedDeltaNet):
        return f"gated DeltaNet, {layer.linear_num_value_heads} x {layer.linear_key_head_dim} x {layer.linear_value_head_dim}"
    if isinstance(layer, KimiDeltaAttention):
        return f"KDA, {layer.num_heads} x {layer.head_dim} x {layer.head_dim}"
    if isinstance(layer, LightningAttention):
        return f"lightning attention, {layer.num_attention_heads} x {layer.head_dim} x {layer.head_dim}"
    if isinstance(layer, Mamba):
        return f"Mamba-1, {layer.intermediate_size:,} x {layer.state_size}"
    if isinstance(layer, Mamba2):
        return f"Mamba-2, {layer.mamba_num_heads} x {layer.mamba_head_dim} x {layer.ssm_state_size}"
    return type(layer).__name__


#: What is kept, in words.
_KEEPS = {
    Keep.ROWS: "tokens", Keep.ENTRIES: "entries", Keep.INDEX: "index keys", Keep.TAIL: "uncompressed tail", Keep.SSM: "state", Keep.LINEAR: "state",
    Keep.CONV: "convolution inputs",
}  # fmt: skip


def kv_document(
    model: ModelSpec, context: int, engines: dict[str, Any], inputs: dict[str, Any], warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """The keys of `kv`; `engines` as every engine answers."""
    slope, total = float(model.cache_slope(float(context))), float(model.cache_bytes(float(context)))
    return {
        **_head(inputs, [*model.warnings, *warnings]), "bytes_per_token": slope, "fixed_bytes": total - slope * context,
        "bytes_per_sequence": total, "layers": cache_layers(model, float(context)), "engines": engines,
    }  # fmt: skip


def cache_layers(model: ModelSpec, context: float) -> list[dict[str, Any]]:
    """What each kind of layer keeps of one sequence."""
    layers = []
    for count, layer, item in model.rows():
        stored, held = float(item.rows(context)), float(item.bytes(context, model.cache))
        layers.append({
            "count": count, "kind": _mixer_name(layer), "keeps": _KEEPS[item.keep], "row_bytes": held / stored if stored else 0.0,
            "stored_tokens": stored, "bytes_per_sequence": count * held,
        })  # fmt: skip
    return layers


def print_kv(document: dict[str, Any], model: ModelSpec, context: int, console: Console) -> None:
    """Cache by kind of layer, then what the engine makes of it."""
    fixed = document["fixed_bytes"]
    console.print(
        f"[bold]{model.name}[/]: {document['bytes_per_token']:,.0f} B per token"
        + (f" + {BYTES.show(fixed)} fixed" if fixed else "")
        + f" = {gib(document['bytes_per_sequence'])} at {show_tokens(context)} ({model.cache.name})",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for warning in document["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    console.print()
    rows = [
        [str(entry["count"]), entry["kind"], entry["keeps"], f"{entry['row_bytes']:,.0f} B", f"{entry['stored_tokens']:,.0f}", gib(entry["bytes_per_sequence"])]
        for entry in document["layers"]
    ]
    if rows:
        _table(console, "By kind of layer", ["layers", "kernel", "keeps", "row", "rows kept", "per sequence"], rows)


# ---- estimate and kernel


def _seconds(estimate: Estimate) -> dict[str, Any]:
    return {"lower": estimate.lower, **estimate.seconds.document(), "upper": estimate.upper}


def estimate_document(estimate: Estimate, inputs: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """The keys of `estimate`."""
    clock = Clock(estimate.cluster, estimate.calibration)
    held = estimate.footprint
    trains = isinstance(estimate.phase, TrainStep)
    return {
        **_head(inputs, warnings), **({"training": training(estimate)} if trains else {}), "seconds": _seconds(estimate),
        "flops": estimate.flops, "model_flops": estimate.model_flops,
        "hbm_bytes": estimate.hbm_bytes, "wire_bytes": estimate.wire_bytes,
        "memory_bytes_per_gpu": {
            "weights": float(held.weights), "cache": float(held.cache), "activations": float(held.activations), "total": float(held.total),
            **({"gradients": float(held.gradients), "optimizer": float(held.optimizer)} if trains else {}),
        },
        "rows": [
            {
                "name": row.op.name, "kernel": row.op.kernel, "impl": row.op.impl, "dtype": row.op.math, "count": row.count,
                "seconds": float(row.seconds), "lower": float(clock.bound(row.op)) * row.count, "flops": float(row.op.flops) * row.count,
                "model_flops": float(row.op.model_flops) * row.count, "hbm_bytes": float(row.op.hbm_bytes) * row.count,
                "wire_bytes": float(row.op.wire_bytes) * row.count, "bound_by": binding_resource(clock, row.op),
                "basis": estimate.calibration.constants(row.op.family).basis,
            }
            for row in estimate.rows
        ],
        "calibration": estimate.calibration.description,
    }  # fmt: skip


def training(estimate: Estimate) -> dict[str, Any]:
    """Rates of a training step: tokens, and useful FLOPs against the tensor peak of bf16 (MFU: nothing is counted twice, causal pairs
    once).
    """
    phase, gpus = estimate.phase, float(estimate.layout.gpus)
    assert isinstance(phase, TrainStep)
    step_tokens = float(phase.batch * phase.context)
    useful = estimate.model_flops / float(estimate.cluster.gpu.peak_flops_per_s("bf16"))
    return {
        "tokens": step_tokens, "microbatches": float(train_step.schedule(estimate.layout, phase).microbatches),
        "tokens_per_s_per_gpu": estimate.seconds.inverse(step_tokens / gpus).document(), "mfu": estimate.seconds.inverse(useful).document(),
    }  # fmt: skip


def by_op(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `estimate` for people, longest first: an op's unequal chunks, the ragged last one too, are one row."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("name", "kernel", "impl", "dtype", "bound_by", "basis"))
        held = found.setdefault(key, {**row, **dict.fromkeys(_ADDED, 0.0)})
        held |= {name: held[name] + row[name] for name in _ADDED}
    return sorted(found.values(), key=lambda row: -row["seconds"])


_ADDED = ("count", "seconds", "lower", "flops", "model_flops", "hbm_bytes", "wire_bytes")


def print_estimate(document: dict[str, Any], estimate: Estimate, console: Console) -> None:
    """Total, then op by op."""
    seconds = estimate.seconds
    console.print(
        f"[bold]{show(seconds)}[/] (80 %: {span(seconds)}; {seconds.basis}); bound {SECONDS.show(estimate.lower, 3)}, "
        f"nothing overlapped {SECONDS.show(estimate.upper, 3)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(
        f"per GPU: {FLOPS.show(estimate.flops)} executed ({FLOPS.show(estimate.model_flops)} useful), {BYTES.show(estimate.hbm_bytes)} of HBM traffic, "
        f"{BYTES.show(estimate.wire_bytes)} sent; holds {gib(float(estimate.footprint.total))}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if isinstance(estimate.phase, TrainStep):
        rates, held = document["training"], estimate.footprint
        parts = ", ".join(f"{name} {gib(float(getattr(held, name)))}" for name in ("weights", "gradients", "optimizer", "activations"))
        batches = f"{rates['microbatches']:,.0f} microbatch" + ("es" if rates["microbatches"] > 1 else "")
        console.print(
            f"a step of {rates['tokens']:,.0f} tokens in {batches}: {significant(rates['tokens_per_s_per_gpu']['value'], 2)} tokens/s/GPU, "
            f"MFU {rates['mfu']['value']:.0%}; per GPU {parts}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for warning in document["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    console.print()
    total = sum(row["seconds"] for row in document["rows"]) or 1.0
    rows = [
        [
            row["name"], f"{row['count']:,.0f}", SECONDS.show(row["seconds"], 2), f"{row['seconds'] / total:.1%}",
            f"{row['lower'] / row['seconds']:.0%}" if row["seconds"] else "", row["bound_by"], row["basis"],
        ]
        for row in by_op(document["rows"])
    ]  # fmt: skip
    _table(console, "Op by op", ["op", "times", "time", "share", "bound / time", "bound by", "basis"], rows)
    console.print(f"calibration: {document['calibration']}", style="dim", highlight=False)


def kernel_document(
    op: Leaf, machine: Cluster, calibration: Calibration, inputs: dict[str, Any], warnings: Sequence[str]
) -> dict[str, Any]:
    """The keys of `kernel`."""
    from simulator.estimate import interval  # noqa: PLC0415

    clock = Clock(machine, calibration)
    lower, value = float(seconds_bound(op, clock)), float(seconds_expected(op, clock))
    within = interval({op.family: value}, calibration, value, lower)
    found = {
        **_head(inputs, warnings), "flops": float(op.flops), "model_flops": float(op.model_flops), "hbm_bytes": float(op.hbm_bytes),
        "seconds": {"lower": lower, **within.document(), "upper": float(seconds_no_overlap(op, clock))},
        "bound_by": binding_resource(clock, op), "calibration": calibration.description, "source": calibration.constants(op.family).source,
    }  # fmt: skip
    if isinstance(op, Op):
        from simulator.launch import launch as launched  # noqa: PLC0415

        made = launched(op, machine.gpu)
        found["launched"] = {
            "tensor_flops": float(made.tensor_flops), "hbm_bytes": float(made.hbm_bytes), "tiles": float(made.tiles), "depth": float(made.depth),
        }  # fmt: skip
    return found


def print_kernel(document: dict[str, Any], console: Console) -> None:
    """One kernel in four lines."""
    seconds = document["seconds"]
    within = Interval(seconds["value"], seconds["low"], seconds["high"], seconds["basis"])
    console.print(
        f"[bold]{show(within)}[/] (80 %: {span(within)}; {within.basis}); bound {SECONDS.show(seconds['lower'], 3)}, by {document['bound_by']}",
        highlight=False,
    )
    if seconds["value"]:
        rate = document["model_flops"] / seconds["value"] / 1e12
        console.print(
            f"{FLOPS.show(document['flops'])} executed ({FLOPS.show(document['model_flops'])} useful, {significant(rate, 3)} TFLOP/s), "
            f"{BYTES.show(document['hbm_bytes'])} of HBM traffic at least",
            highlight=False,
        )
    for warning in document["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    rests = "; ".join(filter(None, (document["calibration"], document["source"])))
    console.print(f"calibration: {rests}", style="dim", highlight=False, soft_wrap=True)


__all__ = ["Vllm", "emit", "print_size", "size_document", "verdict"]


# ---- compare-cp


def compare_cp_document(found: Sequence[Contender], inputs: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """The keys of `compare-cp`."""
    return {**_head(inputs, warnings), "ways": [_way(contender) for contender in found]}


def _way(contender: Contender) -> dict[str, Any]:
    answer, layout = contender.estimate, contender.layout
    told: dict[str, Any] = {
        "name": contender.name, "layout": str(layout), "tp": int(layout.tp), "cp": int(layout.cp), "ulysses": int(layout.ulysses), "pp": int(layout.pp),
        "order": layout.order, "passing": layout.passing, "chunk": contender.chunk, "limit": contender.limit or None, "refused": contender.refused is not None,
    }  # fmt: skip
    if answer is None:
        return told | {"fits": False}
    held = answer.footprint
    memory = {"weights": float(held.weights), "cache": float(held.cache), "activations": float(held.activations), "total": float(held.total)}
    return told | {
        "fits": not contender.limit, "prefill_s": answer.seconds.document(), "lower_s": answer.lower, "exposed_s": contender.exposed_s,
        "wire_bytes": answer.wire_bytes, "memory_bytes_per_gpu": memory,
    }  # fmt: skip


def print_compare_cp(document: dict[str, Any], found: Sequence[Contender], console: Console) -> None:
    """One line for each way; what is refused says by which rule."""
    inputs = document["inputs"]
    console.print(
        f"[bold]{inputs['model']}[/] on {inputs['gpus']} x {inputs['gpu']}: prefill of {show_tokens(inputs['context'])}"
        + (f" after {show_tokens(inputs['prefix'])}" if inputs["prefix"] else ""), highlight=False, soft_wrap=True,
    )  # fmt: skip
    for warning in document["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    console.print()
    rows = []
    for way in found:
        if way.estimate is None:
            rows.append([way.name, str(way.layout), "", "", "", "", "refused"])
            continue
        answer = way.estimate
        rows.append([
            way.name, str(way.layout), show(answer.seconds), span(answer.seconds), SECONDS.show(max(way.exposed_s, 0.0), 2), BYTES.show(answer.wire_bytes),
            gib(float(answer.footprint.total)) + (" (too much)" if way.limit else ""),
        ])  # fmt: skip
    _table(console, "Ways to share the tokens", ["way", "layout", "prefill", "80 %", "exposed", "sent per GPU", "holds per GPU"], rows)
    for way in found:
        if way.refused is not None:
            console.print(f"{way.name}: {way.refused}", highlight=False, soft_wrap=True)
    console.print(
        "exposed: what the prefill would save if messages took no time.  A message hides beside a kernel only if its own kernel starts first:\n"
        "set CUDA_DEVICE_MAX_CONNECTIONS=1 (two H200 without it: rings' messages ran after the attention they were to run beside).\n"
        "No launch command: which of these an engine runs depends on its version and attention backend; `longctx size` prints only commands\n"
        "its engine starts.", highlight=False, soft_wrap=True,
    )  # fmt: skip
