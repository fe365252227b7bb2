"""Trains with differential privacy (DP-SGD, Abadi et al., arXiv 1607.00133); the unit is one text.

In each step every text takes part by a coin of its own (Poisson sampling), whatever its batch size
then is. The gradient of each text, under masks of its own, is scaled down to a norm of at most
`clip`; Gaussian noise of standard deviation `noise * clip` is added to their sum, which is divided
by the expected number of texts. Epsilon follows by the privacy-loss distribution (`dp_accounting`,
through `jax_privacy.accounting`), for neighbours that differ by one text more or less.

Coins and noise come from a secret of the operating system, not from the seed, which outputs tell:
who knows the noise can subtract it. The secret lies in `OUT/private`, for its owner's eyes alone,
so that a run that is continued tosses the same coins and adds the same noise, and spends nothing
twice. It is deleted with the checkpoints when the training is finished.

Noise is drawn in float32 from threefry with a key of 64 bits; that is no defence against whoever
exploits how floating-point numbers are spaced (Mironov, CCS 2012).
"""

import secrets
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import AnyArray, Model, Params, TextKeyData
from sama_jax.config import LEAST_NOISE, PrivacySettings
from sama_jax.errors import UsageError
from sama_jax.storage.files import write_atomic
from sama_jax.training import lora
from sama_jax.training.sequences import Padded
from sama_jax.training.step import Recipe, TrainState, loss_of_kind, updated

SECRET = "secret"
SECRET_BYTES = 32


class Plan(NamedTuple):
    """The mechanism of a run. Every number is public."""

    noise: float
    """Standard deviation of the noise over `clip`."""
    clip: float
    delta: float
    texts: int
    batch: int
    """Texts in a step on average."""
    steps: int

    @property
    def rate(self) -> float:
        """Returns the probability of a text to be in a step."""
        return self.batch / self.texts

    def epsilon(self, steps: int) -> float:
        """Returns epsilon at `delta` after so many steps."""
        return epsilon_of(self.noise, self.batch, self.texts, steps, self.delta)

    def told(self, steps: int) -> dict[str, Any]:
        """Returns what results say of a training that has made `steps`."""
        return {
            **{name: getattr(self, name) for name in ("noise", "clip", "delta", "rate", "texts")},
            "steps": steps,
            "epsilon": self.epsilon(steps),
            "unit": "one text, added or removed",
        }


# --- accounting -----------------------------------------------------------------------------------


def plan_of(
    settings: PrivacySettings, texts: int, batch: int, steps: int, noise: float | None = None
) -> Plan:
    """Returns the mechanism that settings ask for.

    Args:
      settings: with epsilon or with noise.
      texts: that are learned.
      batch: texts in a step on average.
      steps: of the whole training.
      noise: of a run that goes on; None finds it.

    Raises:
      UsageError: `jax_privacy` is not installed; more texts in a step than there are, or a delta
        that would allow to publish a whole text.
    """
    if batch > texts:
        raise UsageError(f"dp: batch_size is {batch}, but there are {texts} texts; lower it")
    if settings.delta >= 1 / texts:
        raise UsageError(
            f"dp.delta is {settings.delta:g}; expected less than one over the number of texts, "
            f"{1 / texts:.2g}: else publishing one of them would be private"
        )
    if noise is None:
        noise = settings.noise or noise_for(settings.epsilon, batch, texts, steps, settings.delta)
    return Plan(noise, settings.clip, settings.delta, texts, batch, steps)


def epsilon_of(noise: float, batch: int, texts: int, steps: int, delta: float) -> float:
    """Returns epsilon of `steps` Gaussian mechanisms on Poisson samples. Raises `UsageError`."""
    analysis, accountant = _accountant()
    params = analysis.DpParams(
        noise_multipliers=noise, num_samples=texts, delta=delta, batch_size=batch
    )
    return float(accountant.compute_epsilon(steps, params))


def noise_for(epsilon: float, batch: int, texts: int, steps: int, delta: float) -> float:
    """Returns the smallest noise multiplier, within 0.1 %, whose epsilon is at most the given.

    It is `LEAST_NOISE` at least.
    """

    def is_enough(noise: float) -> bool:
        return epsilon_of(noise, batch, texts, steps, delta) <= epsilon

    low, high = LEAST_NOISE, 1.0
    if is_enough(low):
        return low
    while not is_enough(high):
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _accountant() -> Any:
    """Returns the module of parameters, and an accountant by privacy-loss distributions."""
    _installed()
    from jax_privacy.accounting import accountants, analysis

    return analysis, analysis.DpsgdTrainingAccountant(accountants.PldAccountantConfig())


def _installed() -> None:
    try:
        import jax_privacy  # noqa: F401
    except ImportError:
        raise UsageError(
            "private training needs jax-privacy; pip install 'sama-jax[privacy]'"
        ) from None


# --- randomness -----------------------------------------------------------------------------------


def secret_of(folder: Path, new: bool) -> bytes:
    """Returns the secret of a run; a `new` one gets its own.

    Raises `UsageError` if the secret of a run that goes on is lost: with another one, what was
    spent before would be spent without being counted.
    """
    path = folder / SECRET
    if path.is_file():
        found = path.read_bytes()
        if len(found) == SECRET_BYTES:
            return found
    if not new:
        raise UsageError(
            f"{path}: the secret of this private training is lost, so that it cannot go on; "
            "delete the output folder to start over, and count what it has spent"
        )
    made = secrets.token_bytes(SECRET_BYTES)
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomic(path, made, private=True)
    return made


