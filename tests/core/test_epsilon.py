"""Bounds on epsilon: the closed form, another implementation, and mechanisms with a known truth."""

import builtins
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from jax_privacy import auditing
from scipy.optimize import brentq
from scipy.stats import binom

from sama_jax.core.epsilon import epsilon_bound
from sama_jax.errors import UsageError

SCRIPT = Path(__file__).parents[2] / "experiments" / "statistics" / "canaries.py"


def steinke(m: int, guesses: int, right: int, beta: float, delta: float) -> float:
    """The largest epsilon that so many right guesses reject (arXiv 2305.08846, theorem 5.2)."""

    def p_value(epsilon: float) -> float:
        q = 1 / (1 + np.exp(-epsilon))
        tail = np.array([binom.sf(right - i - 1, guesses, q) for i in range(right + 1)])
        steps = (tail[1:] - tail[0]) / np.arange(1, right + 1)
        return tail[0] + 2 * m * delta * max(0.0, steps.max())

    return 0.0 if p_value(0) > beta else brentq(lambda e: p_value(e) - beta, 0, 30, xtol=1e-9)


@pytest.mark.parametrize(("inside", "outside", "shift"), [(40, 50, 1.0), (100, 90, 2.0)])
def test_the_library_computes_the_published_bound(inside: int, outside: int, shift: float):
    draw = np.random.default_rng(inside)
    scores = draw.normal(shift, 1, inside), draw.normal(0, 1, outside)
    right, wrong = (int((s >= shift).sum()) for s in scores)
    ours = steinke(inside + outside, right + wrong, right, 0.05, 1e-5)
    theirs = auditing.CanaryScoreAuditor(*scores).epsilon_one_run(
        0.05, 1e-5, threshold_strategy=auditing.Explicit(shift)
    )
    assert ours > 0
    assert theirs == pytest.approx(ours, abs=1e-5)  # its root is found to 1e-6


def test_perfect_guesses_show_the_closed_form_of_half_the_canaries_at_half_the_significance():
    """All of r right: P(Bin(r, q) = r) = q^r, so epsilon = log(q / (1 - q)) at q = beta^(1/r)."""
    found = epsilon_bound(np.arange(100.0) + 100, np.arange(100.0), delta=1e-12)
    q = 0.025 ** (1 / 50)
    assert found.largest == pytest.approx(np.log(q / (1 - q)), abs=1e-4)
    # Among separated scores the threshold of one half may cut off some of the other.
    assert 0.85 * found.largest < found.epsilon <= found.largest + 1e-6
    saturated = epsilon_bound(np.ones(100), np.zeros(100), delta=1e-12)
    assert saturated.epsilon == saturated.largest == found.largest


def test_a_delta_makes_the_bound_smaller_and_the_seed_alone_decides():
    draw = np.random.default_rng(0)
    scores = draw.normal(2, 1, 60), draw.normal(0, 1, 60)
    found = [epsilon_bound(*scores, delta=delta).epsilon for delta in (1e-9, 1e-3, 1e-2)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
    assert epsilon_bound(*scores, delta=1e-9).epsilon == found[0]


def test_too_few_canaries_show_nothing():
    assert epsilon_bound(np.ones(1), np.zeros(50)) == (0, 0)
    assert epsilon_bound(np.ones(50), np.zeros(0)) == (0, 0)
    assert epsilon_bound(np.ones(3), np.zeros(3)).epsilon == 0


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **more):
        if name.startswith("jax_privacy"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs jax-privacy; pip install 'sama-jax\[privacy\]'"):
        epsilon_bound(np.ones(5), np.zeros(5))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("canaries", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "epsilon"), [("response", 0.0), ("response", 1.0), ("laplace", 1.0)]
)
def test_on_a_mechanism_with_a_known_epsilon_the_bound_stays_below(script, name, epsilon):
    """Of eight audits three or more are above the truth in 0.6 % if one is in 5 %."""
    draw, found = np.random.default_rng(1), []
    for seed in range(8):
        coins = draw.integers(0, 2, 80).astype(bool)
        scores = script.MECHANISMS[name](draw, coins, epsilon)
        found.append(epsilon_bound(scores[coins], scores[~coins], seed=seed).epsilon)
    assert sum(bound > epsilon for bound in found) <= 2
    strong = script.MECHANISMS[name](draw, coins, 6.0)
    assert epsilon_bound(strong[coins], strong[~coins]).epsilon > 1
