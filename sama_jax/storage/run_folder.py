"""Keeps the output folder of a run: manifest, appended parts, log, joined results.

A folder belongs to one run. The same command on it continues; another run is refused with the
difference. Everything can be cut off at any byte and read again. Each line of scores names the run
that made it, so that no other run ever reads it.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Required, TypedDict, cast

import numpy as np
from jaxtyping import Int

from sama_jax.config import settings_hash
from sama_jax.errors import DataError, UsageError
from sama_jax.storage import checksums
from sama_jax.storage.documents import WINDOWS, document_rows
from sama_jax.storage.files import (
    SEAL,
    AppendOnly,
    read_json_lines,
    read_whole_json_lines,
    sealed,
    unsealed,
    write_atomic,
    write_json,
    writing,
)
from sama_jax.storage.loss_store import LossStore
from sama_jax.storage.shapes import Shape, fits, misfit
from sama_jax.untrusted import printable, read_json, shown

MANIFEST = "manifest.json"
SCORES = "scores.jsonl"
METRICS = "metrics.json"
LOG = "log.jsonl"
CONFIG = "audit.yaml"
DENSITIES = "densities.json"
"""Loss differences by density of the masks: `core.spread`."""

_NUMBERS = {str: (float, None)}
_SCORES: Shape = {
    "run": str,
    "id": str,
    "scores": _NUMBERS,
    "passes": {str: float},
    "code?": {str: str},
    "undefined?": {str: str},
    "votes?": {str: object},
}
"""A line of parts/scores-*.jsonl."""
_GATE: Shape = {
    **dict.fromkeys(("name", "status", "sentence", "remedy"), str),
    **dict.fromkeys(("statistic", "bound"), (float, None)),
}
_PROTOCOL: Shape = {
    "primary": str,
    "family": [str],
    "alpha": float,
    "margin": float,
    "stored?": bool,
}
_MANIFEST: Shape = {
    "run?": {str: object},
    "finished?": bool,
    "settings?": {str: object},
    "store_keys?": {str: str},
    "store?": (str, None),
    "attacks?": [str],
    "corpus_attacks?": [str],
    "prefix_classes?": [str],
    **{"not_computed?": ({str: str}, None), "codes?": {str: str}},
    "notes?": [str],
    "gates?": [_GATE],
    "files?": {str: str},
    "protocol?": (_PROTOCOL, None),
    "versions?": {str: str},
    "cost?": ({"seconds?": {str: float}, "tokens?": {str: float}, "passes_run?": int}, None),
    **{f"{name}?": str for name in ("target", "reference_tokenizer")},
    **{f"{name}?": (str, [str]) for name in ("reference", "adapter")},
    **{f"{name}?": str for name in ("device", "dtype", "attention", "matmul_precision")},
    **{f"{name}?": str for name in ("preset", "preset_hash", "session", "source", "model")},
    "command?": (str, None),
    "seed?": int,
}


class Row(TypedDict, total=False):
    """A line of scores.jsonl: one text."""

    id: Required[str]
    label: int | None
    """1: member, 0: non-member; absent: unknown."""
    group: int
    """Number of its group, in order of first appearance; absent where the texts give none."""
    n_tokens: int
    truncated: bool
    """Whether the text was cut at the maximum length."""
    document: str
    """Of a line of windows.jsonl: id of its document."""
    top: int
    """How many windows the scores `NAME@topK` of its document are the mean of."""
    windows: int
    """Windows of a document; absent: it was read as one text."""
    prompt_cut: int
    """Tokens cut off the beginning of a conversation; absent: none."""
    status: str
    """`ok`, `empty` (no token can be masked) or `prefix` (stands before others; not scored)."""
    baseline: float
    """Score of the best baseline that sees no model, higher for members; absent where none is."""
    again: float
    """Score of the primary attack under other masks, where that was made (--second-seed)."""
    control: bool
    """Whether it is a known member of the positive control, which has no label."""
    text: str
    scores: dict[str, float | None]
    """Attack -> score, None where it is not defined."""
    passes: dict[str, float]
    """Attack -> forward passes of each model."""
    undefined: dict[str, str]
    """Attack -> why it has no score."""
    votes: dict[str, Any]
    """With --include-votes: SAMA's votes and weight at each step, and its rate of ties."""


