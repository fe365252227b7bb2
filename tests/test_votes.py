"""SAMA's statistic against the published cases and a slow reference written from the spec."""

import dataclasses
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sama_jax import rng, sign_statistics, votes
from sama_jax.attacks.sama import ProgressiveProbes
from sama_jax.config import PRESETS, SamaSettings
from sama_jax.types import ProbePlan, TextKeyData

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "sama_official.npz", allow_pickle=False)
CASES = sorted({key.split("/")[0] for key in GOLDEN})
# Step votes are counts over N, exact in float32. The score adds up to 16 products in float32:
# 16 roundings of at most 2^-24 relative to a score of at most 1.
SCORE_TOLERANCE = 16 * 2.0**-24


def golden(case: str) -> dict[str, np.ndarray]:
    return {k.split("/")[1]: GOLDEN[k] for k in GOLDEN if k.split("/")[0] == case}


def one(target, reference, plan: ProbePlan, **options):
    """`sign_statistics` of a single text."""
    batch = jax.tree.map(lambda x: np.asarray(x)[None], (target, reference, plan))
    return jax.tree.map(lambda x: np.asarray(x)[0], sign_statistics(*batch, **options))


def plan_of(settings: SamaSettings, length: int, max_length: int, number: int) -> ProbePlan:
    probes = ProgressiveProbes(settings, max_length)
    key = rng.text_key(0, TextKeyData(np.uint32(number), np.uint32(length)))
    maskable = np.arange(max_length) < length
    return jax.tree.map(np.asarray, _jitted(probes)(key, maskable))


_PLANS: dict = {}


def _jitted(probes: ProgressiveProbes):
    return _PLANS.setdefault(probes, jax.jit(probes.plan))


def slow_reference(target, reference, plan: ProbePlan, settings: SamaSettings):
    """Buffers, loops and Python numbers: section by section as the published code is described.

    Works on masks and subsets that are given; recomputes which steps count, the buffered losses,
    the votes and the weights.
    """
    length = target.shape[1]
    recorded_votes, step_votes, weights = [], [], []
    for repeat in range(settings.repeats):
        buffer_t, buffer_r = [0.0] * length, [0.0] * length
        ever: set[int] = set()
        rank = 0
        for s in range(settings.steps):
            t = repeat * settings.steps + s
            masked = {i for i in range(length) if plan.masks[t, i]}
            new = masked - ever
            ever |= masked
            refresh = new if settings.loss_source == "stored_first" else masked
            for i in refresh:
                buffer_t[i], buffer_r[i] = float(target[t, i]), float(reference[t, i])
            skipped = not masked or (settings.skip == "per_text" and not new)
            wins = 0.0
            for subset in plan.subsets[t]:
                members = [int(i) for i in subset if i >= 0]
                assert len(members) == min(settings.subset_size, len(masked))
                assert len(set(members)) == len(members)
                assert set(members) <= masked
                sum_t = sum(buffer_t[i] for i in members)
                sum_r = sum(buffer_r[i] for i in members)
                if sum_r > sum_t:
                    wins += 1
                elif sum_r == sum_t and settings.ties == "half":
                    wins += 0.5
            vote = wins / settings.subsets
            step_votes.append(vote)
            if skipped:
                weights.append(0.0)
                continue
            rank += 1
            number = {"inverse_step": s + 1, "inverse_rank": rank, "uniform": 1}[settings.weights]
            weights.append(1.0 / number)
            recorded_votes.append((vote, 1.0 / number))
    total = sum(w for _, w in recorded_votes)
    score = sum(v * w for v, w in recorded_votes) / total if total else 0.0
    return np.array(step_votes), np.array(weights), score


@pytest.mark.parametrize("case", CASES)
def test_published_cases_are_reproduced(case):
    g = golden(case)
    plan = ProbePlan(
        masks=g["masks"],
        scored=g["scored"],
        weights=g["weights"].astype(np.float32),
        subsets=g["subsets"].astype(np.int32),
    )
    result = one(g["target"], g["reference"], plan)
    recorded = ~np.isnan(g["step_votes"])
    np.testing.assert_array_equal(result.step_votes[recorded], g["step_votes"][recorded])
    np.testing.assert_allclose(result.step_weights, g["weights"], rtol=2.0**-22)
    assert abs(float(result.score) - float(g["score"])) <= SCORE_TOLERANCE
    if case in ("identical", "one_wins", "len2"):  # sums of equal terms: no rounding at all
        assert float(result.score) == float(g["score"])


@pytest.mark.parametrize("case", [c for c in CASES if c != "identical"])
def test_published_weights_follow_from_the_published_masks(case):
    g = golden(case)
    new = g["masks"] & ~np.roll(np.maximum.accumulate(g["masks"], axis=0), 1, axis=0)
    new[0] = g["masks"][0]
    recorded = new.any(axis=1)
    weights = np.asarray(votes.step_weights(jnp.asarray(recorded), "inverse_rank"))
    np.testing.assert_allclose(weights / weights.sum(), g["weights"], rtol=2.0**-22)


