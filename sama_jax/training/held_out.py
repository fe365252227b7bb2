"""Measures a model's loss on texts that are set aside, before and after training."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array

from sama_jax import rng
from sama_jax.arrays import Params, TextKeyData
from sama_jax.terminal import Terminal
from sama_jax.training.sequences import Padded, Tokens, pad, padded_length
from sama_jax.training.step import num_predicted

MAX_TEXTS = 256
"""Texts that the loss is measured on, at most."""
ROWS = 32
"""Texts in one batch."""


class HeldOut(NamedTuple):
    """Texts for the held-out loss, as `step.HELD_OUT` takes them."""

    name: str
    """What they are called in messages and results."""
    num_predicted: int
    """Tokens that their losses stand for."""
    padded: Padded
    keys: TextKeyData


def held_out(name: str, kind: str, sequences: Sequence[Tokens]) -> HeldOut:
    """Prepares the first `MAX_TEXTS` sequences for a model of this kind."""
    chosen = sequences[:MAX_TEXTS]
    padded = pad(chosen, padded_length(chosen), 0)
    return HeldOut(name, num_predicted(kind, padded.learned), padded, text_keys(chosen))


def text_keys(sequences: Sequence[Tokens]) -> TextKeyData:
    """Returns the hashes of sequences that their masks derive from (host)."""
    found = [rng.text_key_data(s.ids) for s in sequences]
    return TextKeyData(*(np.array(column, np.uint32) for column in zip(*found)))


def mean_nll(
    run: Callable[..., Array], params: Params, held: HeldOut, when: str, terminal: Terminal
) -> float:
    """Returns the mean loss in nats a token; `run` is `step.HELD_OUT` of a model and a seed."""
    total, (tokens, _, learned) = 0.0, held.padded
    with terminal.bar(f"loss {when} training", len(tokens), "texts") as bar:
        bar.note("compiling" if when == "before" else "")
        for start in range(0, len(tokens), ROWS):
            index = np.arange(start, start + ROWS)
            real = index < len(tokens)
            index = np.where(real, index, 0)
            keys = TextKeyData(*(np.asarray(x)[index] for x in held.keys))
            valid = held.padded.valid(index)
            nll = run(params, tokens[index], valid, keys, learned[index])
            total += float(np.asarray(nll, np.float64)[real].sum())
            bar.note("")
            bar.advance(int(real.sum()))
    return total / held.num_predicted
