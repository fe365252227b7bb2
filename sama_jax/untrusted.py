"""Reads what others wrote without trusting it: regular files of bounded size, one kind of error.

Standard library only. Whoever reads a file of a model folder, a run folder or a user goes through
here, so that a named pipe, a file of a terabyte or JSON that is nested 100,000 times deep is a
`ValueError` that the caller turns into a message with its own exit code.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES = 256 * 2**20
"""Most bytes of a JSON file: the index of a model with 100,000 tensors takes 10 MB, the
tokenizer.json of a vocabulary of 256,000 tokens 35 MB."""
SHOWN = 60
"""Characters of a foreign text that a message shows at most."""


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises `OSError`; `ValueError` if it is no regular file."""
    # A named pipe blocks whoever opens it until somebody writes, so it is opened without waiting.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("expected a regular file")
    return open(descriptor, "rb")


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """Reads a regular file of at most `limit` bytes.

    Raises:
      OSError: it cannot be read.
      ValueError: it is a pipe, a device or a folder, or it has more bytes.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"expected at most {limit:,} bytes, found {size:,}")
        # As much is allocated as is asked for. It may have grown, and those in /proc say 0.
        bound = min(limit, size + 2**20)
        content = file.read(bound + 1)
    if len(content) > bound:
        raise ValueError(f"expected at most {bound:,} bytes")
    return content


class RepeatedKey(ValueError):
    """A key stands twice in one JSON object: readers take the first or the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of which no key stands twice. Raises `RepeatedKey`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise RepeatedKey(f"JSON with the key {shown(twice)} twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Made once: `json.loads` with a hook makes one a call, twice the time for a line of text."""


def parse_json(content: str | bytes) -> Any:
    """Parses JSON. Raises `ValueError`, whatever is wrong with it, also for a key that repeats."""
    if isinstance(content, bytes):
        content = content.decode(json.detect_encoding(content), "surrogatepass")
    try:
        return _DECODER.decode(content)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """Reads a JSON file. Raises `OSError` if it cannot be read, `ValueError` if it is no JSON."""
    return parse_json(read_bytes(path, limit).decode("utf-8"))


def shown(value: Any, limit: int = SHOWN) -> str:
    """Returns a foreign value for a message, as Python spells it: cut and escaped."""
    return printable(repr(value), limit)


def printable(text: str, limit: int = SHOWN) -> str:
    """Returns a foreign text for a message: cut, and without what moves a terminal's cursor.

    Control characters, line breaks and lone surrogates are escaped as in a Python string.
    """
    shown = text[:limit]
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return escaped + ("…" if len(text) > limit else "")
