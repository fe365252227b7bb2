"""Keeps the index of a run: what its plans derive from, so that scores need no texts.

One JSON line a text; no text and no token is in it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sama_jax.errors import DataError
from sama_jax.storage.files import read_json_lines, write_atomic

INDEX = "texts.jsonl"
_FIELDS = ("id", "label", "n_tokens", "truncated", "status")


def write_index(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    views: Mapping[str, Sequence[dict[str, Any] | None]],
) -> None:
    """Writes one line a text: id, label, status, and what each of its views derives from."""
    lines = []
    for i, row in enumerate(rows):
        known = {name: row[name] for name in _FIELDS if name in row}
        known["views"] = {view: found[i] for view, found in views.items()}
        lines.append(json.dumps(known, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


def read_index(
    path: Path,
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any] | None]]]:
    """Reads the rows and the views of `write_index`. Raises `DataError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the output folder of a finished audit")
    rows, _ = read_json_lines(path)
    views: dict[str, list[dict[str, Any] | None]] = {}
    try:
        for row in rows:
            for view, found in row.pop("views").items():
                views.setdefault(view, []).append(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the index of an audit ({error})") from None
    return rows, views
