"""Estimates over repetitions: the wider of two intervals, and how often it holds."""

import numpy as np
import pytest

from sama_jax.core.pooling import pool


def test_one_repetition_keeps_its_interval():
    assert pool([0.7], [(0.6, 0.75)]) == (0.7, 0.6, 0.75, 1)


def test_equal_estimates_have_their_own_width_over_the_root_of_their_number():
    found = pool([0.7] * 4, [(0.6, 0.8)] * 4)
    assert found == pytest.approx((0.7, 0.65, 0.75, 4))


def test_estimates_that_differ_have_students_width():
    found = pool([0.6, 0.7, 0.8], [(0.59, 0.61), (0.69, 0.71), (0.79, 0.81)])
    assert found.mean == pytest.approx(0.7)
    half = 4.303 * 0.1 / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.7 - half, 0.7 + half), abs=1e-3)


@pytest.mark.parametrize("between", [0.0, 0.05])
def test_the_interval_of_three_seeds_holds(between: float):
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        truth = 0.7 + between * rng.normal(size=3)
        seen = truth + 0.02 * rng.normal(size=3)
        found = pool(seen.tolist(), [(x - 0.0392, x + 0.0392) for x in seen])
        held += found.low <= 0.7 <= found.high
    assert held / 500 >= 0.93
