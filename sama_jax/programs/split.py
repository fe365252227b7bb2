"""Divides texts at random into members and non-members, before training, and records how."""

import itertools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sama_jax import __version__
from sama_jax.errors import DataError, UsageError
from sama_jax.storage.files import MADE_BY, readable, sha256_of, write_atomic, write_json
from sama_jax.storage.run_folder import json_lines
from sama_jax.storage.shapes import misfit
from sama_jax.texts.read import Text, read_texts, text_digest
from sama_jax.untrusted import read_json
from sama_jax.validity.overlap import relate

SPLIT = "split.json"
_MARK = "sama-jax split"
_SEAL = "sha256"
_SHAPE = {MADE_BY: str, _SEAL: str, "texts": [{"sha256": str, "label": int, "unit": int}]}


def run_split(
    data: Path,
    out: Path,
    *,
    members: int | None = None,
    seed: int = 0,
    text_field: str | None = None,
    label_field: str | None = None,
) -> str:
    """Writes `members.jsonl`, `nonmembers.jsonl` and `split.json` into a new folder.

    Texts of one group, and texts that share most of their words, go to one side together.

    Args:
      data: texts without labels.
      out: a new folder.
      members: texts to train on, about: whole groups are taken. None: half of them.
      seed: of the draw.
      text_field: of `data`, holds the texts; None: `text`.
      label_field: of `data`, holds labels, which must all be null; None: `label`.

    Returns:
      what was made, in one sentence.

    Raises:
      DataError: the texts cannot be read, have labels, or all belong together.
      UsageError: the folder is not empty, or there are not more texts than members.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty; give --out a new folder")
    texts = read_texts(data, text_field, label_field).texts
    labelled = sum(text.label is not None for text in texts)
    if labelled:
        raise DataError(
            f"{data}: {labelled} texts have a label already; a split is drawn before training, "
            "from texts without one"
        )
    wanted = len(texts) // 2 if members is None else members
    if not 0 < wanted < len(texts):
        raise UsageError(
            f"--members must leave texts on both sides: got {wanted} of {len(texts)} texts"
        )
    units = relate(texts).units
    is_member = draw_members(units, wanted, seed)
    if is_member.all() or not is_member.any():
        raise DataError(
            f"{data}: nearly all texts belong together (one group, or near duplicates), so they "
            "cannot be divided; give texts of more documents"
        )
    for name, side in (("members", is_member), ("nonmembers", ~is_member)):
        rows = [_record(text) for text, here in zip(texts, side) if here]
        write_atomic(out / f"{name}.jsonl", json_lines(rows))
    write_json(out / SPLIT, _manifest(texts, units, is_member, seed))
    count, groups = int(is_member.sum()), len(set(units.tolist()))
    return (
        f"{count} members and {len(texts) - count} non-members, from {groups} documents that stay "
        f"whole; train on {out / 'members.jsonl'} and keep {out / SPLIT} for the audit"
    )


def draw_members(units: Int[np.ndarray, " n"], wanted: int, seed: int) -> Bool[np.ndarray, " n"]:
    """Draws whole units, in an order that the seed alone decides, until `wanted` texts are near."""
    sizes = np.bincount(units)
    order = np.random.default_rng(seed).permutation(len(sizes))
    totals = np.cumsum(sizes[order])
    return np.isin(units, order[: int(np.abs(totals - wanted).argmin()) + 1])


def _record(text: Text) -> dict[str, Any]:
    group = {} if text.group is None else {"group": text.group}
    return {"id": text.id, "text": text.text, **group}


def _manifest(
    texts: list[Text], units: Int[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"], seed: int
) -> dict[str, Any]:
    """Returns what `split.json` says: no text and no name of a group, hashes and numbers alone."""
    made = {
        MADE_BY: _MARK,
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "members": int(is_member.sum()),
        "nonmembers": int((~is_member).sum()),
        "units": len(set(units.tolist())),
        "texts": [
            {"sha256": text_digest(text.text), "label": int(label), "unit": int(unit)}
            for text, label, unit in zip(texts, is_member, units)
        ],
    }
    return made | {_SEAL: sha256_of(made)}


def require_split(path: Path, texts: list[Text], limit: int | None = None) -> None:
    """Raises `DataError` unless these are the texts of a split file, on the side of their labels.

    All of them, or the first `limit` of members and non-members in turn: texts that were picked
    afterwards in another way are not random.
    """
    with readable(path):
        found = read_json(path)
    wrong = misfit(found, _SHAPE)
    if wrong is not None or found[MADE_BY] != _MARK:
        raise DataError(f"{path}: expected the {SPLIT} of sama-jax split, found another file")
    rest = {name: value for name, value in found.items() if name != _SEAL}
    if found[_SEAL] != sha256_of(rest):
        raise DataError(f"{path}: is not as it was written (its SHA-256 differs); copy it again")
    sides = {(one["sha256"], one["label"]) for one in found["texts"]}
    known = {digest for digest, _ in sides}
    digests = [text_digest(text.text) for text in texts]
    strange = sum(one not in known for one in digests)
    other = sum((one, t.label) not in sides for one, t in zip(digests, texts)) - strange
    if strange or other:
        raise DataError(
            f"{path}: was drawn for other texts: of {len(texts)} texts {strange} are not in it, "
            f"and {other} have another label or none; audit its members.jsonl and nonmembers.jsonl"
        )
    by_side = ([o["sha256"] for o in found["texts"] if o["label"] == label] for label in (1, 0))
    in_turn = [one for pair in itertools.zip_longest(*by_side) for one in pair if one is not None]
    wanted = set(in_turn[:limit])
    lacking = len(wanted - set(digests))
    if lacking:
        which = "" if limit is None else f"the first {min(limit, len(in_turn))} of "
        raise DataError(
            f"{path}: of {which}its {len(known)} texts {lacking} are not audited, and what was "
            "picked afterwards is not random; audit its members.jsonl and nonmembers.jsonl"
        )
