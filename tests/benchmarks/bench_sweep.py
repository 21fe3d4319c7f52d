"""How fast the simulator answers: `python tests/benchmarks/bench_sweep.py`.  Prints rates beside their bars, asserts nothing.

Sweeps and commands are timed by the clock, single answers by the seconds of this process.  Rows of a sweep are drawn independently:
layout, batch, context, prefix and chunk all differ from row to row.  So do the questions asked one at a time: "first" asks each
as if none had been asked before, "asked on" 20,000 in turn of all layouts, what is recorded for the next included, "settled"
20,000 others after them.
"""

from __future__ import annotations

import functools
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
from simulator.estimate import bare, folded  # noqa: E402
from simulator.planner import layouts  # noqa: E402

ROWS, GPUS = 65_536, 8
MODELS = ("meta-llama/Meta-Llama-3.1-70B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-120b", "deepseek-ai/DeepSeek-V4-Pro")
DEGREES = ("tp", "pp", "dp", "ep")
#: Rows per second of a sweep; the models not named have no bar.
SWEEP_BARS = dict(zip(MODELS, (1_000_000, 300_000, 300_000), strict=False))
SINGLE_BAR, ESTIMATE_BAR_MS, COMMAND_BAR_S, WHEEL_BAR_MIB = 5_000, 3.0, 0.5, 2e6 / 2**20


def shown(kind: str, what: str, value: float, unit: str, *, least: float | None = None, most: float | None = None, digits: int = 0) -> None:
    """One line: a value beside its bar and whether it is met."""
    bar = least if least is not None else most
    met = "" if bar is None else f"   bar {bar:,.{digits}f}: {'met' if (value >= bar if least is not None else value <= bar) else 'NOT met'}"
    print(f"{kind:9} {what:67} {value:12,.{digits}f} {unit:7}{met}", flush=True)


def best(action: Callable[[], Any], times: int = 3, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of several runs."""
    taken = []
    for _ in range(times):
        start = now()
        action()
        taken.append(now() - start)
    return min(taken)


def busy(action: Callable[[], Any], times: int = 3) -> float:
    """Seconds of this process alone, whatever else the machine does."""
    return best(action, times, time.process_time)


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

        shown("sweep", name, ROWS / best(row, 6), "rows/s", least=SWEEP_BARS.get(name))


def bench_single() -> None:
    """Bare estimates per second, one question at a time, its time alone, over layouts of 8 GPUs and every kind of question."""
    part, random = cluster("h200", GPUS), np.random.default_rng(20261124)
    calibration = Calibration.load(part.gpu)
    for name in MODELS:
        spec = load_model(name)
        found = [x for x in layouts(spec, GPUS) if not list(x.refusals(spec)) and x.dp == x.dp_attention == x.dcp == 1]
        for label in ("prefill", "decode"):

            def asked(number: int, label: str = label) -> list[Prefill | Decode]:
                draws = zip(np.round(2 ** random.uniform(10, 20, number)), random.integers(1, 65, number), random.random(number), strict=True)
                if label == "decode":
                    return [Decode(float(c), float(b)) for c, b, _ in draws]
                # half of them from an empty cache, half after a prefix; four in five end in a ragged chunk
                chunks = [2048.0, 8192.0, 1000.0, 3333.0, 16384.0]
                return [Prefill(float(c), float(b), float(np.floor(c * max(x - 0.5, 0.0))), chunks[i % 5]) for i, (c, b, x) in enumerate(draws)]

            def first(phases: list[Prefill | Decode], spec: Any = spec) -> None:
                for i, phase in enumerate(phases):
                    folded(spec, part, found[i % len(found)], phase, calibration, None, None, with_footprint=False)  # noqa: B023

            def on(phases: list[Prefill | Decode], spec: Any = spec) -> None:
                for i, phase in enumerate(phases):
                    bare(spec, part, found[i % len(found)], phase, calibration=calibration, with_footprint=False)  # noqa: B023

            what = f"{name} {label}, {len(found)} layouts"
            shown("single", f"{what}: first", 300 / busy(functools.partial(first, asked(300))), "/s")
            shown("single", f"{what}: asked on", 20_000 / busy(functools.partial(on, asked(20_000)), 1), "/s", least=SINGLE_BAR if name in SWEEP_BARS else None)
            shown("single", f"{what}: settled", 20_000 / busy(functools.partial(on, asked(20_000)), 1), "/s", least=SINGLE_BAR if name in SWEEP_BARS else None)


def bench_estimate() -> None:
    """Milliseconds of a full estimate: rows, interval, footprint and an engine's host work."""
    part, engine = cluster("h200", GPUS), Vllm()
    phases = {"decode": Decode(131_072.0, 8.0), "chunks": Prefill(131_072.0, chunk=8192.0), "ragged chunks": Prefill(131_000.0, 3.0, chunk=2000.0)}
    for name in MODELS:
        spec = load_model(name)
        for layout in (Layout(tp=8), Layout(pp=8)):
            for label, phase in phases.items():
                seconds = busy(lambda: estimate(spec, part, layout, phase, engine=engine), 20)  # noqa: B023
                shown("estimate", f"{name} {layout}, {label}", seconds * 1e3, "ms", most=ESTIMATE_BAR_MS if name in SWEEP_BARS else None, digits=2)


def bench_commands() -> None:
    """Seconds of whole commands in fresh processes."""
    for words in (
        ["--help"], ["kv", "gpt-oss-120b", "--context", "1M"], ["size", "Qwen2.5-14B-Instruct-1M", "--gpus", "8", "--context", "1M"],
        ["size", "DeepSeek-V3", "--gpus", "16", "--context", "1M", "--exit-zero"],
    ):  # fmt: skip
        command = [sys.executable, "-m", "simulator", *words]
        seconds = best(lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL))  # noqa: B023
        shown("command", "longctx " + " ".join(words), seconds, "s", most=COMMAND_BAR_S, digits=2)


def bench_wheel() -> None:
    """Bytes of the wheel, where it can be built."""
    with tempfile.TemporaryDirectory() as folder:
        built = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=False, capture_output=True)
        wheels = list(Path(folder).glob("*.whl"))
        if built.returncode or not wheels:
            print("wheel     not built: hatchling is not installed here")
            return
        shown("wheel", wheels[0].name, wheels[0].stat().st_size / 2**20, "MiB", most=WHEEL_BAR_MIB, digits=2)


def main() -> None:
    """Everything, with the machine it ran on."""
    print(f"python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    for part in (bench_sweeps, bench_single, bench_estimate, bench_commands, bench_wheel):
        part()


if __name__ == "__main__":
    main()
