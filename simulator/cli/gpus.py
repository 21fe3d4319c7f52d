"""The verb that lists accelerators."""

from __future__ import annotations

import click

from simulator.cli import csv_option, give, output_options


@click.command()
@csv_option
@output_options
def gpus(csv_file: str | None, as_json: bool) -> None:
    """The accelerators known: memory, bandwidth, dense rates, link, price, and on what their times rest."""
    from simulator import gpus as known

    document = known.document({})
    give(document, lambda console: known.print_gpus(document, console), as_json=as_json, csv_file=csv_file, table="gpus")
