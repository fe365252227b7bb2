"""Where randomness comes from: the one place that builds keys.

A text's key derives from the run's seed and a hash of its token ids, never from its place in a
file or a batch, its id, the padded length or the model. So its masks and subsets are the same bits
in any file, batch, order, bucket and device count, and target and reference see the same masks.
"""

import hashlib
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, Key, UInt

from sama_jax.arrays import TextKeyData


class Purpose(IntEnum):
    """What a stream of bits is for. Numbers are part of every result: add, never renumber."""

    PROGRESSIVE_MASKS = 1
    SUBSETS = 2
    LIKELIHOOD_MASKS = 3
    INITIAL_WEIGHTS = 4
    TRAINING_MASKS = 5
    PARTITION_MASKS = 6
    NEIGHBOR_MASKS = 8
    HALF_MASKS = 9
    INDEPENDENT_GROUPS = 10
    RANDOM_SHARE_MASKS = 11
    NOISE_LEVEL_MASKS = 12
    DISTANCE_MASKS = 13


def text_key_data(tokens: Int[np.ndarray, " n"]) -> TextKeyData:
    """Returns the first 64 bits of the SHA-256 of the ids as little-endian int32 (host)."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i4").tobytes()).digest()
    high, low = (int.from_bytes(digest[i : i + 4], "big") for i in (0, 4))
    return TextKeyData(np.uint32(high), np.uint32(low))


def key_name(data: TextKeyData) -> str:
    """Returns a text's name in the store: 16 hex digits."""
    return f"{int(data.high):08x}{int(data.low):08x}"


def text_key(seed: int | Integer[Array, ""], data: TextKeyData) -> Key[Array, ""]:
    """Builds a text's root key. `fold_in` takes 32 bits, hence the two halves of the hash."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), data.high), data.low)


def run_key(seed: int, purpose: Purpose) -> Key[Array, ""]:
    """Builds a key of the whole run, for what belongs to no text, such as initial weights."""
    return jax.random.fold_in(jax.random.key(seed), int(purpose))


def for_purpose(key: Key[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    """Derives an independent stream of a text's randomness."""
    return jax.random.fold_in(key, int(purpose))


def step_keys(key: Key[Array, ""], num: int) -> Key[Array, " t"]:
    """Derives one key for each step; the first keys do not depend on `num`."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num, dtype=jnp.uint32))


def random_order_bits(key: Key[Array, ""], max_length: int, length: int) -> UInt[Array, " l"]:
    """Draws noise whose order ranks the positions of a text.

    It is drawn at the fixed `max_length` and cut, so that every padded length sees the same bits.
    """
    return jax.random.bits(key, (max_length,), jnp.uint32)[:length]


def bounded(bits: UInt[Array, "*n"], bound: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """Maps bits to uniform integers in 0..bound-1.

    The modulo's bias is below bound / 2^32: 1.5e-5 at 65,535.
    """
    return (bits % jnp.maximum(bound, 1).astype(jnp.uint32)).astype(jnp.int32)
