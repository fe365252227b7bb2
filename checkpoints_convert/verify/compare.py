"""Compares what JAX and PyTorch computed of the same texts with PyTorch in float64, by stage.

Each stage reads what the float64 run gave before it, rounded. So its error is its own: it does not
grow from block to block, and a fault shows at the one stage that has it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from checkpoints_convert.verify.exchange import rank_agreement
from checkpoints_convert.verify.inputs import Inputs
from checkpoints_convert.verify.ours import RANKS, TOLERANCE, Ours, masked_tokens, token_losses
from checkpoints_convert.verify.rounding import NOISES, bound_of_losses, logits_of, noise, sizes
from sama_jax.errors import ModelError
from sama_jax.models.stages import stages

LOSS_NOISES = {"float32": 16.0, "bfloat16": 2.0}
"""How many times PyTorch's own error a loss of ours may be off. Losses gather what all blocks
round, and in bfloat16 two runs each do so in their own way."""
SIZE = 1e-4
"""Bound without float64, in units of `sizes`. In SmolLM2 the rounding of a block gave at most
2.2e-5."""
States = dict[str, np.ndarray]
"""By stage: [b, l, d], and `logits` [b, l, v]; zeros at padding."""


class Theirs(NamedTuple):
    """Holds what PyTorch computed."""

    name: str
    exact: States | None
    """In float64; None if its code cannot."""
    plain: States
    """In the dtype that is compared, end to end."""
    given: States
    """What every stage reads: what the stage before gave in float64, if there is that run."""
    fed: States
    """In the dtype that is compared, each stage having read `given`."""


class Line(NamedTuple):
    """Holds a line of the table: a stage of the network, compared at all valid positions."""

    stage: str
    theirs: float
    """Largest error of PyTorch."""
    ours: float
    """Largest error of JAX."""
    noises: float
    """Largest error of JAX in its unit, the noise of PyTorch."""
    allowed: float
    agrees: bool


def run_theirs(reference: Any, inputs: Inputs, mask_id: int) -> Theirs:
    """Runs a `torch_reference.Reference` on every text, without padding."""
    read = masked_tokens(inputs.tokens, inputs.masks, mask_id)
    lengths = inputs.valid.sum(axis=1)

    def each_length(run: Callable[[np.ndarray, States], States], instead: States) -> States:
        out: States = {}
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            part = {name: state[rows, :length] for name, state in instead.items()}
            for name, state in run(read[rows, :length], part).items():
                empty = np.zeros((*read.shape, state.shape[-1]), state.dtype)
                out.setdefault(name, empty)[rows, :length] = state
        return out

    plain = each_length(reference.run, {})
    try:
        exact = each_length(lambda tokens, _: reference.exact(tokens), {})
    except ModelError as error:
        print(f"no float64 run ({error}): bounds are derived from the sizes of the states")
        exact = None
    source = (exact or plain).items()
    given = {name: state.astype(np.float32) for name, state in source if name != "logits"}
    return Theirs(reference.name, exact, plain, given, each_length(reference.run, given))


def compare(ours: Ours, inputs: Inputs, theirs: Theirs) -> Iterator[Line]:
    """Yields the lines of the table, from the embedding to the losses."""
    valid, exact = inputs.valid, theirs.exact or theirs.plain

    def line(stage: str, state: Any, before: str) -> Line:
        right, rounded = (x[stage][valid].astype(np.float64) for x in (exact, theirs.fed))
        found = np.asarray(state, np.float64)[valid]
        theirs_off, ours_off = np.abs(rounded - right), np.abs(found - right)
        size = sizes(right)
        if stage.startswith("block"):  # its sum cancels where it takes a large feature away
            size += np.abs(theirs.given[before][valid])
        bound, allowed = noise(rounded, right, size, ours.dtype), NOISES
        if theirs.exact is None:
            bound, allowed = size, SIZE
        worst = float((ours_off / bound).max())
        # PyTorch far from its own float64 is no yardstick. bfloat16 always is: it decides nothing.
        usable = (theirs_off / size).max() <= SIZE or ours.dtype != "float32"
        agrees = worst <= allowed and bool(usable)
        return Line(stage, float(theirs_off.max()), float(ours_off.max()), worst, allowed, agrees)

    before = ""
    for stage, state in _staged(ours, inputs, theirs.given):
        if stage in exact:
            yield line(stage, state, before)
        before = stage
    yield _loss_line(ours, inputs, theirs)


def _staged(ours: Ours, inputs: Inputs, given: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """Yields our stages and `logits`; each reads what is `given` instead of the stage before."""
    read = jnp.asarray(masked_tokens(inputs.tokens, inputs.masks, ours.model.mask_id))
    swap = lambda name, x: jnp.asarray(given[name], x.dtype) if name in given else x  # noqa: E731
    state = None
    for name, state in stages(ours.model, ours.params, read, jnp.asarray(inputs.valid), swap):
        yield name, state
    assert state is not None
    yield "logits", logits_of(ours.model, ours.params, swap("final norm", state))


def _loss_line(ours: Ours, inputs: Inputs, theirs: Theirs) -> Line:
    """Compares the losses end to end, by the function that audits use."""
    asked = inputs.masks[inputs.valid]

    def losses(states: States) -> np.ndarray:
        return answer_losses(states["logits"], inputs, ours.model.shift)[asked]

    nll = token_losses(ours, *inputs)[inputs.valid][asked]
    rounded, right = losses(theirs.plain), losses(theirs.exact or theirs.plain)
    theirs_off, ours_off = np.abs(rounded - right), np.abs(nll - right)
    allowed = LOSS_NOISES[ours.dtype]
    if theirs.exact is None:
        at = (inputs.tokens, inputs.masks, inputs.valid, inputs.masks)
        unit = bound_of_losses(ours, *at, float(ours_off.max())).nats / allowed
    else:
        unit = max(float(theirs_off.max()), TOLERANCE[ours.dtype] / allowed)
    worst = float(ours_off.max()) / unit
    ranks = rank_agreement(nll, rounded)
    agrees = worst <= allowed and (ours.dtype == "float32" or ranks >= RANKS)
    return Line("losses", float(theirs_off.max()), float(ours_off.max()), worst, allowed, agrees)


def answer_losses(
    logits: Float[np.ndarray, "b l v"], inputs: Inputs, shift: bool
) -> Float[np.ndarray, " n"]:
    """Returns the loss of every valid token in nats, float64.

    Output i - 1 (0 at 0) of a shifted model is for position i.
    """
    source = np.maximum(np.arange(logits.shape[1]) - 1, 0) if shift else np.arange(logits.shape[1])
    wide = logits[:, source][inputs.valid].astype(np.float64)
    top = wide.max(axis=-1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=-1)) + top
    return total - np.take_along_axis(wide, inputs.tokens[inputs.valid][:, None], 1)[:, 0]


def end_to_end(ours: Ours, inputs: Inputs, theirs: Theirs) -> str:
    """Says how far both networks' logits and ours alone are from float64, without feeding."""
    at = inputs.masks
    found = np.asarray(dict(_staged(ours, inputs, {}))["logits"], np.float64)[at]
    rounded = theirs.plain["logits"][at].astype(np.float64)
    right = rounded if theirs.exact is None else theirs.exact["logits"][at]
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (right, found))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1).max()
    same = np.mean(found.argmax(-1) == right.argmax(-1))
    off = [float(np.abs(x - right).max()) for x in (rounded, found)]
    return (
        f"logits end to end, at {at.sum()} masked positions: PyTorch off by {off[0]:.1e}, JAX by "
        f"{off[1]:.1e} (KL at most {max(divergence, 0):.1e}, same top token {same:.1%})"
    )
