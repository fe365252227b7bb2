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
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from sama_jax.errors import DataError

FPRS = ("0.1", "0.01", "0.001")
"""False-positive rates at which `summarize` reports the TPR, as metrics.json spells them."""

RESAMPLES = 2000
"""Resamples of a bootstrap interval."""
AUC_CI_METHOD = f"stratified percentile bootstrap, {RESAMPLES} resamples"

CHUNK_CELLS = 1 << 20
"""Counts that the bootstrap holds at once for each class and score column (8 MiB)."""


class TprAtFpr(TypedDict):
    """The largest share of members found at a limited share of false alarms."""

    tpr: float
    ci: list[float]
    """Ends of its exact 95 % interval."""
    fpr: float
    """The rate that the threshold really has, at most the one asked for."""
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
    """By `FPRS`; None with too few non-members for that rate."""
    n_members: int
    n_nonmembers: int
    notes: list[str]
    """Sentences about numbers that are missing, zero or without an interval."""
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
    return float(roc_auc_score(is_member, values))


def auc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval `(low, high)` of the AUC at `level`.

    Members and non-members are resampled separately, so every resample has both.
    """
    values, is_member = _checked(scores, labels)
    aucs = resampled_aucs([values], is_member, seed, resamples)[0]
    low, high = np.quantile(aucs, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    labels: ArrayLike,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """Returns AUC of `a` minus AUC of `b` on the same texts, and its 95 % interval.

    Each resample draws the same texts for both attacks, so what makes a text easy for both
    cancels. (Two separate intervals that overlap do not show that the attacks are equal.)

    Returns:
      `(difference, low, high)`.
    """
    a, is_member = _checked(scores_a, labels)
    b, _ = _checked(scores_b, labels)
    difference = auc(a, is_member) - auc(b, is_member)
    aucs = resampled_aucs([a, b], is_member, seed, resamples)
    low, high = np.quantile(aucs[0] - aucs[1], [0.025, 0.975])
    return difference, float(low), float(high)


def tpr_at_fpr(scores: ArrayLike, labels: ArrayLike, fpr: float) -> TprAtFpr | None:
    """Finds the largest share of members flagged while at most a share `fpr` of non-members is.

    A text is flagged if its score is at least the threshold, so equal scores move together and
    ties count against the attack. (Taking the ROC point nearest to `fpr`, as the published code
    does, may exceed it.) `threshold` is None where only an infinite one is strict enough; `ci` is
    the exact Clopper-Pearson 95 % interval of the TPR with the threshold taken as given.

    Returns:
      None with fewer than `1 / fpr` non-members: one false alarm would already exceed `fpr`.
    """
    values, is_member = _checked(scores, labels)
    n_members, n_nonmembers = int(is_member.sum()), int((~is_member).sum())
    allowed = math.floor(fpr * n_nonmembers + 1e-9)  # 0.1 * 30 is not exactly 3
    if allowed < 1:
        return None
    thresholds, true_positives, false_positives = _flagged(values, is_member)
    # Both counts grow as the threshold falls; the first of equal TPRs has the lowest FPR.
    found = true_positives[false_positives <= allowed][-1]
    best = int(np.searchsorted(true_positives, found))
    interval = binomtest(int(found), n_members).proportion_ci(0.95, method="exact")
    threshold = float(thresholds[best])
    return {
        "tpr": float(found / n_members),
        "ci": [float(interval.low), float(interval.high)],
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
    return roc_curve(is_member, values, drop_intermediate=False)


def summarize(scores: ArrayLike, labels: ArrayLike, *, seed: int) -> AttackMetrics:
    """Computes all metrics of one attack, as plain values for JSON; `seed` is the bootstrap's.

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
    low, high = auc_interval(values, is_member, seed=seed)
    summary["auc"], summary["auc_ci"] = auc(values, is_member), [low, high]
    summary["tpr_at_fpr"] = {x: tpr_at_fpr(values, is_member, float(x)) for x in FPRS}
    at_top = values == values.max()
    if at_top.sum() > 1:
        summary["saturated"] = {"share": float(at_top.mean())}
    if low == high:
        summary["notes"].append(
            "The AUC interval has no width because every resample gives the same AUC; "
            "it understates the uncertainty."
        )
    summary["notes"] += _tpr_notes(summary, int(at_top.sum()), int((at_top & ~is_member).sum()))
    return summary


def _tpr_notes(summary: AttackMetrics, top: int, top_nonmembers: int) -> list[str]:
    """Explains each TPR that is missing, or zero because `top` texts share the highest score."""
    notes = []
    for x, result in summary["tpr_at_fpr"].items():
        if result is None:
            needed = math.ceil(1 / float(x) - 1e-9)
            notes.append(
                f"{tpr_name(x)} needs at least {needed} non-members, "
                f"there are {summary['n_nonmembers']}."
            )
        elif result["threshold"] is None and top > 1:
            notes.append(
                f"{tpr_name(x)} is 0 because {top} texts share the highest score and "
                f"{top_nonmembers} of them are non-members."
            )
    return notes


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


def resampled_aucs(
    columns: list[Float[np.ndarray, " n"]],
    is_member: Bool[np.ndarray, " n"],
    seed: int,
    resamples: int,
) -> Float[np.ndarray, "columns resamples"]:
    """Computes the AUC of each score column in each bootstrap resample of the texts.

    All columns see the same resamples. A resample is reduced to how often each distinct score was
    drawn, so nothing is sorted inside the loop: AUC = sum over scores of
    members x (non-members below + half of those equal).
    """
    coded = []
    for values in columns:
        distinct, codes = np.unique(values, return_inverse=True)
        coded.append((distinct.size, codes[is_member], codes[~is_member]))
    n_members, n_nonmembers = int(is_member.sum()), int((~is_member).sum())
    # One stream a class, read in order: the numbers do not depend on the chunk size.
    of_members, of_nonmembers = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2)
    )
    chunk = max(1, CHUNK_CELLS // is_member.size)
    aucs = np.empty((len(columns), resamples))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn_members = of_members.integers(n_members, size=(rows, n_members))
        drawn_nonmembers = of_nonmembers.integers(n_nonmembers, size=(rows, n_nonmembers))
        for column, (num_distinct, member_codes, nonmember_codes) in enumerate(coded):
            members = _counts(member_codes[drawn_members], num_distinct)
            nonmembers = _counts(nonmember_codes[drawn_nonmembers], num_distinct)
            below = np.cumsum(nonmembers, axis=1) - nonmembers / 2
            wins = np.einsum("rk,rk->r", members, below)
            aucs[column, start : start + rows] = wins / (n_members * n_nonmembers)
    return aucs


def _counts(codes: Int[np.ndarray, "r n"], num_distinct: int) -> Int[np.ndarray, "r k"]:
    """Counts how often each of `num_distinct` codes occurs in each row."""
    rows = codes.shape[0]
    shifted = codes + np.arange(rows)[:, None] * num_distinct
    return np.bincount(shifted.ravel(), minlength=rows * num_distinct).reshape(rows, num_distinct)
