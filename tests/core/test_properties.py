"""What holds for all masks, subsets, votes and scores; hypothesis looks for an exception."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from properties import FEW

from sama_jax import rng, sign_statistics
from sama_jax.arrays import ProbePlan, TextKeyData
from sama_jax.attacks.likelihood import LikelihoodProbes
from sama_jax.attacks.sama import ProgressiveProbes
from sama_jax.config import PRESETS, SamaSettings
from sama_jax.core import masking, metrics

SHORT, LONG = 24, 40
"""Padded lengths; the longer one is also the maximum, so that both draw the same bits."""
SMALL = {"steps": 5, "subsets": 6, "subset_size": 3}
SETTINGS = {
    "nested": SamaSettings(**SMALL),
    "fresh": replace(PRESETS["paper"], **SMALL, repeats=2),
    "official": replace(PRESETS["official"], **SMALL),
    "all tokens": SamaSettings(**SMALL, max_density=1.0, schedule="geometric"),
}

numbers = st.integers(0, 2**32 - 1)
maskables = arrays(bool, SHORT)


@functools.lru_cache
def jitted(probes):
    return jax.jit(probes.plan)


def plan(probes, number: int, maskable: np.ndarray) -> ProbePlan:
    key = rng.text_key(7, TextKeyData(np.uint32(number), np.uint32(number ^ 5)))
    return jax.tree.map(np.asarray, jitted(probes)(key, maskable))


def padded(maskable: np.ndarray) -> np.ndarray:
    return np.pad(maskable, (0, LONG - SHORT))


# --- probes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@FEW
@given(number=numbers, maskable=maskables)
def test_progressive_masks(name, number, maskable):
    """Only what may be masked, in the numbers of the table, nested where that is asked for."""
    settings = SETTINGS[name]
    drawn = plan(ProgressiveProbes(settings, LONG), number, maskable)
    assert not (drawn.masks & ~maskable).any()
    assert not (drawn.scored & ~drawn.masks).any()
    counts = masking.count_table(settings, LONG)[maskable.sum()]
    assert drawn.masks.sum(axis=1).tolist() == counts.tolist() * settings.repeats
    shares = drawn.masks.sum(axis=1) / max(maskable.sum(), 1)
    wanted = np.tile(masking.densities(settings), settings.repeats)
    assert (np.abs(shares - wanted) * maskable.sum() < 1).all()  # rounded, and one token at least
    if settings.nesting == "nested":
        assert not (drawn.masks[:-1] & ~drawn.masks[1:]).any()


@pytest.mark.parametrize("name", SETTINGS)
@FEW
@given(number=numbers, maskable=maskables)
def test_subsets_hold_distinct_masked_positions(name, number, maskable):
    settings = SETTINGS[name]
    drawn = plan(ProgressiveProbes(settings, LONG), number, maskable)
    for mask, subsets in zip(drawn.masks, drawn.subsets):
        for subset in subsets:
            used = subset[subset >= 0]
            assert len(set(used)) == len(used) == min(mask.sum(), settings.subset_size)
            assert mask[used].all()


PROBES = {
    **{name: ProgressiveProbes(settings, LONG) for name, settings in SETTINGS.items()},
    "exact": LikelihoodProbes(6, "exact", 1e-3, LONG),
    "bernoulli": LikelihoodProbes(6, "bernoulli", 1e-3, LONG),
}


@pytest.mark.parametrize("name", PROBES)
@FEW
@given(number=numbers, maskable=maskables)
def test_padding_changes_no_bit(name, number, maskable):
    short = plan(PROBES[name], number, maskable)
    long = plan(PROBES[name], number, padded(maskable))
    assert not long.masks[:, SHORT:].any()
    np.testing.assert_array_equal(long.masks[:, :SHORT], short.masks)
    np.testing.assert_array_equal(long.scored[:, :SHORT], short.scored)
    np.testing.assert_array_equal(long.weights, short.weights)
    np.testing.assert_array_equal(long.subsets, short.subsets)


@FEW
@given(number=numbers, maskable=maskables)
def test_likelihood_masks_spread_over_all_counts(number, maskable):
    drawn, length = plan(PROBES["exact"], number, maskable), int(maskable.sum())
    counts = drawn.masks.sum(axis=1)
    assert not (drawn.masks & ~maskable).any()
    if length == 0:
        assert not drawn.weights.any()
        return
    assert (np.diff(counts) >= 0).all()
    assert 1 <= counts[0] <= counts[-1] <= length
    assert counts[-1] - counts[0] >= length - 1 - length // 6 - 1
    np.testing.assert_allclose(drawn.weights, 1 / counts, rtol=2.0**-22)


@FEW
@given(number=numbers, maskable=maskables, parts=st.sampled_from([1, 3, 8]))
def test_partitions_cover_each_position_once(number, maskable, parts):
    masks = np.asarray(_partition(jax.random.key(number), maskable, parts))
    for one in masks.reshape(2, parts, SHORT):
        np.testing.assert_array_equal(one.sum(axis=0), maskable.astype(int))
        assert np.ptp(one.sum(axis=1)) <= 1


@functools.partial(jax.jit, static_argnums=2)
def _partition(key, maskable, parts):
    return masking.partition_masks(key, maskable, parts, 2, LONG)


# --- votes ----------------------------------------------------------------------------------------

# Multiples of 1/8: sums and differences are exact, so votes must be equal, not close.
losses = arrays(np.int32, (5, SHORT), elements=st.integers(0, 40)).map(
    lambda x: (x / 8).astype(np.float32)
)
TOLERANCE = 16 * 2.0**-24


def score(target, reference, of: ProbePlan, ties="zero"):
    batch = jax.tree.map(lambda x: np.asarray(x)[None], (target, reference, of))
    return jax.tree.map(lambda x: np.asarray(x)[0], sign_statistics(*batch, ties=ties))


def drawn_plan(number: int) -> ProbePlan:
    return plan(ProgressiveProbes(SETTINGS["nested"], LONG), number, np.arange(SHORT) < 20)


@FEW
@given(target=losses, reference=losses, number=numbers)
def test_votes_lie_in_range_and_mirror_each_other(target, reference, number):
    of = drawn_plan(number)
    forward, backward = score(target, reference, of), score(reference, target, of)
    assert 0 <= forward.score <= 1
    assert ((forward.step_votes >= 0) & (forward.step_votes <= 1)).all()
    assert abs(forward.score + backward.score + forward.tie_rate - 1) <= 3 * TOLERANCE
    half = score(target, reference, of, "half").score
    assert abs(half - forward.score - forward.tie_rate / 2) <= 3 * TOLERANCE


@FEW
@given(target=losses, reference=losses, number=numbers, shift=st.integers(-80, 80))
def test_only_differences_of_losses_count(target, reference, number, shift):
    """A constant added to both, or a factor, changes no vote."""
    of, offset = drawn_plan(number), np.float32(shift / 8)
    found = score(target, reference, of)
    assert score(target + offset, reference + offset, of).score == found.score
    assert score(4 * target, 4 * reference, of).score == found.score


@FEW
@given(target=losses, reference=losses, number=numbers, order=st.permutations(range(SHORT)))
def test_positions_have_no_order(target, reference, number, order):
    of, order = drawn_plan(number), np.array(order)
    place = np.argsort(order)
    moved = ProbePlan(
        masks=of.masks[:, order],
        scored=of.scored[:, order],
        weights=of.weights,
        subsets=np.where(of.subsets >= 0, place[np.maximum(of.subsets, 0)], -1),
    )
    here, there = score(target, reference, of), score(target[:, order], reference[:, order], moved)
    np.testing.assert_array_equal(here.step_votes, there.step_votes)


@FEW
@given(target=losses, reference=losses, number=numbers, at=st.integers(0, 19))
def test_a_lower_loss_of_the_target_never_lowers_the_score(target, reference, number, at):
    of, better = drawn_plan(number), target.copy()
    better[:, at] -= 1
    assert score(better, reference, of).score >= score(target, reference, of).score


# --- metrics --------------------------------------------------------------------------------------


@st.composite
def labelled(draw):
    """Scores, of which many are equal, and labels of both classes."""
    count = draw(st.integers(2, 40))
    levels = st.integers(-4, 4).map(float) | st.floats(-100, 100, allow_subnormal=False)
    scores = np.array(draw(st.lists(levels, min_size=count, max_size=count)))
    labels = np.array(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    labels[0], labels[-1] = 0, 1
    return scores, labels


def ranks(scores: np.ndarray) -> np.ndarray:
    return np.unique(scores, return_inverse=True)[1].astype(float)


@FEW
@given(labelled())
def test_auc_is_the_share_of_won_pairs(drawn):
    scores, labels = drawn
    members, others = scores[labels == 1][:, None], scores[labels == 0][None, :]
    pairs = (members > others) + 0.5 * (members == others)
    assert metrics.auc(scores, labels) == pytest.approx(pairs.mean(), abs=1e-12)


@FEW
@given(labelled(), st.randoms(use_true_random=False))
def test_metrics_see_the_order_of_scores_alone(drawn, dice):
    """Not their size, not the order of texts; labels or signs exchanged give one minus the AUC."""
    scores, labels = drawn
    found = metrics.auc(scores, labels)
    assert metrics.auc(np.exp(3 * ranks(scores) / 40), labels) == pytest.approx(found, abs=1e-12)
    order = dice.sample(range(len(scores)), len(scores))
    assert metrics.auc(scores[order], labels[order]) == pytest.approx(found, abs=1e-12)
    assert metrics.auc(scores, 1 - labels) == pytest.approx(1 - found, abs=1e-12)
    assert metrics.auc(-scores, labels) == pytest.approx(1 - found, abs=1e-12)


@FEW
@given(labelled(), st.sampled_from([0.1, 0.25, 0.5]))
def test_no_threshold_finds_more_members_within_the_limit(drawn, limit):
    scores, labels = drawn
    found = metrics.tpr_at_fpr(scores, labels, limit)
    total = (labels == 0).sum() + 1

    def within(flagged):
        return (flagged[labels == 0].sum() + 1) / total <= limit + 1e-9

    if found is None:
        assert total * limit < 1 or not within(scores == scores.max())
        return
    assert found["fpr"] <= limit
    for threshold in scores:
        flagged = scores >= threshold
        if within(flagged):
            assert flagged[labels == 1].mean() <= found["tpr"]
    low, high = found["ci"]
    assert 0 <= low <= found["tpr"] <= high <= 1


@FEW
@given(labelled(), labelled())
def test_intervals_are_ordered_and_equal_scores_differ_by_nothing(drawn, other):
    scores, labels = drawn
    low, high = metrics.auc_interval(scores, labels)
    assert 0 <= low < high <= 1
    same = metrics.paired_difference(scores, ranks(scores), labels)
    assert same == (0.0, 0.0, 0.0)
    b = np.resize(other[0], scores.shape)
    there = metrics.paired_difference(scores, b, labels)
    back = metrics.paired_difference(b, scores, labels)
    np.testing.assert_allclose(there, (-back[0], -back[2], -back[1]), atol=1e-12)


def test_jax_is_what_draws():
    """The settings above would hold for a plan without any mask, too."""
    of = drawn_plan(1)
    assert of.masks.any()
    assert jnp.any(of.subsets >= 0)
