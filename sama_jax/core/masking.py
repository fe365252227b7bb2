"""Draws masks: which positions of one text each forward pass hides.

Pure functions of one text; `jax.vmap` makes the batch. Masks depend on the text's key and on which
positions may be masked, never on the padded length. A mask is True where something *is* masked.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, Int32, Key

from sama_jax import rng
from sama_jax.config import SamaSettings


def densities(settings: SamaSettings) -> Float64[np.ndarray, " t"]:
    """Returns the share of a text masked in each step (host).

    `paper` includes both ends, `code_linear` neither, `geometric` both. With one step: the lowest
    density for `paper` and `geometric`, the middle for `code_linear`.
    Source: arXiv 2601.20125 section 3 (second hand) and `attack/attacks/sama.py`.
    """
    low, high, steps = settings.min_density, settings.max_density, settings.steps
    t = np.arange(steps, dtype=np.float64)
    if settings.schedule == "paper":
        return low + (high - low) * (t / max(steps - 1, 1))
    if settings.schedule == "code_linear":
        return low + (high - low) * (t + 1) / (steps + 1)
    return np.clip(low * (high / low) ** (t / max(steps - 1, 1)), low, high)


def count_table(settings: SamaSettings, max_length: int) -> Int32[np.ndarray, "n t"]:
    """Tabulates the masked tokens by text length, 0..max_length, and step (host).

    At least 1, at most the length, halves to even as Python's `round`. A table in float64, because
    float32 on a device rounds some halves the other way.
    """
    length = np.arange(max_length + 1, dtype=np.float64)[:, None]
    wanted = np.maximum(np.rint(densities(settings)[None, :] * length), 1)
    return np.minimum(wanted, length).astype(np.int32)


def random_ranks(
    key: Key[Array, ""], maskable: Bool[Array, " l"], max_length: int
) -> Int[Array, " l"]:
    """Draws a uniformly random rank for every maskable position; the others come last."""
    bits = rng.random_order_bits(key, max_length, maskable.shape[0])
    # 31 random bits below the bit that puts unmaskable positions last: one sort instead of two.
    keys = (bits >> 1) | jnp.where(maskable, jnp.uint32(0), jnp.uint32(1 << 31))
    return jnp.argsort(jnp.argsort(keys, stable=True), stable=True).astype(jnp.int32)


def nested_masks(
    key: Key[Array, ""],
    maskable: Bool[Array, " l"],
    counts: Int[Array, " t"],
    max_length: int,
) -> Bool[Array, "t l"]:
    """Masks `counts[t]` random positions in step `t`; it contains each step with a smaller count.

    One rank a text instead of a loop over steps: position masked iff `rank < counts[t]`. Counts
    must not exceed the number of maskable positions.
    """
    return random_ranks(key, maskable, max_length)[None, :] < counts[:, None]


def fresh_masks(
    key: Key[Array, ""],
    maskable: Bool[Array, " l"],
    counts: Int[Array, " t"],
    max_length: int,
) -> Bool[Array, "t l"]:
    """Masks `counts[t]` random positions in step `t`, drawn independently of the other steps."""
    keys = rng.step_keys(key, counts.shape[0])
    ranks = jax.vmap(lambda k: random_ranks(k, maskable, max_length))(keys)
    return ranks < counts[:, None]


def newly_masked(masks: Bool[Array, "t l"]) -> Bool[Array, "t l"]:
    """Finds the positions of each step that no earlier step masked."""
    seen = jax.lax.cummax(masks.astype(jnp.int32), axis=0)
    before = jnp.concatenate([jnp.zeros_like(seen[:1]), seen[:-1]])
    return masks & (before == 0)


def exact_counts(
    key: Key[Array, ""], num_maskable: Int[Array, ""], passes: int
) -> Int[Array, " t"]:
    """Draws numbers of masked tokens for the exact-count likelihood, ascending, over 1..L.

    `1 + (j L + o) // passes` with one random offset `o` in 0..L-1 takes every value of 1..L equally
    often over `o` and `j`: LLaDA's stratified draw (`get_log_likelihood.py` in `ML-GSAI/LLaDA`) in
    integers. All 0 for an empty text.
    """
    offset = rng.bounded(jax.random.bits(key, (), jnp.uint32), num_maskable)
    j = jnp.arange(passes, dtype=jnp.int32)
    return jnp.where(num_maskable > 0, 1 + (j * num_maskable + offset) // passes, 0)


def bernoulli_masks(
    key: Key[Array, ""], maskable: Bool[Array, " l"], passes: int, eps: float, max_length: int
) -> tuple[Bool[Array, "t l"], Float[Array, " t"]]:
    """Draws the masks of the published likelihood estimate; also returns each pass's probability.

    `p = (1 - eps) u + eps` with u uniform in [0, 1); every maskable position with probability p.
    Source: `attack/attacks/utils.py` in `Stry233/SAMA`.
    """
    keys = rng.step_keys(key, passes)

    def one(k):
        p_key, mask_key = jax.random.split(k)
        p = (1 - eps) * jax.random.uniform(p_key) + eps
        noise = jax.random.uniform(mask_key, (max_length,))[: maskable.shape[0]]
        return maskable & (noise < p), p

    return jax.vmap(one)(keys)


def partition_masks(
    key: Key[Array, ""], maskable: Bool[Array, " l"], parts: int, rounds: int, max_length: int
) -> Bool[Array, "t l"]:
    """Splits the maskable positions into `parts` disjoint masks, `rounds` times.

    Sizes within a round differ by at most one. With fewer positions than parts some are empty.
    """
    keys = rng.step_keys(key, rounds)
    ranks = jax.vmap(lambda k: random_ranks(k, maskable, max_length))(keys)
    total = jnp.maximum(maskable.sum(), 1)
    part = jnp.where(maskable, ranks * parts // total, -1)  # rank x parts stays below 2^31
    masks = part[:, None, :] == jnp.arange(parts)[None, :, None]
    return masks.reshape(rounds * parts, -1)
