"""Infilling extraction as a membership score: hide a part, let the target fill it, compare.

Extraction asks whether a hidden part comes back word by word (arXiv 2605.24173, of which only the
abstract was available); as a score of membership it is this project's suggestion, a control: what
a model can recite it was trained on. Two masks: `infill` reveals both edges and hides the middle
half, `infill:prefix` reveals the first half. Filling is greedy: in each pass the most confident
guesses are kept, equally many a pass.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax.arrays import Model, Params, Reading
from sama_jax.attacks.queries import TARGET, Procedure, Query
from sama_jax.attacks.registry import register
from sama_jax.config import AuditSettings
from sama_jax.core import losses

TIE_BREAK = 1e-3
"""Weight of the mean probability: less than one token in texts of fewer than 1,000 hidden ones."""


def hidden_part(maskable: Bool[Array, " l"], edges: bool) -> Bool[Array, " l"]:
    """Hides of n tokens the middle half, n//4..n - n//4, or the second half, (n+1)//2..n."""
    n = maskable.sum().astype(jnp.int32)
    number = jnp.cumsum(maskable) - 1
    start, stop = (n // 4, n - n // 4) if edges else ((n + 1) // 2, n)
    return maskable & (number >= start) & (number < stop)


@dataclass(frozen=True)
class GreedyFilling(Procedure):
    """Fills the hidden part in `passes` passes.

    Rows: 1 where the token came back and 0 where not; the probability of the true token in the
    pass in which its place was filled.
    """

    passes: int
    edges: bool

    hashed_as = ("greedy filling",)
    not_in_identity = ()
    rows = 2

    def run(
        self,
        model: Model,
        params: Params,
        keys: Key[Array, " b"],
        tokens: Int[Array, "b l"],
        valid: Bool[Array, "b l"],
        maskable: Bool[Array, "b l"],
    ) -> Float[Array, "t b l"]:
        del keys
        b, length = tokens.shape
        hidden = jax.vmap(lambda m: hidden_part(m, self.edges))(maskable)
        slots = (length + 1) // 2 + 1
        at = jnp.argsort(~hidden, axis=1, stable=True)[:, :slots]
        used = jnp.take_along_axis(hidden, at, axis=1)
        truth = jnp.take_along_axis(tokens, at, axis=1)
        rows = jnp.arange(b)[:, None]
        total = used.sum(axis=1).astype(jnp.int32)

        def guess(h: Array, token: Array) -> Float[Array, "c 3"]:
            logits = model.logits(params, h).astype(jnp.float32)
            if model.mask_id < logits.shape[1]:
                logits = logits.at[:, model.mask_id].set(-jnp.inf)  # no filling
            best = jnp.argmax(logits, axis=1)
            nll = losses.CHANNELS["nll"]
            confidence = -nll(logits, best)
            # Ids are exact in float32 below 2^24.
            return jnp.stack(
                [best.astype(jnp.float32), confidence, jnp.exp(-nll(logits, token))], 1
            )

        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            ids, filled, values = state
            stream = model.trunk(params, ids, valid)
            h = model.last_hidden(params, stream, valid, at).reshape(b * slots, -1)
            found = losses.in_chunks(guess, (h, truth.reshape(-1)), model.vocab_size)
            best, confidence, probability = found.reshape(b, slots, 3).transpose(2, 0, 1)
            open_ = used & ~filled
            # After pass i, ceil(total (i + 1) / passes) places are filled.
            target = -(-total * (i + 1) // self.passes)
            order = jnp.argsort(jnp.where(open_, -confidence, jnp.inf), axis=1, stable=True)
            rank = jnp.argsort(order, axis=1, stable=True)
            chosen = open_ & (rank < (target - filled.sum(axis=1))[:, None])
            best = best.astype(jnp.int32)
            now = jnp.stack([(best == truth).astype(jnp.float32), probability])
            old = jnp.take_along_axis(ids, at, axis=1)
            ids = ids.at[rows, at].set(jnp.where(chosen, best, old))
            return ids, filled | chosen, jnp.where(chosen[None], now, values)

        ids = jnp.where(hidden, model.mask_id, tokens)
        nothing = jnp.full((2, b, slots), jnp.nan, jnp.float32)
        state = (ids, jnp.zeros_like(used), nothing)
        _, _, values = jax.lax.fori_loop(0, self.passes, step, state)
        empty = jnp.full((2, b, length), jnp.nan, jnp.float32)
        return empty.at[:, rows, at].set(values)


def _recited(reading: Reading) -> Float[Array, ""]:
    read = reading.plan.scored[0]
    count = jnp.where(read.any(), read.sum(), jnp.nan)
    share, probability = jnp.where(read[None], reading.target, 0.0).sum(axis=1) / count
    return share + TIE_BREAK * probability


def _query(edges: bool):
    def queries(settings: AuditSettings) -> dict[str, Query]:
        filling = GreedyFilling(settings.budget, edges)
        return {"text": Query(filling, roles=TARGET)}

    return queries


_SOURCE = "arXiv 2605.24173 (extraction); as a score: this project"


@register(
    "infill",
    queries=_query(edges=True),
    access="sampling",
    source=_SOURCE,
    undefined="nothing is hidden of it",
)
def infill(reading: Reading) -> Float[Array, ""]:
    """Share of the text's middle half that the target fills in as it was, edges shown."""
    return _recited(reading)


@register(
    "infill:prefix",
    queries=_query(edges=False),
    access="sampling",
    source=_SOURCE,
    undefined="nothing is hidden of it",
)
def infill_prefix(reading: Reading) -> Float[Array, ""]:
    """Share of the text's second half that the target fills in as it was, the first shown."""
    return _recited(reading)
