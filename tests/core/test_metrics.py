"""Metrics against naive oracles: pairs and all thresholds."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from sama_jax.core import metrics
from sama_jax.errors import DataError


def draw(seed, n_members, n_nonmembers, shift=0.5, levels=None):
    """Gaussian scores; with `levels`, rounded to a grid in [0, 1] so that many are equal."""
    rng = np.random.default_rng(seed)
    scores = np.r_[rng.normal(shift, 1, n_members), rng.normal(0, 1, n_nonmembers)]
    if levels:
        scores = np.clip(np.round((0.5 + scores / 4) * levels) / levels, 0, 1)
    labels = np.r_[np.ones(n_members, int), np.zeros(n_nonmembers, int)]
    order = rng.permutation(scores.size)
    return scores[order], labels[order]


def naive_auc(scores, labels):
    pairs = [(m > n) + 0.5 * (m == n) for m in scores[labels == 1] for n in scores[labels == 0]]
    return sum(pairs) / len(pairs)


def naive_tpr(scores, labels, fpr):
    """Every score and infinity tried as a threshold: the best `(tpr, realised fpr)`, or None."""
    best = []
    for threshold in [*scores, math.inf]:
        flagged = scores >= threshold
        false = flagged[labels == 0].sum()
        if (false + 1) / ((labels == 0).sum() + 1) <= fpr:
            best.append((flagged[labels == 1].mean(), -false / (labels == 0).sum()))
    tpr, realised = max(best)
    top = scores == scores.max()
    if tpr == 0 and (top & (labels == 1)).any():
        return None  # the members at the top are not found because of ties alone
    return tpr, -realised


@pytest.mark.parametrize("levels", [None, 4])
def test_auc_is_the_share_of_won_pairs(levels):
    scores, labels = draw(0, 37, 61, levels=levels)
    assert metrics.auc(scores, labels) == pytest.approx(naive_auc(scores, labels), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 2, 8])
@pytest.mark.parametrize("fpr", [0.1, 0.03, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_tpr_is_the_best_over_all_thresholds(levels, fpr, seed):
    scores, labels = draw(seed, 50, 100, shift=1.0, levels=levels)
    result = metrics.tpr_at_fpr(scores, labels, fpr)
    if result is None:
        assert naive_tpr(scores, labels, fpr) is None
        return
    assert (result["tpr"], result["fpr"]) == naive_tpr(scores, labels, fpr)
    threshold = math.inf if result["threshold"] is None else result["threshold"]
    flagged = scores >= threshold
    assert flagged[labels == 1].mean() == result["tpr"]
    assert flagged[labels == 0].mean() == result["fpr"]


def test_tpr_is_not_attainable_at_low_fpr_when_votes_saturate():
    # 90 of 100 members but also 6 of 100 non-members have the highest score, 1.0.
    scores = np.r_[np.ones(90), np.full(10, 0.5), np.ones(6), np.linspace(0, 0.4, 94)]
    labels = np.r_[np.ones(100, int), np.zeros(100, int)]
    assert metrics.tpr_at_fpr(scores, labels, 0.01) is None
    assert metrics.tpr_at_fpr(scores, labels, 0.1)["tpr"] == 1.0
    summary = metrics.summarize(scores, labels)
    assert summary["saturated"] == {"share": 96 / 200}
    (note,) = [note for note in summary["notes"] if "TPR at 1 % FPR" in note]
    assert "not attainable: 96 texts share the highest score and 6 of them" in note


def test_tpr_is_zero_where_only_nonmembers_stand_at_the_top():
    scores = np.r_[np.full(10, 0.5), np.ones(30), np.zeros(70)]
    labels = np.r_[np.ones(10, int), np.zeros(100, int)]
    result = metrics.tpr_at_fpr(scores, labels, 0.1)
    assert (result["tpr"], result["fpr"], result["threshold"]) == (0.0, 0.0, None)


def test_perfect_separation_finds_every_member_and_has_a_width():
    scores, labels = np.arange(1000.0), np.repeat([0, 1], 500)
    summary = metrics.summarize(scores, labels)
    result = summary["tpr_at_fpr"]["0.01"]
    assert (result["tpr"], result["fpr"], result["threshold"]) == (1.0, 0.0, 500.0)
    assert 0.98 < result["ci"][0] < result["ci"][1] == 1.0
    assert summary["auc"] == summary["auc_ci"][1] == 1.0
    assert 0.99 < summary["auc_ci"][0] < 1.0
    assert summary["tpr_at_fpr"]["0.001"] is None
    assert summary["notes"] == ["TPR at 0.1 % FPR needs at least 999 non-members, there are 500."]
    assert "saturated" not in summary


@pytest.mark.parametrize(("fpr", "enough"), [(0.1, 9), (0.01, 99), (0.001, 999)])
def test_tpr_needs_one_over_fpr_nonmembers_but_one(fpr, enough):
    scores, labels = draw(1, 5, enough)
    assert metrics.tpr_at_fpr(scores, labels, fpr) is not None
    drop = np.flatnonzero(labels == 0)[0]
    assert metrics.tpr_at_fpr(np.delete(scores, drop), np.delete(labels, drop), fpr) is None


def test_allowed_false_positives_survive_floating_point():
    # 0.29 * 100 is 28.999999999999996; 28 of 99 non-members are allowed all the same.
    scores = np.r_[np.full(10, 71.0), np.arange(1.0, 100.0)]
    labels = np.r_[np.ones(10, int), np.zeros(99, int)]
    scores[:10] = 72.0
    result = metrics.tpr_at_fpr(scores, labels, 0.29)
    assert (result["tpr"], result["fpr"]) == (1.0, 28 / 99)


def test_a_new_nonmember_is_flagged_at_most_at_the_rate():
    """The published rule flags 1.9 % of new texts where it says 1 %, with 100 non-members."""
    rates = []
    for seed in range(300):
        scores, labels = draw(seed, 100, 100, shift=1.0)
        threshold = metrics.tpr_at_fpr(scores, labels, 0.01)["threshold"]
        rates.append(0.0 if threshold is None else (1 - math.erf(threshold / math.sqrt(2))) / 2)
    assert np.mean(rates) <= 0.0105  # 0.99 %; its standard deviation over 300 seeds is 0.06 %


def test_groups_count_as_many_texts_as_they_are():
    """Five copies of each text change neither interval, once they are known to be copies.

    But for Student's quantile, in place of the normal one, which that of the AUC takes for groups.
    """
    scores, labels = draw(2, 60, 120, shift=1.0)
    copies = [np.repeat(x, 5) for x in (scores, labels, np.arange(180))]
    alone, grouped = metrics.summarize(scores, labels), metrics.summarize(*copies)
    below = [
        stats.rankdata(scores)[labels == c] - stats.rankdata(scores[labels == c]) for c in (1, 0)
    ]
    freedom = stats.ttest_ind(below[0] / 120, below[1] / 60, equal_var=False).df
    level = 1 - 2 * stats.norm.sf(stats.t.isf(0.025, freedom))
    expected = metrics.auc_interval(scores, labels, level=level)
    assert grouped["auc_ci"] == pytest.approx(expected, abs=1e-9)
    for rate in ("0.1", "0.01"):
        assert grouped["tpr_at_fpr"][rate]["tpr"] == alone["tpr_at_fpr"][rate]["tpr"]
        found = grouped["tpr_at_fpr"][rate]["ci"]
        assert found == pytest.approx(alone["tpr_at_fpr"][rate]["ci"], abs=1e-9)
    assert grouped["n_groups"] == 180
    assert grouped["notes"] == [
        "TPR at 0.1 % FPR needs at least 999 groups of non-members, there are 120."
    ]
    blind = metrics.summarize(*copies[:2])
    assert np.ptp(blind["auc_ci"]) < np.ptp(alone["auc_ci"]) / 2


def test_texts_without_a_group_are_groups_of_their_own():
    scores, labels = draw(3, 30, 40)
    groups = np.full(70, -1)
    assert metrics.auc_interval(scores, labels, groups) == metrics.auc_interval(scores, labels)


def test_interval_width_follows_the_level():
    scores, labels = draw(5, 60, 60)
    low95, high95 = metrics.auc_interval(scores, labels)
    low50, high50 = metrics.auc_interval(scores, labels, level=0.5)
    assert low95 < low50 < metrics.auc(scores, labels) < high50 < high95


def test_a_single_text_of_a_class_has_a_wide_interval():
    scores, labels = draw(6, 1, 50)
    low, high = metrics.auc_interval(scores, labels)
    assert 0 <= low < high <= 1
    assert high - low > 0.5


def test_paired_difference_of_an_attack_with_itself_is_exactly_zero():
    scores, labels = draw(7, 40, 40)
    # Any increasing function keeps the order.
    assert metrics.paired_difference(scores, np.exp(scores), labels) == (0, 0, 0)


def test_paired_difference_is_signed_and_narrower_than_unpaired():
    scores, labels = draw(8, 150, 150, shift=1.0)
    noisy = scores + np.random.default_rng(0).normal(0, 0.7, scores.size)
    difference, low, high = metrics.paired_difference(scores, noisy, labels)
    assert difference == pytest.approx(naive_auc(scores, labels) - naive_auc(noisy, labels))
    assert low < difference < high
    mirrored = metrics.paired_difference(noisy, scores, labels)
    np.testing.assert_allclose(mirrored, [-difference, -high, -low], atol=1e-12)
    widths = [np.diff(metrics.auc_interval(s, labels))[0] for s in (scores, noisy)]
    assert high - low < np.hypot(*widths)


def test_two_perfect_attacks_may_differ_all_the_same():
    labels = np.repeat([0, 1], 30)
    other = np.r_[np.arange(30.0)[::-1], np.arange(30.0, 60.0)]
    difference, low, high = metrics.paired_difference(np.arange(60.0), other, labels)
    assert difference == 0
    assert low < 0 < high


@pytest.mark.parametrize("levels", [None, 8])
def test_roc_has_one_point_for_each_distinct_score(levels):
    scores, labels = draw(9, 40, 40, levels=levels)
    fpr, tpr, thresholds = metrics.roc_points(scores, labels)
    assert thresholds[0] == math.inf
    np.testing.assert_array_equal(thresholds[1:], np.unique(scores)[::-1])
    for f, t, threshold in zip(fpr, tpr, thresholds):
        assert f == (scores[labels == 0] >= threshold).mean()
        assert t == (scores[labels == 1] >= threshold).mean()


def test_usable_drops_missing_scores_with_their_labels():
    scores, labels, dropped = metrics.usable(
        [0.5, None, 1.0, float("nan"), math.inf, -2.0], [1, 1, 0, 0, 1, 0]
    )
    np.testing.assert_array_equal(scores, [0.5, 1.0, -2.0])
    np.testing.assert_array_equal(labels, [1, 0, 0])
    assert dropped == 3


def test_summary_is_plain_json_with_the_documented_keys():
    scores, labels = draw(10, 150, 200)
    summary = metrics.summarize(scores, labels)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary) == [
        "auc",
        "auc_ci",
        "auc_ci_method",
        "tpr_at_fpr",
        "n_members",
        "n_nonmembers",
        "notes",
    ]
    assert list(summary["tpr_at_fpr"]) == ["0.1", "0.01", "0.001"]
    assert (summary["n_members"], summary["n_nonmembers"]) == (150, 200)
    assert summary["tpr_at_fpr"]["0.01"] == metrics.tpr_at_fpr(scores, labels, 0.01)
    assert summary["tpr_at_fpr"]["0.001"] is None
    assert summary["notes"] == ["TPR at 0.1 % FPR needs at least 999 non-members, there are 200."]


@pytest.mark.parametrize("labels", [[1, 1], [0, 0], []])
def test_summary_without_one_of_the_classes_is_null_with_a_reason(labels):
    summary = metrics.summarize(np.ones(len(labels)), labels)
    assert summary["auc"] is None
    assert summary["auc_ci"] is None
    assert set(summary["tpr_at_fpr"].values()) == {None}
    assert f"there are {labels.count(1)} and {labels.count(0)}" in summary["notes"][0]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="one score and one label"):
        metrics.auc([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="remove missing ones"):
        metrics.auc([1.0, math.nan], [1, 0])
    with pytest.raises(ValueError, match="groups must be whole numbers, got float64"):
        metrics.auc_interval([1.0, 0.0], [1, 0], [0.2, 0.7])
    with pytest.raises(ValueError, match="labels must be 1"):
        metrics.auc([1.0, 2.0], [1, 2])
    with pytest.raises(DataError, match="got 2 and 0"):
        metrics.auc([1.0, 2.0], [1, 1])
