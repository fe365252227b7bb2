"""Permutation tests, simultaneous intervals and power against naive loops and SciPy."""

import numpy as np
import pytest
from scipy import stats

from sama_jax.core import inference, metrics


def matrix(seed, n=40, k=6, shift=0.0, shared=0.7):
    """Scores of k attacks that share a part, and labels, n texts a class."""
    rng = np.random.default_rng(seed)
    common = np.sqrt(shared) * rng.normal(size=(2 * n, 1))
    labels = np.repeat([1, 0], n)
    scores = common + np.sqrt(1 - shared) * rng.normal(size=(2 * n, k))
    return scores + shift * labels[:, None], labels


def test_z_is_scipys_mann_whitney_with_ties_and_missing_scores():
    scores, labels = matrix(0, shift=0.5)
    scores = np.round(scores * 2)
    scores[[3, 50], 2] = np.nan
    found = inference.permutation_tests(scores, labels, permutations=1)
    for column, z in zip(scores.T, found.z):
        present = np.isfinite(column)
        asymptotic = stats.mannwhitneyu(
            column[present & (labels == 1)],
            column[present & (labels == 0)],
            alternative="greater",
            use_continuity=False,
            method="asymptotic",
        )
        assert stats.norm.sf(z) == pytest.approx(asymptotic.pvalue, rel=1e-9)


def test_single_p_values_are_scipys_permutation_test():
    scores, labels = matrix(1, n=30, k=2, shift=0.4)
    found = inference.permutation_tests(scores, labels, permutations=4999)
    for column, p in zip(scores.T, found.p):
        exact = stats.permutation_test(
            (column[labels == 1], column[labels == 0]),
            lambda x, y, axis: stats.mannwhitneyu(x, y, axis=axis).statistic,
            permutation_type="independent",
            alternative="greater",
            n_resamples=4999,
            vectorized=True,
            rng=0,
        )
        # Two Monte-Carlo estimates of one p: four standard deviations of their difference.
        bound = 4 * np.sqrt(2 * exact.pvalue * (1 - exact.pvalue) / 4999)
        assert abs(p - exact.pvalue) < bound


def test_adjusted_p_values_are_those_of_a_naive_step_down_loop():
    scores, labels = matrix(2, n=20, k=5, shift=0.3)
    seen = []
    original = inference._permuted

    def keep(*args):
        for drawn in original(*args):
            seen.extend(drawn)
            yield drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_permuted", keep)
        patch.setattr(inference, "CHUNK_CELLS", 40 * 7)
        found = inference.permutation_tests(scores, labels, permutations=30)

    def statistics(is_member):
        return np.array([metrics.auc(column, is_member) for column in scores.T])

    order = np.argsort(-statistics(labels == 1))
    expected, before = np.zeros(5), 0.0
    for place, attack in enumerate(order):
        rest = order[place:]
        observed = statistics(labels == 1)[attack]
        count = sum(statistics(drawn)[rest].max() >= observed - 1e-12 for drawn in seen)
        before = max(before, (1 + count) / 31)
        expected[attack] = before
    np.testing.assert_allclose(found.adjusted, expected, atol=1e-12)


def test_a_copy_of_an_attack_and_another_scale_change_nothing():
    scores, labels = matrix(3, shift=0.5)
    found = inference.permutation_tests(scores, labels, permutations=499)
    more = inference.permutation_tests(
        np.c_[scores, np.exp(scores[:, 0])], labels, permutations=499
    )
    np.testing.assert_array_equal(more.adjusted[:-1], found.adjusted)
    assert more.p[-1] == found.p[0]


def test_a_perfect_attack_has_the_smallest_p_and_a_constant_one_the_largest():
    scores, labels = matrix(4)
    scores[:, 0], scores[:, 1] = labels, 7.0
    scores[:, 2], scores[labels == 1, 3] = np.nan, np.nan
    found = inference.permutation_tests(scores, labels, permutations=999)
    assert found.adjusted[0] == found.p[0] == 1 / 1000
    assert found.p[1:4].tolist() == [1, 1, 1]
    assert found.adjusted[1:4].tolist() == [1, 1, 1]


