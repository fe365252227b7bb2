"""Safetensors windows -> parameters, straight into their place; exhaustive on both sides.

Nothing is unpickled and no code of a folder is run. A leaf is read in slabs and copied to where
the windows of this process' devices are; only these are read, each byte once. Written files are
made one tensor at a time.
"""

import functools
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Fused, Rule, Table

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

SLAB = 2**22
"""The most values that are read from a file at once: 8 MiB of bfloat16."""
READERS = min(8, os.cpu_count() or 1)
"""Threads that read and transpose at once; NumPy copies without the interpreter's lock."""

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_CODES = {
    **{name: code for code, name in _DTYPES.items()},
    **{"int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"},
}


class SourceTensor(NamedTuple):
    """One tensor of a folder."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Source:
    """The tensors of a model folder under their canonical names; opens each file once."""

    def __init__(self, tensors: dict[str, SourceTensor], handles: dict[Path, Any]):
        self.tensors = tensors
        self.bytes_read = 0
        """Bytes that `window` has returned."""
        self._handles = handles
        self._lock = threading.Lock()

    def window(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A window of a tensor, in its stored dtype. Several threads may call it."""
        tensor = self.tensors[name]
        try:
            values = self._handles[tensor.file].get_slice(tensor.name)[index]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{tensor.file}: cannot read tensor {tensor.name} ({error})") from None
        with self._lock:
            self.bytes_read += values.nbytes
        return values

    def unlisted(self) -> list[str]:
        """Weight files that lie beside those of the folder's index."""
        beside = {f for file in self._handles for f in file.parent.glob("*.safetensors")}
        return sorted(file.name for file in beside - self._handles.keys())

    def dtype(self) -> str:
        """The dtype that most tensors are stored in, such as `bfloat16`."""
        names = [t.dtype for t in self.tensors.values()]
        return max(set(names), key=names.count)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors of a model, whole or not."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, as its index lists them. Raises `ModelError`."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text("utf-8"))
            names = sorted(set(map(os.fspath, index["weight_map"].values())))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{folder / INDEX}: not a safetensors index ({error})") from None
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise ModelError(f"{folder}: shards named in {INDEX} are missing: {', '.join(missing)}")
        return [folder / n for n in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    hint = ""
    if any(folder.glob("*.bin*")):  # an index of pickles, too: of a Hub id that is all there is
        hint = (
            "; its weights are pickled (.bin), which only `checkpoints_convert to-hf SRC OUT "
            "--allow-pickle` reads: it writes them as safetensors"
        )
    raise ModelError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{hint}")


def open_source(folder: Path, table: Table, block_group_size: int = 1) -> Source:
    """Reads all headers of a folder; a tensor that appears twice is an error."""
    ignored, refused = table.ignored, table.refused
    tensors: dict[str, SourceTensor] = {}
    handles: dict[Path, Any] = {}
    twice = []
    for file in weight_files(folder):
        try:
            handle = handles[file] = safe_open(file, framework="numpy")
            for name in handle.keys():  # noqa: SIM118  safe_open is not iterable
                piece = handle.get_slice(name)
                key = table.name_of(name, block_group_size)
                if ignored and ignored.search(key):
                    continue
                for pattern, advice in refused:
                    if re.search(pattern, key):
                        raise ModelError(f"{file}: tensor {name}: {advice}")
                if key in tensors:
                    first = tensors[key]
                    twice.append(f"{first.name} ({first.file.name}) and {name} ({file.name})")
                dtype = _DTYPES.get(piece.get_dtype(), piece.get_dtype())
                tensors[key] = SourceTensor(file, name, tuple(piece.get_shape()), str(dtype))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: not a complete safetensors file ({error}); download or save it again"
            ) from None
    if twice:
        raise ModelError(f"{folder}: the same tensor twice: " + "; ".join(twice))
    return Source(tensors, handles)


