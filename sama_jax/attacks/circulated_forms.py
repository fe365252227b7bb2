"""Forms of Min-K%, Min-K%++ and Ratio that circulate and measure something else.

They are here to compare with published numbers, not to be used; docs/attacks.md says what each one
measures. `mink`, `mink++` and `ratio` are the sound forms.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import AnyArray, ProbePlan, Reading
from sama_jax.attacks.likelihood import LikelihoodProbes
from sama_jax.attacks.queries import TARGET, Probes, Query
from sama_jax.attacks.registry import register
from sama_jax.attacks.sama_other_models import UnmaskedProbes
from sama_jax.config import AuditSettings
from sama_jax.core import losses, masking, token_statistics

COUNTED = 20
"""Tokens that count: the number 20 where Min-K% has 20 per cent."""


def _bernoulli(settings: AuditSettings) -> LikelihoodProbes:
    """Makes the probes of the published likelihood estimate."""
    eps = settings.likelihood.eps
    return LikelihoodProbes(settings.budget, "bernoulli", eps, settings.max_length)


def sum_of_smallest(
    values: Float[AnyArray, " l"], missing: Int[AnyArray, ""], stand_in: float
) -> Float[Array, ""]:
    """Sums the `COUNTED` smallest of `values` (NaN: unread) and of `missing` more.

    Each of these has the value `stand_in`, which is below all others.
    """
    ordered = jnp.sort(values)
    absent = jnp.minimum(missing, COUNTED)
    read = (~jnp.isnan(values)).sum()
    used = jnp.arange(values.shape[0]) < jnp.minimum(COUNTED - absent, read)
    total = jnp.where(used, ordered, 0.0).sum() + stand_in * absent
    return jnp.where(missing + read > 0, total, jnp.nan)


_DLM_MIA = "clearloveclearlove/DLM_MIA attack/attacks/"


@register(
    "mink:circulated",
    probes=_bernoulli,
    needs_reference=False,
    access="masked logits",
    source=_DLM_MIA + "mink.py",
)
def mink_circulated(reading: Reading) -> Float[Array, ""]:
    """Sum of the 20 smallest mean probabilities; a token that was never masked counts 0."""
    values = token_statistics.token_means(jnp.exp(-reading.target), reading.plan.scored)
    unread = reading.num_tokens - (~jnp.isnan(values)).sum()
    return jnp.where(reading.num_tokens > 0, sum_of_smallest(values, unread, 0.0), jnp.nan)


@register(
    "mink++:circulated",
    probes=_bernoulli,
    needs_reference=False,
    access="masked logits",
    source=_DLM_MIA + "minkplusplus.py",
)
def minkpp_circulated(reading: Reading) -> Float[Array, ""]:
    """Sum of the 20 smallest mean log-probabilities; never masked, or missing to 20: -1000."""
    values = token_statistics.token_means(-reading.target, reading.plan.scored)
    missing = jnp.maximum(reading.num_tokens, COUNTED) - (~jnp.isnan(values)).sum()
    return jnp.where(reading.num_tokens > 0, sum_of_smallest(values, missing, -1000.0), jnp.nan)


# --- the forms of the ITS repository -------------------------------------------------------------


@dataclass(frozen=True)
class RandomShareProbes(Probes):
    """Each pass masks a random share of the text, uniform in [0.01, 0.99]; at least one token."""

    passes: int
    max_length: int

    hashed_as = ("random share",)

    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        key = rng.for_purpose(key, rng.Purpose.RANDOM_SHARE_MASKS)
        share_key, mask_key = jax.random.split(key)
        share = jax.random.uniform(share_key, (self.passes,), minval=0.01, maxval=0.99)
        total = maskable.sum().astype(jnp.int32)
        counts = jnp.clip(jnp.rint(share * total).astype(jnp.int32), 1, total)
        masks = masking.fresh_masks(mask_key, maskable, counts, self.max_length)
        return ProbePlan.without_votes(masks, masks, masks.any(axis=1).astype(jnp.float32))

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        return np.full(self.passes, length)


def random_share_probes(settings: AuditSettings) -> RandomShareProbes:
    """Makes probes with the budget's number of passes."""
    return RandomShareProbes(settings.budget, settings.max_length)


def _largest_sums(
    values: Float[AnyArray, "t l"], scored: Bool[AnyArray, "t l"]
) -> Float[Array, ""]:
    """Averages over passes the sum of the int(0.8 n) largest of n values; of the one if n = 1."""

    def one(v: Float[AnyArray, " l"], s: Bool[AnyArray, " l"]) -> Float[Array, ""]:
        n = s.sum()
        taken = jnp.where(n == 1, 1, (8 * n) // 10)
        ordered = -jnp.sort(jnp.where(s, -v, jnp.inf))
        return jnp.where(jnp.arange(v.shape[0]) < taken, ordered, 0.0).sum()

    used = scored.any(axis=1)
    total = jnp.where(used, jax.vmap(one)(values, scored), 0.0).sum()
    return total / jnp.where(used.any(), used.sum(), jnp.nan)


@register(
    "mink:its",
    probes=random_share_probes,
    needs_reference=False,
    access="masked logits",
    source="Chrisqcwx/DLLM-MIA attack/attacks/mink.py",
)
def mink_its(reading: Reading) -> Float[Array, ""]:
    """Minus the sum of the largest 80 % of the losses of each pass: it grows with their number."""
    return -_largest_sums(reading.target, reading.plan.scored)


@register(
    "mink++:its",
    queries=lambda settings: {
        "text": Query(
            random_share_probes(settings), None, ("nll", "flat_mean", "flat_deviation"), TARGET
        )
    },
    access="masked logits, whole vocabulary",
    source="Chrisqcwx/DLLM-MIA attack/attacks/minkpp.py",
)
def minkpp_its(reading: Reading) -> Float[Array, ""]:
    """The same of losses normalised by the unweighted mean and deviation over the vocabulary."""
    more = reading.target_more
    z = (-reading.target - more["flat_mean"]) / (more["flat_deviation"] + 1e-8)
    return -_largest_sums(-z, reading.plan.scored)


# --- Ratio ---------------------------------------------------------------------------------------


@register(
    "ratio:circulated",
    queries=lambda _: {"text": Query(UnmaskedProbes(), channels=(losses.NEXT,))},
    access="logits + reference",
    source="Stry233/SAMA attack/attacks/ratio.py",
    undefined="it needs at least two tokens",
)
def ratio_circulated(reading: Reading) -> Float[Array, ""]:
    """Minus the next-token loss of the unmasked text over the reference's: no likelihood here."""
    scored = reading.plan.scored
    target, reference = (
        token_statistics.mean(token_statistics.token_means(x, scored))
        for x in (reading.target, reading.reference)
    )
    return -target / reference
