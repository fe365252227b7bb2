"""Reads the header of a GGUF file without trusting it: metadata, and where the tensors lie.

GGUF is the file format of llama.cpp (its description: `docs/gguf.md` of `ggml-org/ggml`). Here is
what both the tokenizer and the weights of such a file need; NumPy and the standard library only.
Every length and count is held against what is left of the header before anything is made of it.
"""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeVar

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.untrusted import open_file, printable, shown

SUFFIX = ".gguf"
VERSIONS = (2, 3)
"""Both are laid out alike; version 1 counted in 32 bits."""
HEADER_BYTES = 32 * 2**20
"""Most bytes before the tensors: a vocabulary of 262,144 tokens with 514,906 merges takes 16 MB."""
STRINGS = 2**20
"""Most strings of all lists together, which take a second; such a vocabulary has 777,050."""
FIELDS = 2**12
"""Most fields of the metadata; a published file has 20 to 60."""
TENSORS = 2**18
"""Most tensors: 16,384 layers of 12 have fewer."""
KEY_BYTES = 2**16 - 1
NAME_BYTES = 64
"""Most bytes of a key and of a tensor's name, by the format."""
DIMENSIONS = 4
_STRING, _ARRAY, _FLOAT32, _BOOL = 8, 9, 6, 7
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, _FLOAT32, _BOOL, 10, 11, 12), "BbHhIif?Qqd"))
"""Type of a value -> its `struct` code."""
T = TypeVar("T")


class Stored(NamedTuple):
    """Says how and where a tensor is stored; its size in bytes depends on its type."""

    shape: tuple[int, ...]
    """In the order of PyTorch: the last axis is contiguous."""
    kind: int
    """The format's number of the type, such as 0 for float32."""
    start: int
    """Its first byte in the file."""


