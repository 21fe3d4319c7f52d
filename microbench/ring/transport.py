"""How ranks talk, and what they say: every byte a rank hands over is counted.

`Distributed` is torch.distributed (gloo or NCCL).  `Local` are logical ranks of one process, a thread each, that meet in
mailboxes.  `Loopback` plays one rank of a group on one device: what the others would send is copied from its own buffers
by a second stream, beside whatever computes, so a step's cost and its interference are measured without a second GPU; its
values mean nothing.  `Silent` moves nothing: what is left is compute.

Legend: n ranks.  Payloads are nccl-tests' (see `simulator.kernels.messages`): of an all-gather the whole gathered tensor, of a
reduce-scatter the whole before scattering, of an all-to-all all a rank holds, of a send the buffer.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

#: PyTorch renamed both (and warns of the old names).
_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

#: A tensor and the rank it goes to or comes from.
Parcel = tuple[Any, int]


@dataclass(frozen=True)
class Pending:
    """A transfer under way.  `wait` returns once its buffers may be used (on a GPU: orders the current stream after it)."""

    wait: Callable[[], None]


DONE = Pending(lambda: None)


def size_bytes(tensor: Any) -> int:
    """Bytes of a tensor's elements."""
    return int(tensor.numel() * tensor.element_size())


@dataclass
class Transport:
    """One rank's end of a group of `size` ranks.  `counted`: payload bytes by pattern; `calls`: how often."""

    rank: int
    size: int
    counted: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        """Send and receive at once, as one batch; the n-th receive from a rank fits its n-th send to this one."""
        for tensor, _ in sends:
            self._count("send", size_bytes(tensor))
        return self._exchange(sends, receives) if sends or receives else DONE

    def span(self, lane: str, name: str) -> AbstractContextManager[None]:  # noqa: ARG002 (who traces overrides it)
        """What follows is `name`, for whoever draws a timeline."""
        return nullcontext()

    def turn(self, sent: Sequence[Any], received: Sequence[Any]) -> Pending:
        """One step of a ring: to the next rank, from the one before."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return self.exchange([(t, after) for t in sent], [(t, before) for t in received])

    def all_gather(self, out: Any, mine: Any) -> Pending:
        """`out` [n x rows, ...] from every rank's `mine` [rows, ...]."""
        return self._collective("all_gather", size_bytes(out), lambda: self._all_gather(out, mine), lambda: out.copy_(mine))

    def reduce_scatter(self, out: Any, whole: Any) -> Pending:
        """`out` [rows, ...]: this rank's share of the sum of every rank's `whole` [n x rows, ...]."""
        return self._collective("reduce_scatter", size_bytes(whole), lambda: self._reduce_scatter(out, whole), lambda: out.copy_(whole))

    def all_to_all(self, out: Any, given: Any, *, out_rows: list[int] | None = None, rows: list[int] | None = None) -> Pending:
        """Rows of `given` go to the ranks in order, `rows` each (equal shares by default); `out` holds what they sent."""
        return self._collective(
            "all_to_all", size_bytes(given), lambda: self._all_to_all(out, given, out_rows, rows), lambda: out.copy_(given)
        )

    def all_reduce(self, tensor: Any, *, most: bool = False) -> Pending:
        """The sum (or maximum) over all ranks, in place."""
        return self._collective("all_reduce", size_bytes(tensor), lambda: self._all_reduce(tensor, most=most), lambda: None)

    def broadcast(self, tensor: Any, root: int = 0) -> Pending:
        """The root's tensor, everywhere."""
        return self._collective("broadcast", size_bytes(tensor), lambda: self._broadcast(tensor, root), lambda: None)

    def group(self, ranks: Sequence[int]) -> Transport:
        """The sub-group of `ranks` that this rank is in.  Every rank of the whole must call it, for its own sub-group."""
        raise NotImplementedError

    def agree(self, values: list[float]) -> list[float]:
        """The largest of every rank's numbers, by the host: nothing is counted and no link of the devices is used."""
        return values

    def meet(self) -> None:
        """Wait, on the device, until every rank is here; not counted."""

    def _collective(self, pattern: str, payload: int, several: Callable[[], Pending], alone: Callable[[], Any]) -> Pending:
        if self.size == 1:
            alone()
            return DONE
        self._count(pattern, payload)
        return several()

    def _count(self, pattern: str, payload: int) -> None:
        self.counted[pattern] += payload
        self.calls[pattern] += 1

    def _exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        raise NotImplementedError

    def _all_gather(self, out: Any, mine: Any) -> Pending:
        raise NotImplementedError

    def _reduce_scatter(self, out: Any, whole: Any) -> Pending:
        raise NotImplementedError

    def _all_to_all(self, out: Any, given: Any, out_rows: list[int] | None, rows: list[int] | None) -> Pending:
        raise NotImplementedError

    def _all_reduce(self, tensor: Any, *, most: bool) -> Pending:
        raise NotImplementedError

    def _broadcast(self, tensor: Any, root: int) -> Pending:
        raise NotImplementedError


