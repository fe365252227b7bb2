"""Defines training as pure functions: losses, the optimiser, one step, held-out losses.

Sources of the losses: for diffusion `GUIDELINES.md` in `ML-GSAI/LLaDA`, and
`trainer/misc/trainer.py` in `Stry233/SAMA`, which computes the same; for masked language models
arXiv 1810.04805, section 3.1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from sama_jax import rng
from sama_jax.arrays import Model, Params, TextKeyData
from sama_jax.config import TrainSettings
from sama_jax.core import losses, masking
from sama_jax.training import lora

EVAL_PASSES = 8
"""Forward passes of the held-out loss; next-token models need one, which is exact."""
MASKED_PERCENT = 15
"""Percentage of a text that a masked language model learns to fill in (arXiv 1810.04805)."""


# --- losses --------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """Says what a model sees of a batch, and what its losses count for.

    The loss is the sum over the counted tokens of `CE / share`, over `total`.
    """

    seen: Int[Array, "b l"]
    """Tokens of the input; some of them may be masked."""
    counted: Bool[Array, "b l"]
    share: Float[Array, " b"]
    """What the losses of a row are divided by: the probability of its masks, or 1."""
    total: Float[Array, ""]


def _nll_everywhere(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    seen: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
) -> Float[Array, "b l"]:
    """Computes the loss of every token in nats, from an input `seen` that may hide some of them."""
    hidden = model.hidden(params, seen, valid, tokens)
    b, length = tokens.shape
    nll = losses.token_nll(model, params, hidden.reshape(b * length, -1), tokens.reshape(-1))
    return nll.reshape(b, length)


def diffusion_masks(
    key: Key[Array, ""], valid: Bool[Array, "b l"], eps: float | Float[Array, ""]
) -> tuple[Bool[Array, "b l"], Float[Array, " b"]]:
    """Draws the masks of a batch: `(masks, p)`.

    A position of a row is masked with probability `p = (1 - eps) t + eps`, t ~ U(0, 1).
    """
    row_key, position_key = jax.random.split(key)
    p = (1 - eps) * jax.random.uniform(row_key, valid.shape[:1]) + eps
    return valid & (jax.random.uniform(position_key, valid.shape) < p[:, None]), p


def diffusion_objective(
    mask_id: int,
    tokens: Int[Array, "b l"],
    learned: Bool[Array, "b l"],
    key: Key[Array, ""],
    eps: float | Float[Array, ""],
) -> Objective:
    """Draws LLaDA's objective: the sum over masked tokens of CE / p, over all that are learned.

    Padding and prompts are not learned: they are never masked, and not counted. Source:
    `GUIDELINES.md` in `ML-GSAI/LLaDA`, where every position of a batch is learned. (Of prompts and
    responses it divides each loss by the tokens of its own response, so that short ones weigh more;
    here all tokens weigh alike, as by default in `ZHZisZZ/dllm`.)
    """
    masks, p = diffusion_masks(key, learned, eps)
    return Objective(jnp.where(masks, mask_id, tokens), masks, p, _at_least_one(learned))


def next_token_objective(tokens: Int[Array, "b l"], learned: Bool[Array, "b l"]) -> Objective:
    """Returns the mean over all learned tokens but each text's first."""
    counted = _predicted(learned)
    return Objective(tokens, counted, jnp.ones(len(tokens)), _at_least_one(counted))


def _predicted(valid: Bool[Array, "b l"]) -> Bool[Array, "b l"]:
    """Marks the tokens that a next-token model predicts: nothing stands before a first one."""
    return valid & (jnp.arange(valid.shape[1]) > 0)[None, :]


def _or_all(learned: Bool[Array, "b l"] | None, valid: Bool[Array, "b l"]) -> Bool[Array, "b l"]:
    """Returns the tokens that are learned and counted; without any choice, all that are valid."""
    return valid if learned is None else valid & learned


def _at_least_one(counted: Bool[Array, "b l"]) -> Float[Array, ""]:
    return jnp.maximum(counted.sum(), 1).astype(jnp.float32)


