"""Context parallelism for real: one rank's program of each scheme of `simulator.parallel.context`.

ring_kv: keys and values go round; each rank attends to the block it holds while the next one arrives, and joins the partial
outputs.  Backward they go round again and their fp32 gradients follow one step behind, back to their owner.
ring_q: queries go round, partial outputs and LSEs return by one all-to-all (forward only: no engine trains so).
gather: all keys and values first, then attention; backward the gradients return by a reduce-scatter.
double: a ring inside blocks of `inner` neighbours, around which a ring of blocks turns; backward is the plain ring.

Legend: n ranks, c own tokens, p own rows of the past.  A rank's keys lie as [past | own].  Zigzag: chunk r, then 2 n - 1 - r.
Source: FORMULAS 5.5, 5.6; Ring Attention (2310.01889); 2411.01783; Llama 3 (2407.21783) section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from microbench.case import Case
from microbench.ring import block
from microbench.ring.block import Partial, Sum
from microbench.ring.program import (
    KERNELS,
    LAYOUTS,
    LENGTHS,
    LONGEST,
    Inputs,
    Place,
    Program,
    Returned,
    Scratch,
    built,
    checked,
    is_backward,
    over,
    past_of,
    ways,
    work_of,
)  # fmt: skip
from microbench.ring.transport import DONE, Transport
from simulator.parallel import Layout
from simulator.work import Work

#: Implementations: what goes round, and the order of tokens.
IMPLS = ("ring_kv.zigzag", "ring_kv.contiguous", "ring_kv.striped", "ring_q.zigzag", "gather.zigzag", "double.zigzag")


class Part(NamedTuple):
    """Some of a rank's queries over some of a block's keys."""

    queries: slice
    keys: slice
    causal: bool


def parts(order: str, asking: int, owner: int, own: int, past: int) -> list[Part]:
    """What rank `asking`'s queries see of the keys of rank `owner`: all its past, and by order its own tokens.

    Zigzag: to others always c x c / 2.  Striped: a triangle, without its diagonal for a later rank.

    >>> [(p.queries.start, p.keys.stop, p.causal) for p in parts("zigzag", 0, 1, 8, 0)]
    [(4, 8, False)]
    """
    every, half = slice(0, own), own // 2
    if asking == owner:
        return [Part(every, slice(0, past + own), causal=True)]
    earlier = owner < asking
    if order == "striped":
        if earlier:
            return [Part(every, slice(0, past + own), causal=True)]
        found, rest = [Part(slice(1, own), slice(0, past + own - 1), causal=True)], slice(0, 1)
    elif earlier:
        return [Part(every, slice(0, past + (half if order == "zigzag" else own)), causal=False)]
    elif order == "zigzag":
        found, rest = [Part(slice(half, own), slice(0, past + own), causal=False)], slice(0, half)
    else:
        found, rest = [], every
    return [*found, Part(rest, slice(0, past), causal=False)] if past else [p for p in found if p.queries.stop > p.queries.start]


def tokens_of(order: str, rank: int, ranks: int, own: int) -> Any:
    """The positions a rank holds of n c new tokens, in the order in which it holds them."""
    if order == "contiguous":
        return torch.arange(rank * own, (rank + 1) * own)
    if order == "striped":
        return torch.arange(own) * ranks + rank
    half = own // 2
    if 2 * half != own:
        message = f"tokens {own}: zigzag gives a rank two equal chunks; use an even number"
        raise ValueError(message)
    last = 2 * ranks - 1 - rank
    return torch.cat([torch.arange(rank * half, (rank + 1) * half), torch.arange(last * half, (last + 1) * half)])


def keys(kv: Any, rows: slice) -> tuple[Any, Any]:
    """Keys and values of some rows."""
    return kv[:, rows, 0], kv[:, rows, 1]


class Ring:
    """Pass-KV."""

    def __init__(self, order: str, transport: Transport, inputs: Inputs) -> None:
        self.order, self.transport, self.inputs = order, transport, inputs
        self.scratch = Scratch(inputs.q.device)
        self.past, self.own = inputs.past.shape[1], inputs.own.shape[1]
        self.kv = torch.cat([inputs.past, inputs.own], 1) if self.past else inputs.own
        self.whole: Partial | None = None

    def forward(self) -> Any:
        """Attend to each block as it comes."""
        self.whole = self.attend(self.inputs.q, self.kv)
        return self.whole.out

    def backward(self) -> Returned:
        """As the forward, with the gradients of the keys one step behind."""
        assert self.whole is not None
        d_q, d_kv = self.differentiate(self.inputs.d_out, self.inputs.q, self.kv, self.whole)
        return Returned(d_q, d_kv[:, : self.past], d_kv[:, self.past :])

    def blocks(self, kv: Any) -> Iterator[tuple[int, Any]]:
        """Each owner and its block, in turn; while one is used the next one arrives."""
        yield from turning(self.transport, kv, self.scratch, "kv")

    def attend(self, q: Any, kv: Any) -> Partial:
        """Output and LSE over all blocks."""
        rank, total = self.transport.rank, None
        left = sum(len(self.seen(owner)) for owner in range(self.transport.size))
        for owner, held in self.blocks(kv):
            for part in self.seen(owner):
                left -= 1
                with self.transport.span("compute", "own block" if owner == rank else f"block of rank {owner}"):
                    found = block.forward(q[:, part.queries], *keys(held, part.keys), causal=part.causal)
                    if total is None:
                        total = Sum(found)
                    else:
                        total.add(found, part.queries, last=left == 0)
        assert total is not None
        return total.result()

    def seen(self, owner: int) -> list[Part]:
        """What this rank sees of a block."""
        return parts(self.order, self.transport.rank, owner, self.own, self.past)

    def differentiate(self, d_out: Any, q: Any, kv: Any, whole: Partial) -> tuple[Any, Any]:
        """Gradients of the queries and of [past | own] keys: n - 1 turns of the keys, n of their gradients."""
        transport, kind = self.transport, block.wide(q.dtype)
        d_q = self.scratch.like("d_q", q, kind)
        several = transport.size > 1
        d_kv, arriving = (self.scratch.like(f"d_kv {i}", kv, kind) for i in range(2))
        coming = DONE
        for owner, held in turning(transport, kv, self.scratch, "kv"):
            first = owner == transport.rank
            found = []
            for part in self.seen(owner):
                with transport.span("compute", "own block" if first else f"block of rank {owner}"):
                    there = Partial(whole.out[:, part.queries], whole.lse[:, :, part.queries])
                    grads = block.backward(d_out[:, part.queries], q[:, part.queries], *keys(held, part.keys), there, causal=part.causal)
                    d_q[:, part.queries].copy_(grads.q) if first else d_q[:, part.queries].add_(grads.q)
                    found.append((part, grads))
            coming.wait()
            if not first:
                d_kv, arriving = arriving, d_kv
            with transport.span("compute", "add gradients"):
                for part, grads in found:
                    for index, grad in enumerate((grads.k, grads.v)):
                        target = d_kv[:, part.keys, index]
                        target.copy_(grad) if first else target.add_(grad)
            coming = transport.turn([d_kv], [arriving]) if several else DONE
        coming.wait()
        return d_q.to(q.dtype), (arriving if several else d_kv).to(kv.dtype)


def turning(transport: Transport, tensor: Any, scratch: Scratch, name: str) -> Iterator[tuple[int, Any]]:
    """Each rank's `tensor` in turn, this one's first; the next comes beside what is done with one."""
    n, held = transport.size, tensor
    for step in range(n):
        pending, coming = DONE, held
        if step + 1 < n:
            coming = scratch.like(f"{name} {step % 2}", tensor)
            pending = transport.turn([held], [coming])
        yield (transport.rank - step) % n, held
        pending.wait()
        held = coming


class DoubleRing(Ring):
    """Pass-KV in a ring of rings: `inner` neighbours, then the same place of the block before."""

    def __init__(self, order: str, transport: Transport, inputs: Inputs, inner: int) -> None:
        super().__init__(order, transport, inputs)
        rank, self.inner = transport.rank, inner
        first = rank - rank % inner
        self.near = transport.group(range(first, first + inner))
        self.far = transport.group(range(rank % inner, transport.size, inner))

    def blocks(self, kv: Any) -> Iterator[tuple[int, Any]]:
        """A whole inner round beside one send of the outer ring."""
        for there, block_kv in turning(self.far, kv, self.scratch, "far"):
            for place, held in turning(self.near, block_kv, self.scratch, "near"):
                yield there * self.inner + place, held


class QueryRing:
    """Pass-Q: a block of queries meets this rank's keys; what it found goes back to its owner."""

    def __init__(self, order: str, transport: Transport, inputs: Inputs) -> None:
        self.ring = Ring(order, transport, inputs)
        self.order, self.transport, self.q = order, transport, inputs.q
        b, c, h, d = self.q.shape
        kind = block.wide(self.q.dtype)
        self.out_bytes, lse_bytes = b * c * h * d * self.q.element_size(), b * c * h * kind.itemsize
        self.given, self.taken = (
            torch.zeros(transport.size, self.out_bytes + lse_bytes, dtype=torch.uint8, device=self.q.device) for _ in range(2)
        )

    def forward(self) -> Any:
        """Partial outputs of everyone's queries, exchanged and joined."""
        ring, transport = self.ring, self.transport
        for owner, held in turning(transport, self.q, ring.scratch, "q"):
            with transport.span("compute", "own block" if owner == transport.rank else f"queries of rank {owner}"):
                self._attend(owner, held)
        transport.all_to_all(self.taken, self.given).wait()
        with transport.span("compute", "join"):
            total = Sum(self._partial(self.taken[transport.rank]))
            others = [r for r in range(transport.size) if r != transport.rank]
            for other in others:
                total.add(self._partial(self.taken[other]), slice(0, ring.own), last=other == others[-1])
            return total.result().out

    def _attend(self, owner: int, q: Any) -> None:
        """Write what these queries find here; rows that see nothing weigh nothing."""
        found = parts(self.order, owner, self.transport.rank, self.ring.own, self.ring.past)
        into = self._partial(self.given[owner])
        if sum(p.queries.stop - p.queries.start for p in found) < self.ring.own:
            into.out.zero_()
            into.lse.fill_(float("-inf"))
        for part in found:
            out, lse = block.forward(q[:, part.queries], *keys(self.ring.kv, part.keys), causal=part.causal)
            into.out[:, part.queries].copy_(out)
            into.lse[:, :, part.queries].copy_(lse)

    def _partial(self, row: Any) -> Partial:
        b, c, h, d = self.q.shape
        out, lse = row[: self.out_bytes], row[self.out_bytes :]
        return Partial(out.view(self.q.dtype).view(b, c, h, d), lse.view(block.wide(self.q.dtype)).view(b, h, c))

    def backward(self) -> Returned:
        """There is none."""
        message = "ring_q: serving passes queries, training does not; use ring_kv"
        raise ValueError(message)


