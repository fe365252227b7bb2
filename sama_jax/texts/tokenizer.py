"""Turns texts into token ids by a model folder's own tokenizer. NumPy, no devices."""

import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer

from sama_jax import gguf_header
from sama_jax.arrays import Encoded, Rendered
from sama_jax.errors import DataError, ModelError
from sama_jax.texts import folder_tokenizer, gguf_tokenizer, shared_spans, spans, tokenizer_calls
from sama_jax.texts.read import without_surrogates
from sama_jax.texts.tokenizer_calls import MAX_ADDED, TokenizerCalls, called
from sama_jax.texts.tokenizer_config import doubts, require_agreement, splits_special_tokens
from sama_jax.untrusted import read_bytes

BATCH_CHARACTERS = 2**16
"""Characters of the texts that one call tokenises, unless a single text has more."""
BATCH_TEXTS = 256
LONGEST = 65535
"""Tokens that any text is cut at."""

PROBES = (
    "",
    "The quick brown fox jumps over 13 lazy dogs. it's I'LL don't",
    "  two  spaces\tand\ttabs\n\n\nlines \r\n and trailing   ",
    "Zürich façade naïve Ångström e\u0301 \ufb01 \u212b ﷺ ½ İstanbul ß",
    "def f(x):\n    return x ** 2 + 0x1F  # https://example.org/a_b?c=%20",
    "中文字符 日本語のテキスト 한국어 العربية हिन्दी ไทย 😀👩‍👩‍👧",
    "1234567890 3.14159 1,000,000 ²³ ٣ \u00a0\u200b\ufeff\x00\x07",
    "<s> </s> <|endoftext|> <|im_start|> [MASK] [CLS] <mask> <|mdm_mask|> ▁ Ġ ##ing",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ================ ________",
)
"""Texts whose ids are part of a tokenizer's fingerprint."""


class _Given(NamedTuple):
    """A text to be tokenised."""

    text: str
    """As much of it as can be tokenised at once."""
    whole: bool
    given: str | Rendered


def _kind(given: str | Rendered) -> bool | None:
    """Tells what is tokenised in another way: plain texts, conversations with and without ends."""
    return given.adds if isinstance(given, Rendered) else None


def _adds(given: str | Rendered) -> bool:
    """Tells whether the tokenizer adds its own tokens, as it does to all plain texts."""
    return given.adds if isinstance(given, Rendered) else True


