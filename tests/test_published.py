"""What others measured: each number beside ours, and a reason where they differ."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable

import pytest

from simulator import Layout
from simulator.data import data_path
from simulator.dtypes import CACHE_FORMATS, CacheRow
from simulator.engines import Vllm
from simulator.engines.vllm_pages import Table, pool_bytes
from simulator.hf import catalog, with_formats
from simulator.kernels.elementwise import activation
from simulator.layers import GatedMLP, LatentAttention
from simulator.model import ModelSpec
from simulator.phases import System
from tests.support import machine, model

GIB = 2**30
TOLERANCE = 0.002
Row = dict[str, str]


def read() -> list[Row]:
    with data_path("published", "kv_capacity.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


ROWS = read()
every_row = pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])


def inputs(row: Row) -> dict[str, str]:
    """`other_inputs` as a mapping: "available_kv=3.81 GiB;blocks=1952x16"."""
    return dict(part.split("=", 1) for part in row["other_inputs"].split(";") if "=" in part)


def number(text: str) -> float:
    return float(re.match(r"[\d.]+", text)[0])  # type: ignore[index]


def tensor_ranks(row: Row) -> int:
    return int(number(row["parallelism"].removeprefix("tp="))) if row["parallelism"].startswith("tp=") else 1


def cache_per_token(spec: ModelSpec, tp: int) -> float:
    return float(System(spec, Layout(tp=tp)).footprint(sequences=1.0, context=1.0, step_tokens=1.0).cache)


# ---- theirs and ours, by the quantity a row is about


def per_token_per_gpu(row: Row, spec: ModelSpec) -> tuple[float, float]:
    given = inputs(row)
    pool = number(given["available_kv"]) if "available_kv" in given else number(given["K"]) + number(given["V"])
    stored = with_formats(spec, None, given.get("cache"))
    return pool * GIB / float(row["value"]), cache_per_token(stored, tensor_ranks(row))


def weights_per_gpu(row: Row, spec: ModelSpec) -> tuple[float, float]:
    return float(row["value"]) * GIB, spec.weight_bytes() / tensor_ranks(row)


def tokens_of_blocks(row: Row, spec: ModelSpec) -> tuple[float, float]:
    blocks, size = inputs(row)["blocks"].split("x")
    return float(row["value"]), float(blocks) * float(size)


def pages(row: Row, spec: ModelSpec) -> tuple[float, Callable[[float], float], list[Table]]:
    """Bytes of a pool block, blocks of a request, and the groups, as a row's engine was started."""
    given = inputs(row)
    stored, part = with_formats(spec, None, given.get("cache")), machine("h100", 8)
    dcp = int(row["parallelism"].split("dcp=")[1].split(";")[0]) if "dcp=" in row["parallelism"] else 1
    layout = Layout(tp=tensor_ranks(row), dcp=dcp)
    copies = int(given["state_copies"]) if "state_copies" in given else None
    engine = Vllm(chunk=int(given.get("chunk", 8192)), state_copies=copies, block_size=64 if given.get("cache") == "fp8_ds_mla" else None)
    found = engine.tables(stored, layout, part.gpu)
    extra = int(given.get("extra_layers", 0)) / spec.num_layers
    return float(pool_bytes(stored, layout, found)) * (1 + extra), lambda tokens: sum(float(t.count(tokens)) for t in found), found


