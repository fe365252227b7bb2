"""Dequantises what compressed-tensors wrote: 8-bit values with scales, and packed integers.

`config_groups` says how weights are stored. Source: `compressors` and `quantization` of
compressed-tensors 0.20.1.
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
from sama_jax.weights.quantised_packed import SCALES, WORD, unpacked
from sama_jax.weights.quantised_scaled import pair, scaled

COMPANIONS = r"(.+?)\.(?:weight_(packed|scale|shape|zero_point)|input_(?:scale|zero_point))"
FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
_SILENT = ("quant_method", "version", "ignore", "global_compression_ratio", "quantization_status")
_SILENT += ("format", "config_groups", "sparsity_config")
_SILENT_WEIGHTS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "dynamic")


class Weights:
    """Reads how the weights of the one group are stored."""

    def __init__(self, settings: Fields):
        groups = settings.section("config_groups")
        names = list(settings.get("config_groups"))
        if len(names) != 1:
            settings.refuse(f"config_groups has {len(names)} groups; one is read")
        group = groups.section(names[0])
        format = group.get("format") or settings.get("format")
        if format not in FORMATS:
            settings.refuse(f"its format is {shown(format)}; expected one of {', '.join(FORMATS)}")
        told = group.section("weights").with_defaults({"symmetric": True})
        self.packed = format == "pack-quantized"
        self.bits, self.kind = told.get("num_bits"), told.get("type")
        self.strategy, self.size = told.get("strategy"), told.get("group_size")
        self.symmetric = told.flag("symmetric")
        strategies = ("channel", "group") if self.packed else ("tensor", "channel", "block")
        known = {"int": (4, 8) if self.packed else (8,), "float": () if self.packed else (8,)}
        if self.strategy not in strategies or self.bits not in known.get(str(self.kind), ()):
            told.refuse(
                f"weights of type {shown(self.kind)}, {shown(self.bits)} bits and strategy "
                f"{shown(self.strategy)} in the format {format} are not read"
            )
        self.block = pair(told, "block_structure") if self.strategy == "block" else None
        told.only({"actorder": (None, "static", "weight")})
        for name in (*_SILENT_WEIGHTS, "block_structure"):
            told.get(name)
        told.refuse_rest(all_matter=True)

    @property
    def settings(self) -> Any:
        """Returns all that decides values."""
        return self.packed, self.bits, self.kind, self.strategy, self.size, self.block


def read_settings(settings: Fields, dtype: Any) -> tuple[str, Any, Any]:
    """Reads `quantization_config` of the method `compressed-tensors`."""
    del dtype  # the scales have it
    status = settings.get("quantization_status") or "compressed"
    sparsity = settings.get("sparsity_config") or {"format": "dense"}
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    if status != "compressed" or not dense:
        settings.refuse(
            f"quantization_status is {shown(status)} and sparsity_config {shown(sparsity)}; "
            "expected compressed and dense"
        )
    for name in _SILENT:
        settings.get(name)
    settings.refuse_rest(all_matter=True)
    weights = Weights(settings)

    def build(name: str, parts: Mapping[str, Part]) -> Tensor:
        zeros = None if weights.symmetric else needed(name, parts, "zero_point")[0]
        if weights.packed:
            return _packed(name, parts, zeros, weights)
        values, scales = needed(name, parts, "weight", "scale")
        values.require_matrix(FLOAT8 if weights.kind == "float" else "I8")
        return scaled(name, None, values, scales, weights.block, zeros)

    return COMPANIONS, build, weights.settings


@dataclass(frozen=True)
class PackedRows:
    """Is one weight whose rows are packed; `tensor[index]` dequantises a window of it."""

    name: str
    shape: tuple[int, ...]
    codes: Part
    zeros: Part | None
    """Packed along out, [out / codes in a word, groups]."""
    scales: Part
    """[out, groups]."""
    size: int
    """Inputs of a group."""
    bits: int

    @property
    def file(self) -> Path:
        """The file that holds the codes."""
        return self.codes.file

    @property
    def dtype(self) -> str:
        """Of the scales, as the library's own is."""
        return self.scales.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Dequantises a window. Raises `OSError` or the library's own error."""
        return by_rows(self.shape, self.dtype, index, self._rows)

    def _rows(self, first: int, last: int) -> Float[np.ndarray, "rows in"]:
        columns, middle = self.shape[1], 2 ** (self.bits - 1)  # codes are stored less this
        codes = unpacked(self.codes[slice(first, last), slice(None)], self.bits)[:, :columns]
        spread = lambda x: np.repeat(x, self.size, axis=1)[:, :columns]  # noqa: E731
        if self.zeros is None:
            codes = codes - middle
        else:
            count = WORD // self.bits
            low, high = first // count, -(-last // count)
            words = np.ascontiguousarray(self.zeros[slice(low, high), slice(None)].T)
            zeros = unpacked(words, self.bits).T[first - low * count : last - low * count]
            codes = codes - spread(zeros)  # both are stored with the same offset
        scales = self.scales[slice(first, last), slice(None)].astype(np.float32)
        return codes.astype(np.float32) * spread(scales)


def _packed(
    name: str, parts: Mapping[str, Part], zeros: Part | None, weights: Weights
) -> PackedRows:
    codes, scales, stored = needed(name, parts, "packed", "scale", "shape")
    shape = tuple(int(n) for n in stored.require((2,), "I64", "I32").whole())
    rows, columns = shape if min(shape) > 0 else (1, 1)
    size = columns if weights.strategy == "channel" else weights.size
    if type(size) is not int or size < 1:
        size = columns
    codes.require((rows, -(-columns * weights.bits // WORD)), "I32")
    groups = -(-columns // size)
    scales.require((rows, groups), *SCALES)
    if zeros is not None:
        zeros.require((-(-rows * weights.bits // WORD), groups), "I32")
    return PackedRows(name, shape, codes, zeros, scales, size, weights.bits)
