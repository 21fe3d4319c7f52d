"""A filled pipeline of n stages: in every tick each rank sends the activations it made in the tick before to the next stage,
receives those of its next microbatch, and computes its present one beside: two products [T, D] x [D, width] x [D].

Handed over are the residual stream and the block output, 2 T D elements, as engines do.  The first rank receives nothing and the
last sends nothing, so that a microbatch takes two ticks a stage; a row is `ticks` ticks of a rank between the two.
Legend: T tokens of a microbatch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from microbench.case import Case, case, relative
from microbench.ring.shapes import drawn, filled, one_block
from microbench.ring.transport import Transport
from simulator.kernels.gemm import gemm
from simulator.layers import GatedMLP
from simulator.parallel import Layout
from simulator.work import Overlap, Repeat, Serial, Work

KERNELS: tuple[str, ...] = ("pipeline_handover",)
IMPLS = ("send",)
#: (hidden, width of a stage's products): Llama-3.1-8B, Llama-3.1-70B.
SHAPES = ((4096, 14336), (8192, 28672))
TOKENS = (1, 64, 512, 2048, 8192, 32768)
TICKS = 8


def cases(suite: str, ranks: int) -> list[Case]:
    """Microbatches of several sizes."""
    if suite == "tiny":
        return [_case(ranks, 6, 16, 24, 3)]
    return [_case(ranks, t, hidden, width, TICKS) for hidden, width in SHAPES for t in TOKENS]


def _case(ranks: int, tokens: int, hidden: int, width: int, ticks: int) -> Case:
    return case("pipeline_handover", "send", "bf16", ranks=ranks, tokens=tokens, hidden=hidden, width=width, ticks=ticks)


def work(which: Case) -> Work:
    """A rank between the first and the last: in each tick a send, beside the products of the stage."""
    tokens, hidden, width = (float(which[name]) for name in ("tokens", "hidden", "width"))
    spec = one_block(which["hidden"], GatedMLP(which["hidden"], which["width"]))
    send = Layout(pp=which["ranks"]).place(spec).pipeline.hand_over(tokens)
    stage: list[Work] = [gemm("in", m=tokens, n=width, k=hidden), gemm("out", m=tokens, n=hidden, k=width)]
    together: list[Work] = [] if send is None else [send]
    return Repeat(float(which["ticks"]), Overlap([*together, Serial(stage)]))


class Stage:
    """A rank: two buffers of arriving and of finished microbatches [2, T, D] (residual, output), and the stage's weights."""

    def __init__(self, which: Case, transport: Transport, device: Any, dtype: Any) -> None:
        hidden, width = which["hidden"], which["width"]
        self.transport = transport
        self.arrived, self.made = ([filled((2, which["tokens"], hidden), device, dtype) for _ in range(2)] for _ in range(2))
        self.weights = [filled((hidden, width), device, dtype, hidden**-0.5), filled((width, hidden), device, dtype, width**-0.5)]

    def tick(self, number: int) -> None:
        """Send what tick `number` - 1 made, receive what tick `number` + 1 needs, compute beside."""
        rank, last = self.transport.rank, self.transport.size - 1
        now, other = number % 2, (number + 1) % 2
        sends = [(self.made[other], rank + 1)] if rank < last else []
        receives = [(self.arrived[other], rank - 1)] if rank > 0 else []
        under_way = self.transport.exchange(sends, receives)
        self.compute(self.arrived[now], self.made[now])
        under_way.wait()

    def compute(self, given: Any, made: Any) -> None:
        """The block output goes through both products; the residual goes on."""
        torch.mm(given[1] @ self.weights[0], self.weights[1], out=made[1])


def build(which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
    """A pipeline already full of microbatches."""
    stage = Stage(which, transport, device, torch.bfloat16)

    def run() -> None:
        for number in range(which["ticks"]):
            stage.tick(number)

    return run


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """Three microbatches through all stages: this rank's outputs against the stages before it one after the other."""
    small = dict(which.shape) | {"tokens": min(which["tokens"], 16), "hidden": min(which["hidden"], 64), "width": 48}
    which = Case(which.kernel, which.impl, which.dtype, tuple(small.items()))
    stage = Stage(which, transport, device, dtype)
    hidden, width, rank = which["hidden"], which["width"], transport.rank
    every = [
        (drawn(2 * r, (hidden, width), device, dtype, hidden**-0.5), drawn(2 * r + 1, (width, hidden), device, dtype, width**-0.5))
        for r in range(rank + 1)
    ]
    given = [drawn(1000 + i, (which["tokens"], hidden), device, dtype) for i in range(3)]
    stage.weights = list(every[rank])
    worst = 0.0
    for number in range(2 * transport.size + len(given)):
        if rank == 0 and number < len(given):
            stage.arrived[number % 2].copy_(given[number].expand(2, -1, -1))
        stage.tick(number)
        index = number - 2 * rank
        if 0 <= index < len(given):
            want = given[index].double()
            for first, second in every:
                want = want @ first.double() @ second.double()
            worst = max(worst, relative(stage.made[number % 2][1].double(), want))
    return worst
