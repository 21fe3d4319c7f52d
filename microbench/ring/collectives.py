"""Collectives and sends alone, and beside a matrix product.

`collective`: seconds of `calls` calls in a row.  With `beside` = 1 products of 8192^3 run without pause on a second stream,
and the row is still the collective's seconds; short ones come several to a row, so that what starts the products is little
of it.  `gemm_beside`: seconds of one such product while collectives follow each other on a second stream (`beside` = 1) or
alone (`beside` = 0).  Rows with `beside` 0 and 1 are one interference: seconds of the second over seconds of the first.

Payloads are nccl-tests', in bf16.  A send goes to the next rank while one comes from the rank before.
On a CPU there is no second stream: what runs beside runs before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from microbench.case import Case, case, relative
from microbench.ring.shapes import drawn, filled
from microbench.ring.transport import Pending, Transport
from simulator.kernels.gemm import gemm
from simulator.kernels.messages import message
from simulator.work import Group, Repeat, Work

KERNELS: tuple[str, ...] = ("collective", "gemm_beside")
PATTERNS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast")
IMPLS = (*PATTERNS, "none")
#: 1 KiB to 4 GiB in powers of 4.
PAYLOADS = tuple(4**i for i in range(5, 17))
#: Payloads measured beside products; those that a product is measured beside last long enough for the host to launch the next.
BESIDE, BESIDE_GEMM = (4**8, 4**11, 4**13, 4**15), (4**11, 4**13, 4**15)
#: Calls of a row beside products, for payloads below SHORT bytes.
CALLS, SHORT = 16, 4**13
#: Extent of the square product.
GEMM = 8192
GEMM_TINY = 64
#: How much longer what runs beside is than what it accompanies.
COVER = 1.5


def cases(suite: str, ranks: int) -> list[Case]:
    """Every pattern over payloads, alone and beside a product, and the product beside each pattern."""
    if suite == "tiny":
        return [
            *(_alone(p, ranks, 48 * 1024) for p in PATTERNS),
            case("collective", "all_reduce", "bf16", ranks=ranks, payload_bytes=48 * 1024, beside=1, calls=2, gemm=GEMM_TINY),
            case("gemm_beside", "all_reduce", "bf16", ranks=ranks, payload_bytes=48 * 1024, beside=1, gemm=GEMM_TINY),
        ]
    found = [_alone(p, ranks, size) for p in PATTERNS for size in PAYLOADS]
    for pattern in PATTERNS:
        for size in BESIDE:
            calls = CALLS if size < SHORT else 1
            found.append(case("collective", pattern, "bf16", ranks=ranks, payload_bytes=size, beside=1, calls=calls, gemm=GEMM))
    found.append(case("gemm_beside", "none", "bf16", ranks=ranks, payload_bytes=0, beside=0, gemm=GEMM))
    found += [case("gemm_beside", p, "bf16", ranks=ranks, payload_bytes=s, beside=1, gemm=GEMM) for p in PATTERNS for s in BESIDE_GEMM]
    return found


def _alone(pattern: str, ranks: int, payload: int) -> Case:
    return case("collective", pattern, "bf16", ranks=ranks, payload_bytes=payload, beside=0, calls=1)


def payload_of(which: Case) -> int:
    """The payload, a whole number of bf16 elements for every rank."""
    each = 2 * which["ranks"]
    return which["payload_bytes"] // each * each


def work(which: Case) -> Work:
    """The timed part: messages, or one product."""
    if which.kernel == "gemm_beside":
        size = float(which["gemm"])
        return gemm("gemm", m=size, n=size, k=size)
    one = message(which.impl, which.impl, group=Group("ranks", float(which["ranks"])), payload_bytes=float(payload_of(which)))
    return one if which["calls"] == 1 else Repeat(float(which["calls"]), one)


class Call:
    """A collective with its buffers."""

    def __init__(self, pattern: str, payload: int, transport: Transport, device: Any, dtype: Any = torch.bfloat16) -> None:
        self.pattern, self.transport = pattern, transport
        whole = payload // torch.empty((), dtype=dtype).element_size()
        share = whole // transport.size
        given = {"all_gather": share}.get(pattern, whole)
        taken = {"all_gather": whole, "reduce_scatter": share, "all_to_all": whole, "send": whole}.get(pattern, 0)
        self.given = filled((given,), device, dtype)
        self.taken = torch.empty((taken,), device=device, dtype=dtype)

    def __call__(self) -> Pending:
        """Start it."""
        pattern, transport = self.pattern, self.transport
        if pattern == "all_reduce":
            return transport.all_reduce(self.given)
        if pattern == "broadcast":
            return transport.broadcast(self.given)
        if pattern == "send":
            return transport.turn([self.given], [self.taken]) if transport.size > 1 else Pending(lambda: None)
        return getattr(transport, pattern)(self.taken, self.given)  # type: ignore[no-any-return]


def build(which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
    """What is timed, on the current stream, and what runs beside it on a stream of its own.

    The current stream waits only for what is timed: synchronise the device after the last run.
    """
    collective = None if which.impl == "none" else Call(which.impl, payload_of(which), transport, device)

    def call() -> None:
        assert collective is not None
        collective().wait()

    def calls() -> None:
        for _ in range(which.get("calls", 1)):
            call()

    if which.kernel == "collective" and not which["beside"]:
        return calls
    size = which["gemm"]
    left, right, out = (filled((size, size), device) for _ in range(3))

    def product() -> None:
        torch.mm(left, right, out=out)

    if not which["beside"]:
        return product
    timed, other = (calls, product) if which.kernel == "collective" else (product, call)
    count = _times(timed, other, transport, device)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def aside() -> None:
        if side is None:
            other()
            return
        # not before the timed part of the run before has ended: otherwise the host would run ahead without end
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(count):
                other()

    def run() -> None:
        # products are few and must be under way; collectives are many: those launched after one product run beside the next
        for step in (aside, timed) if which.kernel == "collective" else (timed, aside):
            step()

    return run


def _times(timed: Callable[[], None], other: Callable[[], None], transport: Transport, device: Any) -> int:
    """How many of `other` outlast `timed`: the same number on every rank, from the slowest rank's seconds of both."""
    if device.type != "cuda":
        return 1
    seconds = torch.tensor([_seconds(timed), _seconds(other)], device=device)
    transport.all_reduce(seconds, most=True).wait()
    first, second = (float(s) for s in seconds)
    return math.ceil(COVER * first / second) + 1


