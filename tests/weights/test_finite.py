"""NaN and infinity in parameters are named with their place."""

import jax.numpy as jnp
import numpy as np

from sama_jax.weights.finite import not_finite


def test_what_is_not_finite_is_named_with_its_place():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.ones(4), "c": jnp.ones(())}
    assert not_finite(params) == ""
    params["a"]["kernel"] = params["a"]["kernel"].at[1, 2].set(np.nan)
    params["b"] = params["b"].at[3].set(-np.inf)
    assert not_finite(params) == "a.kernel[1, 2], b[3]"
    assert not_finite({str(i): jnp.full(2, np.inf) for i in range(5)}) == (
        "0[0], 1[0], 2[0] and 2 more"
    )
