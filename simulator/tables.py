"""Tables and documents of `models` and `compare`, and of what every engine makes of a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from simulator import compare, reach
from simulator.compare import HeadType, Quantities
from simulator.engines import REGISTRY, Engine
from simulator.engines.paging import Demand, by_kind, stored_as
from simulator.figures import Choice
from simulator.hardware import Cluster
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.planner import Plan
from simulator.report import _head, _table, show
from simulator.units import BYTES, FLOPS, gib, significant

if TYPE_CHECKING:
    from rich.console import Console


# ---- engines


def engines(model: ModelSpec, layout: Layout, machine: Cluster, context: int, chosen: Sequence[Engine] = ()) -> dict[str, Any]:
    """Every engine's answer, `chosen` ones with their settings: what it holds, or in one line why it does not."""
    given = {engine.name: engine for engine in chosen}
    ranks = float(layout.replica_gpus)
    found: dict[str, Any] = {}
    for name, kind in REGISTRY.items():
        engine: Engine = given.get(name) or kind()
        try:
            held = engine.allocation(model, layout, machine, context)
        except ValueError as refusal:
            found[name] = {"title": engine.title, "version": engine.version, "refused": str(refusal)}
            continue
        found[name] = {
            "title": held.title, "version": held.version, "bytes_per_sequence": held.per_sequence_bytes * ranks,
            "bytes_per_sequence_per_gpu": held.per_sequence_bytes, "capacity_tokens": held.capacity_tokens,
            "max_concurrency": held.max_concurrency, "replicas": held.replicas, "prefix_tokens": held.prefix_tokens, "log": list(held.log),
            "note": held.note,
        }  # fmt: skip
    return found


def engine_rows(found: dict[str, Any], architecture: float) -> tuple[list[list[str]], list[str]]:
    """Rows of the engines' table, and the notes under it."""
    rows, notes = [], []
    for answer in found.values():
        if "refused" in answer:
            notes.append(answer["refused"])
            continue
        name = f"{answer['title']} {answer['version']}"
        starts = answer["max_concurrency"] > 0
        rows.append([
            name, gib(answer["bytes_per_sequence"]), f"{answer['bytes_per_sequence'] / architecture:.2f} x" if architecture else "",
            f"{answer['max_concurrency']:,.2f}" if starts else "does not start", f"{answer['capacity_tokens']:,}" if starts else "",
            f"{answer['prefix_tokens']:,}",
        ])  # fmt: skip
        notes.append(f"{name}: {answer['note']}")
    return rows, list(dict.fromkeys(notes))


def copies(model: ModelSpec, layout: Layout) -> float:
    """How often tensor ranks hold the same rows: t x rows of a rank / rows of all, over the ranks that share them."""
    whole, rank = (sum(float(h.row_bytes) for kind in by_kind(model, each) for h in kind if h.demand is not Demand.STATE) for each in (Layout(), layout))
    return float(layout.tp) * rank / whole / float(layout.dcp) if whole else 1.0


def print_engines(document: dict[str, Any], model: ModelSpec, layout: Layout, console: Console) -> None:
    """One sequence as each engine holds it, beside the architecture's bytes."""
    asked = document["inputs"]
    if not document["bytes_per_sequence"]:
        console.print(f"No engine holds anything: {document['engines']['vllm'].get('refused', model.name)}", highlight=False, soft_wrap=True)
        console.print()
        return
    rows, notes = engine_rows(document["engines"], document["bytes_per_sequence"])
    total = ["architecture", gib(document["bytes_per_sequence"]), "1.00 x", "", "", ""]
    where = f"{asked['gpus']} x {asked['gpu']} as {asked['layout']}"
    columns = ["one sequence", "all ranks", "of architecture", "max concurrency", "tokens", "prefix grid"]
    _table(console, f"As each engine holds it ({where})", columns, [total, *rows])
    for note in notes:
        console.print(f"  {note}", highlight=False, soft_wrap=True)
    if stored_as(model) is not model.cache:
        console.print(f"  engines keep this model's cache in {stored_as(model).name} whatever is asked", highlight=False, soft_wrap=True)
    held = copies(model, layout)
    if held > 1.01:  # noqa: PLR2004
        told = f"{held:.3g} copies" if held % 1 else f"{int(held)} copies"
        console.print(f"  tensor ranks hold {told} of the same rows; vLLM removes them with --dcp where the model allows it", highlight=False, soft_wrap=True)
    for line in document["engines"]["vllm"].get("log", ()):
        console.print(f"  vLLM prints: {line}", highlight=False)
    console.print()


