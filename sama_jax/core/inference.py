"""Tests whether attacks tell members from non-members at all: many attacks, one level of error.

One permutation of the labels serves all attacks, so that what they share is accounted for. Works
on `scores` [n, k], a column an attack, NaN where it has no score; `labels` [n], 1 for members and
0; and `groups` [n], numbers of documents whose texts belong together, -1 or None: none.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from sama_jax.core.intervals import (
    allowed_false_alarms,
    auc_errors,
    auc_variance,
    numbered,
    root,
)

PERMUTATIONS = 9_999
"""Permutations of the labels; the smallest p-value is one in 10,000."""
DRAWS = 20_000
"""Normal draws for the width of simultaneous intervals: its 95 % point to about 0.01."""
CHUNK_CELLS = 1 << 21
"""Permuted labels that are held at once (16 MiB)."""


class PermutationTests(NamedTuple):
    """What permuted labels say of each attack: a small `p` speaks for it."""

    z: Float[np.ndarray, " k"]
    """The statistic in standard deviations, Mann-Whitney's without groups; above 0: members score
    higher."""
    p: Float[np.ndarray, " k"]
    """One-sided p-value of the attack alone."""
    adjusted: Float[np.ndarray, " k"]
    """The same, corrected for all k (Westfall and Young's step-down max-T)."""


class Simultaneous(NamedTuple):
    """Intervals that all hold at once, so that one may pick the strongest afterwards."""

    auc: Float[np.ndarray, " k"]
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]
    quantile: float
    """Their half width in standard deviations: 1.96 for one attack, more for several."""


