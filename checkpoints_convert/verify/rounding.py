"""Measures how far rounding alone moves what a network computes: the bounds of every verdict.

Fixed bounds do not hold on real weights. In SmolLM2-135M one of 576 features of the residual stream
is 22,552 where the others are some tens, and rounding moves losses by 1e-4 nats; in random networks
of that size everything is near 1, and losses move by 1e-6.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from checkpoints_convert.verify.ours import LOOSEST, TOLERANCE, Ours, masked_tokens
from sama_jax.arrays import Params
from sama_jax.models.stages import stages

NOISES = 64.0
"""How many times PyTorch's own noise a stage of ours may be off. Rounding gave at most 17 in three
real networks and 3 in random ones; a norm that is off by 1e-3 gives 1,600 or more, 1e-2 of noise in
a block's weights tens of thousands (docs/verify.md)."""
MOVES = 8.0
"""How many times what rounding moves a loss two frameworks may be apart."""
SEEDS = 4
ROUNDINGS = 2.0
"""A block's own error in units of one rounding. With 2, what `jittered` moves is what PyTorch and
JAX were apart in SmolLM2, within a factor of 3."""
ROWS, PLACES = 16, 64
"""Texts, and positions of each, whose losses are moved to measure the bound."""


_TINY = np.finfo(np.float32).tiny


def half_ulp(dtype: str) -> float:
    """Returns the largest relative error of one rounding."""
    return float(jnp.finfo(dtype).eps) / 2


def noise(
    rounded: Float[np.ndarray, "n d"],
    exact: Float[np.ndarray, "n d"],
    size: Float[np.ndarray, "n d"],
    dtype: str,
) -> Float[np.ndarray, "n d"]:
    """Returns the noise of each number of a stage, from one framework's own errors.

    It is what that framework is off there, plus what nine in ten of the row's features are off by
    at most, plus some roundings of the number's `size`. A feature of 22,552 has noise of its own
    and does not hide what is wrong with its neighbours; neither is its rounding an alarm.
    """
    off, step = np.abs(rounded - exact), half_ulp(dtype)
    typical = np.quantile(off, 0.9, axis=-1, keepdims=True)
    return off + typical + 4 * step * size


def sizes(values: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """Returns the size of each number plus what nine in ten of its row are at most.

    That is the size of a row of random numbers, and of one with a feature of 22,552 that of the
    others: its root mean square, 940, would hide them.
    """
    size = np.abs(values)
    return np.maximum(size + np.quantile(size, 0.9, axis=-1, keepdims=True), _TINY)


def jittered(seed: int) -> Callable[[str, Array], Array]:
    """Moves every number between float32 blocks by some roundings, for `stages`."""
    rng = np.random.default_rng(seed)

    def move(name: str, state: Array) -> Array:
        del name
        wide = np.asarray(state, np.float64)
        step = ROUNDINGS * half_ulp("float32") * rng.standard_normal(wide.shape)
        return jnp.asarray(wide + step * sizes(wide), state.dtype)

    return move


class Bound(NamedTuple):
    """Says how far two frameworks may be apart in a loss, and why."""

    nats: float
    why: str


def bound_of_losses(
    ours: Ours,
    tokens: Int[np.ndarray, "b l"],
    masks: Bool[np.ndarray, "b l"],
    valid: Bool[np.ndarray, "b l"],
    asked: Bool[np.ndarray, "b l"],
    apart: float,
) -> Bound:
    """Returns the bound for losses at the positions `asked` that are `apart` nats.

    It is a fixed one unless float32 is further apart than that; then rounding must explain it on
    these weights and texts: `MOVES` times what losses move when states are `jittered`, but never
    more than bfloat16 is allowed.
    """
    fixed = TOLERANCE[ours.dtype]
    if ours.dtype != "float32":
        return Bound(fixed, "bfloat16 rounds every value to 2^-8 of its size")
    if apart <= fixed:
        return Bound(
            fixed, "what rounding explains on these weights is measured if that is not enough"
        )
    rows = np.flatnonzero(asked.any(axis=1))
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(int))]
    losses = partial(
        _some_losses, ours, tokens[some], (masks & valid)[some], valid[some], asked[some]
    )
    still = losses()
    each = [np.abs(losses(instead=jittered(seed)) - still).max() for seed in range(SEEDS)]
    moved = float(np.max(each))
    return Bound(
        min(LOOSEST, max(fixed, MOVES * moved)),
        f"rounding every state moves the losses of these weights by {moved:.1e}; {MOVES:g} times "
        f"that is allowed, from {fixed:g} to {LOOSEST:g}",
    )


def _some_losses(
    ours: Ours,
    tokens: np.ndarray,
    masks: np.ndarray,
    valid: np.ndarray,
    asked: np.ndarray,
    instead: Callable[[str, Array], Array] = lambda name, state: state,
) -> Float[np.ndarray, "b k"]:
    """Returns losses at evenly spaced positions of those `asked`, stage by stage."""
    read = jnp.asarray(masked_tokens(tokens, masks, ours.model.mask_id))
    given = (read, jnp.asarray(valid), instead, jnp.asarray(tokens))
    *_, (_, hidden) = stages(ours.model, ours.params, *given)
    found = []
    for row in np.flatnonzero(asked.any(axis=1)):
        listed = np.flatnonzero(asked[row])
        places = listed[np.linspace(0, len(listed) - 1, PLACES).astype(int)]
        source = np.maximum(places - 1, 0) if ours.model.shift else places
        logits = logits_of(ours.model, ours.params, hidden[row, source][None])[0]
        log_p = np.asarray(jax.nn.log_softmax(jnp.float32(logits)))
        found.append(-log_p[np.arange(PLACES), tokens[row, places]])
    return np.stack(found)


@partial(jax.jit, static_argnums=0)
def logits_of(model: Any, params: Params, hidden: Float[Array, "b k d"]) -> Float[Array, "b k v"]:
    """Returns the vocabulary logits, compiled."""
    return model.logits(params, hidden)
