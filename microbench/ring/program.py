"""What the programs of this package share: a rank's inputs, its buffers, its check against one device, its quantities.

A program is one rank's part of a scheme, made once for its inputs: `forward` returns its output rows, `backward` (after a
forward) the gradients of its queries, keys and values.

Legend: n ranks, B sequences, T = n c new tokens each, P cached, h and g heads, d head_dim.  Queries are [B, c, h, d]; keys
and values lie together as [B, rows, 2, g, d].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

from microbench.attention import reference
from microbench.case import Case, case, relative
from microbench.ring.transport import Transport
from simulator.dtypes import C_BF16
from simulator.kernels.attention import Causal, Segment, Window
from simulator.kernels.messages import PATTERNS
from simulator.layers import Attention
from simulator.layers.embedding import Embedding, Head
from simulator.layers.layer import Direction
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.parallel.scheme import mixing_of
from simulator.units import Num
from simulator.work import Leaf, Message, Quantity, Work, fold

KERNELS: tuple[str, ...] = ("context_attention", "context_attention_backward")
#: (heads, kv_heads, head_dim): Llama-3.1-8B, a rank of Llama-70B under TP8, gpt-oss-120B.
LAYOUTS = ((32, 8, 128), (8, 1, 128), (64, 8, 64))
#: New tokens of a rank.
LENGTHS = (8192, 16384, 32768, 65536, 131072)
LONGEST = 262144
#: The most that a backward pass is measured at.
LONGEST_BACKWARD = 65536


class Inputs(NamedTuple):
    """One rank's queries, keys and values (of its share of the past, and its own), and its output's gradient."""

    q: Any
    past: Any
    own: Any
    d_out: Any


class Returned(NamedTuple):
    """Gradients of a rank's queries, and of its past and own keys and values."""

    q: Any
    past: Any
    own: Any


class Place(NamedTuple):
    """What of a whole sequence a rank holds: its new tokens, its rows of the past, the query heads it keeps the past for."""

    tokens: Any
    past: range
    heads: range


class Program(Protocol):
    """One rank's part of a scheme."""

    def forward(self) -> Any:
        """Its rows of the output."""

    def backward(self) -> Returned:
        """Its gradients."""


@dataclass
class Scratch:
    """Buffers by name, made once, full of random numbers: a transport that moves nothing leaves plausible ones."""

    device: Any
    held: dict[str, Any] = field(default_factory=dict)

    def __call__(self, name: str, shape: tuple[int, ...], kind: Any) -> Any:
        """The buffer of that name."""
        if name not in self.held:
            self.held[name] = torch.empty(shape, dtype=kind, device=self.device)
            if kind.is_floating_point:
                self.held[name].normal_()
        return self.held[name]

    def like(self, name: str, tensor: Any, kind: Any = None) -> Any:
        """One of the shape of `tensor`."""
        return self(name, tuple(tensor.shape), kind or tensor.dtype)


def ways(tokens: int) -> tuple[bool, ...]:
    """Forward, and backward where it is not too long."""
    return (False, True) if tokens <= LONGEST_BACKWARD else (False,)


def is_backward(which: Case) -> bool:
    """Whether it times the backward pass."""
    return which.kernel == "context_attention_backward"


def past_of(which: Case) -> int:
    """P: cached tokens of a sequence, of all ranks together."""
    return which["context"] - which["ranks"] * which["tokens"]


def over(
    impl: str, layout: tuple[int, int, int], *, ranks: int, tokens: int, past: int = 0, sequences: int = 1, backward: bool = False, **more: int
) -> Case:
    """A case of `tokens` new tokens a rank, after `past` cached ones of the whole sequence.

    >>> over("ring_kv.zigzag", (32, 8, 128), ranks=4, tokens=8192).extents
    'ranks=4 sequences=1 tokens=8192 context=32768 heads=32 kv_heads=8 head_dim=128'
    """
    heads, kv_heads, head_dim = layout
    found = case(
        KERNELS[backward], impl, "bf16", ranks=ranks, sequences=sequences, tokens=tokens, context=ranks * tokens + past, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim,
    )  # fmt: skip
    return replace(found, shape=(*found.shape, *more.items()))


