"""Lower bounds on the epsilon of a training, from canaries that a coin put in or left out.

The bound is that of Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run"
(arXiv 2305.08846), as `jax_privacy.auditing` computes it. The threshold is chosen on one half of
the canaries and applied to the other, 101 times; the median of 101 bounds at half the significance
holds at the whole one (Meinshausen, Meier and Bühlmann, arXiv 0811.2177, theorem 3.1).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sama_jax.errors import UsageError

SPLITS = 101
LEAST = 2
"""Canaries of each side that can be divided into two halves."""


class Bound(NamedTuple):
    """What canaries show of epsilon."""

    epsilon: float
    """With the confidence asked for, epsilon is at least this; 0: nothing is shown."""
    largest: float
    """What as many canaries show if every guess is right: no audit of them can show more."""


def epsilon_bound(
    included: Float[np.ndarray, " m"],
    held_out: Float[np.ndarray, " n"],
    *,
    significance: float = 0.05,
    delta: float = 1e-5,
    seed: int = 0,
) -> Bound:
    """Bounds epsilon of a training that is (epsilon, delta)-private for one canary.

    Valid only if independent fair coins decided which canaries were included.

    Args:
      included: finite scores of the canaries that were trained on, higher for a member.
      held_out: of those that were not.
      significance: of the bound, 1 minus its confidence.
      delta: above 0; at most one over the number of records.
      seed: of the splits.

    Raises:
      UsageError: `jax_privacy` is not installed.
    """
    try:
        from jax_privacy import auditing
    except ImportError:
        raise UsageError(
            "a bound on epsilon needs jax-privacy; pip install 'sama-jax[privacy]'"
        ) from None
    if min(len(included), len(held_out)) < LEAST:
        return Bound(0.0, 0.0)

    # Not `epsilon_from_gdp`: with 300 + 300 scores of one distribution its bound is 7. Not
    # `Bonferroni`: it divides by a number of thresholds that is read from the scores.
    def bound(inside: np.ndarray, outside: np.ndarray, splits: int) -> float:
        strategy = auditing.MultiSplit(num_samples=splits, seed=seed)
        auditor = auditing.CanaryScoreAuditor(inside, outside)
        return float(auditor.epsilon_one_run(significance, delta, threshold_strategy=strategy))

    perfect = np.ones(len(included)), np.zeros(len(held_out))  # all splits of them are alike
    return Bound(bound(included, held_out, SPLITS), bound(*perfect, 1))
