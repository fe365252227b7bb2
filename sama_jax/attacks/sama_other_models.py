"""SAMA's statistic beyond diffusion models: the paper's open question.

`sama:ar` reads a next-token model: one pass gives every token but the first one loss, in one
context, the tokens before it. What SAMA varies, the context and how much of it is hidden, cannot be
varied there, so T densities become T times as many random subsets of the same losses, all alike.

`sama:mlm` reads a masked language model (BERT, ModernBERT) with SAMA's own probes, but only up to
the share of masked tokens that such models are trained on, 15 %: beyond it, their losses are those
of a task that neither model knows.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import AnyArray, ProbePlan, Reading
from sama_jax.attacks.queries import Probes
from sama_jax.attacks.registry import register
from sama_jax.attacks.sama import ProgressiveProbes
from sama_jax.config import AuditSettings
from sama_jax.core import votes

TRAINED_SHARE = 0.15
"""Devlin et al., arXiv 1810.04805."""


@dataclass(frozen=True)
class UnmaskedProbes(Probes):
    """One pass over the text as it is; every token but the first is read."""

    draws: int = 0
    """Subsets of the tokens that vote."""
    subset_size: int = 1

    hashed_as = ("unmasked",)
    not_in_identity = ("draws", "subset_size")
    passes = 1

    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        scored = maskable & (jnp.arange(maskable.shape[0]) > 0)
        key = rng.for_purpose(key, rng.Purpose.SUBSETS)
        subsets = votes.sample_subsets(key, scored, self.draws, self.subset_size)
        weights = scored.any().astype(jnp.float32)[None]
        return ProbePlan(jnp.zeros_like(scored)[None], scored[None], weights, subsets[None])

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        return np.array([max(length - 1, 1)])


def next_token_probes(settings: AuditSettings) -> UnmaskedProbes:
    """Makes probes of one pass, with as many subsets as SAMA draws over all its steps."""
    s = settings.sama
    return UnmaskedProbes(s.subsets * s.steps, s.subset_size)


@register(
    "sama:ar",
    probes=next_token_probes,
    access="loss of every token + reference",
    source="arXiv 2601.20125, open question; this project",
    kinds=("autoregressive",),
    undefined="it needs at least two tokens",
)
def sama_ar(reading: Reading, settings: AuditSettings) -> Float[AnyArray, ""]:
    """Share of random token subsets whose next-token loss the target lowers."""
    found = votes.of_reading(reading, settings.sama.ties)
    return jnp.where(reading.plan.weights.sum() > 0, found.score, jnp.nan)


def masked_model_probes(settings: AuditSettings) -> ProgressiveProbes:
    """Makes SAMA's probes with densities up to `TRAINED_SHARE`."""
    s = settings.sama
    low, high = (min(d, TRAINED_SHARE) for d in (s.min_density, s.max_density))
    return ProgressiveProbes(replace(s, min_density=low, max_density=high), settings.max_length)


@register(
    "sama:mlm",
    probes=masked_model_probes,
    access="masked logits + reference",
    source="arXiv 2601.20125, open question; this project",
    kinds=("masked",),
)
def sama_mlm(reading: Reading, settings: AuditSettings) -> Float[AnyArray, ""]:
    """SAMA's score on a masked language model, at most 15 % of the text masked."""
    return votes.of_reading(reading, settings.sama.ties).score
