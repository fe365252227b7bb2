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


def worst_of(earlier: Iterable[Gate], now: Iterable[Gate]) -> list[Gate]:
    """Returns the gates of now, each replaced by the earlier one of its name if that is not better.

    What voids a run stands, whatever fewer attacks read of it later.
    """
    order: tuple[Status, ...] = ("not run", "pass", "warn", "void")
    known = {one["name"]: one for one in earlier}
    return [
        max(known.get(one["name"], one), one, key=lambda gate: order.index(gate["status"]))
        for one in now
    ]


def told(one: Gate) -> str:
    """Writes a gate for a message: its name, what was found, what to do."""
    return f"{one['name']}: {one['sentence']}" + (f" {one['remedy']}" if one["remedy"] else "")
