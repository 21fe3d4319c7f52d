"""Where a GPU's constants come from, and what they may be."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from simulator import Calibration, calibration
from simulator.calibration import IDENTITY, Constants, carried, read_profile, user_folder
from simulator.data import data_path, observed
from simulator.dtypes import WEIGHT_FORMATS
from simulator.hardware import catalog, gpu
from simulator.kernels.attention import Segment, attention
from simulator.kernels.gemm import gemm
from simulator.launch import LAUNCHES
from simulator.timing import Clock
from tests.support import machine

BASES = ("measured", "calibrated", "analytic", "assumed")
PROFILE = """
description = "mine"
common_sigma = 0.02

[[family]]
kernel = "gemm"
tensor = 0.5
sigma = 0.03
basis = "measured"

[[family]]
kernel = "gemm"
dtype = "fp8"
tensor = 0.4
launch_s = 1e-6
sigma = 0.05
basis = "calibrated"
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user's own folder of profiles, and no memory of profiles read before."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    calibration._load.cache_clear()
    yield user_folder()
    calibration._load.cache_clear()


def write(folder: Path, text: str, name: str = "h200_sxm") -> Path:
    file = folder / name / "constants.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text, "utf-8")
    return file


def test_every_observed_number_has_a_source_and_a_date_and_is_used() -> None:
    root = Path(calibration.__file__).parent.parent
    code = "".join(file.read_text("utf-8") for folder in ("simulator", "microbench") for file in (root / folder).rglob("*.py"))
    for name, told in tomllib.loads(data_path("calibration", "observed.toml").read_text("utf-8")).items():
        assert told.keys() == {"value", "date", "meaning", "source"}, name
        assert observed(name) == told["value"] > 0
        assert f'observed("{name}")' in code


@pytest.mark.parametrize("name", catalog())
def test_every_gpu_has_constants_for_every_kernel_and_message(name: str) -> None:
    found = Calibration.load(gpu(name))
    known = {family[0] for family in found.families}
    assert set(LAUNCHES) | {"message"} <= known
    assert found.description
    assert 0 <= found.common_sigma < 0.5


@pytest.mark.parametrize("name", catalog())
def test_no_gpu_attains_more_than_its_peak(name: str) -> None:
    for family, constants in Calibration.load(gpu(name)).families.items():
        for share in ("tensor", "memory"):
            assert 0 < getattr(constants, share) <= 1, (family, share)
        assert constants.special > 0  # above 1 where exponentials hide behind products
        assert constants.sustained >= 0  # above 1 where the power limit does not bind
        assert constants.launch_s >= 0
        assert constants.depth_half >= 0
        assert constants.wave >= 0
        assert constants.split >= 1
        assert constants.power in (0, 1, 2, 4, 8, 16)
        assert 0 < constants.sigma < 1
        assert constants.basis in BASES
        assert constants.source, family


@pytest.mark.parametrize("name", catalog())
def test_messages_take_as_many_sms_of_every_gpu(name: str) -> None:
    part, lender = gpu(name), gpu("h200")
    if part.vendor not in ("nvidia", "amd"):
        assert not Calibration.load(part).interference, "its links have engines of their own"
        return
    found, measured = Calibration.load(part), Calibration.load(lender)
    for pattern in ("send", "all_reduce"):
        assert 0 < found.taken(pattern) <= 0.5
        assert found.taken(pattern) * part.units == pytest.approx(measured.taken(pattern) * lender.units, rel=0.1)
    assert found.taken("send") < found.taken("all_gather")


def test_a_profile_of_ones_own_keeps_what_it_did_not_measure(fresh: Path) -> None:
    shipped = Calibration.load(gpu("h200"))
    write(fresh, PROFILE)
    calibration._load.cache_clear()
    found = Calibration.load(gpu("h200"))
    assert found.constants(("gemm", "", "bf16")) != shipped.constants(("gemm", "", "bf16"))
    assert (found.links, found.interference) == (shipped.links, shipped.interference)
    assert found.links


def test_none_is_the_identity() -> None:
    none = Calibration.none()
    assert none.constants(("gemm", "", "bf16")) == IDENTITY == Constants()
    clock = Clock(machine("h200"), none)
    for op in (gemm("x", m=8192.0, n=8192.0, k=8192.0), attention("x", Segment(1.0, 8192.0, 0.0), heads=64.0, kv_heads=8.0, head_dim=128)):
        assert clock.bound(op) <= clock.expected(op) <= 1.1 * clock.bound(op)