def permutation_tests(
    scores: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None = None,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> PermutationTests:
    """Tests each attack alone and all together, one-sided, by permuting labels.

    With groups the labels of whole groups are exchanged (see `_permuted`), and the statistic is
    studentised by their sums, since groups of unequal sizes are not exchangeable: five large
    documents against 300 small ones are found by ranks alone in .13 of audits without membership,
    and so in under .025 (E. Chung and J. P. Romano, 2013). The adjusted p-value of
    an attack counts permutations in which any attack that is no stronger does as well. A p-value
    is never 0: the labels as they are count as one permutation (P. H. Westfall and S. S. Young,
    1993). A column without a spread, or with one class only, gets p-values of 1.
    """
    ranked = _standardised_ranks(scores)
    present = np.isfinite(scores)
    units = _units(groups, labels == 1)
    observed = _statistic(ranked, present, labels[None] == 1, units)[0]
    both = present[labels == 1].any(axis=0) & present[labels != 1].any(axis=0)
    observed[~both] = -np.inf
    order = np.argsort(-observed, kind="stable")
    alone, joint = np.zeros((2, scores.shape[1]))
    for is_member in _permuted(labels == 1, groups, permutations, seed):
        z = _statistic(ranked, present, is_member, units)
        # A tie is as good: rounding must not tell equal statistics apart.
        alone += (z >= observed - 1e-9).sum(axis=0)
        weaker = np.maximum.accumulate(z[:, order[::-1]], axis=1)[:, ::-1]
        joint[order] += (weaker >= observed[order] - 1e-9).sum(axis=0)
    p, adjusted = ((found + 1) / (permutations + 1) for found in (alone, joint))
    adjusted[order] = np.maximum.accumulate(adjusted[order])
    return PermutationTests(np.where(np.isfinite(observed), observed, 0.0), p, adjusted)


def _standardised_ranks(scores: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """Returns mid-ranks of each column, centred, with variance 1; 0 where there is no score."""
    ranks = scipy.stats.rankdata(scores, axis=0, nan_policy="omit")
    count = np.isfinite(scores).sum(axis=0)
    centred = np.nan_to_num(ranks - np.nansum(ranks, axis=0) / np.maximum(count, 1))
    deviation = np.sqrt((centred**2).sum(axis=0) / np.maximum(count - 1, 1))
    return centred / np.where(deviation > 0, deviation, 1)


def _units(
    groups: Int[np.ndarray, " n"] | None, is_member: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, " n"] | None:
    """Numbers what keeps one label: groups of one class, and single texts; None if all are texts.

    The texts of a group that holds both classes are single ones here.
    """
    numbers = numbered(groups, len(is_member))
    share = np.bincount(numbers, is_member) / np.bincount(numbers)
    pure = (share == 0) | (share == 1)
    units = numbered(np.where(pure[numbers], numbers, -1), len(is_member))
    return units if units.max(initial=-1) + 1 < len(units) else None


def _statistic(
    ranked: Float[np.ndarray, "n k"],
    present: Bool[np.ndarray, "n k"],
    is_member: Bool[np.ndarray, "b n"],
    units: Int[np.ndarray, " n"] | None,
) -> Float[np.ndarray, "b k"]:
    """Returns Mann-Whitney's z, or, where texts are grouped, the studentised difference of ranks.

    That is the difference of the classes' mean ranks over the standard deviation that the sums of
    whole units tell (A. C. Cameron and D. L. Miller, 2015).
    """
    if units is None:
        return _z(ranked, present, is_member)
    first = np.unique(units, return_index=True)[1]
    sums, sizes = (
        np.stack([np.bincount(units, column) for column in table.T], axis=1)
        for table in (ranked, present)
    )
    tables = sums, sizes, sums**2, sums * sizes, sizes**2, sizes > 0
    difference, variance = 0.0, 1e-10  # of a perfect attack nothing is left: still no infinity
    for sign, label in ((1, True), (-1, False)):
        own = (is_member[:, first] == label).astype(np.float64)
        total, texts, squares, mixed, sizes_squared, count = (own @ table for table in tables)
        texts = np.maximum(texts, 1)
        mean = total / texts
        spread = squares - 2 * mean * mixed + mean**2 * sizes_squared
        variance = variance + np.maximum(spread, 0) / texts**2 * count / np.maximum(count - 1, 1)
        difference = difference + sign * mean
    return difference / np.sqrt(variance)


def _z(
    ranked: Float[np.ndarray, "n k"],
    present: Bool[np.ndarray, "n k"],
    is_member: Bool[np.ndarray, "b n"],
) -> Float[np.ndarray, "b k"]:
    """Returns Mann-Whitney's z of each column under each row of labels.

    The sum of members' ranks has mean 0 here and variance members x non-members / texts.
    """
    chosen = is_member.astype(np.float64)
    total = present.sum(axis=0)
    members = chosen @ present
    variance = members * (total - members) / np.maximum(total, 1)
    return chosen @ ranked / np.sqrt(np.maximum(variance, 1e-9))


def _permuted(
    is_member: Bool[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None,
    permutations: int,
    seed: int,
) -> Iterator[Bool[np.ndarray, "b n"]]:
    """Draws permuted labels, some rows at a time.

    Groups of one class exchange their labels, whatever their sizes; in a group that holds both
    classes, texts exchange theirs among themselves. `_statistic` makes up for unequal sizes.
    """
    numbers = numbered(groups, len(is_member))
    size = np.bincount(numbers)
    share = np.bincount(numbers, is_member) / size
    pure = (share == 0) | (share == 1)
    place = np.cumsum(pure) - 1  # of a pure group among those
    whole = np.flatnonzero(pure[numbers])
    inner = [np.flatnonzero(numbers == g) for g in np.flatnonzero(~pure)]
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_CELLS // len(is_member))
    for start in range(0, permutations, chunk):
        rows = min(chunk, permutations - start)
        drawn = np.empty((rows, len(is_member)), dtype=bool)
        labels = rng.permuted(np.tile(share[pure] == 1, (rows, 1)), axis=1)
        drawn[:, whole] = labels[:, place[numbers[whole]]]
        for texts in inner:
            drawn[:, texts] = rng.permuted(np.tile(is_member[texts], (rows, 1)), axis=1)
        yield drawn


def simultaneous_intervals(
    scores: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None = None,
    *,
    level: float = 0.95,
) -> Simultaneous:
    """Computes intervals of all AUCs that hold together at `level`.

    The width is the quantile of the largest of k normal variables that are correlated as the AUCs
    are (DeLong's covariance, by groups where given), from the same draws each time. A column
    without both classes is NaN.
    """
    is_member, present = labels == 1, np.isfinite(scores)
    both = (present & is_member[:, None]).any(axis=0) & (present & ~is_member[:, None]).any(axis=0)
    auc, low, high = np.full((3, scores.shape[1]), np.nan)
    if not both.any():
        return Simultaneous(auc, low, high, np.nan)
    errors = auc_errors(scores[:, both], is_member, groups)
    # An AUC without a deviation (it is 1) counts as independent of the others: never too narrow.
    unit = errors.parts / np.where(errors.deviation > 0, errors.deviation, 1)
    correlation = unit.T @ unit
    np.fill_diagonal(correlation, 1.0)
    draws = np.random.default_rng(0).multivariate_normal(
        np.zeros(len(correlation)), correlation, DRAWS, method="eigh"
    )
    q = float(np.quantile(np.abs(draws).max(axis=1), level))
    auc[both] = errors.auc
    low[both], high[both] = zip(*errors.intervals(q))
    return Simultaneous(auc, low, high, q)


def detectable_auc(
    members: int, nonmembers: int, *, alpha: float = 0.025, power: float = 0.8
) -> float | None:
    """Returns the AUC that so many texts would show with probability `power`.

    Normal approximation of the one-sided Mann-Whitney test at `alpha`, with Hanley and McNeil's
    variance of an AUC. Count documents where several texts come from one.

    Returns:
      None if no AUC would do, since there are too few texts for any result to be significant.
    """
    if math.comb(members + nonmembers, members) < 1 / alpha:
        return None
    null = math.sqrt((members + nonmembers + 1) / (12 * members * nonmembers))

    def missing(auc: float) -> float:
        deviation = math.sqrt(auc_variance(auc, members, nonmembers))
        return (
            0.5
            + float(scipy.stats.norm.isf(alpha)) * null
            + float(scipy.stats.norm.isf(1 - power)) * deviation
            - auc
        )

    if missing(1.0) > 0:
        return None
    return root(missing, 0.5, 1.0)


def detectable_tpr(
    members: int,
    nonmembers: int,
    *,
    fpr: float = 0.01,
    alpha: float = 0.025,
    power: float = 0.8,
) -> float | None:
    """Returns the TPR at an FPR that so many texts would show with probability `power`.

    An attack that guesses leaves a number of members above the threshold of `tpr_at_fpr` that is
    negative hypergeometric, whatever the scores' law. More of them than that gives by chance
    `alpha` are needed; they are binomial with the TPR.

    Returns:
      None with too few non-members for the rate, or too few members for any result.
    """
    allowed = allowed_false_alarms(nonmembers, fpr)
    if allowed is None:
        return None
    by_chance = scipy.stats.nhypergeom(members + nonmembers, members, allowed + 1)
    counts = np.arange(members + 1)
    enough = counts[by_chance.sf(counts - 1) <= alpha]
    if not enough.size:
        return None
    needed = int(enough[0])
    # P(binomial(members, t) >= needed) = P(beta(needed, members - needed + 1) <= t)
    return float(scipy.stats.beta.ppf(power, needed, members - needed + 1))
