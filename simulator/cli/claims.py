"""The verb that recomputes what is said of long context."""

from __future__ import annotations

from typing import Any

import click

from simulator.cli import csv_option, give, output_options


@click.command()
@click.option("--markdown", is_flag=True, help="As the page docs/claims.md.")
@csv_option
@output_options
def claims(markdown: bool, csv_file: str | None, as_json: bool) -> None:
    """What essays and papers say of long context, each beside our own number, and whether it holds."""
    from simulator import claims as told

    if markdown and as_json:
        message = "--markdown and --json: one answer, one form; leave out either"
        raise ValueError(message)

    def show(console: Any) -> None:
        if markdown:
            click.echo(told.markdown(), nl=False)
        else:
            told.print_claims(console)

    give(told.document(), show, as_json=as_json, csv_file=csv_file, table="claims")
