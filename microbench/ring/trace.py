"""A timeline of every rank of a run: what it computes, what it sends, when it waits.

`Traced` wraps a rank's transport.  On a GPU spans are CUDA events: a transfer starts where the stream asks for it and ends
when a stream that only waits for it may go on; a wait is the time between two events around it on the computing stream.
On a CPU they are the clock of the host, and a transfer ends where it is waited for.
The document is that of `simulator.timeline`, so that a prediction and a run can be laid side by side.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from microbench.ring.transport import Distributed, Parcel, Pending, Transport
from simulator.timeline import Span, document


class Recorder:
    """Moments of one rank, in seconds since `begin`."""

    def __init__(self, rank: str, device: Any) -> None:
        self.rank = rank
        self.on_gpu = device.type == "cuda"
        self.aside = torch.cuda.Stream(device) if self.on_gpu else None
        self.found: list[tuple[str, str, Any, Any]] = []
        self.zero = self.now()

    def now(self) -> Any:
        """This moment of the current stream, or of the host."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Forget what was, and count from now."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.found.clear()
        self.zero = self.now()

    def add(self, lane: str, name: str, start: Any, end: Any) -> None:
        """One span between two moments."""
        self.found.append((lane, name, start, end))

    def spans(self) -> list[Span]:
        """Everything since `begin`, in order of its start; spans of no length are left out."""
        if self.on_gpu:
            torch.cuda.synchronize()
        timed = [Span(self.rank, lane, name, self._since(start), self._since(end)) for lane, name, start, end in self.found]
        return sorted((span for span in timed if span.end_s > span.start_s), key=lambda span: span.start_s)

    def _since(self, moment: Any) -> float:
        if self.on_gpu:
            return float(self.zero.elapsed_time(moment)) / 1e3
        return float(moment - self.zero)


@dataclass
class Traced(Transport):
    """A transport whose transfers, waits and computations leave spans."""

    inner: Transport = field(default_factory=lambda: Transport(0, 1))
    recorder: Recorder = field(default_factory=lambda: Recorder("", torch.device("cpu")))

    @staticmethod
    def over(inner: Transport, device: Any) -> Traced:
        """That rank's transport, recorded on `device`."""
        return Traced(inner.rank, inner.size, inner.counted, inner.calls, inner, Recorder(f"rank {inner.rank}", device))

    def begin(self) -> None:
        """All ranks meet, and count from there."""
        self.inner.meet()
        self.recorder.begin()

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        """From here to the end of the block."""
        start = self.recorder.now()
        yield
        self.recorder.add(lane, name, start, self.recorder.now())

    def group(self, ranks: Sequence[int]) -> Traced:
        """A sub-group that leaves its spans with this rank's."""
        inner = self.inner.group(ranks)
        return Traced(inner.rank, inner.size, inner.counted, inner.calls, inner, self.recorder)

    def _exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        return self._watched("send", lambda: self.inner._exchange(sends, receives))  # noqa: SLF001 (a wrapper)

    def _all_gather(self, out: Any, mine: Any) -> Pending:
        return self._watched("all_gather", lambda: self.inner._all_gather(out, mine))  # noqa: SLF001 (a wrapper)

    def _reduce_scatter(self, out: Any, whole: Any) -> Pending:
        return self._watched("reduce_scatter", lambda: self.inner._reduce_scatter(out, whole))  # noqa: SLF001 (a wrapper)

    def _all_to_all(self, out: Any, given: Any, out_rows: list[int] | None, rows: list[int] | None) -> Pending:
        return self._watched("all_to_all", lambda: self.inner._all_to_all(out, given, out_rows, rows))  # noqa: SLF001 (a wrapper)

    def _all_reduce(self, tensor: Any, *, most: bool) -> Pending:
        return self._watched("all_reduce", lambda: self.inner._all_reduce(tensor, most=most))  # noqa: SLF001 (a wrapper)

    def _broadcast(self, tensor: Any, root: int) -> Pending:
        return self._watched("broadcast", lambda: self.inner._broadcast(tensor, root))  # noqa: SLF001 (a wrapper)

    def _watched(self, name: str, call: Callable[[], Pending]) -> Pending:
        recorder = self.recorder
        start = recorder.now()
        pending = call()
        if recorder.on_gpu:
            with torch.cuda.stream(recorder.aside):
                pending.wait()
                recorder.add("send", name, start, recorder.now())

        def wait() -> None:
            before = recorder.now()
            pending.wait()
            after = recorder.now()
            if not recorder.on_gpu:
                recorder.add("send", name, start, after)
            recorder.add("wait", f"for the {name}", before, after)

        return Pending(wait)


def everyone(traced: Traced) -> list[Span]:
    """The spans of all ranks of a distributed run, on each of them; elsewhere this rank's."""
    mine = traced.recorder.spans()
    if not isinstance(traced.inner, Distributed):
        return mine
    found: list[Any] = [None] * traced.size
    dist.all_gather_object(found, mine, group=traced.inner.handle)
    return [span for spans in found for span in spans]


def write(file: Path, spans: list[Span]) -> None:
    """The spans as JSON, as the simulator writes a predicted timeline."""
    file.write_text(json.dumps(document(spans), indent=1) + "\n")


def draw(file: Path, spans: list[Span]) -> None:
    """A chart, ranks from top to bottom, a row for each lane, as one HTML page (needs altair)."""
    import altair as alt  # noqa: PLC0415 (optional)

    chart = (
        alt.Chart(alt.Data(values=document(spans)))
        .mark_bar(height=9)
        .encode(
            x=alt.X("start_s:Q", title="seconds"), x2="end_s:Q", y=alt.Y("lane:N", title=None, sort=["compute", "send", "wait"]),
            color=alt.Color("lane:N", sort=["compute", "send", "wait"]), row=alt.Row("rank:N", title=None, sort=None),
            tooltip=["rank:N", "name:N", "start_s:Q", "end_s:Q", "times:Q"],
        )
        .properties(width=900)
    )  # fmt: skip
    chart.save(str(file))


__all__ = ["Recorder", "Traced", "draw", "everyone", "write"]
