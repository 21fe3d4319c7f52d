"""The verbs that open an answer: where it comes from, and what moved between two."""

from __future__ import annotations

from typing import Any

import click

from simulator.cli import (
    _estimated,
    context_options,
    csv_option,
    format_options,
    give,
    holds_option,
    layout_options,
    machine_options,
    output_options,
    phase_options,
)


@click.command()
@click.argument("model")
@machine_options
@phase_options
@layout_options
@context_options
@holds_option
@format_options
@click.option("--top", type=click.IntRange(0, 10_000), default=12, show_default=True, help="Ops to print, most time first; 0: all.")
@csv_option
@output_options
def explain(top: int, csv_file: str | None, as_json: bool, **asked: Any) -> None:
    """Where the time and memory of one phase of MODEL go: formula, numbers, bound, constants and their source, op by op."""
    from simulator import explain as opened

    if asked["phase"] == "train":
        message = "--phase train: explain opens phases of serving; longctx estimate has a training step op by op"
        raise ValueError(message)
    found, inputs, told = _estimated(**asked)
    document = opened.document(found, inputs, told)
    give(document, lambda console: opened.print_explanation(document, found, console, top), as_json=as_json, csv_file=csv_file, table="rows")


@click.command()
@click.argument("before")
@click.argument("after")
@csv_option
@output_options
def diff(before: str, after: str, csv_file: str | None, as_json: bool) -> None:
    """Which term moved between two answers.

    BEFORE and AFTER are each the words of an estimate or a size ("Llama-3.1-70B --tp 8 --context 1M"; a first word size or
    estimate picks the verb, estimate is meant without one), or a file that --json wrote.
    """
    from simulator import diff as compared

    first, second = _answer(before), _answer(after)
    document = compared.document(first, second, {"before": before, "after": after})
    give(document, lambda console: compared.print_diff(document, console), as_json=as_json, csv_file=csv_file, table="terms")


def _answer(told: str) -> dict[str, Any]:
    """The document of a file, or of the command that the words are."""
    import contextlib
    import io
    import json
    import shlex
    from pathlib import Path

    from simulator import cli
    from simulator.diff import read

    if told.endswith(".json") and " " not in told.strip() and Path(told).is_file():
        return read(Path(told))
    try:
        words = shlex.split(told)
    except ValueError as error:
        message = f"{told!r}: {error}; close the quotes"
        raise ValueError(message) from error
    verbs: dict[str, click.Command] = {"estimate": cli.estimate, "size": cli.size}
    verb = verbs[words.pop(0)] if words and words[0] in verbs else cli.estimate
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            verb.main([*words, "--json"], prog_name=f"longctx {verb.name}", standalone_mode=False)
    except click.ClickException as error:
        message = f"{told!r}: {error.format_message()}"
        raise ValueError(message) from error
    try:
        found: dict[str, Any] = json.loads(said.getvalue())
    except ValueError as error:
        message = f"{told!r}: asks for no answer; write the words of longctx {verb.name}, without --help"
        raise ValueError(message) from error
    return found
