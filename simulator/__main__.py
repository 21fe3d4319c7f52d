"""`python -m simulator` is `longctx`."""

from simulator.cli import run

run()
