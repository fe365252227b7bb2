"""Reads the tensors of safetensors files as they are stored, of any type of the format."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from sama_jax.errors import ModelError
from sama_jax.untrusted import open_file, printable

FLOAT8 = "F8_E4M3"
"""The format's code of 8-bit floats, which the library cannot give to NumPy."""


@runtime_checkable
class Tensor(Protocol):
    """Is a tensor of a file, or one that is made of several; `tensor[index]` reads a window."""

    @property
    def file(self) -> Path:
        """The file that holds its values, or most of them."""
        ...

    @property
    def name(self) -> str:
        """What it is called there."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    @property
    def dtype(self) -> str:
        """Of what is read, by NumPy's name; of what NumPy has not, the format's code."""
        ...

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclass(frozen=True)
class Part:
    """Is one tensor of a safetensors file, as it is stored; `part[index]` reads a window of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name of what weights may be stored in, else the format's code, such as `U8`."""
    handle: Any
    """The file, opened by the library."""
    start: int
    """Where it begins in the file."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a window. Raises `OSError` or the library's own error."""
        if self.dtype == FLOAT8:
            return self._float8(index)
        return self.handle.get_slice(self.name)[index]

    def whole(self) -> np.ndarray:
        """Reads all of it."""
        return self[(slice(None),) * len(self.shape)]

    def _float8(self, index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[0].indices(self.shape[0])
        row = math.prod(self.shape[1:])
        with open_file(self.file) as file:
            file.seek(self.start + first * row)
            content = file.read(max(last - first, 0) * row)
        if len(content) < (last - first) * row:
            raise OSError("it has become shorter")
        values = np.frombuffer(content, ml_dtypes.float8_e4m3fn)
        return values.reshape(-1, *self.shape[1:])[:, *index[1:]]

    def require(self, shape: tuple[int, ...], *dtypes: str) -> "Part":
        """Returns itself. Raises `ModelError` unless it has this shape and one of these types."""
        if self.shape != shape or self.dtype not in dtypes:
            raise ModelError(
                f"{self.file}: tensor {printable(self.name, 200)} is {self.dtype} "
                f"{list(self.shape)}; expected {' or '.join(dtypes)} {list(shape)}, by its "
                "config.json and the tensors beside it"
            )
        return self

    def require_matrix(self, *dtypes: str) -> "Part":
        """Returns itself. Raises `ModelError` unless it has two axes and one of these types."""
        rows, columns = (*self.shape, 1, 1)[:2]
        return self.require((rows or 1, columns or 1), *dtypes)


def needed(name: str, parts: Mapping[str, Part], *labels: str) -> list[Part]:
    """Returns the parts of a weight by their labels. Raises `ModelError` if one is missing."""
    missing = [label for label in labels if label not in parts]
    if missing:
        where = next(iter(parts.values())).file
        raise ModelError(
            f"{where}: tensor {printable(name, 200)} is quantised, but its {', '.join(missing)} "
            "is missing; download or save the folder again"
        )
    return [parts[label] for label in labels]
