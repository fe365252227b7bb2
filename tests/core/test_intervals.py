"""Intervals against pairs, scans, SciPy's bootstrap, and the truth in small simulations."""

import numpy as np
import pytest
from scipy import stats

from sama_jax.core import intervals, metrics

Z = stats.norm.isf(0.025)


def binormal(rng, auc, n):
    shift = np.sqrt(2) * stats.norm.ppf(auc)
    return np.r_[rng.normal(shift, 1, n), rng.normal(0, 1, n)], np.repeat([1, 0], n)


def test_errors_are_those_of_a_table_of_all_pairs():
    rng = np.random.default_rng(0)
    scores, is_member = rng.integers(0, 6, (50, 2)).astype(float), rng.random(50) < 0.4
    scores[[3, 40], 1] = np.nan
    found = intervals.auc_errors(scores, is_member)
    for column, (values, auc) in enumerate(zip(scores.T, found.auc)):
        present = np.isfinite(values)
        x, y = values[is_member & present][:, None], values[~is_member & present]
        pairs = (x > y) + 0.5 * (x == y)
        assert auc == pytest.approx(pairs.mean(), abs=1e-12)
        variance = sum(pairs.mean(axis=a).var(ddof=1) / pairs.shape[1 - a] for a in (0, 1))
        assert found.deviation[column] ** 2 == pytest.approx(variance, rel=1e-12)
    assert found.members.tolist() == [is_member.sum()] * 2 or found.members[1] < found.members[0]


def test_the_covariance_is_that_of_redrawn_texts():
    rng = np.random.default_rng(1)
    draws = []
    for _ in range(800):
        common = rng.normal(size=(60, 1))
        scores = common + rng.normal(size=(60, 2)) + np.r_[np.ones(30), np.zeros(30)][:, None]
        draws.append(intervals.auc_errors(scores, np.arange(60) < 30))
    true = np.cov(np.array([d.auc for d in draws]).T)
    mean = np.mean([d.parts.T @ d.parts for d in draws], axis=0)
    # The standard deviation of a variance from 800 draws is 5 % of it.
    np.testing.assert_allclose(mean, true, rtol=0.2)


def test_groups_of_one_text_change_nothing_and_whole_copies_count_once():
    rng = np.random.default_rng(2)
    scores, labels = binormal(rng, 0.8, 40)
    alone = intervals.auc_errors(scores[:, None], labels == 1)
    same = intervals.auc_errors(scores[:, None], labels == 1, np.arange(80)[::-1])
    assert same.deviation == pytest.approx(alone.deviation, rel=1e-12)
    copies = np.repeat(scores, 3)[:, None], np.repeat(labels == 1, 3), np.repeat(np.arange(80), 3)
    grouped = intervals.auc_errors(*copies)
    assert grouped.deviation == pytest.approx(alone.deviation, rel=1e-12)
    assert (grouped.members, grouped.nonmembers) == (40, 40)
    assert (alone.members, alone.nonmembers) == (40, 40)


@pytest.mark.parametrize("n", [32, 64, 100, 400])
def test_a_class_that_is_one_document_is_worth_one_text(n):
    """Its errors add up to 0 but for rounding, which made 400 texts of it."""
    is_member = np.repeat([True, False], n)
    for seed in range(5):
        scores = np.random.default_rng(seed).normal(size=(2 * n, 1))
        groups = np.where(is_member, 0, np.arange(2 * n))
        assert intervals.auc_errors(scores, is_member, groups).members == 1
        low, high = metrics.auc_interval(scores[:, 0], is_member, groups)
        assert (low < 0.2, high > 0.8) == (True, True)


def documents(rng, n, count):
    """Draws the documents of `n` texts: a few large ones, many small ones."""
    weight = rng.lognormal(0, 1, count)
    return np.r_[np.arange(count), rng.choice(count, n - count, p=weight / weight.sum())]


def test_the_auc_interval_covers_with_few_documents_of_unequal_sizes():
    """By normal quantiles, and with errors that a large document hides, it covers 83 % here."""
    rng, covered, is_member = np.random.default_rng(8), 0, np.repeat([True, False], 200)
    for _ in range(250):
        groups = np.r_[documents(rng, 200, 10), 10 + np.arange(200)]
        scores = np.sqrt(0.3) * rng.normal(size=210)[groups] + np.sqrt(0.7) * rng.normal(size=400)
        low, high = metrics.auc_interval(scores, is_member, groups)
        covered += low <= 0.5 <= high
    assert covered / 250 >= 0.91  # 95 % less three standard deviations


def test_a_group_of_members_and_nonmembers_makes_them_cancel():
    """A document's own level lifts both of its texts, so it is no error of the AUC."""
    rng = np.random.default_rng(3)
    level = rng.normal(size=200)
    scores = np.r_[level, level][:, None] + 0.1 * rng.normal(size=(400, 1))
    is_member, groups = np.arange(400) < 200, np.tile(np.arange(200), 2)
    by_group = intervals.auc_errors(scores, is_member, groups).deviation
    assert by_group < 0.2 * intervals.auc_errors(scores, is_member).deviation


