"""Keys derive from the seed, the token ids and a purpose, and from nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sama_jax import rng


def bits(key) -> list[int]:
    return np.asarray(jax.random.key_data(key)).tolist()


def test_a_texts_key_is_the_hash_of_its_ids_whatever_integers_they_are():
    ids = np.array([1, 2, 299], np.int32)
    digest = hashlib.sha256(b"\1\0\0\0\2\0\0\0\x2b\1\0\0").hexdigest()
    assert rng.key_name(rng.text_key_data(ids)) == digest[:16]
    assert rng.text_key_data(ids.astype(np.int64)) == rng.text_key_data(ids)
    assert rng.text_key_data(ids[:2]) != rng.text_key_data(ids)


@pytest.mark.parametrize("half", ["high", "low"])
def test_seed_and_both_halves_of_the_hash_change_the_key(half: str):
    data = rng.text_key_data(np.arange(3))
    other = data._replace(**{half: np.uint32(int(getattr(data, half)) ^ 1)})
    keys = [rng.text_key(1, data), rng.text_key(2, data), rng.text_key(1, other)]
    assert len({str(bits(key)) for key in keys}) == 3


def test_purposes_have_numbers_of_their_own_and_streams_of_their_own():
    key = jax.random.key(0)
    streams = {str(bits(rng.for_purpose(key, purpose))) for purpose in rng.Purpose}
    assert len(streams) == len(rng.Purpose) == len({int(p) for p in rng.Purpose})


def test_the_first_steps_and_positions_do_not_depend_on_how_many_there_are():
    key = jax.random.key(3)
    assert bits(rng.step_keys(key, 5))[:2] == bits(rng.step_keys(key, 2))
    long, short = rng.random_order_bits(key, 32, 32), rng.random_order_bits(key, 32, 9)
    np.testing.assert_array_equal(long[:9], short)


def test_bounded_integers_stay_below_their_bound_and_0_is_allowed():
    drawn = jax.random.bits(jax.random.key(4), (3000,), jnp.uint32)
    found = np.asarray(rng.bounded(drawn, jnp.full(3000, 3)))
    assert set(found) == {0, 1, 2}
    # 1,000 of each expected; the standard deviation is 26, so 130 are five of them.
    assert np.abs(np.bincount(found) - 1000).max() < 130
    assert (np.asarray(rng.bounded(drawn, jnp.zeros(3000, jnp.int32))) == 0).all()
