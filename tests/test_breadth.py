"""Everything against everything: a sample of the catalog on every accelerator, and inputs nobody would write.

`python tests/benchmarks/breadth.py` runs the whole product and 10,000 inputs of each kind.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings

from simulator.engines.paging import keeps
from simulator.hardware import catalog, gpu
from tests.fuzzing import check_command_line, check_config, command_lines, configs
from tests.support import EVERY, model
from tests.test_cli import Say, say  # noqa: F401 (a fixture)

#: Every accelerator meets a few models, every model a few accelerators: the full product is the script's.
PAIRS = [(name, catalog()[i % len(catalog())]) for i, name in enumerate(EVERY)] + [(EVERY[7 * i % len(EVERY)], part) for i, part in enumerate(catalog())]


@pytest.mark.parametrize(("name", "part"), PAIRS)
def test_any_model_on_any_accelerator_is_answered(say: Say, name: str, part: str) -> None:  # noqa: F811
    held = say("kv", name, "--gpu", part, "--json")
    assert held.code == 0, held
    assert held.document["bytes_per_sequence"] >= 0
    for words in (["estimate", name, "--phase", "prefill"], ["explain", name], ["explain", name, "--phase", "decode"]):
        said = say(*words, "--gpu", part, "--context", "32K", "--json")
        if "decode" in words and not keeps(model(name)):
            assert said.code == 2
            assert said.err == f"error: {name} reads a text at once, keeps nothing and decodes nothing; ask for --phase prefill without --prefix and --chunk\n"
            continue
        assert (said.code, said.err) == (0, ""), said
        assert said.document["seconds"]["value"] > 0
        assert said.document["seconds"]["basis"] == "assumed" or not gpu(part).assumed
    sized = say("size", name, "--gpu", part, "--gpus", "8", "--context", "32K", "--json")
    assert sized.code == (0 if sized.document["fits"] else 3), sized
    assert sized.err == ""


@settings(max_examples=300)
@given(configs())
def test_a_config_makes_a_model_or_the_documented_error(config: dict[str, Any]) -> None:
    check_config(config)


@settings(max_examples=300)
@given(command_lines())
def test_a_command_line_makes_an_answer_or_the_documented_error(words: list[str]) -> None:
    check_command_line(words)


def processor_seconds(*words: str) -> float:
    """What the cheapest of three cold runs takes of the processor: other work on the machine does not count."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    taken = []
    for _ in range(3):
        before = spent()
        subprocess.run([sys.executable, "-m", "simulator", *words], check=True, stdout=subprocess.DEVNULL, timeout=60)
        taken.append(spent() - before)
    return min(taken)


def test_help_loads_no_tables_no_network_and_no_gpu() -> None:
    code = "import sys; from simulator.cli import main; main(['--help'], standalone_mode=False); sys.exit(any(m in sys.modules for m in ('rich', 'pandas', 'urllib.request', 'torch')))"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_a_cold_answer_comes_at_once() -> None:
    """Twice what it takes: 0.3 s from the prompt to the answer on an idle machine, 0.4 s of processor."""
    assert processor_seconds("size", "Qwen2.5-14B-Instruct-1M", "--gpu", "h200", "--gpus", "8", "--context", "1M", "--concurrency", "4") < 0.9
    assert processor_seconds("--help") < 0.7