@pytest.mark.parametrize("name", PRESETS)
def test_scorer_agrees_with_the_slow_reference(name):
    """1,000 random cases over the presets; losses are multiples of 2^-10, so sums are exact."""
    settings = dataclasses.replace(PRESETS[name], subsets=16)
    dice = random.Random(name)
    lengths = [0, 1, 2, settings.subset_size, settings.subset_size + 1, 48]
    lengths += [dice.randint(0, 48) for _ in range(250 - len(lengths))]
    for number, length in enumerate(lengths):
        plan = plan_of(settings, length, 48, number)
        draw = np.random.default_rng([number, length])
        scale = dice.choice([4, 64, 4096])  # small scales give many ties
        target, reference = draw.integers(0, scale, (2, settings.passes, 48)) / 1024.0
        result = one(target.astype(np.float32), reference.astype(np.float32), plan)
        step_votes, weights, score = slow_reference(target, reference, plan, settings)
        if length:
            np.testing.assert_array_equal(result.step_votes[weights > 0], step_votes[weights > 0])
        np.testing.assert_allclose(plan.weights, weights, rtol=2.0**-23)
        assert abs(float(result.score) - score) <= 4 * SCORE_TOLERANCE


SWITCHES = [
    # schedule, nesting, loss_source, weights, skip: every pair of values occurs together.
    ("paper", "nested", "recomputed", "inverse_rank", "per_text"),
    ("paper", "fresh", "stored_first", "uniform", "keep"),
    ("code_linear", "nested", "stored_first", "inverse_step", "keep"),
    ("code_linear", "fresh", "recomputed", "inverse_rank", "per_text"),
    ("geometric", "nested", "stored_first", "uniform", "per_text"),
    ("geometric", "fresh", "recomputed", "inverse_step", "keep"),
]


@pytest.mark.parametrize("ties", ["zero", "half"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_switches_agree_with_the_slow_reference(switches, ties):
    schedule, nesting, source, weights, skip = switches
    settings = SamaSettings(
        steps=5, subsets=8, subset_size=3, repeats=2, schedule=schedule, nesting=nesting,
        loss_source=source, weights=weights, skip=skip, ties=ties,
    )  # fmt: skip
    for number in range(20):
        plan = plan_of(settings, 1 + number, 32, number)
        draw = np.random.default_rng(number)
        target, reference = draw.integers(0, 6, (2, settings.passes, 32)) / 1024.0
        result = one(target.astype(np.float32), reference.astype(np.float32), plan, ties=ties)
        step_votes, expected_weights, score = slow_reference(target, reference, plan, settings)
        used = expected_weights > 0
        np.testing.assert_array_equal(result.step_votes[used], step_votes[used])
        np.testing.assert_allclose(plan.weights, expected_weights, rtol=2.0**-23)
        assert abs(float(result.score) - score) <= SCORE_TOLERANCE


@pytest.fixture
def reading():
    settings = SamaSettings()
    draw = np.random.default_rng(1)
    target, reference = draw.normal(size=(2, 16, 64)).astype(np.float32)
    return target, reference, plan_of(settings, 60, 64, 1)


def test_identical_models_score_zero_or_one_half(reading):
    target, _, plan = reading
    assert one(target, target, plan).score == 0.0
    assert one(target, target, plan, ties="half").score == 0.5
    assert one(target, target, plan).tie_rate == 1.0


def test_swapping_the_models_gives_one_minus_the_score(reading):
    target, reference, plan = reading
    forward, backward = one(target, reference, plan), one(reference, target, plan)
    assert forward.tie_rate == 0.0
    assert 0.1 < forward.score < 0.9
    assert abs(forward.score + backward.score - 1) <= SCORE_TOLERANCE


def test_a_constant_added_to_the_reference_gives_one(reading):
    target, reference, plan = reading
    assert one(target, reference + 100.0, plan).score == 1.0


def test_only_scored_positions_are_read(reading):
    """Whatever stands elsewhere, NaN included, changes nothing."""
    target, reference, plan = reading
    poisoned = np.where(plan.scored, target, np.nan)
    assert one(poisoned, reference, plan).score == one(target, reference, plan).score
    moved = np.where(plan.scored, target + 1.0, target)
    assert one(moved, reference, plan).score < one(target, reference, plan).score


def test_subsets_are_uniform():
    """All 10 pairs of 5 masked positions: 20,000 draws, each count within 5 standard deviations."""
    mask = np.zeros(9, bool)
    mask[[1, 2, 4, 7, 8]] = True
    subsets = np.asarray(votes.sample_subsets(jax.random.key(0), jnp.asarray(mask), 20000, 2))
    pairs, counts = np.unique(np.sort(subsets, axis=1), axis=0, return_counts=True)
    assert len(pairs) == 10
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(20000 * 0.1 * 0.9)


def test_a_sparse_step_votes_with_all_of_its_tokens():
    mask = np.zeros(9, bool)
    mask[[3, 5]] = True
    subsets = np.asarray(votes.sample_subsets(jax.random.key(0), jnp.asarray(mask), 4, 3))
    assert (np.sort(subsets, axis=1) == [-1, 3, 5]).all()
    assert (subsets[:, 2] == -1).all()


def test_sign_statistics_documents_its_batch_axis(reading):
    target, reference, plan = reading
    batch = jax.tree.map(lambda x: np.stack([x, x]), (target, reference, plan))
    result = sign_statistics(*batch)
    assert result.score.shape == (2,)
    assert result.step_votes.shape == result.step_weights.shape == (2, 16)
    assert float(result.step_weights[0].sum()) == pytest.approx(1.0)
