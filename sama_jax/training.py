"""Masked-diffusion training as pure functions: masks, loss, optimiser, one step, one evaluation.

Source of the loss: `GUIDELINES.md` in `ML-GSAI/LLaDA`, and `trainer/misc/trainer.py` in
`Stry233/SAMA`, which computes the same.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from sama_jax import losses, probes, rng
from sama_jax.config import TrainSettings
from sama_jax.types import Model, Params, TextKeyData

EVAL_PASSES = 8
"""Forward passes of the held-out likelihood bound."""


# --- loss ----------------------------------------------------------------------------------------


class LossAux(NamedTuple):
    """What a loss was computed from."""

    num_masked: Int[Array, ""]
    num_valid: Int[Array, ""]


def diffusion_masks(
    key: Key[Array, ""], valid: Bool[Array, "b l"], eps: float | Float[Array, ""]
) -> tuple[Bool[Array, "b l"], Float[Array, " b"]]:
    """Masks of one batch, and each row's probability `p = (1 - eps) t + eps` with t ~ U(0, 1)."""
    row_key, position_key = jax.random.split(key)
    p = (1 - eps) * jax.random.uniform(row_key, valid.shape[:1]) + eps
    return valid & (jax.random.uniform(position_key, valid.shape) < p[:, None]), p


def diffusion_loss(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    key: Key[Array, ""],
    eps: float | Float[Array, ""],
) -> tuple[Float[Array, ""], LossAux]:
    """LLaDA's training loss in nats: sum over masked tokens of CE / p, over all valid tokens.

    Positions that are not valid are hidden from attention, never masked, and not counted.
    Source: `GUIDELINES.md` in `ML-GSAI/LLaDA`, where every position of a batch is valid.
    """
    masks, p = diffusion_masks(key, valid, eps)
    hidden = model.hidden(params, jnp.where(masks, model.mask_id, tokens), valid)
    if model.shift:  # the output at i - 1 predicts token i; position 0 keeps its own
        hidden = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    b, length = tokens.shape
    nll = losses.token_nll(model, params, hidden.reshape(b * length, -1), tokens.reshape(-1))
    weighted = jnp.where(masks, nll.reshape(b, length) / p[:, None], 0.0)
    num_valid = valid.sum()
    loss = weighted.sum() / jnp.maximum(num_valid, 1).astype(jnp.float32)
    return loss, LossAux(masks.sum(), num_valid)


# --- optimiser and step --------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that training carries from step to step, float32 but for counters."""

    params: Params
    opt_state: Any
    step: Int[Array, ""]


class Recipe(NamedTuple):
    """Numbers of a run as float32 scalars: arguments of a step, so runs of one shape share it."""

    learning_rate: Any
    warmup_steps: Any
    steps: Any
    weight_decay: Any
    grad_clip: Any
    eps: Any


def make_recipe(settings: TrainSettings, steps: int) -> Recipe:
    """The numbers of a run of `steps` steps."""
    warmup = settings.warmup_steps
    if warmup < 0:
        warmup = min(steps // 10, 500)
    numbers = (settings.learning_rate, warmup, steps, settings.weight_decay, settings.grad_clip)
    return Recipe(*(np.float32(x) for x in (*numbers, settings.eps)))


def learning_rate(recipe: Recipe, step: Any) -> Any:
    """Linear warm-up, then linear decay to 0 after the last step; no step has rate 0."""
    up = (step + 1) / jnp.maximum(recipe.warmup_steps, 1)
    down = (recipe.steps - step) / jnp.maximum(recipe.steps - recipe.warmup_steps, 1)
    return recipe.learning_rate * jnp.minimum(jnp.minimum(up, down), 1.0)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; weight decay on kernels and embeddings only."""

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key in ("kernel", "embedding"), params
        )

    rate = partial(learning_rate, recipe)
    return optax.chain(
        optax.clip_by_global_norm(recipe.grad_clip),
        optax.adamw(rate, weight_decay=recipe.weight_decay, mask=decayed),
    )


def init_state(params: Params, recipe: Recipe) -> TrainState:
    """The state before the first step."""
    return TrainState(params, make_optimizer(recipe).init(params), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def train_step(
    model: Model,
    recipe: Recipe,
    state: TrainState,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    key: Key[Array, ""],
) -> tuple[TrainState, Float[Array, ""]]:
    """One update on one batch; `key` is the run's, and the step is folded in here.

    Donates `state`. Returns the next state and the loss before the update. Everything that differs
    between two runs is an argument, so pre-training and fine-tuning share one program.
    """
    mask_key = jax.random.fold_in(key, state.step)

    def loss_fn(params):
        return diffusion_loss(model, params, tokens, valid, mask_key, recipe.eps)

    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = make_optimizer(recipe).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), loss


def batch_rows(seed: int, step: int, batch_size: int, num: int) -> np.ndarray:
    """Texts of a step, int32 [batch_size] (host): a permutation an epoch, joined end to end.

    So a batch that crosses an epoch's end takes its rest from the next epoch: no row is filling.
    """
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, np.int32)
    for epoch in np.unique(place // num):
        order = np.random.default_rng([seed, int(epoch)]).permutation(num)
        inside = place // num == epoch
        rows[inside] = order[place[inside] % num]
    return rows


# --- held-out loss -------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def text_nll(
    model: Model,
    seed: int | UInt[Array, ""],
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    keys: TextKeyData,
) -> Float[Array, " b"]:
    """Upper bound on each text's negative log-likelihood in nats: the exact-count estimate."""
    length = tokens.shape[1]

    def plan(data: TextKeyData, row: Bool[Array, " l"]):
        key = rng.for_purpose(rng.text_key(seed, data), rng.Purpose.LIKELIHOOD_MASKS)
        count_key, mask_key = jax.random.split(key)
        counts = probes.exact_counts(count_key, row.sum(), EVAL_PASSES)
        return counts, probes.fresh_masks(mask_key, row, counts, length)

    counts, masks = jax.vmap(plan)(keys, valid)
    num = valid.sum(axis=1)

    def one_pass(args: tuple[Array, Array]) -> Float[Array, " b"]:
        mask, count = args
        hidden = model.hidden(params, jnp.where(mask, model.mask_id, tokens), valid)
        if model.shift:
            hidden = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
        flat = hidden.reshape(-1, hidden.shape[-1])
        nll = losses.token_nll(model, params, flat, tokens.reshape(-1)).reshape(mask.shape)
        return jnp.where(mask, nll, 0.0).sum(axis=1) * num / jnp.maximum(count, 1)

    return jax.lax.map(one_pass, (masks.swapaxes(0, 1), counts.T)).mean(axis=0)
