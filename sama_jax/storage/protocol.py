"""Keeps what an audit set out to show, written before its first pass.

Whoever picks the strongest of many attacks afterwards finds something by chance: with 33 attacks
and labels without meaning in 37 % of audits. So one attack is primary, and a family is declared.
The file proves no date to anybody else; file its hash with someone who can.
"""

from collections.abc import Sequence
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


def fix_protocol(folder: Path, wanted: Protocol, given: Sequence[str]) -> Protocol:
    """Writes the protocol of a new run, or returns that of the run to be continued.

    Args:
      folder: of the run.
      wanted: what the command declares.
      given: the names of fields that it states; the others follow what stands there.

    Raises:
      UsageError: the run was begun with another protocol.
      DataError: the file is damaged.
    """
    path = folder / PROTOCOL
    if not path.is_file():
        write_json(path, sealed(asdict(wanted) | {"family": list(wanted.family)}))
        return wanted
    stated = read_protocol(folder)
    changed = [name for name in given if getattr(stated, name) != getattr(wanted, name)]
    if changed:
        name = changed[0]
        raise UsageError(
            f"{path}: was fixed before the first pass: {name} was {shown(getattr(stated, name))}, "
            f"is {shown(getattr(wanted, name))}; give --out a new folder (and the same --store)"
        )
    return stated


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
