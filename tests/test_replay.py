"""A recording says exactly what the fold says, wherever it answers at all."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from simulator import Calibration, Decode, Layout, Prefill, sweep, units
from simulator.engines import Vllm
from simulator.estimate import bare, folded
from simulator.replay import OFTEN, Often, Recorder, record
from simulator.units import Num
from tests.support import EVERY, HYBRID, MAIN, allows, legal, machine, model

#: Layouts that split sequences too.
CONTEXT = (
    Layout(cp=4), Layout(tp=2, cp=2, ulysses=2), Layout(tp=4, helix=2), Layout(tp=4, sp=4), Layout(tp=4, cp=4, passing="auto", hidden_from=1000),
    Layout(dp_attention=8, ep=8, ep_nodes=2),
)  # fmt: skip


def numbers(random: np.random.Generator, kind: str) -> tuple[float, ...]:
    context, batch = float(np.round(2 ** random.uniform(4, 20))), float(random.integers(1, 65))
    if kind == "decode":
        return context, batch, float(random.integers(1, 4))
    prefix = float(np.floor(context * random.choice([0, 0.5, 0.9])))
    return (context, batch, prefix) if kind == "whole" else (context, batch, prefix, float(np.round(2 ** random.uniform(9, 14))))


def phase(kind: str, given: Sequence[Num]) -> Prefill | Decode:
    return Decode(*given) if kind == "decode" else Prefill(*given)


@pytest.mark.parametrize("name", [*MAIN, *HYBRID])
@pytest.mark.parametrize("kind", ["chunks", "whole", "decode"])
def test_a_recording_says_what_the_fold_says(name: str, kind: str) -> None:
    """For other numbers than those it was recorded on, on layouts of every scheme; many of them meet a recording."""
    random = np.random.default_rng([5, *name.encode()])
    part, spec = machine("h200", 64), model(name)
    calibration, met, asked = Calibration.load(part.gpu), 0, 0
    for layout in (*[legal(name)[i] for i in random.integers(len(legal(name)), size=2)], *(x for x in CONTEXT if allows(spec, x))):
        engine = Vllm() if random.random() < 0.5 else None

        def question(*given: Num) -> Sequence[Num]:
            return folded(spec, part, layout, phase(kind, given), calibration, engine, None, with_footprint=True)  # noqa: B023

        recordings = [record(question, numbers(random, kind)) for _ in range(2)]
        assert all(recordings)
        for _ in range(4):
            given, asked = numbers(random, kind), asked + 1
            told = [answer for f in recordings if f is not None and (answer := f(*given)) is not None]
            met += bool(told)
            for answer in told:
                assert answer == pytest.approx(question(*given), rel=1e-14), (layout, given)
    assert met >= 0.25 * asked


@pytest.mark.parametrize("name", EVERY)
def test_every_model_is_recorded(name: str) -> None:
    part, spec = machine("h200", 8), model(name)
    calibration = Calibration.load(part.gpu)
    for kind, given in (("chunks", (20_000.0, 2.0, 0.0, 2048.0)), ("decode", (20_000.0, 4.0, 1.0))):
        recording = record(lambda *x: folded(spec, part, Layout(), phase(kind, x), calibration, None, None, with_footprint=True), given)  # noqa: B023
        assert recording is not None
        assert recording(*given) == pytest.approx(folded(spec, part, Layout(), phase(kind, given), calibration, None, None, with_footprint=True), rel=1e-14)


def test_a_question_asked_often_is_answered_by_a_recording_and_equals_a_sweep() -> None:
    part, spec = machine("h200", 8), model("deepseek-ai/DeepSeek-V3")
    calibration, contexts = Calibration.load(part.gpu), np.round(np.geomspace(4096, 1e6, 3 * OFTEN))
    alone = [bare(spec, part, Layout(tp=8), Prefill(float(c), chunk=2048.0), calibration=calibration) for c in contexts]
    together = sweep(spec, part, Layout(tp=8), Prefill(contexts, chunk=2048.0), calibration=calibration)
    for field in ("lower", "seconds", "total_bytes", "weight_bytes", "cache_bytes"):
        assert [getattr(answer, field) for answer in alone] == pytest.approx(getattr(together, field).tolist(), rel=1e-14)


def test_other_objects_are_other_questions() -> None:
    """A question's recording is its own: another calibration or layout of the same degrees but one is another question."""
    part, spec, phases = machine("h200", 8), model("meta-llama/Meta-Llama-3.1-8B"), [Decode(float(c)) for c in range(1000, 1000 + 2 * OFTEN)]
    for calibration in (Calibration.load(part.gpu), Calibration.none(), Calibration.none()):
        for layout in (Layout(tp=8), Layout(tp=4)):
            told = [bare(spec, part, layout, phase, calibration=calibration).seconds for phase in phases]
            assert told[-1] == folded(spec, part, layout, phases[-1], calibration, None, None, with_footprint=False)[1]
            assert told[-1] != told[0]


