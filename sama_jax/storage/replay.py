"""Replay files: probe plans and losses as plain npz arrays, to compare with another framework.

Plan: `ids` [n], `tokens` int32 [n, L] (-1 padding), `masks` and `scored` bool [n, T, L], `subsets`
int16 [n, T, N, m] (positions, -1 unused), `weights` float32 [n, T], `preset`. Losses: `ids`,
`target` and `reference` float32 [n, T, L], NaN where not scored; optionally hidden states at a few
places (docs/verify.md). No pickles on either side.
"""

import hashlib
import io
import math
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sama_jax.arrays import ProbePlan
from sama_jax.errors import DataError, UsageError
from sama_jax.storage.files import write_atomic
from sama_jax.untrusted import printable, read_bytes

MAX_BYTES = 2**30
"""Most bytes of all arrays of a file that is read."""

_KINDS = {"ids": "U", "tokens": "iu", "masks": "b", "scored": "b", "subsets": "iu", "weights": "f"}
"""Arrays of a plan file and the kinds of their dtypes."""
_LOSS_KINDS = {"ids": "U", "target": "f", "reference": "f", "state_at": "iu",
               "target_states": "f", "reference_states": "f"}  # fmt: skip
"""Arrays of a losses file; the last three are optional."""


class Replay(NamedTuple):
    """A plan file in memory."""

    ids: list[str]
    tokens: np.ndarray
    plan: ProbePlan
    identity: str


class Losses(NamedTuple):
    """A losses file in memory, in the order of its plan."""

    target: np.ndarray
    """float32 [n, t, l] in nats; anything where the plan does not score."""
    reference: np.ndarray
    state_at: np.ndarray
    """int [r, 3]: (row, pass, position) whose hidden states were saved, if any."""
    states: dict[str, np.ndarray]
    """`target`, `reference` -> float [r, s, d]: embedding, blocks, the last one normalised."""


class Replayed(NamedTuple):
    """A plan file matched with a run's texts."""

    identity: str
    plan: ProbePlan
    row_of: list[int]
    """Row of the plan for each text of the run."""


def save_plan(path: Path, ids: list[str], tokens: np.ndarray, plan: ProbePlan, preset: str) -> None:
    """Writes a plan file; texts in the order of `ids`."""
    if plan.subsets.size and int(np.max(plan.subsets)) > np.iinfo(np.int16).max:
        raise UsageError("replay files hold positions as int16: use --max-length 32767 or less")
    _save(
        path,
        ids=_strings(ids),
        tokens=tokens.astype(np.int32),
        masks=np.asarray(plan.masks, bool),
        scored=np.asarray(plan.scored, bool),
        subsets=np.asarray(plan.subsets, np.int16),
        weights=np.asarray(plan.weights, np.float32),
        preset=np.array(preset),
    )


def save_losses(path: Path, ids: list[str], target: np.ndarray, reference: np.ndarray) -> None:
    """Writes the losses of both models, float32 [n, T, L]."""
    _save(
        path,
        ids=_strings(ids),
        target=target.astype(np.float32),
        reference=reference.astype(np.float32),
    )


def _strings(ids: list[str]) -> np.ndarray:
    return np.array(ids, dtype=f"<U{max((len(i) for i in ids), default=1) or 1}")


def _save(path: Path, **arrays: np.ndarray) -> None:
    size = sum(a.nbytes for a in arrays.values())
    if size > MAX_BYTES:
        print(
            f"{path}: {size / 2**30:.1f} GiB; replay files are for small n, and those of more than "
            "1 GiB are not read back",
            file=sys.stderr,
        )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())


