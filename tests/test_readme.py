"""What the README promises: its example runs, and its two commands exist."""

from __future__ import annotations

import re

import pytest

from simulator.data import data_path

README = (data_path().parent / "README.md").read_text(encoding="utf-8")
MAKEFILE = (data_path().parent / "Makefile").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "327,680 B per token, 40 GiB at 128K" in out
    assert re.search(r"prefill [\d.]+ s, at least [\d.]+ s; decode [\d.]+ ms", out)


def test_the_two_commands_are_targets() -> None:
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)
