"""Every model on every accelerator, and inputs nobody would write: `python tests/benchmarks/breadth.py [INPUTS]`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
os.environ |= {"XDG_DATA_HOME": tempfile.mkdtemp(), "XDG_CACHE_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}

from hypothesis import HealthCheck, given, settings

from simulator import cli
from simulator.engines.paging import keeps
from simulator.hardware import catalog
from simulator.hf import catalog as models
from simulator.hf import load_model
from tests.fuzzing import check_command_line, check_config, command_lines, configs

#: Exit codes in words.
TOLD = {0: "answered", 3: "answered: does not fit", 2: "refused in one line", 1: "traceback"}


def code_of(*words: str) -> int:
    """Exit code of a command; what it prints must be JSON, or one line."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["longctx", *words, "--json"]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run()
        except SystemExit as left:
            code = int(left.code or 0)
        except Exception:  # noqa: BLE001 (what the count is about)
            traceback.print_exc()
            return 1
    if code == 2:
        assert out.getvalue() == "", words
        assert err.getvalue().count("\n") == 1, (words, err.getvalue())
    else:
        json.loads(out.getvalue())
    return code


def product() -> Counter[tuple[str, int]]:
    """How often each verb left with each exit code.  Encoders decode nothing, and say so where a decode step is asked for."""
    found: Counter[tuple[str, int]] = Counter()
    decodes = {name for name in models() if keeps(load_model(name))}
    for part in catalog():
        for name in models():
            for words in (["kv"], ["size", "--gpus", "8"], ["estimate"], ["explain"], ["explain", "--phase", "decode"]):
                code = code_of(words[0], name, *words[1:], "--gpu", part, "--context", "32K")
                allowed = (0, 3) if words[0] == "size" else (0,) if name in decodes or "decode" not in words else (2,)
                assert code in allowed, (words, name, part, code)
                found[" ".join(words), code] += 1
    return found


def fuzz(inputs: int) -> None:
    """So many of each kind of input, other ones every time."""
    odd = settings(max_examples=inputs, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    for check, strategy in ((check_config, configs()), (check_command_line, command_lines())):
        started = time.perf_counter()
        odd(given(strategy)(check))()
        print(f"{check.__name__}: {inputs:,} inputs in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    started = time.perf_counter()
    for (verb, code), times in sorted(product().items()):
        print(f"{verb:24} {TOLD[code]}: {times:,}")
    print(f"{len(models())} models x {len(catalog())} accelerators in {time.perf_counter() - started:.0f} s")
    fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
