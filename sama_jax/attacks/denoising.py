"""SecMI and PIA: attacks on image diffusion models, carried over to masked text."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import AnyArray, Model, Params, ProbePlan, Reading
from sama_jax.attacks.queries import TARGET, Probes, Procedure, Query
from sama_jax.attacks.registry import register
from sama_jax.config import AuditSettings
from sama_jax.core import losses, masking

_DLM_MIA = "clearloveclearlove/DLM_MIA attack/attacks/"


@dataclass(frozen=True)
class NoiseLevelProbes(Probes):
    """Pass k masks a share of the text that rises evenly from 10 to 80 %."""

    passes: int
    max_length: int

    hashed_as = ("noise levels",)

    def _counts(self, lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n t"]:
        """Counts masked tokens by length and pass, rounded down, at least 1 (host)."""
        # The share in 1/1000 as an integer: 0.1 x 10 must give 1 on every device.
        share = np.rint(np.linspace(100, 800, self.passes)).astype(np.int64)
        return np.minimum(np.maximum(lengths[:, None] * share // 1000, 1), lengths[:, None])

    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        key = rng.for_purpose(key, rng.Purpose.NOISE_LEVEL_MASKS)
        table = jnp.asarray(self._counts(np.arange(self.max_length + 1)).astype(np.int32))
        masks = masking.fresh_masks(key, maskable, table[maskable.sum()], self.max_length)
        weights = masks.any(axis=1) / jnp.arange(1, self.passes + 1)
        return ProbePlan.without_votes(masks, masks, weights.astype(jnp.float32))

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        return self._counts(np.array([length]))[0]


def noise_level_probes(settings: AuditSettings) -> NoiseLevelProbes:
    """Makes probes with one level for each pass of the budget."""
    return NoiseLevelProbes(settings.budget, settings.max_length)


def _weighted_error(reading: Reading, weights: Float[AnyArray, " t"]) -> Float[Array, ""]:
    """Averages, with weights over passes, the mean loss of the masked tokens."""
    plan = reading.plan
    total = jnp.where(plan.scored, reading.target, 0.0).sum(axis=1)
    means = total / jnp.maximum(plan.scored.sum(axis=1), 1)
    return (weights * means).sum() / jnp.where(weights.sum() > 0, weights.sum(), jnp.nan)


@register(
    "secmi",
    probes=noise_level_probes,
    needs_reference=False,
    access="masked logits",
    source="Duan et al., arXiv 2302.01316; " + _DLM_MIA + "secmi.py",
)
def secmi(reading: Reading) -> Float[Array, ""]:
    """Minus the loss at rising shares of masked tokens, the k-th weighted 1/k."""
    return -_weighted_error(reading, reading.plan.weights)


@register(
    "secmi:uniform",
    probes=noise_level_probes,
    needs_reference=False,
    access="masked logits",
    source=_DLM_MIA + "secmi.py, its option",
)
def secmi_uniform(reading: Reading) -> Float[Array, ""]:
    """Minus the loss at rising shares of masked tokens, all alike."""
    return -_weighted_error(reading, (reading.plan.weights > 0).astype(jnp.float32))


# --- PIA -----------------------------------------------------------------------------------------

MASKED_PERCENT = 30


@dataclass(frozen=True)
class LogitDistance(Procedure):
    """How far masking moves the logits of the masked tokens: two passes, three measures a token.

    Rows: mean squared difference over the vocabulary, mean absolute difference, difference of the
    losses (masked minus unmasked). 30 % of the tokens are masked, at least one, never all.
    """

    max_length: int

    hashed_as = ("logit distance", MASKED_PERCENT)
    passes = 2
    rows = 3

    def mask(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> Bool[Array, " l"]:
        """Draws what is masked of one text; nothing of a text of one token."""
        total = maskable.sum().astype(jnp.int32)
        count = jnp.minimum(jnp.maximum(total * MASKED_PERCENT // 100, 1), total - 1)
        key = rng.for_purpose(key, rng.Purpose.DISTANCE_MASKS)
        return masking.nested_masks(key, maskable, count[None], self.max_length)[0]

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
        mask = jax.vmap(self.mask)(keys, maskable[:, :width])
        mask = jnp.pad(mask, ((0, 0), (0, length - width)))
        slots = max(1, width * MASKED_PERCENT // 100)
        at = jnp.argsort(~mask, axis=1, stable=True)[:, :slots]

        def hidden(ids: Int[Array, "b l"]) -> Float[Array, "n d"]:
            stream = model.trunk(params, ids, valid, tokens)
            return model.last_hidden(params, stream, valid, at).reshape(b * slots, -1)

        def distances(plain: Array, masked: Array, token: Array) -> Float[Array, "c 3"]:
            logits = [model.logits(params, h).astype(jnp.float32) for h in (plain, masked)]
            change = logits[1] - logits[0]
            loss = [losses.CHANNELS["nll"](x, token) for x in logits]
            measures = (jnp.mean(change**2, axis=1), jnp.mean(jnp.abs(change), axis=1))
            return jnp.stack([*measures, loss[1] - loss[0]], axis=1)

        token = jnp.take_along_axis(tokens, at, axis=1).reshape(-1)
        rows = (hidden(tokens), hidden(jnp.where(mask, model.mask_id, tokens)), token)
        # Two arrays of logits at once: half the positions a chunk.
        found = losses.in_chunks(distances, rows, 2 * model.vocab_size)
        found = found.reshape(b, slots, 3).transpose(2, 0, 1)
        found = jnp.where(jnp.take_along_axis(mask, at, axis=1)[None], found, jnp.nan)
        empty = jnp.full((3, b, length), jnp.nan, jnp.float32)
        return empty.at[:, jnp.arange(b)[:, None], at].set(found)


def _distance_query(settings: AuditSettings) -> dict[str, Query]:
    return {"text": Query(LogitDistance(settings.max_length), roles=TARGET)}


_PIA = {
    "queries": _distance_query,
    "access": "logits, whole vocabulary",
    "source": "Kong et al., arXiv 2305.18355; " + _DLM_MIA + "pia.py",
    "undefined": "it needs at least two tokens",
}


def _distance(reading: Reading, row: int) -> Float[Array, ""]:
    values, read = reading.target[row], reading.plan.scored[row]
    count = read.sum()
    total = jnp.where(read, values, 0.0).sum()
    return -jnp.abs(total / jnp.where(count > 0, count, jnp.nan))


@register("pia", **_PIA)
def pia(reading: Reading) -> Float[Array, ""]:
    """Minus the mean squared change of a masked token's logits by masking it."""
    return _distance(reading, 0)


@register("pia:l1", **_PIA)
def pia_l1(reading: Reading) -> Float[Array, ""]:
    """Minus the mean absolute change of a masked token's logits by masking it."""
    return _distance(reading, 1)


@register("pia:loss", **_PIA)
def pia_loss(reading: Reading) -> Float[Array, ""]:
    """Minus the size of the mean change of a masked token's loss by masking it."""
    return _distance(reading, 2)
