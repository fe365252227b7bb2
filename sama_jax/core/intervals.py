"""Computes intervals of AUC and TPR from closed forms, and counts documents where they are known.

Nothing here draws a random number. AUC: E. R. DeLong et al. (1988) on the logit scale, with texts
of one group summed first (N. A. Obuchowski, 1997), and R. G. Newcombe's method 5 (2006) near 0 and
1. TPR: the number of non-members above the true threshold is binomial, whatever the scores' law.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

FEW_LOST = 20
"""With fewer texts of a class than this on the wrong side, Newcombe's interval counts too.

The logit interval covers .77 to .93 there (AUC .97 to .995, 50 to 500 texts, ties at the top), and
.94 to .96 above; Newcombe's always covers, but up to .998 with many texts.
"""


class AucErrors(NamedTuple):
    """The AUC of each score column, and what each group of texts adds to its error."""

    auc: Float[np.ndarray, " k"]
    parts: Float[np.ndarray, "g k"]
    """`parts.T @ parts` estimates the covariance of the AUCs."""
    members: Float[np.ndarray, " k"]
    """How many independent members a column is worth: at most its texts, at least its groups, of
    unequal sizes fewer (L. Kish, 1965)."""
    nonmembers: Float[np.ndarray, " k"]
    freedom: Float[np.ndarray, " k"]
    """Degrees of freedom of the deviation (B. L. Welch, 1947); infinite without groups."""

    @property
    def deviation(self) -> Float[np.ndarray, " k"]:
        """The standard deviation of each AUC."""
        return np.sqrt((self.parts**2).sum(axis=0))

    def intervals(self, z: float) -> list[tuple[float, float]]:
        """Returns the interval of each AUC, `z` standard deviations of a normal variable wide."""
        half = widened(z, self.freedom)
        inputs = zip(self.auc, self.deviation, self.members, self.nonmembers, half)
        return [auc_interval(*one) for one in inputs]


def numbered(groups: Int[np.ndarray, " n"] | None, count: int) -> Int[np.ndarray, " n"]:
    """Numbers the groups of `count` texts from 0; a text without one (None, -1) is its own."""
    if groups is None:
        return np.arange(count)
    groups = np.asarray(groups)
    alone = groups < 0
    own = np.where(alone, groups.max(initial=-1) + 1 + np.arange(count), groups)
    return np.unique(own, return_inverse=True)[1]


def auc_errors(
    scores: Float[np.ndarray, "n k"],
    is_member: Bool[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None = None,
) -> AucErrors:
    """Computes AUCs and their errors text by text, summed over groups (DeLong's components).

    A member's component is the share of non-members below it, ties half; a non-member's is the
    share of members above. A score that is NaN is left out of its column. Each column needs both
    classes. A group's error is that of leaving it out (the jackknife), which a large one does not
    hide by drawing the mean to itself. A class of a single group, whose spread nobody knows, adds
    no error and is worth one text.
    """
    numbers = numbered(groups, len(is_member))
    found = [_errors_of(values, is_member, numbers) for values in scores.T]
    auc, parts, *others = zip(*found)
    return AucErrors(np.array(auc), np.stack(parts, axis=1), *map(np.array, others))


def _errors_of(
    values: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
) -> tuple[float, Float[np.ndarray, " g"], float, float, float]:
    """Computes one column of `auc_errors`."""
    present = np.isfinite(values)
    ranks = np.full(len(values), np.nan)
    ranks[present] = scipy.stats.rankdata(values[present])
    parts, worth, auc = np.zeros(groups.max() + 1), [], np.nan
    variances, unknown = 0.0, 0.0
    for of, sign in ((is_member, 1), (~is_member, -1)):
        own = np.flatnonzero(of & present)
        below = (ranks[own] - scipy.stats.rankdata(values[own])) / (present.sum() - own.size)
        auc = below.mean() if sign == 1 else auc
        error = sign * (below - below.mean()) / own.size
        sizes = np.bincount(groups[own], minlength=len(parts))
        count, effective = np.count_nonzero(sizes), own.size**2 / (sizes**2).sum()
        if count == 1:
            worth.append(1.0)
            continue
        summed = np.bincount(groups[own], error, len(parts))
        left_out = summed / (1 - sizes / own.size) * np.sqrt((count - 1) / count)
        parts += left_out
        # Summing over groups multiplies the variance: so much fewer texts is the class worth.
        spread, variance = (summed**2).sum(), (left_out**2).sum()
        alike = own.size * (error**2).sum() / spread if spread > 0 else 0
        worth.append(float(np.clip(alike, effective, own.size)))
        variances += variance
        if count < own.size:
            unknown += variance**2 / max(effective - 1, 1)
    freedom = variances**2 / unknown if unknown > 0 else np.inf
    return float(auc), parts, worth[0], worth[1], freedom


def widened(z: float, freedom: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Returns Student's quantiles at the level of a normal `z`; `z` at infinite freedom."""
    return np.where(np.isinf(freedom), z, scipy.stats.t.isf(scipy.stats.norm.sf(z), freedom))


def logit_interval(auc: float, deviation: float, z: float) -> tuple[float, float]:
    """Returns the interval of an AUC that is `z` standard deviations wide on the logit scale."""
    center, half = scipy.special.logit(auc), z * deviation / (auc * (1 - auc))
    return float(scipy.special.expit(center - half)), float(scipy.special.expit(center + half))


def auc_variance(auc: float, members: float, nonmembers: float) -> float:
    """Returns the variance of an AUC that Newcombe's method 5 takes from Hanley and McNeil."""
    common = (members + nonmembers) / 2 - 1
    grows = 1 + common * (1 - auc) / (2 - auc) + common * auc / (1 + auc)
    return auc * (1 - auc) * grows / (members * nonmembers)


def newcombe_interval(
    auc: float, members: float, nonmembers: float, z: float
) -> tuple[float, float]:
    """Returns all AUCs that lie within `z` of their own standard deviations of the one found.

    It has a width even at AUC 1.
    """

    def beyond(true: float) -> float:
        return (true - auc) ** 2 - z**2 * auc_variance(true, members, nonmembers)

    edge = 1e-12
    inner = min(max(auc, 2 * edge), 1 - 2 * edge)
    low = root(beyond, edge, inner) if auc > 0 and beyond(edge) > 0 else 0.0
    high = root(beyond, inner, 1 - edge) if auc < 1 and beyond(1 - edge) > 0 else 1.0
    return low, high


def auc_interval(
    auc: float, deviation: float, members: float, nonmembers: float, z: float
) -> tuple[float, float]:
    """Returns an interval of an AUC that has a width and covers.

    The logit interval; with fewer than `FEW_LOST` texts on the wrong side, or no deviation, the
    wider end of it and of Newcombe's.

    Args:
      auc: the AUC.
      deviation: its standard deviation, from `auc_errors`.
      members: how many independent texts its members are worth, from `auc_errors`.
      nonmembers: the same of the other class.
      z: half the width, in standard deviations: 1.96 for 95 %.
    """
    plain = logit_interval(auc, deviation, z) if 0 < auc < 1 and deviation > 0 else None
    if plain and min(members, nonmembers) * min(auc, 1 - auc) >= FEW_LOST:
        return plain
    score = newcombe_interval(auc, members, nonmembers, z)
    if plain is None:
        return score
    return min(plain[0], score[0]), max(plain[1], score[1])


def difference_interval(errors: AucErrors, z: float) -> tuple[float, float]:
    """Returns the interval of the first column's AUC minus the second's, on the same texts.

    The normal one, from DeLong's covariance. Without a deviation, as of two perfect attacks, it
    goes from the low end of each AUC's interval to the high end of the other's.
    """
    difference = float(errors.auc[0] - errors.auc[1])
    deviation = float(np.sqrt(((errors.parts[:, 0] - errors.parts[:, 1]) ** 2).sum()))
    if deviation > 0:
        half = deviation * float(widened(z, errors.freedom).max())
        return max(difference - half, -1.0), min(difference + half, 1.0)
    (low_a, high_a), (low_b, high_b) = errors.intervals(z)
    return low_a - high_b, high_a - low_b


def allowed_false_alarms(nonmembers: int, fpr: float) -> int | None:
    """Returns how many non-members may be flagged so that a new one is with at most `fpr`.

    The threshold just above the (k + 1)-th highest of n non-members flags a new one with
    probability (k + 1) / (n + 1) on average over samples, so k = floor(fpr (n + 1)) - 1.

    Returns:
      None with fewer than 1 / fpr - 1 non-members: no threshold is known to be high enough.
    """
    allowed = int(np.floor(fpr * (nonmembers + 1) + 1e-9)) - 1  # 0.29 * 100 is below 29
    return None if allowed < 0 else allowed


def tpr_interval(
    members: Float[np.ndarray, " m"],
    nonmembers: Float[np.ndarray, " n"],
    fpr: float,
    worth: tuple[int, int],
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns the interval of the TPR whose FPR over all non-members, not just these, is `fpr`.

    The number of non-members above the true threshold is binomial, whatever the scores' law, and
    given that number the members found are, too. Mixes Clopper and Pearson's limits over it, so
    that the choice of the threshold on the same texts counts.

    Args:
      members: scores of members.
      nonmembers: scores of non-members.
      fpr: the false-positive rate.
      worth: how many independent members and non-members these are. With documents of several
        texts, count documents: as if the texts of one had all the same score, which is too
        careful rather than too bold.
      level: of the interval.
    """
    found, total = np.sort(members), len(members)
    bars = np.r_[np.inf, np.sort(nonmembers)[::-1], -np.inf]
    above = np.arange(worth[1] + 1)
    weight = scipy.stats.binom.pmf(above, worth[1], fpr)
    above, weight = above[weight > 1e-9], weight[weight > 1e-9]
    each = len(nonmembers) / worth[1]
    strict = bars[(above * each).astype(int)]
    lenient = bars[np.minimum((above + 1) * each, len(bars) - 1).astype(int)]
    # Members above the strict end of the gap, and at or above the lenient one; none is below 0.
    share = worth[0] / total
    fewest = share * (total - np.searchsorted(found, strict, side="right"))
    most = share * (total - np.searchsorted(found, lenient, side="left"))
    tail = (1 - level) / 2 * weight.sum()

    def too_low(tpr: float) -> float:
        certain = scipy.stats.beta.cdf(tpr, np.maximum(fewest, 1e-9), worth[0] - fewest + 1)
        return float(weight @ np.where(fewest <= 0, 1.0, certain)) - tail

    def too_high(tpr: float) -> float:
        certain = scipy.stats.beta.sf(tpr, most + 1, np.maximum(worth[0] - most, 1e-9))
        return float(weight @ np.where(most >= worth[0], 1.0, certain)) - tail

    edge = 1e-12
    low = 0.0 if too_low(edge) >= 0 else root(too_low, edge, 1 - edge)
    high = 1.0 if too_high(1 - edge) >= 0 else root(too_high, edge, 1 - edge)
    return low, high


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Returns where a function is 0 between two places at which its signs differ."""
    return cast(float, scipy.optimize.brentq(function, low, high))
