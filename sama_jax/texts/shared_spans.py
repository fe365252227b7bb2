"""Aligns the tokens of two tokenizers: spans of a text whose ends both of them have as ends.

A span is the shortest run of characters that is made of whole tokens on both sides. What a token
leaves out before it (a space that a tokenizer drops) counts as its own; what is left out at the end
of a text, as the last token's.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sama_jax.arrays import SharedTokens

Places = Int[np.ndarray, "n 2"]
"""[start, end) of each token in the characters of its text."""


class Tokens(NamedTuple):
    """What one tokenizer makes of a text, uncut (host)."""

    ids: Int[np.ndarray, " n"]
    special: Bool[np.ndarray, " n"]
    """Tokens that it added, at both ends only: they have no characters."""
    places: Int[np.ndarray, "n 2"]
    pieces: tuple[str, ...]
    """How it spells its tokens."""

    @property
    def own(self) -> slice:
        """Returns where the tokens of the text itself are; empty if it has none."""
        own = np.flatnonzero(~self.special)
        return slice(int(own[0]), int(own[-1]) + 1) if len(own) else slice(0, 0)

    @property
    def added(self) -> int:
        """Counts the other tokens, which the tokenizer added."""
        return len(self.ids) - (self.own.stop - self.own.start)


class Shared(NamedTuple):
    """Two readings of a text, cut where they are cut alike, and their spans (host)."""

    ids: Int[np.ndarray, " n"]
    """Of the target."""
    special: Bool[np.ndarray, " s"]
    """Spans that are a token which both tokenizers added."""
    tokens: SharedTokens
    cut: bool


def shared_spans(target: Tokens, reference: Tokens, max_length: int) -> Shared | None:
    """Cuts a text so that both fit into `max_length` tokens, and numbers the spans they share.

    Added tokens stay, as they do where one text is cut. They are spans of their own where both
    sides have the same ones; else they belong to no span.

    Returns:
      the tokens and spans; None where either side has no token of the text, or no span fits.
    """
    both = target, reference
    if any(side.own.start == side.own.stop for side in both):
        return None
    ends = _span_ends(target, reference)
    room = np.array([max_length - side.added for side in both])
    count = int((ends <= room).all(axis=1).sum())
    if count == 0:
        return None
    begins, behind = (
        [side.pieces[: side.own.start] for side in both],
        [side.pieces[side.own.stop :] for side in both],
    )
    lead, trail = (len(first) if first == other else 0 for first, other in (begins, behind))
    kept = [_numbered(side, ends[:count, i], lead, trail) for i, side in enumerate(both)]
    (ids, spans), (reference_ids, reference_spans) = kept
    special = np.ones(lead + count + trail, bool)
    special[lead : lead + count] = False
    tokens = SharedTokens(spans, reference_ids, reference_spans)
    return Shared(ids, special, tokens, count < len(ends))


def _numbered(
    side: Tokens, ends: Int[np.ndarray, " s"], lead: int, trail: int
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Returns the tokens of one side up to the end of the last span, and the span of each.

    Args:
      side: its tokens.
      ends: how many of its own tokens the spans up to each one's end have.
      lead: added tokens before the text that are spans; 0: they are none.
      trail: the same behind it.
    """
    last, stop = int(ends[-1]), side.own.stop
    ids = np.concatenate([side.ids[: side.own.start + last], side.ids[stop:]])
    before = np.arange(lead) if lead else np.full(side.own.start, -1)
    after = np.arange(trail) + lead + len(ends) if trail else np.full(len(side.ids) - stop, -1)
    own = lead + np.searchsorted(ends, np.arange(last), side="right")
    return ids, np.concatenate([before, own, after]).astype(np.int32)


def _span_ends(target: Tokens, reference: Tokens) -> Int[np.ndarray, "s 2"]:
    """Returns how many tokens of each side the spans up to each one's end have."""
    ours, theirs = (side.places[side.own] for side in (target, reference))
    spelt, other_spelt = (side.pieces[side.own] for side in (target, reference))
    (at, after), (other_at, other_after) = boundaries(ours), boundaries(theirs)
    _, mine, other = np.intersect1d(at, other_at, assume_unique=True, return_indices=True)
    ends = np.stack([after[mine], other_after[other]], axis=1)
    found, begin = [], np.zeros(2, np.int64)
    for end in [*ends, np.array([len(ours), len(theirs)])]:
        (a, c), (b, d) = begin, end
        # Several tokens of one character: no character ends between them, but where both sides
        # spell the same ones, each of them is a span.
        if b - a > 1 and spelt[a:b] == other_spelt[c:d]:
            found += [begin + i for i in range(1, b - a)]
        found.append(end)
        begin = end
    return np.stack(found)


def boundaries(places: Places) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Finds the characters between which a text falls apart into whole tokens.

    Args:
      places: of one or more tokens, in their order; places may overlap, where several tokens spell
        one character, and leave characters out.

    Returns:
      the characters before which there is a boundary, ascending, without both ends of the text;
      and the number of tokens before each.
    """
    reach = np.maximum.accumulate(places[:, 1])[:-1]
    rest = np.minimum.accumulate(places[::-1, 0])[::-1][1:]
    after = np.flatnonzero((reach <= rest) & (reach > 0)) + 1
    at, first = np.unique(reach[after - 1], return_index=True)
    return at, after[first]
