"""A model that has learnt a language, and texts of it: what no random weights can stand for.

In the language each word is followed, `LAG` words later, by one of two successors. A network of one
layer learns that in some seconds, with positions and the mask token in it. Not a test.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tiny
from jax import numpy as jnp
from tokenizers import Tokenizer, models, pre_tokenizers

from sama_jax.arrays import Params
from sama_jax.models.registry import read_config
from sama_jax.models.transformer import TransformerModel
from sama_jax.weights import saving

SHAPE = {"d_model": 32, "mlp_hidden_size": 64, "weight_tying": False, "rope_theta": 100.0}
WORDS, LAG, LENGTH = 20, 2, 32
STEPS, TUNED, BATCH, MASKED = 250, 60, 32, 0.25


def config(**changes: Any) -> dict[str, Any]:
    """The model's `config.json`."""
    return tiny.config(**{**SHAPE, **changes})


def model(**changes: Any) -> TransformerModel:
    """The network, or one that its config describes wrongly."""
    family = read_config(config(**changes), "config.json")
    assert family.mask_id is not None
    return TransformerModel(arch=family.arch, mask_id=family.mask_id)


def tokens(count: int, seed: int = 0, length: int = LENGTH) -> np.ndarray:
    """Token ids [count, length] of texts, all different."""
    draw = np.random.default_rng(seed)
    found = draw.integers(0, WORDS, (count, length))
    for place in range(LAG, length):
        step = draw.integers(1, 3, count)  # the two successors of word w are 7 w + 1 and 7 w + 2
        found[:, place] = (7 * found[:, place - LAG] + step) % WORDS
    return (found + 1).astype(np.int32)


@functools.lru_cache
def params(seed: int = 0) -> Params:
    """The weights of `model()` that has learnt the language."""
    network = model()
    return train(network, first(network, seed), tokens(STEPS * BATCH, seed + 1), STEPS, 1e-2, seed)


def first(network: TransformerModel, seed: int) -> Params:
    """Random weights that a network learns from."""
    drawn = jax.jit(network.init)(jax.random.key(seed))
    # With the usual weights of .02 the network takes three times as many steps.
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, drawn)


def train(
    network: TransformerModel, weights: Params, texts: Any, steps: int, rate: float, seed: int = 0
) -> Params:
    """Weights after `steps` of Adam on masked texts, which are used again and again."""
    draw = np.random.default_rng(seed)
    order = np.resize(np.arange(len(texts)), steps * BATCH)
    batches = np.asarray(texts)[order].reshape(steps, BATCH, -1)
    masks = draw.random(batches.shape) < MASKED
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(weights: Any, ids: Any, masked: Any) -> Any:
        inputs = jnp.where(masked, network.mask_id, ids)
        hidden = network.hidden(weights, inputs, jnp.ones(ids.shape, bool))
        logits = network.logits(weights, hidden)
        found = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return (found * masked).sum() / masked.sum()

    @jax.jit
    def run(weights: Any, batches: Any, masks: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights, *batch), state)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, optimizer.init(weights)), (batches, masks))[0][0]

    return run(weights, batches, masks)


def words(ids: np.ndarray) -> str:
    """The text whose tokens are `ids`, by the tokenizer of `folder`."""
    return " ".join(f"w{i}" for i in ids)


def tokenizer(shift: int = 0) -> Tokenizer:
    """One token a word; with a `shift` all words have other ids."""
    count = tiny.VOCAB - 1
    vocabulary = {f"w{word}": (word + shift) % count for word in range(count)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return made


def folder(path: Path, weights: Params, **changes: Any) -> Path:
    """A model folder with these weights."""
    full = config(**changes)
    network = model(**changes)
    path.mkdir(parents=True)
    family = read_config(full, str(path))
    saving.save_folder(path, weights, network, full, path, family.weights)
    tokenizer().save(str(path / "tokenizer.json"))
    return path


def audited(base: Path, members: np.ndarray | None = None, steps: int = TUNED) -> None:
    """Folders `reference` and `target` in `base`; the latter is fine-tuned on the members."""
    texts = tokens(64, seed=7) if members is None else members
    target = train(model(), params(), texts, steps, 3e-3, seed=1)
    for name, weights in (("reference", params()), ("target", target)):
        folder(base / name, weights)


def write_texts(path: Path, texts: Mapping[str, tuple[str, int]]) -> Path:
    """A JSONL file of id -> text and label."""
    lines = [{"id": i, "text": text, "label": label} for i, (text, label) in texts.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
