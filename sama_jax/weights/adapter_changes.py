"""Defines what an adapter does to a tensor of its base: each change as a function of a window.

A change is told how to read the tensor before it, and returns the same window behind it, in
float32. Formulas and names were compared with PEFT 0.21.2, which the tests run.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from sama_jax.weights.source import Source

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
"""Window of a tensor -> its values, as they are before a change."""
NORM_ROWS = 2**10
"""Rows whose norms are computed at once: 16 MiB of a matrix of 4,096 columns."""
SAME_NORM = 1e-5
"""Relative difference of a magnitude from a norm that is rounding of float32."""


@runtime_checkable
class Change(Protocol):
    """What an adapter does to one tensor."""

    def window(self, read: Read, index: Index) -> np.ndarray:
        """Returns a window of the changed tensor; float32."""
        ...

    def is_nothing(self, read: Read) -> bool:
        """Tells whether the tensor stays what it is."""
        ...


class LowRank(NamedTuple):
    """Adds a product of two thin matrices, in PyTorch's layout: LoRA."""

    module: str
    """Its name in the wrapped model: what patterns are matched with."""
    a: Float[np.ndarray, "r in"]
    b: Float[np.ndarray, "out r"]
    """Float32, the scale included."""
    scale: float
    embedding: bool

    def window(self, read: Read, index: Index) -> Float[np.ndarray, "_ _"]:
        """Returns a window of W + scale BA; of an embedding, of W + (scale BA)^T."""
        return read(index).astype(np.float32) + self.added(index)

    def added(self, index: Index) -> Float[np.ndarray, "_ _"]:
        """Returns a window of what is added to the weight; float32."""
        rows, columns = index
        if self.embedding:
            return (self.b[columns] @ self.a[:, rows]).T
        return self.b[rows] @ self.a[:, columns]

    def is_nothing(self, read: Read) -> bool:
        """Tells whether A or B is zero."""
        del read
        return not (self.a.any() and self.b.any())


class Dora:
    """Gives each output of a weight with LoRA another length, its magnitude: DoRA.

    Outputs are the rows of a linear layer, and the columns of an embedding.
    """

    def __init__(self, low: LowRank, magnitude: Float[np.ndarray, " out"], shape: tuple[int, int]):
        self.low, self.magnitude, self.shape = low, magnitude, shape
        self._factors: np.ndarray | None = None

    def factors(self, read: Read) -> Float[np.ndarray, " out"]:
        """Returns magnitude / norm of each output; reads the whole tensor when first asked."""
        if self._factors is None:
            squares = np.zeros(len(self.magnitude), np.float64)
            for start in range(0, self.shape[0], NORM_ROWS):
                rows = slice(start, min(start + NORM_ROWS, self.shape[0]))
                part = self.low.window(read, (rows, slice(0, self.shape[1]))).astype(np.float64)
                if self.low.embedding:
                    squares += (part**2).sum(axis=0)
                else:
                    squares[rows] = (part**2).sum(axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):  # found when weights are loaded
                self._factors = (self.magnitude / np.sqrt(squares)).astype(np.float32)
        return self._factors

    def window(self, read: Read, index: Index) -> Float[np.ndarray, "_ _"]:
        """Returns a window of magnitude / |W + scale BA| (W + scale BA)."""
        rows, columns = index
        factors, whole = self.factors(read), self.low.window(read, index)
        return whole * (factors[None, columns] if self.low.embedding else factors[rows, None])

    def is_nothing(self, read: Read) -> bool:
        """Tells whether neither a direction nor a length is another one."""
        return self.low.is_nothing(read) and np.allclose(self.factors(read), 1, atol=SAME_NORM)


class Experts(NamedTuple):
    """Adds a product of thin matrices to each expert of a stacked tensor [e, out, in]."""

    a: Float[np.ndarray, "e r in"]
    b: Float[np.ndarray, "e out r"]
    """Float32, the scale included."""
    scale: float

    def window(self, read: Read, index: Index) -> Float[np.ndarray, "_ _ _"]:
        """Returns a window of W_e + scale B_e A_e."""
        experts, rows, columns = index
        added = self.b[experts, rows] @ self.a[experts, :, columns]
        return read(index).astype(np.float32) + added

    def is_nothing(self, read: Read) -> bool:
        """Tells whether all A or all B are zero."""
        del read
        return not (self.a.any() and self.b.any())


class Whole(NamedTuple):
    """Puts another tensor in the place of the base's."""

    values: np.ndarray

    def window(self, read: Read, index: Index) -> np.ndarray:
        """Returns a window of the new tensor."""
        del read
        return self.values[index].astype(np.float32)

    def is_nothing(self, read: Read) -> bool:
        """Tells whether it is the base's own."""
        whole = read(tuple(slice(0, n) for n in self.values.shape)).astype(np.float32)
        return np.array_equal(whole, self.values.astype(np.float32))


class Rows(NamedTuple):
    """Puts other rows into an embedding or a head: trained tokens."""

    ids: Int[np.ndarray, " k"]
    values: Float[np.ndarray, "k d"]

    def window(self, read: Read, index: Index) -> Float[np.ndarray, "_ _"]:
        """Returns a window of the table with its new rows."""
        rows, columns = index
        found = read(index).astype(np.float32)
        here = (self.ids >= rows.start) & (self.ids < rows.stop)
        found[self.ids[here] - rows.start] = self.values[here][:, columns]
        return found

    def is_nothing(self, read: Read) -> bool:
        """Tells whether the rows are the base's own."""
        columns = slice(0, self.values.shape[1])
        rows = [read((slice(int(i), int(i) + 1), columns))[0] for i in self.ids]
        return np.array_equal(np.array(rows, np.float32), self.values)


class MergedSource(Source):
    """Reads the base's tensors with their changes; where there is none, as they are stored."""

    def __init__(
        self,
        base: Source,
        changes: Mapping[str, Sequence[Change]],
        copies: Mapping[str, str],
    ):
        """Reads through `base`; `copies` are tensors that it lacks, and those that they start as.

        A tensor that is replaced whole has the shape of its replacement.
        """
        tensors = base.tensors | {copy: base.tensors[name] for copy, name in copies.items()}
        for name, made in changes.items():
            shapes = [change.values.shape for change in made if isinstance(change, Whole)]
            tensors[name] = tensors[name]._replace(shape=(*shapes, tensors[name].shape)[0])
        super().__init__(tensors, {}, base.stamp)
        self.base, self.changes, self.copies = base, changes, copies

    @property
    def files(self) -> list[tuple[str, Path]]:
        """The base's files."""
        return self.base.files

    @property
    def digest(self) -> str:
        """The base's; the adapter has a name of its own."""
        return self.base.digest

    def window(self, name: str, index: Index) -> np.ndarray:
        """Reads float32 where something is changed, so the only rounding is the reader's cast."""
        read = self._unchanged(name)
        for change in self.changes.get(name, ()):
            read = functools.partial(change.window, read)
        return read(index)

    def _unchanged(self, name: str) -> Read:
        def read(index: Index) -> np.ndarray:
            values = self.base.window(self.copies.get(name, name), index)
            with self._lock:
                self.bytes_read += values.nbytes
            return values

        return read
