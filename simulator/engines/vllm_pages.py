"""vLLM's pages: which caches share block tables, how many tokens a block has, how many blocks a request takes.

All groups draw blocks of one size from one pool.  Caches of one demand form one group (their pages add up).  Otherwise
- pages are made equal: the block of an attention cache grows until its page holds a recurrent state, states are padded to it,
  smaller pages take more tokens or are padded, and layers are dealt to groups of equal number (hybrid KV cache manager);
- DeepSeek-V4 keeps its unequal pages and packs them: a block is the widest group (earlier releases: `vllm_releases`).
Source: vLLM 0.33.0 v1/core/kv_cache_planning.py, v1/kv_cache_interface.py, platforms/interface.py _align_hybrid_block_size,
models/deepseek_v4/.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simulator.engines.paging import Demand, Held, by_kind, stage_of, stored_as
from simulator.layers import CompressedAttention, LatentAttention
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.units import Bytes, Count, Num, Tokens, ceil, floor, maximum, minimum, where

#: Tokens of a block of DeepSeek-V4's caches: entries and indexer keys; window; rings by ratio (models/deepseek_v4/compressor.py,
#: attention/backends/mla/sparse_swa.py).
_V4_BLOCKS = {Demand.FULL: 256, Demand.WINDOW: 64}
_V4_RING_BLOCKS = {8: 4, 128: 8}
#: Hybrid models with MLA keep blocks of a multiple of this many tokens.
_LATENT_BLOCK = 128

#: One cache: (block from the bottom, which of the things its mixers keep).
Member = tuple[int, int]
#: One kind of cache: (kind of block, which of the things its mixers keep).
Kind = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Group:
    """Caches that share block tables: `window` tokens live plus those in flight, None for all tokens or a state."""

    members: tuple[Member, ...]
    demand: Demand
    window: int | None

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks of the stack it serves, each once."""
        return tuple(dict.fromkeys(index for index, _ in self.members))


def groups(model: ModelSpec) -> list[Group]:
    """How vLLM groups the caches of a model; the same on every layout."""
    found = _packed(model) if _is_v4(model) else _dealt(model)
    return [group for group in found if group.members]


def _is_v4(model: ModelSpec) -> bool:
    return any(isinstance(layer, CompressedAttention) for _, layer in model.mixers)


def _buckets(model: ModelSpec) -> dict[tuple[object, ...], list[Member]]:
    """Caches by what they ask for: demand, width and bytes on one rank."""
    kinds = by_kind(model, Layout())
    found: dict[tuple[object, ...], list[Member]] = {}
    for index, kind in enumerate(model.order):
        for slot, held in enumerate(kinds[kind]):
            found.setdefault((held.demand, held.width, held.every, held.row_bytes), []).append((index, slot))
    return found


