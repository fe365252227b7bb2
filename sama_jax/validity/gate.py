"""What a gate says. Standard library only."""

from collections.abc import Iterable
from typing import Literal, TypedDict

Status = Literal["pass", "warn", "void", "not run"]


class Gate(TypedDict):
    """One reason why a result could mean nothing, and whether it holds here."""

    name: str
    """Stable, in lower case: what users and `metrics.json` call it."""
    status: Status
    """`void`: no result of the run means anything; exit code 5. `warn`: it means less."""
    statistic: float | None
    """What was measured; None if nothing could be."""
    bound: float | None
    """What it was held against, one of `bounds`."""
    sentence: str
    """What was found, in one sentence, whatever the status."""
    remedy: str
    """What to do about it; empty where nothing needs to be done."""


def gate(
    name: str,
    status: Status,
    sentence: str,
    remedy: str = "",
    *,
    statistic: float | None = None,
    bound: float | None = None,
) -> Gate:
    """Makes a `Gate`; numbers that are not finite become None, which JSON can hold."""

    def finite(x: float | None) -> float | None:
        return None if x is None or x - x != 0 else float(x)

    return {
        "name": name,
        "status": status,
        "statistic": finite(statistic),
        "bound": finite(bound),
        "sentence": sentence,
        "remedy": remedy if status in ("warn", "void") else "",
    }


def voids(gates: Iterable[Gate]) -> list[Gate]:
    """Returns the gates that void the result, in order."""
    return [one for one in gates if one["status"] == "void"]


def warnings(gates: Iterable[Gate]) -> list[Gate]:
    """Returns the gates that weaken the result, in order."""
    return [one for one in gates if one["status"] == "warn"]


def worst_of(parts: Iterable[Iterable[Gate]]) -> list[Gate]:
    """Returns every gate of several goes or processes of one run, of each name the worst.

    What voids a part voids the whole, and stands whatever fewer attacks read of it later. Of equals
    the first is kept.
    """
    order: tuple[Status, ...] = ("not run", "pass", "warn", "void")
    found: dict[str, Gate] = {}
    for one in (one for part in parts for one in part):
        known = found.setdefault(one["name"], one)
        if order.index(one["status"]) > order.index(known["status"]):
            found[one["name"]] = one
    return list(found.values())


def told(one: Gate) -> str:
    """Writes a gate for a message: its name, what was found, what to do."""
    return f"{one['name']}: {one['sentence']}" + (f" {one['remedy']}" if one["remedy"] else "")