def load_plan(path: Path, max_length: int | None = None) -> Replay:
    """Reads and checks a plan file.

    Raises:
      UsageError: it was made with another `max_length` (None: any will do).
      DataError: it is not a plan file, or holds a plan that cannot be.
    """
    data, arrays = _load(path, _KINDS, "plan", "--save-plan")
    n, length = arrays["tokens"].shape if arrays["tokens"].ndim == 2 else (-1, -1)
    steps = arrays["masks"].shape[1] if arrays["masks"].ndim == 3 else -1
    shapes = {
        "ids": (n,),
        "masks": (n, steps, length),
        "scored": (n, steps, length),
        "weights": (n, steps),
        "subsets": (n, steps, *arrays["subsets"].shape[2:]),
    }
    wrong = [f"{k} {list(arrays[k].shape)}" for k, s in shapes.items() if arrays[k].shape != s]
    if wrong or arrays["subsets"].ndim != 4:
        raise DataError(
            f"{path}: array shapes do not fit together: {', '.join(wrong) or 'subsets'}"
        )
    if max_length is not None and length != max_length:
        raise UsageError(
            f"{path}: the plan was made for --max-length {length}, this run has {max_length}"
        )
    if 0 in (*arrays["subsets"].shape, length):
        raise DataError(f"{path}: expected at least one text, pass, subset and position")
    ids = [str(i) for i in arrays["ids"]]
    if len(set(ids)) < n:
        twice = next(i for i, name in enumerate(ids) if name in ids[:i])
        raise DataError(f"{path}: text '{printable(ids[twice])}' stands twice in the plan")
    plan = ProbePlan(
        masks=arrays["masks"].astype(bool),
        scored=arrays["scored"].astype(bool),
        weights=arrays["weights"].astype(np.float32),
        subsets=arrays["subsets"].astype(np.int32),
    )
    for row, name in enumerate(ids):
        wrong = _wrong_in(arrays["tokens"][row], ProbePlan(*(part[row] for part in plan)))
        if wrong:
            raise DataError(f"{path}: the plan of text '{printable(name)}' cannot be: {wrong}")
    identity = "plan-" + hashlib.sha256(data).hexdigest()[:16]
    return Replay(ids, arrays["tokens"], plan, identity)


