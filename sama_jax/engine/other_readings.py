"""Whether a model reads texts as it was trained to: no other way of reading may predict better.

A wrong rotary base, a wrong mask token or halves of queries and keys in another order fail nowhere;
they only cost a part of what the model has learnt, and an attack then sees less than is there. Nor
does a folder say whether a diffusion model was trained with full, causal or block attention. The
texts of the audit tell: read in another way (backwards, masked by another token, with another
rotary base or mask of attention), they must be predicted worse. A next-token model masks nothing,
and is read in the other ways. Of many wrong fields, also of some that we have never heard of,
another reading is then better; not of all: a model whose embedding is scaled when it should not be
is worse in every way.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Model, Params
from sama_jax.core import losses
from sama_jax.errors import ModelError
from sama_jax.models.attention_mask import mask_of

STRIDE = 4
"""Every fourth token is masked in a pass, as in `output_position`."""
CHUNK = 32
"""Texts of one pass."""
MOST_TEXTS = 256
LEAST_TEXTS = 32
SHORTEST, LONGEST = 8, 512
"""Tokens of a text that is read: a chunk of longer ones needs more memory than a batch may have."""
BASES = (0.1, 10.0)
"""Factors of the rotary base. A base that is wrong by 25 either way is better by one of them."""
BLOCKS = (None, 1, 8, 32)
"""Lengths of blocks that are tried: full attention, causal, and two that public models have."""
MORE_BLOCKS = (2, 4, 16, 64, 128)
"""And these, to name the best, once one of the others is better than the config's."""
SURE, CLEARED = 5.0, 3.0
"""Standard errors from which another reading is better, or no longer a suspect."""
SHARE = 0.1
"""Judgement: of what the model knows beyond how frequent tokens are, the share that another reading
must add to be a fault of ours. A base that was changed after the training may gain a little."""
FLOOR = 0.02
"""Judgement: nats a token that another reading must add, whatever the model knows. A model read
rightly that knew .021 beyond the frequencies gained .012 (+- .002) by another rotary base."""


VERSION = 3
"""Of this check, counted up when it changes: what an earlier one has passed is judged again."""


class Reading(NamedTuple):
    """One way of reading texts."""

    name: str
    model: Model
    mask_id: int
    backwards: bool = False
    mask: str | None = None
    """The mask of attention that makes it another reading."""


class Lead(NamedTuple):
    """How much better another reading predicts than the config's own, in nats a token."""

    read: Reading
    lead: float
    error: float
    """Standard error of `lead`, over texts."""
    own: float
    """Loss of the config's own reading."""
    texts: int


def other_readings(model: Model, other_masks: Collection[int]) -> list[Reading]:
    """Lists other ways to read a model's texts than its config's.

    A next-token model has no mask that could be another one.

    Args:
      model: as its config says.
      other_masks: tokens that could stand for a masked one; `model.mask_id` is passed over.
    """
    own = model.mask_id
    found = [Reading("backwards", model, own, backwards=True)]
    masks = () if model.kind == "autoregressive" else other_masks
    found += [Reading(f"masked by token {m}", model, m) for m in masks if m != own]
    arch: Any = model.arch
    bases = [f.name for f in dataclasses.fields(arch) if f.name.endswith("theta")]
    for factor in BASES if bases else ():
        changed = {name: getattr(arch, name) * factor for name in bases}
        other: Any = dataclasses.replace(arch, **changed)
        read = cast(Model, dataclasses.replace(cast(Any, model), arch=other))
        found.append(Reading(f"with a rotary base {factor:g} times as large", read, own))
    return found


