"""Calls the `tokenizers` package: its errors are ours, its ids have rows, its input is bounded."""

import base64
import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from sama_jax.errors import DataError, ModelError
from sama_jax.texts.read import without_surrogates
from sama_jax.untrusted import printable

WHOLE_BYTES = 2**21
"""Bytes of a text, as the tokenizer normalises it, that are tokenised at once. The library takes
up to 400 bytes for each of them."""
STEP = 2**14
"""Characters that are normalised at once to see how long a text becomes."""
MAX_GROWTH = 1024
"""Characters that a normaliser may make of one. Unicode's own compatibility forms make 18."""
MAX_ADDED = 1024
"""Tokens that a tokenizer may add to a text."""


class TokenizerCalls:
    """Calls one tokenizer of the `tokenizers` package, with texts that it can take.

    Args:
      tokenizer: the library's own.
      where: names it in messages.
      end: ids are below it.
      rows: embedding rows of the model, if they are what bounds the ids.

    Raises:
      ModelError: its settings cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, where: str, end: int, rows: int | None):
        self._tokenizer, self._where = tokenizer, where
        self._end, self._rows = min(end, 2**31), rows
        self._growth = _growth(tokenizer, where)

    def encode_batch(self, texts: list[str], *, adds: bool = True) -> list[Any]:
        """Tokenises texts; `adds` puts the tokenizer's own tokens at their ends.

        Raises `ModelError`, also for an id without a row.
        """
        with called(f"{self._where}: the tokenizer fails"):
            raws = self._tokenizer.encode_batch(texts, add_special_tokens=adds)
        worst = max((max(raw.ids, default=-1) for raw in raws), default=-1)
        if worst >= self._end:
            what = (
                "its vocabulary has {} ids" if self._rows is None else "the embedding has {} rows"
            )
            raise ModelError(
                f"{self._where}: the tokenizer gives id {worst}, but {what.format(self._end)}; "
                "correct the ids of its post-processor and of its added tokens"
            )
        return raws

    def bare_batch(self, texts: list[str]) -> list[Any]:
        """Tokenises texts without the post-processor, and so with the places the model saw."""
        with called(f"{self._where}: the tokenizer fails"):
            return self._bare.encode_batch(texts, add_special_tokens=False)

    @functools.cached_property
    def _bare(self) -> Tokenizer:
        settings = json.loads(self._tokenizer.to_str()) | {"post_processor": None}
        made = Tokenizer.from_str(json.dumps(settings))
        made.encode_special_tokens = self._tokenizer.encode_special_tokens
        return made

    def fitting(self, text: str) -> tuple[str, int]:
        """Returns as much of a text as can be tokenised, and about the length it is given."""
        if len(text) <= STEP and self._growth <= 4:
            return text, len(text)
        with called(f"{self._where}: the tokenizer fails"):
            return _fitting(text, self._tokenizer.normalizer)

    def whole(self, text: str) -> str:
        """Returns a text as it is tokenised; raises `DataError` if it is too long for that."""
        text = without_surrogates(text)
        if len(self.fitting(text)[0]) < len(text):
            raise DataError(f"a text has more than {WHOLE_BYTES:,} bytes; split it")
        return text


def _fitting(text: str, normaliser: Any) -> tuple[str, int]:
    """Returns the beginning of a text that has at most `WHOLE_BYTES` bytes, and how many."""
    size = 0
    for start in range(0, len(text), STEP):
        piece = text[start : start + STEP]
        size += len((piece if normaliser is None else normaliser.normalize_str(piece)).encode())
        if size > WHOLE_BYTES:
            return text[:start], size
    return text, size


@contextlib.contextmanager
def called(problem: str) -> Iterator[None]:
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
    with called(f"{where}: its normaliser cannot be used"):
        found = of(json.loads(normaliser.__getstate__())) if normaliser is not None else 1
    if found > MAX_GROWTH:
        raise ModelError(
            f"{where}: its normaliser makes up to {found:,} characters of one, expected at most "
            f"{MAX_GROWTH}"
        )
    return found
