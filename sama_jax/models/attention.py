"""Computes attention: all at once, in parts that a CPU's caches hold, or by cuDNN."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CPU_SCORE_BYTES = 8 * 2**20
"""Attention scores of a batch that a CPU computes at once; more are computed in parts, since they
leave the caches: 4 texts of 512 tokens have 32 MiB with 8 heads, which ran a 115M model at 91
instead of 115 GFLOP/s."""
CPU_PART_BYTES = 2 * 2**20
"""Scores of such a part, some heads or queries of a text: that model took 5 % longer with whole
texts."""


def attend(
    q: Float[Array, "b h k a"],
    k: Float[Array, "b g l a"],
    v: Float[Array, "b g l a"],
    allowed: Bool[Array, "b l"] | Bool[Array, "b #k l"],
    kernel: Literal["xla", "cudnn"] = "xla",
    heads_apart: bool = False,
) -> tuple[Float[Array, "b h k a"], Float[Array, "b h k l"]]:
    """Returns attention and its weights. Key head j serves h/g query heads; `allowed` names the
    keys that all queries see, or each of them. The kernel `cudnn` is used where queries are as many
    as keys; with `heads_apart` a CPU may compute some heads after the others.

    Scores and softmax are float32. Hidden keys get the dtype's minimum, so a query without any key
    stays finite, and exp underflows to an exact 0 everywhere else. Weights that nobody reads are
    not computed.
    """
    b, h, n, _ = q.shape
    if allowed.ndim == 2:
        allowed = allowed[:, None]
    out, weights = _attend(q, k, v, allowed)
    if kernel == "cudnn" and n == k.shape[2]:  # few queries cost little
        return _attend_by_cudnn(q, k, v, allowed), weights
    if b > 1 and 4 * b * h * n * k.shape[2] > CPU_SCORE_BYTES:
        rows = (q, k, v, allowed)
        out = jax.lax.platform_dependent(
            *rows,
            cpu=functools.partial(_attend_in_parts, heads_apart),
            default=lambda *args: _attend(*args)[0],
        )
    return out, weights


def _attend_in_parts(
    heads_apart: bool,
    q: Float[Array, "b h k a"],
    k: Float[Array, "b g l a"],
    v: Float[Array, "b g l a"],
    allowed: Bool[Array, "b #k l"],
) -> Float[Array, "b h k a"]:
    """Computes text by text, and in a text some heads after the others, or else some queries.

    Heads of one text lie together in memory, so nothing is copied: 4 texts of 512 tokens, 8 heads
    of size 64: 17.4 ms instead of 19.4 (two cores).
    """
    b, h, n, a = q.shape
    parts = query_parts(h, n, k.shape[2])
    if heads_apart and k.shape[1] % parts == 0:

        def some_heads(part: tuple[Array, Array, Array, Array]) -> Float[Array, "c k a"]:
            return _attend(*(x[None] for x in part))[0][0]

        groups = [x.reshape(b * parts, -1, *x.shape[2:]) for x in (q, k, v)]
        seen = jnp.repeat(allowed, parts, axis=0)
        return jax.lax.map(some_heads, (*groups, seen)).reshape(b, h, n, a)

    def split(x: Array) -> Array:
        """Turns [.., n, c] into [parts, .., n / parts, c]."""
        return jnp.moveaxis(x.reshape(*x.shape[:-2], parts, -1, x.shape[-1]), -3, 0)

    def text(row: tuple[Array, Array, Array, Array]) -> Float[Array, "h k a"]:
        q, k, v, allowed = row
        by_query = allowed.shape[0] > 1

        def some(part: tuple[Array, ...]) -> Float[Array, "h c a"]:
            seen = part[1] if by_query else allowed
            return _attend(part[0][None], k[None], v[None], seen[None])[0][0]

        out = jax.lax.map(some, (split(q), *([split(allowed)] if by_query else [])))
        return jnp.moveaxis(out, 0, 1).reshape(h, n, a)

    return jax.lax.map(text, (q, k, v, allowed))


def query_parts(heads: int, queries: int, length: int) -> int:
    """Returns in how many equal parts a text's queries, or its heads, are computed: as few as keep
    the scores of a part below `CPU_PART_BYTES`, and no fewer than 32 queries in each."""
    found = [p for p in range(1, max(1, queries // 32) + 1) if queries % p == 0]
    whole = 4 * heads * queries * length
    return next((p for p in found if whole <= p * CPU_PART_BYTES), found[-1])


def _attend_by_cudnn(
    q: Float[Array, "b h k a"],
    k: Float[Array, "b g l a"],
    v: Float[Array, "b g l a"],
    allowed: Bool[Array, "b #k l"],
) -> Float[Array, "b h k a"]:
    """Computes it by cuDNN, without scores in memory.

    An 8B model on an H200 takes 11.1 ms for 512 tokens instead of 12.4 (32 texts, bfloat16).
    """
    mask = jnp.broadcast_to(allowed[:, None], (q.shape[0], 1, q.shape[2], k.shape[2]))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return out.swapaxes(1, 2)


def _attend(
    q: Float[Array, "b h k a"],
    k: Float[Array, "b g l a"],
    v: Float[Array, "b g l a"],
    allowed: Bool[Array, "b #k l"],
) -> tuple[Float[Array, "b h k a"], Float[Array, "b h k l"]]:
    """Computes all of it at once.

    Exponentials are divided by their sum after the product with the values: at 256 positions that,
    and scaling inside exp, takes 5.5 ms where softmax takes 7.3 (XLA on a core of a CPU).
    """
    b, h, n, a = q.shape
    g, length = k.shape[1:3]
    # The queries of one key head are rows of one product: a fifth axis slows XLA on a CPU down.
    rows = q.reshape(b, g, h // g * n, a)
    scores = jnp.einsum("bgra,bgla->bgrl", rows, k, preferred_element_type=jnp.float32)
    bias = jnp.where(allowed, jnp.float32(0), jnp.finfo(jnp.float32).min)
    if bias.shape[1] > 1:
        bias = jnp.tile(bias, (1, h // g, 1))
    scores = scores + bias[:, None]
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    powers = jnp.exp((scores - top) * (1.0 / math.sqrt(a)))
    total = powers.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bgrl,bgla->bgra", powers.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = (out / total).astype(v.dtype)
    return out.reshape(b, h, n, a), (powers / total).reshape(b, h, n, length)
