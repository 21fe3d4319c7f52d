"""An encoder's answer: a text is read at once, nothing is kept of it and nothing is written.

What takes the place of a cache is the activations of the texts that are read together; of a first token, one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from simulator import planner
from simulator.calibration import Calibration
from simulator.engines.paging import keeps
from simulator.engines.vllm import Vllm
from simulator.estimate import Estimate, Interval, bare, estimate
from simulator.footprint import Footprint
from simulator.hardware import Cluster
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import Prefill, System
from simulator.serving import Request


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A layout with what a GPU holds while `texts` of them are read together on each copy; `short_bytes` is what lacks for one.

    `mean_s` is the time from arrival to answer of the mean of all that arrive together, None where not one fits.
    """

    layout: Layout
    held: Footprint
    texts: int
    short_bytes: float
    step_s: float | None = None
    mean_s: float | None = None

    @property
    def fits(self) -> bool:
        """Whether a text can be read."""
        return self.short_bytes <= 0


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """Times, rates and prices: `alone` is one text by itself, `step` as many as are read together on all copies."""

    alone: Estimate
    step: Estimate
    texts_per_s_per_gpu: Interval
    tokens_per_s_per_gpu: Interval
    usd_per_million_tokens: Interval | None
    usd_per_million_texts: Interval | None
    joules_per_token: Interval | None


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """The choice, what it offers (None where no such text can be read), and what came after it."""

    model: ModelSpec
    cluster: Cluster
    request: Request
    usable_bytes: float
    best: Choice
    choices: list[Choice]
    longest: int
    smallest_gpus: int | None
    served: Served | None
    calibration: Calibration
    warnings: list[str]

    @property
    def fits(self) -> bool:
        """Whether a text can be read, and its positions have rows in the model's table."""
        return self.best.fits and self.request.context <= self.longest


def reads_at_once(model: ModelSpec) -> bool:
    """Whether nothing is kept of a text: an encoder."""
    return not keeps(model)


def read(
    model: ModelSpec, machine: Cluster, request: Request, *, memory_fraction: float | None = None, calibration: Calibration | None = None,
    fixed: dict[str, int] | None = None, price_usd_per_gpu_hour: float | None = None,
) -> Reading:  # fmt: skip
    """Does it fit, how, how fast, and at what price: texts of `request.context` tokens, `request.concurrency` of them at a time.

    No host work is counted, and of the memory only weights and activations: which program serves it is not known.
    Errors: ValueError where the degrees break a rule or make no layout of the cluster's GPUs.
    """
    calibration = calibration or Calibration.load(machine.gpu)
    usable = float(machine.gpu.usable_bytes) * Vllm(memory_fraction).fraction
    layouts, _ = planner.allowed(model, machine, Vllm(), fixed or {})
    choices = sorted((_choice(model, layout, machine, request, usable, calibration) for layout in layouts), key=_rank)
    least = choices[0].mean_s
    if least is not None:
        close = [c for c in choices if c.mean_s is not None and c.mean_s <= 1.03 * least]
        chosen = min(close, key=lambda c: (sum(degree > 1 for degree in (c.layout.tp, c.layout.pp, c.layout.dp)), c.mean_s))
        choices = [chosen, *(c for c in choices if c is not chosen)]
    best = choices[0]
    table = model.reach.encoding.positions or math.inf
    longest = int(min(table, max(_longest(model, c.layout, usable) for c in choices)))
    served = None
    if best.fits and request.context <= longest:
        served = _served(model, best, machine, request, calibration, price_usd_per_gpu_hour)
    return Reading(
        model, machine, request, usable, best, choices, longest, _smallest(model, machine, request, usable), served, calibration,
        planner.warnings(model, replace(request, context=min(request.context, longest)), machine),
    )  # fmt: skip


def _rank(choice: Choice) -> tuple[float, float]:
    return (math.inf if choice.mean_s is None else choice.mean_s, choice.short_bytes)


