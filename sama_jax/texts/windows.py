"""Cuts documents that are longer than a model reads into windows, each a text of its own."""

from collections.abc import Sequence

from sama_jax.errors import DataError, UsageError
from sama_jax.texts.read import Text
from sama_jax.texts.tokenizer import TextTokenizer

LEAST = 16
"""Tokens; a shorter rest of a document is left out: its score would be luck."""


def windows_of(
    texts: Sequence[Text], tokenizer: TextTokenizer, length: int, stride: int
) -> list[Text]:
    """Cuts each document into windows of `length` tokens, one every `stride` tokens.

    A window is a piece of the document's text, and is read as any other text, so the same piece in
    a file of its own has the same score. A document of one window is that window.

    Raises:
      UsageError: `stride` is larger than `length`, or the texts are conversations.
      DataError: a window has the id of another text.
    """
    if not 1 <= stride <= length:
        raise UsageError(f"--stride {stride}: expected 1 to {length}, or tokens would be left out")
    found: list[Text] = []
    for text in texts:
        if text.rendered is not None:
            raise UsageError("--windows are for plain texts; leave out --template, or --windows")
        pieces = _pieces(text.text, tokenizer, length, stride)
        for number, piece in enumerate(pieces, 1):
            name = text.id if len(pieces) == 1 else f"{text.id} [{number}]"
            own = f"document {text.id}" if text.group is None else text.group
            found.append(text._replace(id=name, text=piece, group=own, document=text.id))
    ids = [text.id for text in found]
    if len(set(ids)) < len(ids):
        raise DataError("--windows: a text has the id of another one's window; give other ids")
    return found


def _pieces(text: str, tokenizer: TextTokenizer, length: int, stride: int) -> list[str]:
    """Cuts one document; every piece has at most `length` tokens when it is read by itself."""
    starts = tokenizer.starts(text)
    if len(starts) + tokenizer.added <= length:
        return [text]
    room, places = max(1, length - tokenizer.added), [0, *starts[1:], len(text)]
    pieces, first, last = list[str](), 0, 0
    while last < len(starts):
        last = min(first + room, len(starts))
        piece, count = _piece(text, tokenizer, places[first : last + 1])
        while count > room and last > first + 1:  # it had fewer tokens inside the document
            last = max(first + 1, last - (count - room))
            piece, count = _piece(text, tokenizer, places[first : last + 1])
        if count >= LEAST or not pieces:
            pieces.append(piece)
        first = min(first + stride, last)
    return pieces


def _piece(text: str, tokenizer: TextTokenizer, places: list[int]) -> tuple[str, int]:
    """Returns the piece between the first and the last of some places, and its tokens."""
    piece = text[places[0] : places[-1]]
    return piece, len(tokenizer.starts(piece))
