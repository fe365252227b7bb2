"""Holds the texts of a run as columns: one table a view, one row a text."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, UInt32

from sama_jax import rng
from sama_jax.arrays import Encoded, SharedTokens, TextKeyData
from sama_jax.attacks.queries import ViewText
from sama_jax.config import AuditSettings
from sama_jax.errors import DataError, UsageError

MOST_TOKENS = 65535
"""Tokens of a text at most: the loss store keeps positions as uint16."""

Ragged = tuple[np.ndarray, ...]
"""A column of arrays [n] of different lengths, one a row."""


class TextView(NamedTuple):
    """One text under one view: what its randomness and its place in the store derive from."""

    key: TextKeyData
    """Draws the plans."""
    maskable: Bool[np.ndarray, " n"]
    zlib_bytes: int
    """Bytes of the zlib-compressed original text."""
    characters: int
    """Characters of the original text."""
    store_key: str
    """Names the text in the loss store."""
    ids: Int[np.ndarray, " n"]
    before: Int[np.ndarray, " p"]
    """Visible tokens that stand before the text and are never masked."""
    shared: SharedTokens | None = None
    """The reference's own tokens, and the spans that both models' tokens make up: these are what
    is masked and scored then. None: every token is one."""


def original_view(encoded: Encoded, settings: AuditSettings, *, shift: bool) -> TextView:
    """Makes the view that is the text itself."""
    maskable = _maskable(encoded.special, encoded.prompt, settings, shift=shift)
    key = rng.text_key_data(encoded.ids)
    name = rng.key_name(key) + _mask_suffix(maskable)
    sizes = encoded.zlib_bytes, encoded.characters
    return TextView(key, maskable, *sizes, name, encoded.ids, np.zeros(0, np.int32))


def visible_length(view: TextView, settings: AuditSettings, room: int) -> int:
    """Returns the length to which visible padding fills up a text: a function of it alone.

    It changes numbers, so it must not depend on the other texts. What stands behind a prefix has
    the length of the longest prefix and text, within the `room` of the models' context.

    Raises:
      UsageError: the text is longer, as only a view of an attack's own can be.
    """
    whole, tokens = settings.pad_to or settings.max_length, len(view.maskable) + len(view.before)
    if not len(view.before) and tokens <= whole:
        return whole
    longest = max(whole, min(settings.max_length + settings.prefix.tokens, room))
    if tokens > longest:
        raise UsageError(
            f"a view has {tokens} tokens, and visible padding fills up to {longest}; raise --pad-to"
            " (within the models' context), or use --padding hidden"
        )
    return longest


def derived_view(
    made: ViewText, original: TextView, settings: AuditSettings, *, shift: bool, room: int
) -> TextView:
    """Makes another view of the text of `original` from what a `View` has made of it.

    Args:
      made: the tokens.
      original: the text's own view.
      settings: of the audit.
      shift: whether the models read the output before a token.
      room: tokens that fit into the context of both models.
    """
    special = np.zeros(len(made.ids), bool) if made.special is None else made.special
    maskable = _maskable(special, made.prompt, settings, shift=shift)
    if made.same_masks and len(maskable) == len(original.maskable):
        maskable = original.maskable
        if made.prompt is not None:
            maskable = maskable & ~made.prompt
    own = rng.text_key_data(made.ids)
    key = original.key if made.same_masks else own
    name = rng.key_name(own) + _mask_suffix(maskable) + _span_suffix(made.ids, made.shared)
    if key != own:
        name += "~" + rng.key_name(key)
    before = np.zeros(0, np.int32) if made.before is None else made.before
    if len(before):
        name += "+" + hashlib.sha256(before.astype("<i4").tobytes()).hexdigest()[:16]
    sizes = original.zlib_bytes, original.characters
    view = TextView(key, maskable, *sizes, name, made.ids, before, made.shared)
    if settings.padding == "visible":
        length = visible_length(view, settings, room)
        if length != (settings.pad_to or settings.max_length):  # that one is in the model's key
            view = view._replace(store_key=f"{name}<{length}")
    return view


def _mask_suffix(maskable: Bool[np.ndarray, " n"]) -> str:
    """Names what may be masked, unless that is everything."""
    return "" if maskable.all() else "-" + hashlib.sha256(maskable.tobytes()).hexdigest()[:8]


def _span_suffix(ids: Int[np.ndarray, " n"], shared: SharedTokens | None) -> str:
    """Names spans and the reference's tokens, unless they are the target's, each a span."""
    if shared is None:
        return ""
    same, each = np.array_equal(ids, shared.reference_ids), np.arange(len(ids))
    if same and all(np.array_equal(spans, each) for spans in (shared.target, shared.reference)):
        return ""
    sizes = np.array([len(shared.target), len(shared.reference)])
    whole = np.concatenate([sizes, shared.target, shared.reference, shared.reference_ids])
    return "/" + hashlib.sha256(whole.astype("<i4").tobytes()).hexdigest()[:16]


def _maskable(
    special: Bool[np.ndarray, " n"],
    prompt: Bool[np.ndarray, " n"] | None,
    settings: AuditSettings,
    *,
    shift: bool,
) -> Bool[np.ndarray, " n"]:
    maskable = np.ones(len(special), bool) if prompt is None else ~prompt
    if settings.sama.exclude_special:
        maskable &= ~special
    if settings.sama.exclude_position0_when_shifted and shift:
        maskable[:1] = False
    if not (maskable & ~special).any():  # a text of none but the tokenizer's own tokens is empty
        maskable[:] = False
    return maskable


@dataclass(frozen=True, eq=False)
class TextTable:
    """One view of the texts of a run, as columns. A text that has no such view is an empty row.

    Nothing in it changes, so what derives from all rows is computed once: each batch asks for it.
    """

    exists: Bool[np.ndarray, " n"]
    high: UInt32[np.ndarray, " n"]
    """With `low`, the key that draws a text's plans."""
    low: UInt32[np.ndarray, " n"]
    num_tokens: Int32[np.ndarray, " n"]
    """Tokens that may be masked."""
    zlib_bytes: Int32[np.ndarray, " n"]
    characters: Int32[np.ndarray, " n"]
    store_keys: tuple[str, ...]
    maskable: Ragged
    """bool, one value a token."""
    ids: Ragged
    """int32; empty where only the store is read, which needs no tokens."""
    before: Ragged
    """int32, visible tokens before the text."""
    shared: tuple[SharedTokens | None, ...]
    """The reference's own tokens, one a row."""

    @property
    def num_texts(self) -> int:
        """Rows."""
        return len(self.store_keys)

    @functools.cached_property
    def readable(self) -> Bool[np.ndarray, " n"]:
        """Tells which rows have a token that can be masked."""
        return self.exists & (self.num_tokens > 0)

    @functools.cached_property
    def lengths(self) -> Int32[np.ndarray, " n"]:
        """Tokens of a forward pass: the text and what stands before it.

        Of a text that the models have different tokens of, those of the longer reading.
        """
        texts = [
            len(maskable) if shared is None else max(len(shared.target), len(shared.reference))
            for maskable, shared in zip(self.maskable, self.shared)
        ]
        return np.array([n + len(b) for n, b in zip(texts, self.before)], np.int32).reshape(-1)

    @functools.cached_property
    def widest(self) -> int:
        """Tokens of the longest span of any text, by either model; 1 where tokens are scored."""
        spans = [one.of(role) for one in self.shared if one for role in ("target", "reference")]
        return max((int(np.bincount(s[s >= 0]).max(initial=1)) for s in spans), default=1)

    def span_tokens(self, role: str) -> Float64[np.ndarray, " n"]:
        """Returns how many tokens of a model a scored span of each text has on average."""
        counts = [1.0 if one is None else _tokens_a_span(one.of(role)) for one in self.shared]
        return np.array(counts, np.float64).reshape(-1)

    def tokens(self, role: str) -> Ragged:
        """Returns the token ids that a model reads: int32, one array a row."""
        if role == "target":
            return self.ids
        return tuple(ids if s is None else s.reference_ids for ids, s in zip(self.ids, self.shared))

    @functools.cached_property
    def offsets(self) -> Int32[np.ndarray, " n"]:
        """Position in a forward pass at which the text begins."""
        return np.array([len(b) for b in self.before], np.int32).reshape(-1)

    def take(self, rows: Sequence[int] | Int[np.ndarray, " b"]) -> "TextTable":
        """Returns the table of these rows; -1 gives an empty one."""
        return table_of([self.row(int(r)) if r >= 0 else None for r in rows])

    def row(self, row: int) -> TextView | None:
        """Returns one text, or None where it has no such view."""
        if not self.exists[row]:
            return None
        key = TextKeyData(self.high[row], self.low[row])
        sizes = int(self.zlib_bytes[row]), int(self.characters[row])
        ragged = self.ids[row], self.before[row], self.shared[row]
        return TextView(key, self.maskable[row], *sizes, self.store_keys[row], *ragged)


