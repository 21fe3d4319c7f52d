"""The command line.  Exit codes: 0 answered and fits; 3 answered, but does not fit; 2 bad input; 1 our fault."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import click

from simulator import __version__
from simulator.units import parse_tokens

EXIT_DOES_NOT_FIT = 3


class Tokens(click.ParamType[int]):
    """A number of tokens as vLLM writes it."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """1M -> 1,048,576."""
        try:
            return parse_tokens(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Share(click.FloatRange):
    """A number in a range; "nan" is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As `FloatRange`, but what cannot be compared is outside."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self.min}<=x<={self.max}.", param, ctx)
        return number


TOKENS = Tokens()
#: The words of `simulator.parallel.context`, which help must not import.
ORDERS, PASSING, HOLDS = ("zigzag", "contiguous", "striped"), ("kv", "q", "auto", "gather", "double"), ("share", "whole")
POSITIVE = click.IntRange(1, 1_000_000)
EXTENT = click.IntRange(1, 2**40)
Command = Callable[..., Any]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


machine_options = _options(
    click.option("--gpu", default="h200", show_default=True, help="GPU: a name that longctx gpus lists (h200, b200, mi300x, ...), or a TOML file."),
    click.option("--gpus", type=POSITIVE, default=None, help="Number of GPUs (default: the product of the degrees given, else 1)."),
)
layout_options = _options(
    click.option("--tp", type=POSITIVE, help="Tensor-parallel degree."),
    click.option("--pp", type=POSITIVE, help="Pipeline-parallel degree."),
    click.option("--dp", type=POSITIVE, help="Independent replicas."),
    click.option("--ep", type=POSITIVE, help="Expert-parallel degree (tp x dp-attention)."),
    click.option("--dcp", type=POSITIVE, help="Decode-context-parallel degree."),
    click.option("--dp-attention", type=POSITIVE, help="Attention-data-parallel degree."),
)
#: Ways to share the tokens of a prompt.
context_options = _options(
    click.option("--cp", type=POSITIVE, help="Context-parallel degree: GPUs that share a prompt's tokens."),
    click.option("--cp-order", "order", type=click.Choice(ORDERS), default=None, help="Which tokens a rank of --cp has (default: zigzag)."),
    click.option(
        "--cp-passing", "passing", type=click.Choice(PASSING), default=None,
        help="What goes between ranks of --cp: keys and values or queries round a ring, or everything gathered (default: kv; the engine's in size).",
    ),
    click.option("--ulysses", type=POSITIVE, help="Ulysses degree: GPUs that exchange tokens for heads."),
    click.option("--helix", type=POSITIVE, help="Helix degree: ranks of --tp that split the cache in decoding."),
)
format_options = _options(
    click.option("--weights", default=None, help="Store linear layers otherwise: bf16, fp8, nvfp4, int4, ..."),
    click.option(
        "--cache", "--cache-dtype", "--kv-cache-dtype", "cache", default=None,
        help="Store the cache otherwise: bf16, fp8, nvfp4, int4, kivi-2, fp8_ds_mla, ...",
    ),
)
engine_options = _options(
    click.option("--block-size", type=click.IntRange(1, 4096), default=None, help="Tokens per cache block (default: the engine's)."),
    click.option("--memory-fraction", type=Share(0.05, 1.0), default=None, help="gpu_memory_utilization (default 0.92)."),
    click.option("--chunk", type=TOKENS, default=None, help="max_num_batched_tokens (default: the engine's for the GPU)."),
)
phase_options = _options(
    click.option("--phase", type=click.Choice(["prefill", "decode", "train"]), default="prefill", show_default=True),
    click.option("--context", type=TOKENS, default="128K", show_default=True, help="Tokens of each sequence at the end of the phase."),
    click.option("--batch", type=POSITIVE, default=1, show_default=True, help="Sequences."),
    click.option("--prefix", type=TOKENS, default=None, help="Tokens already cached (prefill; default: none)."),
    click.option("--chunk", type=TOKENS, default=None, help="New tokens per step (prefill; default: all at once)."),
    click.option("--engine", type=click.Choice(["vllm"]), default=None, help="Add the engine's host work; without it, none is added."),
)
#: A training step (--phase train).
train_options = _options(
    click.option("--sp", type=POSITIVE, help="Sequence-parallel degree: the tensor degree, or one."),
    click.option("--recompute", type=click.Choice(["none", "full"]), default=None, help="Training: what is computed again backward (default: full)."),
    click.option("--zero", type=click.IntRange(0, 3), default=None, help="Training: stage of states shared by replicas (default: 1)."),
    click.option("--schedule", type=click.Choice(["gpipe", "1f1b", "interleaved"]), default=None, help="Training: the pipeline's (default: 1f1b)."),
    click.option("--model-chunks", "chunks", type=click.IntRange(1, 64), default=None, help="Training: chunks of a stage (interleaved)."),
    click.option("--optimizer", type=click.Choice(["adamw", "muon"]), default=None, help="Training: whose states are held (default: adamw)."),
)
holds_option = click.option(
    "--cp-holds", "holds", type=click.Choice(HOLDS), default=None, help="What a rank of --cp keeps of a cache (default: its share)."
)
csv_option = click.option("--csv", "csv_file", type=click.Path(dir_okay=False), default=None, help="Write the table here, one row a line.")
output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
)