class Gather:
    """All keys and values first.

    They are gathered by place, so that none is moved again: [second chunks, the last first | past | first chunks].  A rank's
    first chunk then sees one run of rows before its own, its second chunk another, and the own chunks see themselves.
    """

    def __init__(self, transport: Transport, inputs: Inputs) -> None:
        self.transport, self.inputs = transport, inputs
        self.past, self.own = inputs.past.shape[1], inputs.own.shape[1]
        # tokens first: what the ranks give lies one after the other
        self.mine = torch.cat([inputs.past, inputs.own], 1).transpose(0, 1).contiguous()
        n, half = transport.size, self.own // 2
        self.seconds, self.olds = slice(0, n * half), slice(n * half, n * (half + self.past))
        self.firsts = slice(self.olds.stop, n * (self.past + self.own))
        shape = (n * self.mine.shape[0], *self.mine.shape[1:])
        self.scratch = Scratch(inputs.q.device)
        self.every = self.scratch("gathered", shape, self.mine.dtype)
        self.whole: Partial | None = None

    def shares(self, mine: Any, every: Any) -> list[tuple[Any, Any]]:
        """This rank's rows and everyone's, place by place."""
        past, half = self.past, self.own // 2
        found = [(mine[past + half :], every[self.seconds]), (mine[past : past + half], every[self.firsts])]
        return [*found, (mine[:past], every[self.olds])] if past else found

    def gather(self) -> Any:
        """Keys and values of all, [B, P + T, 2, g, d]."""
        for pending in [self.transport.all_gather(every, mine) for mine, every in self.shares(self.mine, self.every)]:
            pending.wait()
        return self.every.transpose(0, 1)

    def runs(self) -> list[Part]:
        """Whole rectangles: the first chunk over what lies before it, the second chunk likewise."""
        half, rank = self.own // 2, self.transport.rank
        before = slice(self.olds.start, self.firsts.start + rank * half)
        found = [Part(slice(half, self.own), slice((rank + 1) * half, self.firsts.stop), causal=False)]
        return [Part(slice(0, half), before, causal=False), *found] if before.stop > before.start else found

    def halved(self, tensor: Any) -> Any:
        """Both chunks as sequences of their own."""
        return tensor.unflatten(1, (2, -1)).flatten(0, 1)

    def forward(self) -> Any:
        """The triangles of both chunks in one call, then the rectangles."""
        kv, q = self.gather(), self.inputs.q
        with self.transport.span("compute", "attention"):
            own = self.halved(self.inputs.own)
            found = block.forward(self.halved(q), own[:, :, 0], own[:, :, 1], causal=True)
            lse = found.lse.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)
            total = Partial(found.out.unflatten(0, (-1, 2)).flatten(1, 2), lse.contiguous())
            for part in self.runs():
                rows = block.of_rows(total, part.queries)
                block.join(rows, rows, block.forward(q[:, part.queries], *keys(kv, part.keys), causal=False))
        self.whole = total
        return total.out

    def backward(self) -> Returned:
        """A row of keys has at most two gradients on a rank: they are added in the inputs' type, as they are scattered."""
        assert self.whole is not None
        kv, (q, _, own, d_out), whole = self.gather(), self.inputs, self.whole
        half, rank = self.own // 2, self.transport.rank
        d_every = self.scratch.like("d_every", self.every)
        d_kv = d_every.transpose(0, 1)
        with self.transport.span("compute", "attention"):
            halves = Partial(self.halved(whole.out), whole.lse.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1))
            own = self.halved(own)
            found = block.backward(self.halved(d_out), self.halved(q), own[:, :, 0], own[:, :, 1], halves, causal=True)
            d_q = found.q.unflatten(0, (-1, 2)).flatten(1, 2)
            d_every[: (rank + 1) * half].zero_()
            for part in reversed(self.runs()):
                grads = block.backward(
                    d_out[:, part.queries], q[:, part.queries], *keys(kv, part.keys), block.of_rows(whole, part.queries), causal=False
                )
                d_q[:, part.queries].add_(grads.q)
                for index, grad in enumerate((grads.k, grads.v)):
                    target = d_kv[:, part.keys, index]
                    target.copy_(grad) if part.queries.start else target.add_(grad)
            for index, grad in enumerate((found.k, found.v)):
                first, second = grad.unflatten(0, (-1, 2)).unbind(1)
                for start, added in ((self.firsts.start, first), (0, second)):
                    d_kv[:, start + rank * half : start + (rank + 1) * half, index].add_(added)
        d_mine = self.scratch.like("d_mine", self.mine)
        for pending in [self.transport.reduce_scatter(out, every) for out, every in self.shares(d_mine, d_every)]:
            pending.wait()
        d_mine = d_mine.transpose(0, 1)
        return Returned(d_q, d_mine[:, : self.past], d_mine[:, self.past :])


