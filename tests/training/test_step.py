"""One step of training: the losses, the optimiser, the order of texts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PartialModel

from sama_jax.arrays import TextKeyData
from sama_jax.config import TrainSettings
from sama_jax.core import losses
from sama_jax.models.transformer import Architecture, TransformerModel
from sama_jax.training import step

SETTINGS = TrainSettings(epochs=8, batch_size=4, learning_rate=1e-2, max_length=24, seed=3)
ARCH = Architecture(
    vocab_size=50,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_size=8,
    mlp_width=24,
    tied=False,
    norm_eps=1e-5,
    rope_theta=1e4,
)


class TableModel(PartialModel):
    """Its parameters are the logits themselves, so a gradient shows which positions count."""

    mask_id, vocab_size, num_layers = 9, 10, 1

    def hidden(self, params, tokens, key_valid, clean=None):
        return params

    def logits(self, params, hidden):
        return hidden


@pytest.fixture(scope="module")
def tiny():
    model = TransformerModel(arch=ARCH, mask_id=49)
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    lengths = np.array([12, 7, 1, 10])
    valid = np.arange(12)[None] < lengths[:, None]
    tokens = np.where(valid, rng.integers(8, 49, (4, 12)), 7)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)


# --- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_loss_equals_a_naive_computation_from_the_same_masks(tiny, batch, shift: bool):
    """A shifted model's loss of a token is read from the output before it, at 0 from its own."""
    (model, params), (tokens, valid), key = tiny, batch, jax.random.key(5)
    loss_fn = jax.jit(step.loss_of_kind, static_argnums=0)
    shifted = dataclasses.replace(model, shift=shift)
    loss = loss_fn(shifted, params, tokens, valid, key, 1e-3)
    masks, p = map(np.asarray, step.diffusion_masks(key, valid, 1e-3))
    noised = jnp.where(masks, model.mask_id, tokens)
    forward = jax.jit(lambda p: model.logits(p, model.hidden(p, noised, valid)))
    logits = np.asarray(forward(params), np.float64)
    total = 0.0
    for row, column in zip(*np.nonzero(masks)):
        line = logits[row, max(column - 1, 0) if shift else column]
        total -= (line[tokens[row, column]] - np.log(np.exp(line).sum())) / p[row]
    assert masks.sum() > 0
    np.testing.assert_allclose(float(loss), total / valid.sum(), rtol=1e-5)


def test_chunked_loss_and_gradient_equal_the_whole(tiny, batch, monkeypatch):
    (model, params), (tokens, valid) = tiny, batch

    def loss(p):
        return step.loss_of_kind(model, p, tokens, valid, jax.random.key(5), 1e-3)

    whole = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(losses, "HEAD_BYTES", 11 * 50 * 4)  # 11 rows at a time, the last padded
    chunked = jax.jit(jax.value_and_grad(loss))(params)
    assert str(jax.make_jaxpr(loss)(params)).count("scan") > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, chunked)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive", "masked"])
def test_a_step_in_pieces_is_the_step_of_the_whole_batch(tiny, batch, kind):
    """Rows of 12, 7, 1 and 10 tokens: a mean of the pieces' means would be another one."""
    (model, params), (tokens, valid), key = tiny, batch, jax.random.key(5)
    model = dataclasses.replace(model, kind=kind)
    recipe = step.make_recipe(SETTINGS, 10)
    found = []
    for pieces in (1, 2, 4):
        state = step.init_state(jax.tree.map(jnp.copy, params), recipe)
        found.append(step.train_step(model, pieces, recipe, state, tokens, valid, key))
    (whole, loss), *others = found
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), whole.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-5
    for state, other in others:
        np.testing.assert_allclose(float(other), float(loss), rtol=1e-6)
        first = [s.opt_state[1][0].mu for s in (state, whole)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), *first)


