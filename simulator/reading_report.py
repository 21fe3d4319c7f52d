"""An encoder's answer as tables for people and as one document for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulator.estimate import Interval
from simulator.reading import Choice, Reading, intervals
from simulator.report import _head, _layout_document, _print_inputs, _table, show, span
from simulator.units import SECONDS, gib, show_tokens

if TYPE_CHECKING:
    from rich.console import Console

_UNSERVED = "no command: vLLM has no class for this encoder"


def verdict(found: Reading) -> str:
    """The first line: what one came for."""
    machine, best = found.cluster, found.best
    gpus, asked = f"{machine.gpus} x {machine.gpu.title}", show_tokens(found.request.context)
    if found.fits:
        together = best.texts * int(best.layout.dp)
        return f"FITS  {best.layout} on {gpus}: texts of {asked}, {together:,} read together; an encoder caches nothing and writes nothing"
    if best.fits:
        return f"DOES NOT FIT  a text of {asked}: the model has positions for {found.longest:,} tokens"
    cluster = f"smallest cluster that works = {found.smallest_gpus} GPUs" if found.smallest_gpus else "no node works"
    return f"DOES NOT FIT  a text of {asked} on {gpus}: weights and activations short by {gib(best.short_bytes)} per GPU ({best.layout}); {cluster}"


def _memory(found: Reading) -> dict[str, float]:
    held = found.best.held
    parts = {"weights": float(held.weights), "cache": 0.0, "activations": float(held.activations), "workspace": 0.0, "engine": 0.0}
    return {**parts, "total": sum(parts.values()), "usable": found.usable_bytes}


def document(found: Reading, inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of `size`, null where an encoder has no such thing; beside them `forward_s`, `step_s`, texts and their rate and price."""

    def doc(interval: Interval | None) -> dict[str, Any] | None:
        return None if interval is None else interval.document()

    served = found.served
    constraint = None if found.fits else "positions" if found.best.fits else "weights"
    return {
        **_head(inputs, found.warnings), "fits": found.fits, "verdict": verdict(found), "binding_constraint": constraint,
        "layout": _layout_document(found.best.layout), "memory_bytes_per_gpu": _memory(found),
        "cache": {"bytes_per_token": 0.0, "fixed_bytes": 0.0, "bytes_per_sequence": 0.0, "engines": {}},
        "max_context_tokens": found.longest, "max_context_layout": str(found.best.layout), "max_concurrency": None, "whole_sequences": None,
        "smallest_gpus": found.smallest_gpus, "ttft_s": None, "ttft_cached_s": None, "tpot_s": None, "tokens_per_s_per_gpu": None,
        "forward_s": doc(served.alone.seconds if served else None), "step_s": doc(served.step.seconds if served else None),
        "texts_per_step": found.best.texts * int(found.best.layout.dp), "texts_per_s_per_gpu": doc(served.texts_per_s_per_gpu if served else None),
        "input_tokens_per_s_per_gpu": doc(served.tokens_per_s_per_gpu if served else None),
        "cost_usd_per_million_tokens": {"input": doc(served.usd_per_million_tokens if served else None), "cached": None, "output": None},
        "cost_usd_per_million_texts": doc(served.usd_per_million_texts if served else None), "cost_usd_per_request": None, "energy_j_per_token": None,
        "energy_j_per_input_token": doc(served.joules_per_token if served else None), "alternatives": [_choice(choice) for choice in found.choices],
        "tie": False, "refused_layouts": {}, "launch": {"vllm": None, "notes": [_UNSERVED]}, "calibration": found.calibration.description,
    }  # fmt: skip


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "layout": str(choice.layout), "fits": choice.fits, "short_bytes_per_gpu": max(choice.short_bytes, 0.0), "texts_per_copy": choice.texts,
        "step_s": choice.step_s, "mean_s": choice.mean_s,
    }


def print_reading(found: Reading, inputs: dict[str, Any], console: Console) -> None:
    """The whole answer, verdict first."""
    from rich.text import Text  # noqa: PLC0415

    console.print(Text(verdict(found), style="bold green" if found.fits else "bold red"), soft_wrap=True)
    for warning in found.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    console.print()
    memory, usable = _memory(found), found.usable_bytes
    told = {
        "weights": f"{inputs['weights']} checkpoint", "activations": f"{found.best.texts:,} x {found.request.context:,} tokens together on a copy",
        "usable": f"{inputs['memory_fraction']:g} of the {gib(float(found.cluster.gpu.usable_bytes), 4)} the driver offers",
    }  # fmt: skip
    rows = [[name, gib(size), f"{size / usable:.1%}", told.get(name, "")] for name, size in memory.items() if size]
    _table(console, "Memory per GPU", ["part", "size", "of usable", "what it is"], rows)
    served = found.served
    if served is not None:
        binds = {"one text alone": served.alone.binding()}
        binds |= {name: served.step.binding() for name, _, _ in intervals(found) if name.endswith("together")}
        _table(
            console, "Speed and price", ["", "value", "80 % interval", "basis", "what binds"],
            [[name, show(v, unit), span(v, "" if unit == "J" else unit), v.basis, binds.get(name, "")] for name, v, unit in intervals(found)],
        )  # fmt: skip
        console.print(
            f"  of the kernels alone: no host work, no tokenizer; the least time of one text is {SECONDS.show(served.alone.lower, 2)}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if inputs["price_usd_per_gpu_hour"] is not None:
            console.print(f"  at ${inputs['price_usd_per_gpu_hour']:.2f} per GPU-hour ({inputs['price_source']})", highlight=False, soft_wrap=True)
        console.print(f"  calibration: {found.calibration.description}", highlight=False, soft_wrap=True)
        console.print()
    rows = [
        [str(c.layout), f"{c.texts:,}" if c.fits else "", SECONDS.show(c.step_s, 2) if c.step_s else "", SECONDS.show(c.mean_s, 2) if c.mean_s else "",
         "chosen" if c is found.best else "" if c.fits else f"short by {gib(c.short_bytes)} per GPU"]
        for c in found.choices[:5]
    ]  # fmt: skip
    _table(console, "Layouts", ["layout", "texts per copy", "step", "mean answer", "verdict"], rows)
    console.print(f"  longest text: {found.longest:,} tokens", highlight=False)
    console.print()
    console.print("[bold]Launch[/]")
    console.print(Text(f"  # {_UNSERVED}"), soft_wrap=True)
    console.print()
    _print_inputs(inputs, console)


__all__ = ["document", "print_reading", "verdict"]
