"""What an attack is, and the list of those there are.

An attack is what it reads (its queries) and a statistic of the readings: no forward pass, no file,
no device of its own. A new one is about twenty lines: a function `Reading -> number` under
`@register(...)`, on existing probes or on new ones.
"""

import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from sama_jax.arrays import Reading
from sama_jax.attacks.queries import BOTH, TARGET, CorpusReading, Probes, Query
from sama_jax.config import AuditSettings
from sama_jax.errors import UsageError, nearest

ENTRY_POINTS = "sama_jax.attacks"
"""Group of entry points of other packages: each names a module whose import registers attacks."""


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
    """Whether `all` includes it."""
    needs_texts: bool = False
    """The corpus step reads texts and labels."""
    needs_prompts: bool = False
    """It is defined for conversations alone."""


_ATTACKS: dict[str, Attack] = {}
_loaded = False


@dataclass(frozen=True)
class _WithoutSettings:
    """A function of what was read alone, called as one that also takes settings."""

    function: Callable

    def __call__(self, read: Any, settings: AuditSettings) -> Any:
        del settings
        return self.function(read)


def _with_settings(function: Callable) -> Callable:
    """Lets a statistic leave out its second argument, the settings."""
    takes = len(inspect.signature(function).parameters)
    return function if takes > 1 else _WithoutSettings(function)


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

    The statistic takes a `Reading` and, if it wants them, the audit's settings. Give `probes` (one
    reading of the text's losses under them, of both models if `needs_reference`), or `queries` for
    anything else. `more` are fields of `Attack`.

    Raises:
      UsageError: both or neither are given, or another attack has the name.
    """
    if probes is not None and queries is None:
        roles = BOTH if needs_reference else TARGET
        queries = lambda settings: {"text": Query(probes(settings), roles=roles)}  # noqa: E731
    elif probes is not None or queries is None:
        raise UsageError(f"attack '{name}': give either probes or queries")

    def add(statistic: Callable) -> Callable:
        about = access, source, _first_line(statistic)
        _add(Attack(name, queries, _with_settings(statistic), *about, **more))
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
    """Lists the names of all registered attacks, in order of registration."""
    _load_entry_points()
    return list(_ATTACKS)


def get(name: str) -> Attack:
    """Returns the attack of a name. Raises `UsageError` with the nearest known one."""
    _load_entry_points()
    if name not in _ATTACKS:
        raise UsageError(f"unknown attack '{name}'{nearest(name, _ATTACKS)}")
    return _ATTACKS[name]


def select(wanted: Sequence[str]) -> list[Attack]:
    """Returns the attacks of a list of names, each once; `all` stands for those of `in_all`."""
    found: dict[str, Attack] = {}
    for name in wanted:
        if name == "all":
            found |= {n: _ATTACKS[n] for n in names() if _ATTACKS[n].in_all}
        else:
            found[name] = get(name)
    if not found:
        raise UsageError(f"no attack given; known: {', '.join(_ATTACKS)}")
    return list(found.values())
