"""Whether a model's outputs are read at the right place.

The output at position i predicts the token at i in most diffusion models, the token at i + 1 in
those that kept a next-token model's offset (Dream). Read the wrong way, every loss is that of a
guess and no attack can see anything, while nothing fails. One forward pass of a known text tells.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Model, Params
from sama_jax.core import losses
from sama_jax.errors import ModelError

TEXT = (
    "The harbour was quiet in the early morning, and the first boats came back before the sun had "
    "cleared the hills. Two men lifted the boxes of fish onto the stones while a third wrote down "
    "the weight of each one in a small book. By eight o'clock the market was open, and people from "
    "the town walked along the rows of tables, asking for the price of bread, eggs, apples and "
    "cheese. It had rained during the night, so the streets were still wet, but nobody seemed to "
    "mind. A child ran past with a dog, and an old woman laughed and told them to be careful."
)
"""Ordinary English that we wrote; any model that has learnt a language does better than guess."""
MAX_TOKENS = 128
STRIDE = 4
"""Every fourth token is masked in one pass, so that each is masked once, between visible ones."""
MIN_TOKENS = 16
"""Distinct tokens below which nothing is concluded."""
REFUSE_NATS, REFUSE_ERRORS, WARN_ERRORS = 0.5, 5.0, 2.0


class TwoReadings(NamedTuple):
    """Holds the losses under both readings, in nats, averaged over distinct tokens."""

    own: float
    """As the model's family says."""
    other: float
    lead: float
    """own - other: above 0 the other reading predicts better."""
    lead_error: float
    """Standard error of `lead`."""
    other_error: float
    tokens: int
    """Distinct tokens."""


@partial(jax.jit, static_argnums=0)
def both_losses(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    masks: Bool[Array, "b l"],
    positions: Int[Array, "b k"],
) -> Float[Array, "2 b k"]:
    """Losses at `positions` (-1 unused, 0 not allowed), from one pass: read from the output at the
    position itself, and from the one before."""
    b, length = tokens.shape
    valid = jnp.ones_like(masks)
    stream = model.trunk(params, jnp.where(masks, model.mask_id, tokens), valid, tokens)
    everywhere = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (b, length))
    hidden = model.output_at(params, stream, valid, everywhere)
    at = jnp.maximum(positions, 1)
    sources = jnp.stack([at, at - 1])
    rows = jnp.take_along_axis(hidden[None], sources[..., None], axis=2)
    targets = jnp.broadcast_to(jnp.take_along_axis(tokens, at, axis=1)[None], sources.shape)
    flat = losses.token_nll(model, params, rows.reshape(-1, rows.shape[-1]), targets.reshape(-1))
    return flat.reshape(sources.shape)


def measure(
    model: Model, params: Params, token_ids: Sequence[int] | np.ndarray
) -> TwoReadings | None:
    """Measures one text; returns None if it has too few distinct tokens.

    A token that comes up several times counts once, with its mean: a model that has learnt nothing
    likes or dislikes a token wherever it stands, so that repetitions are not independent.
    """
    ids = np.asarray(token_ids, np.int32)[:MAX_TOKENS]
    place = np.arange(len(ids))
    masks = (place[None] % STRIDE == np.arange(STRIDE)[:, None]) & (place > 0)[None]
    if len(np.unique(ids[1:])) < MIN_TOKENS:
        return None
    positions = losses.scored_positions(masks, -(-len(ids) // STRIDE))
    tokens = np.broadcast_to(ids, masks.shape)
    both = both_losses(model, params, tokens, masks, positions)
    if not both.is_fully_addressable:  # a model over the devices of several processes
        both = multihost_utils.process_allgather(both, tiled=True)
    found = np.asarray(both, np.float64)
    used = positions >= 0
    kinds = ids[positions[used]]
    own, other = (_by_token(values[used], kinds) for values in found)
    if model.shift:
        own, other = other, own
    lead = own - other
    root = math.sqrt(len(lead))
    return TwoReadings(
        own.mean(), other.mean(), lead.mean(), lead.std(ddof=1) / root, other.std(ddof=1) / root,
        len(lead),
    )  # fmt: skip


def _by_token(values: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Means over equal tokens."""
    _, index = np.unique(kinds, return_inverse=True)
    return np.bincount(index, values) / np.bincount(index)


def check(model: Model, params: Params, token_ids: Sequence[int] | np.ndarray) -> str | None:
    """Warns if the other reading predicts `token_ids` (of `TEXT`) better; else None.

    Raises `ModelError` if it does so by more than half a nat and five standard errors. A model
    whose better reading is not clearly (five standard errors) better than a guess among all rows
    of its vocabulary has learnt nothing that could tell, and passes. Only diffusion models are
    looked at: in the other kinds the family leaves no choice.
    """
    if model.kind != "diffusion":
        return None
    found = measure(model, params, token_ids)
    if found is None:
        return None
    guess = math.log(model.vocab_size)
    learnt = found.other + REFUSE_ERRORS * found.other_error < guess
    if not learnt or found.lead <= WARN_ERRORS * found.lead_error:
        return None
    here, there = ("i - 1", "i") if model.shift else ("i", "i - 1")
    line = (
        f"outputs are read at position {here} for the token at i, as the model's family says, but "
        f"those at {there} predict a plain text better: {found.other:.2f} against {found.own:.2f} "
        f"nats a token, a lead of {found.lead:.2f} +- {found.lead_error:.2f} over {found.tokens} "
        "tokens"
    )
    if found.lead > REFUSE_NATS and found.lead > REFUSE_ERRORS * found.lead_error:
        raise ModelError(
            f"{line}; the losses would be those of a guess. Is model_type in config.json the right "
            "one, or was the model trained with another alignment?"
        )
    return f"{line}; the model may have been trained with another alignment"
