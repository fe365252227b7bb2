"""Where randomness comes from: the one place that builds keys.

A text's key derives from the run's seed and a hash of its token ids, never from its place in a
file or a batch, its id, the padded length or the model. So its masks and subsets are the same bits
in any file, batch, order, bucket and device count, and target and reference see the same masks.
"""

import hashlib
from enum import IntEnum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, Key, UInt

from sama_jax.arrays import TextKeyData
from sama_jax.errors import UsageError


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
    CANARIES = 14
    ADAPTER = 15
    NOISE = 16


def _root(seed: int | Integer[Array, ""]) -> Key[Array, ""]:
    """Builds the key of a seed, of this kind whatever JAX is set to."""
    return jax.random.key(seed, impl="threefry2x32")


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
    return of_text(_root(seed), data)


def of_text(key: Key[Array, ""], data: TextKeyData) -> Key[Array, ""]:
    """Derives a text's own stream from any key."""
    return jax.random.fold_in(jax.random.fold_in(key, data.high), data.low)


def run_key(seed: int, purpose: Purpose) -> Key[Array, ""]:
    """Builds a key of the whole run, for what belongs to no text, such as initial weights."""
    return jax.random.fold_in(_root(seed), int(purpose))


def secret_key(secret: bytes) -> Key[Array, ""]:
    """Builds the key of noise that nobody may draw again, from the first 64 bits of a secret."""
    return jax.random.wrap_key_data(
        jnp.asarray(np.frombuffer(secret[:8], "<u4")), impl="threefry2x32"
    )


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


# --- the bits themselves -------------------------------------------------------------------------

BITS = "5d1a1005cf59bf05"
"""What `bits_drawn` gives with JAX's own settings. Part of every result, like `Purpose`."""


def bits_drawn() -> str:
    """Returns 16 hex digits over what one key gives through every way in which bits are drawn."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in _drawn())).hexdigest()[:16]


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _drawn() -> list[Array]:
    key = for_purpose(text_key(0, TextKeyData(np.uint32(1), np.uint32(2))), Purpose.SUBSETS)
    first, second = jax.random.split(key)
    shape = (3, 2)
    return [jax.random.bits(first, shape, jnp.uint32), jax.random.uniform(second, shape)]


def checked_bits() -> str:
    """Returns `BITS`, after drawing them.

    Raises:
      UsageError: JAX is set to draw others, such as by `JAX_THREEFRY_PARTITIONABLE=0` or
        `JAX_ENABLE_X64`; masks would not be those of other runs.
    """
    if bits_drawn() == BITS:
        return BITS
    names = ("threefry_partitionable", "random_seed_offset", "enable_x64")
    found = ", ".join(f"JAX_{n.upper()}={jax.config.values[f'jax_{n}']}" for n in names)
    raise UsageError(
        "expected JAX's own random bits, since masks and subsets are drawn from them and are part "
        f"of every result; found other bits under {found}; unset these variables and settings"
    )
