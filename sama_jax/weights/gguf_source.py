"""Reads the tensors of a GGUF file, dequantised row by row as they are asked for.

The package `gguf` of llama.cpp dequantises. Sizes and places are checked here first: nothing is
read, and no memory taken, for what the file has no room for.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

from sama_jax import gguf_header
from sama_jax.errors import ModelError
from sama_jax.gguf_header import Header, Stored
from sama_jax.models.families.family import FamilyConfig
from sama_jax.untrusted import open_file, printable
from sama_jax.weights import stored_bytes
from sama_jax.weights.gguf_config import ROPE_FREQS
from sama_jax.weights.source import Source, SourceTensor

PLAIN = {0: "float32", 1: "float16", 28: "float64", 30: "bfloat16"}
"""Types that are stored as they are -> NumPy's names; all others are dequantised to float32."""
PIECE = 2**18
"""Values that are dequantised at once, which takes some 20 bytes for each meanwhile."""
PAIRED = ("llama", "llada")
"""Architectures whose query and key rows the converters reorder: llama.cpp rotates channels 2 j and
2 j + 1 of a head together, the published weights channels j and j + half of its size."""
_TOP = {"token_embd": "embed", "output_norm": "final_norm", "output": "lm_head"}
# Name inside `blk.{i}` -> our module inside a block.
_BLOCK = {
    "attn_norm": "attn_norm",
    "ffn_norm": "mlp_norm",
    **{f"attn_{p}": f"attn/{p}_proj" for p in "qkv"},
    "attn_output": "attn/o_proj",
    **{f"attn_{p}_norm": f"attn/{p}_norm" for p in "qk"},
    **{f"ffn_{p}": f"mlp/{p}_proj" for p in ("gate", "up", "down")},
}


class Format(NamedTuple):
    """Says how values of one type are stored, in blocks that lie in one row."""

    kind: Any
    """The package's own member for the type."""
    values: int
    """Of a block."""
    size: int
    """Bytes of a block."""
    dtype: str
    """Of what is read."""


@dataclass(frozen=True)
class GgufTensor:
    """Is one tensor of a file; `tensor[index]` reads and dequantises a window of it."""

    path: Path
    stored: Stored
    format: Format
    paired: int
    """Rows of a head whose halves lie in turns; 1: rows lie as they are published."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a window of a tensor of one axis or two. Raises `OSError`."""
        if len(self.stored.shape) == 1:
            return unpaired(self._rows(0, 1)[0], self.paired)[index]
        first, last, _ = index[0].indices(self.stored.shape[0])
        start, end = first // self.paired * self.paired, -(-last // self.paired) * self.paired
        values = unpaired(self._rows(start, end)[:, index[1]], self.paired)
        return values[first - start : last - start]

    def _rows(self, first: int, last: int) -> np.ndarray:
        """Returns rows in the order of the file; a tensor of one axis is one row."""
        columns = self.stored.shape[-1]
        size = columns // self.format.values * self.format.size
        out = np.empty((last - first, columns), self.format.dtype)
        step = max(1, PIECE // columns)
        with open_file(self.path) as file:
            for at in range(first, last, step):
                count = min(step, last - at)
                file.seek(self.stored.start + at * size)
                if len(content := file.read(count * size)) < count * size:
                    raise OSError("it has become shorter")
                out[at - first : at - first + count] = self._values(content).reshape(count, -1)
        return out

    def _values(self, content: bytes) -> np.ndarray:
        if self.format.values == 1:
            return np.frombuffer(content, self.format.dtype)
        # As one row: the package loops over 16 rows at a time, and blocks do not depend on rows.
        return dequantised(np.frombuffer(content, np.uint8)[None], self.format)


class GgufFile(dict[str, GgufTensor]):
    """Holds the tensors of a file by their own names; used as `safetensors.safe_open` is."""

    get_slice = dict.__getitem__


def unpaired(values: np.ndarray, size: int) -> np.ndarray:
    """Puts rows of heads of `size` in the published order, first halves first; 1 leaves them."""
    if size == 1:
        return values
    return values.reshape(-1, size // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def dequantised(blocks: np.ndarray, format: Format) -> np.ndarray:
    """Returns the float32 values of blocks, uint8 [rows, bytes], by the package."""
    from gguf import quants

    with np.errstate(all="ignore"):  # what is no number is found when the model is used
        return quants.dequantize(blocks, format.kind)


def open_gguf(path: Path, family: FamilyConfig) -> Source:
    """Returns the tensors of a file by their canonical names. Raises `ModelError`."""
    stamp = stored_bytes.same_files([(path.name, path)])
    header = gguf_header.read_header(path)
    formats = {kind: _format(header, kind) for kind in {t.kind for t in header.tensors.values()}}
    _require_room(header, formats)
    size: Any = getattr(family.arch, "head_size")  # noqa: B009  of all families that are read
    paired = header.get("general.architecture", str) in PAIRED
    handle, tensors = GgufFile(), dict[str, SourceTensor]()
    for name, stored in header.tensors.items():
        turns = bool(paired and re.search(r"\.attn_[qk]\.(weight|bias)$", name))
        format = formats[stored.kind]
        handle[name] = GgufTensor(path, stored, format, size if turns else 1)
        if name != ROPE_FREQS:  # that is read as part of the configuration
            key = _canonical(name, family)
            tensors[key] = SourceTensor(path, name, stored.shape, format.dtype)
    return Source(tensors, {path: handle}, stamp)


def _canonical(name: str, family: FamilyConfig) -> str:
    """Returns what a family's own code calls a tensor; a name that is not known stays."""
    found = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(weight|bias)", name)
    layer, module, leaf = found.groups() if found else (None, "", "")
    if layer is None and module in _TOP:
        return family.weights.rule(f"{_TOP[module]}/{leaf}", 1).source
    if layer is not None and module in _BLOCK:
        rule = family.weights.rule(f"blocks/{_BLOCK[module]}/{leaf}", family.arch.num_layers)
        return rule.source.format(i=layer)
    return name


def _format(header: Header, number: int) -> Format:
    """Returns how a type is stored. Raises `ModelError` for one that cannot be read."""
    try:
        import gguf
    except ImportError:
        raise ModelError(
            f"{header.path}: reading GGUF files needs a package: pip install 'sama-jax[gguf]'"
        ) from None
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        header.refuse(
            f"holds tensors of type {number}, which the installed package gguf does not know; "
            "update it, or convert the model to another type"
        )
    values, size = gguf.GGML_QUANT_SIZES[kind]
    format = Format(kind, values, size, PLAIN.get(number, "float32"))
    try:
        if number not in PLAIN:
            dequantised(np.zeros((1, size), np.uint8), format)
    except NotImplementedError:
        header.refuse(f"holds tensors of type {kind.name}, which the package gguf does not read")
    return format


def _require_room(header: Header, formats: dict[int, Format]) -> None:
    """Raises `ModelError` unless every tensor has a place of its own in the file."""
    end = 0
    for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].start):
        where, format = f"tensor {printable(name)} {list(tensor.shape)}", formats[tensor.kind]
        *_, columns = tensor.shape
        if len(tensor.shape) > 2 or not all(tensor.shape) or columns % format.values:
            header.refuse(
                f"{where}: expected one axis or two, the last of a multiple of {format.values} "
                f"({format.kind.name})"
            )
        size = math.prod(tensor.shape) // format.values * format.size
        if tensor.start < end:
            header.refuse(f"{where} lies where another tensor lies; convert the model again")
        end = tensor.start + size
        if end > header.size:
            header.refuse(
                f"{where} ends at byte {end:,}, but the file has {header.size:,}; download it again"
            )
