"""Measures what an audit loses that reads a block-diffusion model without clean text before blocks.

    python experiments/statistics/clean_context.py [--seeds FIRST:LAST] [--epochs N]

A model of two layers learns 512 texts of 32 tokens in blocks of 8, each behind the text without
masks, and then 64 members more. Members and as many others are told apart by how much more the
reference loses than the target, over 16 passes with half of the tokens masked. A line a seed: the
AUC where the same weights are read in blocks behind clean text, in blocks, and with full attention;
and how many nats a token the target then loses. Half a minute of two cores each.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from sama_jax.models.attention_mask import block_length_of, has_clean_context
from sama_jax.models.transformer import Architecture, TransformerModel

READINGS = ("clean:8", "block:8", "full")
WORDS, ROWS, LENGTH, KNOWN, MEMBERS = 20, 32, 32, 512, 64
BATCH, BASE_STEPS, RATE, PASSES = 32, 1500, 5e-3, 16


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
        clean_context=has_clean_context(mask),
    )
    return TransformerModel(arch=arch, mask_id=ROWS - 1)


def texts_of(seed: int, count: int) -> np.ndarray:
    """Draws texts [count, LENGTH]: a word leaves four choices for the one after the next."""
    draw = np.random.default_rng(seed)
    found = draw.integers(0, WORDS, (count, LENGTH))
    for place in range(2, LENGTH):
        found[:, place] = (7 * found[:, place - 2] + draw.integers(1, 5, count)) % WORDS
    return found.astype(np.int32)


def token_losses(model: TransformerModel, weights: Any, ids: Any, masked: Any) -> Any:
    """Computes the loss of every token in nats."""
    inputs = jnp.where(masked, model.mask_id, ids)
    hidden = model.hidden(weights, inputs, jnp.ones(ids.shape, bool), ids)
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(weights, hidden), ids)


def learn(weights: Any, texts: Any, key: Any, steps: int, rate: float) -> Any:
    """Returns weights after steps of masked diffusion in blocks behind clean text."""
    model, optimizer = model_of(READINGS[0]), optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(weights: Any, ids: Any, masked: Any) -> Any:
        return (token_losses(model, weights, ids, masked) * masked).sum() / masked.sum()

    def step(carry: Any, key: Any) -> Any:
        weights, state = carry
        rows, share, drawn = jax.random.split(key, 3)
        ids = texts[jax.random.randint(rows, (BATCH,), 0, len(texts))]
        shares = jax.random.uniform(share, (BATCH, 1), minval=0.05)
        masked = jax.random.uniform(drawn, ids.shape) < shares
        updates, state = optimizer.update(jax.grad(loss)(weights, ids, masked), state)
        return (optax.apply_updates(weights, updates), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (weights, optimizer.init(weights)), keys)[0][0]


def scores(reading: str, weights: Any, texts: Any, key: Any) -> Any:
    """Returns the mean loss of each text's masked tokens over the passes."""
    model = model_of(reading)

    def one(key: Any) -> Any:
        masked = jax.random.uniform(key, texts.shape) < 0.5
        return (token_losses(model, weights, texts, masked) * masked).sum(1) / masked.sum(1)

    return jax.lax.map(one, jax.random.split(key, PASSES)).mean(axis=0)


def audit(seed: int, epochs: int) -> dict[str, tuple[float, float]]:
    """Returns, for each reading, the AUC and the target's loss on texts that nobody learnt."""
    known, members, others = np.split(texts_of(seed, KNOWN + 2 * MEMBERS), [KNOWN, KNOWN + MEMBERS])
    keys = jax.random.split(jax.random.key(seed), 4)
    drawn = model_of(READINGS[0]).init(keys[0])
    first = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, drawn)
    learnt = jax.jit(learn, static_argnums=(3, 4))
    reference = learnt(first, known, keys[1], BASE_STEPS, RATE)
    target = learnt(reference, members, keys[2], epochs * MEMBERS // BATCH, RATE / 5)
    texts, found = jnp.concatenate([members, others]), {}
    for reading in READINGS:
        losses = jax.jit(scores, static_argnums=0)
        mine, theirs = (np.asarray(losses(reading, w, texts, keys[3])) for w in (target, reference))
        gain = theirs - mine
        wins = stats.mannwhitneyu(gain[:MEMBERS], gain[MEMBERS:]).statistic
        found[reading] = float(wins) / MEMBERS**2, float(mine[MEMBERS:].mean())
    return found


def main() -> None:
    """Prints a line a seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0:10", metavar="FIRST:LAST")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    everything = []
    for seed in range(*map(int, args.seeds.split(":"))):
        found = audit(seed, args.epochs)
        everything.append(found)
        told = (f"{name} {auc:.3f} ({loss:.2f})" for name, (auc, loss) in found.items())
        print(f"seed {seed}: AUC (nats) {', '.join(told)}", flush=True)
    for name in READINGS:
        aucs = np.array([found[name][0] for found in everything])
        print(f"{name}: mean AUC {aucs.mean():.3f}, deviation of it {aucs.std():.3f}")


if __name__ == "__main__":
    main()
