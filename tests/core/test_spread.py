"""How loss differences depend on masks, against loops."""

import numpy as np
import pytest

from sama_jax.core.spread import QUANTILES, spread


def test_numbers_are_those_of_loops():
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(30, 4)), np.array([0, 1, -1] * 10)
    found = spread(values, np.array([0.05, 0.1, 0.2, 0.5]), labels)
    assert found is not None
    assert found["densities"] == [0.05, 0.1, 0.2, 0.5]
    assert list(found["classes"]) == ["members", "non-members", "texts without a label"]
    for name, label in (("members", 1), ("non-members", 0)):
        own, said = [v for v, y in zip(values, labels) if y == label], found["classes"][name]
        assert said["texts"] == 10
        for number in range(4):
            wanted = [np.quantile([v[number] for v in own], q) for q in QUANTILES]
            assert said["by_pass"][number] == pytest.approx(wanted, rel=1e-12)
        sds = [(sum((x - sum(v) / 4) ** 2 for x in v) / 4) ** 0.5 for v in own]
        assert said["within"] == pytest.approx(sum(sds) / 10, rel=1e-12)
        assert said["mean"] == pytest.approx(sum(map(sum, own)) / 40, rel=1e-12)


def test_texts_that_lack_a_pass_do_not_count():
    values = np.array([[1.0, 2.0], [np.nan, 3.0], [4.0, np.inf]])
    found = spread(values, np.array([0.1, 0.2]), np.array([1, 1, 0]))
    assert found is not None
    assert {name: one["texts"] for name, one in found["classes"].items()} == {"members": 1}


@pytest.mark.parametrize("values", [np.full((2, 3), np.nan), np.zeros((2, 0)), np.zeros((0, 3))])
def test_without_a_difference_there_is_nothing(values):
    labels = np.ones(len(values), int)
    assert spread(values, np.zeros(values.shape[1]), labels) is None
