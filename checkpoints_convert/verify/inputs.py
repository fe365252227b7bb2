"""Draws the masked texts that both networks read."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sama_jax.engine import output_position
from sama_jax.errors import ModelError
from sama_jax.texts.read import read_texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.model_folder import ModelFolder

DENSITIES = (0.15, 0.4, 0.65, 0.9)
"""Shares of masked tokens, text by text."""
TOKENS = 32
"""Of each built-in text; of a text of --texts at most four times as many."""


class Inputs(NamedTuple):
    """Holds what both networks read. The last row is half of the first, padded."""

    tokens: Int[np.ndarray, "b l"]
    masks: Bool[np.ndarray, "b l"]
    valid: Bool[np.ndarray, "b l"]


def make_inputs(folder: ModelFolder, texts: Path | None, seed: int = 0) -> Inputs:
    """Draws masked texts, each at a density of its own; the same ones on every platform."""
    rng = np.random.default_rng(seed)
    rows = _token_rows(folder, texts, rng)
    rows.append(rows[0][: max(1, len(rows[0]) // 2)])
    tokens = np.zeros((len(rows), max(len(r) for r in rows)), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = row, True
    density = np.array([DENSITIES[i % len(DENSITIES)] for i in range(len(rows))])
    masks = (rng.random(tokens.shape) < density[:, None]) & valid
    masks[:, min(1, tokens.shape[1] - 1)] |= ~masks.any(axis=1) & valid[:, 0]
    return Inputs(tokens, masks & valid, valid)


def _token_rows(
    folder: ModelFolder, texts: Path | None, rng: np.random.Generator
) -> list[np.ndarray]:
    room = min(4 * TOKENS, folder.max_length)
    if texts is not None:
        tokenizer = TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
        found = read_texts(texts).texts[: len(DENSITIES)]
        encoded = [e.ids for e in tokenizer.encode([t.text for t in found], room) if len(e.ids)]
        if not encoded:
            raise ModelError(f"{texts}: none of its texts has a token by {folder.path}'s tokenizer")
        return encoded
    size = min(TOKENS, folder.max_length)
    ids, reason = built_in(folder, size * len(DENSITIES))
    if len(ids) >= 4 * len(DENSITIES):
        return np.array_split(ids, len(DENSITIES))
    print(f"{reason}; random token ids take the place of texts")
    ids = rng.integers(0, folder.model.vocab_size - 1, (len(DENSITIES), size))
    return list(ids.astype(np.int32))


def built_in(folder: ModelFolder, size: int) -> tuple[np.ndarray, str]:
    """Returns ids of the built-in text, and if they are few the reason."""
    try:
        tokenizer = TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
    except ModelError as error:
        return np.zeros(0, np.int32), str(error)
    # Without files, transformers makes an empty tokenizer for some model types.
    (encoded,) = tokenizer.encode([output_position.TEXT], size)
    return encoded.ids, f"{folder.path}: its tokenizer makes {len(encoded.ids)} tokens of a text"
