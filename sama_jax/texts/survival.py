"""Which tokens spell texts that a tokenizer reads back as they were."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from sama_jax.texts.tokenizer import LONGEST, TextTokenizer

UNKNOWN = "\ufffd"
"""What a tokenizer spells where bytes are no UTF-8."""


def spelling_ids(tokenizer: TextTokenizer, rows: int) -> Bool[np.ndarray, " {rows}"]:
    """Tells which ids spell something printable by themselves, of `rows` that a model has.

    Bytes that are no whole character, control characters and special tokens do not.
    """
    ids = [i for i in tokenizer.ordinary_ids if i < rows]
    found = np.zeros(rows, bool)
    found[ids] = [is_plain(text) for text in tokenizer.decode([[i] for i in ids])]
    return found


def is_plain(text: str) -> bool:
    """Tells whether a text is printable, line breaks and tabs aside, and not empty."""
    printable = text.replace("\n", "").replace("\t", "").isprintable()
    return bool(text) and printable and UNKNOWN not in text


def kept_tokens(tokenizer: TextTokenizer, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Counts the tokens of each text that keeps its ids when it is spelled and tokenised again.

    0: it does not, since a token is unknown or the tokenizer spells it in another way.
    """
    before = [e.ids.tolist() for e in tokenizer.encode(texts, LONGEST)]
    after = [e.ids.tolist() for e in tokenizer.encode(tokenizer.decode(before), LONGEST)]
    found = [len(a) if a == b else 0 for a, b in zip(before, after)]
    return np.array(found, np.int64)
