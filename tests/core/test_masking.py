"""Masks: exact counts, nesting, and bits that depend on the text alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sama_jax import rng
from sama_jax.arrays import TextKeyData
from sama_jax.attacks.likelihood import LikelihoodProbes, nll_per_token
from sama_jax.attacks.sama import ProgressiveProbes
from sama_jax.config import PRESETS, SamaSettings
from sama_jax.core import masking

MAX = 128
# 1, 2, m and m + 1 for the m of every preset (8 and 10), and the maximum.
LENGTHS = [1, 2, 8, 9, 10, 11, 37, MAX]


def key_of(number: int):
    return rng.text_key(42, TextKeyData(jnp.uint32(number), jnp.uint32(7)))


@functools.lru_cache
def jitted(probe):
    return jax.jit(probe.plan)


def plan(probe, length: int, padded: int = MAX, number: int = 3):
    maskable = np.arange(padded) < length
    return jax.tree.map(np.asarray, jitted(probe)(key_of(number), maskable))


def published_count(settings: SamaSettings, s: int, length: int) -> int:
    """Round half to even of a Python float, at least 1, as `attack/attacks/sama.py` does."""
    low, high, steps = settings.min_density, settings.max_density, settings.steps
    if settings.schedule == "paper":
        share = low + (high - low) * (s / max(steps - 1, 1))
    elif settings.schedule == "code_linear":
        share = low + (high - low) * (s + 1) / (steps + 1)
    else:
        share = low * (high / low) ** (s / max(steps - 1, 1))
    return min(max(1, round(share * length)), length)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("length", LENGTHS)
def test_masks_have_exact_counts(name, length):
    settings = PRESETS[name]
    drawn = plan(ProgressiveProbes(settings, MAX), length)
    wanted = [published_count(settings, s, length) for s in range(settings.steps)]
    assert drawn.masks.sum(axis=1).tolist() == wanted * settings.repeats
    assert not drawn.masks[:, length:].any()


@pytest.mark.parametrize("schedule", ["paper", "code_linear", "geometric"])
def test_count_table_rounds_as_python_for_every_length(schedule):
    settings = SamaSettings(schedule=schedule)
    table = masking.count_table(settings, 600)
    for length in range(1, 601):
        assert table[length].tolist() == [
            published_count(settings, s, length) for s in range(settings.steps)
        ]
    assert (table[0] == 0).all()


@pytest.mark.parametrize("name", [n for n, s in PRESETS.items() if s.nesting == "nested"])
@pytest.mark.parametrize("length", LENGTHS)
def test_nested_masks_contain_the_ones_before(length, name):
    masks = plan(ProgressiveProbes(PRESETS[name], MAX), length).masks
    assert (masks[1:] | ~masks[:-1]).all()


def test_fresh_masks_are_not_nested():
    masks = plan(ProgressiveProbes(SamaSettings(nesting="fresh"), MAX), MAX).masks
    assert not (masks[1:] | ~masks[:-1]).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_published_form_scores_each_masked_token_once(length):
    drawn = plan(ProgressiveProbes(PRESETS["official"], MAX), length)
    assert (drawn.scored.sum(axis=0) == drawn.masks[-1]).all()
    recorded = drawn.scored.any(axis=1)
    assert ((drawn.weights > 0) == recorded).all()
    np.testing.assert_allclose(
        drawn.weights[recorded], 1 / np.arange(1, recorded.sum() + 1), rtol=1e-6
    )


def test_repeats_are_independent_draws():
    drawn = plan(ProgressiveProbes(SamaSettings(repeats=2), MAX), MAX)
    assert not np.array_equal(drawn.masks[:16], drawn.masks[16:])
    np.testing.assert_array_equal(drawn.weights[:16], drawn.weights[16:])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("estimator", ["exact", "bernoulli"])
def test_plans_do_not_depend_on_the_padded_length(name, estimator):
    settings = PRESETS[name]
    for probe in (
        ProgressiveProbes(settings, MAX),
        LikelihoodProbes(settings.passes, estimator, 1e-3, MAX),
    ):
        short, long = plan(probe, 37, padded=40), plan(probe, 37)
        np.testing.assert_array_equal(short.masks, long.masks[:, :40])
        np.testing.assert_array_equal(short.scored, long.scored[:, :40])
        np.testing.assert_array_equal(short.weights, long.weights)
        np.testing.assert_array_equal(short.subsets, long.subsets)


def test_plans_do_not_depend_on_batch_mates():
    probe = ProgressiveProbes(SamaSettings(), MAX)
    maskable = np.arange(MAX)[None, :] < np.array([[20], [90], [MAX]])
    keys = jax.vmap(key_of)(jnp.arange(3))
    batch = jax.jit(jax.vmap(probe.plan))(keys, maskable)
    for row, length in enumerate((20, 90, MAX)):
        alone = plan(probe, length, number=row)
        for a, b in zip(alone, batch):
            np.testing.assert_array_equal(a, np.asarray(b)[row])


def test_bits_derive_from_the_token_ids_and_the_seed():
    ids = np.array([5, 6, 7], np.int32)
    data = rng.text_key_data(ids)
    assert data == rng.text_key_data(ids.astype(np.int64))
    assert data != rng.text_key_data(np.array([5, 6, 8], np.int32))
    same = jax.random.key_data(rng.text_key(1, data))
    assert (same != jax.random.key_data(rng.text_key(2, data))).any()
    # First 64 bits of the SHA-256 of the bytes 05000000 06000000 07000000.
    assert (int(data.high), int(data.low)) == (0x2E4C4603, 0xCB0DEA86)


def test_masked_positions_are_uniform():
    """Each of 20 positions is masked equally often at 25 %: 4,000 texts, 5 standard deviations."""
    settings = SamaSettings(steps=1, min_density=0.25, max_density=0.25, subsets=1)
    probe = ProgressiveProbes(settings, 32)
    keys = jax.vmap(key_of)(jnp.arange(4000))
    maskable = jnp.asarray(np.arange(32) < 20)
    masks = jax.jit(jax.vmap(lambda k: probe.plan(k, maskable).masks))(keys)
    counts = np.asarray(masks)[:, 0, :20].sum(axis=0)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 100])
def test_exact_counts_take_every_value_equally_often(length):
    """Over all offsets and passes every number 1..L comes up the same number of times."""
    passes = 8
    offsets = np.arange(length)
    counts = 1 + (np.arange(passes)[None] * length + offsets[:, None]) // passes
    assert (np.bincount(counts.reshape(-1))[1:] == passes).all()
    drawn = [
        np.asarray(masking.exact_counts(jax.random.key(i), jnp.int32(length), passes))
        for i in range(20)
    ]
    assert all(any((row == d).all() for row in counts) for d in drawn)


@pytest.mark.parametrize("estimator", ["exact", "bernoulli"])
def test_likelihood_estimate_is_unbiased(estimator):
    """Constant loss 2 at every token: the exact-count form is exact, the Bernoulli form on average.

    Bernoulli passes that mask nothing are left out (as published), which inflates by about
    (L + 1) / L; eps is large here to keep the variance small.
    """
    probe = LikelihoodProbes(16, estimator, 0.2, 64)
    keys = jax.vmap(key_of)(jnp.arange(2000))
    maskable = jnp.asarray(np.arange(64) < 50)

    def estimate(key):
        drawn = probe.plan(key, maskable)
        return nll_per_token(jnp.full((16, 64), 2.0), drawn)

    values = np.asarray(jax.jit(jax.vmap(estimate))(keys))
    if estimator == "exact":
        np.testing.assert_allclose(values, 2.0, rtol=1e-5)
    else:
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - 2.0) < 5 * error + 2.0 / 50


@pytest.mark.parametrize("name", PRESETS)
def test_slot_bounds_hold(name):
    settings = PRESETS[name]
    for probe in (
        ProgressiveProbes(settings, MAX),
        LikelihoodProbes(settings.passes, "exact", 1e-3, MAX),
        LikelihoodProbes(settings.passes, "bernoulli", 1e-3, MAX),
    ):
        for length in (1, 2, 31, 64, 127, MAX):
            drawn = plan(probe, length, number=length)
            assert (drawn.scored.sum(axis=1) <= probe.slot_bounds(length)).all()
            assert (drawn.scored.sum(axis=1) <= probe.slot_bounds(MAX)).all()


def test_empty_text_has_an_empty_plan():
    for probe in (ProgressiveProbes(SamaSettings(), MAX), LikelihoodProbes(4, "exact", 1e-3, MAX)):
        drawn = plan(probe, 0)
        assert not drawn.masks.any()
        assert not drawn.weights.any()
        assert (drawn.subsets == -1).all()
