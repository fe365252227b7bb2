"""The usual attacks in the form that next-token models have had them first: one unmasked pass.

A next-token model gives every token but the first one loss, of the tokens before it. They stand
beside `sama:ar`, from the same pass.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sama_jax.arrays import AnyArray, Reading
from sama_jax.attacks.queries import TARGET, Query
from sama_jax.attacks.registry import register
from sama_jax.attacks.sama_other_models import next_token_probes
from sama_jax.config import AuditSettings
from sama_jax.core import token_statistics

_ONE = {"kinds": ("autoregressive",), "undefined": "it needs at least two tokens"}


def _mean(losses: Float[AnyArray, "t l"], scored: Bool[AnyArray, "t l"]) -> Float[Array, ""]:
    """Averages the losses of one pass, in nats; NaN where nothing is predicted."""
    return token_statistics.mean(token_statistics.token_means(losses, scored))


@register(
    "loss:ar",
    probes=next_token_probes,
    needs_reference=False,
    access="loss",
    source="Yeom et al., arXiv 1709.01604",
    **_ONE,
)
def loss_ar(reading: Reading) -> Float[Array, ""]:
    """Minus the target's next-token loss per token."""
    return -_mean(reading.target, reading.plan.scored)


@register(
    "zlib:ar",
    probes=next_token_probes,
    needs_reference=False,
    access="loss",
    source="Carlini et al., arXiv 2012.07805",
    **_ONE,
)
def zlib_ar(reading: Reading) -> Float[Array, ""]:
    """Minus the target's next-token loss per token, over the text's zlib-compressed bytes."""
    return loss_ar(reading) / reading.zlib_bytes


@register(
    "ratio:ar",
    probes=next_token_probes,
    access="loss + reference",
    source="Carlini et al., arXiv 2012.07805; calibration of arXiv 2111.08440",
    **_ONE,
)
def ratio_ar(reading: Reading) -> Float[Array, ""]:
    """Minus the target's next-token loss over the reference's."""
    reference = _mean(reading.reference, reading.plan.scored)
    return loss_ar(reading) / jnp.maximum(reference, 1e-8)


@register(
    "mink:ar",
    probes=next_token_probes,
    needs_reference=False,
    access="loss of every token",
    source="Shi et al., arXiv 2310.16789",
    **_ONE,
)
def mink_ar(reading: Reading, settings: AuditSettings) -> Float[Array, ""]:
    """Mean log-probability of the text's least likely next tokens (lowest 20 %)."""
    likelihood = token_statistics.token_means(-reading.target, reading.plan.scored)
    return token_statistics.lower_tail(likelihood, settings.tail.fraction)


@register(
    "mink++:ar",
    queries=lambda settings: {
        "text": Query(next_token_probes(settings), None, ("nll", "mean", "deviation"), TARGET)
    },
    access="logits, whole vocabulary",
    source="Zhang et al., arXiv 2404.02936",
    **_ONE,
)
def minkpp_ar(reading: Reading, settings: AuditSettings) -> Float[Array, ""]:
    """Min-K% of next-token log-probabilities normalised by their mean and spread."""
    normalised = token_statistics.standardised(reading)
    return token_statistics.lower_tail(normalised, settings.tail.fraction)