def fixed_share_masks(key: Key[Array, ""], valid: Bool[Array, " l"]) -> Bool[Array, " l"]:
    """Draws 15 % of a text's valid tokens, rounded, at least one; none of a text without tokens.

    Source of the count: `create_pretraining_data.py` in `google-research/bert`.
    """
    num = valid.sum()
    count = jnp.maximum((MASKED_PERCENT * num + 50) // 100, 1)
    return masking.random_ranks(key, valid, valid.shape[0]) < jnp.minimum(count, num)


def masked_objective(
    mask_id: int, tokens: Int[Array, "b l"], learned: Bool[Array, "b l"], key: Key[Array, ""]
) -> Objective:
    """Draws the mean over 15 % of the learned tokens, all replaced by the mask token.

    This is BERT's objective except that BERT leaves a tenth of them as they are and replaces
    another tenth by random tokens, for the sake of inputs without masks, which nothing here reads.
    """
    masks = jax.vmap(fixed_share_masks)(jax.random.split(key, len(tokens)), learned)
    seen = jnp.where(masks, mask_id, tokens)
    return Objective(seen, masks, jnp.ones(len(tokens)), _at_least_one(masks))


def objective_of_kind(
    model: Model,
    tokens: Int[Array, "b l"],
    learned: Bool[Array, "b l"],
    key: Key[Array, ""],
    eps: float | Float[Array, ""],
) -> Objective:
    """Draws the objective of the model's kind; only diffusion reads `eps`."""
    if model.kind == "autoregressive":
        return next_token_objective(tokens, learned)
    if model.kind == "masked":
        return masked_objective(model.mask_id, tokens, learned, key)
    return diffusion_objective(model.mask_id, tokens, learned, key, eps)


def loss_of_kind(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    key: Key[Array, ""],
    eps: float | Float[Array, ""],
    learned: Bool[Array, "b l"] | None = None,
) -> Float[Array, ""]:
    """Draws the objective of the model's kind for a batch, and computes it."""
    objective = objective_of_kind(model, tokens, _or_all(learned, valid), key, eps)
    return loss_of(model, params, tokens, valid, objective)


def loss_of(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    objective: Objective,
) -> Float[Array, ""]:
    """Computes an objective in nats; of some rows of a batch, their part of the batch's loss."""
    nll = _nll_everywhere(model, params, tokens, objective.seen, valid)
    divided = jnp.where(objective.counted, nll / objective.share[:, None], 0.0)
    return divided.sum() / objective.total


# --- optimiser and step --------------------------------------------------------------------------


class TrainState(NamedTuple):
    """Holds what training carries from step to step: float32, and integer counters."""

    params: Params
    """What is trained: all weights, or an adapter."""
    opt_state: Any
    step: Int[Array, ""]


class Recipe(NamedTuple):
    """Holds the numbers of a run as float32 scalars, so that runs of one shape share a program."""

    learning_rate: Any
    warmup_steps: Any
    steps: Any
    weight_decay: Any
    grad_clip: Any
    eps: Any


def make_recipe(settings: TrainSettings, steps: int) -> Recipe:
    """Returns the numbers of a run of `steps` steps."""
    warmup = settings.warmup_steps
    if warmup < 0:
        warmup = min(steps // 10, 500)
    numbers = (settings.learning_rate, warmup, steps, settings.weight_decay, settings.grad_clip)
    return Recipe(*(np.float32(x) for x in (*numbers, settings.eps)))


def learning_rate(recipe: Recipe, step: Any) -> Any:
    """Returns the rate of a step: linear warm-up, then linear decay to 0 after the last step."""
    up = (step + 1) / jnp.maximum(recipe.warmup_steps, 1)
    down = (recipe.steps - step) / jnp.maximum(recipe.steps - recipe.warmup_steps, 1)
    return recipe.learning_rate * jnp.minimum(jnp.minimum(up, down), 1.0)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Makes AdamW with global-norm clipping, and weight decay on kernels and embeddings only.

    The matrices of an adapter are named by the kernels that they are for.
    """

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key.rpartition(".")[2] in ("kernel", "embedding"), params
        )

    rate = partial(learning_rate, recipe)
    return optax.chain(
        optax.clip_by_global_norm(recipe.grad_clip),
        optax.adamw(rate, weight_decay=recipe.weight_decay, mask=decayed),
    )


def init_state(params: Params, recipe: Recipe) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(params, make_optimizer(recipe).init(params), jnp.zeros((), jnp.int32))


def _gradients(
    loss: Callable[..., Float[Array, ""]],
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    objective: Objective,
    pieces: int,
) -> tuple[Float[Array, ""], Params]:
    """Computes the loss of a batch and its gradients, `b / pieces` rows at a time."""
    compute = jax.value_and_grad(loss)
    if pieces == 1:
        return compute(params, tokens, valid, objective)

    def add(sums: tuple[Array, Params], rows: tuple[Array, ...]) -> tuple[Any, None]:
        tokens, valid, seen, counted, share = rows
        part = Objective(seen, counted, share, objective.total)
        return jax.tree.map(jnp.add, sums, compute(params, tokens, valid, part)), None

    cut = (tokens, valid, objective.seen, objective.counted, objective.share)
    cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), cut)
    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, nothing, cut)[0]


@partial(jax.jit, static_argnums=(0, 1), static_argnames="layout", donate_argnums=3)
def train_step(
    model: Model,
    pieces: int,
    recipe: Recipe,
    state: TrainState,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    key: Key[Array, ""],
    learned: Bool[Array, "b l"] | None = None,
    *,
    layout: lora.Layout | None = None,
    base: Params | None = None,
) -> tuple[TrainState, Float[Array, ""]]:
    """Updates once, on one batch, whose losses are computed in as many `pieces` one by one.

    `key` is the run's, and the step is folded in here. Valid tokens that are not `learned` are only
    seen; without it all are learned. With a `layout`, what is trained is an adapter of `base`.

    Donates `state`. Returns the next state and the loss before the update. Everything that differs
    between two runs is an argument, so pre-training and fine-tuning share one program.
    """
    mask_key = jax.random.fold_in(key, state.step)
    objective = objective_of_kind(model, tokens, _or_all(learned, valid), mask_key, recipe.eps)

    def compute(trained: Params, *batch: Any) -> Float[Array, ""]:
        return loss_of(model, lora.beside(layout, base, trained), *batch)

    loss, grads = _gradients(compute, state.params, tokens, valid, objective, pieces)
    return updated(recipe, state, grads), loss


def updated(recipe: Recipe, state: TrainState, grads: Params) -> TrainState:
    """Returns the state after one step of the optimiser."""
    updates, opt_state = make_optimizer(recipe).update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def batch_rows(seed: int, step: int, batch_size: int, num: int) -> Int[np.ndarray, " b"]:
    """Returns the rows of a step, int32 (host): each epoch is a permutation, joined end to end.

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
    seed: int | Integer[Array, ""],
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    keys: TextKeyData,
    learned: Bool[Array, "b l"] | None = None,
) -> Float[Array, " b"]:
    """Estimates an upper bound on each text's negative log-likelihood in nats, by exact counts."""
    length, counted = tokens.shape[1], _or_all(learned, valid)

    def plan(data: TextKeyData, row: Bool[Array, " l"]):
        key = rng.for_purpose(rng.text_key(seed, data), rng.Purpose.LIKELIHOOD_MASKS)
        count_key, mask_key = jax.random.split(key)
        counts = masking.exact_counts(count_key, row.sum(), EVAL_PASSES)
        return counts, masking.fresh_masks(mask_key, row, counts, length)

    counts, masks = jax.vmap(plan)(keys, counted)
    num = counted.sum(axis=1)

    def one_pass(args: tuple[Array, Array]) -> Float[Array, " b"]:
        mask, count = args
        nll = _nll_everywhere(model, params, tokens, jnp.where(mask, model.mask_id, tokens), valid)
        return jnp.where(mask, nll, 0.0).sum(axis=1) * num / jnp.maximum(count, 1)

    return jax.lax.map(one_pass, (masks.swapaxes(0, 1), counts.T)).mean(axis=0)


@partial(jax.jit, static_argnums=0)
def next_token_nll(
    model: Model,
    seed: int | Integer[Array, ""],
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    keys: TextKeyData,
    learned: Bool[Array, "b l"] | None = None,
) -> Float[Array, " b"]:
    """Computes each text's exact negative log-likelihood in nats, given its first token."""
    nll = _nll_everywhere(model, params, tokens, tokens, valid)
    return jnp.where(_predicted(_or_all(learned, valid)), nll, 0.0).sum(axis=1)


@partial(jax.jit, static_argnums=0)
def masked_nll(
    model: Model,
    seed: int | Integer[Array, ""],
    params: Params,
    tokens: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    keys: TextKeyData,
    learned: Bool[Array, "b l"] | None = None,
) -> Float[Array, " b"]:
    """Computes each text's length times the mean loss of its masked tokens in nats, 15 % a pass."""
    counted = _or_all(learned, valid)

    def plan(data: TextKeyData, row: Bool[Array, " l"]) -> Bool[Array, "t l"]:
        key = rng.for_purpose(rng.text_key(seed, data), rng.Purpose.LIKELIHOOD_MASKS)
        return jax.vmap(lambda k: fixed_share_masks(k, row))(rng.step_keys(key, EVAL_PASSES))

    masks = jax.vmap(plan)(keys, counted)

    def one_pass(mask: Bool[Array, "b l"]) -> Float[Array, " b"]:
        nll = _nll_everywhere(model, params, tokens, jnp.where(mask, model.mask_id, tokens), valid)
        return jnp.where(mask, nll, 0.0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)

    return jax.lax.map(one_pass, masks.swapaxes(0, 1)).mean(axis=0) * counted.sum(axis=1)


HELD_OUT = {"diffusion": text_nll, "autoregressive": next_token_nll, "masked": masked_nll}
"""Kind of a model -> the function that computes the held-out loss of each text in nats.

It counts the tokens that are `learned`; without a choice, all that are valid.
"""


def num_predicted(kind: str, learned: Bool[np.ndarray, "n l"]) -> int:
    """Counts the tokens that the held-out losses of texts stand for (host)."""
    return int(learned[:, int(kind == "autoregressive") :].sum())
