"""Turns the texts of a training into arrays of token ids."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sama_jax.arrays import Encoded, Rendered
from sama_jax.config import TrainSettings
from sama_jax.errors import DataError, ModelError
from sama_jax.terminal import Terminal
from sama_jax.texts.read import PLAIN, Fields, read_texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.special_tokens import padding_token

MIN_WINDOW = 16
"""Tokens; a shorter remainder of a text cut into windows is dropped."""


class Tokens(NamedTuple):
    """What a model reads at once, and which of it is learned."""

    ids: Int[np.ndarray, " n"]
    learned: Bool[np.ndarray, " n"]
    """All of a plain text, the answers of a conversation."""


def training_texts(path: Path, terminal: Terminal, fields: Fields = PLAIN) -> list[str | Rendered]:
    """Reads the texts to learn, as `read_texts` does. Non-members of a labelled file are left out.

    Raises:
      DataError: the file cannot be read, or all its texts are non-members.
    """
    found = read_texts(path, fields.text, fields.label, form=fields.form).texts
    texts = [t.content for t in found if t.label != 0]
    if not texts:
        raise DataError(
            f"{path}: every text has label 0 (non-member); expected texts to train on, with label "
            "1 or without a label"
        )
    if len(texts) < len(found):
        left_out = len(found) - len(texts)
        terminal.say(f"{left_out:,} texts with label 0 (non-members) are left out of training")
    return texts


def digest(texts: Sequence[str | Rendered]) -> str:
    """Returns a SHA-256 of the texts in their order, of conversations' parts, in hexadecimal."""
    found = hashlib.sha256()
    for text in texts:
        data = str(text).encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
        if isinstance(text, Rendered):
            found.update(repr((list(map(tuple, text.pieces)), text.adds)).encode())
    return found.hexdigest()


def token_sequences(
    tokenizer: TextTokenizer,
    texts: Sequence[str | Rendered],
    settings: TrainSettings,
    terminal: Terminal,
) -> list[Tokens]:
    """Encodes each text cut at `max_length`, or as all its windows of `max_length` tokens.

    A remainder under `MIN_WINDOW` tokens is dropped unless it is the whole text; texts without a
    token are dropped. Says how much was cut.
    """
    length = settings.max_length
    shown = terminal if len(texts) >= 2000 else Terminal(quiet=True)  # else it takes no time
    with shown.bar("tokenise", len(texts), "texts") as bar:
        limit = 2**31 - 1 if settings.windows else length
        encoded = tokenizer.encode(list(texts), limit, bar.advance)
    for doubt in tokenizer.doubts([] if settings.windows else encoded):
        terminal.say(doubt)
    cut = [item.prompt_cut for item in encoded if item.prompt_cut]
    shorter = sum(item.truncated for item in encoded)
    if shorter and not cut and not settings.windows:
        terminal.say(
            f"{shorter:,} of {len(texts):,} texts are cut at {length:,} tokens, and what stands "
            "behind is not learned (--max-length)"
        )
    if cut and not settings.windows:
        terminal.say(
            f"{len(cut):,} of {len(texts):,} prompts are cut at their beginning, by {sum(cut):,} "
            f"tokens in all; {shorter:,} responses lose tokens, too"
        )
    sequences = []
    for item in encoded:
        starts = range(0, len(item.ids), length)
        pieces = [tokens_of(item, i, i + length) for i in starts]
        sequences += [p for i, p in enumerate(pieces) if i == 0 or len(p.ids) >= MIN_WINDOW]
    return sequences


def tokens_of(item: Encoded, start: int = 0, end: int | None = None) -> Tokens:
    """Returns the tokens of a text, or a part of them, to learn."""
    learned = np.ones(len(item.ids), bool) if item.prompt is None else ~item.prompt
    return Tokens(item.ids[start:end], learned[start:end])


def predictable(sequences: Sequence[Tokens], kind: str) -> list[Tokens]:
    """Keeps the sequences in which a model of this kind has a token to predict."""
    least = 1 if kind == "autoregressive" else 0  # nothing predicts a first token
    return [s for s in sequences if s.learned[least:].any()]


def padded_length(sequences: Sequence[Tokens]) -> int:
    """Returns the longest length, rounded up to a multiple of 8."""
    return -(-max(len(s.ids) for s in sequences) // 8) * 8


class Padded(NamedTuple):
    """Sequences in rows of one length."""

    tokens: Int[np.ndarray, "n l"]
    lengths: Int[np.ndarray, " n"]
    learned: Bool[np.ndarray, "n l"]
    """False beyond a row's length."""

    def valid(self, rows: Int[np.ndarray, " b"]) -> Bool[np.ndarray, "b l"]:
        """Tells what of some rows is no padding."""
        return np.arange(self.tokens.shape[1])[None] < self.lengths[rows][:, None]


def pad(sequences: Sequence[Tokens], length: int, pad_id: int) -> Padded:
    """Stacks sequences, filled up with `pad_id`."""
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    learned = np.zeros((len(sequences), length), bool)
    for row, one in enumerate(sequences):
        tokens[row, : len(one.ids)] = one.ids
        learned[row, : len(one.ids)] = one.learned
    return Padded(tokens, np.array([len(s.ids) for s in sequences], np.int32), learned)


def training_arrays(
    sequences: Sequence[Tokens], settings: TrainSettings, config: Mapping[str, Any], rows: int
) -> Padded:
    """Pads the sequences for training.

    With `train_on_padding` every row counts as `max_length` tokens, filled up with the end-of-text
    id of the model's `config`, one of the `rows` of the embedding, and all filling is learned.

    Raises:
      ModelError: the config has no such id.
    """
    if not settings.train_on_padding:
        return pad(sequences, padded_length(sequences), 0)
    pad_id = padding_token(config, rows, "the model's config.json")
    if pad_id is None:
        raise ModelError(
            "train_on_padding needs a pad_token_id or eos_token_id in the model's config.json, "
            "found neither"
        )
    made = pad(sequences, settings.max_length, pad_id)
    filling = np.arange(settings.max_length)[None] >= made.lengths[:, None]
    lengths = np.full_like(made.lengths, settings.max_length)
    return Padded(made.tokens, lengths, made.learned | filling)