def other_attention(model: Model, blocks: Collection[int | None], length: int) -> list[Reading]:
    """Lists readings with other masks of attention; none for a model that has no choice of them.

    Args:
      model: as its config says.
      blocks: lengths of blocks. Those from `length` on are full attention by another name.
      length: tokens of the longest text.
    """
    arch: Any = model.arch
    if model.kind != "diffusion" or "block_length" not in arch.__dataclass_fields__:
        return []
    own = None if (arch.block_length or length) >= length else arch.block_length
    found = []
    for block in blocks:
        if block != own and (block or 0) < length:
            other: Any = dataclasses.replace(arch, block_length=block)
            name = mask_of(other)
            read = cast(Model, dataclasses.replace(cast(Any, model), arch=other))
            found.append(Reading(f"with attention mask {name}", read, model.mask_id, mask=name))
    return found


@partial(jax.jit, static_argnums=0)
def token_losses(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    inputs: Int[Array, "b l"],
    valid: Bool[Array, "b l"],
    positions: Int[Array, "b k"],
) -> Float[Array, "b k"]:
    """Computes the losses of `tokens` at `positions` (-1 unused, gives NaN), given `inputs`."""
    stream = model.trunk(params, inputs, valid, tokens)
    return losses.scored_values(model, params, tokens, valid, stream, positions, ("nll",))[0]


