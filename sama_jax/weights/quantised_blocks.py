"""Dequantises what bitsandbytes wrote: NF4 and FP4 in blocks, and the rows of LLM.int8.

4-bit weights are stored flat, two codes a byte, the first in the upper half. A block of 64 values
(or as the state says) has a scale `absmax`; with double quantisation this is stored in 8 bits, in
blocks of 256 with scales of their own, less an offset. Source: `functional.py` and
`backends/default/ops.py` of bitsandbytes 0.50.2, which the parity figures of docs/models.md are of.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from jaxtyping import Float, UInt8

from sama_jax.errors import ModelError
from sama_jax.models.families.fields import Fields
from sama_jax.untrusted import parse_json, printable, shown
from sama_jax.weights.parts import Part, Tensor, needed
from sama_jax.weights.pieces import by_rows
from sama_jax.weights.quantised_scaled import Scaled

COMPANIONS = (
    r"(.+?)\.(?:weight\.)?((?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__\w+"
    r"|SCB|weight_format)"
)
STATE = "quant_state.bitsandbytes__"
STATE_BYTES = 2**16
"""Most bytes of the JSON beside a weight; it takes some 200."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Values of a block; the library takes no others."""
INT8 = 7.874015718698502e-3
"""1 / 127, as the library writes it."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
"""Of code 0 to 15: quantiles of a normal distribution, scaled to -1..1 (arXiv 2305.14314, E)."""
FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))
"""A sign, two bits of exponent and one of mantissa, scaled to -1..1."""
_WIDTHS = {"U8": 1, "I8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Types that the codes may be stored as -> bytes."""
MAPS = {"nf4": np.asarray(NF4, np.float32), "fp4": np.asarray(FP4, np.float32)}


def read_settings(settings: Fields, dtype: Any) -> tuple[str, Any, Any]:
    """Reads `quantization_config`. The 4-bit tensors say all themselves, LLM.int8's no dtype.

    LLM.int8 multiplies float16 with anything; the dtype of the config is that of the model.
    """
    del settings
    dtype = dtype if dtype in ("bfloat16", "float32") else "float16"

    def build(name: str, parts: Mapping[str, Part]) -> Tensor:
        rows = {"SCB", "weight_format"} & parts.keys()
        return _int8(name, parts, dtype) if rows else FourBit.of(name, parts)

    return COMPANIONS, build, dtype


def _int8(name: str, parts: Mapping[str, Part], dtype: str) -> Tensor:
    """Makes a weight of LLM.int8: int8 [out, in] times the row's largest value, over 127."""
    weight, scale = needed(name, parts, "weight", "SCB")
    if layout := parts.get("weight_format"):
        layout.require((), "U8")
        if layout.whole() != 0:
            raise ModelError(
                f"{layout.file}: {printable(layout.name, 200)} is {int(layout.whole())}; expected "
                "0 (rows): save the folder again with bitsandbytes 0.45 or newer"
            )
    weight.require_matrix("I8")
    scale.require(weight.shape[:1], "float32")
    return Scaled(name, dtype, weight, scale, (1, weight.shape[1]), None, np.float32(INT8))


