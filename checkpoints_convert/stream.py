"""Safetensors windows -> parameters, straight into their place; exhaustive on both sides.

Nothing is unpickled and no code of a folder is run. A leaf is filled window by window through
`jax.make_array_from_callback`, so a sharded leaf reads only what its devices hold.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from checkpoints_convert.rules import TABLES, Fused, Rule, canonical_name
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


def open_source(folder: Path, family: str, block_group_size: int = 1) -> Source:
    """Reads all headers of a folder; a tensor that appears twice is an error."""
    ignored, refused = TABLES[family].ignored, TABLES[family].refused
    tensors: dict[str, SourceTensor] = {}
    handles: dict[Path, Any] = {}
    twice = []
    for file in weight_files(folder):
        try:
            handle = handles[file] = safe_open(file, framework="numpy")
            for name in handle.keys():  # noqa: SIM118  safe_open is not iterable
                piece = handle.get_slice(name)
                key = canonical_name(family, name, block_group_size)
                if ignored and ignored.search(key):
                    continue
                for pattern, advice in refused:
                    if re.search(pattern, key):
                        raise ModelError(f"{file}: tensor {name}: {advice}")
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
    leaves = leaf_paths(abstract)
    for path in leaves:
        for _, name, shape in sources(path, leaves, family, num_layers):
            expected[name] = shape
    allowed = set(expected)
    problems = []
    tied, copies = TABLES[family].tied_head, TABLES[family].copies
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
        raise ModelError(
            f"{where}: {len(problems)} tensors do not fit its config.json; is it another model, or "
            "an incomplete copy?\n" + "\n".join(sorted(problems))
        )


def _equal(source: Source, a: str, b: str) -> bool:
    if b not in source.tensors or source.tensors[a].shape != source.tensors[b].shape:
        return False
    everything = (slice(None),) * len(source.tensors[a].shape)
    return np.array_equal(source.window(a, everything), source.window(b, everything))


def rule_of(path: str, leaves: Mapping[str, Any], family: str, num_layers: int) -> Rule:
    """The rule of one of `leaves` (as `leaf_paths` gives them); `joined` is turned into `fused`."""
    rule = TABLES[family].rule(path, num_layers)
    if not rule.joined:
        return rule
    parent, module, leaf = path.rsplit("/", 2)
    rows = {name: leaves[f"{parent}/{name}/{leaf}"].shape[-1] for name in rule.joined}
    start = sum(rows[name] for name in rule.joined[: rule.joined.index(module)])
    part = Fused((sum(rows.values()),), (slice(start, start + rows[module]),))
    return rule._replace(fused=part)


def sources(
    path: str, leaves: Mapping[str, Any], family: str, num_layers: int
) -> Iterator[tuple[tuple[int, ...], str, tuple[int, ...]]]:
    """(place on the leading axes, source name, source shape) of every layer and expert."""
    rule, shape = rule_of(path, leaves, family, num_layers), leaves[path].shape
    lead = _lead_axes(rule)
    inner = _swap(shape[lead:]) if rule.transpose else shape[lead:]
    if rule.fused:
        inner = (math.prod(_view(rule.fused, inner[0])), *inner[1:])
    for place in np.ndindex(*shape[:lead]):
        yield place, _source_name(rule, place, shape, num_layers), inner


def _view(fused: Fused, rows: int) -> tuple[int, ...]:
    """A fused source's view, its -1 replaced by what makes `rows` of it picked."""
    ones = tuple(1 if n == -1 else n for n in fused.view)
    return tuple(rows // np.empty(ones)[fused.pick].size if n == -1 else n for n in fused.view)


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
    family: str,
    num_layers: int,
    abstract: Any,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Fills `abstract` (a tree of `jax.ShapeDtypeStruct` with shardings) from `source`.

    Call `check` first. `progress` is told the bytes of each leaf when it is in place.
    """

    leaves = leaf_paths(abstract)

    def leaf(path, target: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(str(k.key) for k in path)
        rule = rule_of(name, leaves, family, num_layers)
        lead, dtype = _lead_axes(rule), target.dtype
        if rule.buffer:
            named = [n for _, n, _ in sources(name, leaves, family, num_layers)]
            dtype = np.result_type(*(np.dtype(source.tensors[n].dtype) for n in named))

        def fill(index: tuple[slice, ...]) -> np.ndarray:
            ranges = [range(*s.indices(n)) for s, n in zip(index, target.shape)]
            out = np.empty([len(r) for r in ranges], dtype)
            for at in np.ndindex(*out.shape[:lead]):
                place = tuple(r[i] for r, i in zip(ranges, at))
                name = _source_name(rule, place, target.shape, num_layers)
                window = _window(source, rule, name, index[lead:])
                out[at] = window.swapaxes(-1, -2) if rule.transpose else window
            return out

        array = jax.make_array_from_callback(target.shape, target.sharding, fill)  # pyright: ignore
        if progress:
            progress(array.nbytes)
        return array

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def _window(source: Source, rule: Rule, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """The part of a source tensor that fills `index` of a parameter, in the source's layout."""
    index = _swap(index) if rule.transpose else index
    if rule.fused is None:
        return source.window(name, index)
    everything = slice(None)
    whole = source.window(name, (everything, *index[1:]))
    rest = whole.shape[1:]
    picked = whole.reshape(*rule.fused.view, *rest)[rule.fused.pick]
    return picked.reshape(-1, *rest)[index[0]]


def export_tensors(params: Any, family: str, num_layers: int) -> dict[str, np.ndarray]:
    """The parameters under their Hub names, in their own dtype (host)."""
    tensors: dict[str, np.ndarray] = {}
    leaves = leaf_paths(params)
    for path, leaf in leaves.items():
        rule, array = rule_of(path, leaves, family, num_layers), np.asarray(leaf)
        for place in np.ndindex(*array.shape[: _lead_axes(rule)]):
            name = _source_name(rule, place, array.shape, num_layers)
            name = TABLES[family].hub_prefix + name
            piece = array[place].swapaxes(-1, -2) if rule.transpose else array[place]
            if rule.fused is None:
                tensors[name] = np.ascontiguousarray(piece)
                continue
            view, pick = _view(rule.fused, piece.shape[0]), rule.fused.pick
            rows = (math.prod(view), *piece.shape[1:])
            whole = tensors.setdefault(name, np.empty(rows, piece.dtype))
            part = whole.reshape(*view, *piece.shape[1:])
            part[pick] = piece.reshape(part[pick].shape)
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
