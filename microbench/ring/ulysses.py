"""Ulysses and USP for real: one rank's program, forward and backward.

Queries, keys and values of c tokens and all heads become u c tokens and 1 / u of the heads by one all-to-all, outputs come
back by another; in between is attention over all tokens (ulysses) or a zigzag ring over the other ranks (usp).  Key-value
heads fewer than u travel as copies, whose gradients are added where they come back.  Backward exchanges the gradients.

Legend: u ranks exchange heads (neighbours), n / u of them in a ring.  A rank keeps its share of the past by heads, p rows.
Source: DeepSpeed-Ulysses (2309.14509); USP (2405.07719); FORMULAS 5.7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from microbench.case import Case
from microbench.ring.block import Partial
from microbench.ring.context import Ring, tokens_of
from microbench.ring.program import (
    KERNELS,
    LAYOUTS,
    LENGTHS,
    Inputs,
    Place,
    Program,
    Returned,
    Scratch,
    built,
    checked,
    over,
    past_of,
    ways,
    work_of,
)  # fmt: skip
from microbench.ring.transport import Transport
from simulator.parallel import Layout
from simulator.work import Work

IMPLS = ("ulysses", "usp")


class Ulysses:
    """Tokens for heads, a ring of any size, heads for tokens."""

    def __init__(self, transport: Transport, inputs: Inputs, degree: int) -> None:
        first = transport.rank - transport.rank % degree
        self.group = transport.group(range(first, first + degree))
        self.u, self.transport, self.inputs = degree, transport, inputs
        b, c, h, d = inputs.q.shape
        g = inputs.own.shape[3]
        if h % degree or (g % degree and degree % g):
            message = f"ulysses {degree}: {h} heads and {g} key-value heads are not divided by it; use a divisor of both"
            raise ValueError(message)
        self.copies = max(1, degree // g)
        self.heads, self.kv_heads = h // degree, g * self.copies // degree
        self.scratch = Scratch(inputs.q.device)
        self.wide = (degree, b, c, self.heads + 2 * self.kv_heads, d)
        past = inputs.past.shape[1]
        kind = inputs.q.dtype
        # the ring sees the tokens of the whole group
        q = self.scratch("q", (b, degree * c, self.heads, d), kind)
        own = self.scratch("own", (b, degree * c, 2, self.kv_heads, d), kind)
        self.ring = Ring("zigzag", transport.group(range(transport.rank % degree, transport.size, degree)), Inputs(q, inputs.past, own, q))
        self.kv = self.ring.kv[:, past:]
        self.whole: Partial | None = None
        self.q = q

    def forward(self) -> Any:
        """Exchange, attend, exchange."""
        with self.transport.span("compute", "pack"):
            given = self.packed(self.inputs.q, self.inputs.own)
        taken = self.exchanged("mixed", given)
        with self.transport.span("compute", "unpack"):
            self.q, own = self.tokens(taken[..., : self.heads, :]), self.tokens(taken[..., self.heads :, :])
            self.kv.copy_(own.unflatten(2, (2, self.kv_heads)))
        self.whole = self.ring.attend(self.q, self.ring.kv)
        return self.home(self.whole.out)

    def backward(self) -> Returned:
        """The gradient of the output goes out, those of queries, keys and values come home."""
        assert self.whole is not None
        with self.transport.span("compute", "pack"):
            given = self.scratch("given heads", (self.u, *self.inputs.q.shape[:2], self.heads, self.inputs.q.shape[3]), self.q.dtype)
            given.copy_(self.inputs.d_out.unflatten(2, (self.u, -1)).permute(2, 0, 1, 3, 4))
        d_out = self.tokens(self.exchanged("heads", given))
        d_q, d_kv = self.ring.differentiate(d_out, self.q, self.ring.kv, self.whole)
        past = self.inputs.past.shape[1]
        with self.transport.span("compute", "pack"):
            given = self.scratch("given mixed", self.wide, self.q.dtype)
            given[..., : self.heads, :].copy_(self.by_rank(d_q))
            given[..., self.heads :, :].copy_(self.by_rank(d_kv[:, past:].flatten(2, 3)))
        taken = self.exchanged("mixed", given)
        with self.transport.span("compute", "unpack"):
            d_q, d_own = taken[..., : self.heads, :].permute(1, 2, 0, 3, 4).flatten(2, 3), taken[..., self.heads :, :]
            d_own = d_own.unflatten(3, (2, self.kv_heads)).unflatten(0, (-1, self.copies)).sum(1)
            return Returned(d_q, d_kv[:, :past], d_own.permute(1, 2, 3, 0, 4, 5).flatten(3, 4))

    def packed(self, q: Any, own: Any) -> Any:
        """[u, B, c, heads / u + 2 kv_heads / u, d]: what each rank of the group gets."""
        given = self.scratch("given mixed", self.wide, q.dtype)
        given[..., : self.heads, :].copy_(q.unflatten(2, (self.u, -1)).permute(2, 0, 1, 3, 4))
        rows = given[..., self.heads :, :].unflatten(3, (2, self.kv_heads)).unflatten(0, (-1, self.copies))
        rows.copy_(own.unflatten(3, (rows.shape[0], -1)).permute(3, 0, 1, 2, 4, 5).unsqueeze(1).expand(rows.shape))
        return given

    def exchanged(self, name: str, given: Any) -> Any:
        """What the group gives this rank, [u, B, c, heads, d]."""
        taken = self.scratch.like(f"taken {name}", given)
        self.group.all_to_all(taken, given).wait()
        return taken

    def tokens(self, taken: Any) -> Any:
        """[u, B, c, heads, d] as [B, u c, heads, d]."""
        return taken.transpose(0, 1).flatten(1, 2)

    def by_rank(self, tensor: Any) -> Any:
        """[B, u c, heads, d] as [u, B, c, heads, d]."""
        return tensor.unflatten(1, (self.u, -1)).transpose(0, 1)

    def home(self, out: Any) -> Any:
        """[B, u c, heads / u, d] back to [B, c, heads, d]."""
        taken = self.exchanged("heads", self.by_rank(out).contiguous())
        with self.transport.span("compute", "unpack"):
            return taken.permute(1, 2, 0, 3, 4).flatten(2, 3)


def degree_of(which: Case) -> int:
    """Ranks that exchange heads: all of them, but in usp as many as the case says."""
    return which["ranks"] if which.impl == "ulysses" else which["inner"]


def make(which: Case, transport: Transport, inputs: Inputs) -> Program:
    """One rank's program."""
    return Ulysses(transport, inputs, degree_of(which))


