"""The verb that recomputes what is said of long context."""

from __future__ import annotations

import click

from simulator.cli import _console, csv_option, output_options


@click.command()
@click.option("--markdown", is_flag=True, help="As the page docs/claims.md.")
@csv_option
@output_options
def claims(markdown: bool, csv_file: str | None, as_json: bool) -> None:
    """What essays and papers say of long context, each beside our own number, and whether it holds."""
    from simulator import claims as told
    from simulator import export, report

    if markdown and as_json:
        message = "--markdown and --json: one answer, one form; leave out either"
        raise ValueError(message)
    document = told.document()
    if csv_file is not None:
        export.write_csv(csv_file, document["claims"])
    if as_json:
        click.echo(report.emit(document))
    elif markdown:
        click.echo(told.markdown(), nl=False)
    else:
        told.print_claims(_console())
