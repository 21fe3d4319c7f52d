"""Page "Attention": the four pictures and the recipe, recomputed."""

from __future__ import annotations

import numpy as np
import pytest

from simulator import figures
from simulator.hf import load_model
from simulator.kernels.attention import Causal
from simulator.parallel import Layout
from simulator.passes import Passes
from simulator.phases import Prefill, System
from simulator.position import Rotary
from simulator.work import fold
from tests.app.support import charts, lines, opened


@pytest.fixture(scope="module")
def specs() -> list[dict]:
    return charts(opened("attention"))


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the last doubling, on both logarithms."""
    return float(np.log2(y[-1] / y[-2]) / np.log2(x[-1] / x[-2]))


def test_each_line_grows_as_its_label_says() -> None:
    cost = figures.length_cost()
    power = {"N²": 2.0, "N": 1.0, "1": 0.0}
    for line in [*cost.compute, *cost.memory]:
        assert slope(cost.tokens, line.along) == pytest.approx(power[line.growth], abs=0.02), line.name


def test_attention_s_pairs_are_those_of_the_model_s_own_tree() -> None:
    model, tokens = load_model("meta-llama/Meta-Llama-3.1-70B"), 32_768.0
    passes = fold(System(model, Layout()).work(Prefill(tokens)), Passes(lambda op: 0.0))
    inside = sum(float(np.sum(count * op.model_flops)) for op, count in passes.longest.items() if op.kernel == "attention")
    assert float(figures.attention_flops(model, tokens, Causal())) == pytest.approx(inside, rel=0.03)


def test_a_70b_model_holds_forty_gib_at_128k_on_top_of_140_gb_of_weights() -> None:
    cost = figures.length_cost()
    at = cost.tokens.tolist().index(2**17)
    cache, weights = cost.memory[1].along[at], cost.memory[3].along[at]
    assert cache == 40 * 2**30
    assert weights == pytest.approx(141e9, rel=0.01)


def test_the_bound_of_rope_falls_and_that_of_nope_does_not(specs: list[dict]) -> None:
    rows = [row for row in lines(specs[2]) if "value" in row]
    names = {row["line"] for row in rows}
    for name in names:
        along = [row["value"] for row in rows if row["line"] == name]
        if "NoPE" in name:
            assert set(along) == {1.0}
        else:
            assert max(along) <= 1
            assert along[-1] < 0.5
    assert specs[2]["layer"][0]["encoding"]["y"]["title"] == "bound, relative to distance 0", "it is a bound, not a score"


def test_the_bound_is_over_every_distance_of_its_interval() -> None:
    distances, found = figures.decay(2**14, points=40)
    held = Rotary(128, 10_000.0)
    start = float(held.decay_bound(np.array([0.0]))[0])
    exact = np.asarray(held.decay_bound(distances)) / start
    assert np.all(found[0].along >= exact * (1 - 1e-12))


def test_head_types_are_1_16_57_and_128_times_smaller(specs: list[dict]) -> None:
    rows = lines(specs[3])
    assert [(row["heads"], row["elements"]) for row in rows] == [("MHA", 32768.0), ("GQA", 2048.0), ("MLA", 576.0), ("MQA", 256.0)]
    assert [row["told"].rsplit("(", 1)[1] for row in rows] == ["1x)", "16x)", "57x)", "128x)"]
    bar = specs[3]["layer"][0]["encoding"]
    assert bar["x"]["scale"]["type"] == "log"
    assert bar["x2"]["field"] == "elements", "a bar on a logarithmic scale needs both ends"


def test_windows_only_step_up_and_none_is_shown_to_be_used_beyond_itself(specs: list[dict]) -> None:
    found = figures.context_windows()
    records = [w.tokens for w in found if w.record]
    assert records == sorted(set(records))
    assert (records[0], records[-1]) == (2048, 10_485_760)
    assert all(w.effective_tokens <= w.tokens for w in found if w.effective_tokens is not None)
    assert all(w.source_url.startswith("https://") for w in found)
    drawn = lines(specs[4])
    assert {row["model"] for row in drawn} == {w.model for w in found}


def test_every_model_a_window_names_is_known() -> None:
    import csv

    from simulator.data import data_path

    with data_path("published", "context_windows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = figures._effective()
    for row in rows:
        assert not row["effective_model"] or row["effective_model"] in shown, row["model"]
        declared = load_model(row["catalog_id"]).reach.declared_tokens if row["catalog_id"] else None
        assert declared is None or declared == int(row["window_tokens"]), row["model"]


def test_the_recipe_is_priced_where_length_matters() -> None:
    choices = figures.recipe(2**20)
    assert len(choices) >= 10
    assert all(choice.factor is None or choice.factor > 1 for choice in choices)
    unpriced = [choice.what for choice in choices if choice.factor is None]
    assert unpriced == ["evaluation at each stage", "optimizer and stability"]


def test_the_page_shows_the_recipe_at_the_asked_context() -> None:
    at = opened("attention")
    at.text_input(key="at").set_value("128K").run()
    assert not at.exception
    assert list(at.table[0].value["here"]) == [choice.number for choice in figures.recipe(2**17)]
    at.text_input(key="at").set_value("far").run()
    assert not at.exception
    assert "not a number of tokens" in at.error[0].value
