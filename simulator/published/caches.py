"""Cache sizes that others printed, each compared as the one that printed it counts.

`data/published/kv_capacity.csv` has a line for a row of `measurements.csv`: the model of the catalog it is, what quantity its number is, `inputs` that
stand elsewhere in its source (release, batch, draft layers), whether it only bounds (`relation`), and the explanation of what deviates by more than
`TOLERANCE` or cannot be compared.  Architectures are compared as architectures, pools of an engine through that engine.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from simulator.data import data_path
from simulator.dtypes import CACHE_FORMATS, CacheRow
from simulator.engines import Vllm
from simulator.engines.vllm import Capacity
from simulator.estimate import Interval
from simulator.hardware import cluster
from simulator.hf import with_formats
from simulator.kernels.elementwise import activation
from simulator.layers import GatedMLP, LatentAttention
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import System
from simulator.published.table import Asked, Measurement, refuse, spec

#: What an exact comparison may be off; more needs an explanation.
TOLERANCE = 0.002
_GIB = 2.0**30
#: Any machine: a log states the pool, and its block and batch are inputs here.
_MACHINE = "h200"


@dataclass(frozen=True)
class Log:
    """A row with what `kv_capacity.csv` says of it."""

    row: Measurement
    catalog_id: str
    quantity: str
    relation: str
    stated: Mapping[str, str]
    explanation: str

    @property
    def value(self) -> float:
        """The number as printed."""
        return float(self.row.value)

    def text(self, name: str, default: str = "") -> str:
        """An input: of this table, else of the row."""
        return self.stated.get(name) or self.row.inputs.get(name) or default

    def number(self, name: str, default: float | None = None) -> float:
        """An input as a number."""
        found = re.match(r"\s*[\d.]+(?:e\d+)?", self.text(name))
        if found is None and default is None:
            refuse(f"{name} is not stated")
        return float(found[0]) if found else float(default or 0.0)

    @property
    def pool_bytes(self) -> float:
        """What the log says is left for the cache; SGLang's "GB" of keys and of values are GiB."""
        if "K" in self.row.inputs:
            return (self.row.number("K") + self.row.number("V")) * _GIB
        return self.number("available_kv") * (1.0 if self.text("available_kv").endswith(" B") else _GIB)

    @property
    def layout(self) -> Layout:
        """The degrees that the row states."""
        return Layout(tp=self.number("tp", 1), dcp=self.number("dcp", 1))

    @property
    def model(self) -> ModelSpec:
        """Its model with the cache it was asked for, and the layers of a draft that its engine adds."""
        found = with_formats(spec(self.catalog_id), None, self.text("cache") or None)
        drafts = int(self.number("draft_layers", 0))
        return replace(found, blocks=(*found.blocks, (drafts, found.extra[0][1]))) if drafts else found

    @property
    def engine(self) -> Vllm:
        """The vLLM that printed it."""
        return Vllm(release=self.text("release") or None, chunk=int(self.number("chunk", 8192)), block_size=int(self.number("block", 16)))


def logs() -> tuple[str, ...]:
    """The rows that are described."""
    return tuple(_described())


@cache
def _described() -> Mapping[str, Mapping[str, str]]:
    with data_path("published", "kv_capacity.csv").open(encoding="utf-8", newline="") as file:
        return {line["id"]: line for line in csv.DictReader(file)}


def log(row: Measurement) -> Log | None:
    """The row with its description, None where it has none."""
    line = _described().get(row.id)
    if line is None:
        return None
    stated = dict(part.split("=", 1) for part in line["inputs"].split(";") if part)
    return Log(row, line["catalog_id"], line["quantity"], line["relation"], stated, line["explanation"])


# ---- (printed, unit, ours) of a log, by the quantity it prints

Pair = tuple[float, str, float]


def tokens_of_pool(of: Log) -> Pair:
    """Tokens of a pool whose only group keeps every token: pool / bytes per token and GPU, without the rounding to blocks."""
    held = float(System(of.model, of.layout).footprint(sequences=1.0, context=1.0, step_tokens=1.0).cache)
    return of.value, "tokens", of.pool_bytes / held


def _capacity(of: Log, tokens: float, *, pool_bytes: float | None = None) -> Capacity:
    """What its engine makes of the pool that the row states, or of `pool_bytes`."""
    pool = of.pool_bytes if pool_bytes is None else pool_bytes
    return of.engine.capacity(of.model, of.layout, cluster(_MACHINE, 8), int(tokens), available_bytes=pool)


