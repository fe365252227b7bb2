"""Counts what passes between devices, from the text of a compiled program."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_OPERATION = re.compile(
    r" = (?P<result>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+\d+)\w*\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|calls|to_apply)=%?(?P<name>[\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{(?P<names>[^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")


class Traffic(NamedTuple):
    """Collectives of a kind in one pass of the scorer, on one device."""

    count: int
    bytes: int
    """Size of their results; a ring moves about twice that for an all-reduce."""


def collectives(program: str) -> dict[str, Traffic]:
    """Counts the collectives of an HLO text (`compiled.as_text()`).

    A loop over layers or chunks counts as often as it runs, the loop over passes once, of the
    branches of a conditional the one with the most bytes.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head["name"]
            lines[name] = []
            entry = name if head["entry"] else entry
        elif name:
            lines[name].append(line)
    return _traffic(entry, lines, {})


def _traffic(
    name: str, lines: dict[str, list[str]], known: dict[str, dict[str, Traffic]]
) -> dict[str, Traffic]:
    """Counts the collectives of a computation and of what it calls."""
    if name not in known:
        total: dict[str, Traffic] = {}
        for line in lines.get(name, []):
            operation = _OPERATION.search(line)
            if operation:
                one = Traffic(1, _bytes(operation))
                _add(total, {operation["kind"]: one}, 1)
                continue
            for called in _called(line, lines, known):
                _add(total, called, _trips(line, lines))
        known[name] = total
    return known[name]


def _trips(line: str, lines: dict[str, list[str]]) -> int:
    """Returns how often an operation runs what it calls.

    XLA writes it down for CPUs; for TPUs it is the constant that the loop's condition compares its
    counter with. The loop over passes has none.
    """
    written, condition = _TRIPS.search(line), _CONDITION.search(line)
    if written:
        return int(written[1])
    found = _CONSTANT.findall("\n".join(lines.get(condition[1], []))) if condition else []
    return int(found[0]) if len(found) == 1 else 1


def _called(
    line: str, lines: dict[str, list[str]], known: dict[str, dict[str, Traffic]]
) -> Iterator[dict[str, Traffic]]:
    for called in _CALLED.finditer(line):
        yield _traffic(called["name"], lines, known)
    branches = _BRANCHES.search(line)
    if branches:
        names = [name.strip().lstrip("%") for name in branches["names"].split(",")]
        each = [_traffic(name, lines, known) for name in names]
        yield max(each, key=lambda found: sum(x.bytes for x in found.values()))


def _add(total: dict[str, Traffic], more: dict[str, Traffic], times: int) -> None:
    for kind, traffic in more.items():
        old = total.get(kind, Traffic(0, 0))
        total[kind] = Traffic(old.count + times * traffic.count, old.bytes + times * traffic.bytes)


def _bytes(operation: re.Match[str]) -> int:
    """Returns the bytes of an operation's result.

    The start of an asynchronous operation also returns its operand, which is not larger; an
    all-reduce returns its results alone.
    """
    sizes = []
    for array in _ARRAY.finditer(operation["result"]):
        bits = 8 if array["type"] == "pred" else int(re.sub(r"\D", "", array["type"]))
        sizes.append(int(np.prod([int(n) for n in array["shape"].split(",") if n])) * bits // 8)
    if operation["start"] and operation["kind"] != "all-reduce":
        return max(sizes, default=0)
    return sum(sizes)
