"""Opens files of texts as streams of UTF-8, also those that are compressed or in UTF-16."""

import codecs
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sama_jax.errors import DataError, UsageError

UNPACKED_BYTES, UNPACKED_RATIO = 2**28, 50
"""A compressed file may hold the first, or as many times its size as the second says. Texts shrink
to a third or a tenth, a gigabyte of zeros to a thousandth."""

_PIECE = 2**18
_ZSTD_PIECE = 2**10
"""Bytes that are unpacked at once. Three bytes of zstd can stand for a block of 128 KiB (RFC 8878),
so these may become 45 MB."""
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
"""How a frame begins, and one to be skipped, which parallel compressors write first (RFC 8878)."""
_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def most_bytes(packed: int) -> int:
    """Returns how many bytes a compressed file of texts may hold, by its own size."""
    return max(UNPACKED_BYTES, UNPACKED_RATIO * packed)


def unpacked(path: Path, file: io.BufferedReader) -> io.BufferedReader:
    """Returns what an open file holds, as UTF-8 if it says that it is UTF-16.

    What cannot be unpacked, or is too much, raises `DataError` while it is read.

    Raises `UsageError` for zstd without the package `zstandard`.
    """
    head = file.peek(4)
    if head[:2] == b"\x1f\x8b":
        file = _opened(_limited(path, file, _gzip_pieces(path, file)))
    elif _ZSTD.match(head):
        file = _opened(_limited(path, file, _zstd_pieces(path, file, _decompressor(path))))
    head = file.peek(4)
    # The mark of UTF-32 begins with that of UTF-16.
    if head[:2] in _MARKS and head[:4] != codecs.BOM_UTF32_LE:
        file = _opened(_utf8_pieces(path, file))
    return file


class _Pieces(io.RawIOBase):
    """Reads bytes that come piece by piece."""

    def __init__(self, pieces: Iterator[bytes]):
        super().__init__()
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _opened(pieces: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Pieces(pieces), 2**20)


def _limited(path: Path, file: io.BufferedReader, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Passes pieces on. Raises `DataError` when they are more than such a file can hold."""
    limit, total = most_bytes(os.fstat(file.fileno()).st_size), 0
    for piece in pieces:
        total += len(piece)
        if total > limit:
            raise DataError(
                f"{path}: unpacks to more than {limit:,} bytes, more than {UNPACKED_RATIO} times "
                "its size; no file of texts does; unpack it to read it"
            )
        yield piece


def _gzip_pieces(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    unpacking = gzip.GzipFile(fileobj=file)
    try:
        while piece := unpacking.read(_PIECE):
            yield piece
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, "gzip", error) from None


def _decompressor(path: Path) -> Callable[[], Any]:
    """Returns what makes a decompressor of one zstd frame."""
    try:
        import zstandard
    except ImportError:
        raise UsageError(
            f"{path}: reading zstd needs zstandard; pip install 'sama-jax[zst]'"
        ) from None
    return zstandard.ZstdDecompressor().decompressobj


def _zstd_pieces(path: Path, file: io.BufferedReader, begin: Callable[[], Any]) -> Iterator[bytes]:
    """Unpacks zstd, frame by frame: the package's own stream takes a truncated file for whole."""
    import zstandard

    frame, data = begin(), b""
    started = False
    while data or (data := file.read(_ZSTD_PIECE)):
        try:
            piece = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise _damaged(path, "zstd", error) from None
        started, data = not frame.eof, frame.unused_data
        if frame.eof:
            frame = begin()
        yield piece
    if started:
        raise _damaged(path, "zstd", "its last frame does not end")


def _damaged(path: Path, kind: str, reason: Exception | str) -> DataError:
    return DataError(f"{path}: the {kind} file is truncated or damaged ({reason}); copy it again")


def _utf8_pieces(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-16")()
    try:
        while piece := file.read(_PIECE):
            yield decoder.decode(piece).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: begins as UTF-16 does, but is not UTF-16 text ({error.reason}); save it as "
            "UTF-8"
        ) from None
