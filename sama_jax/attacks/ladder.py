"""The ablation ladder: the steps between Loss and SAMA, one at a time.

`loss` (the target alone) -> `ladder:calibrated` (minus the reference) -> `ladder:progressive` (on
SAMA's masks) -> `ladder:subsets` (over its random subsets) -> `ladder:signs` (their signs) ->
`sama` (its step weights). Not part of `all`: rungs are for comparison, not for use.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sama_jax.arrays import AnyArray, ProbePlan, Reading
from sama_jax.attacks.likelihood import likelihood_probes, nll_per_token
from sama_jax.attacks.registry import register
from sama_jax.attacks.sama import progressive_probes
from sama_jax.core import votes

_RUNG = {
    "access": "loss + reference",
    "source": "ablation of arXiv 2601.20125, this project",
    "in_all": False,
}


@register("ladder:calibrated", probes=likelihood_probes, **_RUNG)
def calibrated(reading: Reading) -> Float[Array, ""]:
    """NLL per token of the reference minus that of the target, same masks."""
    reference = nll_per_token(reading.reference, reading.plan)
    return reference - nll_per_token(reading.target, reading.plan)


def _recorded(plan: ProbePlan) -> Float[AnyArray, " t"]:
    """Weighs the recorded steps alike, to a sum of 1; NaN without any."""
    used = (plan.weights > 0).astype(jnp.float32)
    total = used.sum()
    return used / jnp.where(total > 0, total, jnp.nan)


@register("ladder:progressive", probes=progressive_probes, **_RUNG)
def progressive(reading: Reading) -> Float[Array, ""]:
    """Mean difference of the masked tokens of a step, mean over SAMA's steps."""
    plan = reading.plan
    difference = jnp.where(plan.scored, reading.reference - reading.target, 0.0).sum(axis=1)
    means = difference / jnp.maximum(plan.scored.sum(axis=1), 1)
    return (_recorded(plan) * means).sum()


def _subset_means(reading: Reading) -> Float[Array, "t n"]:
    plan = reading.plan
    difference = votes.latest_losses(reading.reference, plan.scored) - votes.latest_losses(
        reading.target, plan.scored
    )
    size = (plan.subsets >= 0).sum(axis=-1)
    return votes.subset_sums(difference, plan.subsets) / jnp.maximum(size, 1)


@register("ladder:subsets", probes=progressive_probes, **_RUNG)
def subsets(reading: Reading) -> Float[Array, ""]:
    """The same over SAMA's random subsets: mean of their mean differences."""
    return (_recorded(reading.plan) * _subset_means(reading).mean(axis=1)).sum()


@register("ladder:signs", probes=progressive_probes, **_RUNG)
def signs(reading: Reading) -> Float[Array, ""]:
    """Share of subsets with a positive sum, every step alike: SAMA without its weights."""
    positive = (_subset_means(reading) > 0).astype(jnp.float32)
    return (_recorded(reading.plan) * positive.mean(axis=1)).sum()
