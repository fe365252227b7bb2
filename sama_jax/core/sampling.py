"""Draws whole texts from a model: every token starts masked and is filled in, one a pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax.arrays import Model, Params


def filling_order(key: Key[Array, ""], length: int, block: int | None) -> Int[Array, " {length}"]:
    """Draws the order in which the positions of a text are filled, uniformly.

    With `block`, blocks are filled from left to right, since a position sees no later block.
    """
    block_of = jnp.arange(length) // (length if block is None else block)
    return jnp.lexsort((jax.random.bits(key, (length,), jnp.uint32), block_of)).astype(jnp.int32)


def sample_texts(
    model: Model,
    params: Params,
    keys: Key[Array, " b"],
    allowed: Bool[Array, " v"],
    temperature: Float[Array, ""],
    length: int,
) -> Int[Array, "b {length}"]:
    """Draws a text a key from the model, without anything given.

    A masked position is drawn from the model's distribution over the `allowed` tokens at this
    temperature, in a random order of positions and one position a pass: at temperature 1 the
    any-order likelihood that the model was trained for. The first token of a next-token model,
    which nothing predicts, is drawn uniformly.
    """
    order_keys, token_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    orders = jax.vmap(lambda k: filling_order(k, length, model.arch.block_length))(order_keys)
    rows = jnp.arange(keys.shape[0])
    valid = jnp.ones(orders.shape, bool)

    def fill(i: Array, tokens: Int[Array, "b l"]) -> Int[Array, "b l"]:
        at = orders[:, i]
        stream = model.trunk(params, tokens, valid)
        hidden = model.last_hidden(params, stream, valid, at[:, None])[:, 0]
        logits = model.logits(params, hidden).astype(jnp.float32) / temperature
        if model.kind == "autoregressive":
            logits = jnp.where(i == 0, 0.0, logits)
        logits = jnp.where(allowed[None], logits, -jnp.inf)
        drawn = jax.vmap(lambda k, x: jax.random.categorical(jax.random.fold_in(k, i), x))
        return tokens.at[rows, at].set(drawn(token_keys, logits).astype(jnp.int32))

    return jax.lax.fori_loop(0, length, fill, jnp.full(orders.shape, model.mask_id, jnp.int32))