def _tokens_a_span(spans: Int[np.ndarray, " n"]) -> float:
    used = spans[spans >= 0]
    return len(used) / len(np.unique(used)) if len(used) else 1.0


def table_of(views: Sequence[TextView | None]) -> TextTable:
    """Makes the columns of a sequence of texts; None is a text that has no such view."""
    rows = [_NOTHING if view is None else view for view in views]
    keys = np.array([view.key for view in rows], np.uint32).reshape(-1, 2)
    counts = [int(view.maskable.sum()) for view in rows]
    return TextTable(
        np.array([view is not None for view in views], bool),
        keys[:, 0],
        keys[:, 1],
        np.array(counts, np.int32),
        np.array([view.zlib_bytes for view in rows], np.int32),
        np.array([view.characters for view in rows], np.int32),
        tuple(view.store_key for view in rows),
        tuple(view.maskable for view in rows),
        tuple(view.ids for view in rows),
        tuple(view.before for view in rows),
        tuple(view.shared for view in rows),
    )


def padded(column: Ragged, length: int, dtype: type[np.generic]) -> np.ndarray:
    """Makes an array [rows, length] of a ragged column, filled with zeros (False)."""
    out = np.zeros((len(column), length), dtype)
    for row, values in enumerate(column):
        out[row, : len(values)] = values
    return out


