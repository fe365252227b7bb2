"""Replays an audit's probes in our models for `--plan`, against losses that were saved elsewhere.

Are the losses equal, which votes flip and why, and how far do the scores move? Where losses differ,
the hidden states that the script saved with them name the first block at fault.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.table import Table

from checkpoints_convert.verify import live
from checkpoints_convert.verify.ours import (
    PARITY,
    TOLERANCE,
    Ours,
    masked_tokens,
    open_ours,
    require_finite,
)
from checkpoints_convert.verify.rounding import (
    MOVES,
    SEEDS,
    Bound,
    bound_of_losses,
    jittered,
    sizes,
)
from sama_jax.arrays import ForwardBatch, Params
from sama_jax.core import losses, votes
from sama_jax.errors import DataError
from sama_jax.models.stages import stages
from sama_jax.storage import replay
from sama_jax.terminal import results_console

ROWS = 8
"""Texts in one call."""


class Flips(NamedTuple):
    """Counts votes that differ, out of `total`."""

    count: int
    total: int
    unexplained: int
    """Flips whose sum is further from 0 than the tolerance of its losses allows."""
    largest: float
    """Largest |sum| among the flips, by either side, in nats."""


def verify_plan(
    target: Path, reference: Path, plan: Path, saved: Path, dtype: str, options: live.Options
) -> int:
    """Prints the comparison. Returns 0 if losses agree and every flip is explained, else 6."""
    probes = replay.load_plan(plan)
    theirs = replay.load_losses(saved, probes)
    paths = {"target": (target, options.adapters), "reference": (reference, ())}
    found, bounds, wrong = {}, {}, []
    table = Table(title=f"{plan.name}: {len(probes.ids)} texts, {dtype}")
    for column in ("model", "losses", "largest difference", "mean", "allowed", ""):
        table.add_column(column)
    for name, (path, adapters) in paths.items():
        ours = open_ours(path, dtype=dtype, adapters=adapters, mask_id=options.mask_id)
        _check_tokens(plan, probes, ours)
        found[name] = plan_losses(ours, probes)
        scored = probes.plan.scored
        difference = np.abs(found[name] - getattr(theirs, name))[scored]
        largest = float(difference.max(initial=0))
        bounds[name] = _bound(ours, probes, largest)
        agrees = largest <= bounds[name].nats
        numbers = (largest, difference.mean() if difference.size else 0.0, bounds[name].nats)
        table.add_row(
            name, str(scored.sum()), *(f"{v:.2e}" for v in numbers), "" if agrees else "DIFFERS"
        )
        if not agrees:
            wrong.append(f"{name}: {first_difference(ours, probes, theirs, name, dtype)}")
        del ours
    results_console().print(table)
    for name, bound in bounds.items():
        print(f"{name}: allowed {bound.nats:.2g} nats; {bound.why}")
    allowed = sum(bound.nats for bound in bounds.values()) / 2  # a vote reads both models
    flips = count_flips(probes, found, {k: getattr(theirs, k) for k in paths}, allowed)
    scores = [_scores(probes, x["target"], x["reference"]) for x in (found, theirs._asdict())]
    print(
        f"votes: {flips.count} of {flips.total} flip, {flips.unexplained} unexplained (their sums "
        "are further from zero than what losses are allowed); largest sum of a flip "
        f"{flips.largest:.2e} nats"
    )
    print(f"scores: largest difference {np.abs(scores[0] - scores[1]).max(initial=0):.2e}")
    if not wrong and not flips.unexplained:
        largest = max(bound.nats for bound in bounds.values())
        print(f"verdict: equal within {largest:.2g}, every flip explained")
        return 0
    for line in wrong:
        print(line)
    print("verdict: DIFFERENT")
    return PARITY


def _bound(ours: Ours, probes: replay.Replay, apart: float) -> Bound:
    """Returns the bound for losses of the plan: its texts in all their passes."""
    masks, scored = np.asarray(probes.plan.masks), np.asarray(probes.plan.scored)
    length = max(1, int((probes.tokens >= 0).sum(axis=1).max(initial=1)))
    tokens = np.repeat(probes.tokens[:, :length], masks.shape[1], axis=0)
    masks, scored = (x[:, :, :length].reshape(-1, length) for x in (masks, scored))
    return bound_of_losses(ours, np.maximum(tokens, 0), masks, tokens >= 0, scored, apart)


def _check_tokens(path: Path, probes: replay.Replay, ours: Ours) -> None:
    if not np.asarray(probes.plan.scored).any():
        raise DataError(f"{path}: scores no token, so there is nothing to compare")
    if probes.tokens.max(initial=0) >= ours.model.vocab_size:
        raise DataError(
            f"{path}: tokens hold {probes.tokens.max()}, but the embedding of {ours.folder.path} "
            f"has {ours.model.vocab_size} rows; is it another model's plan?"
        )


def plan_losses(ours: Ours, probes: replay.Replay) -> Float[np.ndarray, "n t l"]:
    """Returns our losses of a plan, NaN where it scores none, by the scorer that audits use."""
    masks, scored = np.asarray(probes.plan.masks), np.asarray(probes.plan.scored)
    out = np.full(scored.shape, np.nan, np.float32)
    slots = max(1, int(scored.sum(axis=-1).max(initial=1)))
    length = max(1, int((probes.tokens >= 0).sum(axis=1).max(initial=1)))
    rows = min(ROWS, len(out))
    for start in range(0, len(out), rows):
        # The last rows once more: every call has the same shape.
        part = np.minimum(np.arange(start, start + rows), len(out) - 1)
        tokens = probes.tokens[part, :length]
        batch = ForwardBatch(
            np.maximum(tokens, 0).astype(np.int32),
            tokens >= 0,
            masks[part, :, :length].swapaxes(0, 1),
            losses.scored_positions(scored[part], slots).swapaxes(0, 1),
            np.zeros(masks.shape[1], np.int32),
            np.int32(masks.shape[1]),
        )
        values = np.asarray(_score(ours.model, slots, ours.params, batch)).swapaxes(0, 1)
        for row, found in zip(part, values):
            read = np.arange(slots) < scored[row].sum(axis=-1, keepdims=True)
            require_finite(ours, found[read])
            out[row][scored[row]] = found[read]
    return out


@partial(jax.jit, static_argnums=(0, 1))
def _score(model: Any, slots: int, params: Params, batch: ForwardBatch) -> jax.Array:
    return losses.loss_batch(model, (slots,), params, batch)


def count_flips(
    probes: replay.Replay,
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    allowed: float,
) -> Flips:
    """Counts the votes of subsets in recorded steps that differ.

    A sum over m tokens of both models' losses, each off by at most `allowed`, can move by
    2 m `allowed`; a flip within that of 0 is explained.
    """
    sums = [_sums(probes, x["target"], x["reference"]) for x in (ours, theirs)]
    plan = probes.plan
    size = (np.asarray(plan.subsets) >= 0).sum(axis=-1)
    counted = (size > 0) & (np.asarray(plan.weights) > 0)[..., None]
    flipped = ((sums[0] > 0) != (sums[1] > 0)) & counted
    far = np.maximum(np.abs(sums[0]), np.abs(sums[1]))
    unexplained = flipped & ~(far <= 2 * size * allowed)
    return Flips(
        int(flipped.sum()),
        int(counted.sum()),
        int(unexplained.sum()),
        float(far[flipped].max(initial=0)),
    )


def _sums(
    probes: replay.Replay, target: np.ndarray, reference: np.ndarray
) -> Float[np.ndarray, "n t s"]:
    """Sums reference minus target over each subset; float32 as in the votes."""
    plan = probes.plan
    latest = jax.jit(jax.vmap(votes.latest_losses))
    scored = np.asarray(plan.scored)
    both = [latest(np.where(scored, x, 0), scored) for x in (reference, target)]
    gain = np.asarray(both[0]) - np.asarray(both[1])
    subsets = np.asarray(plan.subsets)
    taken = np.take_along_axis(
        gain[:, :, None], np.maximum(subsets, 0).reshape(*subsets.shape[:2], 1, -1), axis=-1
    )
    return np.where(subsets >= 0, taken.reshape(subsets.shape), 0).sum(axis=-1)


def _scores(
    probes: replay.Replay, target: np.ndarray, reference: np.ndarray
) -> Float[np.ndarray, " n"]:
    return np.asarray(votes.batch_sign_statistics(target, reference, probes.plan).score)


# --- which block ---------------------------------------------------------------------------------


def first_difference(
    ours: Ours, probes: replay.Replay, theirs: replay.Losses, name: str, dtype: str
) -> str:
    """Names the first stage whose hidden states differ from the saved ones, in one line."""
    if name not in theirs.states or not len(theirs.state_at):
        return (
            "the losses file holds no hidden states that could name the block; save them with the "
            f"script in docs/verify.md, or run `verify {ours.folder.path}`, which compares with "
            "PyTorch on this machine block by block"
        )
    saved = theirs.states[name]
    names, states = states_at(ours, probes, theirs.state_at)
    if saved.shape != states.shape:
        return (
            f"its saved hidden states are {list(saved.shape[1:])} (stages, width), ours "
            f"{list(states.shape[1:])}: another architecture"
        )
    saved = saved.astype(np.float64)
    apart = (np.abs(states - saved) / sizes(saved)).max(axis=(0, 2))
    moved = _moved(ours, probes, theirs.state_at, states) if dtype == "float32" else 0 * apart
    for stage, value, move in zip(names, apart, moved):
        allowed = max(TOLERANCE[dtype], MOVES * move)
        if not value <= allowed:
            return (
                f"the first stage that differs is {stage} ({value:.1e} of its unit, allowed "
                f"{allowed:.2g}): its weights, or its arithmetic, are not those of the file"
            )
    return (
        "all blocks agree, so the difference is behind them: vocabulary head, logit alignment "
        "(--shift of the script), or the losses themselves"
    )


def _moved(
    ours: Ours, probes: replay.Replay, at: np.ndarray, still: np.ndarray
) -> Float[np.ndarray, " s"]:
    """Returns how far each stage moves, in its unit, when every state is rounded."""
    found = [states_at(ours, probes, at, jittered(seed))[1] for seed in range(SEEDS)]
    return np.max([(np.abs(x - still) / sizes(still)).max(axis=(0, 2)) for x in found], axis=0)


def states_at(
    ours: Ours,
    probes: replay.Replay,
    at: np.ndarray,
    instead: Callable[[str, jax.Array], jax.Array] = lambda name, state: state,
) -> tuple[list[str], Float[np.ndarray, "r s d"]]:
    """Returns our hidden states at (row, pass, position).

    They are what enters the blocks, what each gives, and normalised what the last one gives, as
    `output_hidden_states` of transformers has them.
    """
    row, step, position = at.T
    length = max(1, int((probes.tokens[row] >= 0).sum(axis=1).max()))
    tokens = probes.tokens[row, :length]
    masks = np.asarray(probes.plan.masks)[row, step, :length]
    clean, valid = jnp.asarray(np.maximum(tokens, 0)), jnp.asarray(tokens >= 0)
    read = jnp.asarray(masked_tokens(np.maximum(tokens, 0), masks, ours.model.mask_id))
    found = [
        (stage, np.asarray(state, np.float32)[np.arange(len(at)), position])
        for stage, state in stages(ours.model, ours.params, read, valid, instead, clean)
    ]
    last, final = found[-2], found[-1]
    found = [*found[:-2], (f"{last[0]} (with the final norm)", final[1])]
    return [stage for stage, _ in found], np.stack([state for _, state in found], axis=1)
