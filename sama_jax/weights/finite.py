"""Finds parameters that are no numbers, which every loss would inherit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sama_jax.arrays import Params

NAMED = 3
"""Parameters that a message names."""


@jax.jit
def _first(params: Params) -> Any:
    """Returns, for each parameter, how many values are not finite, and where the first is."""

    def look(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        broken = ~jnp.isfinite(x)
        # By axis: a flat index of a parameter of more than 2^31 values does not fit into int32.
        axes = [broken.any(tuple(j for j in range(x.ndim) if j != i)) for i in range(x.ndim)]
        place = jnp.array([jnp.argmax(axis) for axis in axes], jnp.int32)
        return broken.any(), place

    return jax.tree.map(look, params)


def not_finite(params: Params) -> str:
    """Names the parameters that hold NaN or an infinity, and where; "" if none does.

    Of each, the first row, column and so on that holds any; stacked layers come first.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    found = jax.device_get(jax.tree.leaves(_first(params)))
    names = []
    for (path, _), broken, place in zip(leaves, found[::2], found[1::2]):
        if broken:
            at = ", ".join(str(int(i)) for i in np.atleast_1d(place))
            names.append(f"{jax.tree_util.keystr(path, simple=True, separator='.')}[{at}]")
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
