"""The published measurements: how they are split, converted and compared, and that no recorded accuracy is lost."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from simulator import validate
from simulator.calibration import Calibration, read_profile
from simulator.cli import main
from simulator.data import data_path
from simulator.hardware import catalog, gpu
from simulator.hf import catalog as models
from simulator.kernels.attention import Segment
from simulator.kernels.unfused_attention import unfused_attention
from simulator.published import MICROBENCHMARKS, SOURCES, Measurement, NotComparableError, addresses, measurements, question, role
from simulator.published.rings import _PACKS
from simulator.published.serving import _clients, waited
from simulator.published.table import _MODELS
from simulator.validate import KERNELS, Compared, Refused, accuracy, by_kind, by_source, compare, recorded
from simulator.work import fold, quantity

ROWS = measurements()
#: What rounding of the record, and another machine's floating point, may move.
SLACK = 0.002


def row(identifier: str) -> Measurement:
    return next(one for one in ROWS if one.id == identifier)


@cache
def answered() -> tuple[list[Compared], list[Refused]]:
    return compare()


# ---- the data and its split


def test_ids_are_unique_and_every_reference_is_listed() -> None:
    assert len({one.id for one in ROWS}) == len(ROWS) == 2369
    with data_path("published", "sources.csv").open(encoding="utf-8", newline="") as file:
        listed = {source["reference"]: source for source in csv.DictReader(file)}
    assert {one.reference for one in ROWS} == listed.keys()
    assert all(source["title"] for source in listed.values())
    assert all(address.startswith("https://") for address in addresses().values() if address)


def test_a_row_nobody_can_look_up_is_not_compared() -> None:
    nowhere = {one.id for one in ROWS if not addresses()[one.reference]}
    assert 0 < len(nowhere) < 25
    assert nowhere.isdisjoint({one.id for one in answered()[0]})


def by_rule(one: Measurement, rows_of_source: Counter[str]) -> tuple[tuple[str, str, str], str]:
    """The rule of data/README.md: the key of a row in SPLIT.csv and its role."""

    def hashed(name: str) -> str:
        return "fit" if hashlib.sha256(name.encode()).digest()[0] < 85 else "score"

    whole = (one.source, one.kind, "")
    if one.kind not in MICROBENCHMARKS:
        return whole, "score"
    if one.source == "ml-engineering-mamf":
        return whole, "fit"
    if rows_of_source[one.source] < 50:
        return whole, hashed(one.source)
    return (one.source, one.kind, one.series), hashed(f"{one.source} | {one.series}")


def test_the_split_follows_its_rule() -> None:
    rows_of_source = Counter(one.source for one in ROWS if one.kind in MICROBENCHMARKS)
    found: dict[tuple[str, str, str], list[str]] = {}
    for one in ROWS:
        key, side = by_rule(one, rows_of_source)
        assert role(one) == side, one.id
        found.setdefault(key, []).append(side)
    with data_path("published", "SPLIT.csv").open(encoding="utf-8", newline="") as file:
        written = {(r["source"], r["kind"], r["series"]): (r["role"], int(r["rows"])) for r in csv.DictReader(file)}
    assert written == {key: (sides[0], len(sides)) for key, sides in found.items()}


@pytest.mark.parametrize("kind", sorted({one.kind for one in ROWS}))
def test_at_least_half_of_the_rows_of_a_kind_are_scored(kind: str) -> None:
    roles = [role(one) for one in ROWS if one.kind == kind]
    assert roles.count("score") * 2 >= len(roles)


# ---- conversions


def test_every_source_has_one_function_and_every_row_an_answer_or_a_reason() -> None:
    assert {one.source for one in ROWS} == SOURCES.keys()
    compared, refused = answered()
    assert len(compared) + len(refused) == len(ROWS)
    assert {one.id for one in [*compared, *refused]} == {one.id for one in ROWS}
    assert all(one.reason for one in refused)


def test_our_values_are_positive_and_inside_their_own_interval() -> None:
    for one in answered()[0]:
        assert 0 < one.low <= one.predicted <= one.high < math.inf, one.id
        assert 0 < one.measured < math.inf, one.id


@pytest.mark.parametrize(
    ("rate", "other", "rounding"),
    [
        ("DGEMM-0001", "DGEMM-0002", 0.005), ("DGEMM-0029", "DGEMM-0030", 0.005),  # FLOP/s and bytes/s of one time
        ("TL-0001", "TL-0002", 0.005), ("TL-0017", "TL-0018", 0.005),  # FLOP/s and ms
        ("BURST-0054", "BURST-0038", 0.01), ("BURST-0056", "BURST-0040", 0.01),  # FLOP/s and ms; forward + backward
    ],
)  # fmt: skip
def test_two_figures_of_one_measurement_are_the_same_seconds(rate: str, other: str, rounding: float) -> None:
    assert question(row(rate)).measured == pytest.approx(question(row(other)).measured, rel=rounding)


@pytest.mark.parametrize(
    ("rate", "printed_us"),
    [
        ("DEEPEP-0010", 77), ("DEEPEP-0014", 118), ("DEEPEP-0018", 155), ("DEEPEP-0022", 173), ("DEEPEP-0026", 192), ("DEEPEP-0030", 194),
        ("DEEPEP-0012", 114), ("DEEPEP-0016", 195), ("DEEPEP-0020", 273), ("DEEPEP-0024", 314), ("DEEPEP-0028", 369), ("DEEPEP-0032", 360),
    ],
)  # fmt: skip
def test_deepep_s_low_latency_bandwidths_are_the_latencies_printed_beside_them(rate: str, printed_us: float) -> None:
    assert question(row(rate)).measured == pytest.approx(printed_us * 1e-6, rel=0.5 / float(row(rate).value) + 0.005)


@pytest.mark.parametrize(("dispatch", "nodes"), [("DEEPEP-0001", 1), ("DEEPEP-0003", 2), ("DEEPEP-0005", 4), ("DEEPEP-0007", 8)])
def test_deepep_s_rows_go_where_its_router_sends_them(dispatch: str, nodes: int) -> None:
    """By drawing as its tests draw: distinct nodes of a token (within a node: distinct ranks)."""
    scores = np.abs(np.random.default_rng(0).standard_normal((20_000, 256))) + 1
    best = scores.reshape(-1, nodes, 256 // nodes).max(-1)
    allowed = best >= np.sort(best, 1)[:, [-min(nodes, 4)]]
    experts = np.argsort(np.where(np.repeat(allowed, 256 // nodes, 1), scores, 0.0), 1)[:, -8:]
    places = np.sort(experts // (32 if nodes == 1 else 256 // nodes), 1)
    drawn = 1 + (np.diff(places, axis=1) > 0).sum(1).mean()
    asked = question(row(dispatch))
    assert asked.measured * float(row(dispatch).value) * 1e9 / (4096 * 7168 * (1 + 4 / 128)) == pytest.approx(drawn, rel=0.006)


def test_packs_hold_what_a_rank_holds() -> None:
    assert all(sum(pack) == 8192 for pack in _PACKS)


def test_the_utilisation_a_source_prints_is_its_flops_over_our_seconds() -> None:
    asked = question(row("ISIM-0025"))
    assert 2 * 8 * 2048 * 12288 / asked.measured / gpu("h20").datasheet_flops_per_s("fp8") == pytest.approx(0.079, abs=0.0005)
    asked = question(row("ISIM-0151"))
    assert 2 * 4096**2 * 256 * 16 / asked.measured / gpu("h20").datasheet_flops_per_s("bf16") == pytest.approx(0.894, abs=0.001)


def test_flash_attentions_charts_halve_causal_pairs_and_count_forward_and_backward_as_three_and_a_half() -> None:
    chart = row("FA-0006")
    full = 4 * 512**2 * 64 * 32 * 32 * 3.5 / 91e12
    assert question(chart).measured == pytest.approx(full)
    causal = replace(chart, other_inputs=chart.other_inputs.replace("causal=False", "causal=True"))
    assert question(causal).measured == pytest.approx(full / 2)
    forward = replace(chart, other_inputs=chart.other_inputs.replace("fwd+bwd", "fwd"))
    assert question(forward).measured == pytest.approx(full / 3.5)


def test_a_bus_bandwidth_is_the_rings_share_of_a_message_per_second() -> None:
    ours = question(row("NCCLX-0001"))
    assert ours.measured == pytest.approx(2 * 71 / 72 * 536870912 / 586.06e9)
    assert question(row("AZURE-0062")).measured == pytest.approx(2 * 7 / 8 * 1024 / 0.07e9)


@pytest.mark.parametrize(("source", "rows"), [("ring-flash-attention-readme", 12), ("yunchang-usp", 71)])
def test_tables_of_shared_attention_are_met_within_fifteen_percent_in_the_median(source: str, rows: int) -> None:
    found = sorted(abs(one.error) for one in answered()[0] if one.source == source and one.use != "fit" and row(one.id).n_gpus != "1")
    assert len(found) >= rows
    assert found[len(found) // 2] <= 0.15


def test_rings_of_ranks_in_order_wait_for_the_busiest_as_measured() -> None:
    """YunChang's unbalanced rings of 128K: from Ulysses alone to a ring of 8, where the last rank works nearly twice the mean."""
    asked = {one.id for one in ROWS if one.source == "yunchang-usp" and "ring=basic" in one.kernel_or_engine and one.number("seq_len") == 131_072}
    found = [one.error for one in answered()[0] if one.id in asked]
    assert len(found) == 21
    assert sorted(map(abs, found))[10] <= 0.1
    assert max(map(abs, found)) <= 0.2


