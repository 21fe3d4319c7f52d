"""The app run without a browser; tests that run it are skipped where streamlit is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from streamlit.testing.v1 import AppTest

MAIN = Path(__file__).resolve().parents[2] / "app" / "main.py"
_REASON = "the app needs streamlit: pip install 'longctx[app]'"


def opened(page: str | None = None, **parameters: str) -> AppTest:
    """The app at a link."""
    testing = pytest.importorskip("streamlit.testing.v1", reason=_REASON)
    alone = f"from app import {page}\n{page}.page()"  # AppTest cannot follow the navigation to a page that is a function
    at = testing.AppTest.from_string(alone, default_timeout=120) if page else testing.AppTest.from_file(str(MAIN), default_timeout=120)
    for name, value in parameters.items():
        at.query_params[name] = value
    at.run()
    assert not at.exception, [e.message for e in at.exception]
    return at


def charts(at: AppTest) -> list[dict[str, Any]]:
    """The specification of every chart on the page; its rows travel beside it, as Arrow."""
    ipc = pytest.importorskip("pyarrow.ipc", reason=_REASON)
    found = []
    for element in at.get("vega_lite_chart"):
        spec = json.loads(element.proto.spec)
        if element.proto.HasField("data") and element.proto.data.data:
            with ipc.open_stream(element.proto.data.data) as stream:
                spec["data"] = {"values": stream.read_all().to_pylist()}
        found.append(spec)
    return found


def lines(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows a chart draws."""
    rows = list(spec.get("data", {}).get("values", []))
    for layer in spec.get("layer", []):
        rows += layer.get("data", {}).get("values", [])
    return rows
