"""A layer of experts that n ranks share: every rank routes its own tokens, rows travel to the ranks of their experts and back.

norm, router, rows sorted by expert, all-to-all there, rows of all ranks sorted by local expert, grouped products with the gated
activation, the same way back, weighed sum into tokens.  A token sends a row for each of its experts (Megatron's all-to-all
dispatcher).  Choices are drawn beforehand, so that top-k and counting are not timed: uniform, or `balanced` = 1, where every
expert gets as many rows.

Legend: T tokens of a rank, D hidden, E experts, k experts per token, F width of an expert, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from microbench.case import Case, case, relative
from microbench.elementwise import EPS
from microbench.gemm import grouped
from microbench.ring import steps
from microbench.ring.shapes import drawn, filled, one_block
from microbench.ring.transport import Transport
from simulator.dtypes import C_BF16
from simulator.kernels.attention import Segment
from simulator.kernels.elementwise import copy
from simulator.layers import MoE
from simulator.parallel import Layout
from simulator.work import Serial, Work

KERNELS: tuple[str, ...] = ("expert_layer",)
IMPLS = ("ep",)
#: (hidden, experts, experts per token, width): Qwen3-30B-A3B, DeepSeek-V3 without its shared expert.
SHAPES = ((2048, 128, 8, 768), (7168, 256, 8, 2048))
TOKENS = (1, 16, 128, 1024, 4096, 16384)
MOST_BYTES = 48e9


def cases(suite: str, ranks: int) -> list[Case]:
    """Drawn and balanced routing over tokens."""
    if suite == "tiny":
        return [_case(ranks, 4 * ranks, (32, 2 * ranks, 2, 24), balanced) for balanced in (0, 1)]
    found = [_case(ranks, t, shape, balanced) for shape in SHAPES for t in TOKENS for balanced in (0, 1)]
    return [c for c in found if _bytes(c) <= MOST_BYTES]


def _case(ranks: int, tokens: int, shape: tuple[int, int, int, int], balanced: int) -> Case:
    hidden, experts, top, width = shape
    return case(
        "expert_layer", "ep", "bf16", ranks=ranks, tokens=tokens, hidden=hidden, experts=experts, top_k=top, width=width, balanced=balanced
    )


def _bytes(which: Case) -> float:
    """Weights of a rank, and rows in and out of the widest product, twice over."""
    rows = 2.0 * which["tokens"] * which["top_k"]
    return 2.0 * (3.0 * which["hidden"] * which["width"] * which["experts"] / which["ranks"] + rows * (2 * which["hidden"] + 3 * which["width"]))


def layer_of(which: Case) -> MoE:
    """The simulator's layer of a case."""
    return MoE(which["hidden"], which["experts"], which["top_k"], which["width"], balanced=bool(which["balanced"]))


def work(which: Case) -> Work:
    """The busiest rank, with the two copies of rows that this all-to-all needs: it delivers rows by rank, the products want
    them by expert.  (Engines' own dispatch kernels write rows where the products want them.)
    """
    n, layer = which["ranks"], layer_of(which)
    placed = Layout(dp_attention=n, ep=n).place(one_block(which["hidden"], layer))
    held = placed.shard(layer, (Segment(float(n), float(which["tokens"]), 0.0),))
    rows = layer.routed(held)[0]
    sorts = [copy(name, rows=rows, width=float(which["hidden"])) for name in ("sort by expert", "sort by rank")] if n > 1 else []
    return Serial([placed.work(layer, held, C_BF16), *sorts])


