"""Models that do not ship: fetched once from a hub (here one of our own), kept, and refused in one line where they cannot be had."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from simulator.data import data_path
from simulator.hf import hub, load_model

CONFIG = data_path("models", "Qwen--Qwen3-8B.json").read_bytes()
ANSWERS = {
    "new/model": (200, CONFIG), "odd/list": (200, b"[]"), "odd/text": (200, b"<html>"), "odd/bytes": (200, b"\xff\xfe"), "odd/empty": (200, b"{}"),
    "much/toolarge": (200, b" " * (hub.MOST_BYTES + 1)), "gated/model": (403, b""), "secret/model": (401, b""), "broken/server": (500, b""),
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub on this machine; the paths it is asked for."""
    paths: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            code, body = ANSWERS.get(self.path.removesuffix("/resolve/main/config.json").lstrip("/"), (404, b""))
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("LONGCTX_HUB", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield paths
    server.shutdown()
    server.server_close()


def test_an_unknown_id_is_fetched_once_and_kept(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_model("new/model")
    assert asked == ["/new/model/resolve/main/config.json"]
    assert first.name == "new/model"
    assert first.parameters() == load_model("Qwen/Qwen3-8B").parameters()
    assert json.loads(hub.cache_file("new/model").read_bytes()) == json.loads(CONFIG)
    assert load_model("new/model") == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_model("new/model") == first
    assert len(asked) == 1


def test_a_known_model_asks_nobody(asked: list[str]) -> None:
    for name in ("Qwen/Qwen3-8B", "Qwen3-8B", "DeepSeek-V3"):
        load_model(name)
    with pytest.raises(ValueError, match="several match"):
        load_model("Qwen/Qwen3")
    with pytest.raises(ValueError, match="not in the catalog and no such path"):
        load_model("no such name")
    assert asked == []
    code = "import sys; from simulator.hf import load_model; load_model('Qwen3-8B'); sys.exit('urllib.request' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("identifier", "why"),
    [
        ("nobody/nothing", "the hub has no config.json of it"), ("gated/model", "it is gated"), ("secret/model", "gated or does not exist"),
        ("broken/server", "the hub answered 500"), ("much/toolarge", "larger than 4 MiB"), ("odd/list", "not a JSON object"), ("odd/text", "not a JSON object"),
        ("odd/bytes", "not a JSON object"), ("odd/empty", "hidden_size"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_with_the_reason_and_the_remedy(asked: list[str], identifier: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refusal:
        load_model(identifier)
    assert "\n" not in str(refusal.value)
    if identifier != "odd/empty":
        assert "give its config.json or the folder that holds it" in str(refusal.value)
        assert not hub.cache_file(identifier).exists()
    assert len(asked) == 1


def test_a_hub_that_does_not_answer_costs_seconds_not_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("LONGCTX_HUB", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"could not be reached within 0\.3 s"):
            load_model("new/model")
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("address", ["file:///etc", "ftp://example.org", "nonsense"])
def test_only_the_web_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("LONGCTX_HUB", address)
    with pytest.raises(ValueError, match="is not an http or https address"):
        load_model("new/model")


def test_offline_nothing_is_asked_and_the_line_says_so() -> None:
    with pytest.raises(ValueError, match="give its config.json or the folder that holds it .HF_HUB_OFFLINE is set"):
        load_model("new/model")


def test_a_damaged_copy_is_fetched_again(asked: list[str]) -> None:
    file = hub.cache_file("new/model")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"{half")
    load_model("new/model")
    assert len(asked) == 1
    assert json.loads(file.read_bytes()) == json.loads(CONFIG)


def test_a_cache_that_cannot_be_written_is_done_without(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "longctx").write_text("a file where the folder should be")
    load_model("new/model")
    load_model("new/model")
    assert len(asked) == 2