def _dealt(model: ModelSpec) -> list[Group]:
    """One group where all ask alike, else groups of equal size: that of the smallest bucket, or of the largest if that is less
    than 1.5 times it.
    """
    buckets = _buckets(model)
    alike = {(demand, width) for demand, width, *_ in buckets}
    if len(alike) == 1:
        ((demand, width),) = alike
        members = tuple(sorted(member for part in buckets.values() for member in part))
        return [_group(members, demand, width)]
    if not buckets:
        return []
    sizes = [len(part) for part in buckets.values()]
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    found = []
    for (demand, width, *_), members_ in buckets.items():
        parts = -(-len(members_) // size)
        found += [_group(tuple(members_[i::parts]), demand, width) for i in range(parts)]
    return found


def _group(members: tuple[Member, ...], demand: object, width: object) -> Group:
    assert isinstance(demand, Demand)
    assert width is None or isinstance(width, int)
    return Group(members, demand, width)


def _packed(model: ModelSpec) -> list[Group]:
    """DeepSeek-V4: one group per demand and window; those that repeat one pattern are split to as many repeats as waste least."""
    kinds = by_kind(model, Layout())
    parts: dict[tuple[Demand, int | None, int], dict[Bytes, list[Member]]] = {}
    for index, kind in enumerate(model.order):
        for slot, held in enumerate(kinds[kind]):
            key = (held.demand, held.width, _v4_block(held))
            parts.setdefault(key, {}).setdefault(_v4_page(model, held), []).append((index, slot))
    counts = {key: {len(members) for members in part.values()} for key, part in parts.items()}
    balanced = {key: counts[key].pop() for key in parts if len(counts[key]) == 1}
    mixed = [repeats for key, repeats in balanced.items() if len(parts[key]) > 1]
    repeats = _least_padding(list(balanced.values()), max(mixed)) if mixed else None
    found = []
    for (demand, width, block), part in parts.items():
        n = -(-balanced[demand, width, block] // repeats) if repeats and (demand, width, block) in balanced else 1
        columns = list(part.values())
        for i in range(n):
            members = tuple(sorted(member for column in columns for member in column[i::n]))
            found.append(Group(members, demand, width))
    return found


def _least_padding(values: list[int], least: int) -> int:
    """The divisor from `least` up whose multiples above the values are nearest in all; the larger of equals."""
    return min(range(least, max(*values, least) + 1), key=lambda d: (sum(-v % d for v in values), -d))


def _v4_block(held: Held) -> int:
    return _V4_RING_BLOCKS[held.width or 0] if held.demand is Demand.RING else _V4_BLOCKS[held.demand]


def _v4_page(model: ModelSpec, held: Held) -> Bytes:
    rows = max(_v4_block(held) // held.every, 1)
    multiple = stored_as(model).page_multiple
    return ceil(rows * held.row_bytes / multiple) * multiple


#: Groups with the tokens of their blocks and the bytes of their pages.
Made = list[tuple[Group, Num, dict[Kind, Bytes]]]


@dataclass(frozen=True, slots=True)
class Table:
    """A group on one rank: tokens of a block, bytes of a page of each kind of its caches, blocks of one request."""

    group: Group
    block: Num
    pages: dict[Kind, Bytes]
    count: Callable[[Tokens], Count]


def tables(
    model: ModelSpec, layout: Layout, *, block: int, in_flight: Tokens, state_copies: int, v4_block: str = "group"
) -> list[Table]:
    """Every group with its pages, on one layout or an array of them."""
    kinds = by_kind(model, layout)

    def first(group: Group) -> Held:
        index, slot = group.members[0]
        return kinds[model.order[index]][slot]

    found = groups(model)
    made: Made
    if _is_v4(model):
        made = [(group, float(_v4_block(first(group))), {k: _v4_page(model, kinds[k[0]][k[1]]) for k in _kinds(model, group)}) for group in found]
        made = made if v4_block == "group" else _padded(made)
    elif len(found) == 1 and found[0].demand is not Demand.STATE:
        rows = {k: kinds[k[0]][k[1]] for k in _kinds(model, found[0])}
        made = [(found[0], block * 1.0, {k: block / held.every * held.row_bytes for k, held in rows.items()})]
    else:
        made = _unified(model, found, first, block)
    return [
        Table(group, size, pages, _counter(group, size, first(group), layout, in_flight, state_copies)) for group, size, pages in made
    ]


def _padded(made: Made) -> Made:
    """Every page as large as the next of those that keep all tokens."""
    sizes = _full_sizes([(group, pages) for group, _, pages in made])

    def padded(page: Bytes) -> Bytes:
        return min(size for size in sizes if size >= page)

    return [(group, size, {kind: padded(page) for kind, page in pages.items()}) for group, size, pages in made]


def _full_sizes(groups_: list[tuple[Group, dict[Kind, Bytes]]]) -> set[float]:
    """The sizes of the pages of the groups that keep every token."""
    return {float(page) for group, pages in groups_ if group.demand is Demand.FULL for page in pages.values()}


def _kinds(model: ModelSpec, group: Group) -> tuple[Kind, ...]:
    return tuple(dict.fromkeys((model.order[index], slot) for index, slot in group.members))


def _unified(model: ModelSpec, found: list[Group], first: Callable[[Group], Held], block: int) -> Made:
    """Every page as large as the largest: attention blocks first grown over the largest state, then multiplied or padded."""
    states = [first(group).row_bytes for group in found if group.demand is Demand.STATE]
    rows = [first(group).row_bytes for group in found if group.demand is not Demand.STATE]
    state, row = _largest(states), _largest(rows)
    size: Num = block * 1.0
    if rows and states:
        latent = any(isinstance(layer, LatentAttention) for _, layer in model.mixers)
        step = float(max(block, _LATENT_BLOCK) if latent else block)
        size = maximum(size, step * ceil(state / (step * row)))
    page = maximum(state, size * row)
    made: Made = []
    for group in found:
        own = size
        if group.demand is not Demand.STATE:
            times = page / (size * first(group).row_bytes)
            # what does not divide the largest page is padded to it
            own = where(times == floor(times), size * times, size)
        made.append((group, own, dict.fromkeys(_kinds(model, group), page)))
    return made


def _largest(values: list[Bytes]) -> Bytes:
    most: Bytes = 0.0
    for value in values:
        most = maximum(most, value)
    return most


def _counter(group: Group, block: Num, first: Held, layout: Layout, in_flight: Tokens, state_copies: int) -> Callable[[Tokens], Count]:
    """Blocks of a request of L tokens: full ceil(ceil(L / dcp) / b); window W: ceil(min(W - 1 + F, L) / b) + 1; chunk K:
    ceil(min(K + F, L) / b), F tokens in flight; a state its copies.
    """
    width = first.width or 0

    def count(tokens: Tokens) -> Count:
        if group.demand is Demand.STATE:
            return state_copies * minimum(tokens, 1.0)
        if group.demand is Demand.FULL:
            return ceil(ceil(tokens / layout.dcp) / block)
        if group.demand is Demand.CHUNK:
            return ceil(minimum(width + in_flight, tokens) / block)
        return ceil(minimum(width - 1 + in_flight, tokens) / block) + 1

    return count


def pool_bytes(model: ModelSpec, layout: Layout, found: list[Table], v4_block: str = "group") -> Bytes:
    """One pool block: the pages of the fullest group on the stage that holds most of it; DeepSeek-V4's as the release makes it
    (`vllm_releases.Rules.v4_block`).
    """
    if not isinstance(layout.pp, np.ndarray):
        return _block_bytes(model, int(layout.pp), found, v4_block)
    sizes = {int(p): _block_bytes(model, int(p), found, v4_block) for p in np.unique(layout.pp)}
    return np.array([float(np.broadcast_to(sizes[int(p)], layout.pp.shape)[i]) for i, p in enumerate(layout.pp)])


def _block_bytes(model: ModelSpec, stages: int, found: list[Table], v4_block: str) -> Bytes:
    where_is = stage_of(model, stages)
    counted = [Counter((where_is[index], model.order[index], slot) for index, slot in table.group.members) for table in found]
    if _is_v4(model) and v4_block != "group":
        return max(_earlier_v4(found, counted, stage, v4_block) for stage in range(stages))
    widest: Bytes = 0.0
    for table, counts in zip(found, counted, strict=True):
        sums: dict[int, Bytes] = {}
        for (stage, kind, slot), times in counts.items():
            sums[stage] = sums.get(stage, 0.0) + times * table.pages[kind, slot]
        widest = maximum(widest, _largest(list(sums.values())))
    return widest


def _earlier_v4(found: list[Table], counted: list[Counter[tuple[int, int, int]]], stage: int, v4_block: str) -> Bytes:
    """DeepSeek-V4's block until 0.26: page sizes times layers, "tuples" as often for every size, "sizes" each as often as it occurs."""
    most: Counter[float] = Counter()
    for table, counts in zip(found, counted, strict=True):
        here: Counter[float] = Counter()
        for (at, kind, slot), times in counts.items():
            if at == stage:
                here[float(table.pages[kind, slot])] += times
        most |= here
    if v4_block == "sizes":
        return sum(size * times for size, times in most.items())
    return sum(_full_sizes([(table.group, table.pages) for table in found])) * max(most.values())


def weighed_blocks(model: ModelSpec, found: list[Table], tokens: Tokens) -> Count:
    """Blocks of one request, each group's by its bytes: ceil(sum over groups of blocks x page bytes / page bytes of the group that keeps all).

    Where all pages are equal (every model but DeepSeek-V4) a group counts as one page, so this is the sum of the blocks.
    """
    sizes = [sum(float(np.max(table.pages[model.order[index], slot])) for index, slot in table.group.members) for table in found]
    whole = next((size for table, size in zip(found, sizes, strict=True) if table.group.demand is Demand.FULL), sizes[0])
    total: Count = 0.0
    for table, size in zip(found, sizes, strict=True):
        total = total + table.count(tokens) * (size if _is_v4(model) else whole)
    return ceil(total / whole)


def prefix_tokens(found: list[Table], dcp: Num) -> int:
    """A prefix is found in whole multiples of this: the least common multiple of the groups' blocks."""
    sizes = [int(np.max(table.block)) for table in found]
    return math.lcm(*sizes) * (int(np.max(dcp)) if len(found) == 1 else 1) if sizes else 1