#: Verbs in files of their own, loaded when they are asked for.
LATER = {"claims": "claims", "explain": "explain", "diff": "explain", "gpus": "gpus"}


class Verbs(click.Group):
    """Our own verbs, and those that installed packages add under the entry points `longctx.verbs` (bench, calibrate)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        from importlib.metadata import entry_points

        return sorted({*super().list_commands(ctx), *LATER, *(point.name for point in entry_points(group="longctx.verbs"))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of ours, else one that is added."""
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in LATER:
            from importlib import import_module

            found = getattr(import_module(f"simulator.cli.{LATER[cmd_name]}"), cmd_name)
        if found is None:
            from importlib.metadata import entry_points

            for point in entry_points(group="longctx.verbs", name=cmd_name):
                found = point.load()
        return found


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="longctx")
def main() -> None:
    """What a long context costs, before a GPU is rented."""


def run() -> None:
    """Entry point: every user's mistake is one clear line and exit code 2."""
    try:
        code = main(standalone_mode=False)
    except click.exceptions.Exit as leave:
        code = leave.exit_code
    except click.Abort:
        code = 130
    except click.exceptions.NoArgsIsHelpError as shown:
        click.echo(shown.format_message())
        code = 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "longctx"
        click.echo(f"error: {error.format_message()} (see {path} --help)", err=True)
        code = 2
    except ValueError as error:
        click.echo(f"error: {error}", err=True)
        code = 2
    except BrokenPipeError:
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def give(document: dict[str, Any], show: Callable[[Any], object], *, as_json: bool, csv_file: str | None = None, table: str = "") -> None:
    """An answer: the rows of its `table` into a file, where one is asked for; on stdout as JSON, or as `show` prints it on a console."""
    from simulator import export, report

    if csv_file is not None:
        export.write_csv(csv_file, document[table])
    if as_json:
        click.echo(report.emit(document))
    else:
        show(_console())


def _model(source: str, weights: str | None, cache: str | None) -> Any:
    from simulator.hf import load_model, with_formats

    return with_formats(load_model(source), weights, cache)


def _degrees(given: dict[str, int | None]) -> dict[str, int]:
    return {name: degree for name, degree in given.items() if degree is not None}


def _machine(gpu: str, gpus: int | None, degrees: dict[str, int]) -> Any:
    from simulator.hardware import cluster

    product = 1
    for name in ("tp", "pp", "dp", "dp_attention", "cp", "ulysses"):
        product *= degrees.get(name, 1)
    return cluster(gpu, product if gpus is None else gpus)