def test_a_row_that_states_too_little_says_what_is_missing() -> None:
    with pytest.raises(NotComparableError, match="causal or not"):
        question(row("PTB-0001"))
    with pytest.raises(NotComparableError, match="K is not stated"):
        question(replace(row("LLMC-0001"), other_inputs="M=64;N=12288"))
    with pytest.raises(NotComparableError, match=r"GPU gpu of tomorrow is not in the catalog"):
        question(replace(row("LLMC-0001"), hardware="gpu of tomorrow"))


def test_clients_that_do_not_agree_with_the_batch_are_refused() -> None:
    with pytest.raises(NotComparableError, match="replicas is not stated"):
        question(row("AICE-0060"))
    with pytest.raises(NotComparableError, match="clients is not stated"):
        question(row("AICE-0068"))
    assert _clients(row("AICE-0024")) == 4


def test_a_model_that_joins_the_catalog_is_compared_without_a_change() -> None:
    refused = [one for one in answered()[1] if one.reason.endswith("is not in the catalog") and one.reason.startswith("model ")]
    named = {one.reason.removeprefix("model ").removesuffix(" is not in the catalog") for one in refused}
    assert named.isdisjoint(models())
    silicon = next(one for one in ROWS if one.source == "aiconfigurator-silicon" and one.model == "Qwen/Qwen3-235B-A22B-FP8")
    with pytest.raises(NotComparableError, match="model nobody/Knows-1T is not in the catalog"):
        question(replace(silicon, model="nobody/Knows-1T"))