_NO_TOKENS = np.zeros(0, np.int32)
_NO_KEY = TextKeyData(np.uint32(0), np.uint32(0))
_NOTHING = TextView(_NO_KEY, np.zeros(0, bool), 0, 0, "", _NO_TOKENS, _NO_TOKENS)


# --- as the index of a run keeps it --------------------------------------------------------------


def described(table: TextTable) -> list[dict[str, Any] | None]:
    """Describes each text of a view in plain values, enough to draw its plans again."""
    return [
        view
        and {
            "key": rng.key_name(view.key),
            "store_key": view.store_key,
            "tokens": len(view.maskable),
            "not_masked": np.flatnonzero(~view.maskable).tolist(),
            "zlib_bytes": view.zlib_bytes,
            "characters": view.characters,
        }
        for view in map(table.row, range(table.num_texts))
    ]


def table_from_description(found: Sequence[dict[str, Any] | None], where: str) -> TextTable:
    """Makes the table of what `described` gave; it holds no tokens.

    Raises:
      DataError: `where`, the path of the index, holds something else.
    """
    try:
        return table_of([_view_from_description(row) if row else None for row in found])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: not the index of an audit ({error}); copy it again, or run the audit's own "
            "command again, which makes it anew"
        ) from None


def _view_from_description(found: dict[str, Any]) -> TextView:
    if not 0 <= found["tokens"] <= MOST_TOKENS or len(found["key"]) != 16:
        raise ValueError(f"tokens {found['tokens']}, key of {len(found['key'])} digits")
    maskable = np.ones(found["tokens"], bool)
    maskable[found["not_masked"]] = False
    high, low = int(found["key"][:8], 16), int(found["key"][8:], 16)
    key = TextKeyData(np.uint32(high), np.uint32(low))
    sizes = found["zlib_bytes"], found["characters"]
    return TextView(key, maskable, *sizes, found["store_key"], _NO_TOKENS, _NO_TOKENS)
