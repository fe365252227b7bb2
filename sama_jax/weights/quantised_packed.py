"""Dequantises integers of 2, 4 or 8 bits that are packed into int32: GPTQ, AWQ, compressed-tensors.

GPTQ and AWQ keep a linear layer's weight as [in, out]: GPTQ packs 8 codes of 4 bits along in, AWQ
along out in an order of its own; both pack their zero points along out. compressed-tensors keeps
[out, in] and packs along in. A code stands for (code - zero) * scale, by groups of inputs.
Sources: `nn_modules/qlinear` of AutoGPTQ 0.7.1 and GPTQModel 7.3.4; `utils/packing_utils.py` of
AutoAWQ 0.2.9; `compressors/pack_quantized` of compressed-tensors 0.20.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sama_jax.errors import ModelError
from sama_jax.models.families.fields import Fields
from sama_jax.untrusted import printable, shown
from sama_jax.weights.parts import Part, Tensor, needed
from sama_jax.weights.pieces import by_rows

COMPANIONS = r"(.+)\.(qweight|qzeros|scales|g_idx)"
WORD = 32
"""Bits that codes are packed into."""
SCALES = ("float16", "bfloat16", "float32")
IN_ORDER = tuple(range(16))
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of AWQ's eight codes in a word: which one stands for column 0, 1, ..."""
_GPTQ_SILENT = (
    # What the tensors say themselves (g_idx, zero points, which layers have parts), how the
    # quantiser worked, and which kernel runs.
    *("quant_method", "desc_act", "sym", "static_groups", "true_sequential", "act_group_aware"),
    *("damp_percent", "damp_auto_increment", "dataset", "tokenizer", "model_seqlen", "mse"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id"),
    *("modules_in_block_to_quantize", "max_input_length", "cache_block_outputs", "use_cuda_fp16"),
    *("use_exllama", "disable_exllama", "exllama_config", "backend", "model_name_or_path", "meta"),
    *("model_file_base_name", "lm_head", "modules_to_not_convert", "pack_impl", "quantizer"),
)
_AWQ_SILENT = (
    *("quant_method", "modules_to_not_convert", "fuse_max_seq_len", "modules_to_fuse"),
    *("exllama_config", "sym", "desc_act"),
)


def unpacked(
    words: Int[np.ndarray, "rows n"], bits: int, order: tuple[int, ...] = IN_ORDER
) -> Int[np.ndarray, "rows m"]:
    """Unpacks the codes of words, along the last axis; the lowest bits come first."""
    count = WORD // bits
    shifts = np.asarray(order[:count], np.uint32) * np.uint32(bits)
    found = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return found.reshape(len(words), -1).astype(np.int32)


def unpacked_columns(
    part: Part, bits: int, first: int, last: int, order: tuple[int, ...] = IN_ORDER
) -> Int[np.ndarray, "rows m"]:
    """Reads codes `first` to `last` of every row of a part that is packed along its last axis."""
    count = WORD // bits
    low, high = first // count, -(-last // count)
    words = np.ascontiguousarray(part[slice(None), slice(low, high)])
    return unpacked(words, bits, order)[:, first - low * count : last - low * count]


@dataclass(frozen=True)
class Packed:
    """Is one weight of GPTQ or AWQ; `tensor[index]` dequantises a window of it, [out, in]."""

    name: str
    shape: tuple[int, ...]
    codes: Part
    zeros: Part
    scales: Part
    groups: Int[np.ndarray, "in"]
    """The group of each input."""
    bits: int
    order: tuple[int, ...] | None
    """Of codes that are packed along out, as AWQ does; None: along in."""
    offset: int
    """Added to the stored zero points: 1 in GPTQ's first format."""

    @property
    def file(self) -> Path:
        """The file that holds the codes."""
        return self.codes.file

    @property
    def dtype(self) -> str:
        """Of the scales, as the libraries' own is."""
        return self.scales.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Dequantises a window. Raises `OSError`, `ModelError` or the library's own error."""
        return by_rows(self.shape, self.dtype, index, self._rows)

    def _rows(self, first: int, last: int) -> Float[np.ndarray, "rows in"]:
        if self.order is None:
            words = np.ascontiguousarray(self.codes[slice(None), slice(first, last)].T)
            codes = unpacked(words, self.bits).T
        else:
            codes = unpacked_columns(self.codes, self.bits, first, last, self.order)
        zeros = unpacked_columns(self.zeros, self.bits, first, last, self.order or IN_ORDER)
        if self.offset and zeros.size and zeros.max() == 2**self.bits - 1:
            raise ModelError(
                f"{self.zeros.file}: {printable(self.zeros.name, 200)} has zero points of "
                f"{2**self.bits} (v1), which some libraries read as 0 and some as that; save it "
                "with GPTQModel as gptq_v2, or quantise it symmetrically"
            )
        scales = self.scales[slice(None), slice(first, last)].astype(np.float32)
        codes = codes - (zeros + self.offset)[self.groups]
        return (codes.astype(np.float32) * scales[self.groups]).T


def _groups(settings: Fields, name: str, part: Part, inputs: int) -> Int[np.ndarray, "in"]:
    """Returns the group of each input by the size of groups. Raises `ModelError`."""
    size = settings.get("group_size", 128)
    size = inputs if size == -1 else size
    if type(size) is not int or not 0 < size <= 2**31:
        settings.refuse(f"group_size is {shown(size)}; expected a positive integer, or -1")
    if -(-inputs // size) != part.shape[0]:
        raise ModelError(
            f"{part.file}: {printable(part.name, 200)} has {part.shape[0]} groups; expected "
            f"{-(-inputs // size)}, since group_size is {size} and {printable(name)} has {inputs} "
            "inputs"
        )
    return (np.arange(inputs) // size).astype(np.int32)


def _bits(settings: Fields, *known: int) -> int:
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits not in known or type(bits) is not int:
        settings.refuse(f"bits is {shown(bits)}; expected one of {known}")
    return bits


def read_gptq(settings: Fields, dtype: Any) -> tuple[str, Any, Any]:
    """Reads `quantization_config` of the method `gptq`."""
    del dtype  # the scales have it
    bits = _bits(settings, 2, 4, 8)
    formats = [settings.get(n) for n in ("checkpoint_format", "format")]
    format = next((f for f in formats if f is not None), "gptq")
    if format not in ("gptq", "gptq_v2"):
        settings.refuse(f"its format is {shown(format)}; expected gptq or gptq_v2")
    settings.only({"is_marlin_format": (False, None), "pack_dtype": ("int32", None)})
    for name in _GPTQ_SILENT:
        settings.get(name)
    settings.get("group_size")
    settings.refuse_rest(all_matter=True)
    offset = int(format == "gptq")

    def build(name: str, parts: Mapping[str, Part]) -> Tensor:
        codes, zeros, scales = needed(name, parts, "qweight", "qzeros", "scales")
        inputs, out = codes.require_matrix("I32").shape[0] * WORD // bits, codes.shape[1]
        scales.require((*scales.shape[:1], out), *SCALES)
        zeros.require((scales.shape[0], -(-out * bits // WORD)), "I32")
        groups = _groups(settings, name, scales, inputs)
        if given := parts.get("g_idx"):
            groups = given.require((inputs,), "I32").whole()
            if groups.min() < 0 or groups.max() >= scales.shape[0]:
                raise ModelError(
                    f"{given.file}: {printable(given.name, 200)} names groups from {groups.min()} "
                    f"to {groups.max()}; expected 0 to {scales.shape[0] - 1}"
                )
        return Packed(name, (out, inputs), codes, zeros, scales, groups, bits, None, offset)

    return COMPANIONS, build, (bits, settings.get("group_size"), format)


def read_awq(settings: Fields, dtype: Any) -> tuple[str, Any, Any]:
    """Reads `quantization_config` of the method `awq`."""
    del dtype
    bits = _bits(settings, 4)
    formats = [settings.get(n) for n in ("version", "format")]
    format = next((f for f in formats if f is not None), "gemm")
    backend = settings.get("backend", "autoawq")
    if str(format).lower() != "gemm" or backend == "llm-awq":
        settings.refuse(
            f"its packing is {shown(format)} of {shown(backend)}; expected gemm of AutoAWQ"
        )
    settings.only({"zero_point": (True, None)})
    for name in (*_AWQ_SILENT, "group_size", "q_group_size"):
        settings.get(name)
    settings.refuse_rest(all_matter=True)

    def build(name: str, parts: Mapping[str, Part]) -> Tensor:
        codes, zeros, scales = needed(name, parts, "qweight", "qzeros", "scales")
        inputs, out = codes.require_matrix("I32").shape[0], codes.shape[1] * WORD // bits
        scales.require((*scales.shape[:1], out), *SCALES)
        zeros.require((scales.shape[0], codes.shape[1]), "I32")
        groups = _groups(settings, name, scales, inputs)
        return Packed(name, (out, inputs), codes, zeros, scales, groups, bits, AWQ_ORDER, 0)

    return COMPANIONS, build, (bits, settings.get("group_size"))