def split(which: Case) -> tuple[str, str]:
    """What goes round, and the order of tokens."""
    passing, _, order = which.impl.partition(".")
    return passing, order


def layout_of(which: Case) -> Layout:
    """The layout that the simulator is asked about."""
    passing, order = split(which)
    named = {"ring_kv": "kv", "ring_q": "q", "gather": "gather", "double": "double"}[passing]
    return Layout(cp=which["ranks"], order=order, passing=named, cp_inner=which.get("inner", 1))


def make(which: Case, transport: Transport, inputs: Inputs) -> Program:
    """One rank's program."""
    passing, order = split(which)
    if passing == "ring_kv":
        return Ring(order, transport, inputs)
    if passing == "double":
        return DoubleRing(order, transport, inputs, which["inner"])
    return QueryRing(order, transport, inputs) if passing == "ring_q" else Gather(transport, inputs)


def place(which: Case, rank: int) -> Place:
    """Its tokens, its share of the past, every head."""
    n, past = which["ranks"], past_of(which) // which["ranks"]
    if past * n != past_of(which):
        message = f"context {which['context']}: the past of {past_of(which)} tokens lies evenly on {n} ranks; use a multiple"
        raise ValueError(message)
    return Place(tokens_of(split(which)[1], rank, n, which["tokens"]), range(rank * past, (rank + 1) * past), range(which["heads"]))


