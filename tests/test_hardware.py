"""Truths about GPUs, links and clusters; the laws run over the whole catalog."""

from __future__ import annotations

import datetime as dt
import importlib.util
import pickle
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator import data, hardware, planner
from simulator.calibration import Calibration
from simulator.data import data_path
from simulator.hardware import Cluster, Gpu, catalog, cluster, gpu, link_seeds, price
from simulator.kernels.attention import Segment, attention
from simulator.serving import Request
from simulator.timing import Clock
from simulator.units import Array
from tests.support import model

every_gpu = pytest.mark.parametrize("name", catalog())
FILES = sorted([*data_path("hardware").glob("*.toml"), data_path("prices.toml")])
BASES = {"derived", "measured", "assumed", "secondary"}


def figures(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every figure of a data file: every innermost table that holds numbers."""
    values = [v for v in table.values() if not isinstance(v, (dict, list))]
    if any(isinstance(v, (int, float)) for v in values):
        yield table
        return
    for child in table.values():
        for inner in child if isinstance(child, list) else [child]:
            if isinstance(inner, dict):
                yield from figures(inner)


def array(value: Any) -> Array:
    return np.asarray(value, dtype=np.float64)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_figure_has_a_source_and_a_date(path: Path) -> None:
    found = list(figures(tomllib.loads(path.read_text("utf-8"))))
    assert found
    for figure in found:
        assert figure["source"], figure
        assert dt.date.fromisoformat(figure["date"]) >= dt.date(2020, 1, 1), figure
        assert figure.get("basis", "derived") in BASES, figure


def test_data_is_ascii() -> None:
    for path in FILES:
        assert path.read_bytes().isascii(), path


def test_a_file_is_called_what_its_gpu_is_called_and_no_spelling_means_two_gpus() -> None:
    spellings: list[str] = []
    for name in catalog():
        head = tomllib.loads(data_path("hardware", f"{name}.toml").read_text("utf-8"))
        assert head["name"] == name
        spellings += {name, *head["aliases"]}
    assert len(spellings) == len(set(spellings))


@every_gpu
def test_every_figure_of_a_gpu_is_positive_and_cited(name: str) -> None:
    part = gpu(name)
    numbers = {
        key: getattr(part, key)
        for key in Gpu.__slots__
        if isinstance(getattr(part, key), (int, float)) and key != "usable_bytes"
    }
    for table in ("flops_per_clock", "datasheet", "attained"):
        numbers |= {f"{table}.{dtype}": value for dtype, value in getattr(part, table).items()}
    for link in part.links:
        numbers[f"links.{link.name}.bytes_per_s"] = link.bytes_per_s
    for key, value in numbers.items():
        if value == 0:
            assert key in hardware._MAY_BE_UNKNOWN
            assert key not in part.sources, key
            continue
        assert value > 0, key
        assert key.replace("boost", "max") in part.assumed or part.sources[key], key


@every_gpu
def test_the_rate_per_clock_at_the_boost_clock_is_the_datasheet_or_the_file_says_why(name: str) -> None:
    part = gpu(name)
    rows = tomllib.loads(data_path("hardware", f"{name}.toml").read_text("utf-8"))["datasheet"]
    if not part.flops_per_clock:
        assert {"units", "max_clock_hz"} & {*part.assumed}
        assert all(part.peak_flops_per_s(dtype) == row["value"] for dtype, row in rows.items())
        return
    assert rows.keys() == part.flops_per_clock.keys()
    for dtype, row in rows.items():
        computed = part.units * part.flops_per_clock[dtype] * part.boost_clock_hz
        agrees = computed == pytest.approx(row["value"], rel=0.01)
        assert agrees != ("note" in row), (dtype, computed)


@every_gpu
def test_attained_is_below_the_datasheet_and_the_datasheet_below_the_peak(name: str) -> None:
    part = gpu(name)
    for dtype, value in part.attained.items():
        assert 0.4 * part.peak_flops_per_s(dtype) < value < part.datasheet_flops_per_s(dtype)
    for dtype in part.datasheet.keys() - {"fp32"}:
        assert part.datasheet_flops_per_s(dtype) < 1.001 * part.peak_flops_per_s(dtype)
    assert (part.sustained_clock_hz or 0.0) <= part.boost_clock_hz <= part.max_clock_hz


@every_gpu
def test_usable_memory_is_part_of_the_capacity(name: str) -> None:
    part = gpu(name)
    assert 0.98 * part.capacity_bytes < part.usable_bytes <= part.capacity_bytes
    assert ("usable_bytes" in part.sources) or part.usable_bytes == part.capacity_bytes


def test_h200_is_what_the_driver_of_a_real_one_said() -> None:
    h200 = gpu("h200")
    assert h200.capacity_bytes == 143_771 * 2**20
    assert h200.usable_bytes == 150_109_880_320
    assert (h200.units, h200.l2_bytes, h200.max_clock_hz) == (132, 62_914_560, 1.98e9)
    assert h200.peak_flops_per_s("bf16") == 132 * 4096 * 1.98e9
    assert h200.datasheet_flops_per_s("fp8") == 1979e12


def test_a_narrow_type_the_gpu_lacks_runs_in_the_next_wider_one() -> None:
    a100, h200, b200 = gpu("a100"), gpu("h200"), gpu("b200")
    assert [a100.runs_as(d) for d in ("fp4", "fp8", "int8", "bf16")] == ["bf16", "bf16", "int8", "bf16"]
    assert [h200.runs_as(d) for d in ("fp4", "fp8")] == ["fp8", "fp8"]
    assert b200.runs_as("fp4") == "fp4"
    assert a100.peak_flops_per_s("fp8") == a100.peak_flops_per_s("bf16")
    assert a100.datasheet_flops_per_s("fp4") == 312e12
    assert b200.supports("fp4")
    assert not h200.supports("fp4")


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"dtype 'fp7'.*use one of bf16, fp16, fp32, fp4, fp8, int8, tf32"):
        gpu("h200").peak_flops_per_s("fp7")


@every_gpu
def test_exponentials_are_slower_than_vector_work_and_that_slower_than_matrix_work(name: str) -> None:
    part = gpu(name)
    vector = part.peak_flops_per_s("fp32") if part.supports("fp32") else part.peak_flops_per_s("bf16")
    assert part.sfu_per_s < vector <= part.peak_flops_per_s("bf16")


@every_gpu
def test_what_is_not_published_is_its_rate_s_worth_of_an_h200(name: str) -> None:
    part, h200 = gpu(name), gpu("h200")
    assert not {*part.assumed} & {*part.sources}
    if not part.assumed:
        return
    worth = part.datasheet["bf16"] / h200.datasheet["bf16"]
    if {"units", "max_clock_hz"} & {*part.assumed}:
        assert part.units * part.max_clock_hz * part.flops_per_unit_clock("bf16") == pytest.approx(part.datasheet["bf16"])
    if "sfu_per_clock" in part.assumed:
        assert part.sfu_per_s == pytest.approx(worth * h200.units * h200.boost_clock_hz * h200.sfu_per_clock)
    if "l2_bytes" in part.assumed:
        assert part.l2_bytes == pytest.approx(worth * h200.l2_bytes)


def test_a_bound_rests_on_nothing_assumed() -> None:
    op = attention("x", Segment(1.0, 8192.0, 0.0), heads=64.0, kv_heads=8.0, head_dim=128)
    none = Calibration.none()
    assert {*Clock(cluster("tpu7x"), none).demand(op)} == {"hbm", "tensor"}
    assert {*Clock(cluster("h200"), none).demand(op)} == {"hbm", "tensor", "special"}


@every_gpu
def test_links_are_listed_fastest_first_and_the_host_is_a_tier_only_where_gpus_meet_there(name: str) -> None:
    tiers = cluster(name, gpus=1).tiers
    assert tiers[-1].kind == "network" or tiers[-1].domain < hardware.MAX_GPUS
    assert all(link.kind not in ("pcie", "c2c") or link is tiers[0] for link in tiers)
    rates = [link.bytes_per_s for link in tiers]
    assert rates == sorted(rates, reverse=True)
    assert gpu(name).host_bytes_per_s <= tiers[0].bytes_per_s or len(tiers) == 1


@every_gpu
def test_a_gpu_survives_pickling_hashing_and_editing(name: str) -> None:
    part = gpu(name)
    assert pickle.loads(pickle.dumps(part)) == part
    assert hash(pickle.loads(pickle.dumps(part))) == hash(part)
    faster = replace(part, hbm_bytes_per_s=2 * part.hbm_bytes_per_s)
    assert faster != part
    assert cluster(faster, gpus=4).gpu is faster


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("h200", "h200_sxm"),
        ("H200", "h200_sxm"),
        ("h200-sxm", "h200_sxm"),
        ("NVIDIA H200", "h200_sxm"),
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm_80"),
        ("NVIDIA B200", "b200_sxm"),
        ("gb200", "gb200_nvl72"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA A100-PCIE-80GB", "a100_pcie_80"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA B300 SXM6 AC", "b300_sxm"),
        ("Ironwood", "tpu7x"),
    ],
)
def test_a_gpu_answers_to_what_its_driver_prints(spelling: str, name: str) -> None:
    assert gpu(spelling).name == name


@pytest.mark.parametrize(
    "stranger", ["NVIDIA H200 NVL", "", "links", "collectives", "../prices", 7, None]
)
def test_a_stranger_is_refused_with_what_is_known(stranger: Any) -> None:
    with pytest.raises(ValueError, match=r"not in the catalog; .*known: 4090, .*h100, .*mi300x, .*, or a TOML file$"):
        gpu(stranger)


def test_a_typing_error_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"^gpu 'h20O': not in the catalog; did you mean h20, h200\? known: "):
        gpu("h20O")


@pytest.mark.parametrize("gpus", [True, 8.0, "8", None, float("nan")])
def test_a_number_of_gpus_that_is_no_integer_is_refused(gpus: Any) -> None:
    with pytest.raises(ValueError, match=r"^gpus .*: must be an integer; write"):
        cluster("h200", gpus=gpus)


@pytest.mark.parametrize("gpus", [0, -8, 1_000_001, 10**30])
def test_a_number_of_gpus_nobody_has_is_refused(gpus: int) -> None:
    with pytest.raises(ValueError, match=r"^gpus .*: must be between 1 and 1,000,000; 8 fill one node$"):
        cluster("h200", gpus=gpus)


@pytest.mark.parametrize(("name", "gpus", "nodes"), [("h200", 1, 1), ("h200", 8, 1), ("h200", 9, 2), ("gb200", 72, 18)])
def test_nodes_are_hosts_rounded_up(name: str, gpus: int, nodes: int) -> None:
    assert cluster(name, gpus=gpus).nodes == nodes


def test_a_group_within_a_node_uses_the_scale_up_link_and_a_wider_one_the_network() -> None:
    h200 = cluster("h200", gpus=16)
    inside, across = h200.tier(8), h200.tier(16)
    assert (inside.index, inside.bytes_per_s) == (0.0, 450e9)
    assert (across.index, across.bytes_per_s) == (1.0, 50e9)
    assert h200.tier(2, stride=4).index == 0.0
    assert h200.tier(2, stride=8).index == 1.0
    assert inside.latency_s == link_seeds().latency_s["nvlink"]["ring"]["ll"] == 0.6e-6
    assert across.latency_s == link_seeds().latency_s["network"]["ring"]["ll"] == 2.7e-6


def test_one_rank_never_leaves_its_node() -> None:
    assert cluster("h200", gpus=64).tier(1, stride=64).index == 0.0


def test_groups_that_do_not_divide_the_node_cross_it_once_the_cluster_is_full() -> None:
    assert cluster("h200", gpus=6).tier(3).index == 0.0
    assert cluster("h200", gpus=12).tier(3).index == 0.0
    assert cluster("h200", gpus=15).tier(3).index == 1.0
    assert cluster("gb200", gpus=128).tier(64).index == 0.0
    assert cluster("gb200", gpus=144).tier(16).index == 1.0


def widest(name: str) -> Cluster:
    """144 GPUs, or as many as a part without a known network joins."""
    return cluster(name, gpus=min(144, max(link.domain for link in gpu(name).links)))


def straddles(gpus: int, domain: int, ranks: int, stride: int) -> bool:
    """Pack blocks into the fewest domains one by one: True if some block finds no domain with room for it."""
    block = ranks * stride
    room = [domain] * -(-gpus // domain)
    for _ in range(gpus // block):
        free = next((i for i, left in enumerate(room) if left >= block), None)
        if free is None:
            return True
        room[free] -= block
    return False


@pytest.mark.parametrize("name", ["h200", "gb200"])
def test_the_tier_of_every_small_group_agrees_with_packing_blocks_into_nodes(name: str) -> None:
    domain = cluster(name).tiers[0].domain
    for gpus in (1, 2, 7, 8, 9, 12, 16, 24, 72, 96, 128, 144, 216):
        whole = cluster(name, gpus=gpus)
        for ranks in range(2, gpus + 1):
            for stride in range(1, gpus // ranks + 1):
                expected = float(straddles(gpus, domain, ranks, stride))
                assert whole.tier(ranks, stride).index == expected, (gpus, ranks, stride)


@every_gpu
def test_an_array_of_groups_is_answered_like_each_group_alone(name: str) -> None:
    whole = widest(name)
    ranks = np.array([1.0, 2.0, 3.0, 4.0, 8.0, 9.0, 72.0, 144.0])
    strides = np.array([[1.0], [2.0], [8.0]])
    together = whole.tier(ranks, strides)
    for row, stride in enumerate(strides[:, 0]):
        for column, count in enumerate(ranks):
            alone = whole.tier(float(count), float(stride))
            for many, one in ((together.index, alone.index), (together.bytes_per_s, alone.bytes_per_s), (together.latency_s, alone.latency_s)):
                assert np.broadcast_to(array(many), (3, 8))[row, column] == one


@every_gpu
def test_a_group_made_of_whole_groups_never_hops_faster_than_they_do(name: str) -> None:
    whole = widest(name)
    sizes = [n for n in range(2, whole.gpus + 1) if whole.gpus % n == 0]
    for part in sizes:
        for union in (n for n in sizes if n % part == 0):
            inner, outer = whole.tier(part), whole.tier(union)
            assert (inner.index, inner.latency_s) <= (outer.index, outer.latency_s)


def test_pairwise_wiring_gives_two_gpus_one_link_and_eight_all_seven() -> None:
    xgmi = cluster("mi300x", gpus=8)
    assert [xgmi.tier(n).bytes_per_s for n in (1, 2, 4, 8)] == [64e9, 64e9, 192e9, 448e9]
    nvlink = cluster("h200", gpus=8)
    assert [nvlink.tier(n).bytes_per_s for n in (1, 2, 4, 8)] == [450e9] * 4


@every_gpu
def test_every_link_has_the_latency_nccl_gives_its_kind(name: str) -> None:
    for link in gpu(name).links:
        assert link.latency_s == link_seeds().latency_s[link.kind]["ring"]["ll"]


def test_nccl_seeds_give_the_time_of_a_ring_all_reduce() -> None:
    # FORMULAS.md 5.1: 128 MiB, 8 ranks, 450 GB/s, Simple: 578 us.
    seeds = link_seeds().latency_s
    seconds = seeds["base"]["ring"]["simple"] + 14 * seeds["nvlink"]["ring"]["simple"] + 2 * 7 / 8 * 2**27 / 450e9
    assert seconds == pytest.approx(578e-6, rel=1e-3)
    assert seeds["nvlink"]["nvls"] == {"simple": 25e-6}
    assert link_seeds().nvls_efficiency == {"hopper": 0.85, "blackwell": 0.74}


def test_every_price_belongs_to_a_gpu_and_its_ends_enclose_it() -> None:
    rows = tomllib.loads(data_path("prices.toml").read_text("utf-8"))
    assert rows.keys() <= set(catalog())
    for name in rows:
        cost = price(name)
        assert cost is not None
        assert cost.typical is not None
        assert 0 < (cost.low or cost.typical) <= cost.typical <= (cost.high or cost.typical)
        assert cost.sources.keys() == rows[name].keys()
        assert cluster(name).price_usd_per_gpu_hour == cost.typical


def test_a_gpu_without_a_price_costs_nothing_known() -> None:
    custom = replace(gpu("h200"), name="my_gpu")
    assert cluster(custom, gpus=2).price_usd_per_gpu_hour is None
    assert price(custom) is None
    with pytest.raises(ValueError, match="not in the catalog"):
        price("my_gpu")


def test_reading_one_gpu_does_not_read_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = hardware._read

    def record(*parts: str) -> dict[str, Any]:
        read.append(parts[-1])
        return original(*parts)

    monkeypatch.setattr(hardware, "_read", record)
    for cached in (hardware._load, hardware.link_seeds):
        cached.cache_clear()
    gpu("h200")
    assert sorted(read) == ["h200_sxm.toml", "links.toml"]


def test_a_part_without_a_known_network_stays_within_its_links() -> None:
    part = replace(gpu("gb300"), links=gpu("gb300").links[:1])
    assert cluster(part, gpus=72).tier(72).index == 0.0
    with pytest.raises(ValueError, match=r"^gpus 144: the links of gb300_nvl72 join 72 and its network is not known; use at most 72$"):
        cluster(part, gpus=144)
    asked = planner.size(model("deepseek-ai/DeepSeek-V4-Pro"), cluster(part, gpus=8), Request(2**20, 64))
    assert asked.smallest_gpus is None or asked.smallest_gpus <= 72


def test_a_cluster_is_data_and_may_be_edited() -> None:
    whole = cluster("h200", gpus=16)
    slower = replace(whole, tiers=(whole.tiers[0], replace(whole.tiers[1], bytes_per_s=25e9)))
    assert slower.tier(16).bytes_per_s == 25e9
    with pytest.raises(ValueError, match="gpus 0"):
        replace(whole, gpus=0)
    assert isinstance(Cluster(whole.gpu, np.int64(4), whole.tiers).nodes, (int, np.integer))  # type: ignore[arg-type]


def load_copy(package: Path) -> Any:
    """`simulator/data.py` as if it were installed in `package`."""
    package.mkdir(exist_ok=True)
    shutil.copy(data.__file__, package / "data.py")
    spec = importlib.util.spec_from_file_location("copied_data", package / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_data_of_the_wheel_comes_before_data_beside_the_package(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert load_copy(tmp_path / "simulator").data_path("x") == tmp_path / "data" / "x"
    (tmp_path / "simulator" / "_data").mkdir()
    assert load_copy(tmp_path / "simulator").data_path("x") == tmp_path / "simulator" / "_data" / "x"


def test_missing_data_is_reported_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="reinstall the package"):
        load_copy(tmp_path / "simulator").data_path("x")