class TextTokenizer:
    """Turns texts into ids by a model folder's tokenizer; nothing it has set loses or draws tokens.

    Cutting keeps the tokens that the tokenizer adds at both ends, as `transformers` does.

    Args:
      tokenizer: the library's own; its truncation, padding and sampling are switched off.
      where: names it in messages.
      rows: embedding rows of the model. None: its ids are checked against its vocabulary alone.

    Raises:
      ModelError: it can give an id without a row, or its settings cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, where: str, rows: int | None = None):
        # Settings stored in tokenizer.json would cut, pad or draw tokens behind our back.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for name in ("dropout", "alpha", "nbest_size"):
            if hasattr(tokenizer.model, name):
                setattr(tokenizer.model, name, None)
        self._tokenizer, self.where = tokenizer, where
        self._folder: Path | None = None
        if rows is not None and self.max_id >= rows:
            raise ModelError(
                f"{where}: the tokenizer's largest id is {self.max_id}, but the embedding has "
                f"{rows} rows; is it another model's tokenizer?"
            )
        self._calls = TokenizerCalls(
            tokenizer, where, self.max_id + 1 if rows is None else rows, rows
        )
        if self.added > MAX_ADDED:
            raise ModelError(
                f"{where}: adds {self.added} tokens to a text, expected at most {MAX_ADDED}"
            )

    @classmethod
    def from_folder(cls, path: Path, rows: int | None) -> "TextTokenizer":
        """Reads `tokenizer.json`, else what `transformers` makes of the folder's files.

        `path` may be a GGUF file, or a folder with one, whose metadata count where there is no
        `tokenizer.json`. Code in the folder is never run. Raises `ModelError`, also where the files
        beside `tokenizer.json` say that other ids come out.
        """
        file, gguf = path / "tokenizer.json", gguf_header.find(path)
        header = None if gguf is None else gguf_header.read_header(gguf)
        if file.is_file():
            read = cls.from_file(file, rows)
            with called(f"{path}: cannot compare the tokenizer with the files beside it"):
                require_agreement(read._tokenizer, path)
                if header is not None:
                    gguf_tokenizer.require_agreement(header, read._tokenizer)
            read._folder = path
            read._tokenizer.encode_special_tokens = splits_special_tokens(path)
            return read
        if header is not None:
            with called(f"{header.path}: its tokenizer cannot be used"):
                return cls(gguf_tokenizer.build(header), str(header.path), rows)
        hint = "expected tokenizer.json or files that transformers reads without remote code"
        with called(f"{path}: no usable tokenizer; {hint}"):
            _require_regular(path)
            return cls(folder_tokenizer.build(path), str(path), rows)

    @classmethod
    def from_file(cls, path: Path, rows: int | None) -> "TextTokenizer":
        """Reads one `tokenizer.json`. Raises `ModelError`."""
        with called(f"{path}: not a usable tokenizer file"):
            return cls(Tokenizer.from_buffer(read_bytes(path)), str(path), rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of all that can change an id: settings, and the ids of `PROBES`.

        The ids show what the settings, as they are written, leave out.
        """
        found: list[Any] = [self._tokenizer.to_str()]
        if self._tokenizer.encode_special_tokens:  # not written, and the probes spell few of them
            found.append("special tokens are split")
        for text in PROBES:
            try:
                (raw,) = self._calls.encode_batch([text])
                found.append([raw.ids, raw.special_tokens_mask])
            except ModelError:  # a text of the run that has no ids says so itself
                found.append(None)
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @functools.cached_property
    def max_id(self) -> int:
        """Returns the largest id of the vocabulary, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def token_id(self, name: str) -> int | None:
        """Returns the id of a token by its exact name, None if there is none."""
        return self._tokenizer.token_to_id(without_surrogates(name))

    @functools.cached_property
    def ordinary_ids(self) -> list[int]:
        """Returns the ids of the vocabulary, in order, without those of added tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        return sorted(set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - set(added))

    @property
    def added_tokens(self) -> list[str]:
        """Returns the names of the tokens that were added to the vocabulary."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    @functools.cached_property
    def added(self) -> int:
        """Returns the number of tokens that are added to any text."""
        return len(self._calls.encode_batch([""])[0].ids)

    def starts(self, text: str) -> list[int]:
        """Returns the character at which each of a text's own tokens begins, ascending.

        Raises `DataError` if the text is too long to be tokenised at once.
        """
        (bare,) = self._calls.bare_batch([self._calls.whole(text)])
        return np.maximum.accumulate([0, *(start for start, _ in bare.offsets)])[1:].tolist()

    def tokens(self, text: str) -> shared_spans.Tokens:
        """Tokenises a text, uncut, with the place of each token. Raises `DataError`, `ModelError`.

        Places are those before the post-processor, see `_bare_batch`.
        """
        text = self._calls.whole(text)
        (raw,), (bare,) = self._calls.encode_batch([text]), self._calls.bare_batch([text])
        ids, special, places = spans.placed(raw, bare, adds=True)
        made = shared_spans.Tokens(ids, special, places, tuple(raw.tokens))
        if special.sum() != made.added:
            raise ModelError(f"{self.where}: adds tokens inside a text, which then has no spans")
        return made

    def pieces(self, text: str | Rendered, encoded: Encoded) -> list[str]:
        """Returns the part of a text that each of its tokens stands for; added ones have none.

        Joined they are the part that was read. Of tokens that share a character, the last has it.

        Raises:
          DataError: the tokens are not those of this text, or it is too long.
        """
        whole = self._calls.whole(str(text))
        (bare,) = self._calls.bare_batch([whole])
        return spans.pieces(whole, bare, encoded)

    def doubts(self, encoded: Sequence[Encoded]) -> list[str]:
        """Says why a training may have read other tokens of these texts, for a note in the run."""
        if self._folder is None:
            return []
        cut = any(one.truncated for one in encoded)
        with called(f"{self.where}: cannot compare the tokenizer with the files beside it"):
            return doubts(self._tokenizer, self._folder, cut=cut)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Spells the tokens of each row; special tokens are left out. Raises `ModelError`."""
        with called(f"{self.where}: the tokenizer fails"):
            return self._tokenizer.decode_batch(rows)

    def encode(
        self,
        texts: Sequence[str | Rendered],
        max_length: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Encoded]:
        """Tokenizes each text, special tokens included, to at most `max_length` tokens.

        A conversation is tokenised as the one text that it is; how it is cut and which tokens are
        its answers' says `sama_jax.texts.spans`. Lone surrogates, which no UTF-8 text holds but
        JSON can spell, become U+FFFD. `progress` is told the number of texts done, now and then.

        Raises:
          DataError: a text is too long to be tokenised.
          ModelError: the tokenizer fails, or gives an id that has no row.
        """
        encoded: list[Encoded] = []
        for batch in _batches(texts, self._calls.fitting):
            raws = self._calls.encode_batch([one.text for one in batch], adds=_adds(batch[0].given))
            for (text, whole, given), raw, marks in zip(batch, raws, self._bare_batch(batch)):
                if isinstance(given, Rendered):
                    found = spans.marked(given, raw, marks, max_length) if whole else None
                else:
                    found = _cut(text, raw, max_length, whole)
                if found is None:
                    most = tokenizer_calls.WHOLE_BYTES
                    raise DataError(
                        f"text {len(encoded) + 1} of {len(texts)} is too long to be tokenised to "
                        f"{max_length:,} tokens: expected at most {most:,} bytes; split it"
                    )
                encoded.append(found)
            if progress:
                progress(len(batch))
        return encoded

    def _bare_batch(self, batch: list[_Given]) -> list[Any]:
        """Tokenises conversations without the post-processor; of plain texts there is nothing.

        That of byte-level models takes the space before a word out of its token's place, though it
        is one of the token's characters.
        """
        if not isinstance(batch[0].given, Rendered):
            return [None] * len(batch)
        return self._calls.bare_batch([one.text for one in batch])


