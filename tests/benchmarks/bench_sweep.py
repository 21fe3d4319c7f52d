"""How fast the simulator answers: `python tests/benchmarks/bench_sweep.py`.  Prints rates, asserts nothing.

Rows of a sweep are drawn independently: layout, batch, context, prefix and chunk all differ from row to row.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from simulator import Calibration, Decode, Layout, Prefill, cluster, estimate, load_model, sweep  # noqa: E402
from simulator.engines import Vllm  # noqa: E402
from simulator.estimate import bare  # noqa: E402
from simulator.planner import layouts  # noqa: E402

ROWS, GPUS = 65_536, 8
MODELS = ("meta-llama/Meta-Llama-3.1-70B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-120b", "deepseek-ai/DeepSeek-V4-Pro")
DEGREES = ("tp", "pp", "dp", "ep")


def best(action: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of several runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken)


def drawn(name: str, rows: int, *, prefill: bool) -> tuple[Layout, Any]:
    """A question of `rows` rows, each with its own layout and phase."""
    random = np.random.default_rng(20261123)
    spec = load_model(name)
    allowed = [x for gpus in (1, 2, 4, GPUS) for x in layouts(spec, gpus) if not list(x.refusals(spec)) and x.dp == x.dp_attention == x.dcp == 1]
    picked = random.integers(len(allowed), size=rows)
    degrees = {d: np.array([float(getattr(x, d)) for x in allowed])[picked] for d in DEGREES}
    context = np.round(2 ** random.uniform(10, 20, rows))
    batch = random.integers(1, 65, rows).astype(float)
    if not prefill:
        return Layout(**degrees), Decode(context, batch)
    prefix = np.floor(context * random.choice([0.0, 0.5, 0.9], rows))
    return Layout(**degrees), Prefill(context, batch, prefix, np.round(2 ** random.uniform(10, 14, rows)))


def bench_sweeps() -> None:
    """Rows per second: one row is a prefill by runs and a decode step, bound and expected, and the footprint."""
    part = cluster("h200", GPUS)
    for name in MODELS:
        spec = load_model(name)
        (layout, fill), (_, step) = drawn(name, ROWS, prefill=True), drawn(name, ROWS, prefill=False)

        def row(spec: Any = spec, layout: Any = layout, fill: Any = fill, step: Any = step) -> None:
            sweep(spec, part, layout, fill)
            sweep(spec, part, layout, step, with_footprint=False)

        print(f"sweep     {name:46} {'row':20} {ROWS / best(row, 6):12,.0f} rows/s")


def bench_single() -> None:
    """Bare estimates per second, and milliseconds of a full one."""
    part, engine = cluster("h200", 8), Vllm()
    calibration = Calibration.load(part.gpu)
    for name in MODELS:
        spec, layout = load_model(name), Layout(tp=8)
        for label, phase in (("prefill", Prefill(131_072.0, chunk=8192.0)), ("decode", Decode(131_072.0, 8.0))):
            times = 200
            seconds = best(lambda: [bare(spec, part, layout, phase, calibration=calibration, with_footprint=False) for _ in range(times)])  # noqa: B023
            print(f"bare      {name:46} {label:20} {times / seconds:12,.0f} /s")
            seconds = best(lambda: estimate(spec, part, layout, phase, engine=engine), 20)  # noqa: B023
            print(f"estimate  {name:46} {label:20} {seconds * 1e3:12.2f} ms")


def bench_commands() -> None:
    """Seconds of whole commands in fresh processes."""
    for words in (
        ["--help"], ["kv", "gpt-oss-120b", "--context", "1M"], ["size", "Qwen2.5-14B-Instruct-1M", "--gpus", "8", "--context", "1M"],
        ["size", "DeepSeek-V3", "--gpus", "16", "--context", "1M", "--exit-zero"],
    ):  # fmt: skip
        command = [sys.executable, "-m", "simulator", *words]
        seconds = best(lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL))  # noqa: B023
        print(f"command   {'longctx ' + ' '.join(words):67} {seconds:12.2f} s")


def bench_wheel() -> None:
    """Bytes of the wheel, where it can be built."""
    with tempfile.TemporaryDirectory() as folder:
        built = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=False, capture_output=True)
        wheels = list(Path(folder).glob("*.whl"))
        if built.returncode or not wheels:
            print("wheel     not built: hatchling is not installed here")
            return
        print(f"wheel     {wheels[0].name:67} {wheels[0].stat().st_size / 2**20:12.2f} MiB")


def main() -> None:
    """Everything, with the machine it ran on."""
    print(f"python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    for part in (bench_sweeps, bench_single, bench_commands, bench_wheel):
        part()


if __name__ == "__main__":
    main()