def test_a_decision_that_goes_the_other_way_is_not_answered() -> None:
    halved = record(lambda x: [x / 2 if x > 10 else x], [20.0])
    assert halved is not None
    assert (halved(30.0), halved(5.0)) == ((15.0,), None)
    often = Often(lambda x: [x / 2 if x > 10 else x])
    assert [often.answer([x])[0] for x in [20.0, 5.0] * 2 * OFTEN] == [10.0, 5.0] * 2 * OFTEN
    assert len(often.recordings) == 2


def test_what_loses_the_trace_of_a_number_is_not_recorded() -> None:
    assert record(lambda x: [float(x) * 2], [3.0]) is None
    often = Often(lambda x: [int(x) * 2.0])
    assert [often.answer([x])[0] for x in [3.5] * 3 * OFTEN] == [6.0] * 3 * OFTEN
    assert not often.recordings
    for lost in (lambda x: [np.sin(x)], lambda x: [np.stack([np.stack([x, x])])[0][0]], lambda x: ["x" if x > 0 else x]):
        assert record(lost, [3.0]) is None


def test_where_python_refuses_what_numpy_does_the_fold_answers() -> None:
    def question(x: Any) -> list[Any]:
        with np.errstate(divide="ignore"):
            return [np.add.reduce(1.0 / np.stack([x, x + 1.0]), axis=0)]

    often = Often(question)
    assert [often.answer([x])[0] for x in [1.0] * OFTEN] == [1.5] * OFTEN
    assert len(often.recordings) == 1
    assert often.answer([0.0])[0] == np.inf


def test_every_helper_of_units_is_recorded() -> None:
    def question(x: Any, y: Any) -> list[Any]:
        rows = np.stack([x, y, x * y])
        return [
            units.ceil(x), units.floor(y), units.minimum(x, y), units.maximum(x, 2.0), units.where((x > y) | (y > 100), x, y), units.log2(x),
            units.root(x, 4), units.raise_to(y, 4), units.tri(x), -x, 2 - x, 2 / x, 2**x, x**2, np.add.reduce(rows, axis=0), units.minimum(rows, 3.0)[1],
            *rows.tolist(), *(value * np.float64(2) for value in rows), len(rows), np.max(rows, axis=0), np.cumsum(rows)[-1], np.inf - x,
        ]  # fmt: skip

    recording = record(question, [2.25, 7.5])
    assert recording is not None
    for given in ((2.25, 7.5), (9.0, 3.5), (1.5, 200.0)):
        assert recording(*given) == pytest.approx(question(*given), rel=1e-15)


def test_no_work_is_noted_twice_or_in_vain() -> None:
    recorder = Recorder()
    x = recorder.asked(3.0)
    first, second, unused = x * 2.0, x * 2.0, x / 7.0
    assert first.place == second.place
    assert unused.value == pytest.approx(3 / 7)
    found = recorder.recording([first + second])
    assert (found.constants, [function for function, _, _ in found.steps]) == ((2.0,), [operator.mul, operator.add])