class Header(NamedTuple):
    """Holds what stands before the tensors of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    """Strings, numbers and booleans; lists of strings; arrays of numbers."""
    tensors: dict[str, Stored]
    size: int
    """Bytes of the whole file."""

    def get(self, key: str, kind: type[T]) -> T | None:
        """Returns a value of the metadata, None if it is absent.

        Raises `ModelError` if it is of another type than `kind`.
        """
        found = self.metadata.get(key)
        if found is not None and type(found) is not kind:
            self.refuse(f"{key} is {shown(found)}; expected {kind.__name__}")
        return found

    def refuse(self, problem: str) -> NoReturn:
        """Raises `ModelError` about this file."""
        raise ModelError(f"{self.path}: {problem}")


def find(path: Path) -> Path | None:
    """Returns the GGUF file that a path stands for; None if it stands for something else.

    That is the file itself, or the only one in a folder that holds no other weights. Raises
    `ModelError` for a folder with several.
    """
    if os.path.isfile(path):  # False, too, where the path cannot be
        return path if path.suffix.lower() == SUFFIX else None
    if not os.path.isdir(path) or (path / "orbax").is_dir() or any(path.glob("*.safetensors*")):
        return None
    found = sorted(f for f in path.iterdir() if f.suffix.lower() == SUFFIX)
    if len(found) > 1:
        names = printable(", ".join(f.name for f in found[:3]), 200)
        raise ModelError(f"{path}: holds {len(found)} GGUF files ({names}); name the file itself")
    return found[0] if found else None


def read_header(path: Path) -> Header:
    """Reads the header of a file, which is of one part. Raises `ModelError`."""
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = Header(path, *_read(_Bytes(file, size)), size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ModelError(
            f"{path}: not a sound GGUF file ({error}); download or convert it again"
        ) from None
    if (parts := header.get("split.count", int) or 0) > 1:
        header.refuse(
            f"is one of {parts:,} parts of a model; join them with `llama-gguf-split --merge`"
        )
    if (kind := header.get("general.type", str) or "model") != "model":
        header.refuse(f"general.type is {shown(kind)}; expected a model")
    return header


class _Bytes:
    """Gives the bytes of a header one after another, never more than are left of it."""

    def __init__(self, file: BinaryIO, size: int):
        self.at, self.strings = 0, 0
        self._file, self._end = file, min(size, HEADER_BYTES)

    def take(self, count: int) -> bytes:
        if count > self._end - self.at:
            raise ValueError(
                f"at byte {self.at:,} something of {count:,} bytes begins, but a header of at most "
                f"{self._end:,} ends before"
            )
        self.at += count
        found = self._file.read(count)
        if len(found) < count:
            raise ValueError("it has become shorter")
        return found

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self, limit: int = HEADER_BYTES) -> str:
        length = int.from_bytes(self.take(8), "little")
        if length > limit:
            raise ValueError(f"a text of {length:,} bytes, expected at most {limit:,}")
        return self.take(length).decode()

    def count(self, what: str, most: int) -> int:
        found = self.number("Q")
        if found > most:
            raise ValueError(f"{found:,} {what}, expected at most {most:,}")
        return found


def _read(data: _Bytes) -> tuple[dict[str, Any], dict[str, Stored]]:
    if (magic := data.take(4)) != b"GGUF":
        raise ValueError(f"it begins with {shown(magic)}, expected b'GGUF'")
    if (version := data.number("I")) not in VERSIONS:
        other = "; the file is big-endian" if version >= 2**16 else ""
        raise ValueError(f"version {version}, expected {VERSIONS[0]} or {VERSIONS[1]}{other}")
    tensors = data.count("tensors", TENSORS)
    fields = data.count("fields", FIELDS)
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        key = data.string(KEY_BYTES)
        if key in metadata:
            raise ValueError(f"{printable(key)} is there twice")
        metadata[key] = _value(data, data.number("I"))
    found = dict[str, Stored]()
    for _ in range(tensors):
        name = data.string(NAME_BYTES)
        axes = data.number("I")
        if name in found or not 1 <= axes <= DIMENSIONS:
            wrong = "is there twice" if name in found else f"has {axes:,} axes"
            raise ValueError(f"tensor {printable(name)} {wrong}")
        shape = struct.unpack(f"<{axes}Q", data.take(8 * axes))[::-1]
        found[name] = Stored(shape, data.number("I"), data.number("Q"))
    return metadata, _placed(found, metadata.get("general.alignment", 32), data.at)


def _value(data: _Bytes, kind: int) -> Any:
    if kind == _STRING:
        return data.string()
    if kind == _FLOAT32:
        # 1e-05 is stored as 9.999999747378752e-06: what was rounded is the shortest of all numbers
        # that round to it, and whoever computes in float32 rounds it again.
        return float(str(np.float32(data.number("f"))))
    if kind in _NUMBERS:
        return data.number(_NUMBERS[kind])
    if kind != _ARRAY:
        raise ValueError(f"a value of type {kind}, expected 0 to 12")
    inner, count = data.number("I"), data.number("Q")
    if inner == _STRING:
        data.strings += count
        if data.strings > STRINGS:
            raise ValueError(f"lists of {data.strings:,} strings, expected at most {STRINGS:,}")
        return [data.string() for _ in range(count)]
    if inner not in _NUMBERS:
        raise ValueError(f"a list of type {inner}, expected strings or numbers")
    dtype = np.dtype("<" + _NUMBERS[inner])
    return np.frombuffer(data.take(count * dtype.itemsize), dtype)


def _placed(tensors: dict[str, Stored], alignment: Any, end: int) -> dict[str, Stored]:
    """Counts the tensors' offsets from the beginning of the file: they follow the header."""
    if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 2**20:
        raise ValueError(f"general.alignment is {shown(alignment)}, expected a multiple of 8")
    start = -(-end // alignment) * alignment
    wrong = [name for name, tensor in tensors.items() if tensor.start % alignment]
    if wrong:
        raise ValueError(f"tensor {printable(wrong[0])} is not at a multiple of {alignment} bytes")
    return {name: t._replace(start=start + t.start) for name, t in tensors.items()}
