"""Defines what a reader is to the fuzz, and the good inputs that commands need besides."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny

from fuzz import mutations

TEXTS = 12
MAX_LENGTH = 32
LEAN = ["--quiet", "--no-figures", *tiny.SETTINGS]


class Reader(NamedTuple):
    """One way into the program. `good` is a folder of good inputs, `root` the spoilt one."""

    make: Callable[[Path], Any]
    """Makes a folder for each variant of the good input."""
    spoilt: tuple[str, ...]
    """Patterns of the files that are spoilt."""
    read: Callable[[Path], Any] | None = None
    command: Callable[[Path, Path], list[str]] | None = None
    """(root, good) -> a command line, that of `checkpoints_convert` if it begins with `convert`."""
    check: Callable[[Path], Any] | None = None
    """Looks at what a command left that ended with 0."""
    extra: Callable[[random.Random, Path], Any] | None = None
    """Spoils in a way of its own; used for one input in five."""
    pipes: bool = True
    """Whether a pipe may stand in the place of a file; who reads texts waits for one, as `cat`."""
    patience: float = 1.0
    """Times the limit of seconds: more where a good input computes something."""


def spoil(reader: Reader, draw: random.Random, root: Path) -> None:
    """Spoils the good input in `root`."""
    if reader.extra is not None and draw.random() < 0.2:
        reader.extra(draw, root)
        return
    found = sorted(str(f.relative_to(root)) for p in reader.spoilt for f in root.glob(p))
    names = [name for name in found if (root / name).is_file()]
    mutations.spoil(draw, root, names, pipes=reader.pipes)


def good(root: Path) -> None:
    """What commands need besides the file that is spoilt: models, texts, a finished audit."""
    from sama_jax.cli import entry

    for seed, name in enumerate(("target", "reference")):
        tiny.folder(root / name, seed=seed)
    tiny.write_texts(root / "texts.jsonl", tiny.texts(TEXTS, (4, 20)))
    assert entry.main(audit(root, root, root / "texts.jsonl", "--attacks", "sama,loss,ratio")) == 0


def audit(root: Path, good: Path, data: Path, *more: str) -> list[str]:
    """An audit of the good models."""
    models = ["--target", str(good / "target"), "--reference", str(good / "reference")]
    return ["audit", *models, "--data", str(data), "--out", str(root / "out"), *LEAN, *more]


def write(path: Path, content: bytes) -> None:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
