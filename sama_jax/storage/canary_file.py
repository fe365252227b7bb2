"""Keeps canaries: their texts in one file, and in another which of them are to be trained on."""

from pathlib import Path
from typing import Any, NamedTuple

from sama_jax.errors import DataError
from sama_jax.storage.files import MADE_BY, readable, sha256_of, write_json
from sama_jax.storage.shapes import misfit
from sama_jax.untrusted import read_json

TEXTS = "canaries.jsonl"
KEY = "canaries.json"
_MAKER = "sama-jax canary make"
_SEAL = "sha256"


class Canary(NamedTuple):
    """One canary; its text stands in another file."""

    sha256: str
    """Of its text."""
    kind: str
    """`sampled` from the reference, or of `random` tokens."""
    copies: int
    """How often it stands in the training data if it is included."""
    included: bool
    """What its coin said."""


class CanaryKey(NamedTuple):
    """Which canaries there are, which of them are included, and what was fixed beforehand."""

    canaries: list[Canary]
    seed: int
    """Of texts, coins, and places in the training data."""
    attack: str
    """Whose scores the bound is computed from."""
    about: dict[str, Any]
    """How they were made."""


_SHAPE = {
    "seed": int,
    "attack": str,
    "about": {str: object},
    "canaries": [{"sha256": str, "kind": str, "copies": int, "included": bool}],
    MADE_BY: str,
    _SEAL: str,
}


def write_key(path: Path, key: CanaryKey) -> str:
    """Writes the key of canaries. Returns the SHA-256 of what it says, which it holds, too."""
    rows = [one._asdict() for one in key.canaries]
    made = {MADE_BY: _MAKER, **key._asdict(), "canaries": rows}
    digest = sha256_of(made)
    write_json(path, made | {_SEAL: digest})
    return digest


def read_key(folder: Path) -> CanaryKey:
    """Reads the key in a folder of canaries. Raises `DataError` unless it is as it was written."""
    path = folder / KEY
    with readable(path):
        found = read_json(path)
    wrong = misfit(found, _SHAPE)
    if wrong is not None or found[MADE_BY] != _MAKER:
        raise DataError(
            f"{path}: expected the key that `sama-jax canary make` wrote, found another file"
        )
    rest = {name: value for name, value in found.items() if name != _SEAL}
    if found[_SEAL] != sha256_of(rest):
        raise DataError(f"{path}: is not as it was written (its SHA-256 differs); copy it again")
    canaries = [Canary(*(one[name] for name in Canary._fields)) for one in found["canaries"]]
    return CanaryKey(canaries, found["seed"], found["attack"], found["about"])