def test_scipys_bootstrap_agrees_where_it_covers():
    scores, labels = binormal(np.random.default_rng(4), 0.75, 150)

    def auc(x, y, axis):
        return stats.mannwhitneyu(x, y, axis=axis).statistic / (x.shape[axis] * y.shape[axis])

    data = scores[labels == 1], scores[labels == 0]
    found = stats.bootstrap(data, auc, vectorized=True, method="BCa", n_resamples=2000, rng=0)
    ends = metrics.auc_interval(scores, labels)
    np.testing.assert_allclose(ends, tuple(found.confidence_interval), atol=0.008)


@pytest.mark.parametrize(
    ("auc", "m", "n"), [(0.0, 10, 30), (0.6, 10, 30), (0.97, 50, 80), (1, 500, 500)]
)
def test_newcombes_interval_holds_what_its_own_deviation_allows(auc, m, n):
    low, high = intervals.newcombe_interval(float(auc), m, n, Z)
    grid = np.linspace(0, 1, 5_001)[1:-1]
    variance = np.array([intervals.auc_variance(float(x), m, n) for x in grid])
    inside = grid[(grid - auc) ** 2 <= Z**2 * variance]
    assert low == pytest.approx(inside[0], abs=4e-4)
    assert high == pytest.approx(inside[-1], abs=4e-4)
    assert low < high


def test_the_tpr_interval_is_clopper_pearson_where_the_threshold_is_certain():
    """All non-members are equal and below: whatever their number above, the bar is the same."""
    members = np.r_[np.full(37, 2.0), np.full(13, 0.0)]
    found = intervals.tpr_interval(members, np.ones(1000), 0.1, (50, 1000))
    # Above the bar are 37 members for certain; all that is not below it are those, too.
    exact = stats.beta.ppf(0.025, 37, 14), stats.beta.ppf(0.975, 38, 13)
    np.testing.assert_allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize(("auc", "rate"), [(0.7, 0.1), (0.9, 0.1), (0.9, 0.01)])
def test_the_tpr_interval_covers_the_tpr_at_the_true_threshold(auc, rate):
    """Clopper-Pearson with the threshold as given covers 49 to 80 % here."""
    true = stats.norm.sf(stats.norm.isf(rate) - np.sqrt(2) * stats.norm.ppf(auc))
    rng, covered = np.random.default_rng(5), 0
    for _ in range(200):
        scores, labels = binormal(rng, auc, 100)
        low, high = metrics.tpr_at_fpr(scores, labels, rate)["ci"]
        covered += low <= true <= high
    assert covered / 200 >= 0.91  # 95 % less 2.6 standard deviations; it is cautious


@pytest.mark.parametrize(("auc", "n"), [(0.5, 40), (0.9, 60), (0.995, 50)])
@pytest.mark.parametrize("levels", [None, 9])
def test_the_auc_interval_covers_with_and_without_ties(auc, n, levels):
    """The percentile bootstrap covers 56 to 71 % in the last case."""
    rng, covered = np.random.default_rng(6), 0
    true = auc if levels is None else tied_auc(auc, levels)
    for _ in range(250):
        scores, labels = binormal(rng, auc, n)
        found = scores if levels is None else np.clip(np.round(scores), -4, levels - 5)
        low, high = metrics.auc_interval(found, labels)
        covered += low <= true <= high
    assert covered / 250 >= 0.91  # 95 % less three standard deviations


def tied_auc(auc, levels):
    edges = np.r_[-np.inf, np.arange(-3.5, levels - 5), np.inf]
    shift = np.sqrt(2) * stats.norm.ppf(auc)
    member, other = (np.diff(stats.norm.cdf(edges - s)) for s in (shift, 0))
    return float(member @ (np.cumsum(other) - other / 2))


@pytest.mark.parametrize("grouped", [False, True])
def test_differences_are_called_real_in_about_five_percent_of_nulls(grouped):
    rng, called = np.random.default_rng(7), 0
    size = 4 if grouped else 1
    groups = np.repeat(np.arange(240 // size), size) if grouped else None
    labels = np.repeat([1, 0], 120)
    for _ in range(300):
        common, own = (np.repeat(rng.normal(size=(240 // size, k)), size, axis=0) for k in (1, 2))
        scores = common + own + 0.3 * rng.normal(size=(240, 2)) + labels[:, None]
        _, low, high = metrics.paired_difference(*scores.T, labels, groups)
        called += not low <= 0 <= high
    assert 0.02 <= called / 300 <= 0.09  # 5 % and three standard deviations


def test_the_allowed_false_alarms_keep_the_rate_of_new_texts():
    for count in range(1, 400):
        for rate in (0.29, 0.1, 0.01):
            allowed = intervals.allowed_false_alarms(count, rate)
            if allowed is None:
                assert 1 / (count + 1) > rate + 1e-12
            else:
                assert (allowed + 1) / (count + 1) <= rate + 1e-12 < (allowed + 2) / (count + 1)


def test_the_wider_end_counts_where_few_texts_are_on_the_wrong_side():
    plain, score = (
        intervals.logit_interval(0.97, 0.012, Z),
        intervals.newcombe_interval(0.97, 100, 100, Z),
    )
    wider = min(plain[0], score[0]), max(plain[1], score[1])
    assert wider != plain
    assert intervals.auc_interval(0.97, 0.012, 100, 100, Z) == wider
    assert intervals.auc_interval(0.97, 0.012, 1000, 1000, Z) == plain
    assert intervals.auc_interval(0.03, 0.012, 100, 100, Z) == pytest.approx(
        (1 - wider[1], 1 - wider[0]), abs=1e-9
    )
