"""Benchmarks that need torch or Triton are not collected where these are missing; figures that tests tell are printed at the end."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

BENCHMARKS = sorted(str(file) for file in (Path(__file__).parent / "microbench").rglob("*.py"))
WITHOUT_TORCH = ("__init__", "case", "cli")

collect_ignore: list[str] = []
if find_spec("torch") is None:
    collect_ignore = [file for file in BENCHMARKS if Path(file).stem not in WITHOUT_TORCH]
elif find_spec("triton") is None:
    collect_ignore = [file for file in BENCHMARKS if Path(file).stem == "kernels_triton"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests recorded under "told", also those that ran in another process."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    told = [text for report in reports for name, text in getattr(report, "user_properties", []) if name == "told"]
    if told:
        terminalreporter.section("figures")
        for text in told:
            terminalreporter.write_line(text)
