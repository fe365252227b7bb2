"""Keeps a calibration: scores of held-out non-members, and all that they depend on.

Names the decisions that are made by it, too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from sama_jax.errors import DataError, UsageError
from sama_jax.storage.files import (
    MADE_BY,
    read_whole_json_lines,
    readable,
    require_free,
    sha256_of,
    write_json,
)
from sama_jax.storage.run_folder import Row
from sama_jax.storage.shapes import misfit
from sama_jax.untrusted import read_json

MAKER = "sama-jax calibrate"
DECISIONS = "decisions.jsonl"
SUMMARY = "decisions.json"
"""What `sama-jax apply` writes into a run's folder."""


class Calibration(TypedDict):
    """The content of a calibration file."""

    attack: str
    identity: dict[str, Any]
    """What must be equal for scores to be compared: models, tokenizer, arithmetic, settings."""
    scores: list[float]
    """Sorted."""
    lengths: list[int]
    """Tokens of the texts, sorted: texts of other lengths are not comparable."""
    keys: list[str]
    """Hashes of the texts' tokens, sorted: none of them may be judged by this file."""
    groups: int | None
    """Documents that the texts come from, one text each; None: the texts have no groups."""
    fpr: float
    guarantee: float | None
    rank: int
    """Texts with p <= rank / (texts + 1) are flagged."""
    date: str
    sha256: NotRequired[str]
    """Of all else, in a file."""


_SHAPE = {
    "attack": str,
    "identity": {str: object},
    "scores": [float],
    "lengths": [int],
    "keys": [str],
    "groups": (int, None),
    "fpr": float,
    "guarantee": (float, None),
    "rank": int,
    "date": str,
    MADE_BY: str,
    "sha256": str,
}


def write_calibration(path: Path, content: Calibration) -> None:
    """Writes a calibration with its SHA-256; replaces nothing but another one."""
    require_free(path, MAKER)
    marked = dict(content) | {MADE_BY: MAKER}
    write_json(path, marked | {"sha256": _digest(marked)})


def _digest(content: dict[str, Any]) -> str:
    return sha256_of({name: value for name, value in content.items() if name != "sha256"})


def read_calibration(path: Path) -> Calibration:
    """Reads a calibration.

    Raises:
      DataError: it cannot be read.
      UsageError: it is none, or not as it was written.
    """
    with readable(path):
        found = read_json(path)
    wrong = misfit(found, _SHAPE)
    if wrong is not None:
        raise UsageError(
            f"{path}: is no calibration (no usable field '{wrong}'); make one with "
            "`sama-jax calibrate RUN --out FILE`"
        )
    if found["sha256"] != _digest(found):
        raise UsageError(
            f"{path}: was changed after it was written; make it again with `sama-jax calibrate`"
        )
    return cast(Calibration, found)


def withdraw_stale(folder: Path, rows: Sequence[Row], *, void: bool) -> None:
    """Removes decisions of a run that has become void, or that were made by other scores.

    A later part of a run may take texts as prefixes, or score them by other code.
    """
    if not (folder / DECISIONS).exists() and not (folder / SUMMARY).exists():
        return
    try:
        attack = read_json(folder / SUMMARY)["attack"]
        lines = read_whole_json_lines(folder / DECISIONS, "a decision")
        judged = {line["id"]: line["score"] for line in lines}
        now = {row["id"]: (row.get("scores") or {}).get(attack) for row in rows}
        same = all(text_id in now and now[text_id] == judged[text_id] for text_id in judged)
    except (OSError, ValueError, LookupError, TypeError, DataError):
        same = False
    if void or not same:
        for name in (DECISIONS, SUMMARY):
            (folder / name).unlink(missing_ok=True)
