"""Fits the priors of attention kernels to the published rows that SPLIT.csv lets be fitted, and prints them as TOML.

    python tests/benchmarks/fit_priors.py

Rows of one implementation and architecture share one set of constants; decode's are shared by all architectures.  InferSim times
a call from the host: decodes below 100 us sit at its 26 us whatever their size, so they are left out.  Minimised: the Huber loss of log(predicted /
published) plus a weak pull of each log-constant towards its start, which decides what the rows leave open.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize

from simulator.calibration import Calibration, Constants, Family
from simulator.published import Asked, NotComparableError, measurements, question, role
from simulator.published.kernels import IMPLEMENTATIONS
from simulator.units import Array

#: Standard deviation of a constant about its start, in log, in units of a row's error.
PULL = 0.1
HUBER = 0.15
#: What may move, by kernel; launch_s where the smallest rows show it.
FREE = {
    "attention": ("tensor", "special", "depth_half"), "attention_backward": ("tensor",), "decode_attention": ("memory", "launch_s"),
    "elementwise": ("memory",),
}  # fmt: skip
#: Where each fit starts, whatever priors.toml holds by now.
STARTS = {
    "attention": Constants(tensor=0.66, special=0.9, memory=0.85, depth_half=256.0, launch_s=3e-6, power=4),
    "attention_backward": Constants(tensor=0.52, special=0.9, memory=0.85, depth_half=256.0, launch_s=6e-6, power=4),
    "decode_attention": Constants(tensor=0.5, special=0.9, memory=0.8, launch_s=6e-6, power=4),
    "elementwise": Constants(memory=0.8, launch_s=2e-6, power=4),
}
#: Seconds from which a call's own launch no longer shows.
LONG_S = 100e-6


def groups() -> dict[tuple[str, str, tuple[str, ...]], list[tuple[str, Asked]]]:
    """Fit rows with their series, by (architecture, implementation, kernels that run)."""
    found: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, Asked]]] = defaultdict(list)
    for row in measurements():
        if role(row) != "fit":
            continue
        try:
            asked = question(row)
        except NotComparableError:
            continue
        assert asked.cluster is not None
        architecture, impl, kernels = asked.cluster.gpu.architecture, IMPLEMENTATIONS.get(row.kernel_or_engine), ("attention", "attention_backward")
        if row.source == "infersim" and (asked.measured < LONG_S or "mha" not in row.model):
            continue
        if row.source == "infersim" or "generation_attention" in row.table_or_section:
            architecture, impl, kernels = "", "", ("decode_attention",)
        elif impl == "unfused":
            architecture, impl, kernels = "", "softmax", ("elementwise",)
        elif impl in {"flash3", "cudnn", "tilelang"} or (impl == "triton" and architecture == "hopper"):
            kernels = ("attention",)  # no backward among the rows
        if impl is not None:
            found[architecture, impl, kernels].append((f"{row.source} | {row.series}", asked))
    return found


def fit(rows: list[Asked], impl: str, kernels: tuple[str, ...]) -> tuple[dict[Family, Constants], Array]:
    """Constants of the kernels, and log(predicted / published) of the rows."""
    starts = {(k, impl, ""): STARTS[k] for k in kernels}
    names = [(family, name) for family in starts for name in FREE[family[0]]]

    def families(theta: Array) -> dict[Family, Constants]:
        made = dict(starts)
        for (family, name), shift in zip(names, theta, strict=True):
            made[family] = replace(made[family], **{name: getattr(starts[family], name) * math.exp(shift)})
        first = made[next(iter(made))]
        if ("attention_backward", impl, "") in made:
            made["attention_backward", impl, ""] = replace(
                made["attention_backward", impl, ""], special=first.special, depth_half=first.depth_half, power=first.power
            )
        return made

    def errors(theta: Array) -> Array:
        made = families(theta)
        found = []
        for asked in rows:
            assert asked.cluster is not None
            there = Calibration.load(asked.cluster.gpu)
            one = Calibration(there.gpu, {**there.families, **made}, there.common_sigma)
            found.append(math.log(asked.answer(one).value / asked.measured))
        return np.array(found)

    def loss(theta: Array) -> float:
        size = np.abs(errors(theta))
        huber = np.where(size < HUBER, size**2, 2 * HUBER * size - HUBER**2)
        return float(huber.sum() + PULL**2 * (theta**2).sum())

    best = minimize(loss, np.zeros(len(names)), method="Powell", options={"xtol": 1e-3, "ftol": 1e-6})
    return families(best.x), errors(best.x)


def main() -> None:
    """Print every family."""
    for (architecture, impl, kernels), rows in sorted(groups().items()):
        made, errors = fit([asked for _, asked in rows], impl, kernels)
        series = sorted({name for name, _ in rows})
        print(f"# {architecture or 'all'} {impl or 'default'}: {len(rows)} rows, median |log error| {np.median(np.abs(errors)):.3f}")
        for (kernel, name, _), c in made.items():
            keys = {"kernel": kernel} | ({"impl": name} if name else {}) | ({"architecture": architecture} if architecture else {})
            values = {f: float(f"{getattr(c, f):.3g}") for f in ("tensor", "special", "memory", "depth_half", "launch_s")}
            # one curve says little of the next
            values["sigma"] = max(0.15 if len(series) > 1 else 0.25, round(1.5 * float(np.std(errors)), 2))
            cited = ", ".join(sorted({one.partition(" | ")[0] for one in series}))
            print("[[family]]\n" + "\n".join(f'{k} = "{v}"' for k, v in keys.items()))
            print("\n".join(f"{f} = {v}" for f, v in values.items()) + f"\npower = {c.power}")
            print(f'basis = "analytic"\nrows = {len(rows)}\nsource = "fitted to the fit rows of {cited} ({len(series)} series)"\n')


if __name__ == "__main__":
    main()