def test_masks_follow_their_probability_and_spare_padding():
    valid = jnp.ones((2000, 64), bool).at[:, 40:].set(False)
    masks, p = map(np.asarray, step.diffusion_masks(jax.random.key(0), valid, 0.1))
    assert not masks[:, 40:].any()
    assert p.min() >= 0.1
    # A row's share of 40 draws has standard deviation at most 0.08: the mean of 2,000 is exact to
    # 0.0018, five of which are 0.009; p itself is uniform on [0.1, 1], mean 0.55 to 0.006.
    assert abs((masks[:, :40].mean(axis=1) - p).mean()) < 0.009
    assert abs(p.mean() - 0.55) < 0.03
    assert np.corrcoef(masks[:, :40].mean(axis=1), p)[0, 1] > 0.95


def test_every_masked_token_contributes_and_nothing_else_does(batch):
    tokens, valid = batch
    tokens, key = tokens % 9, jax.random.key(2)
    logits = jax.random.normal(jax.random.key(1), (*tokens.shape, 10))
    grads = jax.grad(lambda x: step.loss_of_kind(TableModel(), x, tokens, valid, key, 1e-3))(logits)
    masks, _ = step.diffusion_masks(key, valid, 1e-3)
    np.testing.assert_array_equal((np.asarray(grads) != 0).all(axis=-1), masks)
    np.testing.assert_array_equal((np.asarray(grads) != 0).any(axis=-1), masks)


def test_padding_has_exactly_no_gradient_and_no_influence(tiny, batch):
    (model, params), (tokens, valid) = tiny, batch
    key = jax.random.key(5)

    def run(tokens):
        fun = lambda p: step.loss_of_kind(model, p, tokens, valid, key, 1e-3)  # noqa: E731
        return jax.jit(jax.value_and_grad(fun))(params)

    loss, grads = run(tokens)
    rows = np.asarray(grads["embed"]["embedding"])
    assert (rows[7] == 0).all()  # the padding token
    masks, _ = step.diffusion_masks(key, valid, 1e-3)
    learning = np.asarray(masks).any(axis=1, keepdims=True)  # a row without a mask has no loss
    seen = np.unique(tokens[valid & ~np.asarray(masks) & learning])
    assert (rows[seen] != 0).any(axis=1).all()
    other, other_grads = run(jnp.where(valid, tokens, 3))
    assert float(loss) == float(other)
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)


# --- optimiser and batches -----------------------------------------------------------------------


def test_learning_rate_warms_up_and_decays_and_is_never_0():
    settings = TrainSettings(learning_rate=1.0, warmup_steps=4)
    recipe = step.make_recipe(settings, 10)
    rate = [float(step.learning_rate(recipe, i)) for i in range(11)]
    expected = [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    np.testing.assert_allclose(rate, expected, rtol=1e-6)


def test_automatic_warmup_is_a_tenth_of_the_steps_up_to_500():
    for steps, warmup in ((50, 5), (100_000, 500)):
        recipe = step.make_recipe(TrainSettings(learning_rate=1.0), steps)
        rate = step.learning_rate(recipe, 0)
        np.testing.assert_allclose(float(rate), 1 / warmup, rtol=1e-6)


def test_weight_decay_spares_norms(tiny):
    _, params = tiny
    settings = TrainSettings(warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
    optimizer = step.make_optimizer(step.make_recipe(settings, 10))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda p: optimizer.update(zeros, optimizer.init(p), p))(params)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        assert bool((update != 0).any()) == (path[-1].key in ("kernel", "embedding")), path


def test_each_epoch_is_a_permutation_and_batches_run_across_epochs():
    flat = np.concatenate([step.batch_rows(7, at, 4, 6) for at in range(6)])
    epochs = flat.reshape(4, 6)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(6), (4, 1)))
    assert len({tuple(e) for e in epochs}) > 1
    assert (step.batch_rows(8, 0, 6, 6) != flat[:6]).any()
    np.testing.assert_array_equal(np.bincount(step.batch_rows(7, 3, 30, 6)), [5] * 6)