def cases(suite: str, ranks: int) -> list[Case]:
    """Tiny: everything once.  ring: every length and head layout; one length more of the balanced ring."""
    inner = next((m for m in (4, 2) if ranks % m == 0 and ranks > m), ranks)
    more: dict[str, dict[str, int]] = {"double.zigzag": {"inner": inner}}
    found = []
    for impl in IMPLS:
        if suite != "tiny" and impl.startswith("double") and inner == ranks:
            continue  # a ring of one ring
        forward = impl.startswith(("ring_q", "double"))
        for layout in ((4, 2, 16),) if suite == "tiny" else LAYOUTS:
            for tokens in (16,) if suite == "tiny" else LENGTHS:
                found += [
                    over(impl, layout, ranks=ranks, tokens=tokens, backward=way, **more.get(impl, {}))
                    for way in ((False,) if forward else ways(tokens))
                ]
        if suite != "tiny" and impl == "ring_kv.zigzag":
            found.append(over(impl, LAYOUTS[0], ranks=ranks, tokens=LONGEST))
    return found


def work(which: Case) -> Work:
    """Its quantities: the mixing part that the simulator builds."""
    return work_of(which, layout_of(which))


def build(which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
    """One rank's program, ready to run."""
    return built(which, transport, device, make, place)


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """Relative error of this rank's results."""
    return checked(which, transport, device, dtype, make, place)


__all__ = ["IMPLS", "KERNELS", "build", "cases", "error", "is_backward", "make", "parts", "place", "work"]
