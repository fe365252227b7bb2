"""What an attack is, and the list of those there are.

An attack is what it reads (queries: a view of the text, a probe plan, quantities) and a statistic
of the readings: no forward pass, no file, no device of its own. A new one is about twenty lines: a
function `Reading -> number` under `@register(...)`, on existing probes or on new ones.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax.arrays import Encoded, Model, Params, ProbePlan, Reading, TextKeyData
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.errors import UsageError, nearest

Models = Literal["both", "target", "reference"]
ENTRY_POINTS = "sama_jax.attacks"
"""Group of entry points of other packages: each names a module whose import registers attacks."""


@runtime_checkable
class Probes(Protocol):
    """A family of probe plans: one pure function of a text's key and maskable positions.

    Hashable (a frozen dataclass), so that its compiled plan is kept for the whole process.
    """

    @property
    def passes(self) -> int:
        """Forward passes of each model on a text."""
        ...

    @property
    def identity(self) -> str:
        """Hash of everything but the seed that changes a mask; names the plan in the loss store."""
        ...

    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        """The plan of one text. `key` is the text's root key (`rng.text_key`).

        Probes of a query with a `guide` and no view take its values [t, l] as a third argument.
        """
        ...

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        """Most positions that each pass can score in a text of at most `length` tokens: [t]."""
        ...


@runtime_checkable
class Procedure(Protocol):
    """A computation on a model that is no list of independent passes, such as greedy filling.

    Hashable. Its result is stored like losses are: one value a (row, position), NaN unread.
    """

    @property
    def passes(self) -> int:
        """Forward passes on a text."""
        ...

    @property
    def rows(self) -> int:
        """Rows of the result: the t of its reading."""
        ...

    @property
    def identity(self) -> str:
        """Hash of everything but the seed that changes a value."""
        ...

    def run(
        self,
        model: Model,
        params: Params,
        keys: Key[Array, " b"],
        tokens: Int[Array, "b l"],
        valid: Bool[Array, "b l"],
        maskable: Bool[Array, "b l"],
    ) -> Float[Array, "t b l"]:
        """The values of a padded batch, NaN where nothing is read; `keys` are the root keys."""
        ...


class ViewTools(NamedTuple):
    """What a view may use. NumPy, one text."""

    encode: Callable[[str], Encoded]
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


@runtime_checkable
class View(Protocol):
    """Another text made from a text. Hashable."""

    @property
    def name(self) -> str:
        """Names the view's items in the store's index; equal names mean equal items."""
        ...

    @property
    def context(self) -> str | None:
        """Which prefixes it needs: `nonmember`, `member` or none."""
        ...

    def make(self, text: str, ids: Int[np.ndarray, " n"], tools: ViewTools) -> ViewText | None:
        """The view of one text; None where there is none (say, no room for a prefix)."""
        ...


@dataclass(frozen=True)
class Query:
    """What is read about a text: which tokens, which passes, which quantities, which models."""

    probes: Probes | None = None
    view: View | None = None
    """None: the text itself."""
    channels: tuple[str, ...] = ("nll",)
    """Names of `losses.CHANNELS`; `nll` comes first in every reading."""
    models: Models = "both"
    procedure: Procedure | None = None
    """Instead of probes; the reading's `target` and `reference` are its values."""
    guide: "Query | None" = None
    """Read first; its values go to the view if there is one (`tools.guide`), else to the probes."""

    @property
    def passes(self) -> int:
        """Forward passes of one model on one text, the guide's not included."""
        return (self.probes or self.procedure).passes  # pyright: ignore

    @property
    def identity(self) -> str:
        """Names its losses in the store, together with the seed, the model and the text."""
        what = (self.probes or self.procedure).identity  # pyright: ignore
        if self.guide is None or not self.guides_probes:
            return what
        return settings_hash(what, self.guide.identity)

    @property
    def guides_probes(self) -> bool:
        """Whether masks depend on the guide. What a guided view reads depends on its tokens."""
        return self.guide is not None and self.view is None

    @property
    def view_name(self) -> str:
        return self.view.name if self.view else "text"


class CorpusReading(NamedTuple):
    """What an attack sees that scores all texts of a run together: those that it can read."""

    parts: Float[np.ndarray, "n p"]
    """The statistic's values of each text, NaN where it has none."""
    texts: list[str] | None
    """None where only the store is at hand."""
    labels: Int[np.ndarray, " n"] | None
    """None without labels."""


