"""Encoders: a text is read at once; what `size` says of them equals the estimate of that one pass."""

from __future__ import annotations

import pytest

from simulator import question, reading
from simulator.engines.paging import keeps
from simulator.estimate import estimate
from simulator.hardware import catalog as gpus
from simulator.parallel import Layout
from simulator.phases import Prefill
from simulator.question import Question, Read
from simulator.serving import Request
from tests.support import EVERY, machine, model
from tests.test_cli import Say, refused, say  # noqa: F401 (a fixture)

ENCODERS = [name for name in EVERY if not keeps(model(name))]


def test_encoders_are_those_that_keep_nothing() -> None:
    assert ENCODERS == ["allenai/longformer-base-4096", "google/bigbird-roberta-base"]


@pytest.mark.parametrize("gpu", gpus())
@pytest.mark.parametrize("name", ENCODERS)
def test_size_answers_for_an_encoder_on_every_accelerator(say: Say, name: str, gpu: str) -> None:  # noqa: F811
    said = say("size", name, "--gpu", gpu, "--gpus", 4, "--context", "4K", "--concurrency", 16, "--json")
    assert (said.code, said.err) == (0, ""), said
    told = said.document
    assert told["fits"]
    assert told["memory_bytes_per_gpu"]["total"] < told["memory_bytes_per_gpu"]["usable"]
    assert 0 < told["forward_s"]["low"] <= told["forward_s"]["value"] <= told["forward_s"]["high"]
    assert told["texts_per_s_per_gpu"]["value"] * 4096 == pytest.approx(told["input_tokens_per_s_per_gpu"]["value"])
    assert all(told[key] is None for key in ("ttft_s", "tpot_s", "tokens_per_s_per_gpu", "max_concurrency"))
    assert say("size", name, "--gpu", gpu, "--context", "4K").out.startswith("FITS")


def test_its_times_are_the_estimate_of_one_pass() -> None:
    name = "google/bigbird-roberta-base"
    found = reading.read(model(name), machine("h200", 4), Request(4096, 32, 0, 0.0))
    assert found.served is not None
    assert (str(found.best.layout), found.best.texts) == ("DP4", 8)
    assert found.served.alone.seconds == estimate(model(name), machine("h200", 4), Layout(dp=4), Prefill(4096.0)).seconds
    assert found.served.step.seconds == estimate(model(name), machine("h200", 4), Layout(dp=4), Prefill(4096.0, 32.0)).seconds
    assert found.served.texts_per_s_per_gpu.value * found.served.step.seconds.value == pytest.approx(8)
    assert found.best.mean_s == pytest.approx(found.served.step.seconds.value)


def test_texts_read_together_are_those_whose_activations_fit() -> None:
    found = reading.read(model("google/bigbird-roberta-base"), machine("l4"), Request(4096, 100_000, 0, 0.0))
    assert 1 < found.best.texts < 100_000
    one = (float(found.best.held.total) - float(found.best.held.weights)) / found.best.texts
    assert float(found.best.held.total) <= found.usable_bytes < float(found.best.held.total) + one


def test_a_text_beyond_the_table_of_positions_cannot_be_read(say: Say) -> None:  # noqa: F811
    said = say("size", "bigbird-roberta-base", "--context", "8K", "--json")
    assert said.code == 3
    assert said.document["binding_constraint"] == "positions"
    assert said.document["forward_s"] is None
    assert "positions for 4,096 tokens" in said.document["verdict"]
    assert say("size", "bigbird-roberta-base", "--context", "8K").out.startswith("DOES NOT FIT")


def test_what_an_encoder_has_not_is_refused_in_one_line(say: Say) -> None:  # noqa: F811
    refused(say("size", "bigbird-roberta-base", "--context", "4K", "--output", 8), "--output 8", "writes nothing")
    for words in (["--phase", "decode"], ["--chunk", "1K"], ["--prefix", "1K"]):
        refused(say("estimate", "bigbird-roberta-base", "--context", "4K", *words), "reads a text at once")
    with pytest.raises(ValueError, match="ask longctx size"):
        question.ask(Question("google/bigbird-roberta-base", context=4096))
    assert isinstance(question.answer(Question("google/bigbird-roberta-base", context=4096)), Read)
