"""Metrics against naive oracles: pairs, all thresholds, a bootstrap one resample at a time."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import beta

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
    """Every score and infinity tried as a threshold: the best `(tpr, -realised fpr)`."""
    best = (0.0, 0.0)
    for threshold in [*scores, math.inf]:
        flagged = scores >= threshold
        realised = flagged[labels == 0].mean()
        if realised <= fpr:
            best = max(best, (flagged[labels == 1].mean(), -realised))
    return best[0], -best[1]


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
    assert (result["tpr"], result["fpr"]) == naive_tpr(scores, labels, fpr)
    threshold = math.inf if result["threshold"] is None else result["threshold"]
    flagged = scores >= threshold
    assert flagged[labels == 1].mean() == result["tpr"]
    assert flagged[labels == 0].mean() == result["fpr"]


def test_tpr_is_zero_at_low_fpr_when_votes_saturate():
    # 90 of 100 members but also 6 of 100 non-members have the highest score, 1.0.
    scores = np.r_[np.ones(90), np.full(10, 0.5), np.ones(6), np.linspace(0, 0.4, 94)]
    labels = np.r_[np.ones(100, int), np.zeros(100, int)]
    assert metrics.tpr_at_fpr(scores, labels, 0.01) == {
        "tpr": 0.0,
        "ci": [0.0, pytest.approx(1 - 0.025 ** (1 / 100))],
        "fpr": 0.0,
        "threshold": None,
    }
    assert metrics.tpr_at_fpr(scores, labels, 0.1)["tpr"] == 1.0
    summary = metrics.summarize(scores, labels, seed=0)
    assert summary["saturated"] == {"share": 96 / 200}
    assert any("96 texts share the highest score and 6" in note for note in summary["notes"])


def test_perfect_separation_finds_every_member():
    scores, labels = np.arange(20.0), np.repeat([0, 1], 10)
    result = metrics.tpr_at_fpr(scores, labels, 0.1)
    assert (result["tpr"], result["fpr"], result["threshold"]) == (1.0, 0.0, 10.0)
    summary = metrics.summarize(scores, labels, seed=0)
    assert summary["auc"] == 1.0
    assert summary["auc_ci"] == [1.0, 1.0]
    assert any("no width" in note for note in summary["notes"])
    assert "saturated" not in summary


@pytest.mark.parametrize(("fpr", "enough"), [(0.1, 10), (0.01, 100), (0.001, 1000)])
def test_tpr_needs_one_over_fpr_nonmembers(fpr, enough):
    scores, labels = draw(1, 5, enough)
    assert metrics.tpr_at_fpr(scores, labels, fpr) is not None
    drop = np.flatnonzero(labels == 0)[0]
    assert metrics.tpr_at_fpr(np.delete(scores, drop), np.delete(labels, drop), fpr) is None


def test_allowed_false_positives_survive_floating_point():
    # 0.29 * 100 is 28.999999999999996; 29 of 100 non-members are allowed all the same.
    scores = np.r_[np.full(10, 71.0), np.arange(100.0)]
    labels = np.r_[np.ones(10, int), np.zeros(100, int)]
    result = metrics.tpr_at_fpr(scores, labels, 0.29)
    assert (result["tpr"], result["fpr"]) == (1.0, 0.29)


def test_tpr_interval_is_clopper_pearson():
    scores, labels = draw(2, 80, 100, shift=1.0)
    result = metrics.tpr_at_fpr(scores, labels, 0.1)
    k = round(result["tpr"] * 80)
    exact = [beta.ppf(0.025, k, 80 - k + 1), beta.ppf(0.975, k + 1, 80 - k)]
    np.testing.assert_allclose(result["ci"], exact, atol=1e-9)


@pytest.mark.parametrize("levels", [None, 4])
def test_bootstrap_equals_one_resample_at_a_time(levels):
    """The same draws, each AUC by counting pairs."""
    scores, labels = draw(3, 12, 17, levels=levels)
    fast = metrics.resampled_aucs([scores], labels == 1, seed=5, resamples=6)[0]
    of_members, of_nonmembers = (
        np.random.default_rng(s) for s in np.random.SeedSequence(5).spawn(2)
    )
    for value in fast:
        drawn_members = scores[labels == 1][of_members.integers(12, size=12)]
        drawn_nonmembers = scores[labels == 0][of_nonmembers.integers(17, size=17)]
        pooled, classes = np.r_[drawn_members, drawn_nonmembers], np.repeat([1, 0], [12, 17])
        assert value == pytest.approx(naive_auc(pooled, classes), abs=1e-12)


def test_bootstrap_does_not_depend_on_the_chunk_size(monkeypatch):
    scores, labels = draw(4, 30, 41)
    whole = metrics.auc_interval(scores, labels, seed=1, resamples=50)
    monkeypatch.setattr(metrics, "CHUNK_CELLS", 71 * 7)
    assert metrics.auc_interval(scores, labels, seed=1, resamples=50) == whole
    assert metrics.auc_interval(scores, labels, seed=2, resamples=50) != whole


def test_auc_interval_covers_the_true_auc():
    # AUC of unit Gaussians 1 apart is Phi(1 / sqrt 2). 200 trials at 95 %: the binomial standard
    # deviation is 1.5 %, so 0.89 to 0.995 is about four of them below and three above.
    truth = 0.5 * (1 + math.erf(0.5))
    intervals = [
        metrics.auc_interval(*draw(100 + i, 60, 80, shift=1.0), seed=i, resamples=400)
        for i in range(200)
    ]
    coverage = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.89 <= coverage <= 0.995


def test_interval_width_follows_the_level():
    scores, labels = draw(5, 60, 60)
    low95, high95 = metrics.auc_interval(scores, labels, seed=0)
    low50, high50 = metrics.auc_interval(scores, labels, seed=0, level=0.5)
    assert low95 < low50 < metrics.auc(scores, labels) < high50 < high95


def test_stratified_resamples_always_hold_both_classes():
    scores, labels = draw(6, 2, 50)
    low, high = metrics.auc_interval(scores, labels, seed=0)
    assert 0 <= low <= high <= 1


def test_paired_difference_of_an_attack_with_itself_is_exactly_zero():
    scores, labels = draw(7, 40, 40)
    # Any increasing function keeps the order, so every resample must give the same AUC to both.
    assert metrics.paired_difference(scores, np.exp(scores), labels, seed=0) == (0, 0, 0)


def test_paired_difference_is_signed_and_narrower_than_unpaired():
    scores, labels = draw(8, 150, 150, shift=1.0)
    noisy = scores + np.random.default_rng(0).normal(0, 0.7, scores.size)
    difference, low, high = metrics.paired_difference(scores, noisy, labels, seed=0)
    assert difference == pytest.approx(naive_auc(scores, labels) - naive_auc(noisy, labels))
    assert low < difference < high
    mirrored = metrics.paired_difference(noisy, scores, labels, seed=0)
    np.testing.assert_allclose(mirrored, [-difference, -high, -low], atol=1e-12)
    widths = [np.diff(metrics.auc_interval(s, labels, seed=0))[0] for s in (scores, noisy)]
    assert high - low < np.hypot(*widths)


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
    summary = metrics.summarize(scores, labels, seed=0)
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
    assert summary["auc_ci_method"] == "stratified percentile bootstrap, 2000 resamples"
    assert list(summary["tpr_at_fpr"]) == ["0.1", "0.01", "0.001"]
    assert (summary["n_members"], summary["n_nonmembers"]) == (150, 200)
    assert summary["tpr_at_fpr"]["0.01"] == metrics.tpr_at_fpr(scores, labels, 0.01)
    assert summary["tpr_at_fpr"]["0.001"] is None
    assert summary["notes"] == ["TPR at 0.1 % FPR needs at least 1000 non-members, there are 200."]


@pytest.mark.parametrize("labels", [[1, 1], [0, 0], []])
def test_summary_without_one_of_the_classes_is_null_with_a_reason(labels):
    summary = metrics.summarize(np.ones(len(labels)), labels, seed=0)
    assert summary["auc"] is None
    assert summary["auc_ci"] is None
    assert set(summary["tpr_at_fpr"].values()) == {None}
    assert f"there are {labels.count(1)} and {labels.count(0)}" in summary["notes"][0]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="one score and one label"):
        metrics.auc([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="remove missing ones"):
        metrics.auc([1.0, math.nan], [1, 0])
    with pytest.raises(ValueError, match="labels must be 1"):
        metrics.auc([1.0, 2.0], [1, 2])
    with pytest.raises(DataError, match="got 2 and 0"):
        metrics.auc([1.0, 2.0], [1, 1])


def test_bootstrap_of_ten_thousand_texts_a_class_keeps_memory_bounded():
    scores, labels = draw(11, 10_000, 10_000)
    tracemalloc.start()
    metrics.auc_interval(scores, labels, seed=0, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 200 resamples at once would take 200 x 20,000 x 8 bytes = 32 MB for one of the ~8 arrays of
    # a chunk; chunks of 1 Mi cells hold each to at most 8 MiB.
    assert peak < 100e6