def sampled_rows(secret: bytes, step: int, texts: int, rate: float) -> Int[np.ndarray, " b"]:
    """Returns the rows of a step, each of all with probability `rate` and independent (host)."""
    seed = np.random.SeedSequence(int.from_bytes(secret, "little"), spawn_key=(step,))
    draw = np.random.default_rng(seed).random(texts)
    return np.flatnonzero(draw < rate).astype(np.int32)


# --- one step -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Texts of one piece of a step; all of its arrays have a row for each text."""

    tokens: Int[AnyArray, "b l"]
    valid: Bool[AnyArray, "b l"]
    learned: Bool[AnyArray, "b l"]
    keys: TextKeyData
    """Of the texts' own masks: they do not depend on who else is there."""


@partial(jax.jit, static_argnums=(0, 1))
def clipped_sum(
    model: Model,
    layout: lora.Layout | None,
    trained: Params,
    base: Params | None,
    batch: Batch,
    filling: Bool[Array, " b"],
    key: Key[Array, ""],
    clip: float | Float[Array, ""],
    eps: float | Float[Array, ""],
) -> tuple[Params, Float[Array, ""]]:
    """Computes the sum of the texts' gradients, each scaled down to a norm of at most `clip`.

    A text's loss is that of its kind, alone in a batch. Rows of `filling` count nothing.

    Returns:
      float32 gradients, and the sum of the losses.
    """
    from jax_privacy import clipping

    def loss(
        trained: Params, base: Params | None, one: Batch, key: Key[Array, ""], eps: Any
    ) -> Float[Array, ""]:
        mask_key = rng.of_text(key, TextKeyData(*(jnp.asarray(x)[0] for x in one.keys)))
        params = lora.beside(layout, base, trained)
        tokens, valid, learned = map(jnp.asarray, (one.tokens, one.valid, one.learned))
        return loss_of_kind(model, params, tokens, valid, mask_key, eps, learned)

    gradients = clipping.clipped_grad(
        loss, l2_clip_norm=cast(float, clip), batch_argnums=2, return_values=True, dtype=jnp.float32
    )
    sums, told = gradients(trained, base, batch, key, eps, is_padding_example=filling)
    return sums, jnp.where(filling, 0.0, told.values).sum()


@partial(jax.jit, donate_argnums=1)
def noisy_update(
    recipe: Recipe,
    state: TrainState,
    sums: Params,
    key: Key[Array, ""],
    deviation: float | Float[Array, ""],
    batch: int | Float[Array, ""],
) -> TrainState:
    """Adds noise of this standard deviation to summed gradients, and updates by their mean."""
    leaves, tree = jax.tree.flatten(sums)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        (x + deviation * jax.random.normal(k, x.shape, jnp.float32)) / batch
        for x, k in zip(leaves, keys)
    ]
    return updated(recipe, state, jax.tree.unflatten(tree, noisy))


class Mechanism(NamedTuple):
    """Makes the private steps of one run."""

    plan: Plan
    secret: bytes
    rows: int
    """Texts whose gradients are computed at once; the last piece of a step is filled up."""
    model: Model
    recipe: Recipe
    layout: lora.Layout | None
    base: Params | None
    padded: Padded
    keys: TextKeyData
    seed: int
    """Of the masks, which need not be secret."""

    def step(
        self, state: TrainState, number: int
    ) -> tuple[TrainState, Float[Array, ""], Int[np.ndarray, " b"]]:
        """Makes step `number`, counted from 0.

        Returns:
          the next state; the summed loss of the texts over their expected number; their rows.
        """
        plan = self.plan
        rows = sampled_rows(self.secret, number, plan.texts, plan.rate)
        mask_key = rng.run_key(self.seed, rng.Purpose.TRAINING_MASKS)
        mask_key = jax.random.fold_in(mask_key, number)
        sums, total = None, jnp.zeros(())
        for start in range(0, max(len(rows), 1), self.rows):
            piece = rows[start : start + self.rows]
            part, loss = self._piece(state.params, piece, mask_key)
            sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
            total = total + loss
        noise_key = rng.for_purpose(rng.secret_key(self.secret), rng.Purpose.NOISE)
        noise_key = jax.random.fold_in(noise_key, number)
        given = np.float32(plan.noise * plan.clip), np.float32(plan.batch)
        state = noisy_update(self.recipe, state, sums, noise_key, *given)
        return state, total / plan.batch, rows

    def _piece(self, trained: Params, rows: Int[np.ndarray, " b"], key: Key[Array, ""]) -> Any:
        filling = np.arange(self.rows) >= len(rows)
        rows = np.concatenate([rows, np.zeros(self.rows - len(rows), np.int32)])
        keys = TextKeyData(*(np.asarray(column)[rows] for column in self.keys))
        padded = self.padded
        batch = Batch(padded.tokens[rows], padded.valid(rows), padded.learned[rows], keys)
        given = self.model, self.layout, trained, self.base, batch, filling, key
        return clipped_sum(*given, np.float32(self.plan.clip), self.recipe.eps)
