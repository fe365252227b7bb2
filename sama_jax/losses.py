"""Token losses at given positions: the forward side of every attack.

`score_batch` is the one function that devices run. Vocabulary logits exist only at scored
positions, and only for a chunk of them at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sama_jax.types import ForwardBatch, Model, Params

HEAD_BYTES = 64 * 2**20
"""Float32 logits held at once. 64 MiB are 132 positions of LLaDA's 126,464 rows; a batch of 8 texts
of 512 tokens with all positions scored would need 2 GiB."""


def token_nll(
    model: Model, params: Params, hidden: Float[Array, "n d"], targets: Int[Array, " n"]
) -> Float[Array, " n"]:
    """Negative log-likelihood of `targets` in nats, float32, computed in chunks of positions.

    Chunks are recomputed in a backward pass, so that training holds no more logits than scoring.
    """

    def chunk_nll(args: tuple[Array, Array]) -> Float[Array, " c"]:
        h, t = args
        logits = model.logits(params, h).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, t[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    n = hidden.shape[0]
    chunk = max(1, HEAD_BYTES // (4 * model.vocab_size))
    if n <= chunk:
        return chunk_nll((hidden, targets))
    num = -(-n // chunk)
    chunk = -(-n // num)  # equal chunks: padding is below one position a chunk
    fill = num * chunk - n
    hidden = jnp.pad(hidden, ((0, fill), (0, 0))).reshape(num, chunk, -1)
    targets = jnp.pad(targets, (0, fill)).reshape(num, chunk)
    return jax.lax.map(jax.checkpoint(chunk_nll), (hidden, targets)).reshape(-1)[:n]


def scored_nll(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    stream: Float[Array, "b l d"],
    positions: Int[Array, "b k"],
) -> Float[Array, "b k"]:
    """Losses at `positions` (-1 unused, gives NaN), from the stream that enters the last block.

    A shifted model predicts the token at i from its output at i - 1; position 0 takes output 0,
    which predicts something else (docs/differences.md), as every published reader of Dream does.
    """
    b, k = positions.shape
    at = jnp.maximum(positions, 0)
    source = jnp.maximum(at - 1, 0) if model.shift else at
    hidden = model.last_hidden(params, stream, valid, source)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    nll = token_nll(model, params, hidden.reshape(b * k, -1), targets.reshape(-1))
    return jnp.where(positions >= 0, nll.reshape(b, k), jnp.nan)


def score_batch(
    model: Model, slots: tuple[int, ...], params: Params, batch: ForwardBatch
) -> Float[Array, "t b k"]:
    """Losses of `b` texts under `t` masks at each pass's scored positions, NaN in unused slots.

    Passes run one after the other (`lax.map`), so memory does not grow with their number. The trunk
    is compiled once; the last block and the head once for every size in `slots`, and a pass takes
    the size that its group names. Parameters are arguments: target and reference share a program.
    """
    k = batch.positions.shape[-1]

    def read(size: int, stream: Array, positions: Array) -> Array:
        nll = scored_nll(
            model, params, batch.tokens, batch.valid, stream, positions[:, : min(size, k)]
        )
        return jnp.pad(nll, ((0, 0), (0, k - nll.shape[1])), constant_values=jnp.nan)

    def one_pass(args: tuple[Array, Array, Array]) -> Array:
        mask, positions, group = args
        masked = jnp.where(mask, model.mask_id, batch.tokens)
        stream = model.trunk(params, masked, batch.valid)
        branches = [partial(read, size) for size in slots]
        return jax.lax.switch(group, branches, stream, positions)

    return jax.lax.map(one_pass, (batch.masks, batch.positions, batch.group))


def slot_sizes(bounds: np.ndarray, length: int) -> np.ndarray:
    """Static slots for passes that score at most `bounds` [t] positions of a text (host).

    Rounded up to l/32, l/16, .., l/2 or l: each size costs about a second to compile on a CPU,
    which eight instead of four sizes do not earn back before some thousand texts.
    """
    grid = np.array(sorted({-(-length // 2**i) for i in range(6)}))
    return grid[np.searchsorted(grid, np.minimum(bounds, length))].astype(np.int32)


def scored_positions(scored: np.ndarray, slots: int) -> np.ndarray:
    """Indices of True in the last axis, ascending, -1 if unused: int32 [..., slots] (host)."""
    order = np.argsort(~scored, axis=-1, kind="stable")[..., :slots].astype(np.int32)
    used = np.take_along_axis(scored, order, axis=-1)
    return np.where(used, order, np.int32(-1))