@dataclass
class Distributed(Transport):
    """A rank of a torch.distributed group; `ranks` are its global ranks.  `made`: handles of sub-groups made beforehand."""

    ranks: tuple[int, ...] = ()
    handle: Any = None
    made: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @staticmethod
    def world() -> Distributed:
        """The default group, which must be initialised."""
        size = dist.get_world_size()
        return Distributed(dist.get_rank(), size, ranks=tuple(range(size)), handle=dist.group.WORLD)

    def prepare(self, sizes: Sequence[int]) -> None:
        """Make every block and every stride of the first n ranks, for n of `sizes`: torch wants all ranks of the world for that
        (NCCL splits its communicator), those of a smaller group that asks later are not enough.  Called by the whole world.
        """
        for n in sizes:
            for d in (d for d in range(2, n) if n % d == 0):
                for chosen in [*(range(first, first + d) for first in range(0, n, d)), *(range(first, n, n // d) for first in range(n // d))]:
                    ranks = tuple(chosen)
                    if ranks not in self.made:
                        self.made[ranks] = dist.new_group(list(ranks))

    def group(self, ranks: Sequence[int]) -> Distributed:
        """A process group of some of this one's ranks: one made beforehand, or else, of the world, all ranks gather who wants
        which, then make them all in one order.
        """
        mine = tuple(self.ranks[r] for r in ranks)
        handle = self.made.get(mine)
        if handle is None:
            wanted: list[Any] = [None] * self.size
            dist.all_gather_object(wanted, mine, group=self.handle)
            handle = {chosen: dist.new_group(list(chosen)) for chosen in dict.fromkeys(wanted)}[mine]
        return Distributed(mine.index(self.ranks[self.rank]), len(mine), self.counted, self.calls, mine, handle, self.made)

    def agree(self, values: list[float]) -> list[float]:
        """By gloo, which the group must carry for tensors of the host."""
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.handle)
        return [float(value) for value in shared]

    def meet(self) -> None:
        """By the smallest all-reduce."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"), group=self.handle)

    def _exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        ops = [dist.P2POp(dist.isend, t, self.ranks[to], self.handle) for t, to in sends]
        ops += [dist.P2POp(dist.irecv, t, self.ranks[source], self.handle) for t, source in receives]
        return _all_of(dist.batch_isend_irecv(ops))

    def _all_gather(self, out: Any, mine: Any) -> Pending:
        return _all_of([_gather_single(out, mine, group=self.handle, async_op=True)])

    def _reduce_scatter(self, out: Any, whole: Any) -> Pending:
        return _all_of([_scatter_single(out, whole, group=self.handle, async_op=True)])

    def _all_to_all(self, out: Any, given: Any, out_rows: list[int] | None, rows: list[int] | None) -> Pending:
        return _all_of([dist.all_to_all_single(out, given, out_rows, rows, group=self.handle, async_op=True)])

    def _all_reduce(self, tensor: Any, *, most: bool) -> Pending:
        how = dist.ReduceOp.MAX if most else dist.ReduceOp.SUM
        return _all_of([dist.all_reduce(tensor, how, group=self.handle, async_op=True)])

    def _broadcast(self, tensor: Any, root: int) -> Pending:
        return _all_of([dist.broadcast(tensor, self.ranks[root], group=self.handle, async_op=True)])


def _all_of(works: Sequence[Any]) -> Pending:
    def wait() -> None:
        for work in works:
            work.wait()

    return Pending(wait)


class Rooms:
    """Where logical ranks of one process meet: a mailbox for each (group, sender, receiver) and a table for collectives."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.mail: dict[tuple[Any, ...], list[Any]] = {}
        self.tables: dict[tuple[Any, ...], dict[int, Any]] = {}

    def post(self, key: tuple[Any, ...], tensor: Any) -> None:
        """Leave a copy."""
        with self.condition:
            self.mail.setdefault(key, []).append(tensor.clone())
            self.condition.notify_all()

    def fetch(self, key: tuple[Any, ...]) -> Any:
        """Take the oldest copy, once there is one."""
        with self.condition:
            if not self.condition.wait_for(lambda: self.mail.get(key), timeout=60):
                message = f"no tensor came for {key}"
                raise RuntimeError(message)
            return self.mail[key].pop(0)

    def gathered(self, key: tuple[Any, ...], rank: int, size: int, tensor: Any) -> list[Any]:
        """Every rank's tensor, once all have laid theirs down."""
        with self.condition:
            table = self.tables.setdefault(key, {})
            table[rank] = tensor.clone()
            self.condition.notify_all()
            if not self.condition.wait_for(lambda: len(table) == size, timeout=60):
                message = f"not all ranks came to {key}"
                raise RuntimeError(message)
            return [table[r] for r in range(size)]


@dataclass
class Local(Transport):
    """A logical rank in a thread of its own."""

    rooms: Rooms = field(default_factory=Rooms)
    ranks: tuple[int, ...] = ()
    turns: Counter[tuple[int, ...]] = field(default_factory=Counter)

    @staticmethod
    def run(size: int, program: Callable[[Transport], Any]) -> list[Any]:
        """What `program` returns on each of `size` logical ranks."""
        rooms, found, failed = Rooms(), [None] * size, []

        def play(rank: int) -> None:
            try:
                found[rank] = program(Local(rank, size, rooms=rooms, ranks=tuple(range(size))))
            except Exception as error:  # noqa: BLE001 (raised again below, in the caller's thread)
                failed.append(error)

        threads = [threading.Thread(target=play, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return found

    def group(self, ranks: Sequence[int]) -> Local:
        """Those of `ranks`, in the same rooms."""
        mine = tuple(self.ranks[r] for r in ranks)
        return Local(mine.index(self.ranks[self.rank]), len(mine), self.counted, self.calls, self.rooms, mine, self.turns)

    def meet(self) -> None:
        """At an empty table."""
        self._table(torch.zeros(1))

    def _exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        for tensor, to in sends:
            self.rooms.post((self.ranks, self.rank, to), tensor)

        def wait() -> None:
            for tensor, source in receives:
                tensor.copy_(self.rooms.fetch((self.ranks, source, self.rank)))

        return Pending(wait)

    def _table(self, tensor: Any) -> list[Any]:
        self.turns[self.ranks] += 1
        return self.rooms.gathered((self.ranks, self.turns[self.ranks]), self.rank, self.size, tensor)

    def _all_gather(self, out: Any, mine: Any) -> Pending:
        out.copy_(torch.cat(self._table(mine)))
        return DONE

    def _reduce_scatter(self, out: Any, whole: Any) -> Pending:
        out.copy_(torch.stack([t.chunk(self.size)[self.rank] for t in self._table(whole)]).sum(0))
        return DONE

    def _all_to_all(self, out: Any, given: Any, out_rows: list[int] | None, rows: list[int] | None) -> Pending:  # noqa: ARG002 (as torch's)
        mail = [(given.split(rows) if rows else given.chunk(self.size))[to] for to in range(self.size)]
        for to, part in enumerate(mail):
            self.rooms.post((self.ranks, self.rank, to, "all"), part)
        out.copy_(torch.cat([self.rooms.fetch((self.ranks, source, self.rank, "all")) for source in range(self.size)]))
        return DONE

    def _all_reduce(self, tensor: Any, *, most: bool) -> Pending:
        every = torch.stack(self._table(tensor))
        tensor.copy_(every.amax(0) if most else every.sum(0))
        return DONE

    def _broadcast(self, tensor: Any, root: int) -> Pending:
        tensor.copy_(self._table(tensor)[root])
        return DONE


@dataclass
class Loopback(Transport):
    """One rank on one device; a second stream copies into its receive buffers as many bytes as would arrive."""

    stream: Any = None

    @staticmethod
    def of(rank: int, size: int, device: Any) -> Loopback:
        """With a stream of its own on a GPU."""
        return Loopback(rank, size, stream=torch.cuda.Stream(device) if device.type == "cuda" else None)

    def group(self, ranks: Sequence[int]) -> Loopback:
        """As large as asked, over the same stream."""
        return Loopback(list(ranks).index(self.rank), len(ranks), self.counted, self.calls, self.stream)

    def _aside(self, pairs: Sequence[tuple[Any, Any]]) -> Pending:
        """Copy each (target, source) beside what runs."""
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return DONE
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return Pending(lambda: torch.cuda.current_stream().wait_event(done))

    def _exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        # the ends of a pipeline only send or only receive, and copy nothing
        return self._aside([(target, source.reshape(target.shape)) for (target, _), (source, _) in zip(receives, sends, strict=False)])

    def _all_gather(self, out: Any, mine: Any) -> Pending:
        return self._aside([(part, mine) for part in out.chunk(self.size)])

    def _reduce_scatter(self, out: Any, whole: Any) -> Pending:
        return self._aside([(out, part) for part in whole.chunk(self.size)])

    def _all_to_all(self, out: Any, given: Any, out_rows: list[int] | None, rows: list[int] | None) -> Pending:  # noqa: ARG002 (as torch's)
        rows_moved = min(out.shape[0], given.shape[0])
        return self._aside([(out[:rows_moved], given[:rows_moved])])

    def _all_reduce(self, tensor: Any, *, most: bool) -> Pending:  # noqa: ARG002 (bytes only)
        return self._aside([(torch.empty_like(tensor), tensor)] * 2)

    def _broadcast(self, tensor: Any, root: int) -> Pending:  # noqa: ARG002 (bytes only)
        return self._aside([(torch.empty_like(tensor), tensor)])


@dataclass
class Silent(Transport):
    """Counts, and moves nothing but once: the first time a buffer would receive it is filled, so that kernels read random
    numbers, whose products take the power that a real run's do.
    """

    filled: set[int] = field(default_factory=set)

    def group(self, ranks: Sequence[int]) -> Silent:
        """As large as asked."""
        return Silent(list(ranks).index(self.rank), len(ranks), self.counted, self.calls, self.filled)

    def _fill(self, target: Any, source: Any) -> Pending:
        if target.data_ptr() not in self.filled:
            self.filled.add(target.data_ptr())
            flat, given = target.view(-1), source.reshape(-1)
            for start in range(0, flat.numel(), given.numel()):
                part = flat[start : start + given.numel()]
                part.copy_(given[: part.numel()])
        return DONE

    def _exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        for (target, _), (source, _) in zip(receives, sends, strict=False):
            self._fill(target, source)
        return DONE

    def _all_gather(self, out: Any, mine: Any) -> Pending:
        return self._fill(out, mine)

    def _reduce_scatter(self, out: Any, whole: Any) -> Pending:
        return self._fill(out, whole)

    def _all_to_all(self, out: Any, given: Any, out_rows: list[int] | None, rows: list[int] | None) -> Pending:  # noqa: ARG002 (as torch's)
        return self._fill(out, given)

    def _all_reduce(self, tensor: Any, *, most: bool) -> Pending:  # noqa: ARG002
        return DONE

    def _broadcast(self, tensor: Any, root: int) -> Pending:  # noqa: ARG002
        return DONE