_ROW: Shape = {
    "id": str,
    "label?": (int, None),
    "group?": int,
    "n_tokens?": int,
    "truncated?": bool,
    "document?": str,
    "top?": int,
    "windows?": int,
    "prompt_cut?": int,
    "status?": str,
    "baseline?": float,
    "again?": float,
    "control?": bool,
    "text?": str,
    "scores?": (_NUMBERS, None),
    "passes?": (_NUMBERS, None),
    "undefined?": {str: str},
    "votes?": {str: object},
}


class RunFolder:
    """An open output folder. Create with the identity of the run (`run`), a flat JSON dict.

    Of several processes each has a `rank`, its own files for what it appends, and, but for the
    first (`writes`), leaves the manifest alone.
    """

    def __init__(
        self,
        path: Path,
        run: dict[str, Any],
        about: dict[str, Any],
        store: Path | None,
        *,
        rank: int = 0,
        writes: bool = True,
        computes: bool = True,
        codes: Mapping[str, str] = MappingProxyType({}),
    ):
        """Opens a folder, or takes a new one.

        Args:
          path: the folder.
          run: identity of the run.
          about: what else the manifest says.
          store: the folder of the losses; None: `losses` in this one.
          rank: of this process.
          writes: whether this process writes the manifest.
          computes: whether losses are appended; False leaves the store as it is.
          codes: attack -> what names its code; a score of other code is made anew.

        Raises:
          UsageError: the folder belongs to another run, or another process is writing to it.
        """
        self.path, self._started, self.writes = path, time.time(), writes
        self._run, self._codes = settings_hash(run), codes
        manifest_of(path, run)  # before anything is made in the folder of another run
        with contextlib.ExitStack() as opened:
            log = _append(path / (f"log-{rank:05d}.jsonl" if rank else LOG))
            self._log = opened.enter_context(contextlib.closing(log))
            # Once more behind the lock: another run may have taken the folder meanwhile.
            before = manifest_of(path, run)
            self.manifest = before | about | {"run": run, "finished": False}
            if not before:  # a folder without a manifest cannot be continued
                self.write_manifest()
            scores = _append(path / "parts" / f"scores-{rank:05d}.jsonl")
            self._scores = opened.enter_context(contextlib.closing(scores))
            self._read_parts()
            shard = f"losses-{rank:05d}.bin"
            losses = LossStore(store or path / "losses", shard, writes=computes)
            self.store = opened.enter_context(contextlib.closing(losses))
            self.write_manifest()
            self.log("start", command=about.get("command"), records=len(self.store))
            self._files = opened.pop_all()

    def refresh(self) -> None:
        """Reads what other processes have appended."""
        self._read_parts()
        self.store.refresh()

    def _read_parts(self) -> None:
        self._parts: dict[str, dict[str, Any]] = {}
        for part in sorted((self.path / "parts").glob("scores-*.jsonl")):
            for line in read_json_lines(part)[0]:
                # Any other line is passed over: its scores are made anew from the loss store.
                whole = unsealed(line)
                if whole and fits(whole, _SCORES) and whole["run"] == self._run:
                    self._merge(self._without_other_code(whole))

    def _without_other_code(self, line: dict[str, Any]) -> dict[str, Any]:
        """Leaves out the scores that other code than today's has made, and votes with SAMA's."""
        made = line.get("code", {})
        other = {a for a in line["scores"] if a in self._codes and made.get(a) != self._codes[a]}
        if "sama" in other:
            line = {name: value for name, value in line.items() if name != "votes"}
        fields = ("scores", "passes", "undefined")
        kept = {
            f: {a: v for a, v in line[f].items() if a not in other} for f in fields if f in line
        }
        return line | kept

    def log(self, event: str, **values: Any) -> None:
        """Appends one line to log.jsonl."""
        seconds = round(time.time() - self._started, 3)
        self._log.append_json({"event": event, "seconds": seconds} | values)

    def keep_note(self, *notes: str) -> None:
        """Keeps what was noticed for whoever finishes the run, this process or another one."""
        for note in notes:
            if note not in noted(self.path):
                self.log("note", note=note)

    def has_scores(
        self, text_id: str, attacks: list[str], values: list[float | None] | None = None
    ) -> bool:
        """Tells whether all `attacks` have been scored for a text, with these `values` if given.

        Null counts as scored.
        """
        scores = self._parts.get(text_id, {}).get("scores", {})
        found = [scores[a] for a in attacks if a in scores]
        return len(found) == len(attacks) if values is None else found == values

    def has_votes(self, text_id: str) -> bool:
        """Tells whether SAMA's votes of a text are written."""
        return "votes" in self._parts.get(text_id, {})

    def append_scores(self, lines: list[dict[str, Any]]) -> None:
        """Appends `{"id", "scores", "passes", ...}` lines, in one write."""
        named = [
            {"code": {a: self._codes[a] for a in line["scores"] if a in self._codes}} | line
            for line in lines
        ]
        self._scores.append_json(*(sealed({"run": self._run} | line) for line in named))
        for line in named:
            self._merge(line)

    def _merge(self, line: dict[str, Any]) -> None:
        entry = self._parts.setdefault(line["id"], {"scores": {}, "passes": {}, "code": {}})
        entry["scores"] |= line["scores"]
        entry["code"] |= {name: line.get("code", {}).get(name, "") for name in line["scores"]}
        entry["passes"] |= line["passes"]
        undefined = entry.setdefault("undefined", {})
        for name in line["scores"]:
            undefined.pop(name, None)
        undefined |= line.get("undefined", {})
        if "votes" in line:
            entry["votes"] = line["votes"]

    def unscored(self, attacks: Sequence[str], texts: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns those of the attacks that have not been scored for every text, prefixes aside."""
        ids = [text["id"] for text in texts if text.get("status") != "prefix"]
        return [a for a in attacks if not all(self.has_scores(text_id, [a]) for text_id in ids)]

    def join(self, texts: list[dict[str, Any]], attacks: list[str]) -> list[Row]:
        """Writes scores.jsonl: one line a text in the given order, from all appended parts.

        Besides the `attacks` it holds those of earlier goes that were scored for every text, by
        one code: what a signal cut off would be a result of a part of them. The manifest names it.
        """
        codes: dict[str, set[str]] = {}
        for text_id in [text["id"] for text in texts if text.get("status") != "prefix"]:
            for name, code in self._parts.get(text_id, {}).get("code", {}).items():
                codes.setdefault(name, set()).add(code)
        whole = [n for n in codes if len(codes[n]) == 1 and not self.unscored([n], texts)]
        self.manifest["codes"] = {n: min(codes[n]) for n in codes if n in {*attacks, *whole}}
        rows: list[dict[str, Any]] = []
        for text in texts:
            part = self._parts.get(text["id"], {"scores": {}, "passes": {}})
            known = list(dict.fromkeys([*attacks, *whole]))
            if text.get("status") == "prefix":  # it was scored before it became one
                part = {"scores": {}, "passes": {}}
            row = dict(text)
            row["scores"] = {a: part["scores"].get(a) for a in known}
            row["passes"] = {a: part["passes"].get(a, 0) for a in known}
            undefined = {a: why for a, why in part.get("undefined", {}).items() if a in known}
            if undefined and text.get("status", "ok") == "ok":
                row["undefined"] = undefined
            if "votes" in part:
                row["votes"] = part["votes"]
            rows.append(row)
        if rows and "document" in rows[0]:
            write_atomic(self.path / WINDOWS, json_lines(rows))
            rows = document_rows(rows)
        write_atomic(self.path / SCORES, json_lines(rows))
        return cast(list[Row], rows)

    def write_manifest(self, **values: Any) -> None:
        """Adds to the manifest and writes it."""
        self.manifest |= values
        if self.writes:
            write_json(self.path / MANIFEST, sealed(self.manifest))

    def record_files(self) -> None:
        """Adds to the manifest what the folder holds: the last act of a finished run."""
        self.write_manifest(files=checksums.record(self.path))

    def close(self) -> None:
        """Closes the log, the parts and the loss store."""
        self._files.close()


def manifest_of(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest that a run finds in its folder, an empty one if the folder is free.

    Raises:
      UsageError: the folder belongs to another run, or is none of ours.
    """
    manifest = read_manifest(path)
    if manifest is None:
        with writing(path):
            found = os.listdir(path) if os.path.isdir(path) else []
        # A run that died at once, or holds its lock just now, has left an empty log.
        logs = [name for name in found if re.fullmatch(r"log(-[0-9]{5})?\.jsonl", name)]
        ours = [name for name in logs if not os.path.getsize(path / name)]
        if any(not name.endswith(".part") and name not in ours for name in found):
            raise UsageError(
                f"{path}: is not empty and holds no {MANIFEST}; give --out a new folder"
            )
        return {}
    before = manifest.get("run", {})
    if told := differences(before, run):
        raise UsageError(
            f"{path}: belongs to another run; give --out a new folder. Differences: {told}"
        )
    return manifest


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names the fields that differ with both values, the first five; "" if none does."""
    changed = [k for k in {**now, **before} if now.get(k) != before.get(k)]
    told = [
        f"{printable(k)} was {shown(before.get(k))}, is {shown(now.get(k))}" for k in changed[:5]
    ]
    return "; ".join(told + ([f"and {len(changed) - 5} more"] if len(changed) > 5 else []))


def noted(path: Path) -> list[str]:
    """Returns what the processes of a run have noticed, in all parts of it, each once."""
    found: dict[str, None] = {}
    for log in sorted(path.glob("log*.jsonl")):
        for line in read_json_lines(log)[0]:
            if fits(line, {"event": str, "note": str}) and line["event"] == "note":
                found[line["note"]] = None
    return list(found)


def json_lines(rows: list[dict[str, Any]]) -> str:
    """Returns rows as JSON Lines; NaN and infinity are refused."""
    return "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in rows)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Reads a folder's manifest; None if there is none. Raises `UsageError` if unreadable."""
    if not os.path.isfile(path / MANIFEST):  # False, too, where the path cannot be
        return None
    try:
        manifest = read_json(path / MANIFEST)
        wrong = misfit(manifest, _MANIFEST)
        if wrong is not None:
            raise ValueError(f"has no usable field '{wrong}'")
    except (ValueError, OSError) as error:
        raise UsageError(
            f"{path / MANIFEST}: not readable ({error}); give --out a new folder"
        ) from None
    return {name: value for name, value in manifest.items() if name != SEAL}


def read_rows(path: Path, name: str = SCORES) -> list[Row]:
    """Reads scores.jsonl, or windows.jsonl. Raises `DataError` unless each line is whole."""
    rows = read_whole_json_lines(path / name, "a line of scores")
    for number, row in enumerate(rows, 1):
        wrong = misfit(row, _ROW)
        if wrong is not None:
            raise DataError(
                f"{path / name}: line {number} has no usable field '{wrong}'; run the audit's "
                "own command again, which makes it anew"
            )
    return cast(list[Row], rows)


def groups_of(rows: Sequence[Row]) -> Int[np.ndarray, " n"] | None:
    """Returns the group of each text, one of its own where it has none; None if no text has one."""
    groups = [row.get("group") for row in rows]
    if set(groups) <= {None}:
        return None
    return np.array([-1 - i if g is None else g for i, g in enumerate(groups)], np.int64)


def read_unchanged_rows(path: Path, manifest: Mapping[str, Any]) -> list[Row]:
    """Reads scores.jsonl of a finished run as the run has written it.

    Raises:
      UsageError: it was changed afterwards.
      DataError: a line is not whole.
    """
    if checksums.is_changed(path, manifest, SCORES):
        raise UsageError(
            f"{path / SCORES}: was changed after the run had finished; repeat the audit (or "
            "`sama-jax score`), which writes it anew from what is stored"
        )
    return read_rows(path)


def record_also(path: Path, names: Sequence[str]) -> None:
    """Records files that were written into the folder of a finished run.

    The others stay as they were recorded, changed or not.
    """
    manifest = read_manifest(path) or {}
    if recorded := manifest.get("files"):
        recorded |= {name: checksums.sha256(path / name) for name in names}
        write_json(path / MANIFEST, sealed(manifest | {"files": recorded}))


def _append(path: Path) -> AppendOnly:
    _, keep = read_json_lines(path)
    return AppendOnly(path, keep)
