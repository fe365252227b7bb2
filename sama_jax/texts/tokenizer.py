"""Turns texts into token ids by a model folder's own tokenizer. NumPy, no devices."""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer

from sama_jax.arrays import Encoded
from sama_jax.errors import ModelError
from sama_jax.texts.read import Text

_SURROGATES = re.compile("[\ud800-\udfff]")


class TextTokenizer:
    """A model folder's tokenizer: text in, ids out, without padding or a truncation of its own.

    Cutting keeps the tokens that the tokenizer adds at both ends, as `transformers` does.
    """

    def __init__(self, tokenizer: Tokenizer, where: str):
        # Settings stored in tokenizer.json would cut or pad texts behind our back.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.where = where

    @classmethod
    def from_folder(cls, path: Path) -> "TextTokenizer":
        """Reads `tokenizer.json`, else what `transformers` makes of the folder's files.

        Raises `ModelError`. Code in the folder is never run.
        """
        if (path / "tokenizer.json").is_file():
            return cls.from_file(path / "tokenizer.json")
        hint = "expected tokenizer.json or files that transformers reads without remote code"
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging as hf_logging

            level = hf_logging.get_verbosity()
            hf_logging.set_verbosity(50)  # it comments on model types it does not know
            try:
                slow = AutoTokenizer.from_pretrained(
                    str(path), trust_remote_code=False, local_files_only=True
                )
            finally:
                hf_logging.set_verbosity(level)
            backend = slow.backend_tokenizer
        except Exception as error:  # whatever a folder's files can provoke in there
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ModelError(f"{path}: no usable tokenizer; {hint} ({reason})") from None
        return cls(Tokenizer.from_str(backend.to_str()), str(path))

    @classmethod
    def from_file(cls, path: Path) -> "TextTokenizer":
        """Reads one `tokenizer.json`. Raises `ModelError`."""
        try:
            return cls(Tokenizer.from_file(str(path)), str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ModelError(f"{path}: not a usable tokenizer file ({error})") from None

    @property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of the tokenizer's settings; equal ones give equal ids."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    @property
    def max_id(self) -> int:
        """Returns the largest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def token_id(self, name: str) -> int | None:
        """Returns the id of a token by its exact name, None if there is none."""
        return self._tokenizer.token_to_id(name)

    def encode(
        self,
        texts: Sequence[str],
        max_length: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Encoded]:
        """Tokenizes each text, special tokens included, to at most `max_length` tokens.

        Lone surrogates, which no UTF-8 text holds but JSON can spell, become U+FFFD. `progress` is
        told the number of texts done, now and then.
        """
        encoded: list[Encoded] = []
        for start in range(0, len(texts), 256):
            clean = [_SURROGATES.sub("\ufffd", t) for t in texts[start : start + 256]]
            raws = self._tokenizer.encode_batch(clean, add_special_tokens=True)
            encoded += [_cut(text, raw, max_length) for text, raw in zip(clean, raws)]
            if progress:
                progress(len(clean))
        return encoded


def _cut(text: str, raw: Any, max_length: int) -> Encoded:
    ids = np.asarray(raw.ids, np.int32)
    special = np.asarray(raw.special_tokens_mask, bool)
    truncated = len(ids) > max_length
    covered = text
    if truncated:
        added = min(_added_end(special), max_length)
        kept = np.r_[: max_length - added, len(ids) - added : len(ids)]
        ids, special = ids[kept], special[kept]
        offsets = raw.offsets  # a new list at every access
        covered = text[: max((offsets[i][1] for i in kept), default=0)]
    zlib_bytes = len(zlib.compress(covered.encode("utf-8")))
    return Encoded(ids, special, truncated, zlib_bytes, len(covered))


def _added_end(special: Bool[np.ndarray, " n"]) -> int:
    """Counts the added tokens at the end of a text."""
    return len(special) if special.all() else int(np.argmin(special[::-1]))


def require_same_ids(
    target: TextTokenizer, reference: TextTokenizer, texts: Iterable[Text]
) -> None:
    """Raises `ModelError` unless both tokenizers give the same ids for every text.

    Two files may differ in bytes and still be the same tokenizer, so the ids decide.
    """
    if target.fingerprint == reference.fingerprint:
        return
    texts, whole = list(texts), 2**31 - 1
    ours = target.encode([t.text for t in texts], whole)
    theirs = reference.encode([t.text for t in texts], whole)
    for text, a, b in zip(texts, ours, theirs):
        if np.array_equal(a.ids, b.ids):
            continue
        at = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), len(a.ids))
        begin = max(min(at, len(a.ids), len(b.ids)) - 2, 0)
        raise ModelError(
            "target and reference must tokenise alike, but they differ at token "
            f"{at} of text '{text.id}' ({text.where}): from token {begin} on "
            f"{a.ids[begin : begin + 6].tolist()} by {target.where}, "
            f"{b.ids[begin : begin + 6].tolist()} by {reference.where}; "
            "use the model that the target was fine-tuned from"
        )


def require_ids_fit(tokenizer: TextTokenizer, vocab_rows: int, where: str) -> None:
    """Raises `ModelError` if the tokenizer can give an id that has no embedding row."""
    if tokenizer.max_id >= vocab_rows:
        raise ModelError(
            f"{where}: the tokenizer's largest id is {tokenizer.max_id}, but the embedding has "
            f"{vocab_rows} rows; is {tokenizer.where} another model's tokenizer?"
        )
