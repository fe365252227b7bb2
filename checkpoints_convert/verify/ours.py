"""Computes our side of every comparison: a folder at full precision, and its losses."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Params
from sama_jax.core import losses
from sama_jax.errors import ModelError, ParityError
from sama_jax.weights import loading, model_folder

PARITY = ParityError.exit_code
"""Exit code of a comparison that found a difference."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Difference of a loss, in nats, that is never held against a framework."""
LOOSEST = TOLERANCE["bfloat16"]
"""What float32 is allowed at most, in nats, however large its rounding."""
RANKS = 0.99
"""Spearman correlation of the losses that bfloat16 must keep."""


class Ours(NamedTuple):
    """Holds a folder and its parameters on one device."""

    folder: model_folder.ModelFolder
    params: Params

    @property
    def model(self) -> Any:
        return self.folder.model

    @property
    def dtype(self) -> str:
        return str(jnp.dtype(self.model.dtype))


def open_ours(
    path: Path, *, dtype: str, adapters: Sequence[Path] = (), mask_id: int | None = None
) -> Ours:
    """Loads a folder; `dtype` is float32 or bfloat16, whatever is stored."""
    folder = model_folder.open_folder(path, mask_id=mask_id, dtype=dtype, adapter=adapters)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return Ours(folder, loading.load(folder, device))


def reading_once(folder: model_folder.ModelFolder) -> model_folder.ModelFolder:
    """Returns a folder whose network reads its text once, in blocks, also if audits show it the
    text without masks behind that: PyTorch's classes read no second one, and the weights and the
    arithmetic are the same."""
    model: Any = folder.model
    if not model.arch.clean_context:
        return folder
    arch = dataclasses.replace(model.arch, clean_context=False)
    return dataclasses.replace(folder, model=dataclasses.replace(model, arch=arch))


def require_finite(ours: Ours, values: Float[np.ndarray, "*n"]) -> None:
    """Raises `ModelError` if a loss of ours is no number: there is nothing to compare."""
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise ModelError(
            f"{ours.folder.path}: {broken} of {values.size} losses are not finite; its weights, "
            "its adapter or its config.json are broken"
        )


def masked_tokens(
    tokens: Int[np.ndarray, "b l"], masks: Bool[np.ndarray, "b l"], mask_id: int
) -> Int[np.ndarray, "b l"]:
    """Returns what the networks read: the mask id at masked positions."""
    return np.where(masks, mask_id, tokens).astype(np.int32)


def token_losses(
    ours: Ours,
    tokens: Int[np.ndarray, "b l"],
    masks: Bool[np.ndarray, "b l"],
    valid: Bool[np.ndarray, "b l"],
    rows: int = 8,
) -> Float[np.ndarray, "b l"]:
    """Returns the loss of every token in nats, masked ones replaced by the mask id.

    `rows` texts are read at once.
    """
    found = []
    for start in range(0, len(tokens), rows):
        part = [x[start : start + rows] for x in (tokens, masks, valid)]
        fill = ((0, min(rows, len(tokens)) - len(part[0])), (0, 0))
        out = _losses(ours.model, ours.params, *(np.pad(x, fill) for x in part))
        found.append(np.asarray(out)[: len(part[0])])
    return np.concatenate(found)


@partial(jax.jit, static_argnums=0)
def _losses(model: Any, params: Params, tokens: Array, masks: Array, valid: Array) -> Array:
    masked = jnp.where(masks & valid, model.mask_id, tokens)
    stream = model.trunk(params, masked, valid, tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return losses.scored_nll(model, params, tokens, valid, stream, positions)
