"""All readers, and culprits that do what no reader may: the harness has to notice them."""

import os
import time
from pathlib import Path

from fuzz import models, port, runs, texts
from fuzz.reader import Reader, write
from sama_jax.errors import ModelError

READERS = texts.READERS | models.READERS | runs.READERS | port.READERS


def _nothing(root: Path) -> None:
    write(root / "one" / "texts.jsonl", b'{"text": "karo"}\n')


def _raise(error: BaseException) -> None:
    raise error


def _wrong(root: Path) -> None:
    assert not root, "a result that is wrong"


CULPRITS = {
    "traceback": lambda root: _raise(KeyError("a field")),
    "message": lambda root: _raise(ModelError("colour \x1b[31m")),
    "code": lambda root: _raise(type("Own", (ModelError,), {"exit_code": 9})("unknown code")),
    "memory": lambda root: bytearray(2**31),
    "hang": lambda root: time.sleep(60),
    "died": lambda root: os.abort(),
    "wrong": _wrong,
}
"""Kind of a finding -> a reader that is one."""
READERS |= {f"culprit-{kind}": Reader(_nothing, ("*",), read) for kind, read in CULPRITS.items()}
