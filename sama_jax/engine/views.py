"""Makes the views that attacks ask for: a lower-case form, the text behind a prefix."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sama_jax.arrays import Encoded, Rendered, TextKeyData
from sama_jax.attacks.queries import View, ViewText, ViewTools
from sama_jax.config import AuditSettings
from sama_jax.engine.tasks import Tasks
from sama_jax.engine.text_table import TextTable, TextView, derived_view, table_of
from sama_jax.texts.shared_spans import shared_spans
from sama_jax.texts.tokenizer import TextTokenizer


class ViewSources(NamedTuple):
    """What the views of a run are made from."""

    texts: Sequence[str | Rendered]
    """In the order of the tables' rows."""
    tokenizer: TextTokenizer
    prefixes: dict[str, list[str]]
    """`nonmember`, `member` -> the texts that prefixes are made of."""
    settings: AuditSettings
    shift: bool
    """Whether the models read the output before a token (`Model.shift`)."""
    room: int
    """Tokens that fit into the context of both models."""
    mask_id: int
    reference_tokenizer: TextTokenizer | None = None
    """Where the reference has one of its own."""

    def share(self, text: str | Rendered) -> ViewText | None:
        """Tokenises one text for both models, and finds the spans that they share."""
        theirs = self.reference_tokenizer
        assert theirs is not None
        assert isinstance(text, str), "refused before"
        tokens = self.tokenizer.tokens(text), theirs.tokens(text)
        found = shared_spans(*tokens, self.settings.max_length)
        return found and ViewText(found.ids, found.special, shared=found.tokens)

    def encode(self, text: str | Rendered) -> Encoded:
        """Tokenises one text, cut at the maximum length."""
        return self.tokenizer.encode([text], self.settings.max_length)[0]

    def contexts(self) -> dict[str, Int[np.ndarray, " p"]]:
        """Tokenises the prefixes, each whole: a view cuts what is too much from its beginning.

        Without the tokens that a tokenizer adds: an end of text would cut the prefix off from the
        text.
        """
        whole = ["".join(text + "\n\n" for text in found) for found in self.prefixes.values()]
        ids = [e.ids[~e.special] for e in self.tokenizer.encode(whole, 65535)]
        return dict(zip(self.prefixes, ids))


def generator_of(seed: int, key: TextKeyData) -> np.random.Generator:
    """Returns the generator of a text's views, which depends on seed and token ids alone."""
    return np.random.default_rng([seed, int(key.high), int(key.low)])


def make_view(
    view: View,
    originals: TextTable,
    sources: ViewSources,
    guides: Sequence[Float[np.ndarray, "t l"]] | None = None,
) -> TextTable:
    """Makes one view of all texts.

    Args:
      view: what is made of each text.
      originals: the table of the texts themselves.
      sources: texts, tokenizer, prefixes and settings of the run.
      guides: float32 [t, l] a text, the values that the view is made from; None: it needs none.
    """
    contexts = sources.contexts()
    joined = {name: " ".join(found) for name, found in sources.prefixes.items()}

    def one(row: int) -> TextView | None:
        original = originals.row(row)
        if original is None or not len(original.ids):
            return None
        guide = None if guides is None else guides[row][:, : len(original.ids)]
        generator = generator_of(sources.settings.seed, original.key)
        given = contexts, joined, sources.room, guide, generator, sources.mask_id, sources.share
        tools = ViewTools(sources.encode, *given)
        made = view.make(sources.texts[row], original.ids, tools)
        options = {"shift": sources.shift, "room": sources.room}
        return made and derived_view(made, original, sources.settings, **options)

    return table_of([one(row) for row in range(originals.num_texts)])


def make_plain_views(
    tasks: Tasks, originals: TextTable, sources: ViewSources
) -> dict[str, TextTable]:
    """Makes the tables of all views that need no pass before them, the texts' own among them."""
    tables = {"text": originals}
    for name, view in tasks.views.items():
        if view is not None and not any(task.guides_view for task in tasks.of_view(name)):
            tables[name] = make_view(view, originals, sources)
    return tables
