"""What holds of the code itself: who imports whom, what is documented, what is sourced, what a registry's entries offer."""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import simulator
from simulator.data import data_path
from simulator.dtypes import CACHE_FORMATS, WEIGHT_FORMATS
from simulator.engines import REGISTRY as ENGINES
from simulator.engines import SCHEDULED
from simulator.kernels.attention import Segment
from simulator.layers import REGISTRY as LAYERS
from simulator.layers.layer import Module
from simulator.parallel import REGISTRY as SCHEMES
from simulator.parallel import Scheme
from tests.support import EVERY, model
from tests.test_mixers import EACH

ROOT = Path(__file__).resolve().parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(simulator.__path__, "simulator.") if not m.name.endswith("__main__")]
NOTHING = (Segment(0.0, 0.0, 0.0),)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


# ---- arrows


def test_arrows_point_one_way() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    found = str(linter) if linter.exists() else shutil.which("lint-imports")
    if found is None:
        pytest.skip("import-linter is not installed")
    told = subprocess.run([found, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize("outside", ["torch", "streamlit", "altair", "app", "microbench", "triton", "huggingface_hub"])
def test_the_simulator_needs_neither_gpu_nor_app_nor_network(outside: str) -> None:
    code = f"import sys; sys.modules[{outside!r}] = None; [__import__(m) for m in {MODULES!r}]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_help_loads_no_numbers() -> None:
    code = "import sys; import simulator.cli; sys.exit('rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_without_touching_the_disk_or_printing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module(name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [*MODULES, "simulator"])
def test_what_a_module_exports_exists(name: str) -> None:
    for exported in getattr(module(name), "__all__", ()):
        assert hasattr(module(name), exported), exported


def test_the_public_surface_is_there() -> None:
    assert {"load_model", "cluster", "Layout", "Prefill", "Decode", "Mixed", "estimate", "sweep", "size", "plan", "Request", "Calibration"} <= set(simulator.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", simulator.__version__)


# ---- words


def public(name: str) -> list[tuple[str, Any]]:
    """Functions and classes defined in a module, and the methods and properties of its classes."""
    found = []
    for key, value in vars(module(name)).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name or getattr(value, "__name__", key) != key:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            found.append((key, value))
        if inspect.isclass(value):
            for member, item in vars(value).items():
                if not member.startswith("_") and (inspect.isfunction(item) or isinstance(item, (property, staticmethod, classmethod))):
                    found.append((f"{key}.{member}", item))
    return found


@pytest.mark.parametrize("name", [*MODULES, "simulator"])
def test_everything_public_is_explained(name: str) -> None:
    assert (module(name).__doc__ or "").strip(), name
    for called, thing in public(name):
        told = inspect.getdoc(thing) or ""
        # a dataclass or NamedTuple without a docstring gets its own signature for one
        assert told.strip(), f"{name}.{called}"
        assert not told.startswith(f"{called}("), f"{name}.{called}"


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("simulator.kernels.")])
def test_a_kernel_says_where_its_formula_comes_from(name: str) -> None:
    told = [inspect.getdoc(thing) or "" for key, thing in public(name) if inspect.isfunction(thing) and "." not in key]
    assert any("Source:" in text for text in told)


@pytest.mark.parametrize("file", sorted((ROOT / "simulator").rglob("*.py")), ids=lambda f: f.stem)
def test_the_code_has_no_leftovers(file: Path) -> None:
    text = file.read_text("utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    calls = [node.func.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not {"print", "breakpoint", "eval", "exec"} & set(calls)


# ---- registries


@pytest.mark.parametrize("kind", LAYERS, ids=lambda k: k.__name__)
def test_a_kind_of_layer_offers_what_a_layer_offers(kind: type) -> None:
    layer = next(layer for layer in (*EACH.values(), *(layer for name in EVERY for _, layer in model(name).counted)) if isinstance(layer, kind))
    for method in ("whole", "modules", "work"):
        assert callable(getattr(layer, method))
    held = layer.whole(NOTHING)
    modules = layer.modules(held)
    assert all(isinstance(m, Module) and m.parameters >= 0 and m.weight.name in WEIGHT_FORMATS for m in modules)
    assert len({m.name for m in modules}) == len(modules)
    assert hash(layer) == hash(layer)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.__name__)
def test_a_scheme_offers_what_a_scheme_offers(scheme: type) -> None:
    assert issubclass(scheme, Scheme)
    assert scheme.field
    assert [s.field for s in SCHEMES].count(scheme.field) == 1


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_offers_what_an_engine_offers(name: str) -> None:
    engine = ENGINES[name]()
    assert engine.name == name
    assert engine.title
    methods = ("allocation", *(("host", "capacity", "footprint", "longest", "refusals", "command", "warnings") if name in SCHEDULED else ()))
    for method in methods:
        assert callable(getattr(engine, method)), method


def test_formats_are_filed_under_their_own_names() -> None:
    for table in (WEIGHT_FORMATS, CACHE_FORMATS):
        assert all(name == one.name for name, one in table.items())


# ---- data


def provenance() -> dict[str, dict[str, str]]:
    with data_path("models", "PROVENANCE.tsv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}


@pytest.mark.parametrize("name", EVERY)
def test_a_model_of_the_catalog_says_where_it_was_copied_from(name: str) -> None:
    file = data_path("models", name.replace("/", "--") + ".json")
    row = provenance()[file.name]
    assert row["source"]
    assert row["verbatim"].split(" ")[0] in ("yes", "no")
    if row["sha256_16"]:
        assert hashlib.sha256(file.read_bytes()).hexdigest()[:16] == row["sha256_16"]
    if row["verbatim"] == "no":
        assert row["sha256_16"] or "_provenance" in json.loads(file.read_text("utf-8"))


def test_every_line_of_provenance_is_a_file() -> None:
    assert {f"{name.replace('/', '--')}.json" for name in EVERY} == set(provenance())


def numbers(table: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(table, dict):
        return [(path, table)] if "value" in table else [found for key, child in table.items() for found in numbers(child, f"{path}.{key}")]
    return [found for i, child in enumerate(table) for found in numbers(child, f"{path}[{i}]")] if isinstance(table, list) else []


@pytest.mark.parametrize("engine", ENGINES)
def test_every_fact_of_an_engine_has_a_source(engine: str) -> None:
    data = tomllib.loads(data_path("engines", f"{engine}.toml").read_text("utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["checked"])
    assert data["docs"].startswith("https://")
    found = numbers(data)
    assert found
    for path, fact in found:
        assert fact["source"], path
        assert fact.get("basis", "assumed") in ("assumed", "measured", "derived"), path


def test_every_prior_has_a_source_a_basis_and_an_error() -> None:
    data = tomllib.loads(data_path("calibration", "priors.toml").read_text("utf-8"))
    for row in data["family"]:
        assert row["source"], row
        assert row["basis"] in ("measured", "calibrated", "analytic", "assumed"), row
        assert 0 < row["sigma"] < 1, row
        for share in ("tensor", "memory"):
            assert 0 < row.get(share, 1.0) <= 1, row
        assert row.get("special", 1.0) > 0, row  # above 1 where exponentials hide behind products


@pytest.mark.parametrize("file", sorted(data_path("published").glob("*.csv")), ids=lambda f: f.stem)
def test_a_published_table_is_whole(file: Path) -> None:
    with file.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows
    assert all(None not in row and None not in row.values() for row in rows)


def test_data_lies_in_the_wheel_too() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"]["data"] == "simulator/_data"
    assert "simulator" in build["packages"]
