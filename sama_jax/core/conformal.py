"""Says of single texts and of collections whether held-out non-members would look like that.

`calibration` [n] are scores of non-members that served nothing else, neither the choice of the
attack nor that of a setting, and that come from where the texts in question come from. Without
such texts no p-value means anything. A higher score means "member".
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Int

from sama_jax.core.inference import PERMUTATIONS, detectable_auc, permutation_tests
from sama_jax.core.intervals import auc_errors


class Collection(NamedTuple):
    """What a collection of texts says together, against held-out non-members."""

    p: float
    """One-sided: how often held-out texts would score so high against the others."""
    auc: float
    """Share of pairs in which a text of the collection scores above a held-out one."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    detectable: float | None
    """AUC that these numbers of texts show in 80 % of cases at p <= .05; None: none would do."""


def p_values(
    scores: Float[np.ndarray, " m"],
    calibration: Float[np.ndarray, " n"],
    uniform: Float[np.ndarray, " m"] | None = None,
) -> Float[np.ndarray, " m"]:
    """Computes the share of calibration texts, and the text itself, that score at least as high.

    For a new non-member p <= a has at most probability a, on average over calibration sets. Ties
    count against the claim, so that p is never small where many scores are equal. With `uniform`,
    one number in [0, 1) a text from `uniform_of`, ties are broken by it, and the probability is a
    exactly (V. Vovk et al., 2005).

    Raises `ValueError` for scores that are not finite: none of them has a place among the others.
    """
    if not (np.isfinite(scores).all() and np.isfinite(calibration).all()):
        raise ValueError("scores must be finite; remove missing ones")
    ordered = np.sort(calibration)
    at_least = len(ordered) - np.searchsorted(ordered, scores, side="left")
    if uniform is None:
        return (1 + at_least) / (len(ordered) + 1)
    above = len(ordered) - np.searchsorted(ordered, scores, side="right")
    return (above + uniform * (1 + at_least - above)) / (len(ordered) + 1)


def uniform_of(keys: Sequence[str], seed: int | str) -> Float[np.ndarray, " m"]:
    """Derives a number in [0, 1) from each key and the seed: the same in each run."""
    hashes = (hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:7] for key in keys)
    # 53 bits, which a float holds: 56 could round up to 1.
    return np.array([(int.from_bytes(found, "big") >> 3) / 2**53 for found in hashes])


def rank_of(count: int, fpr: float, guarantee: float | None = None) -> int:
    """Returns the k for which flagging p <= k / (n + 1) keeps the false-positive rate.

    The rate over all non-members of a threshold from n texts is Beta(k, n + 1 - k), whatever the
    scores' law: k / (n + 1) on average over calibration sets. With `guarantee`, k is the largest
    for which it is at most `fpr` with that probability.

    Returns:
      0 if there are too few texts for any threshold.
    """
    ranks = np.arange(1, int(fpr * (count + 1) + 1e-9) + 1)
    if guarantee is not None:
        ranks = ranks[scipy.stats.beta.ppf(guarantee, ranks, count + 1 - ranks) <= fpr]
    return int(ranks.max(initial=0))


def adjusted(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Returns Benjamini and Hochberg's adjusted p-values.

    Of the texts whose value is at most q, at most a share q is false on average. Holds for
    p-values from one calibration set, which depend on each other positively (S. Bates et al.,
    2023).
    """
    return scipy.stats.false_discovery_control(p)


def collection_test(
    suspects: Float[np.ndarray, " m"],
    calibration: Float[np.ndarray, " n"],
    permutations: int = PERMUTATIONS,
) -> Collection:
    """Tests whether a collection scores higher than held-out texts: Mann-Whitney, permuted.

    Give one text a document (`one_of_each`): texts of one document are no independent witnesses,
    and five chunks a document taken for five reject 18 % of true nulls at 5 %.
    """
    scores = np.concatenate([suspects, calibration])[:, None]
    labels = np.repeat([1, 0], [len(suspects), len(calibration)])
    p = permutation_tests(scores, labels, permutations=permutations).p[0]
    errors = auc_errors(scores, labels == 1)
    low, high = errors.intervals(float(scipy.stats.norm.isf(0.025)))[0]
    detectable = detectable_auc(len(suspects), len(calibration), alpha=0.05)
    return Collection(float(p), float(errors.auc[0]), low, high, detectable)


def one_of_each(
    groups: Int[np.ndarray, " n"], keys: Sequence[str], seed: int = 0
) -> Int[np.ndarray, " k"]:
    """Chooses one text of each group by its key, and of those without one (-1) one of each key."""
    drawn = uniform_of(keys, seed)
    best: dict[int | str, int] = {}
    for place, group in enumerate(groups.tolist()):
        unit = group if group >= 0 else keys[place]
        if drawn[place] < drawn[best.setdefault(unit, place)]:
            best[unit] = place
    return np.sort(np.fromiter(best.values(), dtype=np.int64))


def thirds(keys: Sequence[str], seed: int = 0) -> Int[np.ndarray, " n"]:
    """Puts each key into part 0, 1 or 2 by its hash, so that a text always goes to one part.

    Choose the attack on part 0, calibrate on part 1, and measure on part 2. The key of a text that
    has a group is its group's. (Reusing part 0 as part 1 to pick the best of 34 attacks gave 7.4 %
    instead of 5 % false alarms.)
    """
    return (3 * uniform_of(keys, f"thirds {seed}")).astype(np.int64)
