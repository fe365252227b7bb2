"""Replay files: probe plans and losses as plain npz arrays, to compare with another framework.

Plan: `ids` [n], `tokens` int32 [n, L] (-1 padding), `masks` and `scored` bool [n, T, L], `subsets`
int16 [n, T, N, m] (positions, -1 unused), `weights` float32 [n, T], `preset`. Losses: `ids`,
`target` and `reference` float32 [n, T, L], NaN where not scored; optionally hidden states at a few
places (docs/verify.md). No pickles on either side.
"""

import hashlib
import io
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sama_jax.arrays import ProbePlan
from sama_jax.errors import DataError, UsageError
from sama_jax.storage.files import write_atomic

WARN_BYTES = 2**30

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
    if size > WARN_BYTES:
        print(f"{path}: {size / 2**30:.1f} GiB; replay files are for small n", file=sys.stderr)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())


def load_plan(path: Path, max_length: int | None = None) -> Replay:
    """Reads and checks a plan file.

    Raises:
      UsageError: it was made with another `max_length` (None: any will do).
      DataError: it is not a plan file.
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
    if (arrays["subsets"] >= length).any():
        raise DataError(f"{path}: subsets hold positions beyond {length - 1}")
    plan = ProbePlan(
        masks=arrays["masks"].astype(bool),
        scored=arrays["scored"].astype(bool),
        weights=arrays["weights"].astype(np.float32),
        subsets=arrays["subsets"].astype(np.int32),
    )
    identity = "plan-" + hashlib.sha256(data).hexdigest()[:16]
    return Replay([str(i) for i in arrays["ids"]], arrays["tokens"], plan, identity)


def _load(
    path: Path, kinds: dict[str, str], what: str, flag: str, optional: tuple[str, ...] = ()
) -> tuple[bytes, dict[str, Any]]:
    """Reads the bytes of an npz and its arrays of these names; checks their dtypes."""
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)), np.load(io.BytesIO(data)) as file:
            wanted = [n for n in kinds if n not in optional or n in file.files]
            arrays = {name: file[name] for name in wanted}
        wrong = [f"{k} holds {a.dtype}" for k, a in arrays.items() if a.dtype.kind not in kinds[k]]
        if wrong:
            raise ValueError(", ".join(wrong))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a {what} file ({error}); {flag} writes one, see docs/replay.md"
        ) from None
    return data, arrays


def load_losses(path: Path, replay: Replay) -> Losses:
    """Reads the losses of a plan, in the order of its texts.

    Raises `DataError` if the file is none, lacks a text, or has no number where the plan scores.
    """
    optional = ("state_at", "target_states", "reference_states")
    _, arrays = _load(path, _LOSS_KINDS, "losses", "--save-losses", optional)
    rows = {str(name): row for row, name in enumerate(arrays["ids"])}
    missing = [name for name in replay.ids if name not in rows]
    if missing:
        raise DataError(f"{path}: has no losses of text '{missing[0]}'; save those of this plan")
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
    at = arrays.get("state_at", np.zeros((0, 3), int)).reshape(-1, 3).copy()
    if any(s.ndim != 3 or len(s) != len(at) for s in states.values()):
        raise DataError(f"{path}: states must be [r, s, d], one for each of the r rows of state_at")
    shape = (len(rows), scored.shape[1], scored.shape[2])
    if len(at) and not ((at >= 0) & (at < shape)).all():
        raise DataError(f"{path}: state_at must hold (row, pass, position), each below {shape}")
    place = {row: i for i, row in enumerate(order)}
    kept = [i for i, row in enumerate(at[:, 0]) if int(row) in place]
    at[:, 0] = [place.get(int(row), -1) for row in at[:, 0]]
    target, reference = found
    return Losses(target, reference, at[kept], {k: s[kept] for k, s in states.items()})


def match(replay: Replay, ids: list[str], token_ids: list[np.ndarray], where: Path) -> list[int]:
    """Finds the plan's row of each text, which must be there with the same tokens."""
    rows = {name: row for row, name in enumerate(replay.ids)}
    found = []
    for name, tokens in zip(ids, token_ids):
        if name not in rows:
            raise DataError(f"{where}: text '{name}' is not in the plan; score the same texts")
        planned = replay.tokens[rows[name]]
        planned = planned[planned >= 0]
        if not np.array_equal(planned, tokens):
            raise DataError(
                f"{where}: text '{name}' has other tokens in the plan ({len(planned)} there, "
                f"{len(tokens)} here); use the same tokenizer and --max-length"
            )
        found.append(rows[name])
    return found
