"""How far models read: configs, published lengths, warnings."""

from __future__ import annotations

import csv

import pytest

from simulator import reach
from simulator.data import data_path
from simulator.hf import catalog, load_model
from simulator.position import Alibi, Learned, Linear, Llama3, NoPosition, Plain, Rotary, Yarn
from tests.support import EVERY, model

with data_path("published", "effective_length.csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))


@pytest.mark.parametrize("row", ROWS, ids=[row["model"] for row in ROWS])
def test_an_effective_length_has_a_measure_and_a_source(row: dict[str, str]) -> None:
    assert int(row["effective_tokens"]) >= 4096
    assert row["bound"] in ("exactly", "at least")
    assert row["measure"]
    assert row["scores"]
    assert row["source_url"].startswith("https://")
    assert all(name in catalog() for name in row["catalog_ids"].split(";") if name)


@pytest.mark.parametrize("name", EVERY)
def test_every_models_positions_can_be_told(name: str) -> None:
    spec = model(name)
    for held in reach.positions(spec):
        told = reach.describe(held, spec, 1_048_576)
        assert held.position.name in told
        assert "nan" not in told
        assert "\n" not in told
    assert sum(held.layers for held in reach.positions(spec)) <= sum(count for count, _ in spec.mixers)
    assert reach.document(spec, 1000)["declared_tokens"] == spec.reach.declared_tokens


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Meta-Llama-3.1-70B", Rotary(128, 5e5, Llama3(8.0, 8192, 1.0, 4.0))),
        ("deepseek-ai/DeepSeek-V3", Rotary(64, 1e4, Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0, scales_softmax=True))),
        ("openai/gpt-oss-20b", Rotary(64, 150_000.0, Yarn(32.0, 4096, truncate=False))),
        ("mosaicml/mpt-7b-storywriter", Alibi(32, 16.0)), ("openai/gpt3-175b.paper", Learned(2048, 12_288)), ("ai21labs/Jamba-v0.1", NoPosition()),
        ("Qwen/Qwen3.6-35B-A3B", Rotary(64, 1e7)), ("MiniMaxAI/MiniMax-M2", Rotary(64, 5e6)),
    ],
)  # fmt: skip
def test_positions_are_read_from_the_config(name: str, expected: object) -> None:
    assert expected in [held.position for held in reach.positions(model(name))]


def test_gemmas_windows_have_their_own_base_and_no_scaling() -> None:
    by_kind = {held.what: held.position for held in reach.positions(model("google/gemma-3-27b-it"))}
    assert by_kind == {"window": Rotary(128, 1e4, Plain()), "full": Rotary(128, 1e6, Linear(8.0))}


def test_llama_4_rotates_its_chunks_and_warms_the_rest() -> None:
    spec = model("meta-llama/Llama-4-Scout-17B-16E-Instruct")
    counts = {type(held.position).__name__: held.layers for held in reach.positions(spec)}
    assert counts == {"Rotary": 36, "NoPosition": 12}
    (warm,) = (held for held in reach.positions(spec) if isinstance(held.position, NoPosition))
    assert "queries x 1.486 at 1,048,576 tokens" in reach.describe(warm, spec, 1_048_576)


def test_v4_stretches_its_compressed_layers_alone_and_leaves_their_scores() -> None:
    positions = [held.position for held in reach.positions(model("deepseek-ai/DeepSeek-V4-Flash"))]
    assert Rotary(64, 1e4) in positions
    (stretched,) = (p for p in positions if isinstance(p, Rotary) and p.theta == 160_000)
    assert isinstance(stretched.scaling, Yarn)
    assert (stretched.scaling.factor, stretched.scaling.original_tokens, stretched.logit_factor) == (16, 65_536, 1)


def test_beyond_what_was_shown_there_is_a_warning_with_the_length_and_its_source() -> None:
    spec = model("meta-llama/Meta-Llama-3.1-70B")
    assert reach.warnings(spec, 65_536) == []
    (told,) = reach.warnings(spec, 131_072)
    assert "65,536" in told
    assert "RULER" in told
    assert "https://" in told
    assert len(reach.warnings(spec, 131_073)) == 2


def test_a_model_nobody_measured_has_no_effective_length() -> None:
    assert reach.effective(model("openai/gpt-oss-120b")) is None


def test_an_unknown_scaling_counts_as_none() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 10, "intermediate_size": 64,
              "rope_scaling": {"rope_type": "not yet known", "factor": 2.0}}  # fmt: skip
    (held,) = reach.positions(load_model(config))
    assert held.position == Rotary(64, 1e4)
