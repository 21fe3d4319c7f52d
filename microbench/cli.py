"""The verbs `longctx bench` and `longctx calibrate`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click


def _need(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        message = f"this verb needs {', '.join(missing)}; install the torch of your CUDA, then `pip install 'longctx[gpu]'`"
        raise ValueError(message)


@click.command()
@click.option(
    "--suite", "suites", multiple=True, default=("quick",), show_default=True,
    help="quick, full, layers (whole layers beside their ops), ring (what ranks share), tiny, a kernel (attention), or one implementation "
    "(attention/cudnn).",
)  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of runs; a run adds one file.")
@click.option("--seconds", type=click.FloatRange(1, 36_000), default=540.0, show_default=True, help="Longest slice; run again to go on.")
@click.option("--counters", is_flag=True, help="Count DRAM bytes with Nsight Compute instead of timing.")
@click.option("--cpu", is_flag=True, help="Run without a GPU: shows that the code runs, says nothing of time.")
def bench(suites: tuple[str, ...], out: Path, seconds: float, *, counters: bool, cpu: bool) -> int:
    """Run the kernels on this machine's GPU and write what they took beside what they must do."""
    _need("torch")
    import torch  # noqa: PLC0415 (only this verb needs it)

    if not torch.cuda.is_available() and not cpu:
        message = (
            "no CUDA GPU is visible to PyTorch: check `nvidia-smi` and the CUDA build of torch, or try the path with --cpu --suite tiny"
        )
        raise ValueError(message)
    if counters:
        from microbench.counters import count  # noqa: PLC0415

        out.mkdir(parents=True, exist_ok=True)
        told = count(out)
        click.echo(f"wrote {told}" if isinstance(told, Path) else told)
        return 0
    if "ring" in suites:
        _ring(out, seconds)
        suites = tuple(name for name in suites if name != "ring")
        if not suites:
            return 0
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    from microbench.run import bench as measure  # noqa: PLC0415
    from microbench.run import gpu_seconds, todo  # noqa: PLC0415

    if torch.cuda.is_available():
        waiting = todo(suites, out)
        click.echo(f"{len(waiting)} cases to measure, about {gpu_seconds(waiting):.0f} s of GPU time", err=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task("measuring", total=None)

        def tell(done: int, of: int, which: Any) -> None:
            shown.update(task, completed=done, total=of, description=f"{which.kernel} {which.impl}")

        outcome = measure(suites, out, limit_s=seconds, progress=tell)
    for line in outcome.skipped:
        click.echo(f"left out: {line}", err=True)
    if outcome.file is None:
        click.echo(f"nothing to measure: {out} holds all {outcome.known} cases of {', '.join(suites)} for this GPU")
        return 0
    click.echo(f"{outcome.measured} cases measured, {outcome.known} known before, {len(outcome.skipped)} left out: {outcome.file}")
    if outcome.left:
        click.echo(f"{outcome.left} cases wait for the next slice: run the same command again")
    elif torch.cuda.is_available():
        click.echo(f"next: longctx calibrate {out}")
    return 0


def _ring(out: Path, seconds: float) -> None:
    """The algorithms of several ranks on what this machine has."""
    from microbench.ring import suite  # noqa: PLC0415

    click.echo(suite.plan(), err=True)
    outcome = suite.bench(out, limit_s=seconds)
    for line in outcome.skipped:
        click.echo(f"left out: {line}", err=True)
    if outcome.file is not None:
        click.echo(f"{outcome.measured} programs measured, {outcome.known} known before: {outcome.file} and the timelines beside it")
    if outcome.left:
        click.echo(f"{outcome.left} programs wait for the next slice: run the same command again")


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=None,
    help="Where the profile goes (default: your data folder, which is preferred from then on).",
)  # fmt: skip
@click.option("--plots", is_flag=True, help="Draw residuals.html beside the profile (needs altair).")
def calibrate(folder: Path, out: Path | None, *, plots: bool) -> int:
    """Fit the time side to the runs in FOLDER and say how well it predicts what was held out."""
    _need("torch", "scipy")
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from microbench.fit import calibrate as fitted  # noqa: PLC0415
    from microbench.fit import draw, write  # noqa: PLC0415
    from microbench.sums import ALLOWED, lines, sums  # noqa: PLC0415
    from simulator.calibration import user_folder  # noqa: PLC0415

    profile = fitted(folder)
    target = out or user_folder() / profile.gpu.name
    write(profile, target)
    table = Table(title=f"{profile.gpu.title}: |log(predicted / measured)| by kind of rows", title_justify="left", box=None)
    for name in ("kernel", "rows"):
        table.add_column(name)
    for name in ("n", "median", "p90", "with table", "p90", "in 80 %"):
        table.add_column(name, justify="right")
    table.add_column("worst")
    for q in profile.quality:
        table.add_row(
            " ".join(part for part in q.family if part), q.held, str(q.rows), f"{q.median:.1%}", f"{q.p90:.1%}",
            f"{q.median_with_table:.1%}", f"{q.p90_with_table:.1%}", f"{q.inside:.0%}", q.worst,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for line in profile.unstood():
        click.echo(f"kept from below: {line} (pip install flash-attn-4, then longctx bench --suite attention/flash4)")
    for line in profile.beaten:
        click.echo(f"faster than its bound, so the formula or the measurement is wrong: {line}", err=True)
    beside = sums(folder)
    if beside:
        click.echo(f"layers beside the sum of their own ops, same card and run (! beyond {ALLOWED:.0%}):")
    for line in lines(beside):
        click.echo(line)
    click.echo(f"profile: {target / 'constants.toml'}")
    if plots:
        _need("altair")
        click.echo(f"plot: {draw(profile, target)}")
    return 1 if profile.beaten else 0
