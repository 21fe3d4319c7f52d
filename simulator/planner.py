"""Which layout: a grid, a mask with its reasons, the best of the rest.

Layouts are compared by the time the mean request takes when `concurrency` of them arrive together
(`serving.latency`): it weighs time to first token, queueing and decoding at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from simulator import prefill_context, reach
from simulator.cache_moves import Moves, moves
from simulator.calibration import Calibration
from simulator.engines.vllm import Capacity, Vllm
from simulator.hardware import Cluster, cluster
from simulator.layers import Attention, LatentAttention, MoE
from simulator.model import ModelSpec
from simulator.parallel import DEGREES, Layout
from simulator.serving import Request, Service, Speed, serve, speed
from simulator.units import gib

#: A context longer than this is not limited by memory: every layer's cache is bounded.
UNLIMITED_TOKENS = 2**34

#: The largest gpu_memory_utilization one can sensibly ask for.
_MOST_FRACTION = 0.97

#: Numbers of GPUs tried for the smallest cluster: powers of two in a node, then whole nodes.
_MOST_GPUS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A layout with what it holds and, if it fits, how fast it is."""

    layout: Layout
    capacity: Capacity
    longest: int
    short_bytes: float
    speed: Speed | None = None

    @property
    def fits(self) -> bool:
        """Whether the asked requests fit together."""
        return self.short_bytes <= 0


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The choice, what came second, and why others were left out."""

    model: ModelSpec
    cluster: Cluster
    request: Request
    engine: Vllm
    best: Candidate
    runner_up: Candidate | None
    candidates: list[Candidate]
    refused: dict[str, int]
    longest: Candidate
    smallest_gpus: int | None
    service: Service | None
    warnings: list[str] = field(default_factory=list)
    prefill_context: str | None = None
    moves: Moves | None = None

    @property
    def fits(self) -> bool:
        """Whether the best layout holds the asked requests."""
        return self.best.fits

    @property
    def binding_constraint(self) -> str | None:
        """What is short: the cache, or already the weights and activations."""
        if self.fits:
            return None
        return "weights" if self.best.capacity.available_bytes <= 0 else "cache"

    @property
    def tie(self) -> bool:
        """Whether the runner-up cannot be told apart from the choice: it lies inside the interval of the times."""
        if self.runner_up is None or self.runner_up.speed is None or self.best.speed is None or self.service is None:
            return False
        times = self.service.cold.seconds
        return float(self.runner_up.speed.latency_s) < float(self.best.speed.latency_s) * times.high / times.value


def layouts(model: ModelSpec, gpus: int, engine: Vllm | None = None) -> Iterator[Layout]:
    """Every layout of exactly `gpus` GPUs worth asking about; with an `engine`, those that split prompts as it does."""
    if engine is not None and engine.splits_prompts(model):
        yield from _split_prompts(model, gpus, engine)
    experts = any(isinstance(layer, MoE) for layer in model.layers)
    shared = min((_cache_heads(model)), default=1)
    for tp in _divisors(gpus):
        for pp in _divisors(gpus // tp):
            for dp in _divisors(gpus // tp // pp):
                rest = gpus // tp // pp // dp
                if rest > 1 and not experts:
                    continue
                for dcp in _divisors(max(1, tp // shared)):
                    yield from _expert_choices(Layout(tp, pp, dp, 1, dcp, rest), experts)


def _split_prompts(model: ModelSpec, gpus: int, engine: Vllm) -> Iterator[Layout]:
    """Layouts with context parallelism of prefill: experts over all ranks that share a prompt."""
    experts = any(isinstance(layer, MoE) for layer in model.layers)
    for cp in _divisors(gpus)[1:]:
        for tp in _divisors(gpus // cp):
            for pp in _divisors(gpus // cp // tp):
                dp = gpus // cp // tp // pp
                yield engine.arranged(Layout(tp=tp, pp=pp, dp=dp, cp=cp, ep=tp * cp if experts else 1))


def _expert_choices(layout: Layout, experts: bool) -> Iterator[Layout]:
    group = int(layout.tp * layout.dp_attention)
    if layout.dp_attention == 1:
        yield layout
    if experts and group > 1:
        yield replace(layout, ep=group)


def _cache_heads(model: ModelSpec) -> Iterator[int]:
    for layer in model.layers:
        if isinstance(layer, Attention):
            yield layer.num_key_value_heads
        elif isinstance(layer, LatentAttention):
            yield 1


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def refusals(model: ModelSpec, layout: Layout, engine: Vllm, gpus_per_node: int = 8) -> list[str]:
    """Why a layout is out: the schemes' rules, then the engine's."""
    return [*layout.refusals(model), *engine.refusals(model, layout, gpus_per_node)]


def stack(chosen: list[Layout]) -> Layout:
    """Many layouts as one whose degrees are arrays."""
    columns = {name: [float(getattr(layout, name)) for layout in chosen] for name in DEGREES}
    arrays = {name: np.array(column) for name, column in columns.items() if name == "tp" or max(column) > 1}
    return replace(chosen[0], **{**dict.fromkeys(DEGREES, 1), **arrays})  # type: ignore[arg-type]


def _apart(chosen: Sequence[Layout]) -> list[list[int]]:
    """Which of them are evaluated together: ranks that share prompts do other things than those that do not."""
    found: dict[bool, list[int]] = {}
    for place, layout in enumerate(chosen):
        found.setdefault(bool(layout.cp * layout.ulysses > 1), []).append(place)
    return list(found.values())


def hold(model: ModelSpec, chosen: list[Layout], machine: Cluster, request: Request, engine: Vllm) -> list[Candidate]:
    """What each layout holds of the request."""
    places = _apart(chosen)
    if len(places) == 1:
        return _held(model, chosen, machine, request, engine)
    found: dict[int, Candidate] = {}
    for some in places:
        found |= dict(zip(some, _held(model, [chosen[i] for i in some], machine, request, engine), strict=True))
    return [found[i] for i in range(len(chosen))]


def _held(model: ModelSpec, chosen: list[Layout], machine: Cluster, request: Request, engine: Vllm) -> list[Candidate]:
    """The same, of layouts that are evaluated together."""
    together = stack(chosen)
    capacity = engine.capacity(model, together, machine, request.context)
    longest = engine.longest(model, together, machine, capacity, request.concurrency)
    needed = (np.ceil(request.concurrency / capacity.replicas) * capacity.blocks_per_sequence + 1) * capacity.block_bytes
    held = capacity.blocks * capacity.block_bytes
    short = np.where(capacity.available_bytes > 0, needed - held, needed - capacity.available_bytes)
    return [
        Candidate(layout, capacity.at(i), int(np.broadcast_to(longest, short.shape)[i]), float(short[i]))
        for i, layout in enumerate(chosen)
    ]


def timed(
    model: ModelSpec, candidates: list[Candidate], machine: Cluster, request: Request, engine: Vllm, calibration: Calibration
) -> list[Candidate]:
    """Candidates with their times, the best first.  Where the means differ by less than 3 %, no answer here could tell
    them apart: the one with fewer kinds of parallelism comes first, then the one with the earlier first token.
    """
    if not candidates:
        return []
    found = []
    for places in _apart([c.layout for c in candidates]):
        some = [candidates[i] for i in places]
        times = speed(model, stack([c.layout for c in some]), machine, request, engine=engine, calibration=calibration)
        parts = [np.broadcast_to(t, (len(some),)) for t in (times.ttft_s, times.tpot_s, times.latency_s)]
        found += [replace(c, speed=Speed(*(float(p[i]) for p in parts))) for i, c in enumerate(some)]
    least = min(float(c.speed.latency_s) for c in found if c.speed is not None)

    def rank(c: Candidate) -> tuple[bool, float, float]:
        assert c.speed is not None
        close = c.speed.latency_s <= 1.03 * least
        kinds = sum(getattr(c.layout, name) > 1 for name in DEGREES)
        return (not close, kinds if close else float(c.speed.latency_s), float(c.speed.ttft_s))

    return sorted(found, key=rank)


def size(
    model: ModelSpec, machine: Cluster, request: Request, *, engine: Vllm | None = None,
    calibration: Calibration | None = None, fixed: dict[str, Any] | None = None,
    price_usd_per_gpu_hour: float | None = None,
) -> Plan:  # fmt: skip
    """Does it fit, how, how fast, and at what price.  `fixed` holds the degrees, and ways to share tokens, the user insists on.

    Errors: ValueError where the degrees break a rule or make no layout of the cluster's GPUs.
    """
    engine, calibration = engine or Vllm(), calibration or Calibration.load(machine.gpu)
    kept, refused = allowed(model, machine, engine, fixed or {})
    candidates = _ranked(model, kept, machine, request, engine, calibration)
    best, second = candidates[0], candidates[1] if len(candidates) > 1 and candidates[1].fits else None
    service = None
    if best.fits:
        service = serve(
            model, best.layout, machine, request, engine=engine, calibration=calibration,
            price_usd_per_gpu_hour=machine.price_usd_per_gpu_hour if price_usd_per_gpu_hour is None else price_usd_per_gpu_hour,
        )  # fmt: skip
    moved = None
    if service is not None:
        moved = moves(
            model, best.layout, machine, prompt=request.prompt, cached=service.cached_tokens, prefill_s=service.cold.seconds.value, engine=engine,
            calibration=calibration,
        )  # fmt: skip
    rules = [told.split(":", 1)[0].split(" ")[0] for _, told in refused]
    return Plan(
        model, machine, request, engine, best, second, candidates, {rule: rules.count(rule) for rule in dict.fromkeys(rules)},
        max(candidates, key=lambda c: c.longest), smallest(model, machine, request, engine), service,
        [*warnings(model, request, machine), *engine.warnings(model)],
        prefill_context.told(model, machine, request, engine, calibration, [(c.layout, c.speed) for c in candidates]), moved,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """A layout that was considered: whether it holds the request, and the verdict in one line.

    `holds` is how many such requests fit together, `longest` the most tokens each of them may have.  `speed` is what layouts
    are ordered by; `service` has the same with intervals, rates and prices, for the first of a plan.
    """

    layout: Layout
    fits: bool
    verdict: str
    holds: int = 0
    longest: int = 0
    speed: Speed | None = None
    service: Service | None = None


def plan(
    model: ModelSpec, machine: Cluster, request: Request, *, engine: Vllm | None = None,
    calibration: Calibration | None = None, fixed: dict[str, Any] | None = None,
    price_usd_per_gpu_hour: float | None = None, detailed: int = 8,
) -> list[Option]:  # fmt: skip
    """Every layout of the machine that was considered for `request`, best first: those that hold it by the time of the mean
    request, then those that do not by what they lack, then those a rule forbids.  The first `detailed` that hold it come with
    their `Service`.  `size` is the first of them in full.

    Errors: ValueError where the degrees of `fixed` break a rule or make no layout of the cluster's GPUs.
    """
    engine, calibration = engine or Vllm(), calibration or Calibration.load(machine.gpu)
    kept, refused = allowed(model, machine, engine, fixed or {})
    price = machine.price_usd_per_gpu_hour if price_usd_per_gpu_hour is None else price_usd_per_gpu_hour
    found = []
    for place, c in enumerate(_ranked(model, kept, machine, request, engine, calibration)):
        told = f"fits: {gib(-c.short_bytes)} of cache free per GPU" if c.fits else f"does not fit: {reason(c, model, machine, request)}"
        service = None
        if c.fits and place < detailed:
            service = serve(model, c.layout, machine, request, engine=engine, calibration=calibration, price_usd_per_gpu_hour=price)
        found.append(Option(c.layout, c.fits, told, int(c.capacity.whole_sequences), c.longest, c.speed, service))
    return found + [Option(layout, fits=False, verdict=f"refused: {told}") for layout, told in refused]


def _ranked(
    model: ModelSpec, allowed: list[Layout], machine: Cluster, request: Request, engine: Vllm, calibration: Calibration
) -> list[Candidate]:
    """Layouts that hold the request, the best first, then the others: those that hold some cache, by what they lack."""
    candidates = hold(model, allowed, machine, request, engine)
    short = sorted((c for c in candidates if not c.fits), key=lambda c: (c.capacity.available_bytes <= 0, c.short_bytes))
    return timed(model, [c for c in candidates if c.fits], machine, request, engine, calibration) + short


def allowed(
    model: ModelSpec, machine: Cluster, engine: Vllm, fixed: dict[str, Any]
) -> tuple[list[Layout], list[tuple[Layout, str]]]:
    """Layouts of the grid that obey every rule; the others with the first one they break.  All degrees given: that layout
    alone.
    """
    allowed: list[Layout] = []
    refused: list[tuple[Layout, str]] = []
    chosen = [
        layout for layout in layouts(model, machine.gpus, engine)
        if all(getattr(layout, name) == degree for name, degree in fixed.items())
    ]  # fmt: skip
    if not chosen:
        wanted = Layout(**fixed)
        if wanted.cp > 1:
            wanted = replace(engine.arranged(wanted), **{name: fixed[name] for name in ("order", "passing") if name in fixed})
            if "ep" not in fixed and any(isinstance(layer, MoE) for layer in model.layers):
                wanted = replace(wanted, ep=wanted.tp * wanted.cp)
        for refusal in refusals(model, wanted, engine, machine.gpus_per_node):
            raise ValueError(refusal)
        chosen = [_completed(machine, wanted, replicated="dp" in fixed)]
    for layout in chosen:
        found = refusals(model, layout, engine, machine.gpus_per_node)
        if found:
            refused.append((layout, found[0]))
        else:
            allowed.append(layout)
    if not allowed:
        raise ValueError(refused[0][1])
    return allowed, refused


def _completed(machine: Cluster, layout: Layout, *, replicated: bool) -> Layout:
    """The layout the user asked for, replicas filling the rest unless their number was given; ValueError where the degrees do
    not fill the cluster.
    """
    if not replicated and machine.gpus % int(layout.gpus) == 0:
        layout = replace(layout, dp=machine.gpus // int(layout.gpus))
    if layout.gpus != machine.gpus:
        message = (
            f"layout {layout} takes {int(layout.gpus)} GPUs (tp x cp x pp x dp-attention x dp) and --gpus is {machine.gpus}; "
            f"make the product equal"
        )
        raise ValueError(message)
    return layout


def reason(candidate: Candidate, model: ModelSpec, machine: Cluster, request: Request) -> str:
    """Why a layout does not hold the request, and the nearest thing that would."""
    capacity, layout = candidate.capacity, candidate.layout
    if capacity.available_bytes <= 0:
        return f"weights and activations alone are {gib(-float(capacity.available_bytes))} per GPU too much"
    told = [f"short by {gib(candidate.short_bytes)} per GPU"]
    ranks = float(layout.replica_gpus)
    copies = float(capacity.per_sequence_bytes) * ranks / max(float(model.cache_bytes(float(request.context))), 1.0)
    latent = any(isinstance(layer, LatentAttention) for layer in model.layers)
    kept = round(float(layout.tp) / float(layout.dcp) / (1 if latent else min(_cache_heads(model), default=1)))
    if kept > 1 and copies > 1.5:  # noqa: PLR2004
        told.append(f"{kept} ranks keep copies of the same cache (--dcp removes them)")
    if layout.cp > 1:
        told.append(f"each of its {int(layout.cp)} ranks of context parallelism keeps the whole cache")
    fraction = (float(capacity.usable_bytes) + candidate.short_bytes) / float(machine.gpu.usable_bytes)
    if fraction <= _MOST_FRACTION:
        told.append(f"fits with --memory-fraction {np.ceil(fraction * 200) / 200:g}")
    if candidate.longest:
        told.append(f"holds {request.concurrency} of {candidate.longest:,} tokens")
    return "; ".join(told)


def smallest(model: ModelSpec, machine: Cluster, request: Request, engine: Vllm) -> int | None:
    """The fewest GPUs of this kind on which some layout holds the request."""
    counts = [n for n in (1, 2, 4, 8) if n <= machine.gpus_per_node]
    node = machine.gpus_per_node
    counts += [n * node for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n * node <= _MOST_GPUS]
    weights, joined = float(model.weight_bytes()), max((link.domain for link in machine.tiers), default=1)
    for count in counts:
        if count > joined:
            break
        tried = cluster(machine.gpu, count)
        if weights > count * float(machine.gpu.usable_bytes):
            continue
        # ranks that share a prompt each keep the whole cache: they hold nothing that attention-data parallelism does not
        allowed = [layout for layout in layouts(model, count) if not refusals(model, layout, engine, machine.gpus_per_node)]
        if any(c.fits for c in hold(model, allowed, tried, request, engine)):
            return count
    return None


def warnings(model: ModelSpec, request: Request, machine: Cluster) -> list[str]:
    """What the user must know: reach, what is not modelled, formats the GPU lacks."""
    found = list(model.warnings)
    found += reach.warnings(model, request.context)
    used = {layer.weight.math.name for layer in model.layers if hasattr(layer, "weight")}
    lacking = sorted(math for math in used if not machine.gpu.supports(math))
    found += [f"{machine.gpu.name} has no {math} arithmetic: {math} weights are multiplied in {machine.gpu.runs_as(math)}" for math in lacking]
    if machine.gpu.assumed:
        told = ", ".join(machine.gpu.assumed)
        found.append(f"{machine.gpu.name}: not published: {told} (taken in proportion to an H200's: times are assumed)")
    return found
