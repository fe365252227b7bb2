"""Measures how well scores separate members from non-members. NumPy, SciPy and scikit-learn.

Every function takes `scores` [n], finite numbers of which a higher one means "member", and
`labels` [n], 1 for a member and 0 for a non-member. Remove missing scores first, with `usable`.
All raise `ValueError` for wrong shapes, missing scores and other labels, and `DataError` if one
class has no text.
"""

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from sama_jax.core import intervals
from sama_jax.core.intervals import allowed_false_alarms, auc_errors, numbered
from sama_jax.errors import DataError

FPRS = ("0.1", "0.01", "0.001")
"""False-positive rates at which `summarize` reports the TPR, as metrics.json spells them."""

AUC_CI_METHOD = "DeLong's variance on the logit scale, near 0 and 1 the wider of it and Newcombe's"
"""How the interval of an AUC is made."""


class TprAtFpr(TypedDict):
    """The largest share of members found at a limited share of false alarms."""

    tpr: float
    ci: list[float]
    """Ends of its 95 % interval, which knows that the threshold was chosen on the same texts."""
    fpr: float
    """The rate that the threshold has on these texts, below the one asked for."""
    threshold: float | None
    """The lowest score that is flagged; None: nothing is."""


class Saturated(TypedDict):
    """Several texts have the highest score."""

    share: float


class AttackMetrics(TypedDict):
    """The metrics of one attack. They are None if a class has no text; a note then says so."""

    auc: float | None
    auc_ci: list[float] | None
    auc_ci_method: str
    tpr_at_fpr: dict[str, TprAtFpr | None]
    """By `FPRS`; None with too few non-members for that rate, or where ties do not attain it."""
    n_members: int
    n_nonmembers: int
    notes: list[str]
    """Sentences about numbers that are missing."""
    n_groups: NotRequired[int]
    """Groups that these texts come from, where they are known."""
    saturated: NotRequired[Saturated]


def percent(rate: str | float) -> str:
    """Writes a rate in percent: "0.1" becomes "10 %"."""
    return f"{float(rate) * 100:g} %"


def tpr_name(fpr: str) -> str:
    """Names the TPR at a false-positive rate of `FPRS`: "TPR at 10 % FPR"."""
    return f"TPR at {percent(fpr)} FPR"


