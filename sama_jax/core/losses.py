"""Computes token losses at given positions: the forward side of every attack.

`loss_batch` is the one function that devices run. Vocabulary logits exist only at scored
positions, and only for a chunk of them at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from sama_jax.arrays import ForwardBatch, Model, Params

PASSES_A_CALL = 16
"""Passes in one call of the scorer: SAMA's number. Longer plans take more calls."""
HEAD_BYTES = 64 * 2**20
"""Float32 logits held at once. 64 MiB are 132 positions of LLaDA's 126,464 rows; a batch of 8 texts
of 512 tokens with all positions scored would need 2 GiB."""


NEXT = "next_nll"
"""Loss of a token from the output at the position before it, whatever the model's alignment."""


def _log_probabilities(logits: Float[Array, "c v"]) -> Float[Array, "c v"]:
    return jax.nn.log_softmax(logits, axis=-1)


def _nll(logits: Float[Array, "c v"], targets: Int[Array, " c"]) -> Float[Array, " c"]:
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _mean(logits: Float[Array, "c v"], _: Int[Array, " c"]) -> Float[Array, " c"]:
    """Returns E_p[log p], minus the entropy."""
    log_p = _log_probabilities(logits)
    return jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0).sum(axis=-1)


def _deviation(logits: Float[Array, "c v"], targets: Int[Array, " c"]) -> Float[Array, " c"]:
    """Returns the deviation of log p under p. Centred first: E[x^2] - E[x]^2 loses all digits."""
    log_p = _log_probabilities(logits)
    centred = log_p - _mean(logits, targets)[:, None]
    return jnp.sqrt(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * centred**2, 0.0).sum(axis=-1))


def _flat_mean(logits: Float[Array, "c v"], _: Int[Array, " c"]) -> Float[Array, " c"]:
    return _log_probabilities(logits).mean(axis=-1)


def _flat_deviation(logits: Float[Array, "c v"], _: Int[Array, " c"]) -> Float[Array, " c"]:
    return _log_probabilities(logits).std(axis=-1, ddof=1)


CHANNELS = {
    "nll": _nll,
    "mean": _mean,
    "deviation": _deviation,
    "flat_mean": _flat_mean,
    "flat_deviation": _flat_deviation,
    NEXT: _nll,
}
"""What can be read at a scored position, from its logits [c, v] and its token [c], in nats.

`mean`, `deviation`: of the log-probabilities over the vocabulary, weighted by the probabilities;
`flat_*`: unweighted, the deviation unbiased.
"""