def test_constants_are_the_nearest_known() -> None:
    exact, plain, wide, named = Constants(tensor=0.1), Constants(tensor=0.2), Constants(tensor=0.3), Constants(tensor=0.4)
    rows = {("attention", "flash3", "fp8"): exact, ("attention", "", "fp8"): plain, ("attention", "", ""): wide, ("attention", "flash2", ""): named}
    found = Calibration("g", rows)
    assert found.constants(("attention", "flash3", "fp8")) == exact
    assert found.constants(("attention", "cudnn", "fp8")) == plain
    assert found.constants(("attention", "cudnn", "bf16")) == wide
    assert found.constants(("attention", "flash2", "fp8")) == named
    assert found.constants(("attention", "", "bf16")) == wide
    assert found.constants(("scan", "", "bf16")) == IDENTITY


def test_fp16_is_taken_for_bf16() -> None:
    bf16, wide = Constants(tensor=0.1), Constants(tensor=0.3)
    found = Calibration("g", {("gemm", "", "bf16"): bf16, ("gemm", "", ""): wide})
    assert found.constants(("gemm", "", "fp16")) == bf16
    assert found.constants(("gemm", "", "fp8")) == wide


@pytest.mark.parametrize("name", catalog())
def test_constants_carried_there_and_back_are_the_same(name: str) -> None:
    here, there = gpu("h200"), gpu(name)
    for family, constants in Calibration.load(here).families.items():
        back = carried(family, carried(family, constants, there, here), here, there)
        for field in ("tensor", "depth_half", "sustained", "heat"):
            assert getattr(back, field) == pytest.approx(getattr(constants, field), rel=1e-12), (family, field)


def test_a_slower_tensor_core_attains_more_of_itself_and_the_same_board_power_binds_it_less() -> None:
    family = ("attention", "cudnn", "bf16")
    h200, h20 = (Calibration.load(gpu(name)).constants(family) for name in ("h200", "h20"))
    rate = gpu("h20").flops_per_clock["bf16"] / gpu("h200").flops_per_clock["bf16"]
    assert (1 / h20.tensor - 1) / (1 / h200.tensor - 1) == pytest.approx(rate)
    assert h20.sustained > 1 >= h200.sustained
    assert h20.basis == "analytic"
    assert h20.sigma > h200.sigma


@pytest.mark.parametrize("name", ["b200", "gb200", "a100", "mi300x"])
def test_a_long_product_meets_the_boards_published_matmul_ceiling(name: str) -> None:
    part = gpu(name)
    clock = Clock(machine(name), Calibration.load(part))
    for dtype, weight in (("bf16", "bf16"), ("fp8", "fp8")):
        if dtype in part.attained:
            op = gemm("x", m=16384.0, n=16384.0, k=16384.0, weight=WEIGHT_FORMATS[weight])
            assert op.tensor_flops / clock.expected(op) == pytest.approx(part.attained[dtype], rel=0.05), dtype


def test_a_users_own_profile_comes_first(fresh: Path) -> None:
    before = Calibration.load(gpu("h200"))
    assert "yours" not in before.description
    calibration._load.cache_clear()
    write(fresh, PROFILE)
    found = Calibration.load(gpu("h200"))
    assert found.description == "mine (yours profile)"
    assert found.common_sigma == 0.02
    assert found.constants(("gemm", "", "bf16")).tensor == 0.5
    assert found.constants(("gemm", "", "fp8")) == Constants(tensor=0.4, launch_s=1e-6, sigma=0.05, basis="calibrated")
    lent = Calibration.load(gpu("h100"))
    assert lent.description == "h100_sxm borrows the shape of mine (yours profile)"
    assert lent.constants(("gemm", "", "fp8")).basis == "analytic"
    assert "yours" not in Calibration.load(gpu("b200")).description


def test_a_profile_is_read_as_written(tmp_path: Path) -> None:
    found = read_profile(write(tmp_path, PROFILE), "h200_sxm")
    assert set(found.families) == {("gemm", "", ""), ("gemm", "", "fp8")}
    assert {f.name for f in fields(Constants)} >= {"tensor", "memory", "launch_s", "sigma", "basis", "source"}


@pytest.mark.parametrize(
    "text",
    [
        "tensor = ", "", "[[family]]\ntensor = 0.5\n", '[[family]]\nkernel = "gemm"\ntensor = "fast"\n', '[[family]]\nkernel = "gemm"\nbasis = "hearsay"\n',
        '[[family]]\nkernel = "gemm"\ntensor = -1.0\n', '[[family]]\nkernel = "gemm"\ntensor = 0.0\n', '[[family]]\nkernel = "gemm"\nmemory = nan\n',
        "family = 3\n", '[[family]]\nkernel = "gemm"\npower = 3\n', 'common_sigma = "wide"\n[[family]]\nkernel = "gemm"\n',
    ],
)  # fmt: skip
def test_a_profile_that_makes_no_sense_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match="constants.toml") as refused:
        read_profile(file, "h200_sxm")
    assert "\n" not in str(refused.value)