def leaf_paths(tree: Any) -> dict[str, Any]:
    """`{"blocks/attn/q_proj/kernel": leaf, ...}` of a nested dict."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in flat}


def check(source: Source, table: Table, num_layers: int, abstract: Any, where: str) -> None:
    """Every tensor consumed, every parameter filled, every shape right: else one error for all."""
    expected: dict[str, tuple[int, ...]] = {}
    leaves = leaf_paths(abstract)
    for path in leaves:
        for _, name, shape in sources(path, leaves, table, num_layers):
            expected[name] = shape
    allowed = set(expected)
    problems = []
    tied, copies = table.tied_head, table.copies
    for copy, original in (*((tied,) if tied else ()), *copies):
        if copy in expected or copy not in source.tensors:
            continue
        allowed.add(copy)
        if not _equal(source, copy, original):
            problems.append(f"  differs    {copy}: the head is tied, but differs from {original}")
    problems += [
        f"  missing    {n} {list(s)}" for n, s in expected.items() if n not in source.tensors
    ]
    problems += [
        f"  unexpected {t.name} {list(t.shape)}"
        for n, t in source.tensors.items()
        if n not in allowed
    ]
    problems += [
        f"  shape      {source.tensors[n].name}: expected {list(s)}, found "
        f"{list(source.tensors[n].shape)}"
        for n, s in expected.items()
        if n in source.tensors and source.tensors[n].shape != s
    ]
    problems += [
        f"  dtype      {t.name}: {t.dtype} is not a floating-point type that is supported"
        for n, t in source.tensors.items()
        if n in allowed and t.dtype not in _DTYPES.values()
    ]
    if problems:
        unlisted = source.unlisted()
        hint = f" {INDEX} does not list {', '.join(unlisted)}." if unlisted else ""
        raise ModelError(
            f"{where}: {len(problems)} tensors do not fit its config.json; is it another model, or "
            f"an incomplete copy?{hint}\n" + "\n".join(sorted(problems))
        )


def _equal(source: Source, a: str, b: str) -> bool:
    if b not in source.tensors or source.tensors[a].shape != source.tensors[b].shape:
        return False
    box = tuple(map(range, source.tensors[a].shape))
    slabs = _slabs(source.tensors[a], Rule(a), box)  # the same of b
    return all(np.array_equal(source.window(a, s.index), source.window(b, s.index)) for s in slabs)


def rule_of(path: str, leaves: Mapping[str, Any], table: Table, num_layers: int) -> Rule:
    """The rule of one of `leaves` (as `leaf_paths` gives them); `joined` is turned into `fused`."""
    rule = table.rule(path, num_layers)
    if not rule.joined:
        return rule
    parent, module, leaf = path.rsplit("/", 2)
    rows = {name: leaves[f"{parent}/{name}/{leaf}"].shape[-1] for name in rule.joined}
    start = sum(rows[name] for name in rule.joined[: rule.joined.index(module)])
    part = Fused((sum(rows.values()),), (slice(start, start + rows[module]),))
    return rule._replace(fused=part)


def sources(
    path: str, leaves: Mapping[str, Any], table: Table, num_layers: int
) -> Iterator[tuple[tuple[int, ...], str, tuple[int, ...]]]:
    """(place on the leading axes, source name, source shape) of every layer and expert."""
    rule, shape = rule_of(path, leaves, table, num_layers), leaves[path].shape
    lead = _lead_axes(rule)
    inner = _swap(shape[lead:]) if rule.transpose else shape[lead:]
    if rule.fused:
        inner = (math.prod(rule.fused.view), *inner[1:])
    for place in np.ndindex(*shape[:lead]):
        yield place, _source_name(rule, place, shape, num_layers), inner


def _swap(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last two axes change places: [out, in] and [in, out], of one matrix or of a stack."""
    return (*axes[:-2], axes[-1], axes[-2])


def _lead_axes(rule: Rule) -> int:
    """Leading axes of a parameter that count layers and experts."""
    return ("{i}" in rule.source) + ("{e}" in rule.source)


def _source_name(
    rule: Rule, place: tuple[int, ...], shape: tuple[int, ...], num_layers: int
) -> str:
    """The source at `place` on the leading axes. The stack ends where the last block begins."""
    names = {}
    if "{i}" in rule.source:
        names["i"] = num_layers - 1 - shape[0] + place[0]
    if "{e}" in rule.source:
        names["e"] = place[-1]
    return rule.source.format(**names)


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
        buffers = {w: _aligned_empty([len(r) for r in w], dtype) for w in windows}
        copies = (c for p, n, _ in named for c in _copies(buffers, source, n, rule, p))
        for _ in readers.map(lambda copy: copy(), copies):  # raises what a copy raises
            pass
        array = jax.make_array_from_callback(
            shape,
            target.sharding,
            lambda index: buffers[_ranges(index, shape)],  # pyright: ignore
        )
        if progress:
            progress(array.nbytes)
        return array

    with ThreadPoolExecutor(READERS) as readers:
        return jax.tree_util.tree_map_with_path(leaf, abstract)


_Window = tuple[range, ...]
"""Part of an array, one range an axis; unlike slices, hashable."""


def _ranges(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> _Window:
    return tuple(range(*s.indices(n)) for s, n in zip(index or (), shape))


def _aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array at a multiple of 64 bytes, which JAX's CPU devices then use without copying it.

    NumPy's own large arrays start 16 bytes behind one; each leaf would be held twice.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copies(
    buffers: Mapping[_Window, np.ndarray],
    source: Source,
    name: str,
    rule: Rule,
    place: tuple[int, ...],
) -> Iterator[Callable[[], None]]:
    """Copies of one source tensor, slab by slab, to where windows of a parameter hold it.

    In any order and at once: no two write to the same values, and each byte is read by one.
    """
    parts: dict[_Window, np.ndarray] = {}  # in the source's layout
    for ranges, buffer in buffers.items():
        if all(i in r for i, r in zip(place, ranges)):
            part = buffer[tuple(r.index(i) for i, r in zip(place, ranges))]
            inner = ranges[len(place) :]
            parts[_swap(inner) if rule.transpose else inner] = (
                part.swapaxes(-1, -2) if rule.transpose else part
            )
    for box in _boxes(list(parts)):
        for slab in _slabs(source.tensors[name], rule, box):
            yield functools.partial(_copy_slab, parts, source, name, slab)