def _wrong_in(tokens: np.ndarray, plan: ProbePlan) -> str | None:
    """Says what is wrong with the plan of one text; None if nothing is."""
    masks, scored, weights, subsets = (np.asarray(part) for part in plan)
    size, length = int((tokens >= 0).sum()), len(tokens)
    known, ordered = np.logical_or.accumulate(scored), np.sort(subsets, axis=-1)
    steps = np.arange(len(subsets))[:, None, None]
    checks = {
        "its tokens hold padding before the end": (tokens[:size] < 0).any(),
        "masks reach beyond its tokens": masks[:, size:].any(),
        "scored is not a part of masks": (scored & ~masks).any(),
        "subsets hold positions beyond its tokens": (subsets < -1).any() or (subsets >= size).any(),
        "a subset holds a position twice": (
            (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        ).any(),
        "weights must be finite and not negative": not (weights >= 0).all()
        or np.isinf(weights).any(),
        "all its weights are 0": masks.any() and not weights.any(),
    }
    found = next((what for what, wrong in checks.items() if wrong), None)
    if found is None:
        used = subsets >= 0
        if (used & ~known[steps, np.clip(subsets, 0, length - 1)]).any():
            return "subsets hold positions that no pass up to theirs scores"
        if (weights[~used.any(axis=(1, 2))] > 0).any():
            return "a pass with a weight has no subset"
    return found


def _load(
    path: Path, kinds: dict[str, str], what: str, flag: str, optional: tuple[str, ...] = ()
) -> tuple[bytes, dict[str, Any]]:
    """Reads the bytes of an npz and its arrays of these names. Raises `DataError`."""
    try:
        return read_arrays(path, kinds, optional)
    except ValueError as error:
        raise DataError(
            f"{path}: not a {what} file ({error}); {flag} writes one, see docs/replay.md"
        ) from None


def read_arrays(
    path: Path, kinds: dict[str, str], optional: Collection[str] = ()
) -> tuple[bytes, dict[str, Any]]:
    """Reads an npz file: its bytes, and its arrays of these names.

    Nothing is unpacked before all headers have been read: a file of 3 MB may announce gigabytes.

    Args:
      path: the file.
      kinds: name of an array -> the kinds of dtype that it may have.
      optional: names that may be missing.

    Raises:
      ValueError: it is none, or one array is missing, of another kind, or too large.
    """
    try:
        data = read_bytes(path, MAX_BYTES)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            held = set(archive.namelist())
            wanted = [n for n in kinds if n not in optional or f"{n}.npy" in held]
            sizes = {name: _announced(archive, name, kinds[name]) for name in wanted}
            if sum(sizes.values()) > MAX_BYTES:
                raise ValueError(f"{sum(sizes.values()):,} bytes, expected at most {MAX_BYTES:,}")
            arrays = {}
            for name in wanted:
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # zip files and npy headers can be wrong in too many ways to list
        raise ValueError(printable(str(error) or type(error).__name__, 200)) from None
    return data, arrays


def _announced(archive: zipfile.ZipFile, name: str, kinds: str) -> int:
    """Returns the bytes of an array by its header alone. Raises `ValueError` if it is no npy."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):  # others may have headers of gigabytes, and records of named fields
            raise ValueError(f"{name} is an npy of version {version}, expected (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.kind not in kinds:
        raise ValueError(f"{name} holds {dtype}")
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} has shape {shape}")
    return math.prod(shape) * dtype.itemsize


def load_losses(path: Path, replay: Replay) -> Losses:
    """Reads the losses of a plan, in the order of its texts.

    Raises `DataError` if the file is none, lacks a text, or has no number where the plan scores.
    """
    optional = ("state_at", "target_states", "reference_states")
    _, arrays = _load(path, _LOSS_KINDS, "losses", "--save-losses", optional)
    rows = {str(name): row for row, name in enumerate(arrays["ids"].reshape(-1))}
    if len(rows) != arrays["ids"].size:
        raise DataError(f"{path}: holds the losses of a text twice; save those of one plan")
    missing = [name for name in replay.ids if name not in rows]
    if missing:
        raise DataError(
            f"{path}: has no losses of text '{printable(missing[0])}'; save those of this plan"
        )
    order = [rows[name] for name in replay.ids]
    scored, found = np.asarray(replay.plan.scored), []
    for name in ("target", "reference"):
        values = arrays[name].astype(np.float32)
        if values.shape != (len(rows), *scored.shape[1:]):
            raise DataError(
                f"{path}: {name} has shape {list(values.shape)}, expected "
                f"{[len(rows), *scored.shape[1:]]} for this plan"
            )
        values = values[order]
        if not np.isfinite(values[scored]).all():
            raise DataError(f"{path}: {name} has no finite loss somewhere where the plan scores")
        found.append(values)
    states = {k: arrays[f"{k}_states"] for k in ("target", "reference") if f"{k}_states" in arrays}
    at = arrays.get("state_at", np.zeros((0, 3), int)).copy()
    fit = all(s.ndim == 3 and len(s) == len(at) for s in states.values())
    if at.shape != (at.size // 3, 3) or not fit:
        raise DataError(f"{path}: states must be [r, s, d], one for each of the r rows of state_at")
    shape = (len(rows), scored.shape[1], scored.shape[2])
    if len(at) and not ((at >= 0) & (at < shape)).all():
        raise DataError(f"{path}: state_at must hold (row, pass, position), each below {shape}")
    place = {row: i for i, row in enumerate(order)}
    kept = [i for i, row in enumerate(at[:, 0]) if int(row) in place]
    at[:, 0] = [place.get(int(row), -1) for row in at[:, 0]]
    target, reference = found
    return Losses(target, reference, at[kept], {k: s[kept] for k, s in states.items()})


def store_suffixes(replay: Replay) -> list[str]:
    """Returns what each row's place in a loss store needs besides its tokens, mostly nothing.

    Rows of equal tokens may be masked in different ways: those get a name of their plan's content.
    """
    names = [
        hashlib.sha256(b"".join(np.ascontiguousarray(part[row]).tobytes() for part in replay.plan))
        for row in range(len(replay.ids))
    ]
    plans: dict[bytes, set[str]] = {}
    for tokens, name in zip(replay.tokens, names):
        plans.setdefault(tokens.astype("<i8").tobytes(), set()).add(name.hexdigest())
    return [
        "@" + name.hexdigest()[:16] if len(plans[tokens.astype("<i8").tobytes()]) > 1 else ""
        for tokens, name in zip(replay.tokens, names)
    ]


def match(replay: Replay, ids: list[str], token_ids: list[np.ndarray], where: Path) -> list[int]:
    """Finds the plan's row of each text, which must be there with the same tokens."""
    rows = {name: row for row, name in enumerate(replay.ids)}
    found = []
    for name, tokens in zip(ids, token_ids):
        if name not in rows:
            raise DataError(
                f"{where}: text '{printable(name)}' is not in the plan; score the same texts"
            )
        planned = replay.tokens[rows[name]]
        planned = planned[planned >= 0]
        if not np.array_equal(planned, tokens):
            raise DataError(
                f"{where}: text '{printable(name)}' has other tokens in the plan "
                f"({len(planned)} there, {len(tokens)} here); use the same tokenizer and "
                "--max-length"
            )
        found.append(rows[name])
    return found


def require_visible(
    replay: Replay, rows: list[int], prompts: list[np.ndarray | None], where: Path
) -> None:
    """Raises `DataError` if the plan masks a token of a prompt.

    Args:
      replay: the plan.
      rows: its row of each text.
      prompts: True at each text's tokens that must stay visible; None: none of them must.
      where: the plan's file.
    """
    masks = np.asarray(replay.plan.masks)
    for row, prompt in zip(rows, prompts):
        if prompt is not None and masks[row][:, : len(prompt)][:, prompt].any():
            raise DataError(
                f"{where}: the plan masks the prompt of text '{printable(replay.ids[row])}', which "
                "must stay visible; replay it with --loss-on text, or a plan of its answers"
            )
