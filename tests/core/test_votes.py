"""SAMA's statistic against the published cases and a slow reference written from the spec."""

import random
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sama_jax import rng, sign_statistics
from sama_jax.arrays import ProbePlan, TextKeyData
from sama_jax.attacks.sama import ProgressiveProbes
from sama_jax.config import PRESETS, SamaSettings
from sama_jax.core import votes

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "sama_official.npz", allow_pickle=False)
CASES = sorted({key.split("/")[0] for key in GOLDEN})
# Step votes are counts over N, exact in float32. The score adds up 16 products in float32, and 16
# more for every further repeat: roundings of at most 2^-24 relative to a score of at most 1.
SCORE_TOLERANCE = 16 * 2.0**-24


def golden(case: str) -> dict[str, np.ndarray]:
    return {k.split("/")[1]: GOLDEN[k] for k in GOLDEN if k.split("/")[0] == case}


def one(target, reference, plan: ProbePlan, **options):
    """`sign_statistics` of a single text."""
    batch = jax.tree.map(lambda x: np.asarray(x)[None], (target, reference, plan))
    return jax.tree.map(lambda x: np.asarray(x)[0], sign_statistics(*batch, **options))


def plans_of(settings: SamaSettings, lengths: list[int], width: int, first: int = 0) -> ProbePlan:
    """Plans of texts of these lengths, drawn in one batch; keys are numbered from `first`."""
    number = np.arange(first, first + len(lengths), dtype=np.uint32)
    maskable = np.arange(width) < np.array(lengths)[:, None]
    keys = jax.vmap(lambda n: rng.text_key(0, TextKeyData(n, n)))(number)
    return jax.tree.map(np.asarray, _jitted(ProgressiveProbes(settings, width))(keys, maskable))


def plan_of(settings: SamaSettings, length: int, width: int) -> ProbePlan:
    return jax.tree.map(lambda x: x[0], plans_of(settings, [length], width))


_PLANS: dict = {}


def _jitted(probes: ProgressiveProbes):
    probes = ProgressiveProbes(replace(probes.settings, ties="zero"), probes.max_length)
    # Ties change no plan. Compiled as audits compile it: without any optimisation, which is what
    # conftest asks for, 1,000 plans of 64 steps take 17 s.
    options = {"xla_backend_optimization_level": 1}
    return _PLANS.setdefault(probes, jax.jit(jax.vmap(probes.plan), compiler_options=options))


def slow_reference(target, reference, plan: ProbePlan, settings: SamaSettings):
    """Buffers and a loop over steps in NumPy, float64, as the published code is described.

    Works on masks and subsets that are given, and checks these; recomputes which steps count, the
    buffered losses, the votes and the weights.
    """
    num, length = plan.masks.shape
    buffered, weights = np.zeros((2, num, length)), np.zeros(num)
    for start in range(0, num, settings.steps):  # a repeat
        buffers, ever, rank = np.zeros((2, length)), np.zeros(length, bool), 0
        for s, t in enumerate(range(start, start + settings.steps)):
            masked = plan.masks[t]
            new = masked & ~ever
            ever |= masked
            refresh = new if settings.loss_source == "stored_first" else masked
            buffers[:, refresh] = target[t, refresh], reference[t, refresh]
            buffered[:, t] = buffers
            if masked.any() and (settings.skip == "keep" or new.any()):
                rank += 1
                number = {"inverse_step": s + 1, "inverse_rank": rank, "uniform": 1}
                weights[t] = 1.0 / number[settings.weights]

    subsets, used, step = plan.subsets, plan.subsets >= 0, np.arange(num)[:, None, None]
    assert subsets.shape == (num, settings.subsets, settings.subset_size)
    most = np.minimum(plan.masks.sum(axis=1), settings.subset_size)
    assert (used.sum(axis=2) == most[:, None]).all()
    assert plan.masks[step, subsets][used].all()
    ordered = np.sort(subsets, axis=2)
    assert ((np.diff(ordered, axis=2) > 0) | (ordered[..., 1:] < 0)).all()  # distinct

    sum_t, sum_r = (np.where(used, losses[step, subsets], 0.0).sum(axis=2) for losses in buffered)
    tied = 0.5 if settings.ties == "half" else 0.0
    votes = np.where(sum_r == sum_t, tied, sum_r > sum_t).mean(axis=1)
    total = weights.sum()
    return votes, weights, (votes * weights).sum() / total if total else 0.0


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


def assert_agreement(
    settings: SamaSettings, lengths: list[int], width: int, first: int = 0
) -> np.ndarray:
    """The jitted scorer against the slow reference on random losses; returns the masks.

    Losses are multiples of 2^-10, so every sum is exact and votes must be equal.
    """
    plans, draw = plans_of(settings, lengths, width, first), np.random.default_rng(first)
    top = draw.choice([4, 64, 4096], (len(lengths), 1, 1))  # small numbers make many ties
    losses = draw.integers(0, top, (2, len(lengths), settings.passes, width)) / 1024.0
    target, reference = losses.astype(np.float32)
    result = jax.tree.map(np.asarray, sign_statistics(target, reference, plans, settings.ties))
    for i in range(len(lengths)):
        plan = jax.tree.map(lambda x, i=i: x[i], plans)
        step_votes, weights, score = slow_reference(target[i], reference[i], plan, settings)
        used = weights > 0
        np.testing.assert_array_equal(result.step_votes[i, used], step_votes[used])
        np.testing.assert_allclose(plan.weights, weights, rtol=2.0**-23)
        assert abs(float(result.score[i]) - score) <= settings.repeats * SCORE_TOLERANCE
    return plans.masks


@pytest.mark.parametrize("name", PRESETS)
def test_scorer_agrees_with_the_slow_reference(name):
    """1,000 cases a preset: empty texts, one token, and steps that mask fewer than m tokens."""
    settings, dice = PRESETS[name], random.Random(name)
    lengths = [0, 1, 2, settings.subset_size, settings.subset_size + 1, 48]
    lengths += [dice.randint(0, 48) for _ in range(1000 - len(lengths))]
    parts = range(0, len(lengths), 250)  # in parts, to stay small in memory
    masks = np.concatenate([assert_agreement(settings, lengths[i:][:250], 48, i) for i in parts])
    masked = masks.sum(axis=2)
    assert len(masked) == 1000
    assert min(lengths.count(0), lengths.count(1)) > 1
    assert (masked == 1).any()
    assert ((masked > 1) & (masked < settings.subset_size)).any()
    assert (masked > settings.subset_size).any()


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
    assert_agreement(settings, list(range(1, 21)), 32)


@pytest.fixture
def reading():
    settings = SamaSettings()
    draw = np.random.default_rng(1)
    target, reference = draw.normal(size=(2, 16, 64)).astype(np.float32)
    return target, reference, plan_of(settings, 60, 64)


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
