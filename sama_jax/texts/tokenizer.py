"""Turns texts into token ids by a model folder's own tokenizer. NumPy, no devices."""

import base64
import contextlib
import functools
import hashlib
import json
import math
import os
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
from sama_jax.texts import folder_tokenizer, gguf_tokenizer, shared_spans, spans
from sama_jax.texts.read import without_surrogates
from sama_jax.texts.tokenizer_config import doubts, require_agreement, splits_special_tokens
from sama_jax.untrusted import printable, read_bytes

WHOLE_BYTES = 2**21
"""Bytes of a text, as the tokenizer normalises it, that are tokenised at once. The library takes
up to 400 bytes for each of them."""
BATCH_CHARACTERS = 2**16
"""Characters of the texts that one call tokenises, unless a single text has more."""
BATCH_TEXTS = 256
STEP = 2**14
"""Characters that are normalised at once to see how long a text becomes."""
MAX_GROWTH = 1024
"""Characters that a normaliser may make of one. Unicode's own compatibility forms make 18."""
MAX_ADDED = 1024
"""Tokens that a tokenizer may add to a text."""
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
        self._tokenizer, self.where, self._rows = tokenizer, where, rows
        self._folder: Path | None = None
        if rows is not None and self.max_id >= rows:
            raise ModelError(
                f"{where}: the tokenizer's largest id is {self.max_id}, but the embedding has "
                f"{rows} rows; is it another model's tokenizer?"
            )
        self._growth = _growth(tokenizer, where)
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
            with _library(f"{path}: cannot compare the tokenizer with the files beside it"):
                require_agreement(read._tokenizer, path)
                if header is not None:
                    gguf_tokenizer.require_agreement(header, read._tokenizer)
            read._folder = path
            read._tokenizer.encode_special_tokens = splits_special_tokens(path)
            return read
        if header is not None:
            with _library(f"{header.path}: its tokenizer cannot be used"):
                return cls(gguf_tokenizer.build(header), str(header.path), rows)
        hint = "expected tokenizer.json or files that transformers reads without remote code"
        with _library(f"{path}: no usable tokenizer; {hint}"):
            _require_regular(path)
            return cls(folder_tokenizer.build(path), str(path), rows)

    @classmethod
    def from_file(cls, path: Path, rows: int | None) -> "TextTokenizer":
        """Reads one `tokenizer.json`. Raises `ModelError`."""
        with _library(f"{path}: not a usable tokenizer file"):
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
                (raw,) = self._encode_batch([text])
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
        return len(self._encode_batch([""])[0].ids)

    def starts(self, text: str) -> list[int]:
        """Returns the character at which each of a text's own tokens begins, ascending.

        Raises `DataError` if the text is too long to be tokenised at once.
        """
        with _library(f"{self.where}: the tokenizer fails"):
            offsets = self._bare.encode(self._whole(text), add_special_tokens=False).offsets
        return np.maximum.accumulate([0, *(start for start, _ in offsets)])[1:].tolist()

    def tokens(self, text: str) -> shared_spans.Tokens:
        """Tokenises a text, uncut, with the place of each token. Raises `DataError`, `ModelError`.

        Places are those before the post-processor, see `_bare_batch`.
        """
        text = self._whole(text)
        (raw,) = self._encode_batch([text])
        with _library(f"{self.where}: the tokenizer fails"):
            bare = self._bare.encode(text, add_special_tokens=False)
        ids, special, places = spans.placed(raw, bare, adds=True)
        made = shared_spans.Tokens(ids, special, places, tuple(raw.tokens))
        if special.sum() != made.added:
            raise ModelError(f"{self.where}: adds tokens inside a text, which then has no spans")
        return made

    def _whole(self, text: str) -> str:
        """Returns a text as it is tokenised; raises `DataError` if it is too long for that."""
        text = without_surrogates(text)
        if len(self._fitting(text)[0]) < len(text):
            raise DataError(f"a text has more than {WHOLE_BYTES:,} bytes; split it")
        return text

    def pieces(self, text: str | Rendered, encoded: Encoded) -> list[str]:
        """Returns the part of a text that each of its tokens stands for; added ones have none.

        Joined they are the part that was read. Of tokens that share a character, the last has it.

        Raises:
          DataError: the tokens are not those of this text, or it is too long.
        """
        whole = without_surrogates(str(text))
        if len(self._fitting(whole)[0]) < len(whole):
            raise DataError(f"a text has more than {WHOLE_BYTES:,} bytes; split it")
        with _library(f"{self.where}: the tokenizer fails"):
            found = self._bare.encode(whole, add_special_tokens=False)
        return spans.pieces(whole, found, encoded)

    def doubts(self, encoded: Sequence[Encoded]) -> list[str]:
        """Says why a training may have read other tokens of these texts, for a note in the run."""
        if self._folder is None:
            return []
        cut = any(one.truncated for one in encoded)
        with _library(f"{self.where}: cannot compare the tokenizer with the files beside it"):
            return doubts(self._tokenizer, self._folder, cut=cut)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Spells the tokens of each row; special tokens are left out. Raises `ModelError`."""
        with _library(f"{self.where}: the tokenizer fails"):
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
        for batch in _batches(texts, self._fitting):
            raws = self._encode_batch([one.text for one in batch], adds=_adds(batch[0].given))
            for (text, whole, given), raw, marks in zip(batch, raws, self._bare_batch(batch)):
                if isinstance(given, Rendered):
                    found = spans.marked(given, raw, marks, max_length) if whole else None
                else:
                    found = _cut(text, raw, max_length, whole)
                if found is None:
                    raise DataError(
                        f"text {len(encoded) + 1} of {len(texts)} is too long to be tokenised to "
                        f"{max_length:,} tokens: expected at most {WHOLE_BYTES:,} bytes; split it"
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
        with _library(f"{self.where}: the tokenizer fails"):
            return self._bare.encode_batch([one.text for one in batch], add_special_tokens=False)

    @functools.cached_property
    def _bare(self) -> Tokenizer:
        with _library(f"{self.where}: the tokenizer fails"):
            return _without_post_processor(self._tokenizer)

    def _fitting(self, text: str) -> tuple[str, int]:
        """Returns as much of a text as can be tokenised, and about the length it is given."""
        if len(text) <= STEP and self._growth <= 4:
            return text, len(text)
        with _library(f"{self.where}: the tokenizer fails"):
            return _fitting(text, self._tokenizer.normalizer)

    def _encode_batch(self, texts: list[str], *, adds: bool = True) -> list[Any]:
        """Calls the library; every id that leaves it is checked here."""
        with _library(f"{self.where}: the tokenizer fails"):
            raws = self._tokenizer.encode_batch(texts, add_special_tokens=adds)
        end, what = self._rows, "the embedding has {} rows"
        if end is None:
            end, what = min(self.max_id + 1, 2**31), "its vocabulary has {} ids"
        worst = max((max(raw.ids, default=-1) for raw in raws), default=-1)
        if worst >= end:
            raise ModelError(
                f"{self.where}: the tokenizer gives id {worst}, but {what.format(end)}; correct "
                "the ids of its post-processor and of its added tokens"
            )
        return raws


def _fitting(text: str, normaliser: Any) -> tuple[str, int]:
    """Returns the beginning of a text that has at most `WHOLE_BYTES` bytes, and how many."""
    size = 0
    for start in range(0, len(text), STEP):
        piece = text[start : start + STEP]
        size += len((piece if normaliser is None else normaliser.normalize_str(piece)).encode())
        if size > WHOLE_BYTES:
            return text[:start], size
    return text, size


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


def _without_post_processor(tokenizer: Tokenizer) -> Tokenizer:
    """Copies a tokenizer, but for what it does to tokens once they are made."""
    settings = json.loads(tokenizer.to_str()) | {"post_processor": None}
    made = Tokenizer.from_str(json.dumps(settings))
    made.encode_special_tokens = tokenizer.encode_special_tokens
    return made


@contextlib.contextmanager
def _library(problem: str) -> Iterator[None]:
    """Runs calls of the tokenizer library, and makes whatever they raise a `ModelError`.

    A panic of its Rust code is a `BaseException`, and is told on standard error with pieces of the
    text: what arrives there meanwhile is held back, and dropped if the call panics.
    """
    panicked, stderr = False, os.dup(2)
    reading, writing = os.pipe()
    # Full after 64 KiB: what comes then is lost, but nobody waits for a reader.
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    os.dup2(writing, 2)
    try:
        yield
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"
        if isinstance(error, (MemoryError, ModelError)) or not (
            panicked or isinstance(error, Exception)
        ):
            raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(f"{problem} ({printable(reason, 200)})") from None
    finally:
        os.dup2(stderr, 2)
        with contextlib.suppress(BlockingIOError):  # nothing was said
            said = os.read(reading, 2**16)
            if not panicked:
                os.write(2, said)
        for end in (stderr, reading, writing):
            os.close(end)


def _growth(tokenizer: Tokenizer, where: str) -> int:
    """Returns how many characters a tokenizer's own settings can make of one.

    Raises `ModelError` if that is absurd, or if its model has settings that are.
    """
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        length = len(getattr(tokenizer.model, name, None) or "")
        if length > 256:  # it is copied for every unknown word
            raise ModelError(f"{where}: {name} has {length} characters, expected at most 256")
    characters = getattr(tokenizer.model, "max_input_chars_per_word", 0)
    if characters > 1000:  # the time for a word is its length cubed
        raise ModelError(
            f"{where}: max_input_chars_per_word is {characters}, expected at most 1000"
        )

    def of(part: Any) -> int:
        if not isinstance(part, dict):
            return 1
        found = math.prod(map(of, part.get("normalizers", [])))
        # An empty match, too, is replaced: there is one between all characters.
        found *= 1 + len(part.get("content", "")) + len(part.get("prepend", ""))
        if part.get("type") == "Precompiled":
            charsmap = base64.b64decode(part["precompiled_charsmap"])
            replacements = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
            found *= max(map(len, replacements.decode(errors="replace").split("\0")))
        return found

    normaliser = tokenizer.normalizer
    with _library(f"{where}: its normaliser cannot be used"):
        found = of(json.loads(normaliser.__getstate__())) if normaliser is not None else 1
    if found > MAX_GROWTH:
        raise ModelError(
            f"{where}: its normaliser makes up to {found:,} characters of one, expected at most "
            f"{MAX_GROWTH}"
        )
    return found


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
