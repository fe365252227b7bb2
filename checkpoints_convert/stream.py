"""Safetensors windows -> parameters, straight into their place; exhaustive on both sides.

Nothing is unpickled and no code of a folder is run. A leaf is filled window by window through
`jax.make_array_from_callback`, so a sharded leaf reads only what its devices hold.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from checkpoints_convert.rules import HUB_PREFIX, RULES, TIED_HEAD, canonical_name
from sama_jax.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


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
        self._handles = handles

    def window(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A window of a tensor, in its stored dtype."""
        tensor = self.tensors[name]
        try:
            return self._handles[tensor.file].get_slice(tensor.name)[index]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{tensor.file}: cannot read tensor {tensor.name} ({error})") from None

    def dtype(self) -> str:
        """The dtype that most tensors are stored in, such as `bfloat16`."""
        names = [t.dtype for t in self.tensors.values()]
        return max(set(names), key=names.count)


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
    if any(folder.glob("*.bin")):
        hint = "; it holds pickled .bin weights, which are never read: save it as safetensors"
    raise ModelError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{hint}")


def open_source(folder: Path, block_group_size: int = 1) -> Source:
    """Reads all headers of a folder; a tensor that appears twice is an error."""
    tensors: dict[str, SourceTensor] = {}
    handles: dict[Path, Any] = {}
    twice = []
    for file in weight_files(folder):
        try:
            handle = handles[file] = safe_open(file, framework="numpy")
            for name in handle.keys():  # noqa: SIM118  safe_open is not iterable
                piece = handle.get_slice(name)
                key = canonical_name(name, block_group_size)
                if key in tensors:
                    twice.append(f"{name} ({file.name}) and {tensors[key].name}")
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


def check(source: Source, family: str, num_layers: int, abstract: Any, where: str) -> None:
    """Every tensor consumed, every parameter filled, every shape right: else one error for all."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaf_paths(abstract).items():
        for name, shape in _sources(path, leaf.shape, family, num_layers):
            expected[name] = shape
    allowed = set(expected)
    problems = []
    head, embedding = TIED_HEAD[family]
    if head not in expected and head in source.tensors:
        allowed.add(head)
        if not _equal(source, head, embedding):
            problems.append(f"  differs    {head}: the head is tied, but differs from {embedding}")
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
        raise ModelError(
            f"{where}: {len(problems)} tensors do not fit its config.json; is it another model, or "
            "an incomplete copy?\n" + "\n".join(sorted(problems))
        )


def _equal(source: Source, a: str, b: str) -> bool:
    if b not in source.tensors or source.tensors[a].shape != source.tensors[b].shape:
        return False
    everything = (slice(None),) * len(source.tensors[a].shape)
    return np.array_equal(source.window(a, everything), source.window(b, everything))


def _sources(
    path: str, shape: tuple[int, ...], family: str, num_layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(source name, source shape) of one parameter, a pair a layer."""
    rule = RULES[family](path, num_layers)
    stacked = "{i}" in rule.source
    inner = shape[1:] if stacked else shape
    for i in range(shape[0] if stacked else 1):
        yield rule.source.format(i=i), inner[::-1] if rule.transpose else inner


def load_params(
    source: Source,
    family: str,
    num_layers: int,
    abstract: Any,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Fills `abstract` (a tree of `jax.ShapeDtypeStruct` with shardings) from `source`.

    Call `check` first. `progress` is told the bytes of each leaf when it is in place.
    """

    def leaf(path, target: jax.ShapeDtypeStruct) -> jax.Array:
        rule = RULES[family]("/".join(str(k.key) for k in path), num_layers)

        def read(name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
            window = source.window(name, index[::-1] if rule.transpose else index)
            out[...] = window.T if rule.transpose else window

        def fill(index: tuple[slice, ...]) -> np.ndarray:
            shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, target.shape))
            out = np.empty(shape, target.dtype)
            if "{i}" in rule.source:
                layers = range(*index[0].indices(target.shape[0]))
                for row, i in enumerate(layers):
                    read(rule.source.format(i=i), index[1:], out[row])
            else:
                read(rule.source, index, out)
            return out

        array = jax.make_array_from_callback(target.shape, target.sharding, fill)  # pyright: ignore
        if progress:
            progress(array.nbytes)
        return array

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def export_tensors(params: Any, family: str, num_layers: int) -> dict[str, np.ndarray]:
    """The parameters under their Hub names, in their own dtype (host)."""
    tensors = {}
    for path, leaf in leaf_paths(params).items():
        rule, array = RULES[family](path, num_layers), np.asarray(leaf)
        stacked = "{i}" in rule.source
        for i, layer in enumerate(array if stacked else [array]):
            name = HUB_PREFIX[family] + rule.source.format(i=i)
            tensors[name] = np.ascontiguousarray(layer.T if rule.transpose else layer)
    return tensors


def save_weights(folder: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> None:
    """Writes one safetensors file, or shards of at most `max_shard_bytes` with their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    room = max_shard_bytes
    for name, array in tensors.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = array
        room -= array.nbytes
    for old in (SINGLE, INDEX):  # the one that is not written again would still be read
        (folder / old).unlink(missing_ok=True)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(a.nbytes for a in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    part = folder / (INDEX + ".part")
    part.write_text(json.dumps(index, indent=2), "utf-8")
    os.replace(part, folder / INDEX)
