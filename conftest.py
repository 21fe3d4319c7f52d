"""Benchmarks that need torch or Triton are not collected where these are missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

BENCHMARKS = sorted(str(file) for file in (Path(__file__).parent / "microbench").rglob("*.py"))
WITHOUT_TORCH = ("__init__", "case", "cli")

collect_ignore: list[str] = []
if find_spec("torch") is None:
    collect_ignore = [file for file in BENCHMARKS if Path(file).stem not in WITHOUT_TORCH]
elif find_spec("triton") is None:
    collect_ignore = [file for file in BENCHMARKS if Path(file).stem == "kernels_triton"]
