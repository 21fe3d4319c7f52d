"""GPUs of the user's own: by file, by name from a folder, like another one; and every mistake in one line."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulator import hardware
from simulator.calibration import Calibration
from simulator.data import data_path
from simulator.hardware import catalog, cluster, gpu, price
from tests.test_cli import Say, refused, say  # noqa: F401 (a fixture)

EXAMPLE = data_path().parent / "examples" / "custom_gpu.toml"
BARE = """
name = "mine"
[figures]
units = 100
max_clock_hz = "2 GHz"
sfu_per_clock = 16
capacity_bytes = "64 GiB"
hbm_bytes_per_s = "2 TB/s"
l2_bytes = "32 MiB"
[datasheet]
bf16 = "400 TFLOP/s"
fp32 = "50 TFLOP/s"
[[links]]
kind = "network"
bytes_per_s = "25 GB/s"
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user's folder of GPUs."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    found = tmp_path / "longctx" / "hardware"
    found.mkdir(parents=True)
    hardware._owned.cache_clear()
    yield found
    hardware._owned.cache_clear()


def written(folder: Path, text: str, name: str = "mine.toml") -> str:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    hardware._own.cache_clear()
    return str(file)


def test_what_is_not_given_is_the_other_gpus_and_what_is_given_is_not() -> None:
    mine, h200 = gpu(str(EXAMPLE)), gpu("h200")
    assert (mine.capacity_bytes, mine.usable_bytes, mine.hbm_bytes_per_s, mine.tdp_w) == (192 * 2**30, 192 * 2**30, 6e12, 750)
    assert (mine.units, mine.l2_bytes, mine.max_clock_hz) == (h200.units, h200.l2_bytes, h200.max_clock_hz)
    assert mine.peak_flops_per_s("bf16") == pytest.approx(h200.peak_flops_per_s("bf16"), rel=1e-3)
    assert [link.name for link in mine.links] == ["nvlink4", "pcie5", "xdr800"]
    assert cluster(mine, 16).tier(16).bytes_per_s == 100e9
    assert cluster(mine, 2).price_usd_per_gpu_hour == 4.50
    assert mine.sources["hbm_bytes_per_s"] == "our vendor's offer, 2026-11-24"
    assert mine.borrows == "h200_sxm"
    assert "borrows the shape of" in Calibration.load(mine).description


@pytest.mark.parametrize("name", catalog())
def test_a_file_that_only_names_another_gpu_is_that_gpu(name: str, tmp_path: Path) -> None:
    mine, other = gpu(written(tmp_path, f'name = "copy"\nlike = "{name}"')), gpu(name)
    for figure in hardware._MAY_BE_UNKNOWN:
        assert getattr(mine, figure) == getattr(other, figure), figure
    assert (mine.links, mine.datasheet, mine.flops_per_clock, mine.attained) == (other.links, other.datasheet, other.flops_per_clock, other.attained)
    assert price(mine) is None


def test_a_gpu_like_no_other_needs_only_what_a_time_needs(say: Say, tmp_path: Path) -> None:  # noqa: F811
    file = written(tmp_path, BARE)
    mine = gpu(file)
    assert mine.flops_per_clock == {"bf16": 2000.0, "fp32": 250.0}
    assert mine.peak_flops_per_s("bf16") == 400e12
    assert pickle.loads(pickle.dumps(mine)) == mine
    assert say("size", "Llama-3.1-8B", "--gpu", file, "--gpus", 2, "--json").code == 0
    assert say("size", "Llama-3.1-8B", "--gpu", file, "--json").document["energy_j_per_token"] is None
    assert say("estimate", "Llama-3.1-8B", "--gpu", file, "--tp", 4).code == 0
    assert say("explain", "DeepSeek-V2-Lite", "--gpu", file, "--phase", "decode").code == 0
    assert say("kernel", "gemm", "--gpu", file, "--m", 8, "--n", 8, "--k", 8).code == 0


def test_a_figure_that_is_left_out_stands_in_and_is_said(say: Say, tmp_path: Path) -> None:  # noqa: F811
    file = written(tmp_path, BARE.replace('l2_bytes = "32 MiB"', ""))
    said = say("estimate", "Llama-3.1-8B", "--gpu", file, "--json")
    assert said.code == 0
    assert said.document["seconds"]["basis"] == "assumed"
    assert "mine: not published: l2_bytes (taken in proportion to an H200's: times are assumed)" in said.document["warnings"]


def test_a_changed_clock_changes_every_rate_and_keeps_no_ceiling_of_another_part(tmp_path: Path) -> None:
    mine = gpu(written(tmp_path, 'name = "slow"\nlike = "h200"\n[figures]\nmax_clock_hz = "990 MHz"'))
    h200 = gpu("h200")
    assert mine.boost_clock_hz == mine.max_clock_hz == 0.99e9
    assert mine.peak_flops_per_s("fp8") == h200.peak_flops_per_s("fp8") / 2
    assert mine.datasheet["bf16"] == pytest.approx(h200.units * h200.flops_per_clock["bf16"] * 0.99e9)
    assert mine.attained == {}
    assert mine.sustained_clock_hz is None