def test_groups_are_permuted_whole_and_mixed_ones_inside():
    groups = np.array([0, 0, 1, 2, 2, 2, 3, 3, 3, 4])
    is_member = np.array([1, 1, 0, 0, 0, 0, 1, 1, 0, 1], bool)
    drawn = np.concatenate(list(inference._permuted(is_member, groups, 500, 0)))
    assert drawn.shape == (500, 10)
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 3:6].sum(axis=1) % 3 == 0).all()
    assert (drawn[:, 6:9].sum(axis=1) == 2).all()
    assert (drawn[:, [0, 2, 3, 9]].sum(axis=1) == 2).all()
    assert len(np.unique(drawn, axis=0)) == 6 * 3
    alone = np.concatenate(list(inference._permuted(is_member, np.arange(10), 500, 0)))
    independent = np.concatenate(list(inference._permuted(is_member, None, 500, 0)))
    np.testing.assert_array_equal(alone, independent)


def test_permuted_labels_are_claimed_no_more_often_than_the_level():
    """300 nulls of 8 attacks at 5 %: four standard deviations of a binomial are 5 %."""
    claimed = 0
    for seed in range(300):
        scores, labels = matrix(100 + seed, n=20, k=8)
        found = inference.permutation_tests(scores, labels, permutations=199, seed=seed)
        claimed += (found.adjusted <= 0.05).any()
    assert claimed / 300 <= 0.10


def test_p_values_of_grouped_texts_are_honest_where_those_of_texts_are_not():
    """Four copies of each document: the test by texts rejects far more than 5 %."""
    by_text = by_group = 0
    groups = np.repeat(np.arange(24), 4)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scores = np.repeat(rng.normal(size=24), 4)[:, None] + 0.1 * rng.normal(size=(96, 1))
        labels = np.repeat(rng.permutation(np.repeat([0, 1], 12)), 4)
        by_text += inference.permutation_tests(scores, labels, permutations=99).p[0] <= 0.05
        by_group += (
            inference.permutation_tests(scores, labels, groups, permutations=99).p[0] <= 0.05
        )
    assert by_text / 200 > 0.13
    assert by_group / 200 <= 0.11  # 5 % and four standard deviations


@pytest.mark.parametrize("documents", [(5, 300), (300, 5)])
def test_few_large_documents_against_many_small_ones_keep_the_level(documents):
    """Of 2.5 %, 14 of 200 lie four deviations above; ranks alone claim 24 and 48 here."""
    claimed, labels = 0, np.repeat([1, 0], 300)
    groups = np.r_[np.arange(300) % documents[0], 300 + np.arange(300) % documents[1]]
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=600)[groups] + rng.normal(size=600)
        found = inference.permutation_tests(scores[:, None], labels, groups, permutations=119)
        claimed += found.p[0] <= 0.025
    assert claimed <= 14


def test_the_statistic_of_groups_is_that_of_a_naive_loop():
    scores, labels = matrix(9, n=12, k=3, shift=0.5)
    scores[[2, 15], 1] = np.nan
    groups = np.r_[0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 9, 9, 6, 6, 6, 6, 7, 7, 8, 10, 11, 12, 9, 9]
    found = inference.permutation_tests(scores, labels, groups, permutations=1)
    units = np.where(groups == 9, 100 + np.arange(24), groups)  # of both classes: text by text
    for column, z in zip(scores.T, found.z):
        ranks, difference, variance = stats.rankdata(column, nan_policy="omit"), 0.0, 0.0
        for label, sign in ((1, 1), (0, -1)):
            own = (labels == label) & np.isfinite(column)
            mean, several = ranks[own].mean(), np.unique(units[own])
            errors = [(ranks[own & (units == u)] - mean).sum() / own.sum() for u in several]
            variance += np.square(errors).sum() * len(several) / (len(several) - 1)
            difference += sign * mean
        assert z == pytest.approx(difference / np.sqrt(variance), rel=1e-6)


