"""Counts how often texts name the mask of attention that a model was trained with.

    python experiments/statistics/masks.py [--mask M] [--seeds FIRST:LAST] [--steps N]

Of each mask (full, causal, blocks of 8) and seed, a model of two layers learns 32 texts of 32
tokens by heart, and is then read as its config says: with full attention. What `audit` says of the
mask then is printed, once for the trained weights and once for those that it started from: a line a
model, some seconds of two cores each.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sama_jax.core.frequencies import frequency_losses
from sama_jax.engine import other_readings
from sama_jax.errors import ModelError
from sama_jax.models.attention_mask import block_length_of
from sama_jax.models.transformer import Architecture, TransformerModel

MASKS = ("full", "causal", "block:8")
WORDS, ROWS, LENGTH, COUNT, BATCH, RATE = 20, 32, 32, 32, 32, 5e-3
STEPS = 1500
CANNOT_TELL = "cannot tell"


def model_of(mask: str) -> TransformerModel:
    """Returns a network of two layers that attends so."""
    arch = Architecture(
        vocab_size=ROWS,
        width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_size=16,
        mlp_width=64,
        tied=False,
        norm_eps=1e-5,
        rope_theta=100.0,
        block_length=block_length_of(mask),
    )
    return TransformerModel(arch=arch, mask_id=ROWS - 1)


def texts_of(seed: int) -> np.ndarray:
    """Draws texts [COUNT, LENGTH] in which a word leaves two choices for the one after the next."""
    draw = np.random.default_rng(seed)
    found = draw.integers(0, WORDS, (COUNT, LENGTH))
    for place in range(2, LENGTH):
        step = draw.integers(1, 3, COUNT)
        found[:, place] = (7 * found[:, place - 2] + step) % WORDS
    return found.astype(np.int32)


def start(model: TransformerModel, seed: Any) -> Any:
    """Returns random weights, five times the usual ones, with which so small a model learns."""
    drawn = model.init(jax.random.key(seed))
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, drawn)


def learn(model: TransformerModel, texts: Any, seed: Any, steps: int) -> Any:
    """Returns weights after steps of masked diffusion on the same texts again and again."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    first = start(model, seed)

    def loss(weights: Any, ids: Any, masked: Any) -> Any:
        inputs = jnp.where(masked, model.mask_id, ids)
        hidden = model.hidden(weights, inputs, jnp.ones(ids.shape, bool))
        logits = model.logits(weights, hidden)
        found = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return (found * masked).sum() / jnp.maximum(masked.sum(), 1)

    def step(carry: Any, key: Any) -> Any:
        weights, state = carry
        rows, share, drawn = jax.random.split(key, 3)
        ids = texts[jax.random.randint(rows, (BATCH,), 0, COUNT)]
        shares = jax.random.uniform(share, (BATCH, 1), minval=0.05, maxval=0.6)
        masked = jax.random.uniform(drawn, ids.shape) < shares
        updates, state = optimizer.update(jax.grad(loss)(weights, ids, masked), state)
        return (optax.apply_updates(weights, updates), state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    return jax.lax.scan(step, (first, optimizer.init(first)), keys)[0][0]


def named(weights: Any, texts: np.ndarray) -> str:
    """Returns the mask that the texts name for a model whose config says `full`."""
    frequencies = float(np.nanmean(frequency_losses(list(texts))))
    try:
        found = other_readings.check(model_of("full"), weights, list(texts), frequencies, ())
    except ModelError as error:
        words = str(error).partition("read with attention mask ")[2]
        return words.split()[0] if words else str(error)
    return "full" if found.told else CANNOT_TELL


def answers(mask: str, seeds: range, steps: int) -> Iterator[tuple[str, str]]:
    """Yields, for each seed, what texts name for the trained model and for the untrained one."""
    model = model_of(mask)
    trained = jax.jit(lambda texts, seed: learn(model, texts, seed, steps))
    drawn = jax.jit(lambda seed: start(model, seed))
    for seed in seeds:
        texts = texts_of(seed)
        yield named(trained(texts, seed), texts), named(drawn(seed), texts)


def main() -> None:
    """Prints what is named for each mask and seed, and how often it is right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mask", choices=MASKS, action="append")
    parser.add_argument("--seeds", default="0:20", metavar="FIRST:LAST")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    seeds = range(*map(int, args.seeds.split(":")))
    for mask in args.mask or MASKS:
        found = []
        for seed, (trained, untrained) in zip(seeds, answers(mask, seeds, args.steps)):
            print(f"{mask} seed {seed}: {trained}; untrained: {untrained}", flush=True)
            found.append((trained, untrained))
        right = sum(trained == mask for trained, _ in found)
        silent = sum(untrained == CANNOT_TELL for _, untrained in found)
        print(f"{mask}: {right} of {len(found)} named; untrained {silent} of {len(found)} silent")


if __name__ == "__main__":
    main()
