"""All ways to share the tokens of a prefill over the same GPUs, side by side.

Tensor parallelism inside a node where the model allows it, the rest of the GPUs by one of: rings of keys and values in
each order, of queries, gathers, double rings, Ulysses, both, a pipeline of chunks, or tensor parallelism alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from simulator.calibration import Calibration
from simulator.estimate import Estimate, estimate
from simulator.hardware import Cluster
from simulator.layers import Attention
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.parallel.context import tokens_to_hide_kv
from simulator.phases import Prefill, System, TrainStep
from simulator.timeline import Span, timeline
from simulator.timing import Clock
from simulator.units import gib
from simulator.work import Leaf, Message, SecondsOverlapped, fold

#: Tokens of a chunk of the pipeline that stands beside the rings.
PIPELINE_CHUNK = 16384.0


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """One way: what it takes, or why not.  `exposed_s` is what the prefill would save if messages took no time."""

    name: str
    layout: Layout
    refused: str | None = None
    estimate: Estimate | None = None
    exposed_s: float = 0.0
    chunk: float | None = None

    @property
    def limit(self) -> str:
        """Why it is out: a rule, or memory."""
        if self.refused is not None:
            return self.refused
        assert self.estimate is not None
        gpu, held = self.estimate.cluster.gpu, float(self.estimate.footprint.total)
        return "" if held <= float(gpu.usable_bytes) else f"{gib(held)} per GPU do not fit in {gib(float(gpu.usable_bytes))}"


def tensor_degree(model: ModelSpec, machine: Cluster) -> int:
    """The largest degree within a node that the model allows and that divides the GPUs."""
    node = min(machine.gpus_per_node, machine.gpus)
    allowed = [t for t in range(1, node + 1) if machine.gpus % t == 0 and node % t == 0 and not list(Layout(tp=t).refusals(model))]
    return max(allowed)


def contenders(model: ModelSpec, machine: Cluster, tp: int) -> Iterator[tuple[str, Layout, float | None]]:
    """Name, layout and chunk of each way to use all GPUs."""
    n, node = machine.gpus // tp, machine.gpus_per_node
    inner = max(min(node // tp, n), 1)
    ring = Layout(tp=tp, cp=n)
    yield "ring pass-KV zigzag", ring, None
    yield "ring pass-KV contiguous", replace(ring, order="contiguous"), None
    yield "ring pass-KV striped", replace(ring, order="striped"), None
    yield "ring pass-Q zigzag", replace(ring, passing="q"), None
    yield "rule (pass-KV or pass-Q)", replace(ring, passing="auto"), None
    yield "all-gather zigzag", replace(ring, passing="gather"), None
    if 1 < inner < n and n % inner == 0:
        yield f"double ring {n // inner} x {inner}", replace(ring, passing="double", cp_inner=inner), None
    yield f"Ulysses {n}", Layout(tp=tp, ulysses=n), None
    for u in (d for d in range(2, n) if n % d == 0):
        usp = Layout(tp=tp, ulysses=u, cp=n // u)
        if not list(usp.refusals(model)):
            yield f"USP {u} x ring {n // u}", usp, None
    yield f"pipeline of chunks, {n} stages", Layout(tp=tp, pp=n), PIPELINE_CHUNK
    yield "tensor parallel alone", Layout(tp=machine.gpus), None


def compare(
    model: ModelSpec, machine: Cluster, context: int, *, prefix: int = 0, tp: int | None = None, calibration: Calibration | None = None
) -> list[Contender]:
    """Every way with its prefill of one sequence, the fastest that fits first, the refused last."""
    calibration = calibration or Calibration.load(machine.gpu)
    degree = tensor_degree(model, machine) if tp is None else tp
    if machine.gpus % degree:
        message = f"--tp {degree}: it does not divide --gpus {machine.gpus}; use a divisor"
        raise ValueError(message)
    if degree == machine.gpus:
        message = f"--gpus {machine.gpus}: all are taken by --tp {degree}, which leaves no ranks to share tokens; raise --gpus or lower --tp"
        raise ValueError(message)
    for refusal in Layout(tp=degree).refusals(model):
        raise ValueError(refusal)
    found = []
    for name, layout, chunk in contenders(model, machine, degree):
        refused = next(iter(layout.refusals(model)), None)
        if refused is not None:
            found.append(Contender(name, layout, refused, chunk=chunk))
            continue
        hidden = replace(layout, hidden_from=_hidden_from(model, layout, machine, calibration))
        answer = estimate(model, machine, hidden, Prefill(float(context), 1.0, float(prefix), chunk), calibration=calibration)
        found.append(Contender(name, hidden, None, answer, exposed(answer), chunk))
    return sorted(found, key=lambda c: (c.estimate is None, bool(c.limit), c.estimate.seconds.value if c.estimate else 0.0))


def exposed(answer: Estimate) -> float:
    """Seconds of the expected time that messages cost: what is left of it when they take none."""
    clock = Clock(answer.cluster, answer.calibration)

    def silent(op: Leaf) -> Any:
        return 0.0 if isinstance(op, Message) else clock.expected(op)

    def demand(op: Leaf) -> Any:
        return {} if isinstance(op, Message) else clock.demand(op)

    return answer.seconds.value - float(fold(answer.work, SecondsOverlapped(silent, demand)))


def _hidden_from(model: ModelSpec, layout: Layout, machine: Cluster, calibration: Calibration) -> float:
    """New tokens from which the ring is hidden (2411.01783 eq. 2), at the rates expected here."""
    heads, shared = next(((x.num_attention_heads, x.num_key_value_heads) for _, x in model.mixers if isinstance(x, Attention)), (1, 1))
    constants = calibration.constants(("attention", "", "bf16"))
    crossing = machine.tier(float(layout.cp), float(layout.tp * layout.ulysses))
    return float(
        tokens_to_hide_kv(
            ranks=layout.cp, flops_per_s=machine.gpu.peak_flops_per_s("bf16") * constants.tensor, bytes_per_s=crossing.bytes_per_s, kv_heads=shared,
            heads=heads, element_bytes=2.0,
        )
    )  # fmt: skip


def ring_timeline(contender: Contender, unroll: int = 2) -> list[Span]:
    """Every ring position's intervals."""
    answer = contender.estimate
    assert answer is not None
    clock = Clock(answer.cluster, answer.calibration)
    assert not isinstance(answer.phase, TrainStep)
    work = System(answer.model, answer.layout).work(answer.phase)
    return [
        span
        for position in range(int(answer.layout.cp))
        for span in timeline(work, clock, rank=f"ring {position}", position=position, unroll=unroll)
    ]


__all__ = ["Contender", "compare", "contenders", "exposed", "ring_timeline", "tensor_degree"]