def usable(
    scores: Sequence[float | None] | ArrayLike, labels: ArrayLike
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"], int]:
    """Drops texts whose score is None, NaN or infinite: `(scores, labels, number dropped)`."""
    values = np.asarray(scores, dtype=np.float64)  # None becomes NaN
    labels = np.asarray(labels, dtype=np.int64)
    keep = np.isfinite(values)
    return values[keep], labels[keep], int((~keep).sum())


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Returns the area under the ROC curve: P(member > non-member) + P(equal) / 2."""
    values, is_member = _checked(scores, labels)
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_member, values))


def auc_interval(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, *, level: float = 0.95
) -> tuple[float, float]:
    """Returns the interval `(low, high)` of the AUC at `level`; see `intervals.auc_interval`.

    `groups` [n] numbers the documents of texts that belong together; -1: a text of its own.
    """
    values, is_member = _checked(scores, labels)
    errors = auc_errors(values[:, None], is_member, _groups(groups))
    return errors.intervals(_half_width(level))[0]


def paired_difference(
    scores_a: ArrayLike, scores_b: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None
) -> tuple[float, float, float]:
    """Returns AUC of `a` minus AUC of `b` on the same texts, and its 95 % interval.

    What makes a text easy for both cancels. (Two separate intervals that overlap do not show that
    the attacks are equal.) `groups` are those of `auc_interval`.

    Returns:
      `(difference, low, high)`; all 0 if both put the texts in the same order.
    """
    (a, is_member), (b, _) = _checked(scores_a, labels), _checked(scores_b, labels)
    if (scipy.stats.rankdata(a) == scipy.stats.rankdata(b)).all():
        return 0.0, 0.0, 0.0
    errors = auc_errors(np.stack([a, b], axis=1), is_member, _groups(groups))
    low, high = intervals.difference_interval(errors, _half_width(0.95))
    return float(errors.auc[0] - errors.auc[1]), low, high


def tpr_at_fpr(
    scores: ArrayLike, labels: ArrayLike, fpr: float, groups: ArrayLike | None = None
) -> TprAtFpr | None:
    """Finds the share of members flagged where new non-members are flagged at most at `fpr`.

    A text is flagged if its score is at least the threshold, so equal scores move together and
    ties count against the attack. How many of these non-members may be flagged is one less than a
    share `fpr` of them (`intervals.allowed_false_alarms`): the threshold is chosen on them, and a
    new one is flagged a little more often. (Taking the ROC point nearest to `fpr`, as the
    published code does, may exceed it.) `threshold` is None where only an infinite one is strict
    enough. With `groups`, as in `auc_interval`, documents are counted in place of texts.

    Returns:
      None with fewer than `1 / fpr - 1` non-members, and where no threshold attains the rate,
      since more non-members than allowed share the highest score with members.
    """
    values, is_member = _checked(scores, labels)
    n_members, n_nonmembers = int(is_member.sum()), int((~is_member).sum())
    documents = numbered(_groups(groups), len(values))
    worth = np.unique(documents[is_member]).size, np.unique(documents[~is_member]).size
    allowed = allowed_false_alarms(worth[1], fpr)
    if allowed is None:
        return None
    allowed = allowed * n_nonmembers // worth[1]
    thresholds, true_positives, false_positives = _flagged(values, is_member)
    if false_positives[1] > allowed and true_positives[1] > 0:
        return None
    # Both counts grow as the threshold falls; the first of equal TPRs has the lowest FPR.
    found = true_positives[false_positives <= allowed][-1]
    best = int(np.searchsorted(true_positives, found))
    low, high = intervals.tpr_interval(values[is_member], values[~is_member], fpr, worth)
    threshold = float(thresholds[best])
    return {
        "tpr": float(found / n_members),
        "ci": [low, high],
        "fpr": float(false_positives[best] / n_nonmembers),
        "threshold": threshold if math.isfinite(threshold) else None,
    }


def roc_points(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Returns `(fpr, tpr, thresholds)`: one point for each distinct score, in falling order.

    The curve starts at (0, 0) with an infinite threshold and ends at (1, 1).
    """
    values, is_member = _checked(scores, labels)
    from sklearn.metrics import roc_curve

    return roc_curve(is_member, values, drop_intermediate=False)


def summarize(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None
) -> AttackMetrics:
    """Computes all metrics of one attack, as plain values for JSON; `groups` as in `auc_interval`.

    Unlike the other functions it accepts an empty class: the metrics are then None.
    """
    labels = np.asarray(labels)
    n_members, n_nonmembers = int((labels == 1).sum()), int((labels == 0).sum())
    summary: AttackMetrics = {
        "auc": None,
        "auc_ci": None,
        "auc_ci_method": AUC_CI_METHOD,
        "tpr_at_fpr": dict.fromkeys(FPRS),
        "n_members": n_members,
        "n_nonmembers": n_nonmembers,
        "notes": [],
    }
    if not n_members or not n_nonmembers:
        summary["notes"].append(
            "No metrics: they need members and non-members with a score, "
            f"there are {n_members} and {n_nonmembers}."
        )
        return summary
    values, is_member = _checked(scores, labels)
    documents = numbered(_groups(groups), len(values))
    low, high = auc_interval(values, is_member, documents)
    summary["auc"], summary["auc_ci"] = auc(values, is_member), [low, high]
    summary["tpr_at_fpr"] = {x: tpr_at_fpr(values, is_member, float(x), documents) for x in FPRS}
    if groups is not None:
        summary["n_groups"] = int(documents.max()) + 1
    at_top = values == values.max()
    if at_top.sum() > 1:
        summary["saturated"] = {"share": float(at_top.mean())}
    tied = int(at_top.sum()), int((at_top & ~is_member).sum())
    summary["notes"] += _tpr_notes(summary, np.unique(documents[~is_member]).size, *tied)
    return summary


def _tpr_notes(
    summary: AttackMetrics, independent: int, top: int, top_nonmembers: int
) -> list[str]:
    """Explains each TPR that is missing: few non-members, or `top` texts with one score."""
    notes = []
    what = "groups of non-members" if "n_groups" in summary else "non-members"
    for x, result in summary["tpr_at_fpr"].items():
        if result is not None:
            continue
        if allowed_false_alarms(independent, float(x)) is None:
            needed = math.ceil(1 / float(x) - 1 - 1e-9)
            notes.append(f"{tpr_name(x)} needs at least {needed} {what}, there are {independent}.")
        else:
            notes.append(
                f"{tpr_name(x)} is not attainable: {top} texts share the highest score and "
                f"{top_nonmembers} of them are non-members, more than may be flagged."
            )
    return notes


def _half_width(level: float) -> float:
    """Returns the half width of an interval at `level` in standard deviations."""
    return float(scipy.stats.norm.isf((1 - level) / 2))


def _groups(groups: ArrayLike | None) -> Int[np.ndarray, " n"] | None:
    """Returns the groups as an array. Raises `ValueError` unless they are whole numbers."""
    if groups is None:
        return None
    found = np.asarray(groups)
    if found.dtype.kind not in "iu":
        raise ValueError(f"groups must be whole numbers, got {found.dtype}")
    return found.astype(np.int64)


def _checked(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Returns the scores as float64 and `is_member`, both classes present."""
    values, classes = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != classes.shape:
        raise ValueError(
            f"expected one score and one label a text, got {values.shape} and {classes.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite; remove missing ones with metrics.usable")
    is_member = classes == 1
    if not (is_member | (classes == 0)).all():
        raise ValueError("labels must be 1 (member) or 0 (not)")
    if is_member.all() or not is_member.any():
        raise DataError(
            "metrics need members and non-members, "
            f"got {int(is_member.sum())} and {int((~is_member).sum())}"
        )
    return values, is_member


def _flagged(
    values: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Returns thresholds from infinity down, and how many of each class are at or above them."""
    distinct, codes = np.unique(values, return_inverse=True)
    per_class = [np.bincount(codes[of], minlength=distinct.size) for of in (is_member, ~is_member)]
    members, nonmembers = (np.r_[0, np.cumsum(counts[::-1])] for counts in per_class)
    return np.r_[np.inf, distinct[::-1]], members, nonmembers
