"""What an attack asks for: a view of the text, the passes over it, and the quantities to read.

`Probes` and `Procedure` are the two kinds of passes, `View` makes another text of a text, and a
`Query` puts them together. Whoever runs the passes needs nothing else of an attack.
"""

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax.arrays import Encoded, Model, Params, ProbePlan, Rendered, SharedTokens
from sama_jax.config import settings_hash

Role = Literal["target", "reference"]
BOTH: tuple[Role, ...] = ("target", "reference")
TARGET: tuple[Role, ...] = ("target",)
REFERENCE: tuple[Role, ...] = ("reference",)


class Passes(abc.ABC):
    """A frozen dataclass that says what forward passes do; its fields make its identity.

    Two objects of equal identity must make equal masks: losses in the store are found by it.
    """

    hashed_as: ClassVar[tuple[Any, ...]]
    """Name in the hash, with the module's constants that change a mask or a value."""
    not_in_identity: ClassVar[tuple[str, ...]] = ("max_length",)
    """Fields that change no mask, no scored position and no value; every other one is hashed."""
    passes: int
    """Forward passes of each model on a text."""

    @property
    def identity(self) -> str:
        """Names the losses in the store; the run's seed is added by whoever asks."""
        return settings_hash(*self.hashed_as, *self._hashed())

    def _hashed(self) -> tuple[Any, ...]:
        """Returns what is hashed, in order. Names in existing stores depend on it."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]  # of a subclass
        return tuple(getattr(self, f.name) for f in fields if f.name not in self.not_in_identity)


class Probes(Passes):
    """A family of probe plans: one pure function of a text's key and maskable positions."""

    @abc.abstractmethod
    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        """Draws the plan of one text. `key` is the text's root key (`rng.text_key`).

        Probes of a query with a `guide` and no view take its values [t, l] as a third argument.
        """

    @abc.abstractmethod
    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        """Bounds the positions that each pass scores in any text of at most `length` tokens."""


class Procedure(Passes):
    """A computation on a model that is no list of independent passes, such as greedy filling.

    Its result is stored as losses are: one value for each row and position, NaN where unread.
    """

    rows: int
    """Rows of the result: the t of its reading."""

    @abc.abstractmethod
    def run(
        self,
        model: Model,
        params: Params,
        keys: Key[Array, " b"],
        tokens: Int[Array, "b l"],
        valid: Bool[Array, "b l"],
        maskable: Bool[Array, "b l"],
    ) -> Float[Array, "t b l"]:
        """Computes the values of a padded batch; `keys` are the texts' root keys."""


class ViewTools(NamedTuple):
    """What a view may use. NumPy, one text."""

    encode: Callable[[str | Rendered], Encoded]
    """Text -> its tokens, cut at the run's maximum length."""
    contexts: dict[str, Int[np.ndarray, " p"]]
    """Token ids of the prefixes of this run, by class: `nonmember`, `member`."""
    joined: dict[str, str]
    """The same prefixes as texts, joined by spaces."""
    room: int
    """Tokens that fit into the models' context."""
    guide: Float[np.ndarray, "t n"] | None
    """The values of the view's guide."""
    generator: np.random.Generator
    """Seeded by the run's seed and the text's token ids."""
    mask_id: int = -1
    """The models' mask token."""
    share: Callable[[str | Rendered], "ViewText | None"] | None = None
    """Text -> the spans of it that two tokenizers share; None: the run has one tokenizer."""


class ViewText(NamedTuple):
    """Tokens to be read in place of a text."""

    ids: Int[np.ndarray, " n"]
    """What is masked and scored."""
    special: Bool[np.ndarray, " n"] | None = None
    """Tokens that the tokenizer added; None: none."""
    before: Int[np.ndarray, " p"] | None = None
    """Visible tokens before it, never masked."""
    same_masks: bool = False
    """Draw masks from the text's own key: views of equal length see the same masks."""
    prompt: Bool[np.ndarray, " n"] | None = None
    """Tokens of a conversation that always stay visible; None: none."""
    shared: SharedTokens | None = None
    """The reference's own tokens: what is masked and scored are spans, not tokens, and `special`
    speaks of them. None: both models read `ids`."""


@runtime_checkable
class View(Protocol):
    """Another text made from a text. Hashable."""

    @property
    def name(self) -> str:
        """Names the view in the run's index of texts; equal names mean equal views."""
        ...

    @property
    def context(self) -> str | None:
        """Says which prefixes it needs: `nonmember`, `member` or none."""
        ...

    def make(
        self, text: str | Rendered, ids: Int[np.ndarray, " n"], tools: ViewTools
    ) -> ViewText | None:
        """Makes the view of one text; None where there is none (say, no room for a prefix)."""
        ...


@dataclass(frozen=True)
class Query:
    """What is read about a text: by which passes, of which tokens, which quantities and models."""

    reads: Probes | Procedure
    """Of a procedure, the reading's `target` and `reference` are its values."""
    view: View | None = None
    """None: the text itself."""
    channels: tuple[str, ...] = ("nll",)
    """Names of `losses.CHANNELS`; `nll` comes first in every reading."""
    roles: tuple[Role, ...] = BOTH
    """The models that are read."""
    guide: "Query | None" = None
    """Read first; its values go to the view if there is one (`tools.guide`), else to the probes."""

    @property
    def passes(self) -> int:
        """Forward passes of one model on one text, the guide's not included."""
        return self.reads.passes

    @property
    def identity(self) -> str:
        """Names its losses in the store, together with the seed, the model and the text."""
        if self.guide is None or not self.guides_probes:
            return self.reads.identity
        return settings_hash(self.reads.identity, self.guide.identity)

    @property
    def guides_probes(self) -> bool:
        """Whether masks depend on the guide. What a guided view reads depends on its tokens."""
        return self.guide is not None and self.view is None

    @property
    def view_name(self) -> str:
        """The view's name; `text` for the text itself."""
        return self.view.name if self.view else "text"


def flatten(queries: dict[str, Query]) -> list[Query]:
    """Lists all queries of an attack once, guides before what they guide."""
    found: dict[Query, None] = {}
    for query in queries.values():
        if query.guide is not None:
            found[query.guide] = None
        found[query] = None
    return list(found)


class CorpusReading(NamedTuple):
    """What an attack sees that scores all texts of a run together: those that it can read."""

    parts: Float[np.ndarray, "n p"]
    """The statistic's values of each text, NaN where it has none."""
    texts: list[str] | None
    """None where only the store is given."""
    labels: Int[np.ndarray, " n"] | None
    """None without labels."""