@dataclass(frozen=True)
class Attack:
    """One membership score. Higher always means more likely a member."""

    name: str
    queries: Callable[[AuditSettings], dict[str, Query]]
    """The first is the reading itself, the others its `views`, by name."""
    statistic: Callable[[Reading, AuditSettings], Float[Array, "..."]] | None
    """Pure function of one text's reading; vmapped and jitted by the caller."""
    access: str
    """What the attacker must be able to do, in a few words."""
    source: str
    summary: str
    kinds: tuple[str, ...] = ("diffusion", "masked")
    """Kinds of models that it is defined for."""
    undefined: str = "it needs at least one token"
    """When a text has no score (null), in a few words."""
    corpus: Callable[[CorpusReading, AuditSettings], Float[np.ndarray, " n"]] | None = None
    """Scores of all texts from the statistic's values of each, NaN for null."""
    in_all: bool = True
    """Whether `all` means it, too."""
    needs_texts: bool = False
    """The corpus step reads texts and labels."""


def flatten(queries: dict[str, Query]) -> list[Query]:
    """All queries of an attack, guides before what they guide."""
    found: dict[Query, None] = {}
    for query in queries.values():
        if query.guide is not None:
            found[query.guide] = None
        found[query] = None
    return list(found)


_ATTACKS: dict[str, Attack] = {}
_loaded = False


def register(
    name: str,
    *,
    access: str,
    source: str,
    probes: Callable[[AuditSettings], Probes] | None = None,
    needs_reference: bool = True,
    queries: Callable[[AuditSettings], dict[str, Query]] | None = None,
    **more: Any,
) -> Callable:
    """Registers a statistic as an attack; the first line of its docstring is the summary.

    Give `probes` (one reading of the text's losses under them, of both models if
    `needs_reference`), or `queries` for anything else. `more` are fields of `Attack`.
    """
    if (probes is None) == (queries is None):
        raise UsageError(f"attack '{name}': give either probes or queries")

    def simple(settings: AuditSettings) -> dict[str, Query]:
        assert probes is not None
        return {"text": Query(probes(settings), models="both" if needs_reference else "target")}

    def add(statistic: Callable[[Reading, AuditSettings], Float[Array, ""]]) -> Callable:
        summary = _first_line(statistic)
        _add(Attack(name, queries or simple, statistic, access, source, summary, **more))
        return statistic

    return add


def register_corpus(name: str, *, access: str, source: str, **more: Any) -> Callable:
    """Registers an attack that reads the texts alone: a function of `CorpusReading`."""

    def add(corpus: Callable[[CorpusReading, AuditSettings], Float[np.ndarray, " n"]]) -> Callable:
        about = access, source, _first_line(corpus)
        _add(Attack(name, lambda _: {}, None, *about, corpus=corpus, needs_texts=True, **more))
        return corpus

    return add


def _first_line(function: Callable) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def _add(attack: Attack) -> None:
    known = _ATTACKS.get(attack.name)
    if known and (known.statistic, known.corpus) != (attack.statistic, attack.corpus):
        raise UsageError(f"an attack named '{attack.name}' is registered already")
    _ATTACKS[attack.name] = attack


def _load_entry_points() -> None:
    """Imports the modules that other installed packages name under `ENTRY_POINTS`, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # foreign code: whatever it raises must name its origin
            raise UsageError(
                f"the attack module '{entry.value}' of another package cannot be loaded ({error}); "
                "uninstall or update that package"
            ) from error


def names() -> list[str]:
    """Names of all registered attacks, in order of registration."""
    _load_entry_points()
    return list(_ATTACKS)


def get(name: str) -> Attack:
    """The attack of a name. Raises `UsageError` with the nearest known one."""
    _load_entry_points()
    if name not in _ATTACKS:
        raise UsageError(f"unknown attack '{name}'{nearest(name, _ATTACKS)}")
    return _ATTACKS[name]


def select(wanted: Sequence[str]) -> list[Attack]:
    """The attacks of a list of names, each once; `all` stands for every one."""
    found: dict[str, Attack] = {}
    for name in wanted:
        if name == "all":
            found |= {n: _ATTACKS[n] for n in names() if _ATTACKS[n].in_all}
        else:
            found[name] = get(name)
    if not found:
        raise UsageError(f"no attack given; known: {', '.join(_ATTACKS)}")
    return list(found.values())


def key_name(key: TextKeyData) -> str:
    """A text's key in the store: 16 hex digits."""
    return f"{int(key.high):08x}{int(key.low):08x}"
