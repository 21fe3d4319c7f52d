"""Decoding one token of each sequence over a cache that ranks share: every rank attends to its own tokens, outputs merge by
their log-sum-exp.

- "dcp": a rank makes the queries of its own heads.  All-gather of queries, attention with everyone's heads, all-gather of the
  log-sum-exps, reduce-scatter of the outputs weighed by them (vLLM, cp_lse_ag_out_rs).
- "helix": queries are made by all ranks that share the cache.  Attention, then one all-to-all hands each rank the partial
  outputs of its own heads, each with its maximum and its sum (TensorRT-LLM, alltoall_helix).  `cache_ranks` h of n ranks share
  tokens (all of them by default); the others split heads.
- "tree": queries are everywhere.  Attention, then three all-reduces: maximum, numerator, denominator (2408.04093).

Only the attention core and what it sends is run and counted: projections are those of any layer.
Legend: B sequences, H heads, g key-value heads, d head_dim, n ranks, h ranks that share tokens, S tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch

from microbench.attention import PAGE, reference
from microbench.case import Case, case, l2_of, relative, sets_for
from microbench.ring.shapes import drawn, filled, one_block
from microbench.ring.transport import Transport
from simulator.dtypes import C_BF16
from simulator.kernels.attention import Segment
from simulator.layers import Attention
from simulator.layers.layer import Direction
from simulator.parallel import Layout
from simulator.parallel.scheme import mixing_of
from simulator.work import Serial, Work

KERNELS: tuple[str, ...] = ("context_decode",)
IMPLS = ("dcp", "helix", "tree")
SEQUENCES = (1, 4, 16, 64)
CONTEXTS = (8_192, 32_768, 131_072, 524_288, 1_048_576)
#: (heads, key-value heads, head_dim): a rank of the first needs the others' heads, those of the second have their own.
ONE_HEAD, EIGHT_HEADS = (8, 1, 128), (32, 8, 128)
#: Most bytes of cache on one rank, and most sets of them that take turns so that none is found in the L2 cache.
MOST_BYTES, MOST_SETS = 24e9, 64
LOG2_E = 1.4426950408889634


def cases(suite: str, ranks: int) -> list[Case]:
    """Every way to merge over sequences and contexts."""
    if suite == "tiny":
        return [_case(impl, ranks, 2, 96 * ranks, (ranks * 2, 1 if impl == "dcp" else ranks, 16)) for impl in IMPLS]
    found = []
    for impl in IMPLS:
        heads = ONE_HEAD if impl == "dcp" else EIGHT_HEADS
        for batch in SEQUENCES:
            for context in CONTEXTS:
                which = _case(impl, ranks, batch, context, heads)
                if _cache_bytes(which) <= MOST_BYTES:
                    found.append(which)
    half = ranks // 2
    if half > 1:
        found += [_case("helix", ranks, b, c, EIGHT_HEADS, half) for b in (1, 16) for c in CONTEXTS[::2]]
    return found


def _case(impl: str, ranks: int, batch: int, context: int, heads: tuple[int, int, int], cache_ranks: int = 0) -> Case:
    h, g, d = heads
    found = case("context_decode", impl, "bf16", ranks=ranks, sequences=batch, tokens=1, context=context, heads=h, kv_heads=g, head_dim=d)
    return replace(found, shape=(*found.shape, ("cache_ranks", cache_ranks))) if cache_ranks else found


def sharers(which: Case) -> int:
    """How many ranks share the tokens of a sequence."""
    return which.get("cache_ranks") or which["ranks"]


def _cache_bytes(which: Case) -> float:
    groups = which["ranks"] // sharers(which)
    return 4.0 * which["sequences"] * which["context"] * which["kv_heads"] * which["head_dim"] / sharers(which) / groups


def layout_of(which: Case) -> Layout:
    """The simulator's layout of a case."""
    n = which["ranks"]
    if which.impl == "tree":
        return Layout(cp=n, merge="tree")
    return Layout(tp=n, helix=sharers(which)) if which.impl == "helix" else Layout(tp=n, dcp=n)


def work(which: Case) -> Work:
    """The core of one rank with the messages its scheme puts around it."""
    h, g, d = which["heads"], which["kv_heads"], which["head_dim"]
    layer = Attention(h * d, h, g, d)
    placed = layout_of(which).place(one_block(h * d, layer))
    segment = Segment(float(which["sequences"]), float(which["tokens"]), float(which["context"] - which["tokens"]), split_kv=True)
    held = placed.shard(layer, (segment,))
    found: Work = mixing_of(layer.work(held, cache=C_BF16))
    for scheme in placed.active:
        # the projections' all-reduce is not part of this
        if scheme.field != "tp":
            found = scheme.around(found, layer, held, C_BF16, Direction.FORWARD)
    return found if placed.active else Serial([found])


