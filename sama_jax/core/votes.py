"""SAMA's weighted sign statistic: random subsets, sign votes, step weights.

Pure functions of one text; `batch_sign_statistics` is the jitted form over a batch, and
`sign_statistics` the same for arrays of anybody, which it checks. Source: arXiv 2601.20125
section 3 and `attack/attacks/sama.py` in `Stry233/SAMA`; docs/differences.md lists where the two
disagree and which setting selects which.
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import AnyArray, ProbePlan, Reading, SignStatistics
from sama_jax.config import Ties, Weights
from sama_jax.core.votes_checks import require_usable


def sample_subsets(
    key: Key[Array, ""], mask: Bool[Array, " l"], num: int, size: int
) -> Int[Array, "n m"]:
    """Draws `num` uniformly random subsets of the masked positions, none with a repetition.

    Returns positions, -1 unused. With M masked positions a subset has min(size, M) of them.
    Robert Floyd's algorithm: `size` draws a subset instead of one a position, 20,480 against
    1,048,576 random numbers a text at T 16, N 128, m 10, L 512; and draws of a fixed shape, so
    that the padded length changes nothing.
    """
    total = mask.sum().astype(jnp.int32)
    used = jnp.minimum(total, size)
    bits = jax.random.bits(key, (size, num), jnp.uint32)

    def draw(i: Int[Array, ""], chosen: Int[Array, "m n"]) -> Int[Array, "m n"]:
        # The i-th draw is among the first `top + 1` members; a repeat is replaced by the newest.
        top = jnp.full((num,), total - used + i)
        drawn = rng.bounded(bits[i], top + 1)
        repeated = (chosen == drawn[None, :]).any(axis=0)
        return chosen.at[i].set(jnp.where(repeated, top, drawn))

    index = jax.lax.fori_loop(0, size, draw, jnp.full((size, num), -1, jnp.int32)).T
    positions = jnp.argsort(~mask, stable=True).astype(jnp.int32)
    taken = positions[jnp.clip(index, 0, mask.shape[0] - 1)]
    return jnp.where(jnp.arange(size)[None, :] < used, taken, -1)


def step_weights(recorded: Bool[Array, " t"], weights: Weights) -> Float[Array, " t"]:
    """Returns the unnormalised weight of each step, 0 where it is not recorded.

    `inverse_step`: 1/t for step t = 1..T (paper); `inverse_rank`: 1/rank among the recorded steps
    (published code); `uniform`: 1.
    """
    number = jnp.arange(1, recorded.shape[0] + 1)
    if weights == "inverse_rank":
        number = jnp.maximum(jnp.cumsum(recorded), 1)
    elif weights == "uniform":
        number = jnp.ones_like(number)
    return jnp.where(recorded, 1.0 / number.astype(jnp.float32), 0.0)


def latest_losses(
    losses: Float[AnyArray, "t l"], scored: Bool[AnyArray, "t l"]
) -> Float[Array, "t l"]:
    """Finds, for each step, every position's loss from the latest step up to it that scored it.

    `scored = masks` gives the losses of the step itself, `scored` = newly masked the published
    form. 0 where a position was not scored yet.
    """
    step = jnp.arange(losses.shape[0], dtype=jnp.int32)[:, None]
    latest = jax.lax.cummax(jnp.where(scored, step, -1), axis=0)
    taken = jnp.take_along_axis(losses, jnp.maximum(latest, 0), axis=0)
    return jnp.where(latest >= 0, taken, 0.0)


def subset_sums(
    values: Float[AnyArray, "t l"], subsets: Int[AnyArray, "t n m"]
) -> Float[Array, "t n"]:
    """Sums the values of each step over each of its subsets; positions of -1 count nothing."""
    steps = jnp.arange(values.shape[0])[:, None, None]
    taken = jnp.asarray(values)[steps, jnp.maximum(subsets, 0)]
    return jnp.where(subsets >= 0, taken, 0.0).sum(axis=-1)


def of_reading(reading: Reading, ties: Ties = "zero") -> SignStatistics:
    """Computes the sign statistic of one text from all that was read about it."""
    return text_sign_statistics(reading.target, reading.reference, reading.plan, ties)


def text_sign_statistics(
    target: Float[AnyArray, "t l"],
    reference: Float[AnyArray, "t l"],
    plan: ProbePlan,
    ties: Ties = "zero",
) -> SignStatistics:
    """Computes the weighted sign statistic of one text.

    A subset votes 1 if its sum of reference minus target losses is strictly above 0. A step's vote
    is the mean over its subsets, the score the weighted mean over steps; 0 without any step.

    Args:
      target: the target's token losses in nats, float32, at `plan.scored`; anything elsewhere.
      reference: the reference's.
      plan: probes of this text, with its subsets.
      ties: what a sum of exactly 0 counts, 0 or one half.
    """
    difference = latest_losses(reference, plan.scored) - latest_losses(target, plan.scored)
    sums = subset_sums(difference, plan.subsets)
    tied = jnp.mean((sums == 0).astype(jnp.float32), axis=1)
    votes = jnp.mean((sums > 0).astype(jnp.float32), axis=1)
    if ties == "half":
        votes = votes + 0.5 * tied
    # One reduction for all three, so that votes of 1 in every step give exactly 1: two separate
    # sums may be added up in different orders (1.0000001 was seen).
    rows = jnp.stack([votes, tied, jnp.ones_like(votes)])
    score, tie_rate, total = (plan.weights[None, :] * rows).sum(axis=1)
    safe = jnp.where(total > 0, total, 1.0)
    return SignStatistics(
        score=score / safe,
        step_votes=votes,
        step_weights=plan.weights / safe,
        tie_rate=tie_rate / safe,
    )


@partial(jax.jit, static_argnames="ties")
def batch_sign_statistics(
    target: Float[AnyArray, "b t l"],
    reference: Float[AnyArray, "b t l"],
    plan: ProbePlan,
    ties: Ties = "zero",
) -> SignStatistics:
    """Computes `text_sign_statistics` of a batch, jitted, of arrays that are known to be sound."""
    return jax.vmap(partial(text_sign_statistics, ties=ties))(target, reference, plan)


def sign_statistics(
    target: AnyArray, reference: AnyArray, plan: ProbePlan, ties: str = "zero"
) -> SignStatistics:
    """Computes `text_sign_statistics` of a batch: arrays have a leading axis of texts. Jitted.

    Raises `ValueError` for arrays of which no score means anything: other shapes or types,
    positions out of range or twice in a subset, losses that are not finite where they are scored,
    negative weights. Inside `jit` or `vmap` of the caller's, values cannot be seen: only shapes and
    types are checked there. The checks read all arrays on the host: a loop over large ones on a
    device calls `batch_sign_statistics`, which computes the same and checks nothing.

    >>> import numpy as np
    >>> plan = ProbePlan(
    ...     masks=np.ones((1, 1, 3), bool), scored=np.ones((1, 1, 3), bool),
    ...     weights=np.ones((1, 1), np.float32), subsets=np.array([[[[0, 1], [1, 2]]]]))
    >>> target, reference = np.zeros((1, 1, 3)), np.array([[[1.0, -0.5, -0.5]]])
    >>> sign_statistics(target, reference, plan).score.tolist()
    [0.5]
    """
    require_usable(target, reference, plan, ties)
    return batch_sign_statistics(target, reference, plan, cast(Ties, ties))
