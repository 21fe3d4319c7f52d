"""Every figure opens: formulas evaluate to the op's own numbers, rows and differences add up to the totals."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simulator.dtypes import BF16, CACHE_FORMATS, FP8, WEIGHT_FORMATS, CacheRow
from simulator.estimate import estimate
from simulator.formulas import FORMULAS, WIRES, evaluate, extents, readable, substituted, texts
from simulator.kernels import scan
from simulator.kernels.attention import Causal, Segment, Window, attention
from simulator.kernels.elementwise import norm
from simulator.kernels.gemm import batched_gemm, gemm
from simulator.kernels.grouped_gemm import grouped_gemm
from simulator.kernels.latent_attention import latent_attention
from simulator.kernels.messages import PATTERNS, message
from simulator.kernels.sparse_attention import TopK, index_scores, sparse_attention
from simulator.launch import LAUNCHES
from simulator.parallel import Layout
from simulator.phases import Decode, Prefill
from simulator.work import Group, Leaf, Op
from tests.support import EVERY, HYBRID, MAIN, allows, eight, leaves, machine, model
from tests.test_cli import Say, say  # noqa: F401 (a fixture)

PROMPT, STEP = Segment(3.0, 700.0, 4096.0), Segment(5.0, 1.0, 9000.0, split_kv=True)


def examples() -> Iterator[Leaf]:
    """Every kernel, forward and backward, prompt and step."""
    for name, weight in WEIGHT_FORMATS.items():
        yield gemm(name, m=129.0, n=640.0, k=384.0, weight=weight)
        yield grouped_gemm(name, rows=300.5, experts=6.25, n=640.0, k=384.0, weight=weight)
    yield batched_gemm("absorb", members=16.0, m=5.0, n=512.0, k=128.0)
    yield norm("norm", tokens=77.0, width=4096.0)
    for segment, backward in itertools.product((PROMPT, STEP), (False, True)):
        for stored in ("bf16", "fp8"):
            yield attention("core", segment, heads=32.0, kv_heads=4.0, head_dim=192, v_head_dim=128, mask=Window(512), cache=CACHE_FORMATS[stored], backward=backward)
            yield attention("core", segment, heads=32.0, kv_heads=4.0, head_dim=64, mask=Causal(), dtype=FP8, cache=CACHE_FORMATS[stored], backward=backward)
        yield latent_attention("core", segment, heads=16.0, kv_lora_rank=512, rope_head_dim=64)
        selected = (Window(128), TopK(256))
        yield sparse_attention("s", segment, masks=selected, heads=8.0, kv_heads=1.0, head_dim=576, v_head_dim=512, row=CacheRow(576.0), backward=backward)
        yield index_scores("i", segment, mask=TopK(None), heads=64.0, head_dim=128, row=CacheRow(128.0), dtype=FP8, backward=backward)
        yield scan.recurrent(
            "r", segment, heads=32.0, d_k=128, d_v=128, chunk=64, chunk_flops=32 * scan.delta_chunk_flops(d_k=128, d_v=128, chunk=64),
            step_flops=32 * scan.delta_step_flops(d_k=128, d_v=128), inputs=12288.0, outputs=4096.0, backward=backward,
        )  # fmt: skip
        yield scan.selective_scan("m", segment, channels=8192.0, state=16, backward=backward)
        yield scan.long_convolution("l", segment, channels=1024.0, state=64, backward=backward)
        yield scan.short_convolution("c", tokens=segment.tokens, channels=1024.0, kernel=4, backward=backward)
    for pattern, ranks in itertools.product(PATTERNS, (1.0, 2.0, 8.0)):
        yield message(pattern, pattern, group=Group("g", ranks), payload_bytes=3e9)
    yield Op("host step", "host", "vllm", "", shape={"seconds": 1e-3}, launches=0.0)


EXAMPLES = list(examples())


@pytest.mark.parametrize("op", EXAMPLES, ids=lambda op: f"{op.kernel} {op.name}")
def test_a_formula_with_its_numbers_gives_the_op_its_own_figure(op: Leaf) -> None:
    numbers = extents(op)
    for attribute, text in texts(op).items():
        expected = float(getattr(op, attribute))
        assert evaluate(text, numbers) == pytest.approx(expected, rel=1e-12, abs=1e-9), attribute
        assert evaluate(substituted(text, numbers)) == pytest.approx(expected, rel=1e-12, abs=1e-9), attribute


def test_every_kernel_and_every_pattern_has_a_formula_and_an_example() -> None:
    assert LAUNCHES.keys() <= FORMULAS.keys()
    assert {op.kernel for op in EXAMPLES} == {*LAUNCHES, "host", "message"}
    assert WIRES.keys() == PATTERNS.keys()
    used = {id(text) for op in EXAMPLES for text in texts(op).values()}
    assert used >= {id(formula.hbm_bytes) for formula in FORMULAS.values()}, "an entry that no op reaches"


@pytest.mark.parametrize("name", sorted({*MAIN, *HYBRID, *EVERY[::9]}))
@pytest.mark.parametrize("phase", [Prefill(65536.0, 2.0), Decode(131072.0, 4.0)], ids=["prefill", "decode"])
def test_the_formulas_hold_for_every_op_of_every_model(name: str, phase: Prefill | Decode) -> None:
    layout = next((x for x in (Layout(tp=8), Layout(tp=8, ep=8)) if allows(model(name), x)), Layout())
    found = estimate(model(name), machine("h200", 8), layout, phase)
    for _, op in leaves(found.work):
        numbers = extents(op)
        for attribute, text in texts(op).items():
            assert evaluate(text, numbers) == pytest.approx(float(getattr(op, attribute)), rel=1e-9, abs=1e-6), (op.kernel, attribute)


@pytest.mark.parametrize("name", MAIN)
def test_the_mean_chunk_of_a_run_obeys_the_formulas_too(name: str) -> None:
    found = estimate(model(name), machine("h200", 8), eight(name), Prefill(200_000.0, chunk=8192.0))
    for row in found.rows:
        for attribute, text in texts(row.op).items():
            assert evaluate(text, extents(row.op)) == pytest.approx(float(getattr(row.op, attribute)), rel=1e-6, abs=1e-3), row.op.name


def test_numbers_are_shown_with_thousands_apart_and_nothing_else_changes() -> None:
    shown = readable("2 * 131072 * ceil(8192 / 64) + 0.53125 * live")
    assert shown == "2 x 131,072 x ceil(8,192 / 64) + 0.53125 x live"


def explained(say: Say, *words: object) -> dict[str, Any]:  # noqa: F811
    said = say("explain", *words, "--json")
    assert said.code == 0, said
    return said.document


@pytest.mark.parametrize("words", [["Llama-3.1-70B", "--tp", 8], ["DeepSeek-V3", "--tp", 8, "--phase", "decode", "--batch", 8, "--engine", "vllm"]])
def test_rows_parts_and_shares_of_an_explanation_add_up(say: Say, words: list[object]) -> None:  # noqa: F811
    found = explained(say, *words)
    total = found["seconds"]["value"]
    assert sum(row["seconds"]["value"] for row in found["rows"]) - found["overlapped_s"] == pytest.approx(total, rel=1e-9)
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1 + found["overlapped_s"] / total)
    memory = found["memory_bytes_per_gpu"]
    assert sum(value for part, value in memory.items() if part not in ("total", "usable")) == pytest.approx(memory["total"])
    assert sum(layer["bytes_per_sequence"] for layer in found["cache"]["layers"]) == pytest.approx(found["cache"]["bytes_per_sequence"])
    for row in found["rows"]:
        assert row["lower"] <= row["seconds"]["value"] * (1 + 1e-9)
        assert row["seconds"]["low"] <= row["seconds"]["value"] <= row["seconds"]["high"]
        assert row["source"], row["name"]
        for formula in row["formulas"].values():
            assert evaluate(formula["substituted"]) == pytest.approx(formula["value"], rel=1e-9)


def test_an_explanation_says_what_an_estimate_says(say: Say) -> None:  # noqa: F811
    words = ["gpt-oss-120b", "--tp", 2, "--phase", "decode", "--context", "256K"]
    whole = say("estimate", *words, "--json").document
    opened = explained(say, *words)
    assert opened["seconds"] == whole["seconds"]
    assert sorted((row["name"], row["seconds"]) for row in whole["rows"]) == sorted((row["name"], row["seconds"]["value"]) for row in opened["rows"])


def test_the_text_of_an_explanation_has_formula_numbers_bound_and_source(say: Say) -> None:  # noqa: F811
    said = say("explain", "Llama-3.1-8B", "--context", "32K", "--top", 2)
    assert said.code == 0
    for words in ("scores x 2 x (head_dim + v_head_dim)", "in 32 runs", "of it the bound", "bound by", "of the tensor peak", "more ops take", "Memory per GPU", "calibration:"):
        assert words in said.out, words
    assert "more ops" not in say("explain", "Llama-3.1-8B", "--context", "32K", "--top", 0).out


TWO = ["Llama-3.1-70B --tp 8 --context 128K", "Llama-3.1-70B --tp 4 --context 128K --cache fp8"]


@pytest.mark.parametrize("verb", ["", "estimate ", "size "])
def test_differences_add_up_to_that_of_the_totals(say: Say, verb: str) -> None:  # noqa: F811
    said = say("diff", *(verb + words for words in TWO), "--json")
    assert said.code == 0, said
    found = said.document
    for kind, total in found["totals"].items():
        terms = [term for term in found["terms"] if term["kind"] == kind]
        assert sum(term["difference"] for term in terms) == pytest.approx(total["after"] - total["before"], rel=1e-9)
        sizes = [abs(term["difference"]) for term in terms]
        assert sizes == sorted(sizes, reverse=True)
    assert {"gpus", "cache"} <= found["changed"].keys()
    if verb != "size ":
        one, two = (say("estimate", *words.split(), "--json").document for words in TWO)
        assert found["totals"]["seconds"]["difference"] == pytest.approx(two["seconds"]["value"] - one["seconds"]["value"], rel=1e-9)
        assert found["totals"]["bytes per GPU"]["after"] == pytest.approx(two["memory_bytes_per_gpu"]["total"], rel=1e-9)


def test_what_overlapping_saves_is_a_term(say: Say) -> None:  # noqa: F811
    words = "Llama-3.1-8B --phase decode --context 32K"
    found = say("diff", words, f"{words} --engine vllm", "--json").document
    assert "overlapped" in {term["name"] for term in found["terms"]}
    one, two = (say("estimate", *w.split(), "--json").document for w in (words, f"{words} --engine vllm"))
    assert found["totals"]["seconds"]["difference"] == pytest.approx(two["seconds"]["value"] - one["seconds"]["value"], rel=1e-9, abs=1e-12)


def test_the_same_twice_differs_in_nothing(say: Say) -> None:  # noqa: F811
    found = say("diff", TWO[0], TWO[0], "--json").document
    assert found["changed"] == {}
    assert all(term["difference"] == 0 for term in found["terms"])


def test_files_that_json_wrote_are_compared(say: Say, tmp_path: Path) -> None:  # noqa: F811
    files = []
    for i, words in enumerate(TWO):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(say("estimate", *words.split(), "--json").out)
    by_files, by_words = say("diff", *files, "--json").document, say("diff", *TWO, "--json").document
    assert by_files["terms"] == by_words["terms"]
    assert "total" in say("diff", *files).out
    files[0].write_text("{}")
    said = say("diff", *files)
    assert (said.code, said.out) == (2, "")
    assert "write one with --json" in said.err


@pytest.mark.parametrize("words", ["nonsense --tp 8", "Llama-3.1-8B --tp seven", "Llama-3.1-8B --colour red", "'open", "Llama-3.1-8B --tp 3", "Llama-3.1-8B --help", ""])
def test_words_that_make_no_answer_are_refused_in_one_line(say: Say, words: str) -> None:  # noqa: F811
    said = say("diff", TWO[0], words)
    assert (said.code, said.out) == (2, ""), said
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("verb", [["estimate", "Llama-3.1-8B"], ["explain", "Llama-3.1-8B"], ["gpus"], ["diff", *TWO], ["models", "--match", "llama"], ["compare", "Llama-3.1-8B", "DeepSeek-V3"]])
def test_a_table_is_written_as_csv_row_for_row(say: Say, verb: list[str], tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "table.csv"
    said = say(*verb, "--json", "--csv", file)
    assert said.code == 0, said
    key = next(key for key in ("rows", "gpus", "terms", "models") if key in said.document)
    rows = list(csv.DictReader(file.read_text("utf-8").splitlines()))
    assert len(rows) == len(said.document[key])
    for read, told in zip(rows, said.document[key], strict=True):
        assert read["name"] == told["name"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_csv_that_cannot_be_written_is_one_clear_line(say: Say, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "file").write_text("")
    said = say("gpus", "--csv", tmp_path / "file" / "x.csv")
    assert (said.code, said.out) == (2, "")
    assert "choose another place" in said.err


def test_a_size_is_written_whole_or_not_at_all(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    words = ["size", "Llama-3.1-8B", "--context", "128K", "--output-dir", tmp_path / "answer"]
    said = say(*words)
    assert said.code == 0, said
    written = {file.name for file in (tmp_path / "answer").iterdir()}
    assert written == {"result.json", "layouts.csv", "launch.sh"}
    result = json.loads((tmp_path / "answer" / "result.json").read_text())
    assert result["fits"] is True
    assert (tmp_path / "answer" / "launch.sh").read_text().splitlines()[0] == "#!/bin/sh"
    assert result["launch"]["vllm"] in (tmp_path / "answer" / "launch.sh").read_text()
    assert (tmp_path / "answer" / "launch.sh").stat().st_mode & 0o100
    assert len(list(csv.DictReader((tmp_path / "answer" / "layouts.csv").read_text().splitlines()))) == len(result["alternatives"])

    before = {file.name: file.read_bytes() for file in (tmp_path / "answer").iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    assert say(*words[:-1], tmp_path / "answer", "--gpu", "b200").code == 2
    assert {file.name: file.read_bytes() for file in (tmp_path / "answer").iterdir()} == before


def test_no_launch_script_is_written_for_what_does_not_start(say: Say, tmp_path: Path) -> None:  # noqa: F811
    said = say("size", "Llama-3.1-70B", "--output-dir", tmp_path / "answer")
    assert said.code == 3
    assert {file.name for file in (tmp_path / "answer").iterdir()} == {"result.json", "layouts.csv"}


def test_bf16_is_two_bytes() -> None:
    assert extents(gemm("g", m=1.0, n=1.0, k=1.0))["element_bytes"] == BF16.bytes == 2


def test_the_keys_of_explain_diff_and_gpus_are_frozen(say: Say) -> None:  # noqa: F811
    head = {"schema_version", "tool_version", "inputs", "warnings"}
    opened = explained(say, "Llama-3.1-8B", "--context", "32K")
    assert opened.keys() == head | {"seconds", "binding", "overlapped_s", "rows", "memory_bytes_per_gpu", "cache", "calibration"}
    assert opened["seconds"].keys() == {"lower", "value", "low", "high", "upper", "basis"}
    assert opened["cache"].keys() == {"sequences", "bytes_per_sequence", "layers"}
    for row in opened["rows"]:
        assert row.keys() == {
            "name", "kernel", "impl", "dtype", "count", "seconds", "lower", "share", "bound_by", "found_in_l2", "demand_s", "formulas", "constants",
            "basis", "source",
        }  # fmt: skip
        assert all(formula.keys() == {"text", "substituted", "value"} for formula in row["formulas"].values())
    moved = say("diff", *TWO, "--json").document
    assert moved.keys() == head | {"changed", "terms", "totals"}
    assert all(term.keys() >= {"kind", "name", "before", "after", "difference"} for term in moved["terms"])
    for entry in say("gpus", "--json").document["gpus"]:
        assert entry.keys() == {
            "name", "title", "vendor", "architecture", "ships", "capacity_bytes", "usable_bytes", "hbm_bytes_per_s", "dense_flops_per_s", "peak_flops_per_s",
            "link", "gpus_per_node", "tdp_w", "price_usd_per_gpu_hour", "calibration", "unknown", "sources",
        }  # fmt: skip
        assert ("tdp_w" in entry["unknown"]) == (entry["tdp_w"] is None)
        assert ("not published" in entry["calibration"]) == bool({*entry["unknown"]} - {"tdp_w"})
