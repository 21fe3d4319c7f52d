"""The verb that lists accelerators."""

from __future__ import annotations

import click

from simulator.cli import _console, csv_option, output_options


@click.command()
@csv_option
@output_options
def gpus(csv_file: str | None, as_json: bool) -> None:
    """The accelerators known: memory, bandwidth, dense rates, link, price, and on what their times rest."""
    from simulator import export, report
    from simulator import gpus as known

    document = known.document({})
    if csv_file is not None:
        export.write_csv(csv_file, document["gpus"])
    if as_json:
        click.echo(report.emit(document))
    else:
        known.print_gpus(document, _console())
