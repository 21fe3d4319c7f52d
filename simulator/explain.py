"""Where time and memory go, op by op: each figure opened down to its formula, its numbers and the constants behind its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from simulator import formulas
from simulator.estimate import RESOURCE_NAMES, Estimate, Interval, binding_resource, found_in_l2, interval
from simulator.passes import Row
from simulator.phases import Mixed
from simulator.report import _head, _seconds, _table, cache_layers, show, span
from simulator.timing import Clock
from simulator.units import BYTES, FLOPS, SECONDS, gib, significant
from simulator.work import Op

if TYPE_CHECKING:
    from rich.console import Console

_FIGURES = ("tensor_flops", "hbm_bytes", "wire_bytes")
_PARTS = ("weights", "gradients", "optimizer", "activations", "cache", "workspace", "engine")
#: What a constant is called where it is shown, and the peak it is a share of.
_SHARES = {"tensor": "tensor", "special": "special", "memory": "hbm"}


def document(estimate: Estimate, inputs: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """The keys of `explain`.  Rows are sorted by time; `seconds` of a row is that of all its runs, `formulas` are of one.

    The rows add up to `seconds.upper`, where nothing overlaps; `overlapped_s` is what overlapping saves of it.
    """
    clock = Clock(estimate.cluster, estimate.calibration)
    rows = [_row(estimate, clock, row) for row in sorted(estimate.rows, key=lambda row: -float(row.seconds))]
    model, phase = estimate.model, estimate.phase
    assert not isinstance(phase, Mixed)
    context, sequences = float(phase.context), float(phase.batch)
    held = {part: float(getattr(estimate.footprint, part)) for part in _PARTS}
    return {
        **_head(inputs, warnings), "seconds": _seconds(estimate), "binding": estimate.binding(),
        "overlapped_s": sum(row["seconds"]["value"] for row in rows) - estimate.seconds.value, "rows": rows,
        "memory_bytes_per_gpu": {**held, "total": sum(held.values()), "usable": float(estimate.cluster.gpu.usable_bytes)},
        "cache": {
            "sequences": sequences, "bytes_per_sequence": float(model.cache_bytes(context)), "layers": cache_layers(model, context),
        },
        "calibration": estimate.calibration.description,
    }  # fmt: skip


def _row(estimate: Estimate, clock: Clock, row: Row) -> dict[str, Any]:
    op, seconds = row.op, float(row.seconds)
    lower = float(clock.bound(op)) * float(row.count)
    constants = estimate.calibration.constants(op.family)
    numbers = formulas.extents(op)
    return {
        "name": op.name, "kernel": op.kernel, "impl": op.impl, "dtype": op.math, "count": float(row.count),
        "seconds": interval({op.family: seconds}, estimate.calibration, seconds, lower).document(), "lower": lower,
        "share": seconds / estimate.seconds.value if estimate.seconds.value else 0.0, "bound_by": binding_resource(clock, op),
        "found_in_l2": found_in_l2(clock, op) if isinstance(op, Op) and op.kernel == "elementwise" else 0.0,
        "demand_s": {resource: float(taken) * float(row.count) for resource, taken in clock.demand(op).items()},
        "formulas": {
            name: {"text": text, "substituted": formulas.substituted(text, numbers), "value": float(getattr(op, name))}
            for name, text in formulas.texts(op).items()
        },
        "constants": {name: value for name, value in asdict(constants).items() if isinstance(value, (int, float)) and value},
        "basis": constants.basis, "source": constants.source or ("bare theory" if not constants.sigma else ""),
    }  # fmt: skip


_UNITS = {"tensor_flops": ("FLOPs", FLOPS), "hbm_bytes": ("HBM", BYTES), "wire_bytes": ("wire", BYTES)}


def print_explanation(told: dict[str, Any], estimate: Estimate, console: Console, top: int) -> None:
    """Total, what it is made of, then memory and cache by part."""
    seconds = estimate.seconds
    console.print(
        f"[bold]{show(seconds)}[/] (80 %: {span(seconds)}; {seconds.basis}); bound {SECONDS.show(estimate.lower, 3)}; "
        f"most of it waits for {told['binding']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for warning in told["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    console.print()
    console.print("Times are of all runs of an op, formulas of one (of unequal chunks: of their mean).\n", style="dim", highlight=False)
    shown = told["rows"][:top] if top else told["rows"]
    for row in shown:
        _print_row(row, console)
    rest = told["rows"][len(shown) :]
    if rest:
        share = sum(row["share"] for row in rest)
        console.print(f"{len(rest)} more ops take {share:.1%} (--top 0 shows them)\n", highlight=False)
    if told["overlapped_s"] > 1e-9 * seconds.value:
        console.print(f"overlapping hides {SECONDS.show(told['overlapped_s'], 3)} of their sum\n", highlight=False)
    memory = told["memory_bytes_per_gpu"]
    rows = [[part, gib(value), f"{value / memory['usable']:.1%}"] for part, value in memory.items() if value]
    _table(console, "Memory per GPU", ["part", "size", "of usable"], rows)
    cache = told["cache"]
    lines = [
        [
            str(entry["count"]), entry["kind"], entry["keeps"],
            f"{entry['count']} x {entry['stored_tokens']:,.0f} x {formulas.readable(formulas.exact(entry['row_bytes']))} B", gib(entry["bytes_per_sequence"]),
        ]
        for entry in cache["layers"]
    ]  # fmt: skip
    _table(console, "Cache of one sequence, before it is sharded", ["layers", "kernel", "keeps", "formula", "size"], lines)
    console.print(f"calibration: {told['calibration']}", style="dim", highlight=False, soft_wrap=True)


def _print_row(row: dict[str, Any], console: Console) -> None:
    within = Interval(**row["seconds"])
    of_bound = f", {row['lower'] / within.value:.0%} of it the bound" if within.value else ""
    console.print(
        f"[bold]{row['name']}[/]  {show(within)} ({row['share']:.1%}) in {_times(row['count'])}  80 %: {span(within)}{of_bound}; "
        f"bound by {RESOURCE_NAMES[row['bound_by']]}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for name, formula in row["formulas"].items():
        title, unit = _UNITS[name]
        if not formula["value"]:
            continue
        text = f"{formulas.readable(formula['text'])} = {formulas.readable(formula['substituted'])} = {unit.show(formula['value'], 4)}"
        console.print(f"  {title:6}{text}", highlight=False, soft_wrap=True, markup=False)
    attains = [
        f"{significant(row['constants'][name], 3)} of the {peak} peak"
        for name, peak in _SHARES.items()
        if name in row["constants"] and peak in row["demand_s"]
    ]
    if row["found_in_l2"] > 0.005 and "handed" in row["constants"]:  # noqa: PLR2004 (what shows as 1 %)
        attains.append(f"{significant(row['constants']['handed'], 3)} of it for the {row['found_in_l2']:.0%} that the L2 cache serves")
    if row["constants"].get("sustained") and "tensor" in row["demand_s"]:
        attains.append(f"{significant(row['constants']['sustained'], 3)} where the power limit holds it")
    if row["constants"].get("launch_s"):
        attains.append(f"{SECONDS.show(row['constants']['launch_s'], 2)} to launch")
    told = "; ".join([", ".join(attains), row["basis"], row["source"]]).strip("; ")
    console.print(f"  time  {told}", highlight=False, soft_wrap=True, markup=False, style="dim")
    console.print()


def _times(count: float) -> str:
    return "one run" if count == 1 else f"{formulas.readable(formulas.exact(count))} runs"


__all__ = ["document", "print_explanation"]