def _copy_slab(
    parts: Mapping[_Window, np.ndarray], source: Source, name: str, slab: "_Slab"
) -> None:
    """Reads a slab and copies it to the windows that it lies in."""
    rows, columns, piece = slab.rows, slab.columns, source.window(name, slab.index)
    for window, part in parts.items():
        low, high = max(rows.start, window[0].start), min(rows.stop, window[0].stop)
        inside = all(w.start in c for w, c in zip(window[1:], columns))
        if low >= high or not inside:
            continue
        there = slice(low - window[0].start, high - window[0].start)
        here = [slice(low - rows.start, high - rows.start)]
        here += [slice(c.index(w.start), c.index(w.start) + len(w))
                 for w, c in zip(window[1:], columns)]  # fmt: skip
        _copy(part[there], piece[tuple(here)])


def _boxes(windows: list[_Window]) -> list[_Window]:
    """What to read: the box around all windows if they tile it, else each window."""
    if not windows:
        return []
    box = tuple(
        range(min(r.start for r in axis), max(r.stop for r in axis)) for axis in zip(*windows)
    )
    volume = sum(math.prod(map(len, w)) for w in windows)
    return [box] if volume == math.prod(map(len, box)) else windows


class _Slab(NamedTuple):
    """What is read at once."""

    rows: range
    """These count what the parameter picks from the source's first axis."""
    columns: _Window
    index: tuple[slice, ...]
    """Where it is in the source."""


def _slabs(tensor: SourceTensor, rule: Rule, box: _Window) -> Iterator[_Slab]:
    """A box, piece by piece, in the source's layout."""
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
            yield _Slab(range(start, start + len(rows)), columns, index)
            start += len(rows)


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, in strips that suit the cache where `out` lies transposed in memory.

    16 rows at a time NumPy transposes 600 MB/s of bfloat16 on one core, all at once 110.
    """
    if out.dtype == values.dtype and out.dtype.itemsize == 2:
        out, values = out.view(np.uint16), values.view(np.uint16)  # not through bfloat16's own copy
    if out.ndim < 2 or out.strides[-2] >= out.strides[-1]:
        out[...] = values
        return
    for row in range(0, out.shape[-2], 16):
        out[..., row : row + 16, :] = values[..., row : row + 16, :]


class Pending(NamedTuple):
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Returns the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def export_tensors(
    params: Any,
    table: Table,
    num_layers: int,
    get: Callable[[str], np.ndarray] | None = None,
) -> dict[str, Pending]:
    """The parameters under their Hub names, in their own dtype.

    Args:
      params: the tree, or its shapes and dtypes.
      get: parameter path -> its values (host); left out, they are taken from `params`.
    """
    leaves = leaf_paths(params)
    get = get or (lambda path: np.asarray(leaves[path]))
    parts: dict[str, list[tuple[str, Rule, tuple[int, ...]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in leaves:
        rule = rule_of(path, leaves, table, num_layers)
        for place, name, shape in sources(path, leaves, table, num_layers):
            parts.setdefault(name, []).append((path, rule, place))
            shapes[name] = shape

    def make(name: str) -> np.ndarray:
        whole = None
        for path, rule, place in parts[name]:
            piece = get(path)[place]
            piece = piece.swapaxes(-1, -2) if rule.transpose else piece
            if rule.fused is None:
                return piece
            whole = np.empty(shapes[name], piece.dtype) if whole is None else whole
            rest = piece.shape[1:]
            part = whole.reshape(*rule.fused.view, *rest)
            part[rule.fused.pick] = piece.reshape(part[rule.fused.pick].shape)
        assert whole is not None
        return whole

    prefix = table.hub_prefix
    return {
        prefix + name: Pending(
            shapes[name], np.dtype(leaves[of[0][0]].dtype), functools.partial(make, name)
        )
        for name, of in parts.items()
    }


def save_weights(
    folder: Path,
    tensors: Mapping[str, Pending],
    max_shard_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes one safetensors file, or shards of at most `max_shard_bytes` with their index.

    One tensor at a time is in memory. `progress` is told the bytes of each when it is written.
    """
    shards: list[dict[str, Pending]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    for old in (SINGLE, INDEX):  # the one that is not written again would still be read
        (folder / old).unlink(missing_ok=True)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], progress)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, progress)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    part = folder / (INDEX + ".part")
    part.write_text(json.dumps(index, indent=2), "utf-8")
    os.replace(part, folder / INDEX)


def write_file(
    path: Path, tensors: Mapping[str, Pending], progress: Callable[[int], None] | None = None
) -> None:
    """A safetensors file: header length (8 bytes), JSON header, then the tensors' bytes.

    The library's own writer takes all tensors of a file at once. Like it, wide types come first, so
    that all are aligned, and the header is padded to 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    start = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": _CODES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            values = np.ascontiguousarray(tensor.make(), tensor.dtype)
            assert values.shape == tensor.shape, name
            file.write(values.reshape(-1).view(np.uint8).data)
            if progress:
                progress(tensor.nbytes)