@main.command()
@click.argument("model")
@machine_options
@click.option("--context", type=TOKENS, default="128K", show_default=True, help="Tokens of a request in all: prompt and output.")
@click.option("--concurrency", type=POSITIVE, default=1, show_default=True, help="Requests at the same time.")
@click.option("--output", type=TOKENS, default=None, help="Output tokens of a request (default: 1,024, or an eighth of the context).")
@click.option("--prefix-hit", type=Share(0, 1), default=0.9, show_default=True, help="Share of the prompt found in the prefix cache.")
@layout_options
@context_options
@format_options
@engine_options
@click.option("--price", type=Share(0, 10_000), default=None, help="US dollars per GPU-hour (default: data/prices.toml).")
@click.option("--exit-zero", is_flag=True, help="Exit 0 even if it does not fit.")
@click.option("--output-dir", type=click.Path(file_okay=False), default=None, help="Write result.json, layouts.csv and launch.sh here.")
@output_options
def size(
    model: str, gpu: str, gpus: int | None, context: int, concurrency: int, output: int | None, prefix_hit: float,
    tp: int | None, pp: int | None, dp: int | None, ep: int | None, dcp: int | None, dp_attention: int | None,
    weights: str | None, cache: str | None, block_size: int | None, memory_fraction: float | None, chunk: int | None,
    price: float | None, exit_zero: bool, output_dir: str | None, as_json: bool,
    cp: int | None, order: str | None, passing: str | None, ulysses: int | None, helix: int | None,
) -> int:  # fmt: skip
    """Does MODEL fit at this context, on which layout, how fast and how dear?"""
    from simulator import export, reading_report, report
    from simulator.question import Answer, Question
    from simulator.question import answer as answered

    degrees = _degrees({
        "tp": tp, "pp": pp, "dp": dp, "ep": ep, "dcp": dcp, "dp_attention": dp_attention, "cp": cp, "ulysses": ulysses, "helix": helix,
    })  # fmt: skip
    ways = tuple((name, word) for name, word in (("order", order), ("passing", passing)) if word is not None)
    answer = answered(Question(
        model, gpu, gpus, context, concurrency, output, prefix_hit, tuple(degrees.items()), weights, cache, block_size, memory_fraction, chunk, price,
        ways,
    ))  # fmt: skip
    document = answer.document() if as_json or output_dir is not None else {}
    if output_dir is not None:
        export.write_size(output_dir, report.emit(document), document)
    fits = answer.plan.fits if isinstance(answer, Answer) else answer.reading.fits
    if as_json:
        click.echo(report.emit(document))
    elif isinstance(answer, Answer):
        report.print_size(answer.plan, answer.inputs, _console())
    else:
        reading_report.print_reading(answer.reading, answer.inputs, _console())
    return 0 if fits or exit_zero else EXIT_DOES_NOT_FIT


