"""What a paged allocator is asked for: each thing that each kind of layer keeps, in pages of tokens.

An engine turns the state plan of a mixer (`Mixer.kept`) into demands: rows for every token, rows of a window or chunk, states.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from simulator.dtypes import CACHE_FORMATS, CacheFormat, CacheRow
from simulator.kernels.attention import Causal, Chunked, Segment
from simulator.layers import CompressedAttention
from simulator.layers.layer import Keep, Kept, Layer, Mixer, is_mixer
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.units import Bytes, Fraction, Tokens

_ASKED = (Segment(1.0, 0.0, 1.0),)
#: Indexer keys are e4m3 with one fp32 scale per 128 whatever the cache's format.  vLLM 0.33 models/deepseek_v4/attention.py
#: DeepseekV4IndexerCache, SGLang 0.5.23 pool_configurator.py _compute_dsa_indexer_cell_size.
_INDEX_BITS = 8 + 32 / 128


class Demand(Enum):
    """How a thing is held."""

    FULL = "full"  # a row for every token, or for every few
    WINDOW = "window"  # rows of the newest tokens
    CHUNK = "chunk"  # rows of the current chunk
    STATE = "state"  # one per sequence
    RING = "ring"  # tokens that wait for compression


@dataclass(frozen=True, slots=True)
class Held:
    """One thing a layer keeps on one rank: rows of `row_bytes`, one every `every` tokens, `width` tokens of them (None: all).

    A state has one row.
    """

    demand: Demand
    row_bytes: Bytes
    every: int = 1
    width: int | None = None

    def same_as(self, other: Held) -> bool:
        """Whether both are held alike, but for the bytes of a row."""
        return (self.demand, self.every, self.width) == (other.demand, other.every, other.width)


def row_bytes(cache: CacheFormat, row: CacheRow) -> Bytes:
    """Bytes of one row as engines store it."""
    if row.index and cache.index_bits is None:
        return row.elements * (_INDEX_BITS / 8)
    return cache.row_bytes(row)


def demands(layer: Mixer, items: tuple[Kept, ...], cache: CacheFormat) -> tuple[Held, ...]:
    """What a mixer asks for: its rows one by one, its states together."""
    found: list[Held] = []
    state: Bytes = 0.0
    for item in items:
        if item.keep is Keep.TAIL:
            found.append(_ring(layer, item))
        elif item.every == 0:
            state = state + (item.row.elements + item.row.rope) * (item.dtype or cache.compute).bytes
        elif item.grows:
            found.append(Held(Demand.FULL, row_bytes(cache, item.row), item.every))
        else:
            chunked = isinstance(getattr(layer, "mask", Causal()), Chunked)
            found.append(Held(Demand.CHUNK if chunked else Demand.WINDOW, row_bytes(cache, item.row), item.every, item.most))
    if type(state) is not float or state:
        found.append(Held(Demand.STATE, state))
    return tuple(found)


def _ring(layer: Layer, item: Kept) -> Held:
    """Tokens that wait for compression: (1 + overlap) m rows of values and gates."""
    assert isinstance(layer, CompressedAttention), type(layer).__name__
    rows = (1 + layer.overlap) * layer.compress_ratio
    size = item.row.elements * (item.dtype.bytes if item.dtype else 1.0)
    return Held(Demand.RING, size / rows, 1, rows)


def stored_as(model: ModelSpec) -> CacheFormat:
    """The format engines keep the cache in: DeepSeek-V4's is always its packed fp8 layout, whatever was asked.

    Source: vLLM 0.33 models/deepseek_v4/attention.py _resolve_dsv4_kv_cache_dtype; SGLang 0.5.23 pool_configurator.py DSV4PoolConfigurator.
    """
    compressed = any(isinstance(layer, CompressedAttention) for _, layer in model.mixers)
    return CACHE_FORMATS["fp8_ds_v4"] if compressed and model.cache.latent_width is None else model.cache


def by_kind(model: ModelSpec, layout: Layout) -> list[tuple[Held, ...]]:
    """For each kind of block, what its mixers ask of one rank of a layout, or of an array of layouts."""
    placed, cache = layout.place(model), stored_as(model)
    return [
        tuple(
            held for layer in block if is_mixer(layer)
            for held in demands(layer, layer.kept(placed.shard(layer, _ASKED)), cache)
        )
        for block in model.kinds
    ]  # fmt: skip


def stage_of(model: ModelSpec, stages: int) -> list[int]:
    """The pipeline stage of every block, split as the engine splits."""
    found: list[int] = []
    for number, stage in enumerate(Layout(pp=stages).pipeline.stages(model)):
        found += [number] * round(sum(float(count) for count in stage.counts) * float(stage.times))
    return found


def keeps(model: ModelSpec) -> bool:
    """Whether a model remembers anything between steps."""
    return any(demands(layer, layer.kept(layer.whole(_ASKED)), model.cache) for _, layer in model.mixers)


def check_kept(model: ModelSpec) -> None:
    """Refuse a model that remembers nothing between steps: there is no cache to allocate."""
    if not keeps(model):
        message = f"{model.name} keeps no cache: it reads a text at once and decodes nothing; ask longctx size for its time"
        raise ValueError(message)


# ---- what allocators waste


def reserved_waste(prompt: Tokens, output: Tokens, reserved: Tokens | None = None) -> Fraction:
    """Share of slots that hold no token where each running request has `reserved` slots, or exactly as many as it will need (None).

    Outputs are geometric with mean o, so a running request has as many tokens behind it as ahead: it holds p + o of the p + 2 o it
    will need (long outputs run longer).  Validity: steady state, no request above `reserved`.  Neglected: gaps between
    reservations, which an allocator of contiguous memory adds.  Source: definition (derived).

    >>> round(reserved_waste(161, 338, 2048), 3), round(reserved_waste(161, 338), 3)
    (0.756, 0.404)
    """
    return 1 - (prompt + output) / (prompt + 2 * output if reserved is None else reserved)


def paged_waste(prompt: Tokens, output: Tokens, block: int) -> Fraction:
    """The same where blocks of `block` tokens are taken as needed: (b - 1) / 2 empty slots in the last, of p + o tokens and those.

    Validity: lengths spread evenly over a block.  Source: definition; PagedAttention (2309.06180) section 4.

    >>> round(paged_waste(1024, 0, 16), 4)
    0.0073
    """
    empty = (block - 1) / 2
    return empty / (prompt + output + empty)
