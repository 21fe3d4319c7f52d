"""What splitting a prompt's tokens over GPUs does to a plan: whether it won or lost where the engine offers it, and what a ring
would save where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulator.calibration import Calibration
from simulator.engines.prefill_context import sglang_offer
from simulator.engines.vllm import Vllm
from simulator.estimate import bare
from simulator.hardware import Cluster
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import Prefill
from simulator.serving import Request, Speed
from simulator.units import SECONDS

#: A layout that was tried, and its times if it holds the request; the best first.
Tried = tuple[Layout, Speed | None]

#: A ring is worth a line from this saving of the time to first token on.
_MUCH = 0.8


def told(
    model: ModelSpec, machine: Cluster, request: Request, engine: Vllm, calibration: Calibration, tried: Sequence[Tried]
) -> str | None:
    """One line, or None where there is nothing to choose."""
    timed = [(layout, speed) for layout, speed in tried if speed is not None]
    if engine.splits_prompts(model):
        asked = [layout for layout, _ in tried if layout.cp > 1]
        return _chosen(timed, engine) if asked else None
    return _missed(model, machine, request, engine, calibration, timed[0]) if timed else None


def _chosen(timed: Sequence[tuple[Layout, Speed]], engine: Vllm) -> str | None:
    """The best layout with it beside the best without; `timed` is ordered, the plan's choice first."""
    split, whole = ([pair for pair in timed if (pair[0].cp > 1) is splits] for splits in (True, False))
    name = f"Context parallelism of prefill (vLLM {engine.version})"
    if not split:
        return f"{name}: no such layout holds the request, because each of its ranks keeps the whole cache" if timed else None
    if not whole:
        return f"{name}: only layouts with it were asked for or hold the request"
    (layout, speed), (other, without) = split[0], whole[0]
    won = timed[0][0].cp > 1
    first, against = (SECONDS.show(float(s.ttft_s), 2) for s in (speed, without))
    each, other_each = (SECONDS.show(float(s.tpot_s), 2) for s in (speed, without))
    gap = float(speed.latency_s) / float(without.latency_s) - 1
    numbers = f"{layout} has TTFT {first} and TPOT {each}, {other}, the best without it, {against} and {other_each}"
    if won:
        return f"{name} won: {numbers}"
    earliest, quick = min(split, key=lambda pair: float(pair[1].ttft_s))
    sooner = ""
    if float(quick.ttft_s) < float(without.ttft_s) and earliest is not layout:
        sooner = f"; the earliest first token has {earliest}, {SECONDS.show(float(quick.ttft_s), 2)}"
    return f"{name} lost: {numbers}: the mean request takes {gap:.0%} longer{sooner}"


def _missed(
    model: ModelSpec, machine: Cluster, request: Request, engine: Vllm, calibration: Calibration, best: tuple[Layout, Speed]
) -> str | None:
    """What a ring of keys and values over the same GPUs would take for the whole prompt at once, or where that does not fit with a
    step of the engine's size on each of its ranks, if it is much less; and who offers something like it.
    """
    found = []
    node = min(machine.gpus_per_node, machine.gpus)
    for tp in (t for t in range(1, node + 1) if machine.gpus % t == 0 and node % t == 0 and t < machine.gpus):
        ring = Layout(tp=tp, cp=machine.gpus // tp)
        if list(ring.refusals(model)):
            continue
        for chunk in (None, float(engine.step_tokens(machine.gpu) * int(ring.cp))):
            held = bare(model, machine, ring, Prefill(float(request.prompt), 1.0, 0.0, chunk), calibration=calibration, engine=engine)
            if float(held.total_bytes) <= float(machine.gpu.usable_bytes):
                found.append((float(held.seconds), ring))
                break
    if not found:
        return None
    seconds, ring = min(found, key=lambda pair: pair[0])
    if seconds > _MUCH * float(best[1].ttft_s):
        return None
    offer = sglang_offer(model)
    return (
        f"A ring over the prompt's tokens ({ring}) would give the first token in about {SECONDS.show(seconds, 2)} instead of "
        f"{SECONDS.show(float(best[1].ttft_s), 2)}; vLLM {engine.version} splits no prompts of this model"
        + (f"; {offer}" if offer else "") + "; longctx compare-cp shows every way"
    )  # fmt: skip


__all__ = ["Tried", "told"]