@dataclass(frozen=True)
class FourBit:
    """Is one weight in NF4 or FP4; `tensor[index]` dequantises a window of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As the state says; the library gives the same."""
    packed: Part
    size: int
    """Values of a block."""
    code: Float[np.ndarray, "16"]
    absmax: Part
    nested: "Nested | None"

    @property
    def file(self) -> Path:
        """The file that holds the codes."""
        return self.packed.file

    @classmethod
    def of(cls, name: str, parts: Mapping[str, Part]) -> "FourBit":
        """Makes it of its parts. Raises `ModelError` for what does not fit."""
        weight, absmax, code = needed(name, parts, "weight", "absmax", "quant_map")
        state = _state(name, parts)
        shape = tuple(state["shape"])
        # The storage dtype only says what the bytes are called: FSDP wants floats.
        width = _WIDTHS.get(weight.dtype, 1)
        weight.require((-(-math.prod(shape) // (2 * width)), 1), *_WIDTHS)
        stored = code.require((16,), "float32").whole()
        kind, size, dtype = state["quant_type"], state["blocksize"], state["dtype"]
        levels = MAPS[kind]
        if not np.allclose(stored, levels, rtol=0, atol=1e-6):
            raise ModelError(
                f"{code.file}: {printable(code.name, 200)} holds no values of {kind}, which the "
                "library's GPU code has built in; save the folder again with bitsandbytes"
            )
        blocks = -(-math.prod(shape) // size)
        nested = Nested.of(name, parts, state, blocks) if "nested_absmax" in parts else None
        absmax.require((blocks,), "U8" if nested else "float32")
        return cls(name, shape, dtype, weight, size, levels, absmax, nested)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Dequantises a window. Raises `OSError` or the library's own error."""
        return by_rows(self.shape, self.dtype, index, self._rows)

    def _rows(self, first: int, last: int) -> Float[np.ndarray, "rows in"]:
        """Dequantises rows, in whole blocks, since a block may reach over rows."""
        start, end = first * self.shape[1], last * self.shape[1]
        low, high = start // self.size, -(-end // self.size)
        whole = min(high * self.size, math.prod(self.shape))
        values = np.zeros((high - low, self.size), np.float32)
        codes = self._bytes(low * self.size // 2, -(-whole // 2))
        pairs = np.stack(np.meshgrid(self.code, self.code, indexing="ij"), -1).reshape(256, 2)
        values.reshape(-1)[: 2 * len(codes)] = pairs[codes].reshape(-1)
        scale = self.absmax[slice(low, high),]
        values *= (self.nested.scales(scale, low) if self.nested else scale)[:, None]
        inside = slice(start - low * self.size, end - low * self.size)
        return values.reshape(-1)[inside].reshape(last - first, -1)

    def _bytes(self, low: int, high: int) -> UInt8[np.ndarray, "n"]:
        """Reads bytes of the codes, whatever dtype they are stored as."""
        width = _WIDTHS[self.packed.dtype]
        begin = low // width
        stored = self.packed[slice(begin, -(-high // width)), slice(None)]
        found = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        return found[low - begin * width : high - begin * width]


@dataclass(frozen=True)
class Nested:
    """Holds the second quantisation: of the blocks' scales."""

    absmax: Part
    code: Float[np.ndarray, "256"]
    size: int
    offset: np.float32

    @classmethod
    def of(cls, name: str, parts: Mapping[str, Part], state: dict[str, Any], n: int) -> "Nested":
        """Makes it of its parts, for `n` scales. Raises `ModelError` for what does not fit."""
        absmax, code = needed(name, parts, "nested_absmax", "nested_quant_map")
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        finite = isinstance(offset, int | float) and abs(offset) < np.finfo(np.float32).max
        if size not in BLOCKS or not finite:
            raise ModelError(
                f"{absmax.file}: the state of {printable(name, 200)} has the nested blocksize "
                f"{shown(size)} and offset {shown(offset)}; expected {BLOCKS[0]} to {BLOCKS[-1]} "
                "and a number"
            )
        absmax.require((-(-n // size),), "float32")
        return cls(absmax, code.require((256,), "float32").whole(), size, np.float32(offset))

    def scales(self, codes: UInt8[np.ndarray, "n"], first: int) -> Float[np.ndarray, "n"]:
        """Returns the scales of blocks from `first` on."""
        low, high = first // self.size, -(-(first + len(codes)) // self.size)
        per = np.repeat(self.absmax[slice(low, high),], self.size)[first - low * self.size :]
        return self.code[codes] * per[: len(codes)] + self.offset


def _state(name: str, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Reads the JSON object that stands beside a weight, as bytes. Raises `ModelError`."""
    found = [part for label, part in parts.items() if label.startswith(STATE)]
    if len(found) != 1:
        where = next(iter(parts.values())).file
        raise ModelError(
            f"{where}: tensor {printable(name, 200)} has {len(found)} states ({STATE}nf4 or fp4); "
            "expected one, as bitsandbytes 0.41.3 and newer write it"
        )
    (part,) = found
    part.require((min(math.prod(part.shape), STATE_BYTES),), "U8")
    try:
        state = parse_json(part.whole().tobytes().decode("utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{part.file}: tensor {printable(part.name, 200)} is no JSON ({error}); download or "
            "save the folder again"
        ) from None
    state = state if isinstance(state, dict) else {}
    shape = state.get("shape")
    sizes = shape if isinstance(shape, list) and len(shape) == 2 else [0]
    sound = all(type(n) is int and 0 < n < 2**31 for n in sizes)
    sound = sound and str(state.get("quant_type")) in MAPS and state.get("blocksize") in BLOCKS
    if not sound or state.get("dtype") not in ("bfloat16", "float16", "float32"):
        raise ModelError(
            f"{part.file}: tensor {printable(part.name, 200)} is {shown(state, 200)}; expected nf4 "
            f"or fp4, a blocksize of {BLOCKS[0]} to {BLOCKS[-1]}, a shape of two axes and a dtype "
            "of bfloat16, float16 or float32"
        )
    return state
