"""Loads tensors straight into their place, as windows of sharded parameters.

A leaf is read in slabs and copied to where the windows of this process' devices are; only these are
read, each byte once.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from sama_jax.models.families.weight_table import Rule, Table
from sama_jax.weights.source import Source, SourceTensor
from sama_jax.weights.tensor_map import leaf_paths, rule_of, sources, swap

SLAB = 2**22
"""The most values that are read from a file at once: 8 MiB of bfloat16."""
READERS = min(8, os.cpu_count() or 1)
"""Threads that read and transpose at once; NumPy copies without the interpreter's lock."""


def load_params(
    source: Source,
    table: Table,
    num_layers: int,
    abstract: Any,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Fills `abstract` (a tree of `jax.ShapeDtypeStruct` with shardings) from `source`.

    Call `check` first. Every byte that this process' devices need is read once, about in the file's
    order, also where windows of a transposed tensor interleave or devices hold the same window.
    `progress` is told the bytes of each leaf when it is in place.
    """

    leaves = leaf_paths(abstract)

    def leaf(path, target: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(str(k.key) for k in path)
        rule, shape = rule_of(name, leaves, table, num_layers), target.shape
        named = list(sources(name, leaves, table, num_layers))
        dtype = target.dtype
        if rule.buffer:
            dtype = np.result_type(*(np.dtype(source.tensors[n].dtype) for _, n, _ in named))
        assert target.sharding is not None
        local = target.sharding.addressable_devices_indices_map(shape).values()
        windows = {_ranges(index, shape) for index in local}
        buffers = {w: aligned_empty([len(r) for r in w], dtype) for w in windows}
        copies = (c for p, n, _ in named for c in _copies(buffers, source, n, rule, p))
        for _ in readers.map(lambda copy: copy(), copies):  # raises what a copy raises
            pass
        array = jax.make_array_from_callback(
            shape,
            target.sharding,
            lambda index: buffers[_ranges(index, shape)],  # pyright: ignore  stub: no ArrayLike
        )
        if progress:
            progress(array.nbytes)
        return array

    with ThreadPoolExecutor(READERS) as readers:
        return jax.tree_util.tree_map_with_path(leaf, abstract)


Window = tuple[range, ...]
"""Part of an array, one range an axis; ranges are hashable, slices are not."""


def _ranges(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Window:
    return tuple(range(*s.indices(n)) for s, n in zip(index or (), shape))


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Makes an array at a multiple of 64 bytes, which JAX's CPU devices use without a copy.

    NumPy's own large arrays start 16 bytes behind one; each leaf would be held twice.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copies(
    buffers: Mapping[Window, np.ndarray],
    source: Source,
    name: str,
    rule: Rule,
    place: tuple[int, ...],
) -> Iterator[Callable[[], None]]:
    """Yields the copies of one source tensor, slab by slab, to the windows of a parameter.

    They may run in any order and at once: no two write to the same values, and each byte is read
    by one.
    """
    parts: dict[Window, np.ndarray] = {}  # in the source's layout
    for ranges, buffer in buffers.items():
        if all(i in r for i, r in zip(place, ranges)):
            part = buffer[tuple(r.index(i) for i, r in zip(place, ranges))]
            inner = ranges[len(place) :]
            parts[swap(inner) if rule.transpose else inner] = (
                part.swapaxes(-1, -2) if rule.transpose else part
            )
    for box in _boxes(list(parts)):
        for slab in slabs(source.tensors[name], rule, box):
            yield functools.partial(_copy_slab, parts, source, name, slab)


def _copy_slab(parts: Mapping[Window, np.ndarray], source: Source, name: str, slab: "Slab") -> None:
    """Reads a slab and copies it to the windows that it lies in."""
    rows, columns, piece = slab.rows, slab.columns, source.window(name, slab.index)
    for window, part in parts.items():
        low, high = max(rows.start, window[0].start), min(rows.stop, window[0].stop)
        inside = all(w.start in c for w, c in zip(window[1:], columns))
        if low >= high or not inside:
            continue
        there = slice(low - window[0].start, high - window[0].start)
        here = [slice(low - rows.start, high - rows.start)]
        starts = [c.index(w.start) for w, c in zip(window[1:], columns)]
        here += [slice(at, at + len(w)) for at, w in zip(starts, window[1:])]
        copy_values(part[there], piece[tuple(here)])


def _boxes(windows: list[Window]) -> list[Window]:
    """Returns what to read: the box around all windows if they tile it, else each window."""
    if not windows:
        return []
    box = tuple(
        range(min(r.start for r in axis), max(r.stop for r in axis)) for axis in zip(*windows)
    )
    volume = sum(math.prod(map(len, w)) for w in windows)
    return [box] if volume == math.prod(map(len, box)) else windows


class Slab(NamedTuple):
    """Says which values are read at once."""

    rows: range
    """These count what the parameter picks from the source's first axis."""
    columns: Window
    index: tuple[slice, ...]
    """Where it is in the source."""


def slabs(tensor: SourceTensor, rule: Rule, box: Window) -> Iterator[Slab]:
    """Cuts a box into pieces of at most about `SLAB` values, in the source's layout."""
    columns = box[1:]
    picked = np.arange(tensor.shape[0])
    if rule.fused:
        picked = picked.reshape(rule.fused.view)[rule.fused.pick].reshape(-1)
    picked = picked[box[0].start : box[0].stop]
    step, start = max(1, SLAB // max(math.prod(map(len, columns)), 1)), box[0].start
    for run in np.split(picked, np.flatnonzero(np.diff(picked) != 1) + 1):
        for at in range(0, len(run), step):
            rows = run[at : at + step]
            index = (
                slice(int(rows[0]), int(rows[-1]) + 1),
                *(slice(c.start, c.stop) for c in columns),
            )
            yield Slab(range(start, start + len(rows)), columns, index)
            start += len(rows)


def copy_values(out: np.ndarray, values: np.ndarray) -> None:
    """Sets `out[...] = values`, in strips that suit the cache where `out` lies transposed.

    16 rows at a time NumPy transposes 600 MB/s of bfloat16 on one core, all at once 110.
    """
    if out.dtype == values.dtype and out.dtype.itemsize == 2:
        out, values = out.view(np.uint16), values.view(np.uint16)  # not through bfloat16's own copy
    if out.ndim < 2 or out.strides[-2] >= out.strides[-1]:
        out[...] = values
        return
    for row in range(0, out.shape[-2], 16):
        out[..., row : row + 16, :] = values[..., row : row + 16, :]
