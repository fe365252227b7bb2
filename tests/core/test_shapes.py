"""In the test run, an argument of a wrong shape is refused where it is passed, by its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxtyping import TypeCheckError

from sama_jax.core import losses, token_statistics
from sama_jax.models.registry import read_config
from sama_jax.models.transformer import TransformerModel


def test_a_statistic_refuses_a_wrong_shape():
    with pytest.raises(TypeCheckError, match=r"token_means[\s\S]*parameter 'scored'"):
        token_statistics.token_means(jnp.zeros((2, 5)), jnp.zeros((2, 4), bool))


def test_a_model_refuses_a_wrong_shape():
    family = read_config(tiny.config(), "tiny")
    model = TransformerModel(arch=family.arch, mask_id=tiny.MASK_ID)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens, valid = jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 4), bool)
    with pytest.raises(TypeCheckError, match=r"hidden[\s\S]*parameter 'key_valid'"):
        jax.eval_shape(model.hidden, params, tokens, valid)


def test_a_host_function_refuses_a_wrong_shape():
    with pytest.raises(TypeCheckError, match=r"slot_sizes[\s\S]*parameter 'bounds'"):
        losses.slot_sizes(np.zeros((2, 3), int), 8)
