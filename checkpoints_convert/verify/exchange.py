"""Exchanges losses of the same masked tokens as a file, for `--dump` and `--against`.

`ids` int32 [b, l], `mask` bool [b, l], `nll` float32 [b, l] (loss of every id after the family's
alignment, in nats, masked positions replaced by the mask id), optional `key_valid` bool [b, l]. No
pickles. Neither side needs the other's framework.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr

from checkpoints_convert.verify.ours import (
    PARITY,
    RANKS,
    Ours,
    require_finite,
    token_losses,
)
from checkpoints_convert.verify.rounding import bound_of_losses
from sama_jax.errors import DataError
from sama_jax.storage.files import write_atomic
from sama_jax.storage.replay import read_arrays

_KINDS = {"ids": "iu", "mask": "b", "nll": "f", "key_valid": "b"}


class Exchange(NamedTuple):
    """Holds a checked file."""

    ids: Int[np.ndarray, "b l"]
    mask: Bool[np.ndarray, "b l"]
    nll: Float[np.ndarray, "b l"]
    key_valid: Bool[np.ndarray, "b l"]


def write_losses(path: Path, ours: Ours, ids: np.ndarray, mask: np.ndarray, valid: np.ndarray):
    """Writes our losses of `ids`."""
    nll = token_losses(ours, ids, mask, valid)
    require_finite(ours, nll[valid])
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        allow_pickle=False,
        ids=ids.astype(np.int32),
        mask=mask,
        key_valid=valid,
        nll=np.where(valid, nll, 0).astype(np.float32),
    )
    write_atomic(path, buffer.getvalue())


def read_losses(path: Path, vocab_size: int) -> Exchange:
    """Reads and checks a file. Raises `DataError` in one line."""

    def refuse(what: str) -> DataError:
        return DataError(
            f"{path}: {what}; expected ids int [b, l], mask bool [b, l], nll float [b, l] and "
            "optionally key_valid bool [b, l], as `verify --dump` writes them (docs/verify.md)"
        )

    try:
        _, found = read_arrays(path, _KINDS, optional=_KINDS)
    except ValueError as error:
        raise refuse(f"not a file of losses ({error})") from None
    for name in ("ids", "mask", "nll"):
        if name not in found:
            raise refuse(f"holds no {name}")
    for name, array in found.items():
        if array.ndim != 2 or array.shape != found["ids"].shape:
            raise refuse(f"{name} has shape {list(array.shape)}, ids {list(found['ids'].shape)}")
    valid = found.get("key_valid", np.ones_like(found["mask"]))
    read = found["mask"] & valid
    if not read.any():
        raise refuse("masks no valid position")
    if not np.isfinite(found["nll"][read]).all():
        raise refuse("nll is not finite at some masked position")
    outside = valid & ((found["ids"] < 0) | (found["ids"] >= vocab_size))
    if outside.any():
        wrong = found["ids"][outside][0]
        raise refuse(f"ids hold {wrong}, the model's embedding has rows 0 to {vocab_size - 1}")
    ids = np.where(valid, found["ids"], 0).astype(np.int32)
    return Exchange(ids, found["mask"], found["nll"].astype(np.float32), valid)


def compare_losses(path: Path, ours: Ours) -> int:
    """Prints the comparison of our losses with the file's. Returns 0, or 6 if they differ."""
    theirs = read_losses(path, ours.model.vocab_size)
    nll = token_losses(ours, theirs.ids, theirs.mask, theirs.key_valid)
    read = theirs.mask & theirs.key_valid
    difference = np.abs(nll - theirs.nll)
    largest = float(difference[read].max())
    bound = bound_of_losses(ours, theirs.ids, theirs.mask, theirs.key_valid, read, largest)
    ranks = rank_agreement(nll[read], theirs.nll[read])
    print(
        f"{read.sum()} losses, {ours.dtype}: largest difference {largest:.3g} nats, mean "
        f"{difference[read].mean():.3g}, rank correlation {ranks:.6f}"
    )
    print(f"allowed: {bound.nats:.2g} nats; {bound.why}")
    # Not `>`: a NaN of ours must also fail.
    if largest <= bound.nats and (ours.dtype == "float32" or ranks >= RANKS):
        print(f"verdict: equal within {bound.nats:.2g} nats")
        return 0
    row, place = np.unravel_index(np.argmax(np.where(read, difference, -1)), difference.shape)
    print(
        f"verdict: DIFFERENT; row {row}, position {place}, id {theirs.ids[row, place]}: "
        f"{nll[row, place]:.6f} here, {theirs.nll[row, place]:.6f} in {path}. "
        + _likely(nll, theirs, read)
    )
    return PARITY


def _likely(nll: np.ndarray, theirs: Exchange, read: np.ndarray) -> str:
    """Says what the pattern of the differences suggests."""
    full = read & theirs.key_valid.all(axis=1, keepdims=True)
    if (
        (~theirs.key_valid).any()
        and full.any()
        and np.allclose(nll[full], theirs.nll[full], 0, 1e-4)
    ):
        return "Only rows with padding differ: did the other side hide it from attention?"
    return (
        "Check the mask id, the logit alignment (shift), padding and precision of the other side; "
        "`verify` without --against compares block by block with PyTorch"
    )


def rank_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the Spearman correlation; 1 where there is nothing to rank."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 1.0
    return float(spearmanr(a, b).statistic)  # pyright: ignore  SciPy types no result
