"""Statistics of one text's token differences, for the probes of any attack.

`differences` makes one number a token, reference minus target, of whatever passes read it; the
others make one number a text. Tokens that were not read are NaN and count nowhere. Higher means
more likely a member. NaN where there is too little to say.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sama_jax.arrays import AnyArray, Reading

WINDOWS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)
"""Window sizes of WBC as shipped (`Stry233/WBC` `attacks/`); the rule of its paper gives others."""


def token_means(
    values: Float[AnyArray, "t l"], scored: Bool[AnyArray, "t l"]
) -> Float[Array, " l"]:
    """Averages each token over the passes that read it; NaN where none did."""
    count = scored.sum(axis=0)
    total = jnp.where(scored, values, 0.0).sum(axis=0)
    return total / jnp.where(count > 0, count, jnp.nan)


def differences(reading: Reading) -> Float[Array, " l"]:
    """Subtracts the target's from the reference's loss of every token, in nats."""
    return token_means(reading.reference - reading.target, reading.plan.scored)


SMALLEST = 1e-6
"""Least standard deviation of log-probabilities, in nats: a certain model's is 0."""


def standardised(reading: Reading) -> Float[Array, " l"]:
    """Centres and scales the target's log-probability of every token by all of the vocabulary's.

    `reading` has the channels `mean` and `deviation`, as Min-K%++ reads them.
    """
    more = reading.target_more
    z = (-reading.target - more["mean"]) / jnp.maximum(more["deviation"], SMALLEST)
    return token_means(z, reading.plan.scored)


def mean(values: Float[AnyArray, " l"]) -> Float[Array, ""]:
    """Averages the tokens."""
    read = ~jnp.isnan(values)
    count = read.sum()
    return jnp.where(read, values, 0.0).sum() / jnp.where(count > 0, count, jnp.nan)


def t(values: Float[AnyArray, " l"]) -> Float[Array, ""]:
    """Divides the mean by the unbiased deviation: a t statistic without its factor sqrt(n)."""
    read = ~jnp.isnan(values)
    count = read.sum()
    centred = jnp.where(read, values - mean(values), 0.0)
    variance = (centred**2).sum() / jnp.where(count > 1, count - 1, jnp.nan)
    return mean(values) / jnp.where(variance > 0, jnp.sqrt(variance), jnp.nan)


def lower_tail(values: Float[AnyArray, " l"], fraction: float) -> Float[Array, ""]:
    """Averages the lowest `fraction` of the tokens, rounded down, at least one."""
    count = (~jnp.isnan(values)).sum()
    # A hair more than the product: 0.2 x 15 in float32 may fall below 3.
    taken = jnp.maximum((count * fraction + 1e-4).astype(jnp.int32), 1)
    ordered = jnp.sort(values)  # NaN comes last
    used = (jnp.arange(values.shape[0]) < taken) & (count > 0)
    return jnp.where(used, ordered, 0.0).sum() / jnp.where(count > 0, taken, jnp.nan)


def signed_rank(values: Float[AnyArray, " l"]) -> Float[Array, ""]:
    """Divides Wilcoxon's signed-rank sum by its largest value: [-1, 1]; zeros are left out."""
    used = ~jnp.isnan(values) & (values != 0)
    size = jnp.where(used, jnp.abs(values), jnp.inf)
    ordered = jnp.sort(size)
    below = jnp.searchsorted(ordered, size, side="left")
    upto = jnp.searchsorted(ordered, size, side="right")
    rank = (below + upto + 1) / 2  # equal sizes share the mean of their ranks
    total = jnp.where(used, rank * jnp.sign(values), 0.0).sum()
    n = used.sum()
    return total / jnp.where(n > 0, n * (n + 1) / 2, jnp.nan)


def windows(values: Float[AnyArray, " l"], sizes: tuple[int, ...] = WINDOWS) -> Float[Array, ""]:
    """Returns the share of contiguous windows with a sum above 0, averaged over window sizes.

    Windows run over the tokens that were read, in text order. A text shorter than a window is one
    window.
    """
    read = ~jnp.isnan(values)
    count, length = read.sum(), values.shape[0]
    packed = jnp.where(read, values, 0.0)[jnp.argsort(~read, stable=True)]
    start, total = jnp.arange(length), jnp.zeros_like(packed)
    shares = []
    for offset in range(max(sizes)):
        # 0 behind the end: a window longer than the text holds all of it
        total = total + jnp.where(start + offset < length, jnp.roll(packed, -offset), 0.0)
        if offset + 1 in sizes:
            number = jnp.maximum(count - offset, 1)
            shares.append(((total > 0) & (start < number)).sum() / number)
    return jnp.where(count > 0, jnp.stack(shares).mean(), jnp.nan)