def _require_regular(path: Path) -> None:
    """Raises `ValueError` for a named pipe: whoever opens one waits for a writer, for ever."""
    for entry in path.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise ValueError(f"{entry.name} is no regular file")


def _batches(
    texts: Sequence[str | Rendered], fitting: Callable[[str], tuple[str, int]]
) -> Iterator[list[_Given]]:
    """Yields texts of one kind to be tokenised together; `fitting` says how much of each can be."""
    batch, characters = list[_Given](), 0
    for given in texts:
        text = without_surrogates(str(given))
        part, size = fitting(text)
        full = characters + size > BATCH_CHARACTERS or len(batch) == BATCH_TEXTS
        if batch and (full or _kind(batch[0].given) != _kind(given)):
            yield batch
            batch, characters = [], 0
        batch.append(_Given(part, len(part) == len(text), given))
        characters += size
    if batch:
        yield batch


def _cut(text: str, raw: Any, max_length: int, whole: bool) -> Encoded | None:
    """Makes the tokens of a text of what the library gave; None if they may be others.

    They may where only the beginning of the text was tokenised and the tokens reach into the last
    eighth of it, which could be other ones before the rest of the text.
    """
    ids = np.asarray(raw.ids, np.int32)
    special = np.asarray(raw.special_tokens_mask, bool)
    truncated = len(ids) > max_length or not whole
    covered = text
    if truncated:
        added = min(_added_end(special), max_length)
        kept = np.r_[: min(max_length, len(ids)) - added, len(ids) - added : len(ids)]
        ids, special = ids[kept], special[kept]
        offsets = raw.offsets  # a new list at every access
        covered = text[: max((offsets[i][1] for i in kept), default=0)]
        if not whole and 8 * len(covered) >= 7 * len(text):
            return None
    zlib_bytes = len(zlib.compress(covered.encode("utf-8")))
    return Encoded(ids, special, truncated, zlib_bytes, len(covered))


def _added_end(special: Bool[np.ndarray, " n"]) -> int:
    """Counts the added tokens at the end of a text."""
    return len(special) if special.all() else int(np.argmin(special[::-1]))
