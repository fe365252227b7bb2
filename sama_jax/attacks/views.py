"""Other texts made from a text: its lower-case form, a part of it, a prefix before it, neighbours.

Host code, one text at a time. A view's randomness derives from the seed and the text's tokens.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sama_jax.arrays import Rendered
from sama_jax.attacks.queries import ViewText, ViewTools


@dataclass(frozen=True)
class Lowercase:
    """The text in lower case, with the text's own masks where the token count stays.

    Of a conversation its answers are. None where the tokens are the same: then there is nothing to
    compare.
    """

    name = "lowercase"
    context = None

    def make(
        self, text: str | Rendered, ids: Int[np.ndarray, " n"], tools: ViewTools
    ) -> ViewText | None:
        lower = tools.encode(text.lower())
        if np.array_equal(lower.ids, ids):
            return None
        return ViewText(lower.ids, lower.special, same_masks=True, prompt=lower.prompt)


@dataclass(frozen=True)
class Deleted:
    """The text without a random `fraction` of its tokens: at least one goes, at least one stays.

    Tokens that the tokenizer added stay, and so do prompts. A text of one token is its own copy.
    """

    fraction: float

    @property
    def name(self) -> str:
        return f"deleted-{self.fraction}"

    context = None

    def make(
        self, text: str | Rendered, ids: Int[np.ndarray, " n"], tools: ViewTools
    ) -> ViewText | None:
        given = tools.encode(text)
        special, prompt = given.special, given.prompt
        own = np.flatnonzero(~special if prompt is None else ~special & ~prompt)
        count = min(max(round(self.fraction * len(own)), 1), len(own) - 1)
        kept = np.ones(len(ids), bool)
        if count > 0:
            kept[tools.generator.choice(own, count, replace=False)] = False
        return ViewText(ids[kept], special[kept], prompt=None if prompt is None else prompt[kept])


@dataclass(frozen=True)
class Context:
    """The text behind visible texts of a class, under the text's own masks.

    The prefix is cut at its beginning to `tokens`, and to what the text leaves of the models'
    context; None where that is not one token.
    """

    context: str
    """`nonmember` or `member`."""
    tokens: int

    @property
    def name(self) -> str:
        return f"after-{self.context}s-{self.tokens}"

    def make(
        self, text: str | Rendered, ids: Int[np.ndarray, " n"], tools: ViewTools
    ) -> ViewText | None:
        room = min(self.tokens, tools.room - len(ids))
        before = tools.contexts[self.context]
        if room < 1 or not len(before):
            return None
        given, before = tools.encode(text), before[-room:]
        return ViewText(ids, given.special, before, same_masks=True, prompt=given.prompt)


@dataclass(frozen=True)
class Joined:
    """Prefix and text as one text, cut at its end to the maximum length, masked and scored alike.

    The circulated form. What is cut off is the text: of a prefix as long as the maximum, the view
    is the prefix alone. None of a conversation: its prompts would be masked, too.
    """

    context: str

    @property
    def name(self) -> str:
        return f"joined-{self.context}s"

    def make(
        self, text: str | Rendered, ids: Int[np.ndarray, " n"], tools: ViewTools
    ) -> ViewText | None:
        del ids
        if isinstance(text, Rendered):
            return None
        whole = tools.encode(f"{tools.joined[self.context]} {text}")
        return ViewText(whole.ids, whole.special)


@dataclass(frozen=True)
class HiddenPrompt:
    """A conversation with the mask token in place of all its prompts' tokens, under its own masks.

    Tokens that the tokenizer added stay. None of a text without a prompt.
    """

    name = "hidden-prompt"
    context = None

    def make(
        self, text: str | Rendered, ids: Int[np.ndarray, " n"], tools: ViewTools
    ) -> ViewText | None:
        given = tools.encode(text)
        hidden = np.zeros(len(ids), bool) if given.prompt is None else given.prompt & ~given.special
        if not hidden.any():
            return None
        masked = np.where(hidden, tools.mask_id, ids).astype(np.int32)
        return ViewText(masked, given.special, same_masks=True, prompt=given.prompt)


@dataclass(frozen=True)
class Replaced:
    """The text with the tokens of one row of its guide put in their places, under its own masks.

    None where that row proposes nothing.
    """

    row: int

    @property
    def name(self) -> str:
        return f"neighbor-{self.row}"

    context = None

    def make(
        self, text: str | Rendered, ids: Int[np.ndarray, " n"], tools: ViewTools
    ) -> ViewText | None:
        assert tools.guide is not None
        proposed = tools.guide[self.row, : len(ids)]
        if np.isnan(proposed).all():
            return None
        replaced = np.where(np.isnan(proposed), ids, np.nan_to_num(proposed)).astype(np.int32)
        given = tools.encode(text)
        return ViewText(replaced, given.special, same_masks=True, prompt=given.prompt)


@dataclass(frozen=True)
class SharedSpans:
    """The text in the tokens of each model, of which spans that both share are masked and scored.

    None of a text without such a span.
    """

    name = "spans"
    context = None

    def make(
        self, text: str | Rendered, ids: Int[np.ndarray, " n"], tools: ViewTools
    ) -> ViewText | None:
        del ids
        assert tools.share is not None, "the run has one tokenizer"
        return tools.share(text)
