"""Finds the safetensors files of a folder, and writes such files.

Files are written one tensor at a time. Nothing is unpickled.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs
import numpy as np

from sama_jax.errors import ModelError
from sama_jax.storage.files import write_json
from sama_jax.weights.folder_files import listed_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Floating-point types that weights may have: the format's code -> NumPy's name."""
CODES = {
    **{name: code for code, name in DTYPES.items()},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"},
}
"""NumPy's name -> the format's code of what can be written."""


def has_weights(folder: Path) -> bool:
    """Returns whether a folder holds safetensors of a model, whole or not."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder, as its index lists them. Raises `ModelError`."""
    if (folder / INDEX).is_file():
        return listed_files(folder / INDEX)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    hint = ""
    if any(folder.glob("*.bin*")):  # also an index of pickles: of a Hub id that is all there is
        hint = (
            "; its weights are pickled (.bin), which only `checkpoints_convert to-hf SRC OUT "
            "--allow-pickle` reads: it writes them as safetensors"
        )
    raise ModelError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{hint}")


def tensor_starts(file: Path) -> dict[str, int]:
    """Returns where each tensor begins in a file.

    The library has read the header before, so it is sound otherwise, and at most 100 MB. Raises
    `ModelError` if it names a tensor twice: readers take the last in silence.
    """

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("two tensors or fields of one name")
        return found

    with file.open("rb") as handle:
        header = handle.read(int.from_bytes(handle.read(8), "little"))
    try:
        found = json.loads(header, object_pairs_hook=plain)
        found.pop("__metadata__", None)
        return {name: 8 + len(header) + x["data_offsets"][0] for name, x in found.items()}
    except ValueError as error:
        raise ModelError(f"{file}: its header is not sound ({error}); save it again") from None


class Pending(NamedTuple):
    """Describes a tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Returns the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


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
    shards_before = [f.name for f in folder.glob("model-*-of-*.safetensors")]
    for old in (SINGLE, INDEX, *shards_before):  # what is not written again would be another model
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
    write_json(folder / INDEX, index)


def write_file(
    path: Path, tensors: Mapping[str, Pending], progress: Callable[[int], None] | None = None
) -> None:
    """Writes a safetensors file: header length (8 bytes), JSON header, then the tensors' bytes.

    The library's own writer takes all tensors of a file at once. Like it, wide types come first, so
    that all are aligned, and the header is padded to 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    start = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": CODES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            values = np.asarray(tensor.make(), tensor.dtype, order="C")  # keeps 0 axes, too
            assert values.shape == tensor.shape, name
            file.write(values.reshape(-1).view(np.uint8).data)
            if progress:
                progress(tensor.nbytes)