def vllm_tokens(of: Log) -> Pair:
    """VLLM's "GPU KV cache size": of its maximum concurrency where caches differ."""
    return of.value, "tokens", float(_capacity(of, of.number("max_model_len", 8192)).tokens)


def vllm_sequence(of: Log) -> Pair:
    """GiB that vLLM wants for one sequence of `context_len`, or for `sequences`."""
    held = _capacity(of, of.row.number("context_len"), pool_bytes=0.0)
    return of.value * _GIB, "B", float(held.per_sequence_bytes) * of.number("sequences", 1)


def vllm_longest(of: Log) -> Pair:
    """The length that vLLM estimates for a pool too small for the one asked: the most tokens whose blocks fit."""
    held, model, gpu = _capacity(of, 1.0), of.model, cluster(_MACHINE, 8).gpu

    def fits(tokens: int) -> bool:
        return float(of.engine.blocks_per_sequence(model, of.layout, gpu, float(tokens)) * held.block_bytes) <= of.pool_bytes

    low, high = 0, int(of.number("max_model_len"))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return of.value, "tokens", float(low)


def sequence(of: Log) -> Pair:
    """GiB of the caches of `sequences` sequences of `context_len`, by architecture."""
    return of.value * _GIB, "B", float(of.model.cache_bytes(of.row.number("context_len"))) * of.number("sequences", 1)


def growing_sequence(of: Log) -> Pair:
    """The same without what stops growing."""
    return of.value * _GIB, "B", float(of.model.slope()) * of.row.number("context_len")


def row_of_a_layer(of: Log) -> Pair:
    """Bytes of one token in one layer."""
    (latent,) = {layer for _, layer in of.model.mixers if isinstance(layer, LatentAttention)}
    row = CacheRow(latent.kv_lora_rank, latent.qk_rope_head_dim, latent=True)
    return of.value, "B", float(CACHE_FORMATS["fp8_ds_mla"].bytes(1, row))


def weights(of: Log) -> Pair:
    """Weights of a GPU; the log prints GiB as GB."""
    return of.value * _GIB, "B", float(of.model.weight_bytes() / of.layout.tp)


def mlp_activation(of: Log) -> Pair:
    """Gate and up of one layer for a whole prompt; the source prints GiB as GB."""
    mlp = next(layer for layer in of.model.layers if isinstance(layer, GatedMLP))
    op = activation("silu", tokens=of.row.number("seq_len"), width=float(mlp.intermediate_size))
    return of.value * _GIB, "B", float(op.hbm_bytes) * 2 / 3


def longest_context(of: Log) -> Pair:
    """The longest context of one request on the machine of the row."""
    model = with_formats(of.model, of.text("weights") or None, None)
    on, engine = cluster(of.row.hardware.split("-")[0].lower(), int(of.row.n_gpus)), Vllm()
    return of.value, "tokens", float(engine.longest(model, of.layout, on, engine.capacity(model, of.layout, on, 1000)))


def vram(of: Log) -> Pair:
    """Weights and the cache of one sequence; printed in GB."""
    return of.value * 1e9, "B", float(of.model.weight_bytes() + of.model.cache_bytes(of.row.number("context_len")))


QUANTITIES: Mapping[str, Callable[[Log], Pair]] = {
    "tokens_of_pool": tokens_of_pool, "vllm_tokens": vllm_tokens, "vllm_sequence_gib": vllm_sequence, "vllm_longest": vllm_longest,
    "sequence_gib": sequence, "growing_sequence_gib": growing_sequence, "row_bytes": row_of_a_layer, "weights_gib": weights,
    "mlp_activation_gib": mlp_activation, "longest_context": longest_context, "vram_gb": vram,
}  # fmt: skip


def cache_size(row: Measurement) -> Asked:
    """The question a row of kind kv_capacity asks; refused where it states a bound, or too little."""
    of = log(row)
    if of is None:
        spec(row.model)
        refuse(f"{row.unit}: neither a pool nor a sequence in bytes is stated")
    if of.relation:
        refuse(f"a bound, {of.relation}: {of.explanation}")
    if not of.quantity:
        refuse(of.explanation)
    measured, unit, ours = QUANTITIES[of.quantity](of)
    return Asked(measured, unit, lambda _: Interval(ours, ours, ours, "analytic"), explanation=of.explanation)
