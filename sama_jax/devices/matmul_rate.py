"""Measures how fast a device multiplies matrices, which bounds how fast it can score."""

import time

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_product = jax.jit(jnp.dot)


def matmul_rate(
    shape: tuple[int, int, int], dtype: DTypeLike, *, seconds: float = 0.1, at_once: int = 1
) -> float:
    """Returns the sustained rate of one matrix product, in floating-point operations a second.

    The mean over the time, not the fastest product: of many products of 1 ms the fastest was up to
    1.3 times as fast on a shared machine.

    Args:
      shape: (m, k, n) of an [m, k] times a [k, n] matrix.
      seconds: how long to multiply.
      at_once: products handed to the device before the host waits. A GPU multiplies small matrices
        faster than the host can wait for each.
    """
    m, k, n = shape
    # Random: a GPU multiplies ones faster, since fewer bits change.
    a, b = (jax.random.normal(jax.random.key(0), s, dtype) for s in ((m, k), (k, n)))
    _product(a, b).block_until_ready()
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        for _ in range(at_once - 1):
            _product(a, b)
        _product(a, b).block_until_ready()
        count += at_once
    return 2.0 * m * k * n * count / spent