def test_names_of_models_point_into_the_catalog_or_wait_for_it() -> None:
    waiting = {name for name in _MODELS.values() if name not in models()}
    assert waiting <= {"zai-org/GLM-5"}


@pytest.mark.parametrize("clients", [1, 2, 5, 17])
def test_waiting_clients_agree_with_a_simulation(clients: int) -> None:
    """Deterministic limits: no thinking serves all in turn, endless thinking meets nobody, and Little's law holds between."""
    assert waited(2.0, 0.0, clients) == pytest.approx(2.0 * clients)
    assert waited(2.0, 1e12, clients) == pytest.approx(2.0)
    seconds = waited(2.0, 7.0, clients)
    assert clients / (seconds + 7.0) <= 0.5 + 1e-12
    assert 2.0 <= seconds <= 2.0 * clients


def test_unfused_attention_counts_the_full_square_and_four_more_products_backward() -> None:
    shape = Segment(2.0, 512.0, 0.0)
    forward = unfused_attention("a", shape, heads=8.0, head_dim=64)
    both = unfused_attention("a", shape, heads=8.0, head_dim=64, backward=True)
    square = 4 * 2 * 8 * 512**2 * 64
    assert fold(forward, quantity("model_flops")) == square
    assert fold(both, quantity("model_flops")) == 3 * square
    scores = 2 * 8 * 512**2 * 2
    assert fold(forward, quantity("hbm_bytes")) > 6 * scores
    unmasked = unfused_attention("a", shape, heads=8.0, head_dim=64, causal=False)
    assert fold(forward, quantity("hbm_bytes")) - fold(unmasked, quantity("hbm_bytes")) == 2 * scores


