"""Texts drawn from a model follow its distribution, in an order that it can read."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sama_jax import rng
from sama_jax.core.sampling import filling_order, sample_texts

JOINT = np.array([[0.2, 0.02, 0.08], [0.02, 0.1, 0.08], [0.05, 0.15, 0.3]])
"""Of both tokens of a text."""
MASK = 3


class Pairs(tiny.PartialModel):
    """Texts of two tokens under `JOINT`: each token is predicted exactly from the other."""

    vocab_size, mask_id = 4, MASK

    def __init__(self, kind: str = "diffusion", block: int | None = None):
        self.kind = kind
        self.arch = SimpleNamespace(block_length=block)

    def trunk(self, params, tokens, key_valid, clean=None):
        return tokens

    def last_hidden(self, params, stream, key_valid, positions):
        beside = jnp.take_along_axis(stream, 1 - positions, axis=1)
        return jnp.stack([positions, beside], axis=2).astype(jnp.float32)

    def logits(self, params, hidden):
        """The last row of each table is for a masked token beside: then the marginal counts."""
        first, second = (np.vstack([t / t.sum(1)[:, None], t.sum(0)]) for t in (JOINT.T, JOINT))
        tables = np.pad(np.stack([first, second]), ((0, 0), (0, 0), (0, 1)), constant_values=1e-9)
        place, beside = (hidden[:, i].astype(int) for i in (0, 1))
        return jnp.log(jnp.array(tables, jnp.float32))[place, beside]


def drawn(model: Pairs, count: int = 4000, temperature: float = 1.0, **changes) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    allowed = jnp.array(changes.get("allowed", [True] * 3 + [False]))
    draw = jax.jit(lambda k: sample_texts(model, {}, k, allowed, jnp.float32(temperature), 2))
    return np.asarray(draw(keys))


def table_of(texts: np.ndarray) -> np.ndarray:
    return np.bincount(3 * texts[:, 0] + texts[:, 1], minlength=9).reshape(3, 3) / len(texts)


def test_at_temperature_1_texts_follow_the_joint_distribution_in_any_order():
    """4,000 draws: a share has a standard deviation of at most .008."""
    np.testing.assert_allclose(table_of(drawn(Pairs())), JOINT, atol=0.032)


def test_a_higher_temperature_is_flatter_and_what_is_not_allowed_is_not_drawn():
    hot = table_of(drawn(Pairs(), temperature=100.0))
    np.testing.assert_allclose(hot, np.full((3, 3), 1 / 9), atol=0.025)
    assert set(drawn(Pairs(), allowed=[True, True, False, False]).ravel().tolist()) == {0, 1}


def test_the_first_token_of_a_next_token_model_is_uniform():
    first = drawn(Pairs("autoregressive", 1))[:, 0]
    np.testing.assert_allclose(np.bincount(first, minlength=3) / len(first), 1 / 3, atol=0.03)


@pytest.mark.parametrize("block", [None, 1, 4])
def test_the_order_is_random_inside_blocks_and_blocks_go_from_left_to_right(block: int | None):
    keys = rng.step_keys(jax.random.key(1), 300)
    orders = np.asarray(jax.vmap(lambda k: filling_order(k, 10, block))(keys))
    assert (np.sort(orders, axis=1) == np.arange(10)).all()
    numbers = orders // (block or 10)
    assert (np.diff(numbers, axis=1) >= 0).all()
    seen = {tuple(order) for order in orders.tolist()}
    assert len(seen) == (1 if block == 1 else 300) or (block == 4 and len(seen) > 250)