def test_gpus_of_the_folder_answer_to_their_names_and_come_first(say: Say, folder: Path) -> None:  # noqa: F811
    written(folder, EXAMPLE.read_text("utf-8"), "plus.toml")
    for spelling in ("plus", "h200_plus", "H200+", "NVIDIA h200-plus"):
        assert gpu(spelling).name == "h200_plus"
    written(folder, 'name = "h100"\nlike = "h100_sxm"\n[figures]\ncapacity_bytes = "96 GiB"', "h100.toml")
    hardware._owned.cache_clear()
    assert gpu("h100").capacity_bytes == 96 * 2**30
    assert gpu("h100_sxm").capacity_bytes < 80 * 2**30
    listed = {entry["name"]: entry for entry in say("gpus", "--json").document["gpus"]}
    assert listed["h200_plus"]["ships"] is False
    assert listed["h200_plus"]["price_usd_per_gpu_hour"]["typical"] == 4.50
    assert len(listed) == len(catalog()) + 2
    found = say("size", "Llama-3.1-8B", "--gpu", "h200_plus", "--json").document
    assert found["inputs"]["price_usd_per_gpu_hour"] == 4.50
    assert "h200_plus" in found["inputs"]["price_source"]


def test_a_broken_file_in_the_folder_breaks_only_itself(say: Say, folder: Path) -> None:  # noqa: F811
    written(folder, "name = ", "broken.toml")
    assert gpu("h200").name == "h200_sxm"
    refused(say("kv", "Llama-3.1-8B", "--gpu", "broken"), "broken.toml: not TOML")
    said = say("gpus", "--json")
    assert said.code == 0
    assert any("broken.toml" in warning for warning in said.document["warnings"])


MISTAKES = [
    ("", "has no name"), ("name = 3", "name = 3: must be a text"), ("name = 'x'\nlike = 'h20000'", "like = 'h20000'", "did you mean"),
    ("name = 'x'\nlike = 'other.toml'", "not a file"), ("name = 'x'", "figures.capacity_bytes is missing", "like = 'h100'"),
    ("name = 'x'\nlike = 'h100'\nmemory = 3", "memory: no such field"),
    ("name = 'x'\nlike = 'h100'\n[figures]\ncapacity = '80 GB'", "figures.capacity: no such field", "did you mean capacity_bytes"),
    ("name = 'x'\nlike = 'h100'\n[figures]\nhbm_bytes_per_s = '4 TFLOP/s'", "figures.hbm_bytes_per_s", "not a multiple of B/s"),
    ("name = 'x'\nlike = 'h100'\n[figures]\nhbm_bytes_per_s = -1", "must be above 0"),
    ("name = 'x'\nlike = 'h100'\n[figures]\nhbm_bytes_per_s = nan", "must be above 0"),
    ("name = 'x'\nlike = 'h100'\n[figures]\nhbm_bytes_per_s = true", "must be a number"),
    ("name = 'x'\nlike = 'h100'\n[figures]\nhbm_bytes_per_s = {source = 'x'}", "must be a number"),
    ("name = 'x'\nlike = 'h100'\n[figures]\nunits = 1.5", "must be a whole number"),
    ("name = 'x'\nlike = 'h100'\n[figures]\nmax_clock_hz = 1e9\nboost_clock_hz = 2e9", "must not exceed max_clock_hz"),
    ("name = 'x'\nlike = 'h100'\nfigures = 3", "must be a table"), ("name = 'x'\nlike = 'h100'\nlinks = 3", "must be tables"),
    ("name = 'x'\nlike = 'h100'\n[[links]]\nkind = 'rope'\nbytes_per_s = 1", "use one of", "nvlink"),
    ("name = 'x'\nlike = 'h100'\n[[links]]\nkind = 'nvlink'", "has no bytes_per_s"),
    ("name = 'x'\nlike = 'h100'\n[[links]]\nkind = 'nvlink'\nbytes_per_s = 1", "has no domain"),
    ("name = 'x'\nlike = 'h100'\n[datasheet]\nfp7 = 1e12", "datasheet.fp7: no such field"),
    ("name = 'x'\nlike = 'h100'\n[attained]\nbf16 = '2 PFLOP/s'", "must not exceed datasheet"),
    ("name = 'x'\nlike = 'h100'\nprice_usd_per_gpu_hour = -1", "US dollars"), ("name = 'x'\nlike = 'h100'\naliases = 'x'", "must be a list of texts"),
    ("name = 'x'\nlike = 'h100'\n[[links]]\nkind = 'pcie'\nbytes_per_s = '32 GB/s'", "no link"),
    (BARE.replace("[[links]]", "[more]"), "more: no such field"), (BARE[: BARE.index("[[links]]")], "links is missing"),
    (BARE.replace("bf16", "fp16"), "datasheet.bf16 is missing"), ("name = 'x'\nname = 'y'", "not TOML"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_that_names_file_field_and_remedy(say: Say, tmp_path: Path, mistake: tuple[str, ...]) -> None:  # noqa: F811
    file = written(tmp_path, mistake[0])
    refused(say("kv", "Llama-3.1-8B", "--gpu", file), file, *mistake[1:])


def test_a_file_that_is_not_there_is_said(say: Say, tmp_path: Path) -> None:  # noqa: F811
    refused(say("kv", "Llama-3.1-8B", "--gpu", tmp_path / "no.toml"), "cannot be read", "longctx gpus")
    refused(say("kv", "Llama-3.1-8B", "--gpu", "~nobody/no.toml"), "no.toml")
