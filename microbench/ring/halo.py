"""Context parallelism of a window for real: one rank fetches the rows that its queries' windows reach, then attends.

A rank's chunks and the rows of others before them lie as runs of the sequence, chunks that come near each other as one run.
Owners hand over what others lack in one exchange, exposed; backward the rows come again, and their gradients go back to their owners.
Forward and backward are whole sequences: a cached past of a window is not run.

Legend: n ranks, c own tokens, W keys a query sees (its own among them), R = W - 1 rows before it.
Source: FORMULAS 5.5; simulator.parallel.context.halo_rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from microbench.case import Case
from microbench.ring import block
from microbench.ring.block import Partial
from microbench.ring.context import keys, tokens_of
from microbench.ring.program import (
    KERNELS,
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
)
from microbench.ring.transport import DONE, Parcel, Pending, Transport
from simulator.parallel import Layout
from simulator.work import Work, run_by

#: The order of tokens.
IMPLS = ("halo.zigzag", "halo.contiguous")
#: (heads, kv_heads, head_dim) and window: gpt-oss-120B, Mistral-7B.
LAYOUTS = (((64, 8, 64), 128), ((32, 8, 128), 4096))
LENGTHS = (8192, 32768, 131072)


class Run(NamedTuple):
    """Positions of the sequence, [start, stop)."""

    start: int
    stop: int

    def of(self, whole: Run) -> slice:
        """Where they lie in `whole`."""
        return slice(self.start - whole.start, self.stop - whole.start)


class Fetch(NamedTuple):
    """Rows that `asker` lacks and `owner` holds."""

    asker: int
    owner: int
    rows: Run


def chunks(order: str, rank: int, ranks: int, own: int) -> list[Run]:
    """A rank's runs of new tokens, in the order in which it holds them."""
    if order == "contiguous":
        return [Run(rank * own, (rank + 1) * own)]
    half = own // 2
    return [Run(index * half, (index + 1) * half) for index in (rank, 2 * ranks - 1 - rank)]


def reached(held: list[Run], reach: int) -> list[Run]:
    """What the queries of these chunks see, as few runs as possible.

    >>> reached([Run(4, 8), Run(8, 12)], 3), reached([Run(0, 4), Run(12, 16)], 3)
    ([Run(start=1, stop=12)], [Run(start=0, stop=4), Run(start=9, stop=16)])
    """
    found: list[Run] = []
    for start, stop in held:
        first = max(0, start - reach)
        if found and first <= found[-1].stop:
            found[-1] = Run(found[-1].start, stop)
        else:
            found.append(Run(first, stop))
    return found


def fetches(order: str, ranks: int, own: int, reach: int) -> list[Fetch]:
    """Everything that travels, in an order that all ranks agree on."""
    held = [chunks(order, rank, ranks, own) for rank in range(ranks)]
    found = []
    for asker in range(ranks):
        for seen in reached(held[asker], reach):
            for owner in range(ranks):
                if owner != asker:
                    common = (Run(max(seen.start, there.start), min(seen.stop, there.stop)) for there in held[owner])
                    found += [Fetch(asker, owner, rows) for rows in common if rows.stop > rows.start]
    return found