def test_likelihood_bound_of_uniform_predictions_is_exact(batch):
    tokens, valid = batch
    keys = TextKeyData(jnp.arange(4, dtype=jnp.uint32), jnp.arange(4, dtype=jnp.uint32))
    nll = step.text_nll(TableModel(), 1, jnp.zeros((*tokens.shape, 10)), tokens % 9, valid, keys)
    np.testing.assert_allclose(nll, valid.sum(axis=1) * np.log(10), rtol=1e-5)


def test_bfloat16_changes_activations_only(tiny, batch):
    model, params = tiny
    tokens, valid = batch
    model = dataclasses.replace(model, dtype=jnp.dtype("bfloat16"))
    recipe = step.make_recipe(SETTINGS, 10)
    state = step.init_state(params, recipe)
    arrays = (jnp.asarray(tokens), jnp.asarray(valid), jax.random.key(0))
    after, loss = jax.eval_shape(partial(step.train_step, model, 1), recipe, state, *arrays)
    assert loss.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    hidden = jax.eval_shape(model.hidden, params, arrays[0], jnp.asarray(valid))
    assert hidden.dtype == jnp.bfloat16
    losses = [
        jax.jit(step.loss_of_kind, static_argnums=0)(m, params, tokens, valid, arrays[2], 1e-3)
        for m in (tiny[0], model)
    ]
    np.testing.assert_allclose(float(losses[0]), float(losses[1]), rtol=2e-2)


# --- prompts and responses -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive", "masked"])
def test_only_learned_tokens_are_masked_and_counted(batch, kind: str):
    tokens, valid = batch
    learned = valid & (jnp.arange(12) >= 5)[None]
    model = TableModel()
    model.kind = kind  # pyright: ignore[reportAttributeAccessIssue]
    for seed in range(20):
        made = step.objective_of_kind(model, tokens, learned, jax.random.key(seed), 1e-3)
        assert not (made.counted & ~learned).any()
        assert (np.asarray(made.seen) == np.asarray(tokens))[~np.asarray(learned)].all()
    # What is not learned is still seen: it changes the loss, but gets none of the gradient.
    logits = jax.random.normal(jax.random.key(0), (4, 12, 10))
    tokens = jnp.minimum(tokens, 8)
    given = tokens, valid, jax.random.key(1), 1e-3, learned
    grads = jax.grad(lambda p: step.loss_of_kind(model, p, *given))(logits)
    assert (np.abs(np.asarray(grads)).sum(axis=2) > 0)[~np.asarray(learned)].sum() == 0
    assert np.abs(np.asarray(grads)).sum() > 0


def test_everything_learned_is_the_same_as_no_choice(tiny, batch):
    (model, params), (tokens, valid), key = tiny, batch, jax.random.key(5)
    found = [
        float(step.loss_of_kind(model, params, tokens, valid, key, 1e-3, *more))
        for more in ((), (jnp.ones_like(valid),))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive", "masked"])
def test_held_out_losses_count_learned_tokens(kind: str):
    """Uniform predictions lose log v a token, whichever are masked."""
    tokens = jnp.full((2, 12), 3, jnp.int32)
    valid = jnp.arange(12)[None] < jnp.array([[12], [9]])
    learned = (jnp.arange(12) >= 4)[None] & valid
    keys = TextKeyData(np.array([1, 2], np.uint32), np.array([3, 4], np.uint32))
    uniform = jnp.zeros((2, 12, 10))
    found = step.HELD_OUT[kind](TableModel(), 1, uniform, tokens, valid, keys, learned)
    np.testing.assert_allclose(found, np.log(10) * np.array([8, 5]), rtol=1e-6)
    assert step.num_predicted(kind, np.asarray(learned)) == 13
    everything = step.num_predicted(kind, np.asarray(valid))
    assert everything == 21 - 2 * (kind == "autoregressive")