def work_of(which: Case, layout: Layout) -> Work:
    """The mixing part of one layer on one rank, as the simulator builds it for `layout`."""
    width = which["heads"] * which["head_dim"]
    mask = Window(which["window"]) if which.get("window") else Causal()
    layer = Attention(width, which["heads"], which["kv_heads"], which["head_dim"], mask=mask)
    model = ModelSpec("one layer", width, 1, ((1, (layer,)),), Embedding(1, width), Head(1, width))
    placed = layout.place(model)
    segments = (Segment(float(which["sequences"]), float(which["ranks"] * which["tokens"]), float(past_of(which))),)
    direction = Direction.BACKWARD if is_backward(which) else Direction.FORWARD
    return mixing_of(placed.work(layer, placed.shard(layer, segments), C_BF16, direction))


class Payload(Quantity):
    """Payload bytes of the messages of one pattern."""

    def leaf(self, op: Leaf) -> Num:
        """That of a message."""
        return op.payload_bytes if isinstance(op, Message) and op.pattern == self.name else 0.0


def payloads(work: Work) -> dict[str, float]:
    """What one rank hands over by the simulator's count, by pattern, as a transport counts it."""
    found = {pattern: float(fold(work, Payload(pattern))) for pattern in PATTERNS}
    return {pattern: value for pattern, value in found.items() if value}


Made = Callable[[Case, Transport, Inputs], Program]


def built(which: Case, transport: Transport, device: Any, make: Made, place: Callable[[Case, int], Place]) -> Callable[[], Any]:
    """One rank's program over random inputs of bf16; a backward one has run its forward."""
    held = place(which, transport.rank)
    groups = which["heads"] // which["kv_heads"]
    past, kv_heads = len(held.past), max(1, len(held.heads) // groups)
    b, c, d = which["sequences"], which["tokens"], which["head_dim"]

    def some(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()

    inputs = Inputs(
        some(b, c, which["heads"], d), some(b, past, 2, kv_heads, d), some(b, c, 2, which["kv_heads"], d), some(b, c, which["heads"], d)
    )
    program = make(which, transport, inputs)
    if not is_backward(which):
        return program.forward
    program.forward()
    return program.backward


def checked(
    which: Case, transport: Transport, device: Any, dtype: Any, make: Made, place: Callable[[Case, int], Place]
) -> float:
    """Relative error of this rank's rows (or the worst of its gradients) against attention over the whole sequence in float64.

    Every rank draws the same whole sequence and takes its part.
    """
    b, n, c, h, g, d = (which[name] for name in ("sequences", "ranks", "tokens", "heads", "kv_heads", "head_dim"))
    past, groups = past_of(which), h // g
    random = torch.Generator().manual_seed(n + 7 * h)
    q, d_out = (torch.randn(b, n * c, h, d, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    kv = torch.randn(b, past + n * c, 2, g, d, generator=random, dtype=torch.float64).to(dtype)
    held = place(which, transport.rank)
    kept = sorted({head // groups for head in held.heads})
    program = make(which, transport, Inputs(*(t.to(device) for t in (
        q[:, held.tokens], kv[:, held.past.start : held.past.stop][:, :, :, kept], kv[:, past + held.tokens], d_out[:, held.tokens]
    ))))  # fmt: skip
    out = program.forward()
    # every query head has keys of its own here, so that a rank's part of their gradient is known
    leaves = [q.double().requires_grad_(), kv.double().repeat_interleave(groups, 3).requires_grad_()]
    want = reference(leaves[0], leaves[1][:, :, 0], leaves[1][:, :, 1], which.get("window", 0))
    if not is_backward(which):
        return relative(out.cpu().double(), want.detach()[:, held.tokens])
    got = program.backward()
    d_q, d_kv = torch.autograd.grad(want, leaves, d_out.double())
    errors = [relative(got.q.cpu().double(), d_q[:, held.tokens])]
    errors.append(relative(got.own.cpu().double(), d_kv[:, past + held.tokens].unflatten(3, (g, groups)).sum(4)))
    if held.past:
        wanted = d_kv[:, held.past.start : held.past.stop, :, held.heads.start : held.heads.stop]
        errors.append(relative(got.past.cpu().double(), wanted.unflatten(3, (len(kept), -1)).sum(4)))
    return max(errors)