def text_losses(
    read: Reading, params: Params, texts: Sequence[Int[np.ndarray, "..."]], offset: int, length: int
) -> Float[np.ndarray, " b"]:
    """Averages the losses of every fourth token of each text, from one pass of `CHUNK` texts.

    Args:
      read: how.
      params: the model's.
      texts: at most `CHUNK`, of at least `SHORTEST` tokens each.
      offset: which of four tokens; text i starts with the (offset + i)-th.
      length: what the texts are padded to.
    """
    tokens, masks = np.zeros((CHUNK, length), np.int32), np.zeros((CHUNK, length), bool)
    valid = np.zeros((CHUNK, length), bool)
    for row, ids in enumerate(texts):
        count = min(len(ids), length)
        place = np.arange(count)
        # Nothing predicts the first token of a shifted model.
        masks[row, :count] = (place % STRIDE == (offset + row) % STRIDE) & (place > 0)
        valid[row, :count] = True
        tokens[row, :count] = ids[:count]
        if read.backwards:  # the same tokens are masked between the same neighbours
            tokens[row, :count], masks[row, :count] = (
                tokens[row, :count][::-1],
                masks[row, :count][::-1],
            )
            masks[row, 0] = False
    valid[len(texts) :, 0] = True  # a row without any token has no softmax
    hidden = masks if read.model.kind != "autoregressive" else np.zeros_like(masks)
    inputs = np.where(hidden, read.mask_id, tokens).astype(np.int32)
    positions = losses.scored_positions(masks, -(-length // STRIDE))
    found = token_losses(read.model, params, tokens, inputs, valid, positions)
    if not found.is_fully_addressable:  # a model over the devices of several processes
        found = multihost_utils.process_allgather(found, tiled=True)
    return np.nanmean(np.asarray(found, np.float64)[: len(texts)], axis=1)


def can_tell(texts: Sequence[Int[np.ndarray, "..."]]) -> bool:
    """Tells whether these texts are enough to judge how a model is read."""
    return sum(len(ids) >= SHORTEST for ids in texts) >= LEAST_TEXTS


class Judgement(NamedTuple):
    """What texts say about how a model is read."""

    warning: str | None
    """Another reading is a little better; None: none is."""
    told: bool
    """Whether the model knows enough of these texts for them to tell."""


def better_readings(
    own: Reading,
    others: Sequence[Reading],
    params: Params,
    texts: Sequence[Int[np.ndarray, "..."]],
    frequencies: float,
) -> tuple[list[Lead], float]:
    """Returns the other readings that surely predict better than the model's own, best first.

    And the loss of its own, in nats a token.

    Texts are read until each other reading is surely better or no longer a suspect, so that a
    model that is read well costs a few passes.

    Args:
      own: as the config says.
      others: of `other_readings`.
      params: the model's.
      texts: token ids; of at least `SHORTEST` tokens; the first `MOST_TEXTS` are read.
      frequencies: loss of those texts by how frequent their tokens are, in nats a token.
    """
    texts = texts[:MOST_TEXTS]
    length = -(-max(map(len, texts), default=1) // STRIDE) * STRIDE
    seen: list[np.ndarray] = []
    leads: dict[str, list[np.ndarray]] = {read.name: [] for read in others}
    left, found = list(others), []
    for offset in range(STRIDE):
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            seen.append(text_losses(own, params, chunk, offset, length))
            for read in list(left):
                other = text_losses(read, params, chunk, offset, length)
                leads[read.name].append(seen[-1] - other)
                lead = _lead(read, leads[read.name], seen)
                least = max(SHARE * (frequencies - lead.own), FLOOR)
                if lead.lead > max(SURE * lead.error, least):
                    found.append(lead)
                if lead in found or lead.lead + CLEARED * lead.error < least:
                    left.remove(read)
            if not left:
                break
    found += [
        one for one in (_lead(r, leads[r.name], seen) for r in left) if one.lead > SURE * one.error
    ]
    return sorted(found, key=lambda one: -one.lead), float(np.concatenate(seen).mean())


def _lead(read: Reading, leads: list[np.ndarray], seen: list[np.ndarray]) -> Lead:
    values = np.concatenate(leads)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Lead(
        read, float(values.mean()), float(error), float(np.concatenate(seen).mean()), len(values)
    )


def check(
    model: Model,
    params: Params,
    texts: Sequence[Int[np.ndarray, "..."]],
    frequencies: float,
    other_masks: Collection[int],
    *,
    asked_mask: bool = False,
) -> Judgement:
    """Warns if another reading surely predicts the texts better than the config's own.

    Raises `ModelError` if it adds more than a tenth of what the model then knows. A model that,
    however it is read, knows no more than how frequent tokens are cannot tell, and passes: a gate
    of its own looks at that.

    Args:
      model: of any kind.
      params: its parameters.
      texts: token ids; fewer than `LEAST_TEXTS` cannot tell, and pass.
      frequencies: loss of those texts by how frequent their tokens are.
      other_masks: tokens that could stand for a masked one.
      asked_mask: whether the mask of attention was asked for; another one is then a warning alone.
    """
    if not can_tell(texts):
        return Judgement(None, told=False)
    texts = [ids for ids in texts if len(ids) >= SHORTEST]
    own, length = Reading("as its config says", model, model.mask_id), max(map(len, texts))
    others = other_readings(model, other_masks) + other_attention(model, BLOCKS, length)
    leads, loss = better_readings(own, others, params, texts, frequencies)
    if leads and leads[0].read.mask:  # which one exactly?
        more = other_attention(model, MORE_BLOCKS, length)
        leads += better_readings(own, more, params, texts, frequencies)[0]
        leads.sort(key=lambda one: -one.lead)
    known = frequencies - loss + (leads[0].lead if leads else 0.0)
    if known <= 0 or not leads:
        return Judgement(None, told=known > 0)
    wrong = [one for one in leads if one.lead > max(SHARE * known, FLOOR)]
    refused = [one for one in wrong if not (asked_mask and one.read.mask)]
    if refused:
        own_mask = mask_of(model.arch)
        raise ModelError(f"{_told(refused[0], known)}; {_way_out(refused[0].read, own_mask)}")
    return Judgement(_told(leads[0], known), told=True)


def _told(best: Lead, known: float) -> str:
    return (
        f"read {best.read.name} it predicts the texts better than as its config says: by "
        f"{best.lead:.3f} +- {best.error:.3f} nats a token over {best.texts} passes, of "
        f"{known:.3f} that it then knows beyond the frequencies of tokens"
    )


def _way_out(read: Reading, own_mask: str) -> str:
    lost = "an attack would see only a part of what is there"
    if read.mask:
        return (
            f"{lost}, and its folder does not say how it was trained. Give the mask that it was "
            f"trained with, as --attention-mask {read.mask}, or {own_mask} to keep this reading"
        )
    return (
        f"{lost}. Check the mask token, the rotary base and the other fields of config.json, and "
        "that the weights are whole"
    )