def _seconds(call: Callable[[], None]) -> float:
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 3


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """One call on numbers that every rank knows, against the same worked out alone."""
    pattern, n, rank = which.impl, transport.size, transport.rank
    if which.kernel == "gemm_beside":
        left, right = (drawn(seed, (GEMM_TINY, GEMM_TINY), device, dtype) for seed in (1, 2))
        return relative((left @ right).double(), left.double() @ right.double())
    share = 96
    call = Call(pattern, share * n * torch.empty((), dtype=dtype).element_size(), transport, device, dtype)
    every = [drawn(100 + r, tuple(call.given.shape), device, dtype) for r in range(n)]
    call.given.copy_(every[rank])
    call.taken.fill_(float("nan"))
    call().wait()
    wide = [t.double() for t in every]
    total = torch.stack(wide).sum(0)
    if pattern == "send":
        return relative(call.taken.double(), wide[rank - 1]) if n > 1 else 0.0
    want = {
        "all_reduce": total, "broadcast": wide[0], "all_gather": torch.cat(wide), "reduce_scatter": total.chunk(n)[rank],
        "all_to_all": torch.cat([t.chunk(n)[rank] for t in wide]),
    }[pattern]  # fmt: skip
    return relative((call.given if pattern in ("all_reduce", "broadcast") else call.taken).double(), want)