@main.command()
@click.argument("model")
@machine_options
@click.option("--context", type=TOKENS, default="128K", show_default=True, help="Tokens of the sequence.")
@layout_options
@format_options
@engine_options
@output_options
def kv(
    model: str, gpu: str, gpus: int | None, context: int, tp: int | None, pp: int | None, dp: int | None, ep: int | None,
    dcp: int | None, dp_attention: int | None, weights: str | None, cache: str | None, block_size: int | None,
    memory_fraction: float | None, chunk: int | None, as_json: bool,
) -> None:  # fmt: skip
    """What one sequence of MODEL keeps: by architecture, and as the engine allocates it."""
    from simulator import reach, report, tables
    from simulator.engines import Vllm
    from simulator.estimate import check
    from simulator.parallel import Layout

    degrees = _degrees({"tp": tp, "pp": pp, "dp": dp, "ep": ep, "dcp": dcp, "dp_attention": dp_attention})
    machine, spec = _machine(gpu, gpus, degrees), _model(model, weights, cache)
    layout, engine = Layout(**degrees), Vllm(memory_fraction, block_size, chunk)  # type: ignore[arg-type]
    check(spec, machine, layout)
    inputs = {
        "model": spec.name, "gpu": machine.gpu.name, "gpus": machine.gpus, "context": context, "layout": str(layout),
        "cache": spec.cache.name, "block_size": engine.block_tokens(spec, machine.gpu), "memory_fraction": engine.fraction,
        "chunk": engine.step_tokens(machine.gpu), "engine": f"vllm {engine.version}",
    }  # fmt: skip
    held = tables.engines(spec, layout, machine, context, [engine])
    document = {**report.kv_document(spec, context, held, inputs, reach.warnings(spec, context)), "reach": reach.document(spec, context)}
    if as_json:
        click.echo(report.emit(document))
    else:
        console = _console()
        report.print_kv(document, spec, context, console)
        tables.print_engines(document, spec, layout, console)
        tables.print_reach(spec, context, console)


@main.command()
@click.option("--sort", type=click.Choice(["name", "parameters", "active", "bytes_per_token", "cache", "declared"]), default="name", show_default=True)
@click.option("--match", default="", help="Only models whose id contains this.")
@csv_option
@output_options
def models(sort: str, match: str, csv_file: str | None, as_json: bool) -> None:
    """The models of the catalog: size, mixers, cache, and how far each reads."""
    from simulator import tables
    from simulator.compare import quantities
    from simulator.hf import catalog, load_model

    names = [name for name in catalog() if match.lower() in name.lower()]
    if not names:
        message = f"--match {match!r}: no model of the catalog contains it; longctx models lists all {len(catalog())}"
        raise ValueError(message)
    found = [(quantities(spec, 2**20), float(spec.cache_bytes(2.0**17))) for spec in map(load_model, names)]
    document = tables.models_document(found, sort, {"sort": sort, "match": match})
    give(document, lambda console: tables.print_models(document, console), as_json=as_json, csv_file=csv_file, table="models")


