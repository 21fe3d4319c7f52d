"""Fits the priors of attention kernels to the published rows that SPLIT.csv lets be fitted, and prints them as TOML.

    python tests/benchmarks/fit_priors.py

Rows of one implementation and architecture share one set of constants.  InferSim times a call from the host: decodes below 100 us
sit at its 26 us whatever their size, so they are left out.  Minimised: the Huber loss of log(predicted /
published) plus a weak pull of each log-constant towards its start, which decides what the rows leave open.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import fields, replace

import numpy as np
from scipy.optimize import minimize

from simulator.calibration import Calibration, Constants, Family, carried
from simulator.hardware import STAND_IN, Gpu, gpu
from simulator.published import Asked, NotComparableError, measurements, question, role
from simulator.published.kernels import IMPLEMENTATIONS
from simulator.units import Array

#: Standard deviation of a constant about its start, in log, in units of a row's error.
PULL = 0.1
HUBER = 0.15
#: What may move, by kernel; launch_s where the smallest rows show it.
FREE = {
    "attention": ("tensor", "special", "depth_half"), "attention_backward": ("tensor",),
    "decode_attention": ("tensor", "memory", "launch_s", "merge_s"), "elementwise": ("memory",),
    "index_scores": ("tensor", "launch_s"), "chunk_scan": ("tensor", "launch_s"),
}  # fmt: skip
#: Rows of latent prefills from 6,144 tokens on say nothing of short loops.
LONG_ONLY = {("blackwell", "attention"): ("tensor", "special")}
#: Where each fit starts, whatever priors.toml holds by now: the shape measured on an H200 (its cuDNN attention and copy, its decode's
#: fixed times), carried to another tensor core as a borrowing board carries it.
STARTS = {
    "attention": Constants(tensor=0.79, special=0.915, memory=0.95, depth_half=171.0, split=1.3, wave=1.0, variant=0.93, launch_s=3e-6, power=4),
    "attention_backward": Constants(
        tensor=0.63, special=0.477, memory=0.78, depth_half=348.0, split=1.9, wave=0.48, variant=0.69, launch_s=6e-6, power=4
    ),
    "decode_attention": Constants(tensor=0.6, memory=0.85, launch_s=8.9e-6, merge_s=5.4e-8, power=8),
    "elementwise": Constants(memory=0.84, launch_s=2.1e-6, power=1),
    "index_scores": Constants(tensor=0.5, memory=0.9, depth_half=64.0, launch_s=6e-6, power=4),
    "chunk_scan": Constants(tensor=0.05, memory=0.7, launch_s=12e-6, power=4),
}
#: Attention measured on an H200, whose shape every other Hopper board borrows.
MEASURED = ("cudnn", "flash2")
#: Where rows of one dtype say nothing of another: reading an fp8 cache costs conversions.
DTYPES = {("decode_attention", "flash3"): {"dtype": "bf16"}}
#: Constants a family of priors states.
SHAPE = ("tensor", "special", "memory", "depth_half", "split", "variant", "wave", "launch_s", "merge_s")
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
        if architecture == "hopper" and impl in MEASURED:
            continue
        if row.source == "infersim":
            impl, kernels = "flash3", ("decode_attention",)
        elif "generation_attention" in row.table_or_section:
            impl, kernels = "", ("decode_attention",)
        elif row.kernel_or_engine.endswith("TRTLLM_RAGGED"):
            impl, kernels = "", ("attention",)
        elif impl == "unfused":
            architecture, impl, kernels = "", "softmax", ("elementwise",)
        elif impl in {"flash3", "cudnn", "tilelang"} or (impl == "triton" and architecture == "hopper"):
            kernels = ("attention",)  # no backward among the rows
        elif row.kernel_or_engine.endswith("fp8_paged_mqa_logits"):
            architecture, impl, kernels = "", "", ("index_scores",)
        elif row.kernel_or_engine.endswith("chunk_gated_delta_rule"):
            architecture, impl, kernels = "", "", ("chunk_scan",)
        if impl is not None:
            found[architecture, impl, kernels].append((f"{row.source} | {row.series}", asked))
    return found


def start(kernel: str, part: Gpu) -> Constants:
    """The H200's shape on another board's tensor cores."""
    return carried((kernel, "", "bf16"), STARTS[kernel], part, gpu(STAND_IN))


def fit(rows: list[Asked], impl: str, kernels: tuple[str, ...], *, everywhere: bool = False) -> tuple[dict[Family, Constants], Array]:
    """Constants of the kernels, and log(predicted / published) of the rows.

    `everywhere`: of no architecture, so an H200's, carried to each row's board.
    """
    assert rows[0].cluster is not None
    part = gpu(STAND_IN) if everywhere else rows[0].cluster.gpu
    starts = {(k, impl, ""): start(k, part) for k in kernels}
    names = [(family, name) for family in starts for name in LONG_ONLY.get((part.architecture, family[0]), FREE[family[0]])]

    def families(theta: Array) -> dict[Family, Constants]:
        made = dict(starts)
        for (family, name), shift in zip(names, theta, strict=True):
            made[family] = replace(made[family], **{name: getattr(starts[family], name) * math.exp(shift)})
        first = made[next(iter(made))]
        if ("attention_backward", impl, "") in made:
            backward, forward = made["attention_backward", impl, ""], starts["attention", impl, ""]
            made["attention_backward", impl, ""] = replace(
                backward, special=backward.special * first.special / forward.special,
                depth_half=backward.depth_half * first.depth_half / forward.depth_half,
            )  # fmt: skip
        return made

    def errors(theta: Array) -> Array:
        made = families(theta)
        found = []
        for asked in rows:
            assert asked.cluster is not None
            there = Calibration.load(asked.cluster.gpu)
            others = {f: c for f, c in there.families.items() if (*f[:2], "") not in made}
            own = {f: carried(f, c, asked.cluster.gpu, part) for f, c in made.items()} if everywhere else made
            one = Calibration(there.gpu, {**others, **own}, there.common_sigma)
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
        made, errors = fit([asked for _, asked in rows], impl, kernels, everywhere=not architecture)
        series = sorted({name for name, _ in rows})
        print(f"# {architecture or 'all'} {impl or 'default'}: {len(rows)} rows, median |log error| {np.median(np.abs(errors)):.3f}")
        for (kernel, name, _), c in made.items():
            keys = {"kernel": kernel} | ({"impl": name} if name else {}) | DTYPES.get((kernel, name), {})
            keys |= {"architecture": architecture} if architecture else {}
            values = {f.name: float(f"{getattr(c, f.name):.3g}") for f in fields(c) if f.name in SHAPE and getattr(c, f.name) != f.default}
            # one curve says little of the next
            values["sigma"] = max(0.15 if len(series) > 2 else 0.25, round(1.5 * float(np.std(errors)), 2))
            cited = ", ".join(sorted({one.partition(" | ")[0] for one in series}))
            print("[[family]]\n" + "\n".join(f'{k} = "{v}"' for k, v in keys.items()))
            print("\n".join(f"{f} = {v}" for f, v in values.items()) + f"\npower = {c.power}")
            print(f'basis = "analytic"\nrows = {len(rows)}\nsource = "fitted to the fit rows of {cited} ({len(series)} series)"\n')


if __name__ == "__main__":
    main()
