"""The verb `longctx app`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click

#: Colours of lines and bars that hold on a light and on a dark page.
_COLOURS = ("#4c8bf5", "#f2994a", "#27ae60", "#bb6bd9", "#eb5757", "#56ccf2", "#b08968", "#828282")
_QUIET = {
    "server.headless": "true", "server.fileWatcherType": "none", "browser.gatherUsageStats": "false", "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
}  # fmt: skip
#: Only sections: a `theme.base` would keep the page from following the browser.
_THEME = {
    f"theme.{mode}.{key}": value
    for mode in ("light", "dark")
    for key, value in {"primaryColor": _COLOURS[0], "chartCategoricalColors": json.dumps(_COLOURS)}.items()
}


def command(port: int, address: str) -> list[str]:
    """The command that serves the app: no browser opened, no usage statistics, nothing fetched from elsewhere."""
    options = {"server.port": str(port), "server.address": address, **_QUIET, **_THEME}
    return [sys.executable, "-m", "streamlit", "run", str(Path(__file__).with_name("main.py")), *(f"--{name}={value}" for name, value in options.items())]


def environment(*, hub: bool) -> dict[str, str]:
    """The server's environment: models that do not ship are looked for on the hub only where that is asked for."""
    return dict(os.environ) if hub else {**os.environ, "HF_HUB_OFFLINE": "1"}


@click.command("app")
@click.option("--port", type=click.IntRange(1, 65_535), default=8501, show_default=True, help="Port to listen on.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 shows the app to your network.")
@click.option("--hub", is_flag=True, help="Fetch the config.json of a model that does not ship from the Hugging Face hub.")
def app(port: int, address: str, *, hub: bool) -> int:
    """Answer questions on a page in the browser, on this machine only."""
    if find_spec("streamlit") is None:
        message = "longctx app needs streamlit: `pip install 'longctx[app]'`"
        raise ValueError(message)
    click.echo(f"longctx app: http://{'localhost' if address in ('127.0.0.1', '0.0.0.0') else address}:{port}  (stop with Ctrl-C)", err=True)  # noqa: S104
    try:
        return subprocess.run(command(port, address), env=environment(hub=hub), check=False).returncode  # noqa: S603 (our own interpreter and file)
    except KeyboardInterrupt:
        return 0