@main.command()
@click.argument("names", nargs=-1, metavar="[MODEL]...")
@click.option("--context", type=TOKENS, default="1M", show_default=True, help="Tokens of a request in all.")
@click.option("--gpu", default=None, help="Add times and fit on this GPU (default: quantities only).")
@click.option("--gpus", type=POSITIVE, default=8, show_default=True, help="Number of GPUs.")
@click.option("--concurrency", type=POSITIVE, default=1, show_default=True, help="Requests at the same time (with --gpu).")
@click.option("--head-types", is_flag=True, help="Compare MHA, GQA, MLA and MQA of one twin instead of models.")
@click.option("--recipe", is_flag=True, help="Price a recent million-token recipe against GPT-3's, choice by choice, instead of models.")
@click.option("--heads", type=POSITIVE, default=128, show_default=True, help="Query heads of the twin.")
@click.option("--head-dim", type=click.IntRange(1, 4096), default=128, show_default=True)
@click.option("--kv-heads", type=POSITIVE, default=8, show_default=True, help="Key-value heads of its GQA.")
@click.option("--latent", type=click.IntRange(1, 4096), default=512, show_default=True, help="Latent of its MLA.")
@click.option("--rope", type=click.IntRange(0, 4096), default=64, show_default=True, help="Rotary part of its MLA.")
@click.option("--layers", type=POSITIVE, default=61, show_default=True, help="Layers of the twin.")
@format_options
@csv_option
@output_options
def compare(
    names: tuple[str, ...], context: int, gpu: str | None, gpus: int, concurrency: int, head_types: bool, recipe: bool, heads: int, head_dim: int,
    kv_heads: int, latent: int, rope: int, layers: int, weights: str | None, cache: str | None, csv_file: str | None, as_json: bool,
) -> None:  # fmt: skip
    """The same request across MODELs, across ways to share keys and values (--head-types), or across the choices of a recipe (--recipe)."""
    from simulator import compare as comparing
    from simulator import planner, tables
    from simulator.dtypes import cache_format
    from simulator.hardware import cluster
    from simulator.serving import Request

    other = "--head-types" if head_types else "--recipe"
    if head_types and recipe:
        message = "--head-types and --recipe: two tables; ask for one at a time"
        raise ValueError(message)
    if (head_types or recipe) and names:
        message = f"{other} compares {'twins' if head_types else 'choices'}, not models: leave out {' '.join(names)}, or leave out {other}"
        raise ValueError(message)
    if recipe:
        from simulator import figures

        document = tables.recipe_document(figures.recipe(context), {"context": context})
        give(document, lambda console: tables.print_recipe(document, console), as_json=as_json, csv_file=csv_file, table="recipe")
        return
    if head_types:
        stored = cache_format(cache or "bf16")
        twin = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads, "latent": latent, "rope": rope, "layers": layers, "context": context}
        document = tables.head_types_document(comparing.head_types(**twin, cache=stored), {**twin, "cache": stored.name})
        give(document, lambda console: tables.print_head_types(document, console), as_json=as_json, csv_file=csv_file, table="head_types")
        return
    if not names:
        message = "compare: name at least one MODEL, or give --head-types or --recipe; longctx models lists the catalog"
        raise ValueError(message)
    found = [comparing.quantities(_model(name, weights, cache), context) for name in names]
    request = Request(context, concurrency, min(1024, max(1, context // 8)))
    plans = [planner.size(q.model, cluster(gpu, gpus), request) if gpu else None for q in found]
    inputs = {
        "models": [q.model.name for q in found], "context": context, "gpu": cluster(gpu, gpus).gpu.name if gpu else None, "gpus": gpus if gpu else None,
        "concurrency": concurrency if gpu else None, "output": request.output if gpu else None, "weights": weights, "cache": cache,
    }  # fmt: skip
    document = tables.compare_document(found, plans, inputs)
    give(document, lambda console: tables.print_compare(document, found, plans, console), as_json=as_json, csv_file=csv_file, table="models")


@main.command()
@click.argument("model")
@machine_options
@phase_options
@layout_options
@context_options
@holds_option
@train_options
@format_options
@csv_option
@output_options
def estimate(csv_file: str | None, as_json: bool, **asked: Any) -> None:
    """How long one phase of MODEL takes on one layout, op by op."""
    from simulator import report

    found, inputs, told = _estimated(**asked)
    document = report.estimate_document(found, inputs, told)
    give(document, lambda console: report.print_estimate(document, found, console), as_json=as_json, csv_file=csv_file, table="rows")


def _estimated(
    *, model: str, gpu: str, gpus: int | None, phase: str, context: int, batch: int, prefix: int | None, chunk: int | None,
    engine: str | None, weights: str | None, cache: str | None, order: str | None = None, passing: str | None = None, holds: str | None = None,
    recompute: str | None = None, zero: int | None = None, schedule: str | None = None, chunks: int | None = None, optimizer: str | None = None,
    **degree: int | None,
) -> tuple[Any, dict[str, Any], list[str]]:  # fmt: skip
    """The estimate that the options of a phase ask for, its inputs and warnings."""
    from simulator.engines import SCHEDULED
    from simulator.engines.paging import keeps
    from simulator.estimate import estimate as answer
    from simulator.parallel import Layout
    from simulator.phases import Decode, Prefill, TrainStep
    from simulator.planner import warnings
    from simulator.serving import Request

    trains = {"recompute": recompute, "zero": zero, "schedule": schedule, "chunks": chunks, "optimizer": optimizer}
    trains = {name: value for name, value in trains.items() if value is not None}
    _check_phase(phase, trains, {"prefix": prefix, "chunk": chunk, "engine": engine, "weights": weights, "cache": cache})
    prefix = prefix or 0
    if prefix >= context:
        message = f"--prefix {prefix}: it must be smaller than --context {context}; the last token is always computed"
        raise ValueError(message)
    degrees = _degrees(degree)
    machine, spec = _machine(gpu, gpus, degrees), _model(model, "bf16" if phase == "train" else weights, cache)
    ways = {name: word for name, word in (("order", order), ("passing", passing), ("holds", holds)) if word is not None}
    layout = Layout(**degrees, **ways)  # type: ignore[arg-type]
    if not keeps(spec) and (phase == "decode" or prefix or chunk):
        message = f"{spec.name} reads a text at once, keeps nothing and decodes nothing; ask for --phase prefill without --prefix and --chunk"
        raise ValueError(message)
    asked: Prefill | Decode | TrainStep
    if phase == "train":
        trains = {"recompute": "full", "zero": 1, "schedule": "1f1b", "optimizer": "adamw", **trains}
        asked = TrainStep(float(context), float(batch), **trains)  # type: ignore[arg-type]
    elif phase == "prefill":
        asked = Prefill(float(context), float(batch), float(prefix), None if chunk is None else float(chunk))
    else:
        asked = Decode(float(context), float(batch))
    found = answer(spec, machine, layout, asked, engine=SCHEDULED[engine]() if engine else None)
    inputs = {
        "model": spec.name, "gpu": machine.gpu.name, "gpus": machine.gpus, "layout": str(layout), **ways, "phase": phase, "context": context,
        "batch": batch, "prefix": prefix, "chunk": chunk, "engine": engine, "weights": weights or spec.quantization, "cache": spec.cache.name,
    }  # fmt: skip
    told = warnings(spec, Request(context), machine)
    if isinstance(asked, TrainStep):
        from simulator import train_step
        from simulator.phases import System

        told, inputs = [*spec.warnings, *train_step.warnings(System(spec, layout), asked)], {**inputs, **trains}
    if layout.gpus < machine.gpus:
        told.append(f"the layout ({layout}) uses {layout.gpus} of {machine.gpus} GPUs: the others idle; spread it with --tp, --pp, --dp, --cp")
    if float(found.footprint.total) > float(machine.gpu.usable_bytes):
        held, there = (float(b) / 2**30 for b in (found.footprint.total, machine.gpu.usable_bytes))
        told.append(f"{held:.1f} GiB per GPU do not fit in {there:.1f} GiB: a time for a machine with more memory")
    return found, inputs, told


def _check_phase(phase: str, trains: dict[str, Any], serves: dict[str, Any]) -> None:
    """Refuse options of the other kind of phase."""
    if phase == "train":
        wrong, why = serves, "it belongs to serving, and a training step has none; leave it out"
    else:
        wrong, why = trains, "it belongs to --phase train; leave it out"
    for name, value in wrong.items():
        if value is not None:
            flag = {"chunks": "model-chunks"}.get(name, name)
            message = f"--{flag} {value}: {why}"
            raise ValueError(message)


@main.command("compare-cp")
@click.argument("model")
@machine_options
@click.option("--context", type=TOKENS, default="1M", show_default=True, help="Tokens of the prompt.")
@click.option("--prefix", type=TOKENS, default=None, help="Tokens of it already cached (default: none).")
@click.option("--tp", type=POSITIVE, default=None, help="Tensor-parallel degree beneath (default: the largest in a node).")
@format_options
@click.option("--timeline", type=click.Path(dir_okay=False), default=None, help="Write the intervals of every ring position of the fastest ring here.")
@output_options
def compare_cp(
    model: str, gpu: str, gpus: int | None, context: int, prefix: int | None, tp: int | None, weights: str | None, cache: str | None,
    timeline: str | None, as_json: bool,
) -> None:  # fmt: skip
    """All ways to share one long prompt's tokens among GPUs, side by side.

    Engines differ in which of them they run; none is printed as a launch command here.
    """
    from pathlib import Path

    from simulator import report
    from simulator.compare_cp import compare, ring_timeline
    from simulator.planner import warnings
    from simulator.serving import Request
    from simulator.timeline import document as intervals

    past = prefix or 0
    if past >= context:
        message = f"--prefix {past}: it must be smaller than --context {context}; the last token is always computed"
        raise ValueError(message)
    machine, spec = _machine(gpu, 64 if gpus is None else gpus, {}), _model(model, weights, cache)
    found = compare(spec, machine, context, prefix=past, tp=tp)
    inputs = {
        "model": spec.name, "gpu": machine.gpu.name, "gpus": machine.gpus, "context": context, "prefix": past, "tp": tp,
        "weights": weights or spec.quantization, "cache": spec.cache.name,
    }  # fmt: skip
    told = report.compare_cp_document(found, inputs, warnings(spec, Request(context), machine))
    if timeline is not None:
        ring = next((way for way in found if way.estimate is not None and way.layout.cp > 1), None)
        if ring is None:
            message = f"--timeline {timeline}: no ring is possible here, so there is nothing to write"
            raise ValueError(message)
        Path(timeline).write_text(report.emit({"way": ring.name, "spans": intervals(ring_timeline(ring))}), encoding="utf-8")
    give(told, lambda console: report.print_compare_cp(told, found, console), as_json=as_json)


@main.group()
def kernel() -> None:
    """One kernel on one GPU: work, bound, expected time."""


dtype_option = click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp8"]), default="bf16", show_default=True)


@kernel.command()
@click.option("--gpu", default="h200", show_default=True)
@click.option("--m", "rows", type=EXTENT, required=True, help="Rows (tokens).")
@click.option("--n", "outputs", type=EXTENT, required=True, help="Outputs.")
@click.option("--k", "inputs_", type=EXTENT, required=True, help="Inputs.")
@dtype_option
@output_options
def gemm(gpu: str, rows: int, outputs: int, inputs_: int, dtype: str, as_json: bool) -> None:
    """A matrix product (m, k) x (k, n)."""
    from simulator.dtypes import WEIGHT_FORMATS
    from simulator.kernels.gemm import gemm as product

    op = product("gemm", m=float(rows), n=float(outputs), k=float(inputs_), weight=WEIGHT_FORMATS[dtype])
    _show_kernel(op, gpu, {"kernel": "gemm", "m": rows, "n": outputs, "k": inputs_, "dtype": dtype}, as_json=as_json)


@kernel.command()
@click.option("--gpu", default="h200", show_default=True)
@click.option("--impl", default="", help="cudnn, flash2, flash3, flash4, ... (default: what engines run there).")
@click.option("--sequences", type=POSITIVE, default=1, show_default=True)
@click.option("--tokens", type=TOKENS, required=True, help="New tokens of each sequence.")
@click.option("--context", type=TOKENS, default=None, help="Tokens visible to the last new token (default: the new tokens).")
@click.option("--heads", type=POSITIVE, required=True)
@click.option("--kv-heads", type=POSITIVE, default=None, help="Key-value heads (default: heads).")
@click.option("--head-dim", type=click.IntRange(1, 4096), default=128, show_default=True)
@click.option("--v-head-dim", type=click.IntRange(1, 4096), default=None, help="Value width (default: head-dim).")
@click.option("--window", type=TOKENS, default=None, help="Sliding window, the query included.")
@click.option("--backward", is_flag=True, help="The backward pass.")
@dtype_option
@output_options
def attention(
    gpu: str, impl: str, sequences: int, tokens: int, context: int | None, heads: int, kv_heads: int | None, head_dim: int,
    v_head_dim: int | None, window: int | None, backward: bool, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Causal attention of new tokens over a context; one new token runs the split-KV decode kernel."""
    from simulator.dtypes import CACHE_FORMATS, DTYPES
    from simulator.kernels.attention import Causal, Segment, Window
    from simulator.kernels.attention import attention as core

    seen = context if context is not None else tokens
    shared = kv_heads if kv_heads is not None else heads
    if seen < tokens:
        message = f"--context {seen}: it includes the {tokens} new tokens; use at least {tokens}"
        raise ValueError(message)
    if heads % shared:
        message = f"--kv-heads {shared}: must divide --heads {heads}"
        raise ValueError(message)
    decodes = tokens == 1 and not backward
    op = core(
        "attention", Segment(float(sequences), float(tokens), float(seen - tokens), split_kv=decodes), heads=float(heads),
        kv_heads=float(shared), head_dim=head_dim, v_head_dim=v_head_dim, mask=Window(window) if window else Causal(),
        dtype=DTYPES[dtype], cache=CACHE_FORMATS[dtype], impl=impl, backward=backward,
    )  # fmt: skip
    asked = {
        "kernel": op.kernel, "impl": impl, "sequences": sequences, "tokens": tokens, "context": seen, "heads": heads, "kv_heads": shared,
        "head_dim": head_dim, "v_head_dim": v_head_dim or head_dim, "window": window, "backward": backward, "dtype": dtype,
    }  # fmt: skip
    _show_kernel(op, gpu, asked, as_json=as_json)


def _show_kernel(op: Any, gpu: str, asked: dict[str, Any], *, as_json: bool) -> None:
    from simulator import report
    from simulator.calibration import Calibration
    from simulator.hardware import cluster

    machine = cluster(gpu, 1)
    calibration, told = Calibration.load(machine.gpu), []
    known = calibration.implementations(op.kernel)
    if op.impl and op.impl not in known:
        others = f"use {', '.join(known)}, or leave it out" if known else "no implementation is told apart there; leave it out"
        message = f"--impl {op.impl}: nothing is known of it as {op.kernel} on {machine.gpu.name}; {others}"
        raise ValueError(message)
    if not machine.gpu.supports(op.math):
        told.append(f"{machine.gpu.name} has no {op.math} arithmetic: computed in {machine.gpu.runs_as(op.math)}")
    document = report.kernel_document(op, machine, calibration, {"gpu": machine.gpu.name, **asked}, told)
    give(document, lambda console: report.print_kernel(document, console), as_json=as_json)


@main.command()
@click.option("--kind", "kinds", multiple=True, help="Only this kind: kernel_tflops, kernel_time, decode_tpot, ... (repeatable).")
@click.option("--source", "sources", multiple=True, help="Only this source, a key of data/published/sources.csv (repeatable).")
@click.option("--gpu", "gpus", multiple=True, help="Only rows of this GPU (repeatable).")
@click.option("--rows", is_flag=True, help="Every row, not only the summaries.")
@click.option("--record", is_flag=True, help="Write the accuracy of all rows to data/published/accuracy.csv, from which tests refuse to fall.")
@output_options
def validate(kinds: tuple[str, ...], sources: tuple[str, ...], gpus: tuple[str, ...], rows: bool, record: bool, as_json: bool) -> None:
    """How close predictions come to what others measured, by source and kind."""
    from simulator import report
    from simulator import validate as checks
    from simulator.hardware import gpu as part

    if record and (kinds or sources or gpus):
        message = "--record: it records all rows; leave out --kind, --source and --gpu"
        raise ValueError(message)
    compared, refused = checks.compare(kinds=kinds, sources=sources, gpus=[part(name).name for name in gpus], with_measured=not record)
    if record:
        click.echo(f"recorded {checks.record(checks.by_source(compared))}", err=True)
    if as_json:
        inputs = {"kinds": kinds, "sources": sources, "gpus": gpus, "rows": rows}
        click.echo(report.emit(checks.document(compared, refused, inputs, rows=rows)))
    else:
        checks.show(compared, refused, _console(), rows=rows)