class Halo:
    """Rows of others first, then one call for each chunk."""

    def __init__(self, order: str, transport: Transport, inputs: Inputs, window: int) -> None:
        self.transport, self.inputs, self.window = transport, inputs, window
        own, reach = inputs.own.shape[1], window - 1
        self.chunks = chunks(order, transport.rank, transport.size, own)
        self.runs = reached(self.chunks, reach)
        moved = fetches(order, transport.size, own, reach)
        self.lacking = [fetch for fetch in moved if fetch.asker == transport.rank]
        self.lent = [fetch for fetch in moved if fetch.owner == transport.rank]
        self.scratch = Scratch(inputs.q.device)
        b, _, _, g, d = inputs.own.shape
        self.kv = [self.scratch(f"kv {i}", (b, run.stop - run.start, 2, g, d), inputs.own.dtype) for i, run in enumerate(self.runs)]
        for chunk, rows in self.mine():
            self.seen(self.kv, chunk).copy_(inputs.own[:, rows])
        self.whole: list[Partial] = []

    def mine(self) -> list[tuple[Run, slice]]:
        """Each chunk, and where its tokens lie among this rank's."""
        found, start = [], 0
        for chunk in self.chunks:
            found.append((chunk, slice(start, start + chunk.stop - chunk.start)))
            start = found[-1][1].stop
        return found

    def seen(self, runs: list[Any], rows: Run) -> Any:
        """These positions of the runs' tensors."""
        index = next(i for i, run in enumerate(self.runs) if run.start <= rows.start and rows.stop <= run.stop)
        return runs[index][:, rows.of(self.runs[index])]

    def held(self, rows: Run) -> slice:
        """Where positions of one chunk lie among this rank's tokens."""
        chunk, there = next((c, t) for c, t in self.mine() if c.start <= rows.start and rows.stop <= c.stop)
        return slice(there.start + rows.start - chunk.start, there.start + rows.stop - chunk.start)

    def reach(self, chunk: Run) -> Run:
        """The positions that a chunk's queries see."""
        return Run(max(0, chunk.start - self.window + 1), chunk.stop)

    def fetch(self) -> None:
        """The rows that this rank lacks, for those that others lack."""
        sends = [(self.inputs.own[:, self.held(lent.rows)].contiguous(), lent.asker) for lent in self.lent]
        receives = [(self._room("rows", i), lacking.owner) for i, lacking in enumerate(self.lacking)]
        self._exchanged(sends, receives).wait()
        for lacking, (rows, _) in zip(self.lacking, receives, strict=True):
            self.seen(self.kv, lacking.rows).copy_(rows)

    def _room(self, name: str, index: int) -> Any:
        b, _, *rest = self.inputs.own.shape
        rows = self.lacking[index].rows
        return self.scratch(f"{name} {index}", (b, rows.stop - rows.start, *rest), self.inputs.own.dtype)

    def _exchanged(self, sends: list[Parcel], receives: list[Parcel]) -> Pending:
        return self.transport.exchange(sends, receives) if sends or receives else DONE

    def forward(self) -> Any:
        """Fetch, attend."""
        self.fetch()
        q = self.inputs.q
        with self.transport.span("compute", "attention"):
            self.whole = [
                block.forward(q[:, rows], *keys(self.seen(self.kv, self.reach(chunk)), slice(None)), causal=True, window=self.window)
                for chunk, rows in self.mine()
            ]
            return torch.cat([part.out for part in self.whole], 1)

    def backward(self) -> Returned:
        """Fetch again, attend, and return the gradients of what was fetched."""
        self.fetch()
        q, d_out, kind = self.inputs.q, self.inputs.d_out, block.wide(self.inputs.q.dtype)
        d_q = self.scratch.like("d_q", q)
        d_kv = [self.scratch.like(f"d_kv {i}", run, kind) for i, run in enumerate(self.kv)]
        with self.transport.span("compute", "attention"):
            for run in d_kv:
                run.zero_()
            for (chunk, rows), whole in zip(self.mine(), self.whole, strict=True):
                sees = self.reach(chunk)
                held = self.seen(self.kv, sees)
                grads = block.backward(d_out[:, rows], q[:, rows], *keys(held, slice(None)), whole, causal=True, window=self.window)
                d_q[:, rows].copy_(grads.q)
                there = self.seen(d_kv, sees)
                there[:, :, 0].add_(grads.k)
                there[:, :, 1].add_(grads.v)
        d_own = torch.cat([self.seen(d_kv, chunk) for chunk in self.chunks], 1)
        sends = [(self.seen(d_kv, lacking.rows).to(q.dtype).contiguous(), lacking.owner) for lacking in self.lacking]
        receives = [
            (self.scratch.like(f"returned {i}", d_own[:, self.held(lent.rows)], q.dtype), lent.asker) for i, lent in enumerate(self.lent)
        ]
        self._exchanged(sends, receives).wait()
        with self.transport.span("compute", "add gradients"):
            for lent, (grad, _) in zip(self.lent, receives, strict=True):
                d_own[:, self.held(lent.rows)].add_(grad)
        return Returned(d_q, self.inputs.past, d_own.to(q.dtype))


def order_of(which: Case) -> str:
    """The order of tokens."""
    return which.impl.partition(".")[2]


def make(which: Case, transport: Transport, inputs: Inputs) -> Program:
    """One rank's program."""
    return Halo(order_of(which), transport, inputs, which["window"])


def place(which: Case, rank: int) -> Place:
    """Its tokens, every head; nothing of a past."""
    if past_of(which):
        message = f"context {which['context']}: the past of a window lies with whoever held it last and is not run; use ranks x tokens"
        raise ValueError(message)
    return Place(tokens_of(order_of(which), rank, which["ranks"], which["tokens"]), range(0), range(which["heads"]))


def cases(suite: str, ranks: int) -> list[Case]:
    """Tiny: a window within a chunk, and one over several ranks.  ring: two models' windows."""
    tiny = (((4, 2, 16), 4), ((4, 2, 16), 20))
    return [
        over(impl, layout, ranks=ranks, tokens=tokens, backward=way, window=window)
        for impl in IMPLS
        for layout, window in (tiny if suite == "tiny" else LAYOUTS)
        for tokens in ((16,) if suite == "tiny" else LENGTHS)
        for way in ways(tokens)
    ]


def work(which: Case) -> Work:
    """Its quantities: the mixing part that the simulator builds; of PyTorch's kernels FlashAttention-2 alone knows windows."""
    return run_by(work_of(which, Layout(cp=which["ranks"], order=order_of(which))), {"attention": "flash2", "attention_backward": "flash2"})


def build(which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
    """One rank's program, ready to run."""
    return built(which, transport, device, make, place)


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """Relative error of this rank's results."""
    return checked(which, transport, device, dtype, make, place)


__all__ = ["IMPLS", "KERNELS", "build", "cases", "chunks", "error", "fetches", "is_backward", "make", "place", "reached", "work"]
