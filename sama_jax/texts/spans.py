"""Says which tokens of a conversation are its answers', and cuts it where it is too long.

A token may be scored if all its characters are of one answer, the token that ends it included. One
that holds characters of both sides stays visible, so no character of a prompt is ever masked.
"""

import itertools
import zlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sama_jax.arrays import Encoded, Rendered
from sama_jax.errors import DataError, ModelError

Places = Int[np.ndarray, "n 2"]
"""[start, end) of each token in the characters of its text."""


def marked(rendered: Rendered, raw: Any, bare: Any, max_length: int) -> Encoded:
    """Makes the tokens of a conversation of what the library gave.

    Args:
      rendered: the conversation.
      raw: its encoding, with the tokens that the tokenizer adds, if it does.
      bare: the same without them, with the places that the model saw.
      max_length: tokens that are kept.

    Raises:
      ModelError: the tokenizer adds its tokens in a way that hides where the others stand.
    """
    ids, special, places = placed(raw, bare, adds=rendered.adds)
    spans = joined(rendered.spans)
    answer = answers(places, spans)
    kept = fitting(answer, special, max_length)
    lost = np.setdiff1d(np.arange(len(ids)), kept)
    covered = "".join(_covered(str(rendered), places[kept], span) for span in spans)
    prompt = None if all(piece.scored for piece in rendered.pieces) else answer[kept] < 0
    return Encoded(
        ids[kept],
        special[kept],
        bool((answer[lost] >= 0).any()),
        len(zlib.compress(covered.encode("utf-8"))),
        len(covered),
        prompt,
        int((answer[lost] < 0).sum()),
    )


def placed(
    raw: Any, bare: Any, *, adds: bool
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"], Places]:
    """Returns ids, which of them the tokenizer added, and places; added ones are at -1.

    Args:
      raw: the encoding of a text, with the tokens that the tokenizer adds, if it does.
      bare: the same without them, with the places that the model saw.
      adds: whether it does.

    Raises:
      ModelError: the tokenizer adds its tokens in a way that hides where the others stand.
    """
    ids, special = np.asarray(raw.ids, np.int32), np.asarray(raw.special_tokens_mask, bool)
    if not adds:  # a mark that a template spells is none that the tokenizer added
        special = np.zeros(len(ids), bool)
    if not np.array_equal(ids[~special], np.asarray(bare.ids, np.int32)):
        raise ModelError("the tokenizer's post-processor changes tokens, so they have no places")
    places = np.full((len(ids), 2), -1)
    places[~special] = np.array(bare.offsets, np.int64).reshape(-1, 2)
    return ids, special, places


def answers(places: Places, spans: list[tuple[int, int]]) -> Int[np.ndarray, " n"]:
    """Returns the number of the span that a token lies in with all its characters; -1: in none.

    A token without characters lies in none.
    """
    found = np.full(len(places), -1)
    for number, (start, end) in enumerate(spans):
        inside = (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 0] < places[:, 1])
        found[inside] = number
    return found


def joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins spans that follow each other at once: an answer and the token that ends it."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def fitting(
    answer: Int[np.ndarray, " n"], special: Bool[np.ndarray, " n"], max_length: int
) -> Int[np.ndarray, " k"]:
    """Returns the positions of the tokens that are kept, at most `max_length`.

    Tokens are dropped from the beginning, but for those that the tokenizer adds. An earlier answer
    that would be cut into is dropped whole, with what is before it. Of the last one the beginning
    is kept: what stands behind it is dropped first, then its own end.

    Args:
      answer: number of each token's answer, -1 a prompt's.
      special: tokens that the tokenizer adds.
      max_length: tokens that fit.
    """
    own, excess = np.flatnonzero(~special), len(answer) - max_length
    if excess <= 0 or not len(own):
        return np.arange(len(answer))[:max_length]
    first, last = own[min(excess, len(own) - 1)], answer.max(initial=-1)
    if last >= 0:
        first = min(first, int(np.argmax(answer == last)))
    if answer[first] < last and answer[first] >= 0 and answer[first - 1] == answer[first]:
        first = np.flatnonzero(answer == answer[first])[-1] + 1
    kept = own[own >= first][: max(0, max_length - int(special.sum()))]
    return np.sort(np.concatenate([np.flatnonzero(special), kept]))[:max_length]


def pieces(text: str, bare: Any, encoded: Encoded) -> list[str]:
    """Cuts the part of a text that was read into what each token stands for.

    Args:
      text: the whole text.
      bare: its encoding without added tokens.
      encoded: the tokens that were kept, which follow each other.

    Returns:
      a piece for each kept token, empty for one that the tokenizer has added.

    Raises:
      DataError: the tokens are not of this text.
    """
    own, ids = encoded.ids[~encoded.special], np.asarray(bare.ids, np.int32)
    firsts = range(len(ids) - len(own) + 1)
    first = next((i for i in firsts if np.array_equal(ids[i : i + len(own)], own)), None)
    if first is None:
        raise DataError("these tokens are not those of the text: its tokenizer is another one now")
    starts = np.maximum.accumulate([0, *(start for start, _ in bare.offsets)])[1:].tolist()
    places = [*starts, len(text)][first : first + len(own) + 1]
    own_pieces = iter([text[a:b] for a, b in itertools.pairwise(places)])
    return ["" if special else next(own_pieces) for special in encoded.special]


def _covered(text: str, places: Places, span: tuple[int, int]) -> str:
    """Returns the part of a span that tokens of these places lie in."""
    start, end = span
    inside = places[(places[:, 0] >= start) & (places[:, 1] <= end)]
    return text[inside[:, 0].min() : inside[:, 1].max()] if len(inside) else ""
