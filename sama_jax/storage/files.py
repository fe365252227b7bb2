"""Writes files so that they survive a crash: atomic files, appended lines, a full disk.

Standard library only. A file that is written whole appears whole (NAME.sama-XXXXXXXX.part,
then rename); a file that grows is cut back to its last complete line when it is opened again.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sama_jax import untrusted
from sama_jax.errors import DataError, OutputError, UsageError

LINE_BYTES = 64 * 2**20
"""Most bytes of a line of JSON Lines; one of a text with 36 scores and its votes takes 10 kB."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns every OSError inside into an `OutputError` (exit code 74) that names `path`."""
    try:
        yield
    except OSError as error:
        what = "free some space, then" if error.errno in _FULL else "choose another place, or"
        raise OutputError(
            f"{path}: cannot write ({error.strerror or error}); {what} run the same command again: "
            "it continues"
        ) from None


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns every OSError inside into a `DataError` (exit code 3) that names `path`.

    So it does with the ValueError of `untrusted`, where the file is none or too large.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading. Raises `DataError` where it cannot be read, or is a pipe."""
    with readable(path):
        try:
            file = untrusted.open_file(path)
        except ValueError as error:
            raise DataError(f"{path}: {error}, and it is none; move it away") from None
        with file:
            yield file


def write_atomic(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Writes a whole file or nothing; a `private` one for its owner's eyes alone."""
    pieces = [encoded(content) if isinstance(content, str) else content]
    write_pieces(path, pieces, mode=0o600 if private else 0o666)


def copy_file(source: Path, target: Path) -> None:
    """Copies a regular file, whole or not at all.

    Raises:
      DataError: the source cannot be read, or is a pipe or a device.
      OutputError: the target cannot be written.
    """
    write_pieces(target, _pieces(source))


def _pieces(path: Path) -> Iterator[bytes]:
    with opened(path) as file:
        while piece := file.read(2**20):
            yield piece


def write_pieces(path: Path, pieces: Iterable[bytes], mode: int = 0o666) -> None:
    """Writes a file piece by piece, whole or not at all; replaces nothing else.

    `mode` is that of the file, less what the user's mask takes from it.

    What processes that were killed in the middle of it have left is removed.
    """
    part = path.with_name(f"{path.name}.sama-{secrets.token_hex(4)}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb", opener=lambda name, how: os.open(name, how, mode)) as file:
            try:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.replace(part, path)
            except BaseException:  # Ctrl-C among them
                part.unlink(missing_ok=True)
                raise
        for left in path.parent.glob(f"{glob.escape(path.name)}.sama-{'[0-9a-f]' * 8}.part"):
            left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all; NaN and infinity are refused."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def encoded(text: str) -> bytes:
    r"""Encodes as UTF-8; lone surrogates, which have none, become `\ud800` and the like.

    That is how JSON spells them, so an id or a path that holds one is read back as it was.
    """
    return text.encode("utf-8", "backslashreplace")


SEAL = "seal"
"""Field of an object that holds its checksum."""


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Adds a checksum to an object, so that a digit that changes on a disk does not pass."""
    return value | {SEAL: _checksum(value)}


def unsealed(value: Any) -> dict[str, Any] | None:
    """Returns the object that `sealed` was given; None if this is not what it gave."""
    if not isinstance(value, dict):
        return None
    rest = {name: item for name, item in value.items() if name != SEAL}
    return rest if value.get(SEAL) == _checksum(rest) else None


def _checksum(value: dict[str, Any]) -> str:
    return sha256_of(value)[:8]


def sha256_of(value: dict[str, Any]) -> str:
    """Returns the SHA-256 of an object as JSON with sorted names: 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


MADE_BY = "made_by"
"""Field of the JSON files that a flag names, by which they are known again."""


