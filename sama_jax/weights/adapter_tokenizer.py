"""Holds the tokenizers in adapters' folders to the one that the texts are read by.

Trainers save the tokenizer beside an adapter, also when they added tokens to it. The base's is
used, so it must give the same ids.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.texts.read import Text
from sama_jax.texts.tokenizer import LONGEST, PROBES, TextTokenizer
from sama_jax.untrusted import shown

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these makes a tokenizer."""


def require_adapters_ids(
    folders: Sequence[Path], tokenizer: TextTokenizer, texts: Iterable[Text] | None = None
) -> None:
    """Raises `ModelError` if an adapter's folder has a tokenizer that gives other ids.

    Args:
      folders: the adapters' own.
      tokenizer: the one that is used.
      texts: of a run; None: the names of all added tokens are compared in their place, for a
        folder that any text may be read with.
    """
    for folder in folders:
        if not any((folder / name).is_file() for name in FILES):
            continue
        other = TextTokenizer.from_folder(folder, None)
        if other.fingerprint == tokenizer.fingerprint:
            continue
        if texts is None:
            names = sorted({*tokenizer.added_tokens, *other.added_tokens})
            given = [(f"its added token {shown(name)}", name) for name in names]
        else:
            given = [(f"text '{text.id}' ({text.where})", text.content) for text in texts]
        given += [(f"the probe {shown(probe)}", probe) for probe in PROBES]
        contents = [content for _, content in given]
        found = (one.encode(contents, LONGEST) for one in (tokenizer, other))
        for (what, _), ours, theirs in zip(given, *found):
            if not np.array_equal(ours.ids, theirs.ids):
                raise ModelError(
                    f"{folder}: the adapter brings a tokenizer that gives other ids than "
                    f"{tokenizer.where}, which would be used: {what} has {len(theirs.ids)} tokens "
                    f"by the one and {len(ours.ids)} by the other; if the adapter was trained with "
                    "its own, put that in the place of the base's, else take it away"
                )
