"""Makes a model learn a few texts, in memory: one that was surely trained on known texts."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from sama_jax import rng
from sama_jax.arrays import Model, Params
from sama_jax.terminal import Terminal
from sama_jax.training.held_out import held_out, mean_nll
from sama_jax.training.loop import REMAT_PARAMS
from sama_jax.training.sequences import Tokens, pad, padded_length
from sama_jax.training.step import HELD_OUT, Recipe, batch_rows, init_state, train_step

FALL = 1.0
"""Nats a token by which the loss is to fall; half of it is enough where there is less."""
STEPS, EVERY, BATCH = 800, 20, 32
"""Most steps, steps from one look at the loss to the next, and texts in a step."""
FIRST_RATE, LAST_RATE = 1e-5, 3e-3
"""The rate doubles where the loss has fallen since the last look, and else is halved, so that
networks of any size find theirs."""
RECIPE = (
    f"AdamW, {STEPS} steps of {BATCH} at most, rate {FIRST_RATE} to {LAST_RATE}, until {FALL} nats"
)
BYTES, PIECES = 20, 8
"""Bytes of a parameter in training: itself, the gradients of all texts and of those of a piece, and
two moments, in float32; and pieces in which the loss of a large model is computed."""


class Learnt(NamedTuple):
    """A model that has learnt a few texts."""

    params: Params
    before: float
    """Mean loss of these texts in nats a token, by `step.HELD_OUT`."""
    after: float
    steps: int


def learn(
    model: Model,
    params: Params,
    sequences: Sequence[Tokens],
    seed: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Learnt:
    """Trains all parameters on a few texts until their loss has fallen enough, or `STEPS` are made.

    Args:
      model: computes activations in its own dtype.
      params: float32, on one device; given up here.
      sequences: tokens of each text.
      seed: of order and masks.
      advance: called with `EVERY` after so many steps.

    Returns:
      the model; its loss is not finite if training broke it.
    """
    large = sum(leaf.size for leaf in jax.tree.leaves(params)) > REMAT_PARAMS
    model = dataclasses.replace(model, remat=large)  # pyright: ignore  a protocol
    pieces = PIECES if large else 1
    padded = pad(sequences, padded_length(sequences), 0)
    held, quiet = held_out("the texts", model.kind, sequences), Terminal(quiet=True)
    evaluate = partial(HELD_OUT[model.kind], model, np.uint32(seed))
    key = rng.run_key(seed, rng.Purpose.TRAINING_MASKS)
    rate, done = FIRST_RATE, 0
    before = after = mean_nll(evaluate, params, held, "before", quiet)
    state = init_state(params, _recipe(rate))
    while done < STEPS and math.isfinite(after) and before - after < min(FALL, before / 2):
        for step in range(done, done + EVERY):
            rows = batch_rows(seed, step, BATCH, len(sequences))
            batch = padded.tokens[rows], padded.valid(rows), key, padded.learned[rows]
            state, _ = train_step(model, pieces, _recipe(rate), state, *batch)
        done, last = done + EVERY, after
        after = mean_nll(evaluate, state.params, held, "after", quiet)
        rate = min(2 * rate, LAST_RATE) if after < last else rate / 2
        advance(EVERY)
    return Learnt(state.params, before, after, done)


def _recipe(rate: float) -> Recipe:
    """Returns the numbers of a step at this rate, without warm-up, decay of it or of weights."""
    numbers = {"learning_rate": rate, "warmup_steps": 0, "steps": 1e9, "weight_decay": 0}
    numbers |= {"grad_clip": 1, "eps": 1e-3}
    return Recipe(**{name: np.float32(value) for name, value in numbers.items()})
