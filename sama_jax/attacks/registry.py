"""What an attack is, and the list of those there are.

An attack is a probe plan and a statistic: no forward pass, no file, no device of its own. A new
one is about twenty lines: a function `Reading -> number` under `@register(...)`, on an existing
plan or on a new one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Array, Bool, Float, Key

from sama_jax.config import AuditSettings
from sama_jax.errors import UsageError, nearest
from sama_jax.types import ProbePlan, Reading


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
        """The plan of one text. `key` is the text's root key (`rng.text_key`)."""
        ...

    def slot_bounds(self, length: int) -> np.ndarray:
        """Most positions that each pass can score in a text of at most `length` tokens: [t]."""
        ...


@dataclass(frozen=True)
class Attack:
    """One membership score. Higher always means more likely a member."""

    name: str
    probes: Callable[[AuditSettings], Probes]
    statistic: Callable[[Reading, AuditSettings], Float[Array, ""]]
    """Pure function of one text's reading; vmapped and jitted by the caller."""
    needs_reference: bool
    access: str
    """What the attacker must be able to do, in a few words."""
    source: str
    summary: str


_ATTACKS: dict[str, Attack] = {}


def register(
    name: str,
    *,
    probes: Callable[[AuditSettings], Probes],
    needs_reference: bool,
    access: str,
    source: str,
) -> Callable:
    """Registers a statistic as an attack; the first line of its docstring is the summary."""

    def add(statistic: Callable[[Reading, AuditSettings], Float[Array, ""]]) -> Callable:
        summary = (statistic.__doc__ or "").strip().split("\n")[0]
        if name in _ATTACKS and _ATTACKS[name].statistic is not statistic:
            raise UsageError(f"an attack named '{name}' is registered already")
        _ATTACKS[name] = Attack(name, probes, statistic, needs_reference, access, source, summary)
        return statistic

    return add


def names() -> list[str]:
    """Names of all registered attacks, in order of registration."""
    return list(_ATTACKS)


def select(wanted: Sequence[str]) -> list[Attack]:
    """The attacks of a list of names, each once; `all` stands for every one."""
    found: dict[str, Attack] = {}
    for name in wanted:
        if name == "all":
            found |= _ATTACKS
        elif name in _ATTACKS:
            found[name] = _ATTACKS[name]
        else:
            raise UsageError(f"unknown attack '{name}'{nearest(name, _ATTACKS)}")
    if not found:
        raise UsageError(f"no attack given; known: {', '.join(_ATTACKS)}")
    return list(found.values())
