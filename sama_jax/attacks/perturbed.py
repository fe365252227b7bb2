"""Lowercase and Neighbor: the text against altered forms of itself, under the same masks.

Passes are split: every form of the text gets an equal share of the run's budget.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import Model, Params, Reading
from sama_jax.attacks.likelihood import LikelihoodProbes, likelihood_probes, nll_per_token
from sama_jax.attacks.queries import REFERENCE, TARGET, Procedure, Query
from sama_jax.attacks.registry import register
from sama_jax.attacks.views import Lowercase, Replaced
from sama_jax.config import AuditSettings
from sama_jax.core import losses, masking

SWAPPED = 0.05
"""Share of a text's tokens that a neighbour replaces, at least one token (`iamgroot42/mimir`)."""


def shared_probes(settings: AuditSettings, forms: int) -> LikelihoodProbes:
    """Makes likelihood probes for one of `forms` forms of a text: an equal share, at least one."""
    whole = likelihood_probes(settings)
    passes = max(1, whole.passes // forms)
    return LikelihoodProbes(passes, whole.estimator, whole.eps, whole.max_length)


def quotient(numerator: Float[Array, ""], denominator: Float[Array, ""]) -> Float[Array, ""]:
    """Divides; NaN instead of a division by zero."""
    return numerator / jnp.where(denominator > 0, denominator, jnp.nan)


def _lowercase_queries(settings: AuditSettings) -> dict[str, Query]:
    half = shared_probes(settings, 2)
    return {
        "text": Query(half, roles=TARGET),
        "lower": Query(half, Lowercase(), roles=TARGET),
    }


@register(
    "lowercase",
    queries=_lowercase_queries,
    access="loss",
    source="Carlini et al., arXiv 2012.07805; clearloveclearlove/DLM_MIA lowercase.py",
    undefined="lower case changes none of its tokens, or it has none",
)
def lowercase(reading: Reading) -> Float[Array, ""]:
    """Minus the target's NLL per token over that of the text in lower case."""
    lower = reading.views["lower"]
    own = nll_per_token(reading.target, reading.plan)
    return -quotient(own, nll_per_token(lower.target, lower.plan))


# --- neighbours ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeighborProposals(Procedure):
    """The reference's own suggestions: `count` times, mask a few tokens and take its best guess.

    A row's values are the token ids to put in place of those that it masked. Neither the token
    that stood there nor the mask token is proposed. One pass a row, all guesses of a row at once.
    """

    count: int
    max_length: int

    hashed_as = ("neighbors", SWAPPED)

    @property
    def passes(self) -> int:
        return self.count

    @property
    def rows(self) -> int:
        return self.count

    def masks(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> Bool[Array, "t l"]:
        """Draws what each neighbour of one text replaces."""
        counts = jnp.full(self.count, _swaps(self.max_length)[maskable.sum()])
        key = rng.for_purpose(key, rng.Purpose.NEIGHBOR_MASKS)
        return masking.fresh_masks(key, maskable, counts, self.max_length)

    def run(
        self,
        model: Model,
        params: Params,
        keys: Key[Array, " b"],
        tokens: Int[Array, "b l"],
        valid: Bool[Array, "b l"],
        maskable: Bool[Array, "b l"],
    ) -> Float[Array, "t b l"]:
        b, length = tokens.shape
        width = min(length, self.max_length)  # visible padding may be longer
        masks = jax.vmap(self.masks)(keys, maskable[:, :width]).swapaxes(0, 1)
        masks = jnp.pad(masks, ((0, 0), (0, 0), (0, length - width)))
        slots = max(1, int(np.rint(SWAPPED * width)))
        rows = jnp.arange(b)[:, None]

        def best(at: tuple[Array, Array]) -> Int[Array, ""]:
            hidden, token = at
            logits = model.logits(params, hidden).astype(jnp.float32)
            banned = jnp.stack([token, jnp.int32(model.mask_id)])
            return jnp.argmax(logits.at[banned].set(-jnp.inf)).astype(jnp.int32)

        def one(mask: Bool[Array, "b l"]) -> Float[Array, "b l"]:
            masked = jnp.where(mask, model.mask_id, tokens)
            stream = model.trunk(params, masked, valid, tokens)
            at = jnp.argsort(~mask, axis=1, stable=True)[:, :slots]
            hidden = model.last_hidden(params, stream, valid, at).reshape(b * slots, -1)
            found = jax.lax.map(
                best,
                (hidden, tokens[rows, at].reshape(-1)),
                batch_size=max(1, losses.HEAD_BYTES // (4 * model.vocab_size)),
            )
            values = jnp.where(mask[rows, at], found.reshape(b, slots), jnp.nan)
            return jnp.full((b, length), jnp.nan).at[rows, at].set(values)

        return jax.lax.map(one, masks)


def _swaps(max_length: int) -> Int[Array, " n"]:
    """Counts the tokens that a neighbour replaces, by text length."""
    length = np.arange(max_length + 1)
    return jnp.asarray(np.minimum(np.maximum(np.rint(SWAPPED * length), 1), length), jnp.int32)


def neighbors(settings: AuditSettings) -> int:
    """Returns K: with Q passes, about √Q masks are read in each of the 1 + K = Q / √Q texts.

    Masks and neighbours are both samples of the mean that is scored, so they share the budget
    evenly: 4 masks and 3 neighbours of 16 passes. At least one of each.
    """
    whole = likelihood_probes(settings).passes
    return max(1, whole // math.isqrt(whole) - 1)


def _neighbor_queries(settings: AuditSettings) -> dict[str, Query]:
    count = neighbors(settings)
    share = shared_probes(settings, 1 + count)
    proposals = NeighborProposals(count, settings.max_length)
    guide = Query(proposals, roles=REFERENCE)
    views = {str(i): Query(share, Replaced(i), roles=TARGET, guide=guide) for i in range(count)}
    return {"text": Query(share, roles=TARGET), **views}


@register(
    "neighbor",
    queries=_neighbor_queries,
    access="loss + reference",
    source="Mattern et al., arXiv 2305.18462; iamgroot42/mimir mimir/attacks/neighborhood.py",
)
def neighbor(reading: Reading) -> Float[Array, ""]:
    """How much lower the target's NLL is than on texts with a few tokens replaced.

    The neighbours are the reference model's, in place of a BERT's: it fills masks by itself.
    """
    others = jnp.stack([nll_per_token(r.target, r.plan) for r in reading.views.values()])
    return others.mean() - nll_per_token(reading.target, reading.plan)
