"""Dequantises weights that are stored as 8-bit numbers beside scales of rectangles of them.

fp8 as DeepSeek and Qwen publish it has a scale for 128 x 128 values (`weight_scale_inv`), or one
for the whole tensor; compressed-tensors one for a tensor, a row, or a rectangle (`weight_scale`),
read in `quantised_compressed`.
Only weights are dequantised: where a library rounds the activations to 8 bits as well, what is
computed here is what it approximates. Sources: `integrations/finegrained_fp8.py` of transformers
5.23.0; `compressors/naive_quantized` of compressed-tensors 0.20.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sama_jax.models.families.fields import Fields
from sama_jax.untrusted import shown
from sama_jax.weights.parts import FLOAT8, Part, Tensor, needed
from sama_jax.weights.pieces import by_rows

SCALES = ("float32", "bfloat16", "float16")
"""Types that scales may have."""
ONE = np.float32(1)


@dataclass(frozen=True)
class Scaled:
    """Is one weight; `tensor[index]` dequantises a window: (values - zeros) * scales * factor."""

    name: str
    dtype: str
    values: Part
    """Of one byte each, [out, in]."""
    scales: Part
    """[rows, columns] of blocks; axes of 1 at the end may be left out."""
    block: tuple[int, int]
    """Rows and columns of a block; at the end of an axis it may be cut."""
    zeros: Part | None = None
    """Like `scales`."""
    factor: np.float32 = ONE

    @property
    def file(self) -> Path:
        """The file that holds the values."""
        return self.values.file

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self.values.shape

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Dequantises a window. Raises `OSError` or the library's own error."""
        return by_rows(self.shape, self.dtype, index, self._rows)

    def _rows(self, first: int, last: int) -> Float[np.ndarray, "rows in"]:
        values = self.values[slice(first, last), slice(None)].astype(np.float32)
        if self.zeros is not None:
            values -= self._spread(self.zeros, first, last)
        values *= self._spread(self.scales, first, last)
        return values if self.factor == 1 else values * self.factor

    def _spread(self, part: Part, first: int, last: int) -> Float[np.ndarray, "rows in"]:
        """Returns a number of every block for each value of some rows."""
        low, high = first // self.block[0], -(-last // self.block[0])
        rows = slice(low, high) if part.shape else slice(None)
        stored = part[(rows, slice(None), slice(None))[: len(part.shape)]]
        grid = stored.astype(np.float32).reshape(high - low, -1)
        tall = np.repeat(grid, self.block[0], axis=0)[first - low * self.block[0] :]
        wide = np.repeat(tall[: last - first], self.block[1], axis=1)
        return wide[:, : self.shape[1]]


def read_fp8(settings: Fields, dtype: Any) -> tuple[str, Any, Any]:
    """Reads `quantization_config` of the method `fp8`."""
    settings.only({"fmt": ("e4m3",), "expert_dtype": ("fp8",)})
    silent = ("activation_scheme", "dequantize", "modules_to_convert", "modules_to_not_convert")
    for name in (*silent, "ignored_layers", "scale_fmt", "quant_method"):
        settings.get(name)
    stated = settings.with_defaults({"weight_block_size": [128, 128]})
    null = stated.get("weight_block_size") is None
    block = None if null else pair(stated, "weight_block_size")
    settings.refuse_rest(all_matter=True)
    dtype = dtype if dtype in SCALES else "bfloat16"

    def build(name: str, parts: Mapping[str, Part]) -> Tensor:
        values, scales = needed(name, parts, "weight", "scale_inv")
        return scaled(name, dtype, values.require_matrix(FLOAT8), scales, block)

    companions = r"(.+?)\.(?:weight_)?(scale_inv|activation_scale|input_scale)"
    return companions, build, (block, dtype)


def scaled(
    name: str,
    dtype: str | None,
    values: Part,
    scales: Part,
    block: tuple[int, int] | None,
    zeros: Part | None = None,
) -> Scaled:
    """Makes a weight whose scales stand for blocks of a size; None: for the whole, or a row each.

    `dtype` None is that of the scales. Raises `ModelError` for scales of another number.
    """
    rows, columns = values.shape
    if block is None and scales.shape in ((), (1,), (1, 1)):
        block, grid = (rows, columns), scales.shape
    elif block is None:
        block, grid = (1, columns), (rows, 1)[: len(scales.shape)]
    else:
        grid = (-(-rows // block[0]), -(-columns // block[1]))
    scales.require(grid, *SCALES)
    if zeros is not None:
        zeros.require(grid, values.dtype)
    return Scaled(name, dtype or scales.dtype, values, scales, block, zeros)


def pair(settings: Fields, name: str) -> tuple[int, int]:
    """Returns a field of two positive integers."""
    value = settings.get(name)
    sizes = value if isinstance(value, list) and len(value) == 2 else [0, 0]
    if any(type(n) is not int or not 0 < n < 2**31 for n in sizes):
        settings.refuse(f"{name} is {shown(value)}; expected two positive integers")
    return (sizes[0], sizes[1])
