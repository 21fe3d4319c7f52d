"""Tables and documents as files: written beside their place and moved there whole, so that none is ever half-written."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row with nested tables as dotted columns; lists of plain values are joined, others left out.

    >>> flat({"a": {"b": 1}, "c": [1, 2], "d": [{}]})
    {'a.b': 1, 'c': '1; 2'}
    """
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif not isinstance(value, (list, tuple)):
            found[prefix + key] = value
        elif all(not isinstance(item, (Mapping, list, tuple)) for item in value):
            found[prefix + key] = "; ".join(map(str, value))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV; a column that a row lacks is empty."""
    lines = [flat(row) for row in rows]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_csv(file: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a CSV file."""
    write_all({Path(file): table(rows)})


def write_size(folder: str | Path, result: str, document: Mapping[str, Any]) -> None:
    """An answer of `size` as files: result.json, layouts.csv, and launch.sh where the chosen layout starts."""
    place = Path(folder)
    texts = {place / "result.json": result + "\n", place / "layouts.csv": table(document["alternatives"])}
    command, script = document["launch"]["vllm"], place / "launch.sh"
    if command:
        notes = "".join(f"# {note}\n" for note in document["launch"]["notes"])
        texts[script] = f"#!/bin/sh\n# {document['verdict']}\n{notes}exec {command}\n"
    write_all(texts, executable=(script,))
    if not command:
        script.unlink(missing_ok=True)


def write_all(texts: Mapping[Path, str], executable: Sequence[Path] = ()) -> None:
    """Every file or none: all are written under temporary names first.

    Errors: ValueError where a folder cannot be made or written.
    """
    made: list[tuple[Path, Path]] = []
    try:
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                message = f"{file}: is a folder; name a file"
                raise ValueError(message)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False) as held:
                made.append((Path(held.name), file))
                held.write(text)
            Path(held.name).chmod(0o755 if file in executable else 0o644)
        for temporary, file in made:
            os.replace(temporary, file)  # noqa: PTH105 (Path.replace, by its plain name)
    except OSError as error:
        message = f"{error.filename or 'output'}: cannot be written ({error.strerror}); choose another place"
        raise ValueError(message) from error
    finally:
        for temporary, _ in made:
            with contextlib.suppress(OSError):
                temporary.unlink()


__all__ = ["flat", "table", "write_all", "write_csv", "write_size"]
