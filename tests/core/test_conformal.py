"""p-values, thresholds, false discoveries and collections against exact laws and naive loops."""

import numpy as np
import pytest
from scipy import stats

from sama_jax.core import conformal


@pytest.mark.parametrize("uniform", [None, 0.0, 0.3])
def test_p_values_count_calibration_texts_one_by_one(uniform):
    rng = np.random.default_rng(0)
    scores, calibration = rng.integers(0, 5, 20).astype(float), rng.integers(0, 5, 30).astype(float)
    given = None if uniform is None else np.full(20, uniform)
    for score, p in zip(scores, conformal.p_values(scores, calibration, given)):
        above, equal = (calibration > score).sum(), (calibration == score).sum()
        expected = above + (1 if uniform is None else uniform) * (1 + equal)
        assert p == pytest.approx(expected / 31, abs=1e-12)


def test_p_values_of_new_nonmembers_have_their_exact_law():
    """With continuous scores p (n + 1) is uniform on 1 .. n + 1: chi-square over 4,000 draws."""
    scores = np.random.default_rng(1).normal(size=(4000, 20))
    p = [conformal.p_values(row[:1], row[1:])[0] for row in scores]
    counts = np.bincount(np.rint(np.array(p) * 20).astype(int), minlength=21)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("level", [0.05, 0.1])
def test_saturated_scores_give_careful_p_values_and_exact_ones_when_smoothed(level):
    rng = np.random.default_rng(2)
    scores = np.minimum(np.round(2 * rng.normal(size=(3000, 41))), 2)
    careful = [conformal.p_values(row[:1], row[1:])[0] for row in scores]
    smoothed = [conformal.p_values(row[:1], row[1:], rng.random(1))[0] for row in scores]
    deviation = np.sqrt(level * (1 - level) / 3000)
    assert np.mean(np.array(careful) <= level) < level / 4
    assert abs(np.mean(np.array(smoothed) <= level) - level) < 4 * deviation


def test_p_values_do_not_change_with_the_scale():
    rng = np.random.default_rng(3)
    scores, calibration = rng.normal(size=9), rng.normal(size=40)
    same = conformal.p_values(np.exp(scores), np.exp(calibration))
    np.testing.assert_array_equal(same, conformal.p_values(scores, calibration))


def test_ranks_are_those_of_the_beta_distribution():
    assert conformal.rank_of(200, 0.05) == 10
    assert conformal.rank_of(200, 0.05, 0.9) == 6
    assert conformal.rank_of(1000, 0.05, 0.9) == 41
    assert conformal.rank_of(99, 0.01) == 1
    assert conformal.rank_of(98, 0.01) == 0
    assert conformal.rank_of(28, 0.29) == 8  # 0.29 * 29 is 8.41


@pytest.mark.parametrize(("guarantee", "share"), [(None, None), (0.9, 0.9)])
def test_the_rate_of_a_threshold_is_kept_on_average_or_as_guaranteed(guarantee, share):
    rng = np.random.default_rng(4)
    k = conformal.rank_of(200, 0.05, guarantee)
    bars = np.sort(rng.random((1000, 200)), axis=1)[:, -k]
    rates = 1 - bars
    if share is None:
        assert rates.mean() <= 0.05 + 4 * rates.std() / 1000**0.5
    else:
        assert (rates <= 0.05).mean() >= share - 4 * np.sqrt(share * (1 - share) / 1000)


def test_a_text_is_flagged_if_it_scores_above_the_text_of_that_rank():
    calibration = np.random.default_rng(9).permutation(np.arange(200.0))
    p = conformal.p_values(np.array([190.0, 190.5]), calibration)
    assert (p <= conformal.rank_of(200, 0.05) / 201).tolist() == [False, True]


def test_adjusted_values_are_those_of_the_step_up_loop():
    p = np.random.default_rng(5).random(40) ** 2
    order, least, expected = np.argsort(p), 1.0, np.empty(40)
    for place in range(39, -1, -1):
        least = min(least, p[order[place]] * 40 / (place + 1))
        expected[order[place]] = least
    np.testing.assert_allclose(conformal.adjusted(p), expected, rtol=1e-12)


def test_few_discoveries_are_false():
    rng, shares = np.random.default_rng(6), []
    member = np.arange(100) < 20
    for _ in range(200):
        p = conformal.p_values(rng.normal(size=100) + 3 * member, rng.normal(size=500))
        found = conformal.adjusted(p) <= 0.1
        shares.append((found & ~member).sum() / max(found.sum(), 1))
    assert 0.04 < np.mean(shares) <= 0.1  # .08 is nominal: 80 % of the texts are no members


def test_a_collection_of_nonmembers_is_claimed_at_the_level_and_members_with_the_stated_power():
    rng, claimed, found = np.random.default_rng(7), 0, 0
    shift = np.sqrt(2) * stats.norm.ppf(conformal.detectable_auc(30, 100, alpha=0.05))
    for _ in range(300):
        suspects, calibration = rng.normal(size=30), rng.normal(size=100)
        claimed += conformal.collection_test(suspects, calibration, 99).p <= 0.05
        found += conformal.collection_test(suspects + shift, calibration, 99).p <= 0.05
    assert claimed / 300 <= 0.10  # 5 % and four standard deviations
    assert found / 300 == pytest.approx(0.8, abs=0.1)


def test_a_collection_says_its_auc_with_an_interval_and_its_power():
    suspects, calibration = np.arange(30.0) + 5, np.arange(30.0)
    found = conformal.collection_test(suspects, calibration)
    assert found.low < found.auc < found.high
    normal = stats.mannwhitneyu(suspects, calibration, alternative="greater").pvalue
    assert found.p == pytest.approx(normal, rel=0.15)  # .02; 9,999 draws are within 10 % of it
    assert found.detectable == conformal.detectable_auc(30, 30, alpha=0.05)
    assert conformal.collection_test(np.ones(1), np.zeros(3)).detectable is None


def test_a_score_that_is_no_number_has_no_p_value():
    """It would sort behind all others, and have the smallest."""
    for scores, known in (([np.nan], [0.0]), ([0.0], [np.inf])):
        with pytest.raises(ValueError, match="scores must be finite"):
            conformal.p_values(np.array(scores), np.array(known))


def test_one_text_of_each_group_is_chosen_whatever_the_order():
    groups = np.array([0, 0, 0, -1, 1, -1, 1])
    keys = list("abcdefg")
    chosen = conformal.one_of_each(groups, keys)
    assert len(chosen) == 4
    assert {3, 5} < set(chosen.tolist())
    turned = conformal.one_of_each(groups[::-1], keys[::-1])
    assert {keys[i] for i in chosen} == {keys[::-1][i] for i in turned}
    assert len(conformal.one_of_each(np.full(4, -1), ["same", "other", "same", "same"])) == 2
    drawn = {conformal.one_of_each(groups, keys, seed)[0] for seed in range(20)}
    assert drawn == {0, 1, 2}


def test_thirds_are_fixed_by_key_and_about_equal():
    keys = [str(i) for i in range(3000)]
    parts = conformal.thirds(keys)
    np.testing.assert_array_equal(parts[::-1], conformal.thirds(keys[::-1]))
    assert (np.bincount(parts, minlength=3) > 900).all()  # 1,000, and four deviations of 26
    assert (conformal.thirds(keys, 1) != parts).mean() > 0.5