# ---- priors


@pytest.mark.parametrize("name", catalog())
def test_a_prior_of_another_architecture_is_not_read(name: str) -> None:
    part = gpu(name)
    families = read_profile(data_path("calibration", "priors.toml"), name, "prior", part.architecture).families
    assert (("attention", "flash3", "") in families) == (part.architecture == "hopper")
    assert (("attention", "cutlass", "") in families) == (part.architecture == "ampere")
    assert ("attention", "", "") in families


def test_a_row_of_an_architecture_comes_before_one_of_none(tmp_path: Path) -> None:
    file = tmp_path / "constants.toml"
    file.write_text(
        '[[family]]\nkernel = "gemm"\narchitecture = "hopper"\ntensor = 0.9\n[[family]]\nkernel = "gemm"\ntensor = 0.5\n', encoding="utf-8"
    )
    assert read_profile(file, "x", architecture="hopper").families["gemm", "", ""].tensor == 0.9
    assert read_profile(file, "x", architecture="ampere").families["gemm", "", ""].tensor == 0.5


def test_an_implementation_nobody_knows_falls_back_to_the_kernels_own() -> None:
    known = Calibration.load(gpu("a100"))
    assert known.constants(("attention", "from_tomorrow", "bf16")) == known.constants(("attention", "", "bf16"))
    assert known.constants(("attention", "flash1", "bf16")).tensor < known.constants(("attention", "", "bf16")).tensor


