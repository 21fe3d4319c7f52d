"""Collectives and sends after a kernel, and beside one.

`collective`: a call after a product of a few rows whose weights sweep the L2 cache, as calls follow products in a layer; a row
holds what the call adds to the product.  `gemm_beside`, `attention_beside`, `attention_backward_beside`: a call, then a kernel
beside it, then the wait for the call.  With the kernel the longer it shows what messages cost kernels, with the call the longer
what kernels cost messages.

Payloads are nccl-tests', in bf16.  A send goes to the next rank while one comes from the rank before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from microbench.case import Case, case, relative
from microbench.ring import block
from microbench.ring.shapes import drawn, filled
from microbench.ring.transport import Pending, Transport
from simulator.kernels.attention import Segment, attention
from simulator.kernels.gemm import gemm
from simulator.kernels.messages import message
from simulator.work import Group, Overlap, Work

BESIDE: tuple[str, ...] = ("gemm_beside", "attention_beside", "attention_backward_beside")
KERNELS: tuple[str, ...] = ("collective", *BESIDE)
PATTERNS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast")
IMPLS = PATTERNS
#: 1 KiB to 4 GiB: powers of 4, from 256 KiB of 2.
PAYLOADS = (*(4**i for i in range(5, 9)), *(2**i for i in range(18, 33)))
#: Payloads beside a kernel, and extents of kernels: of a square product, and the tokens of causal attention of 32 heads, 8 of keys.
PAYLOADS_BESIDE = (2**22, 2**24, 2**26, 2**28)
EXTENTS = {"gemm_beside": (6144, 8192), "attention_beside": (8192, 16384), "attention_backward_beside": (8192,)}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TINY = 64
#: Rows, inputs and outputs of the product before a call: 64 MiB of weights.
BEFORE = (16, 4096, 8192)


def cases(suite: str, ranks: int) -> list[Case]:
    """Every pattern over payloads, after a short kernel and beside others."""
    if suite == "tiny":
        return [*(_after(p, ranks, 48 * 1024) for p in PATTERNS), *(_beside(kernel, "all_reduce", ranks, 48 * 1024, TINY) for kernel in EXTENTS)]
    return [
        *(_after(p, ranks, size) for p in PATTERNS for size in PAYLOADS),
        *(_beside(kernel, p, ranks, size, extent) for kernel, extents in EXTENTS.items() for extent in extents
          for p in PATTERNS if p != "broadcast" for size in PAYLOADS_BESIDE),
    ]  # fmt: skip


def _after(pattern: str, ranks: int, payload: int) -> Case:
    return case("collective", pattern, "bf16", ranks=ranks, payload_bytes=payload, beside=0, calls=1)


def _beside(kernel: str, pattern: str, ranks: int, payload: int, extent: int) -> Case:
    return case(kernel, pattern, "bf16", ranks=ranks, payload_bytes=payload, extent=extent)


def payload_of(which: Case) -> int:
    """The payload, a whole number of bf16 elements for every rank."""
    each = 2 * which["ranks"]
    return which["payload_bytes"] // each * each


def work(which: Case) -> Work:
    """One message, alone or beside a kernel."""
    one = message(which.impl, which.impl, group=Group("ranks", float(which["ranks"])), payload_bytes=float(payload_of(which)))
    if which.kernel == "collective":
        return one
    extent = float(which["extent"])
    if which.kernel == "gemm_beside":
        return Overlap([one, gemm("gemm", m=extent, n=extent, k=extent)])
    core = attention(
        "attention", Segment(1.0, extent, 0.0), heads=float(HEADS), kv_heads=float(KV_HEADS), head_dim=HEAD_DIM,
        backward=which.kernel == "attention_backward_beside",
    )  # fmt: skip
    return Overlap([one, core])


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
    """The call after its kernel, or before the one that runs beside it."""
    call = Call(which.impl, payload_of(which), transport, device)
    if which.kernel == "collective":
        rows, inputs, outputs = BEFORE if device.type == "cuda" else (1, 1, 1)
        x, weight, out = (filled(shape, device) for shape in ((rows, inputs), (inputs, outputs), (rows, outputs)))

        def after() -> None:
            torch.mm(x, weight, out=out)
            call().wait()

        return after
    kernel = _kernel(which, device)

    def beside() -> None:
        under_way = call()
        kernel()
        under_way.wait()

    return beside


def _kernel(which: Case, device: Any) -> Callable[[], Any]:
    extent = which["extent"]
    if which.kernel == "gemm_beside":
        left, right, out = (filled((extent, extent), device) for _ in range(3))
        return lambda: torch.mm(left, right, out=out)
    q, k, v = (filled((1, extent, heads, HEAD_DIM), device) for heads in (HEADS, KV_HEADS, KV_HEADS))
    if which.kernel == "attention_beside":
        return lambda: block.forward(q, k, v, causal=True)
    whole, d_out = block.forward(q, k, v, causal=True), filled(tuple(q.shape), device)
    return lambda: block.backward(d_out, q, k, v, whole, causal=True)


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """One call on numbers that every rank knows, against the same worked out alone.  (Kernels beside calls are checked elsewhere.)"""
    pattern, n, rank = which.impl, transport.size, transport.rank
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