def in_chunks(
    values_of: Callable[..., Float[Array, "c p"]], rows: tuple[Array, ...], vocab_size: int
) -> Float[Array, "n p"]:
    """Computes `values_of(*rows)`, which makes [n, vocab_size] float32 arrays on the way.

    It is computed in chunks of positions that hold `HEAD_BYTES`, and again in a backward pass.
    """
    n = rows[0].shape[0]
    chunk = max(1, HEAD_BYTES // (4 * vocab_size))
    if n <= chunk:
        return values_of(*rows)
    num = -(-n // chunk)
    chunk = -(-n // num)  # equal chunks: padding is below one position a chunk
    fill = num * chunk - n

    def split(x: Array) -> Array:
        return jnp.pad(x, ((0, fill), *[(0, 0)] * (x.ndim - 1))).reshape(num, chunk, *x.shape[1:])

    values = jax.lax.map(jax.checkpoint(lambda args: values_of(*args)), tuple(map(split, rows)))
    return values.reshape(num * chunk, -1)[:n]


def token_values(
    model: Model,
    params: Params,
    hidden: Float[Array, "n d"],
    targets: Int[Array, " n"],
    channels: tuple[str, ...],
) -> Float[Array, "c n"]:
    """Computes `CHANNELS` from final hidden states and the tokens they predict, float32."""

    def values(h: Float[Array, "c d"], t: Int[Array, " c"]) -> Float[Array, "c p"]:
        logits = model.logits(params, h).astype(jnp.float32)
        return jnp.stack([CHANNELS[name](logits, t) for name in channels], axis=1)

    return in_chunks(values, (hidden, targets), model.vocab_size).T


def token_nll(
    model: Model, params: Params, hidden: Float[Array, "n d"], targets: Int[Array, " n"]
) -> Float[Array, " n"]:
    """Computes the negative log-likelihood of `targets` in nats, float32."""
    return token_values(model, params, hidden, targets, ("nll",))[0]


def scored_values(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    stream: Any,
    positions: Int[Array, "b k"],
    channels: tuple[str, ...],
) -> Float[Array, "c b k"]:
    """Reads `CHANNELS` at `positions` (-1 unused, gives NaN), from what enters the last block."""
    b, k = positions.shape
    at = jnp.maximum(positions, 0)
    targets = jnp.take_along_axis(tokens, at, axis=1).reshape(-1)

    def read(hidden: Float[Array, "b k d"], names: tuple[str, ...]) -> Float[Array, "c b k"]:
        values = token_values(model, params, hidden.reshape(b * k, -1), targets, names)
        return values.reshape(-1, b, k)

    own = tuple(c for c in channels if c != NEXT)
    parts = {}
    if own:
        hidden = model.last_hidden(params, stream, valid, at)
        parts |= dict(zip(own, read(hidden, own)))
    if NEXT in channels:
        before = model.output_at(params, stream, valid, jnp.maximum(at - 1, 0))
        parts[NEXT] = read(before, (NEXT,))[0]
    values = jnp.stack([parts[c] for c in channels])
    return jnp.where(positions[None] >= 0, values, jnp.nan)


def scored_nll(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    stream: Any,
    positions: Int[Array, "b k"],
) -> Float[Array, "b k"]:
    """Reads the losses alone."""
    return scored_values(model, params, tokens, valid, stream, positions, ("nll",))[0]


def loss_batch(
    model: Model,
    slots: tuple[int, ...],
    params: Params,
    batch: ForwardBatch,
    channels: tuple[str, ...] = ("nll",),
) -> Float[Array, "r b k"]:
    """Computes the values of `b` texts under `t` masks where each pass is scored, NaN elsewhere.

    Rows `r`: pass by pass, in each one row a channel; losses alone are [t, b, k].

    Passes run one after the other, so memory does not grow with their number; the loop ends after
    `batch.passes`, so that plans of 2 and of 16 passes share a program. The trunk is compiled once;
    the last block and the head once for every size in `slots`, and a pass takes the size that its
    group names. Parameters are arguments: target and reference share a program.
    """
    k = batch.positions.shape[-1]
    tokens, valid = jnp.asarray(batch.tokens), jnp.asarray(batch.valid)

    def read(size: int, stream: Any, positions: Array) -> Array:
        some = positions[:, : min(size, k)]
        values = scored_values(model, params, tokens, valid, stream, some, channels)
        unused = ((0, 0), (0, 0), (0, k - some.shape[1]))
        return jnp.pad(values, unused, constant_values=jnp.nan)

    def one_pass(args: tuple[Array, Array, Array]) -> Array:
        mask, positions, group = args
        masked = jnp.where(mask, model.mask_id, tokens)
        stream = model.trunk(params, masked, valid, tokens)
        branches = [partial(read, size) for size in slots]
        return jax.lax.switch(group, branches, stream, positions)

    def step(i: Array, out: Array) -> Array:
        return out.at[i].set(one_pass((batch.masks[i], batch.positions[i], batch.group[i])))

    t, b = batch.positions.shape[:2]
    unread = jnp.full((t, len(channels), b, k), jnp.nan, jnp.float32)
    values = jax.lax.fori_loop(0, batch.passes, step, unread)
    return values.reshape(-1, b, k)


def slot_sizes(bounds: Int[np.ndarray, " t"], length: int) -> Int32[np.ndarray, " t"]:
    """Chooses static slots for passes that score at most `bounds` positions of a text (host).

    Rounded up to l/32, l/16, .., l/2 or l: each size costs about a second to compile on a CPU,
    which eight instead of four sizes do not earn back before some thousand texts.
    """
    grid = np.array(sorted({-(-length // 2**i) for i in range(6)}))
    return grid[np.searchsorted(grid, np.minimum(bounds, length))].astype(np.int32)


def scored_positions(scored: Bool[np.ndarray, "*b l"], slots: int) -> Int32[np.ndarray, "*b k"]:
    """Lists the indices of True in the last axis, ascending, -1 if unused (host)."""
    order = np.argsort(~scored, axis=-1, kind="stable")[..., :slots].astype(np.int32)
    used = np.take_along_axis(scored, order, axis=-1)
    return np.where(used, order, np.int32(-1))
