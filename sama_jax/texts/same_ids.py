"""Checks that two tokenizers are one, by what they make of the texts at hand."""

from collections.abc import Iterable

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.texts.read import Text
from sama_jax.texts.tokenizer import LONGEST, TextTokenizer


def require_same_ids(
    target: TextTokenizer, reference: TextTokenizer, texts: Iterable[Text]
) -> None:
    """Raises `ModelError` unless both tokenizers give the same ids for every text.

    Two files may differ in bytes and still be the same tokenizer, so the ids decide.
    """
    if target.fingerprint == reference.fingerprint:
        return
    texts = list(texts)
    ours, theirs = (t.encode([x.content for x in texts], LONGEST) for t in (target, reference))
    for text, a, b in zip(texts, ours, theirs):
        if np.array_equal(a.ids, b.ids):
            continue
        at = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), len(a.ids))
        raise ModelError(
            "target and reference must tokenise alike, but they differ at token "
            f"{at} of text '{text.id}' ({text.where}), which has {len(a.ids)} tokens by "
            f"{target.where} and {len(b.ids)} by {reference.where}; use the model that the target "
            "was fine-tuned from, or compare spans of the text by --reference-tokenizer own"
        )