def test_one_attack_alone_needs_no_wider_interval():
    scores, labels = matrix(5, n=200, k=1, shift=0.3)
    found = inference.simultaneous_intervals(scores, labels)
    assert found.quantile == pytest.approx(stats.norm.isf(0.025), abs=0.03)
    assert found.auc[0] == pytest.approx(metrics.auc(scores[:, 0], labels), abs=1e-12)


@pytest.mark.parametrize("copies", [1, 20])
def test_the_width_follows_what_attacks_share(copies):
    """Copies of one attack count as one, independent ones as Sidak's correction says."""
    scores, labels = matrix(6, n=400, k=10, shared=0.0)
    found = inference.simultaneous_intervals(np.tile(scores, copies), labels)
    sidak = stats.norm.isf((1 - 0.95 ** (1 / 10)) / 2)
    assert found.quantile == pytest.approx(sidak, abs=0.06)
    same = inference.simultaneous_intervals(np.tile(scores[:, :1], 10), labels)
    assert same.quantile == pytest.approx(1.96, abs=0.03)


def test_intervals_always_have_a_width_and_missing_classes_none():
    scores, labels = matrix(7, k=3, shift=1.0)
    scores[:, 0] = labels
    scores[labels == 0, 1] = np.nan
    found = inference.simultaneous_intervals(scores, labels)
    assert found.auc[0] == found.high[0] == 1
    assert found.low[0] < 0.97
    assert np.isnan([found.auc[1], found.low[1], found.high[1]]).all()
    assert found.low[2] < found.auc[2] < found.high[2]
    none = inference.simultaneous_intervals(scores[:, 1:2], labels)
    assert np.isnan(none.quantile)


@pytest.mark.parametrize("members", [30, 120])
def test_the_detectable_auc_is_found_in_eighty_percent_of_audits(members):
    auc = inference.detectable_auc(members, 60)
    rng = np.random.default_rng(0)
    shift = np.sqrt(2) * stats.norm.ppf(auc)
    found = stats.mannwhitneyu(
        rng.normal(shift, 1, (1500, members)),
        rng.normal(0, 1, (1500, 60)),
        axis=1,
        alternative="greater",
    )
    # A normal approximation; 1500 draws have a standard deviation of 1 %.
    assert (found.pvalue <= 0.025).mean() == pytest.approx(0.8, abs=0.06)


def test_the_detectable_tpr_is_found_in_eighty_percent_and_guessing_in_few():
    members, nonmembers, allowed = 200, 300, 2  # 1 % of 301 texts, less one
    tpr = inference.detectable_tpr(members, nonmembers)
    rng = np.random.default_rng(0)

    def flagged(shares):
        """Counts members above the third highest non-member, a share of them far above all."""
        scores = rng.random((4000, members + nonmembers))
        scores[:, :members] += rng.random((4000, members)) < shares
        bar = np.sort(scores[:, members:], axis=1)[:, -allowed - 1]
        return (scores[:, :members] > bar[:, None]).sum(axis=1)

    guessing = flagged(0.0)
    needed = next(k for k in range(members) if (guessing >= k).mean() <= 0.025)
    assert (flagged(tpr) >= needed).mean() >= 0.79


def test_too_few_texts_can_show_nothing():
    assert inference.detectable_auc(3, 3) is None  # 20 permutations, the smallest p is .05
    assert inference.detectable_auc(6, 6) > 0.9
    assert inference.detectable_tpr(500, 98) is None
    assert inference.detectable_tpr(1, 99, fpr=0.1) is None  # it is above nine by chance in 10 %
    assert inference.detectable_tpr(500, 500, fpr=0.001) is None
    assert inference.detectable_auc(2000, 2000) < 0.53
