"""Keeps the index of a run: what its plans derive from, so that scores need no texts.

One JSON line a text, which names the run that made it; no text and no token is in it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sama_jax.config import settings_hash
from sama_jax.errors import DataError
from sama_jax.storage.files import read_whole_json_lines, sealed, unsealed, write_atomic
from sama_jax.storage.shapes import misfit

INDEX = "texts.jsonl"
_FIELDS = (
    "id",
    "label",
    "group",
    "n_tokens",
    "truncated",
    "prompt_cut",
    "document",
    "top",
    "status",
    "baseline",
    "control",
    "again",
)


def write_index(
    path: Path,
    run: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    views: Mapping[str, Sequence[dict[str, Any] | None]],
) -> None:
    """Writes one line a text: what its row says, and what each of its views derives from.

    `run` is the identity of the run.
    """
    lines, named = [], {"run": settings_hash(run)}
    for i, row in enumerate(rows):
        known = {name: row[name] for name in _FIELDS if name in row}
        known["views"] = {view: found[i] for view, found in views.items()}
        lines.append(json.dumps(sealed(named | known), ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


_VIEW = {
    "key": str,
    "store_key": str,
    "tokens": int,
    "not_masked": [int],
    "zlib_bytes": int,
    "characters": int,
}
_LINE = {
    "id": str,
    "label?": (int, None),
    "group?": int,
    "n_tokens?": int,
    "truncated?": bool,
    "prompt_cut?": int,
    "document?": str,
    "top?": int,
    "status?": str,
    "baseline?": float,
    "control?": bool,
    "again?": float,
    "views": {str: (_VIEW, None)},
}


def read_index(
    path: Path, run: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any] | None]]]:
    """Reads the rows and the views of `write_index`.

    Args:
      path: the index.
      run: identity of the run, which also says how many texts there are.

    Raises:
      DataError: there is none, it is not whole, or another run has made it.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the output folder of a finished audit")
    again = "copy it again, or run the audit's own command again, which makes it anew"
    rows, own = [], settings_hash(run)
    for number, line in enumerate(read_whole_json_lines(path, "the index of an audit"), 1):
        row = unsealed(line)
        if row is None:
            raise DataError(f"{path}: line {number} is not as it was written; {again}")
        if row.pop("run", None) != own:
            raise DataError(f"{path}: line {number} was written by another run; {again}")
        rows.append(row)
    if len(rows) != run.get("texts"):
        raise DataError(f"{path}: expected {run.get('texts')} lines, found {len(rows)}; {again}")
    names = rows[0].get("views") if rows else {}
    for number, row in enumerate(rows, 1):
        wrong = misfit(row, _LINE)
        if wrong is None and row["views"].keys() != names.keys():
            wrong = "views"
        if wrong is not None:
            raise DataError(f"{path}: line {number} has no usable field '{wrong}'; {again}")
    if len({row["id"] for row in rows}) < len(rows):
        raise DataError(f"{path}: an id stands in it twice; {again}")
    views = {view: [row["views"][view] for row in rows] for view in names}
    for row in rows:
        del row["views"]
    return rows, views
