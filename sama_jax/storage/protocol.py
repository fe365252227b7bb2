"""Keeps what an audit set out to show, written before its first pass.

Whoever picks the strongest of many attacks afterwards finds something by chance: with 33 attacks
and labels without meaning in 37 % of audits. So one attack is primary, and a family is declared.
The file proves no date to anybody else; file its hash with someone who can.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sama_jax.errors import DataError, UsageError
from sama_jax.storage.files import sealed, unsealed, write_json
from sama_jax.untrusted import read_json, shown

PROTOCOL = "protocol.json"
PRIMARY = "sama"
FAMILY = ("sama", "loss", "zlib", "ratio", "lowercase", "mink", "wbc", "complement")
"""Attacks that are declared unless others are; none is a variant of another, or a check."""
MOST_DECLARED = 8
ALPHA, MARGIN = 0.025, 0.55


@dataclass(frozen=True)
class Protocol:
    """What an audit set out to show."""

    primary: str
    """The attack whose result is the headline."""
    family: tuple[str, ...]
    """Attacks that are declared, the primary among them; all others are exploratory."""
    alpha: float = ALPHA
    """One-sided level of error of the primary's finding."""
    margin: float = MARGIN
    """AUC below which all declared attacks must stay for "nothing above it"."""
    stored: bool = False
    """Whether losses of this target were stored before it: scores may have been seen."""

    @classmethod
    def of(
        cls,
        attacks: Sequence[str],
        primary: str | None = None,
        family: Sequence[str] = (),
        margin: float | None = None,
    ) -> "Protocol":
        """Declares the attacks of a run: those given, else what is usual among them.

        Raises `UsageError` for attacks that the run does not compute, and too many of them.
        """
        first = primary or (PRIMARY if PRIMARY in attacks else attacks[0])
        declared = dict.fromkeys([first, *(family or (a for a in FAMILY if a in attacks))])
        absent = [name for name in declared if name not in attacks]
        if absent:
            raise UsageError(
                f"the declared attack '{absent[0]}' is not among --attacks; add it, or leave it "
                "out of --primary and --family"
            )
        if len(declared) > MOST_DECLARED:
            raise UsageError(
                f"--family declares {len(declared)} attacks, at most {MOST_DECLARED} can be; the "
                "others are computed all the same, and reported as exploratory"
            )
        level = MARGIN if margin is None else margin
        if not 0.5 < level < 1:
            raise UsageError(f"--margin is {level}, expected an AUC between 0.5 and 1")
        return cls(first, tuple(declared), margin=level)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Protocol":
        """Returns what `asdict` gave, of a manifest."""
        return cls(**{**value, "family": tuple(value["family"])})


def require_same(folder: Path, known: Protocol, wanted: Protocol, given: Sequence[str]) -> None:
    """Raises `UsageError` if a command declares another protocol than its run was begun with.

    Args:
      folder: of the run.
      known: the run's.
      wanted: what the command declares.
      given: the names of fields that it states; the others follow what is known.
    """
    changed = [name for name in given if getattr(known, name) != getattr(wanted, name)]
    if changed:
        name = changed[0]
        raise UsageError(
            f"{folder / PROTOCOL}: was fixed before the first pass: {name} was "
            f"{shown(getattr(known, name))}, is {shown(getattr(wanted, name))}; give --out a new "
            "folder"
        )


def known_protocol(folder: Path, manifest: Mapping[str, Any]) -> Protocol | None:
    """Returns the protocol of a run, by its manifest if the file is gone; None: there is none yet.

    Raises `DataError` if the file is damaged.
    """
    if (folder / PROTOCOL).is_file():
        return read_protocol(folder)
    stated = manifest.get("protocol")
    return Protocol.from_dict(stated) if stated else None


def write_protocol(folder: Path, protocol: Protocol) -> None:
    """Writes the protocol of a run."""
    write_json(folder / PROTOCOL, sealed(asdict(protocol) | {"family": list(protocol.family)}))


def read_protocol(folder: Path) -> Protocol:
    """Reads the protocol of a run. Raises `DataError` if it is damaged."""
    path = folder / PROTOCOL
    try:
        found = unsealed(read_json(path))
        if found is None:
            raise ValueError("it is not as it was written")
        return Protocol.from_dict(found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); copy it again, or audit into a new folder"
        ) from None