def place(which: Case, rank: int) -> Place:
    """Its part of its ring position's tokens; of the past what its ring position and its heads keep."""
    u = degree_of(which)
    ring, (position, member) = which["ranks"] // u, divmod(rank, u)
    past, heads = past_of(which) // ring, which["heads"] // u
    if past * ring != past_of(which):
        message = f"context {which['context']}: the past of {past_of(which)} tokens lies evenly on {ring} ring positions; use a multiple"
        raise ValueError(message)
    tokens = tokens_of("zigzag", position, ring, which["tokens"] * u)
    return Place(
        torch.chunk(tokens, u)[member], range(position * past, (position + 1) * past), range(member * heads, (member + 1) * heads)
    )


def cases(suite: str, ranks: int) -> list[Case]:
    """Tiny: both once.  ring: lengths and head layouts that the ranks divide."""
    inner = 2 if ranks % 2 == 0 else ranks
    found = []
    tiny = (4 * ranks, 2 * ranks, 16)
    for impl in IMPLS:
        if suite != "tiny" and impl == "usp" and inner == ranks:
            continue  # a ring of one
        more = {"inner": inner} if impl == "usp" else {}
        for layout in (tiny,) if suite == "tiny" else LAYOUTS:
            u = more.get("inner", ranks)
            if layout[0] % u == 0 and (layout[1] % u == 0 or u % layout[1] == 0):
                for tokens in (16,) if suite == "tiny" else LENGTHS:
                    found += [over(impl, layout, ranks=ranks, tokens=tokens, backward=way, **more) for way in ways(tokens)]
    return found


def work(which: Case) -> Work:
    """Its quantities: the mixing part that the simulator builds."""
    u = degree_of(which)
    return work_of(which, Layout(ulysses=u, cp=which["ranks"] // u))


def build(which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
    """One rank's program, ready to run."""
    return built(which, transport, device, make, place)


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """Relative error of this rank's results."""
    return checked(which, transport, device, dtype, make, place)


__all__ = ["IMPLS", "KERNELS", "build", "cases", "error", "make", "place", "work"]