def vllm_tokens(row: Row, spec: ModelSpec) -> tuple[float, float]:
    pool, blocks, _ = pages(row, spec)
    given = inputs(row)
    length = number(given["max_model_len"])
    return float(row["value"]), int(number(given["available_kv"]) * GIB // pool / blocks(length) * length)


def vllm_tokens_by_group(row: Row, spec: ModelSpec) -> tuple[float, float]:
    pool, _, found = pages(row, spec)
    return float(row["value"]), number(inputs(row)["available_kv"]) * GIB // pool // len(found) * float(found[0].block)


def vllm_bytes_per_sequence(row: Row, spec: ModelSpec) -> tuple[float, float]:
    pool, blocks, _ = pages(row, spec)
    return float(row["value"]) * GIB, blocks(float(row["context_len"])) * pool


def vllm_longest(row: Row, spec: ModelSpec) -> tuple[float, float]:
    pool, blocks, _ = pages(row, spec)
    fits = number(inputs(row)["available_kv"]) * GIB // pool
    return float(row["value"]), float(max((n for n in range(0, 2**18, 64) if blocks(float(n)) <= fits), default=0))


def vllm_bytes_of_sequences(row: Row, spec: ModelSpec) -> tuple[float, float]:
    pool, blocks, _ = pages(row, spec)
    return float(row["value"]) * GIB, int(inputs(row)["sequences"]) * blocks(float(row["context_len"])) * pool


def bytes_of_sequences(row: Row, spec: ModelSpec) -> tuple[float, float]:
    return float(row["value"]) * GIB, int(inputs(row)["sequences"]) * spec.cache_bytes(float(row["context_len"]))


def growing_bytes_per_sequence(row: Row, spec: ModelSpec) -> tuple[float, float]:
    return float(row["value"]) * GIB, spec.slope() * float(row["context_len"])


def per_sequence(row: Row, spec: ModelSpec) -> tuple[float, float]:
    return float(row["value"]) * GIB, spec.cache_bytes(float(row["context_len"]))


def per_token_per_layer(row: Row, spec: ModelSpec) -> tuple[float, float]:
    (latent,) = {mixer for _, mixer in spec.mixers}
    assert isinstance(latent, LatentAttention)
    return float(row["value"]), CACHE_FORMATS["fp8_ds_mla"].bytes(1, CacheRow(latent.kv_lora_rank, latent.qk_rope_head_dim, latent=True))


def longest_context(row: Row, spec: ModelSpec) -> tuple[float, float]:
    stored = with_formats(spec, "fp8" if "FP8" in row["model"] else None, None)
    part, layout, engine = machine(row["hardware"].split("-")[0].lower(), int(row["n_gpus"])), Layout(tp=tensor_ranks(row)), Vllm()
    return float(row["value"]), float(engine.longest(stored, layout, part, engine.capacity(stored, layout, part, 1000)))


def vram(row: Row, spec: ModelSpec) -> tuple[float, float]:
    return float(row["value"]) * 1e9, spec.weight_bytes() + spec.cache_bytes(float(row["context_len"]))


def mlp_activation(row: Row, spec: ModelSpec) -> tuple[float, float]:
    mlp = next(layer for layer in spec.layers if isinstance(layer, GatedMLP))
    op = activation("silu", tokens=float(row["seq_len"]), width=float(mlp.intermediate_size))
    return float(row["value"]) * 1e9, op.hbm_bytes * 2 / 3


QUANTITIES: dict[str, Callable[[Row, ModelSpec], tuple[float, float]]] = {
    "bytes_per_token_per_gpu": per_token_per_gpu, "weight_bytes_per_gpu": weights_per_gpu, "tokens_of_blocks": tokens_of_blocks,
    "bytes_per_sequence": per_sequence, "bytes_per_token_per_layer": per_token_per_layer, "longest_context": longest_context, "vram_bytes": vram,
    "mlp_activation_bytes": mlp_activation, "vllm_tokens": vllm_tokens, "vllm_tokens_by_group": vllm_tokens_by_group,
    "vllm_bytes_per_sequence": vllm_bytes_per_sequence, "vllm_longest": vllm_longest, "vllm_bytes_of_sequences": vllm_bytes_of_sequences,
    "bytes_of_sequences": bytes_of_sequences, "growing_bytes_per_sequence": growing_bytes_per_sequence,
}  # fmt: skip


def compared(row: Row) -> tuple[float, float, float]:
    theirs, ours = QUANTITIES[row["quantity"]](row, model(row["catalog_id"]))
    return theirs, ours, ours / theirs - 1


def test_the_table_of_theirs_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{'row':12} {'model':46} {'quantity':26} {'published':>18} {'ours':>18} {'':>8}")
        for row in ROWS:
            theirs, ours, off = compared(row)
            print(f"{row['id']:12} {row['catalog_id']:46} {row['quantity']:26} {theirs:18,.0f} {ours:18,.0f} {off:+8.2%}")


@every_row
def test_a_published_number_is_met_within_0_2_percent_or_explained(row: Row) -> None:
    *_, off = compared(row)
    assert abs(off) <= TOLERANCE or row["explanation"], f"{row['id']}: {off:+.2%} and no explanation"


@every_row
def test_a_published_number_says_where_it_stands(row: Row) -> None:
    assert row["source_url"].startswith("https://")
    assert row["catalog_id"] in catalog()
    assert row["unit"]
    assert float(row["value"]) > 0


def test_ids_are_unique() -> None:
    assert len({row["id"] for row in ROWS}) == len(ROWS)


# ---- the explanations that are arithmetic


def row_of(identifier: str) -> Row:
    return next(row for row in ROWS if row["id"] == identifier)


def test_flashmla_counts_the_prediction_layer_too() -> None:
    theirs, ours, _ = compared(row_of("FMLA-0011"))
    assert ours / 61 * 62 == pytest.approx(theirs, rel=TOLERANCE)
    assert compared(row_of("FMLA-0012"))[0] == 656 == compared(row_of("FMLA-0012"))[1]


def test_vllms_weights_hold_the_rotary_table() -> None:
    theirs, ours, _ = compared(row_of("KVLOG-0018"))
    assert ours + 131_072 * 128 * 2 == pytest.approx(theirs, rel=1e-5)


def test_sglang_prints_gib_as_gb() -> None:
    assert abs(compared(row_of("KVLOG-0005"))[2]) <= TOLERANCE
    assert cache_per_token(model("Qwen/Qwen3-235B-A22B-FP8"), 4) == 48_128


def test_the_activations_of_qwen_are_gib() -> None:
    theirs, ours, _ = compared(row_of("MISC-0006"))
    assert round(ours / GIB) == theirs / 1e9
    assert pytest.approx(0.967, abs=0.0005) == 1 - 32_768 / 1e6


@pytest.mark.parametrize("identifier", ["VBLOG-0033", "VBLOG-0036", "MISC-0005"])
def test_bounds_bound(identifier: str) -> None:
    theirs, ours, _ = compared(row_of(identifier))
    assert ours <= theirs if identifier == "MISC-0005" else ours >= theirs


def test_what_a_log_calls_maximum_concurrency_is_tokens_over_length() -> None:
    given = inputs(row_of("KVLOG-0001"))
    assert float(row_of("KVLOG-0001")["value"]) / number(given["max_model_len"]) == pytest.approx(number(given["max_concurrency"]), abs=0.005)


def test_pool_and_weights_of_a_log_fit_in_what_the_engine_may_use() -> None:
    row = row_of("KVLOG-0062")
    memory = float(re.search(r"([\d,]+) B", row["hardware"])[1].replace(",", ""))  # type: ignore[index]
    spec = model(row["catalog_id"])
    used = spec.weight_bytes() + float(row["value"]) * cache_per_token(spec, 1)
    assert 0.9 < used / (memory * number(inputs(row)["gpu_memory_utilization"])) < 1
