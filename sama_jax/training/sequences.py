"""Turns the texts of a training into arrays of token ids."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sama_jax.config import TrainSettings
from sama_jax.errors import DataError, ModelError
from sama_jax.terminal import Terminal
from sama_jax.texts.read import read_texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.special_tokens import padding_token

MIN_WINDOW = 16
"""Tokens; a shorter remainder of a text cut into windows is dropped."""

Ids = Int[np.ndarray, " _"]
"""Token ids of one sequence."""


def training_texts(
    path: Path,
    terminal: Terminal,
    text_field: str | None = None,
    label_field: str | None = None,
) -> list[str]:
    """Reads the texts to learn, as `read_texts` does. Non-members of a labelled file are left out.

    Raises:
      DataError: the file cannot be read, or all its texts are non-members.
    """
    found = read_texts(path, text_field, label_field).texts
    texts = [t.text for t in found if t.label != 0]
    if not texts:
        raise DataError(
            f"{path}: every text has label 0 (non-member); expected texts to train on, with label "
            "1 or without a label"
        )
    if len(texts) < len(found):
        left_out = len(found) - len(texts)
        terminal.say(f"{left_out:,} texts with label 0 (non-members) are left out of training")
    return texts


def digest(texts: Sequence[str]) -> str:
    """Returns a SHA-256 of the texts in their order, in hexadecimal."""
    found = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def token_sequences(
    tokenizer: TextTokenizer, texts: Sequence[str], settings: TrainSettings, terminal: Terminal
) -> list[Ids]:
    """Encodes each text cut at `max_length`, or as all its windows of `max_length` tokens.

    A remainder under `MIN_WINDOW` tokens is dropped unless it is the whole text; texts without a
    token are dropped.
    """
    length = settings.max_length
    shown = terminal if len(texts) >= 2000 else Terminal(quiet=True)  # else it takes no time
    with shown.bar("tokenise", len(texts), "texts") as bar:
        limit = 2**31 - 1 if settings.windows else length
        encoded = tokenizer.encode(list(texts), limit, bar.advance)
    sequences = []
    for item in encoded:
        pieces = [item.ids[i : i + length] for i in range(0, len(item.ids), length)]
        sequences += [p for i, p in enumerate(pieces) if i == 0 or len(p) >= MIN_WINDOW]
    return sequences


def predictable(sequences: Sequence[Ids], kind: str) -> list[Ids]:
    """Keeps the sequences in which a model of this kind has a token to predict."""
    least = 2 if kind == "autoregressive" else 1  # nothing predicts a first token
    return [s for s in sequences if len(s) >= least]


def padded_length(sequences: Sequence[Ids]) -> int:
    """Returns the longest length, rounded up to a multiple of 8."""
    return -(-max(len(s) for s in sequences) // 8) * 8


def pad(
    sequences: Sequence[Ids], length: int, pad_id: int
) -> tuple[Int[np.ndarray, "n {length}"], Int[np.ndarray, " n"]]:
    """Stacks sequences, filled up with `pad_id`: `(tokens, lengths)`, both int32."""
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    for row, ids in zip(tokens, sequences):
        row[: len(ids)] = ids
    return tokens, np.array([len(s) for s in sequences], np.int32)


def training_arrays(
    sequences: Sequence[Ids], settings: TrainSettings, config: Mapping[str, Any], rows: int
) -> tuple[Int[np.ndarray, "n l"], Int[np.ndarray, " n"]]:
    """Pads the sequences for training: `(tokens, lengths)`.

    With `train_on_padding` every row counts as `max_length` tokens, filled up with the end-of-text
    id of the model's `config`, one of the `rows` of the embedding.

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
    tokens, lengths = pad(sequences, settings.max_length, pad_id)
    return tokens, np.full_like(lengths, settings.max_length)
