"""Reads the tensors of a model folder by their canonical names, window by window.

Nothing is unpickled and no code of a folder is run.
"""

import functools
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Table
from sama_jax.untrusted import printable
from sama_jax.weights import stored_bytes
from sama_jax.weights.parts import Part, Tensor
from sama_jax.weights.quantised import Method
from sama_jax.weights.safetensors import DTYPES, tensor_starts, weight_files


class SourceTensor(NamedTuple):
    """Says where one tensor of a folder is."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Source:
    """Holds the tensors of a model folder by their canonical names, and opens each file once."""

    def __init__(self, tensors: dict[str, SourceTensor], handles: dict[Path, Any], stamp: str):
        """Holds tensors and open files; `stamp` is what `same_files` said before."""
        self.tensors, self.stamp = tensors, stamp
        self.bytes_read = 0
        """Bytes that `window` has returned."""
        self._handles = handles
        self._lock = threading.Lock()

    def window(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a window of a tensor in its stored dtype. Several threads may call it.

        Raises `ModelError` for a damaged file.
        """
        tensor = self.tensors[name]
        try:
            values = self._handles[tensor.file].get_slice(tensor.name)[index]
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{tensor.file}: cannot read tensor {printable(tensor.name)} ({error})"
            ) from None
        with self._lock:
            self.bytes_read += values.nbytes
        return values

    @property
    def files(self) -> list[tuple[str, Path]]:
        """The files that hold the tensors, by names that do not depend on where the folder is."""
        return [(file.name, file) for file in self._handles]

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of all stored bytes, computed when it is first asked for."""
        found = stored_bytes.digest(self.files)
        self.require_unchanged()
        return found

    def require_unchanged(self) -> None:
        """Raises `ModelError` if a file is another one than when the folder was opened.

        Then its numbers would stand under the identity of what was there before.
        """
        if stored_bytes.same_files(self.files) != self.stamp:
            where = self.files[0][1].parent
            raise ModelError(
                f"{where}: its weights have changed since they were opened; wait until nothing "
                "writes there any more, then run the same command again"
            )

    def unlisted(self) -> list[str]:
        """Returns the names of weight files that the folder's index does not list."""
        beside = {f for file in self._handles for f in file.parent.glob("*.safetensors")}
        return sorted(file.name for file in beside - self._handles.keys())

    def dtype(self) -> str:
        """Returns the dtype that most tensors are stored in, such as `bfloat16`."""
        names = [t.dtype for t in self.tensors.values()]
        return max(set(names), key=names.count)


def open_source(
    folder: Path, table: Table, block_group_size: int = 1, method: Method | None = None
) -> Source:
    """Reads all headers of a folder; `method` says how its weights are quantised.

    A tensor that appears twice is a `ModelError`.
    """
    handles: dict[Path, Any] = {}
    files = weight_files(folder)
    stamp = stored_bytes.same_files([(file.name, file) for file in files])
    parts: list[Part] = []
    for file in files:
        handles[file], stored = _parts(file)
        parts += stored
    tensors: Sequence[Tensor] = parts
    if method is not None:
        tensors = method.assembled(parts)
        handles = {file: _Whole({t.name: t for t in tensors if t.file == file}) for file in files}
    return Source(_named(folder, tensors, table, block_group_size), handles, stamp)


class _Whole(dict[str, Tensor]):
    """Holds the tensors of a file, some made of several; used as `safetensors.safe_open` is."""

    get_slice = dict.__getitem__


def _parts(file: Path) -> tuple[Any, list[Part]]:
    """Opens a file. Returns it, and its tensors as they are stored."""
    try:
        handle = safe_open(file, framework="numpy")
        starts, found = tensor_starts(file), []
        for name in handle.keys():  # noqa: SIM118  safe_open is not iterable
            piece = handle.get_slice(name)
            dtype = DTYPES.get(piece.get_dtype(), str(piece.get_dtype()))
            found.append(Part(file, name, tuple(piece.get_shape()), dtype, handle, starts[name]))
        return handle, found
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a complete safetensors file ({printable(str(error), 200)}); download "
            "or save it again"
        ) from None


def _named(
    folder: Path, stored: Sequence[Tensor], table: Table, block_group_size: int
) -> dict[str, SourceTensor]:
    """Returns tensors by their canonical names. Raises `ModelError` for one that stands twice."""
    tensors: dict[str, SourceTensor] = {}
    twice = []
    for tensor in stored:
        key = table.name_of(tensor.name, block_group_size)
        if table.ignored and table.ignored.search(key):
            continue
        for pattern, advice in table.refused:
            if re.search(pattern, key):
                raise ModelError(f"{tensor.file}: tensor {printable(tensor.name)}: {advice}")
        if key in tensors:
            pair = tensors[key], tensor
            twice.append(" and ".join(f"{printable(t.name, 120)} ({t.file.name})" for t in pair))
        tensors[key] = SourceTensor(tensor.file, tensor.name, tensor.shape, tensor.dtype)
    if twice:
        raise ModelError(
            f"{folder}: the same tensor twice ({len(twice)} tensors): " + "; ".join(twice[:20])
        )
    return tensors