def require_free(path: Path | None, mark: str | frozenset[str]) -> None:
    """Makes sure that writing a file that a flag names would replace nothing but one of its kind.

    Args:
      path: the file; None: the flag was not given.
      mark: what the JSON file says of its maker, or the arrays of an npz file.

    Raises:
      UsageError: something else stands there, such as an input of the command.
    """
    if path is None or not os.path.lexists(path) or (path.is_file() and _has_mark(path, mark)):
        return
    raise UsageError(
        f"{path}: exists and was not written by this command, so it is not replaced; give a new "
        "name, or move it away"
    )


def require_new(folder: Path) -> None:
    """Raises `UsageError` if something stands in the place of a new folder, but an empty one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty; give a new folder")


def _has_mark(path: Path, mark: str | frozenset[str]) -> bool:
    try:
        if isinstance(mark, str):
            found = untrusted.read_json(path)
            return isinstance(found, dict) and found.get(MADE_BY) == mark
        with zipfile.ZipFile(path) as file:
            return {f"{name}.npy" for name in mark} <= set(file.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


class AppendOnly:
    """A file that only grows. Each `append` is one write at the end; a failed one is undone.

    One process at a time: two would not know where each other's writes end.
    """

    def __init__(self, path: Path, keep: int | None = None):
        """Opens `path`, cut back to its first `keep` bytes (None: all)."""
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0, opener=_at_once)  # noqa: SIM115
            if not _lock(self._file.fileno()):
                self._file.close()
                raise UsageError(
                    f"{path}: another process is writing to it; wait for it to end, or choose "
                    "another folder"
                )
            if keep is not None:
                self._file.truncate(keep)
            self._end = os.fstat(self._file.fileno()).st_size if keep is None else keep

    def append(self, data: bytes) -> int:
        """Adds `data`; returns the offset where it begins."""
        with writing(self.path):
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:]) or 0
            except OSError:
                self._file.truncate(self._end)
                raise
        start, self._end = self._end, self._end + len(data)
        return start

    def append_json(self, *values: Any) -> None:
        """Adds one JSON line a value, all in one write."""
        lines = "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values)
        self.append(encoded(lines))

    def close(self) -> None:
        """Closes the file, and lets other processes append to it."""
        self._file.close()


def _at_once(path: str, flags: int) -> int:
    """Opens a file; a named pipe, which would wait until somebody reads it, is an `OSError`."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes that ask in the same way out of it.

    Raises `UsageError` if one of them has it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(handle):
            raise UsageError(
                f"{folder}: another process is writing to it; wait for it to end, or choose "
                "another folder"
            )
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Claims an open file or folder until it is closed or the process ends.

    Returns:
      False if another process has it; True where the system or file system knows no locks.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def read_json_lines(path: Path) -> tuple[list[Any], int]:
    """Reads the JSON lines of a file that may end in the middle of one.

    A broken line costs itself alone: the lines behind it were whole when they were appended.

    Returns:
      the values, and where the last complete line ends; nothing of a file that does not exist.
    """
    values: list[Any] = []
    at = end = 0
    if not os.path.isfile(path):  # False, too, where the path cannot be
        return values, end
    with readable(path), untrusted.open_file(path) as file:
        while line := file.readline(LINE_BYTES):
            at += len(line)
            if line.endswith(b"\n"):
                end = at
                with contextlib.suppress(ValueError):
                    values.append(untrusted.parse_json(line))
    return values, end


def read_whole_json_lines(path: Path, expected: str) -> list[dict[str, Any]]:
    """Reads JSON lines that were written whole, one object a line.

    Args:
      path: the file.
      expected: what the file is, for the message.

    Raises:
      DataError: it cannot be read, or a line of it is none.
    """
    found = []
    with readable(path), untrusted.open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), 1):
            try:
                value = untrusted.parse_json(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}: line {number} is not whole; expected {expected}, which is written at "
                    "once: copy it again, or run the audit's own command again, which makes it anew"
                )
            found.append(value)
    return found
