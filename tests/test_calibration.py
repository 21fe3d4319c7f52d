"""Where a GPU's constants come from, and what they may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from simulator import Calibration, calibration
from simulator.calibration import IDENTITY, Constants, read_profile, user_folder
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
        assert 0 <= constants.sustained <= 1
        assert constants.launch_s >= 0
        assert constants.depth_half >= 0
        assert constants.wave >= 0
        assert constants.split >= 1
        assert constants.power in (0, 1, 2, 4, 8, 16)
        assert 0 < constants.sigma < 1
        assert constants.basis in BASES
        assert constants.source, family


def test_none_is_the_identity() -> None:
    none = Calibration.none()
    assert none.constants(("gemm", "", "bf16")) == IDENTITY == Constants()
    clock = Clock(machine("h200"), none)
    for op in (gemm("x", m=8192.0, n=8192.0, k=8192.0), attention("x", Segment(1.0, 8192.0, 0.0), heads=64.0, kv_heads=8.0, head_dim=128)):
        assert clock.bound(op) <= clock.expected(op) <= 1.1 * clock.bound(op)


def test_constants_are_the_nearest_known() -> None:
    exact, plain, wide = Constants(tensor=0.1), Constants(tensor=0.2), Constants(tensor=0.3)
    found = Calibration("g", {("attention", "flash3", "fp8"): exact, ("attention", "", "fp8"): plain, ("attention", "", ""): wide})
    assert found.constants(("attention", "flash3", "fp8")) == exact
    assert found.constants(("attention", "cudnn", "fp8")) == plain
    assert found.constants(("attention", "cudnn", "bf16")) == wide
    assert found.constants(("attention", "", "bf16")) == wide
    assert found.constants(("scan", "", "bf16")) == IDENTITY


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
    assert Calibration.load(gpu("h100")).description == "h100_sxm borrows the shape of mine (yours profile)"
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
