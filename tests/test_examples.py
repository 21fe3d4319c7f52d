"""Every example runs, says something, and does so in seconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from simulator.data import data_path
from tests.test_cli import Say, say  # noqa: F401 (a fixture)

FOLDER = data_path().parent / "examples"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_runs_in_seconds(file: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True, timeout=30, cwd=tmp_path)
    assert len(done.stdout.splitlines()) > 3
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_the_commands_at_the_head_of_an_example_answer(say: Say, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(FOLDER.parent)
    commands = [line[1:].split() for line in file.read_text("utf-8").splitlines() if line.startswith("#   longctx ")]
    assert commands
    for words in commands:
        assert say(*words[1:]).code == 0, words


def test_the_frame_of_the_sweep_is_what_single_answers_say() -> None:
    spec = importlib.util.spec_from_file_location("sweep_to_dataframe", FOLDER / "sweep_to_dataframe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    frame = module.table()
    assert len(frame) == 64
    from simulator import Decode, Layout, cluster, estimate, load_model

    one = frame[(frame.context == 131072) & (frame.batch == 4)].iloc[0]
    alone = estimate(load_model("Qwen2.5-14B-Instruct-1M"), cluster("h200", gpus=8), Layout(tp=8), Decode(context=131072.0, batch=4.0))
    assert one.ms_per_token == pytest.approx(alone.seconds.value * 1e3, rel=1e-9)
    assert one.gib_per_gpu == pytest.approx(float(alone.footprint.total) / 2**30, rel=1e-9)
