"""Attacks on probes that partition a text: every token is masked, and read, exactly once a round.

Min-K%, Min-K%++ and WBC were made for autoregressive models, which give each token one loss; a
partition is what comes nearest to it in a masked model. `complement` is this project's own attack
on the same kind of probes, and young: it has been measured on small models only (docs/attacks.md).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import ProbePlan, Reading
from sama_jax.attacks.queries import TARGET, Probes, Query
from sama_jax.attacks.registry import register
from sama_jax.config import AuditSettings
from sama_jax.core import masking, token_statistics, votes


@dataclass(frozen=True)
class PartitionProbes(Probes):
    """`rounds` times, the tokens are split at random into `parts` masks of nearly equal size."""

    parts: int
    rounds: int
    max_length: int
    subsets: int
    subset_size: int

    hashed_as = ("partition",)
    not_in_identity = ("max_length", "subsets", "subset_size")

    @property
    def passes(self) -> int:
        return self.parts * self.rounds

    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        """Draws masks that weigh alike, and subsets of each for the statistic `votes`."""
        mask_key = rng.for_purpose(key, rng.Purpose.PARTITION_MASKS)
        masks = masking.partition_masks(
            mask_key, maskable, self.parts, self.rounds, self.max_length
        )
        subset_keys = rng.step_keys(rng.for_purpose(key, rng.Purpose.SUBSETS), self.passes)
        draw = jax.vmap(lambda k, m: votes.sample_subsets(k, m, self.subsets, self.subset_size))
        return ProbePlan(
            masks=masks,
            scored=masks,
            weights=masks.any(axis=1).astype(jnp.float32),
            subsets=draw(subset_keys, masks),
        )

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        return np.full(self.passes, -(-length // self.parts))


def _probes(settings: AuditSettings, parts: int, rounds: int) -> PartitionProbes:
    s = settings.sama
    return PartitionProbes(parts, rounds, settings.max_length, s.subsets, s.subset_size)


def tail_probes(settings: AuditSettings) -> PartitionProbes:
    """Makes as many rounds of `tail.parts` masks as the budget has room for, at least one."""
    parts = min(settings.tail.parts, settings.budget)
    return _probes(settings, parts, settings.budget // parts)


def complement_probes(settings: AuditSettings) -> PartitionProbes:
    """Makes one round of as many masks as the budget has passes, or `complement.parts`."""
    return _probes(settings, settings.complement.parts or settings.budget, 1)


# --- Min-K% --------------------------------------------------------------------------------------


@register(
    "mink",
    probes=tail_probes,
    needs_reference=False,
    access="masked logits",
    source="Shi et al., arXiv 2310.16789",
)
def mink(reading: Reading, settings: AuditSettings) -> Float[Array, ""]:
    """Mean log-probability of the text's least likely tokens (lowest 20 %)."""
    likelihood = token_statistics.token_means(-reading.target, reading.plan.scored)
    return token_statistics.lower_tail(likelihood, settings.tail.fraction)


@register(
    "mink++",
    queries=lambda settings: {
        "text": Query(tail_probes(settings), None, ("nll", "mean", "deviation"), TARGET)
    },
    access="masked logits, whole vocabulary",
    source="Zhang et al., arXiv 2404.02936",
)
def minkpp(reading: Reading, settings: AuditSettings) -> Float[Array, ""]:
    """Min-K% of log-probabilities normalised by their mean and spread over the vocabulary."""
    normalised = token_statistics.standardised(reading)
    return token_statistics.lower_tail(normalised, settings.tail.fraction)


# --- both models ---------------------------------------------------------------------------------

_BOTH = {"probes": complement_probes, "access": "masked logits + reference"}
_OURS = {**_BOTH, "source": "this project"}


@register("wbc", **_BOTH, source="arXiv 2601.02751; Stry233/WBC attacks/")
def wbc(reading: Reading) -> Float[Array, ""]:
    """Share of contiguous windows, of ten sizes, whose loss the target lowers."""
    return token_statistics.windows(token_statistics.differences(reading))


@register("complement", **_OURS)
def complement(reading: Reading, settings: AuditSettings) -> Float[Array, ""]:
    """Mean of the lowest fifth of the differences reference minus target, each token read once.

    Fine-tuning almost never makes a member's tokens worse, while it does so for other texts.
    """
    values = token_statistics.differences(reading)
    return token_statistics.lower_tail(values, settings.complement.fraction)


@register("complement:mean", **_OURS)
def complement_mean(reading: Reading) -> Float[Array, ""]:
    """Mean of the differences reference minus target, each token read once."""
    return token_statistics.mean(token_statistics.differences(reading))


@register("complement:t", **_OURS, undefined="it needs two tokens that differ")
def complement_t(reading: Reading) -> Float[Array, ""]:
    """Mean over standard deviation of the differences, each token read once."""
    return token_statistics.t(token_statistics.differences(reading))


@register("complement:rank", **_OURS, undefined="it needs a token whose losses differ")
def complement_rank(reading: Reading) -> Float[Array, ""]:
    """Wilcoxon's signed-rank statistic of the differences, each token read once."""
    return token_statistics.signed_rank(token_statistics.differences(reading))


@register("complement:votes", **_OURS)
def complement_votes(reading: Reading, settings: AuditSettings) -> Float[Array, ""]:
    """SAMA's sign votes on disjoint masks, all passes alike."""
    found = votes.of_reading(reading, settings.sama.ties)
    return jnp.where(reading.plan.weights.sum() > 0, found.score, jnp.nan)