def print_reach(model: ModelSpec, context: int, console: Console) -> None:
    """How far it reads and how it tells positions apart."""
    shown, declared, trained = reach.effective(model), model.reach.declared_tokens, model.reach.trained_tokens
    told = f"declares {declared:,} tokens" if declared else "declares no length"
    told += f", {trained:,} before scaling" if trained and trained != declared else ""
    told += f"; shown to use {shown.show()} ({shown.measure}; {shown.source_url})" if shown else "; no published effective length here"
    console.print(f"[bold]Reach[/]: {told}", highlight=False, soft_wrap=True)
    for held in reach.positions(model):
        console.print(f"  {reach.describe(held, model, context)}", highlight=False, soft_wrap=True)
    console.print()


# ---- models

_TRILLION = 1e12
_SORTS: dict[str, Callable[[Quantities], Any]] = {
    "name": lambda q: q.model.name.lower(), "parameters": lambda q: q.parameters, "active": lambda q: q.active,
    "bytes_per_token": lambda q: q.cache_bytes_per_token, "cache": lambda q: q.cache_bytes, "declared": lambda q: q.model.reach.declared_tokens or 0,
}  # fmt: skip
SORTS = tuple(_SORTS)


def models_document(found: Sequence[tuple[Quantities, float]], sort: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of `models`: (quantities at 1M, cache bytes at 128K) of each."""
    told = []
    for q, short in sorted(found, key=lambda pair: _SORTS[sort](pair[0])):
        shown = reach.effective(q.model)
        told.append({
            "name": q.model.name, "parameters": q.parameters, "active_parameters": q.active, "mixers": compare.mixers(q.model),
            "channels": compare.channels(q.model), "cache": q.model.cache.name, "cache_bytes_per_token": q.cache_bytes_per_token,
            "cache_bytes_128k": short, "cache_bytes_1m": q.cache_bytes, "trained_tokens": q.model.reach.trained_tokens,
            "declared_tokens": q.model.reach.declared_tokens, "effective_tokens": shown.tokens if shown else None,
            "effective_at_least": shown.at_least if shown else None, "warnings": list(q.model.warnings),
        })  # fmt: skip
    return {**_head(inputs, []), "models": told}


def print_models(document: dict[str, Any], console: Console) -> None:
    """One line per model."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    rows = []
    for entry in document["models"]:
        effective = entry["effective_tokens"]
        dense = entry["active_parameters"] == entry["parameters"]
        rows.append([
            entry["name"], _billions(entry["parameters"]), "" if dense else _billions(entry["active_parameters"]),
            f"{entry['cache_bytes_per_token']:,.0f}", gib(entry["cache_bytes_128k"]), gib(entry["cache_bytes_1m"]),
            _stretched(entry["declared_tokens"], entry["trained_tokens"]),
            ("" if effective is None else ">= " if entry["effective_at_least"] else "") + _tokens(effective), entry["mixers"],
        ])  # fmt: skip
    if not console.is_terminal:  # a file has room for a line per model
        console.width = 200
    columns = ["model", "params", "active", "B/token", "at 128K", "at 1M", "declared", "effective", "mixers"]
    table = Table(title=f"{len(rows)} models", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        left = column in ("model", "mixers")
        # a long stack is cut, not folded: one line per model (--json has all of it)
        widest = max(len(column), *(len(row[index]) for row in rows)) if rows else len(column)
        table.add_column(
            column, justify="left" if left else "right", no_wrap=True, overflow="ellipsis", min_width=16 if column == "mixers" else widest,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()
    console.print(
        "Cache of one sequence by architecture, in the checkpoint's format.  Declared: tokens (before rotary scaling).\n"
        "Effective: the published length a model was shown to use (RULER, needles); empty where none is known here.",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _billions(count: float) -> str:
    return f"{significant(count / _TRILLION, 3)}T" if count >= _TRILLION else f"{significant(count / 1e9, 3)}B"


def _stretched(declared: int | None, trained: int | None) -> str:
    """A declared length, and the one before scaling where it is another."""
    return _tokens(declared) + (f" ({_tokens(trained)})" if trained and trained != declared else "")


def _tokens(count: int | None) -> str:
    if count is None:
        return ""
    for size, suffix in ((2**20, "M"), (2**10, "K")):
        if count % size == 0:
            return f"{count // size}{suffix}"
    return f"{count:,}"


# ---- compare


def compare_document(found: Sequence[Quantities], plans: Sequence[Plan | None], inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of `compare`; plans only where a GPU was named."""
    entries = []
    for q, plan in zip(found, plans, strict=True):
        entry: dict[str, Any] = {
            "name": q.model.name, "parameters": q.parameters, "active_parameters": q.active, "mixers": compare.mixers(q.model),
            "channels": compare.channels(q.model), "position_schemes": compare.positions(q.model), "cache": q.model.cache.name,
            "cache_bytes_per_token": q.cache_bytes_per_token, "cache_fixed_bytes": q.cache_fixed_bytes, "cache_bytes_per_sequence": q.cache_bytes,
            "prefill_flops": q.prefill_flops, "decode_flops": q.decode_flops, "decode_bytes": q.decode_bytes, **reach.document(q.model, q.context),
        }  # fmt: skip
        if plan is not None:
            service = plan.service
            entry |= {
                "fits": plan.fits, "layout": str(plan.best.layout), "max_concurrency": float(plan.best.capacity.concurrency * plan.best.capacity.replicas),
                "smallest_gpus": plan.smallest_gpus, "ttft_s": service.cold.seconds.document() if service else None,
                "tpot_s": service.decode.seconds.document() if service else None,
                "usd_per_request": service.usd_per_request.document() if service and service.usd_per_request else None,
            }  # fmt: skip
        entries.append(entry)
    warnings = [f"{q.model.name}: {text}" for q in found for text in q.model.warnings]
    warnings += [text for q in found for text in reach.warnings(q.model, q.context)]
    return {**_head(inputs, warnings), "models": entries}


def print_compare(document: dict[str, Any], found: Sequence[Quantities], plans: Sequence[Plan | None], console: Console) -> None:
    """A property per line, a model per column."""
    least = min(q.cache_bytes for q in found) or 1.0
    lines: list[tuple[str, Callable[[Quantities], str]]] = [
        ("parameters", lambda q: _billions(q.parameters)), ("active per token", lambda q: _billions(q.active)),
        ("positions", lambda q: compare.positions(q.model)), ("mixers", lambda q: compare.mixers(q.model)),
        ("channel mixers", lambda q: compare.channels(q.model)), ("declared length", lambda q: _tokens(q.model.reach.declared_tokens)),
        ("effective length", lambda q: shown.show() if (shown := reach.effective(q.model)) else "none published"),
        ("cache format", lambda q: q.model.cache.name), ("cache per token", lambda q: f"{q.cache_bytes_per_token:,.0f} B"),
        ("cache of one sequence", lambda q: gib(q.cache_bytes)), ("against the smallest", lambda q: f"{significant(q.cache_bytes / least, 3)} x"),
        ("prefill", lambda q: FLOPS.show(q.prefill_flops)), ("one more token", lambda q: FLOPS.show(q.decode_flops)),
        ("bytes read for it", lambda q: BYTES.show(q.decode_bytes)),
    ]  # fmt: skip
    rows = [[name, *(tell(q) for q in found)] for name, tell in lines]
    if any(plan is not None for plan in plans):
        told: list[tuple[str, Callable[[Plan], str]]] = [
            ("fits", lambda p: "yes" if p.fits else "no"), ("layout", lambda p: str(p.best.layout)),
            ("max concurrency", lambda p: f"{float(p.best.capacity.concurrency * p.best.capacity.replicas):.1f}"),
            ("smallest cluster", lambda p: f"{p.smallest_gpus} GPU{'s' if p.smallest_gpus > 1 else ''}" if p.smallest_gpus else "none"),
            ("TTFT, cold", lambda p: show(p.service.cold.seconds) if p.service else ""),
            ("TPOT", lambda p: show(p.service.decode.seconds) if p.service else ""),
            ("$ per request", lambda p: show(p.service.usd_per_request, "$") if p.service and p.service.usd_per_request else ""),
        ]  # fmt: skip
        rows += [[name, *("" if plan is None else tell(plan) for plan in plans)] for name, tell in told]
    asked = document["inputs"]
    title = f"One request of {asked['context']:,} tokens" + (f" on {asked['gpus']} x {asked['gpu']}" if asked.get("gpu") else ", before any GPU")
    _table(console, title, ["", *(q.model.name.split("/")[-1] for q in found)], rows)
    for warning in document["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


def head_types_document(found: Sequence[HeadType], inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of `compare --head-types`."""
    told = [
        {"name": t.name, "what": t.what, "elements_per_token_per_layer": t.elements, "reduction": t.reduction, "cache_bytes_per_sequence": t.cache_bytes}
        for t in found
    ]  # fmt: skip
    return {**_head(inputs, []), "head_types": told}


def print_head_types(document: dict[str, Any], console: Console) -> None:
    """The bars of the figure, as a table."""
    asked = document["inputs"]
    rows = [
        [t["name"], t["what"], f"{t['elements_per_token_per_layer']:,.0f}", f"{t['reduction']:.1f} x",
         "not offered" if math.isnan(t["cache_bytes_per_sequence"]) else gib(t["cache_bytes_per_sequence"])]
        for t in document["head_types"]
    ]  # fmt: skip
    title = f"{asked['heads']} heads of {asked['head_dim']}: elements kept per token and layer; cache of {asked['layers']} layers "
    title += f"at {asked['context']:,} tokens in {asked['cache']}"
    _table(console, title, ["heads", "what it is", "elements", "fewer than MHA", "cache"], rows)


def recipe_document(choices: Sequence[Choice], inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of `compare --recipe`."""
    told = [{"choice": c.what, "then": c.then, "now": c.now, "number": c.number, "factor": c.factor} for c in choices]
    return {**_head(inputs, []), "recipe": told}


def print_recipe(document: dict[str, Any], console: Console) -> None:
    """A choice per line."""
    rows = [[c["choice"], c["then"], c["now"], c["number"], times(c["factor"])] for c in document["recipe"]]
    title = f"The recipe, choice by choice, at {document['inputs']['context']:,} tokens"
    _table(console, title, ["choice", "2020", "now", "here", "times"], rows)
    console.print(RECIPE_NOTE, style="dim", highlight=False, soft_wrap=True)


#: What the last column of the recipe says.
RECIPE_NOTE = (
    "Times: how much the choice changes what its row is about: a cost or a cache against the older way, or the length that can be told apart."
)


def times(factor: float | None) -> str:
    """How much a choice changes, or nothing."""
    return "" if factor is None else f"{significant(factor, 3)}\u00a0x"
