"""Loss, ZLIB and Ratio in the form that fits a masked diffusion model.

All three read one Monte-Carlo bound on a text's negative log-likelihood, from the same masks for
target and reference. Scores are per token; `loss:sum` and `zlib:sum` are the published sums.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import AnyArray, ProbePlan, Reading
from sama_jax.attacks.queries import Probes
from sama_jax.attacks.registry import register
from sama_jax.config import AuditSettings, Estimator
from sama_jax.core import masking


@dataclass(frozen=True)
class LikelihoodProbes(Probes):
    """Masks whose weighted losses average to the likelihood bound; see `LikelihoodSettings`."""

    passes: int
    estimator: Estimator
    eps: float
    max_length: int

    hashed_as = ("likelihood",)

    def _hashed(self) -> tuple[Any, ...]:
        # Only one of the estimators uses eps.
        return self.passes, self.estimator, self.eps if self.estimator == "bernoulli" else None

    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        """Weights make `sum_i w_t loss_ti` an estimate of the NLL per token in each pass."""
        key = rng.for_purpose(key, rng.Purpose.LIKELIHOOD_MASKS)
        length = maskable.sum().astype(jnp.int32)
        if self.estimator == "exact":
            count_key, mask_key = jax.random.split(key)
            counts = masking.exact_counts(count_key, length, self.passes)
            masks = masking.fresh_masks(mask_key, maskable, counts, self.max_length)
            weights = jnp.where(counts > 0, 1.0 / jnp.maximum(counts, 1).astype(jnp.float32), 0.0)
        else:
            masks, p = masking.bernoulli_masks(
                key, maskable, self.passes, self.eps, self.max_length
            )
            # Passes that masked nothing are left out, as published.
            weights = jnp.where(masks.any(axis=1), 1.0 / (p * jnp.maximum(length, 1)), 0.0)
        return ProbePlan.without_votes(masks, masks, weights)

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        """Exact counts of pass j stay at or below `1 + ((j + 1) length - 1) // passes`."""
        if self.estimator == "bernoulli":
            return np.full(self.passes, length)
        j = np.arange(self.passes)
        return 1 + ((j + 1) * length - 1) // self.passes


def likelihood_probes(settings: AuditSettings) -> LikelihoodProbes:
    """Makes the probes of an audit: SAMA's number of passes unless set otherwise."""
    return LikelihoodProbes(
        passes=settings.likelihood_passes,
        estimator=settings.likelihood.estimator,
        eps=settings.likelihood.eps,
        max_length=settings.max_length,
    )


def nll_per_token(losses: Float[AnyArray, "t l"], plan: ProbePlan) -> Float[Array, ""]:
    """Averages the bound, in nats a token, over passes that masked something; NaN if none did."""
    passes = (plan.weights > 0).sum()
    total = (plan.weights[:, None] * jnp.where(plan.scored, losses, 0.0)).sum()
    return total / jnp.where(passes > 0, passes, jnp.nan)


@register(
    "loss",
    probes=likelihood_probes,
    needs_reference=False,
    access="loss",
    source="Yeom et al., arXiv 1709.01604",
)
def loss(reading: Reading) -> Float[Array, ""]:
    """Minus the target's NLL per token."""
    return -nll_per_token(reading.target, reading.plan)


@register(
    "loss:sum",
    probes=likelihood_probes,
    needs_reference=False,
    access="loss",
    source="Stry233/SAMA attack/attacks/loss.py",
)
def loss_sum(reading: Reading) -> Float[Array, ""]:
    """Minus the target's NLL of the whole text, as published: it grows with length."""
    return -nll_per_token(reading.target, reading.plan) * reading.num_tokens


@register(
    "zlib",
    probes=likelihood_probes,
    needs_reference=False,
    access="loss",
    source="Carlini et al., arXiv 2012.07805",
)
def zlib(reading: Reading) -> Float[Array, ""]:
    """Minus the target's NLL per token, divided by the text's zlib-compressed bytes."""
    return -nll_per_token(reading.target, reading.plan) / reading.zlib_bytes


@register(
    "zlib:sum",
    probes=likelihood_probes,
    needs_reference=False,
    access="loss",
    source="Stry233/SAMA attack/attacks/zlib.py",
)
def zlib_sum(reading: Reading) -> Float[Array, ""]:
    """Minus the target's NLL of the whole text over compressed bytes a character, as published."""
    compression = reading.zlib_bytes / jnp.maximum(reading.characters, 1)
    return loss_sum(reading) / compression


@register(
    "ratio",
    probes=likelihood_probes,
    needs_reference=True,
    access="loss + reference",
    source="Carlini et al., arXiv 2012.07805; calibration of arXiv 2111.08440",
)
def ratio(reading: Reading) -> Float[Array, ""]:
    """Minus the target's NLL over the reference's, from the same masks."""
    reference = nll_per_token(reading.reference, reading.plan)
    return -nll_per_token(reading.target, reading.plan) / jnp.maximum(reference, 1e-8)