class Rank:
    """What one rank holds of a case: its place, its queries and buffers, and its share of the cache in sets that take turns."""

    def __init__(self, which: Case, transport: Transport, device: Any, dtype: Any) -> None:
        n, self.shared = which["ranks"], sharers(which)
        self.impl, self.batch, self.width, self.device, self.dtype = which.impl, which["sequences"], which["head_dim"], device, dtype
        self.group, self.index = divmod(transport.rank, self.shared)
        start = self.group * self.shared
        self.transport = transport if self.shared == n else transport.group(range(start, start + self.shared))
        groups = n // self.shared
        self.heads, self.kv_heads = which["heads"] // groups, which["kv_heads"] // groups
        #: Heads whose results end on this rank, and to how many ranks outputs go.
        self.parts = 1 if self.impl == "tree" else self.shared
        self.own = self.heads // self.parts
        rows = self.parts * self.batch * self.own
        asked = self.own if self.impl == "dcp" else self.heads
        self.query = filled((self.batch, asked, self.width), device, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # a maximum and a sum travel with each partial output of helix, in its own bytes
        tail = 2 * torch.empty((), dtype=wide).element_size() // torch.empty((), dtype=dtype).element_size() if self.impl == "helix" else 0
        shape = (self.parts, self.batch, self.own, self.width + tail)
        self.sent, self.received = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.outputs = self.sent[..., : self.width]
        self.stats = self.sent.view(wide)[..., -2:] if tail else torch.empty((*shape[:-1], 1), device=device, dtype=wide)
        self.weights, self.highest = (torch.empty(rows, device=device, dtype=wide) for _ in range(2))
        self.gathered = torch.empty(self.shared * rows, device=device, dtype=wide)
        self.queries = torch.empty((self.shared * self.batch, self.own, self.width), device=device, dtype=dtype)
        self.result = torch.empty((self.batch, self.own, self.width), device=device, dtype=dtype)
        self.caches: list[Cache] = []
        self.turn = cycle(self.caches)

    def __call__(self) -> Any:
        """One token of every sequence: the outputs of this rank's own heads [B, own, d] (tree: of all heads)."""
        cache = next(self.turn)
        return {"dcp": self._gathered, "helix": self._handed_over, "tree": self._reduced}[self.impl](cache)

    def _gathered(self, cache: Cache) -> Any:
        self.transport.all_gather(self.queries, self.query).wait()
        everyone = self.queries.view(self.shared, self.batch, self.own, self.width).transpose(0, 1)
        cache.attend(everyone.reshape(self.batch, self.heads, self.width), self.outputs, self.stats)
        lse = self.stats.view(-1)
        self.transport.all_gather(self.gathered, lse).wait()
        weigh(self.outputs, lse, self.gathered, self.weights)
        self.transport.reduce_scatter(self.result, self.sent.flatten(0, 1)).wait()
        return self.result

    def _handed_over(self, cache: Cache) -> Any:
        cache.attend(self.query, self.outputs, self.stats)
        self.transport.all_to_all(self.received, self.sent).wait()
        join(self.received, self.stats.dtype, self.result)
        return self.result

    def _reduced(self, cache: Cache) -> Any:
        cache.attend(self.query, self.outputs, self.stats)
        lse = self.stats.view(-1)
        self.highest.copy_(lse)
        self.transport.all_reduce(self.highest, most=True).wait()
        weigh(self.outputs, lse, self.highest, self.weights)
        self.transport.all_reduce(self.sent).wait()
        self.transport.all_reduce(self.weights).wait()
        return self.sent.view(self.batch, self.heads, self.width).div_(self.weights.view(self.batch, self.heads, 1))


class Cache:
    """A rank's tokens of every sequence: keys and values [B, S / h, g, d], on a GPU in pages."""

    def __init__(self, keys: Any, values: Any, rank: Rank) -> None:
        self.keys, self.values = keys, values
        if keys.is_cuda:
            from microbench import kernels_triton  # noqa: PLC0415 (needs a GPU)

            batch, tokens = keys.shape[:2]
            pages = -(-tokens // PAGE)
            self.kernels = kernels_triton
            self.keys, self.values = (_paged(t, pages) for t in (keys, values))
            self.table = torch.arange(batch * pages, device=keys.device, dtype=torch.int32).view(batch, pages)
            self.lengths = torch.full((batch,), tokens, device=keys.device, dtype=torch.int32)
            self.scratch = kernels_triton.paged_scratch(batch, rank.heads, rank.kv_heads, rank.width, tokens, keys.device, partial=True)

    def attend(self, query: Any, outputs: Any, stats: Any) -> None:
        """Attention of `query` [B, H, d] to these tokens: `outputs` [parts, B, H / parts, d] and, of the base-2 scores, their
        log-sum-exp or (two `stats`) their maximum and the sum of exponentials beyond it.
        """
        if query.is_cuda:
            self.kernels.paged_partial(query, self.keys, self.values, self.table, self.lengths, outputs, stats, self.scratch)
            return
        batch, heads, width = query.shape
        parts = outputs.shape[0]
        groups = heads // self.keys.shape[2]
        keys, values = (t.to(stats.dtype).repeat_interleave(groups, dim=2) for t in (self.keys, self.values))
        scores = torch.einsum("bhd,bshd->bhs", query.to(stats.dtype), keys) * (width**-0.5 * LOG2_E)
        highest = scores.amax(-1)
        shares = torch.exp2(scores - highest[..., None])
        total = shares.sum(-1)
        mean = torch.einsum("bhs,bshd->bhd", shares, values) / total[..., None]
        outputs.copy_(mean.view(batch, parts, -1, width).transpose(0, 1))
        found = [highest, total] if stats.shape[-1] > 1 else [highest + total.log2()]
        stats.copy_(torch.stack(found, -1).view(batch, parts, -1, len(found)).transpose(0, 1))


def _paged(t: Any, pages: int) -> Any:
    batch, tokens, heads, width = t.shape
    if tokens % PAGE:
        t = torch.cat([t, t.new_zeros(batch, pages * PAGE - tokens, heads, width)], 1)
    return t.view(batch * pages, PAGE, heads, width)


def weigh(outputs: Any, lse: Any, others: Any, weights: Any) -> None:
    """Outputs times 2^(own lse - the log-sum-exp of `others`, one or several to a row); `weights` holds the factors."""
    if outputs.is_cuda:
        from microbench import kernels_triton  # noqa: PLC0415 (needs a GPU)

        kernels_triton.weigh(outputs, lse, others, weights)
        return
    several = others.view(-1, lse.numel())
    highest = several.amax(0)
    weights.copy_(torch.exp2(lse - highest - torch.exp2(several - highest).sum(0).log2()))
    outputs.mul_(weights.view(outputs.shape[:-1]).unsqueeze(-1))


def join(received: Any, wide: Any, result: Any) -> None:
    """Partial outputs with their maximum and sum, [h, B, own, d + tail], into their weighed mean."""
    width = result.shape[-1]
    stats = received.view(wide)[..., -2:]
    if received.is_cuda:
        from microbench import kernels_triton  # noqa: PLC0415 (needs a GPU)

        kernels_triton.join_ranks(received, stats, result)
        return
    share = stats[..., 1] * torch.exp2(stats[..., 0] - stats[..., 0].amax(0))
    share = share / share.sum(0)
    result.copy_((received[..., :width].to(wide) * share.unsqueeze(-1)).sum(0))


def build(which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
    """One rank, with as many random caches as keep a turn of them out of the L2 cache."""
    rank = Rank(which, transport, device, torch.bfloat16)
    shape = (rank.batch, which["context"] // rank.shared, rank.kv_heads, rank.width)
    sets, _ = sets_for(_cache_bytes(which), l2_of(device), MOST_BYTES)
    rank.caches += [Cache(filled(shape, device), filled(shape, device), rank) for _ in range(min(sets, MOST_SETS))]
    return rank


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """This rank's outputs against attention to the whole cache, of at most 2 sequences and 777 tokens, unevenly shared."""
    small = dict(which.shape) | {"sequences": min(which["sequences"], 2), "context": min(which["context"], 777)}
    which = Case(which.kernel, which.impl, which.dtype, tuple(small.items()))
    b, h, g, d, s = (which[name] for name in ("sequences", "heads", "kv_heads", "head_dim", "context"))
    q, k, v = (drawn(seed, shape, device, dtype) for seed, shape in ((1, (b, h, d)), (2, (b, s, g, d)), (3, (b, s, g, d))))
    rank = Rank(which, transport, device, dtype)
    first = rank.group * rank.heads
    kept = slice(rank.group * rank.kv_heads, (rank.group + 1) * rank.kv_heads)
    own = slice(first + rank.index * rank.own, first + (rank.index + 1) * rank.own)
    if rank.impl == "tree":
        own = slice(0, h)
    rank.query.copy_(q[:, own if rank.impl == "dcp" else slice(first, first + rank.heads)])
    mine = [t[:, :, kept].tensor_split(rank.shared, dim=1)[rank.index].contiguous() for t in (k, v)]
    rank.caches.append(Cache(mine[0], mine[1], rank))
    for buffer in (rank.sent, rank.received, rank.result):
        buffer.fill_(float("nan"))
    want = reference(q.double().unsqueeze(1), k.double(), v.double(), 0)[:, 0, own]
    return relative(rank().double(), want)