def _choice(model: ModelSpec, layout: Layout, machine: Cluster, request: Request, usable: float, calibration: Calibration) -> Choice:
    """Activations grow with the tokens of a step: as many texts are read together as wait and fit."""
    system = System(model, layout)
    one = system.footprint(sequences=0.0, context=1.0, step_tokens=float(request.context))
    short = float(one.total) - usable
    if short > 0:
        return Choice(layout, one, 1, short)
    waiting = -(-request.concurrency // int(layout.dp))
    texts = max(1, min(waiting, int((usable - float(one.weights)) / float(one.activations))))
    held = replace(one, activations=one.activations * texts)
    seconds = float(bare(model, machine, layout, _pass(request, texts, layout), calibration=calibration, with_footprint=False).seconds)
    steps = -(-waiting // texts)
    return Choice(layout, held, texts, short, seconds, (steps + 1) / 2 * seconds)


def _pass(request: Request, texts: int, layout: Layout) -> Prefill:
    return Prefill(float(request.context), float(texts) * float(layout.dp))


def _longest(model: ModelSpec, layout: Layout, usable: float) -> float:
    """Tokens of the longest text whose activations fit beside the weights: they are proportional to it."""
    held = System(model, layout).footprint(sequences=0.0, context=1.0, step_tokens=2.0**20)
    return max((usable - float(held.weights)) / float(held.activations) * 2**20, 0.0)


def _smallest(model: ModelSpec, machine: Cluster, request: Request, usable: float) -> int | None:
    """The fewest GPUs, in powers of two up to a node, on which one copy can read one text."""
    count = 1
    while count <= machine.gpus_per_node:
        for layout in planner.layouts(model, count):
            held = System(model, layout).footprint(sequences=0.0, context=1.0, step_tokens=float(request.context))
            if layout.dp == 1 and not list(layout.refusals(model)) and float(held.total) <= usable:
                return count
        count *= 2
    return None


def _served(
    model: ModelSpec, best: Choice, machine: Cluster, request: Request, calibration: Calibration, price_usd_per_gpu_hour: float | None
) -> Served:
    """One text alone, and a step that every copy is full of."""
    layout = best.layout
    alone, step = (
        estimate(model, machine, layout, phase, calibration=calibration)
        for phase in (Prefill(float(request.context), 1.0), _pass(request, best.texts, layout))
    )
    text_seconds = step.seconds.scaled(float(layout.tp * layout.pp) / best.texts)
    token_seconds = text_seconds.scaled(1 / request.context)
    dollars = None if price_usd_per_gpu_hour is None else price_usd_per_gpu_hour / 3600
    watts = float(machine.gpu.tdp_w)
    return Served(
        alone=alone, step=step, texts_per_s_per_gpu=text_seconds.inverse(), tokens_per_s_per_gpu=token_seconds.inverse(),
        usd_per_million_tokens=None if dollars is None else token_seconds.scaled(dollars * 1e6),
        usd_per_million_texts=None if dollars is None else text_seconds.scaled(dollars * 1e6),
        joules_per_token=token_seconds.scaled(watts) if watts else None,
    )  # fmt: skip


def intervals(found: Reading) -> Iterator[tuple[str, Interval, str]]:
    """Every time, rate and price with its unit, as tables name it."""
    served, texts = found.served, found.best.texts * int(found.best.layout.dp)
    if served is None:
        return
    yield "one text alone", served.alone.seconds, "s"
    if texts > 1:
        yield f"{texts:,} texts together", served.step.seconds, "s"
    yield "texts/s/GPU", served.texts_per_s_per_gpu, ""
    yield "tokens/s/GPU", served.tokens_per_s_per_gpu, ""
    if served.usd_per_million_texts is not None:
        yield "$ per million texts", served.usd_per_million_texts, "$"
    if served.joules_per_token is not None:
        yield "J per token (all GPUs at TDP)", served.joules_per_token, "J"


__all__ = ["Choice", "Reading", "Served", "intervals", "read", "reads_at_once"]
