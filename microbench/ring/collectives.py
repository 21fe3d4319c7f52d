"""Collectives and sends alone, and beside matrix products.

`collective`: seconds of one call.  `gemm_beside`: `calls` calls in a row on one stream, beside `gemms` products of 8192^3 in a
row on another; both start together and a row ends with the later of the two.  With the products the longer it shows what
messages cost them, with the calls the longer what products cost messages; "none" is products alone.

Payloads are nccl-tests', in bf16.  A send goes to the next rank while one comes from the rank before.
On a CPU there is no second stream: what runs beside runs before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from microbench.case import Case, case, relative
from microbench.ring.shapes import drawn, filled
from microbench.ring.transport import Pending, Transport
from simulator.kernels.gemm import gemm
from simulator.kernels.messages import message
from simulator.work import Group, Overlap, Repeat, Work

KERNELS: tuple[str, ...] = ("collective", "gemm_beside")
PATTERNS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast")
IMPLS = (*PATTERNS, "none")
#: 1 KiB to 4 GiB: powers of 4, from 256 KiB of 2.
PAYLOADS = (*(4**i for i in range(5, 9)), *(2**i for i in range(18, 33)))
#: (payload, calls, products) beside each other: the products take longer, then the calls.  Neither is so short that the host
#: cannot launch the next in time.
BESIDE = (
    (4**11, 48, 4), (4**11, 128, 2), (4**13, 12, 4), (4**13, 24, 2), (4**15, 1, 5), (4**15, 2, 2),
)  # fmt: skip
#: Extent of the square product.
GEMM = 8192
GEMM_TINY = 64


def cases(suite: str, ranks: int) -> list[Case]:
    """Every pattern over payloads, alone and beside products, and products alone."""
    if suite == "tiny":
        return [*(_alone(p, ranks, 48 * 1024) for p in PATTERNS), _beside("all_reduce", ranks, 48 * 1024, 2, 3, GEMM_TINY)]
    return [
        *(_alone(p, ranks, size) for p in PATTERNS for size in PAYLOADS), _beside("none", ranks, 0, 0, 4, GEMM),
        *(_beside(p, ranks, *sizes, GEMM) for p in PATTERNS for sizes in BESIDE),
    ]  # fmt: skip


def _alone(pattern: str, ranks: int, payload: int) -> Case:
    return case("collective", pattern, "bf16", ranks=ranks, payload_bytes=payload, beside=0, calls=1)


def _beside(pattern: str, ranks: int, payload: int, calls: int, gemms: int, size: int) -> Case:
    return case("gemm_beside", pattern, "bf16", ranks=ranks, payload_bytes=payload, beside=1, calls=calls, gemms=gemms, gemm=size)


def payload_of(which: Case) -> int:
    """The payload, a whole number of bf16 elements for every rank."""
    each = 2 * which["ranks"]
    return which["payload_bytes"] // each * each


def work(which: Case) -> Work:
    """One message, or several beside products."""
    group = Group("ranks", float(which["ranks"]))
    if which.kernel == "collective":
        return message(which.impl, which.impl, group=group, payload_bytes=float(payload_of(which)))
    size = float(which["gemm"])
    products = Repeat(float(which["gemms"]), gemm("gemm", m=size, n=size, k=size))
    if which.impl == "none":
        return products
    one = message(which.impl, which.impl, group=group, payload_bytes=float(payload_of(which)))
    return Overlap([Repeat(float(which["calls"]), one), products])


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
    """The calls, and the products on a stream of their own, which the current stream waits for."""
    collective = None if which.impl == "none" else Call(which.impl, payload_of(which), transport, device)

    def calls() -> None:
        for _ in range(which["calls"]):
            assert collective is not None
            collective().wait()

    if which.kernel == "collective":
        return calls
    size = which["gemm"]
    left, right, out = (filled((size, size), device) for _ in range(3))

    def products() -> None:
        for _ in range(which["gemms"]):
            torch.mm(left, right, out=out)

    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run() -> None:
        if side is None:
            products()
            calls()
            return
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            products()
        calls()
        current.wait_stream(side)

    return run


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
