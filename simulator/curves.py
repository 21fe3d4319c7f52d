"""An answer arranged for pictures: times and prices over the context, shares of a time, cache by kind of layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator import report
from simulator.calibration import Calibration
from simulator.estimate import Estimate, sweep
from simulator.model import ModelSpec
from simulator.phases import Decode, Prefill
from simulator.planner import Plan
from simulator.units import Array

#: Contexts drawn: powers of two between these, further where more is asked.
_FIRST, _LAST = 2**12, 2**22


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One value per context; `fits` says whether the asked requests fit at that length.  Prices are None where none is known."""

    contexts: Array
    fits: npt.NDArray[np.bool_]
    ttft_s: Array
    tpot_s: Array
    usd_per_million_input: Array | None
    usd_per_million_output: Array | None


def over_context(plan: Plan, price_usd_per_gpu_hour: float | None) -> Curve:
    """Expected times of `plan`'s layout at powers of two and at the asked context, for its concurrency and output.

    TTFT is of a cold prompt; prices as `serving.serve`: price / 3600 x seconds x GPUs x 1e6 / tokens.
    A length fits if it is at most the layout's longest at this concurrency.
    """
    request, layout, engine, machine = plan.request, plan.best.layout, plan.engine, plan.cluster
    last = max(_LAST, 2 ** (request.context - 1).bit_length())
    grid = {2**k for k in range(_FIRST.bit_length() - 1, last.bit_length())} | {request.context}
    contexts = np.array(sorted(c for c in grid if c > request.output), dtype=np.float64)
    prompts, calibration = contexts - request.output, Calibration.load(machine.gpu)
    asked: tuple[Prefill, Decode] = (Prefill(prompts, 1.0, 0.0, float(engine.step_tokens(machine.gpu))), Decode(contexts, float(request.concurrency)))
    ttft, tpot = (
        sweep(plan.model, machine, layout, phase, calibration=calibration, engine=engine, with_footprint=False).seconds for phase in asked
    )
    ttft, tpot = (np.asarray(t, dtype=np.float64) for t in (ttft, tpot))
    replica = float(layout.replica_gpus)
    gpus = replica * float(layout.dp * layout.dp_attention)
    per_second = None if price_usd_per_gpu_hour is None else price_usd_per_gpu_hour / 3600 * 1e6
    return Curve(
        contexts, contexts <= plan.best.longest, ttft, tpot,
        None if per_second is None else per_second * ttft * replica / prompts,
        None if per_second is None else per_second * tpot * gpus / request.concurrency,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpShare:
    """An op of a phase: how often, how long, its percentage of all ops' time, its bound as a percentage of its time, what it waits for."""

    name: str
    count: float
    seconds: float
    share_percent: float
    bound_percent: float
    bound_by: str
    basis: str


def op_shares(estimate: Estimate) -> list[OpShare]:
    """The ops of an estimate, longest first; shares are of their sum, nothing overlapped."""
    rows = report.by_op(report.estimate_document(estimate, {}, [])["rows"])
    total = sum(row["seconds"] for row in rows) or 1.0
    return [
        OpShare(
            row["name"], row["count"], row["seconds"], 100 * row["seconds"] / total, 100 * row["lower"] / row["seconds"] if row["seconds"] else 100.0,
            row["bound_by"], row["basis"],
        )
        for row in rows
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class CacheShare:
    """What all layers of one kind keep of a sequence: in all, and per token of it."""

    layers: float
    kind: str
    keeps: str
    sequence_bytes: float
    token_bytes: float


def cache_shares(model: ModelSpec, context: int) -> list[CacheShare]:
    """By architecture, in the order of the stack; per token is the mean over the sequence, so what does not grow weighs less the longer it is."""
    return [
        CacheShare(row["count"], row["kind"], row["keeps"], row["bytes_per_sequence"], row["bytes_per_sequence"] / context)
        for row in report.kv_document(model, context, {}, {})["layers"]
    ]