def fitter() -> ModuleType:
    file = Path(__file__).with_name("benchmarks") / "fit_priors.py"
    found = importlib.util.spec_from_file_location("fit_priors", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_priors_are_what_the_fit_rows_give_and_no_scored_row_is_read() -> None:
    module = fitter()
    groups = module.groups()
    fitted = {f"{one.source} | {one.series}" for one in ROWS if role(one) == "fit"}
    assert {name for rows in groups.values() for name, _ in rows} <= fitted
    rows = [asked for _, asked in groups["ampere", "flash2", ("attention", "attention_backward")]]
    made, _ = module.fit(rows, "flash2", ("attention", "attention_backward"))
    written = Calibration.load(gpu("a100"))
    for family, constants in made.items():
        assert written.families[family].tensor == pytest.approx(constants.tensor, rel=0.01)


# ---- accuracy


def test_no_recorded_accuracy_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """Improve it, then re-record: `longctx validate --record`."""
    found, before = by_source(answered()[0]), recorded()
    with capsys.disabled():
        print(f"\n{'kind':14} {'source':28} {'use':9} {'n':>4} {'median':>8} {'was':>8} {'p90':>8} {'was':>8}")
        for one in found:
            was = before.get((one.source, one.kind, one.use), {"median": math.nan, "p90": math.nan})
            print(
                f"{one.kind:14} {one.source:28} {one.use:9} {one.n:4} {one.median:8.1%} {was['median']:8.1%} {one.p90:8.1%} {was['p90']:8.1%}"
            )
    now = {(one.source, one.kind, one.use): one for one in found}
    assert before.keys() <= now.keys()
    for key, was in before.items():
        one = now[key]
        assert one.n >= was["n"], key
        if one.n == was["n"]:
            assert one.median <= was["median"] * 1.02 + SLACK, key
            assert one.p90 <= was["p90"] * 1.02 + SLACK, key
    assert now.keys() == before.keys(), "rows of a new source are compared; record them"


def test_scored_kernel_rows_are_met_within_twenty_percent_in_the_median() -> None:
    (every,) = [one for one in by_kind(answered()[0]) if (one.kind, one.use) == ("kernel rows", "all scored")]
    assert every.n > 400
    assert every.median <= 0.20


def test_intervals_of_borrowed_constants_hold_four_of_five_scored_kernels() -> None:
    """Kernels timed by themselves on boards that borrow; whole mixers mix them with priors of other kernels."""
    alone = {one.id for one in ROWS if one.kind in (*KERNELS, "kernel_gbps") and "module" not in f"{one.table_or_section}{one.other_inputs}"}
    found = [one for one in answered()[0] if one.id in alone and one.use != "fit" and one.gpu and gpu(one.gpu).borrows]
    assert len(found) > 200
    assert 0.7 <= sum(one.covered for one in found) / len(found) <= 0.9


def test_accuracy_is_of_absolute_errors_and_names_the_worst_row() -> None:
    one = answered()[0][0]
    rows = [replace(one, id=str(factor), predicted=one.measured * factor) for factor in (0.5, 0.9, 1.0, 1.2, 3.0)]
    found = accuracy(rows, source="s", kind="k", use="score")
    assert found.median == pytest.approx(0.2)
    assert found.signed == pytest.approx(0.0)
    assert found.worst.id == "3.0"
    assert found.n == 5


def test_another_suite_is_compared_beside_the_published_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Compared("bench", "gemm", "1", "h200_sxm", "score", "s", 1.1, 1.0, 0.9, 1.3, "measured", "m=1")
    monkeypatch.setattr(validate, "SUITES", {"measured": lambda: iter([mine, Refused("bench", "gemm", "2", "h200_sxm", "throttled")])})
    compared, refused = compare(kinds=("gemm",))
    assert [one.error for one in compared] == [pytest.approx(0.1)]
    assert [one.reason for one in refused] == ["throttled"]


# ---- the command


def test_validate_prints_its_tables_and_one_document() -> None:
    run = CliRunner().invoke(main, ["validate", "--source", "llmcompass-matmul", "--rows"])
    assert run.exit_code == 0
    assert "LLMC-0001" in run.output
    assert "By source" in run.output
    run = CliRunner().invoke(main, ["validate", "--kind", "kernel_tflops", "--gpu", "a100", "--json", "--rows"])
    document = json.loads(run.output)
    assert {"schema_version", "inputs", "warnings", "accuracy", "by_kind", "not_comparable", "rows"} <= document.keys()
    assert {one["gpu"] for one in document["rows"]} == {"a100_sxm_80"}
    assert document["compared"] == len(document["rows"]) == sum(one["n"] for one in document["accuracy"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--kind", "kernel_flops"], "use one of"), (["--source", "rumour"], "use one of"), (["--record", "--gpu", "a100"], "leave out"), (["--gpu", "x1"], "not in")],
)
def test_what_nothing_was_measured_of_is_refused(arguments: list[str], told: str) -> None:
    run = CliRunner().invoke(main, ["validate", *arguments])
    assert isinstance(run.exception, ValueError)
    assert told in str(run.exception)
