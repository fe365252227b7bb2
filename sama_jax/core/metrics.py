"""How well scores separate members from non-members. NumPy, SciPy, scikit-learn; no files.

Everywhere: `scores` are finite numbers [n], higher meaning "member"; `labels` are 1 (member) or
0 (not) [n]. Missing scores are removed first, with `usable`. Wrong shapes, missing scores and
other labels raise `ValueError`; a class without a text raises `DataError`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from sama_jax.errors import DataError

FPRS = ("0.1", "0.01", "0.001")
"""False-positive rates that `summarize` reports, as they are spelled in metrics.json."""

RESAMPLES = 2000
AUC_CI_METHOD = f"stratified percentile bootstrap, {RESAMPLES} resamples"

_CHUNK_CELLS = 1 << 20
"""Counts held at once by the bootstrap, a class and a score column (8 MiB)."""


def usable(
    scores: Sequence[float | None] | ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Drops texts whose score is None, NaN or infinite: `(scores, labels, number dropped)`."""
    values = np.asarray(scores, dtype=np.float64)  # None becomes NaN
    labels = np.asarray(labels, dtype=np.int64)
    keep = np.isfinite(values)
    return values[keep], labels[keep], int((~keep).sum())


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: P(member > non-member) + P(equal) / 2."""
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
    """Percentile bootstrap interval of the AUC; members and non-members are resampled apart."""
    values, is_member = _checked(scores, labels)
    aucs = _resampled_aucs([values], is_member, seed, resamples)[0]
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
    """AUC of `a` minus AUC of `b` on the same texts, with its 95 % interval `(d, low, high)`.

    Each resample draws the same texts for both attacks, so what makes a text easy for both
    cancels; two separate intervals that overlap do not show that the attacks are equal.
    """
    a, is_member = _checked(scores_a, labels)
    b, _ = _checked(scores_b, labels)
    difference = auc(a, is_member) - auc(b, is_member)
    aucs = _resampled_aucs([a, b], is_member, seed, resamples)
    low, high = np.quantile(aucs[0] - aucs[1], [0.025, 0.975])
    return difference, float(low), float(high)


def tpr_at_fpr(scores: ArrayLike, labels: ArrayLike, fpr: float) -> dict[str, Any] | None:
    """Largest share of members found while at most a share `fpr` of non-members is flagged.

    A text is flagged if its score is at least the threshold, so equal scores move together and
    ties count against the attack. (Taking the ROC point nearest to `fpr`, as the published code
    does, may exceed it.) `threshold` is None where only an infinite one is strict enough; `ci` is
    the exact Clopper-Pearson 95 % interval of the TPR with the threshold taken as given.

    Returns None with fewer than `1 / fpr` non-members: one false alarm would already exceed `fpr`.
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
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """`(fpr, tpr, thresholds)`, one point a distinct score, from (0, 0) at infinity to (1, 1)."""
    values, is_member = _checked(scores, labels)
    return roc_curve(is_member, values, drop_intermediate=False)


def summarize(scores: ArrayLike, labels: ArrayLike, *, seed: int) -> dict[str, Any]:
    """All metrics of one attack, as plain values for JSON.

    Keys: `auc`, `auc_ci`, `auc_ci_method`, `tpr_at_fpr` (by `FPRS`, see `tpr_at_fpr`),
    `n_members`, `n_nonmembers`, `notes` (sentences), and `saturated` {`share`} if several texts
    share the highest score. With a class empty the metrics are None and a note says so.
    """
    labels = np.asarray(labels)
    n_members, n_nonmembers = int((labels == 1).sum()), int((labels == 0).sum())
    summary: dict[str, Any] = {
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
    summary["auc"] = auc(values, is_member)
    summary["auc_ci"] = list(auc_interval(values, is_member, seed=seed))
    summary["tpr_at_fpr"] = {x: tpr_at_fpr(values, is_member, float(x)) for x in FPRS}
    at_top = values == values.max()
    if at_top.sum() > 1:
        summary["saturated"] = {"share": float(at_top.mean())}
    summary["notes"] = _notes(summary, int(at_top.sum()), int((at_top & ~is_member).sum()))
    return summary


def _notes(summary: dict[str, Any], top: int, top_nonmembers: int) -> list[str]:
    """Why a number of the summary is missing, zero or without an interval."""
    notes = []
    if summary["auc_ci"][0] == summary["auc_ci"][1]:
        notes.append(
            "The AUC interval has no width because every resample gives the same AUC; "
            "it understates the uncertainty."
        )
    for x, result in summary["tpr_at_fpr"].items():
        name = f"TPR at {float(x) * 100:g} % FPR"
        if result is None:
            needed = math.ceil(1 / float(x) - 1e-9)
            notes.append(
                f"{name} needs at least {needed} non-members, there are {summary['n_nonmembers']}."
            )
        elif result["threshold"] is None and top > 1:
            notes.append(
                f"{name} is 0 because {top} texts share the highest score and "
                f"{top_nonmembers} of them are non-members."
            )
    return notes


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores as float64 [n] and `is_member` as bool [n], both classes present."""
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
    values: NDArray[np.float64], is_member: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Thresholds from infinity downwards, and the members and non-members at or above each."""
    distinct, codes = np.unique(values, return_inverse=True)
    per_class = [np.bincount(codes[of], minlength=distinct.size) for of in (is_member, ~is_member)]
    members, nonmembers = (np.r_[0, np.cumsum(counts[::-1])] for counts in per_class)
    return np.r_[np.inf, distinct[::-1]], members, nonmembers


def _resampled_aucs(
    columns: list[NDArray[np.float64]], is_member: NDArray[np.bool_], seed: int, resamples: int
) -> NDArray[np.float64]:
    """AUC of each score column in each resample [columns, resamples]; one draw serves all columns.

    A resample is reduced to how often each distinct score was drawn, so no sorting happens inside
    the loop: AUC = sum over scores of members x (non-members below + half of those equal).
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
    chunk = max(1, _CHUNK_CELLS // is_member.size)
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


def _counts(codes: NDArray[np.int64], num_distinct: int) -> NDArray[np.int64]:
    """How often each of `num_distinct` codes occurs in each row: [r, n] -> [r, num_distinct]."""
    rows = codes.shape[0]
    shifted = codes + np.arange(rows)[:, None] * num_distinct
    return np.bincount(shifted.ravel(), minlength=rows * num_distinct).reshape(rows, num_distinct)