def choices(which: Case, rank: int) -> Any:
    """The experts [T, k] of a rank's tokens, each token's distinct; the same on whichever rank asks."""
    tokens, experts, top = which["tokens"], which["experts"], which["top_k"]
    if which["balanced"]:
        # the rows of all ranks go round the ranks, and of each round its experts
        first, n = rank * tokens * top, which["ranks"]
        turn = torch.arange(first, first + tokens * top) % experts
        return (turn % n * (experts // n) + turn // n).view(tokens, top)
    generator = torch.Generator().manual_seed(1009 * tokens + rank)
    return torch.rand((tokens, experts), generator=generator).topk(top).indices


class Rank:
    """One rank: its tokens, its experts, and where every row goes."""

    def __init__(self, which: Case, transport: Transport, device: Any, dtype: Any) -> None:
        n, rank = transport.size, transport.rank
        self.transport, self.which, self.device, self.dtype = transport, which, device, dtype
        hidden, self.top, width = which["hidden"], which["top_k"], which["width"]
        local = which["experts"] // n
        self.x, self.residual = (filled((which["tokens"], hidden), device, dtype) for _ in range(2))
        self.gain = torch.ones(hidden, device=device, dtype=dtype)
        self.router = filled((which["experts"], hidden), device, dtype, hidden**-0.5)
        self.gate_up = filled((local, 2 * width, hidden), device, dtype, hidden**-0.5)
        self.down = filled((local, hidden, width), device, dtype, width**-0.5)
        every = [choices(which, r).flatten() for r in range(n)]
        mine = every[rank]
        order = mine.argsort(stable=True)
        self.sources = (order // self.top).to(device, torch.int32)
        self.places = order.argsort().view(-1, self.top).to(device, torch.int32)
        self.shares = torch.full((which["tokens"], self.top), 1 / self.top, device=device, dtype=dtype)
        sent = torch.bincount(mine // local, minlength=n)
        first = rank * local
        counts = torch.stack([torch.bincount(e, minlength=which["experts"])[first : first + local] for e in every])
        self.rows_out, self.rows_in = sent.tolist(), counts.sum(1).tolist()
        # rows arrive by rank and, of each, by expert
        expert = torch.arange(local).repeat(n).repeat_interleave(counts.flatten())
        by_expert = expert.argsort(stable=True)
        self.by_expert, self.by_rank = (t.to(device, torch.int32) for t in (by_expert, by_expert.argsort()))
        self.ends = counts.sum(0).cumsum(0).to(device, torch.int32)

    def __call__(self) -> Any:
        """The layer's output [T, D] and the residual stream."""
        rows_in = sum(self.rows_in)
        normed, residual = steps.norm(self.x, self.residual, self.gain, EPS)
        normed @ self.router.t()
        rows = steps.gather(normed, self.sources)
        rows = self._travel(rows, rows_in, self.rows_in, self.rows_out)
        if rows_in:
            rows = self._sorted(rows, self.by_expert)
            inner = steps.activation(grouped(rows, self.gate_up, self.ends))
            rows = self._sorted(grouped(inner, self.down, self.ends), self.by_rank)
        rows = self._travel(rows, self.sources.numel(), self.rows_out, self.rows_in)
        return steps.combine(rows, self.places, self.shares), residual

    def _sorted(self, rows: Any, index: Any) -> Any:
        return rows if self.transport.size == 1 else steps.gather(rows, index)

    def _travel(self, rows: Any, arriving: int, from_ranks: list[int], to_ranks: list[int]) -> Any:
        if self.transport.size == 1:
            return rows
        out = torch.empty((arriving, rows.shape[1]), device=rows.device, dtype=rows.dtype)
        self.transport.all_to_all(out, rows, out_rows=from_ranks, rows=to_ranks).wait()
        return out


def build(which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
    """One rank with random tokens and weights."""
    return Rank(which, transport, device, torch.bfloat16)


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """This rank's tokens against each of their experts, one row at a time."""
    n, rank = transport.size, transport.rank
    small = {"tokens": min(which["tokens"], 32), "hidden": min(which["hidden"], 64), "experts": min(which["experts"], 8 * n), "width": min(which["width"], 48)}
    which = Case(which.kernel, which.impl, which.dtype, tuple((dict(which.shape) | small).items()))
    here = Rank(which, transport, device, dtype)
    hidden, experts, width, local = which["hidden"], which["experts"], which["width"], which["experts"] // n
    here.x, here.residual = (drawn(seed + rank, (which["tokens"], hidden), device, dtype) for seed in (100, 200))
    gate_up = drawn(1, (experts, 2 * width, hidden), device, dtype, hidden**-0.5)
    down = drawn(2, (experts, hidden, width), device, dtype, width**-0.5)
    here.gate_up, here.down = (t[rank * local : (rank + 1) * local].contiguous() for t in (gate_up, down))
    got, residual = here()
    total = (here.x + here.residual).double()
    normed = total * torch.rsqrt((total * total).mean(-1, keepdim=True) + EPS)
    chosen = choices(which, rank).to(device)
    want = torch.zeros_like(normed)
    for slot in range(here.top):
        gate, up = torch.einsum("tfd,td->tf", gate_up.double()[chosen[:, slot]], normed).chunk(2, -1)
        want += torch.einsum("tdf,tf->td", down.double()[chosen[:, slot]], torch.nn.functional.silu(gate) * up) / here.top
    return max(relative(got.double(), want), relative(residual.double(), total))
