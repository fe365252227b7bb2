"""Packs weights as the libraries do, value by value: an oracle for tests. Not a test.

Each packer returns the tensors of one weight, and what they stand for in float32 by the plainest
reading of the format, before it is rounded to the dtype of the library.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

NORMAL = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NORMAL += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FLOATS = [0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25]
LEVELS = {"nf4": NORMAL, "fp4": FLOATS + [-x for x in FLOATS]}
Packed = tuple[dict[str, np.ndarray], np.ndarray]


def blocks(rng: Any, shape: tuple[int, int], kind: str, nested: bool, size: int = 64) -> Packed:
    """NF4 or FP4 of bitsandbytes; 60 values of a block's codes are random."""
    count = shape[0] * shape[1]
    codes = rng.integers(0, 16, count + count % 2)
    levels = np.asarray(LEVELS[kind], np.float32)
    scales = (rng.random(-(-count // size)) / 10 + 0.01).astype(np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16"}
    state["shape"] = list(shape)
    tensors = {
        ".weight": np.asarray([[16 * a + b] for a, b in codes.reshape(-1, 2)], np.uint8),
        ".weight.absmax": scales,
        ".weight.quant_map": levels,
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        chosen = rng.integers(0, 256, len(scales))
        curve = np.linspace(-1, 1, 256).astype(np.float32)
        outer = (rng.random(-(-len(scales) // 256)) / 20).astype(np.float32)
        found = [curve[c] * outer[i // 256] for i, c in enumerate(chosen)]
        scales = np.asarray(found, np.float32) + np.float32(0.05)
        tensors[".weight.absmax"] = chosen.astype(np.uint8)
        tensors[".weight.nested_absmax"], tensors[".weight.nested_quant_map"] = outer, curve
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f".weight.quant_state.bitsandbytes__{kind}"] = text
    flat = [levels[codes[i]] * scales[i // size] for i in range(count)]
    return tensors, np.asarray(flat, np.float32).reshape(shape)


def rows(rng: Any, shape: tuple[int, int]) -> Packed:
    """LLM.int8 of bitsandbytes."""
    values = rng.integers(-127, 128, shape).astype(np.int8)
    scales = (rng.random(shape[0]) / 10).astype(np.float32)
    tensors = {".weight": values, ".SCB": scales, ".weight_format": np.zeros((), np.uint8)}
    whole = values.astype(np.float32) * scales[:, None]
    return tensors, whole * np.float32(7.874015718698502e-3)


def words(codes: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """Packs the codes of each row into int32, `order[k]` being the k-th lowest of a word."""
    count = 32 // bits
    order = order or list(range(count))
    out = np.zeros((len(codes), codes.shape[1] // count), np.uint32)
    for word in range(out.shape[1]):
        for k in range(count):
            column = codes[:, word * count + order[k]].astype(np.uint32)
            out[:, word] |= column << np.uint32(bits * k)
    return out.view(np.int32)


def integers(rng: Any, shape: tuple[int, int], kind: str, size: int = 8, bits: int = 4) -> Packed:
    """GPTQ (`gptq`, `gptq_v2`, with inputs in a drawn order) or AWQ (`awq`), asymmetric."""
    out, inputs = shape
    groups, top = inputs // size, 2**bits
    codes = rng.integers(0, top, (inputs, out))
    zeros = rng.integers(1, top, (groups, out))
    scales = (rng.random((groups, out)) / 20 + 0.01).astype(np.float16)
    of = np.arange(inputs) // size
    if kind == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        tensors = {".qweight": words(codes, 4, order), ".qzeros": words(zeros, 4, order)}
    else:
        of = rng.permutation(of)
        stored = zeros - 1 if kind == "gptq" else zeros
        tensors = {".qweight": np.ascontiguousarray(words(codes.T, bits).T)}
        tensors |= {".qzeros": words(stored, bits), ".g_idx": of.astype(np.int32)}
    tensors[".scales"] = scales
    whole = np.empty(shape, np.float32)
    for o in range(out):
        for i in range(inputs):
            whole[o, i] = float(codes[i, o] - zeros[of[i], o]) * np.float32(scales[of[i], o])
    return tensors, whole


def rectangles(rng: Any, shape: tuple[int, int], block: tuple[int, int] = (16, 24)) -> Packed:
    """fp8 with a scale for a block; blocks at the edges are cut."""
    values = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    scales = (rng.random(grid) / 10).astype(np.float32)
    whole = np.empty(shape, np.float32)
    for o in range(shape[0]):
        for i in range(shape[1]):
            whole[o, i] = np.float32(values[o, i]) * scales[o // block[0], i // block[1]]
    return {".weight": values, ".weight_scale_inv": scales}, whole


def grouped(rng: Any, shape: tuple[int, int], size: int = 8) -> Packed:
    """4-bit integers of compressed-tensors, asymmetric, by groups of inputs."""
    out, inputs = shape
    codes, zeros = rng.integers(0, 16, shape), rng.integers(0, 16, (out, inputs // size))
    scales = (rng.random(zeros.shape) / 20 + 0.01).astype(ml_dtypes.bfloat16)
    tensors = {
        ".weight_packed": words(codes, 4),
        ".weight_scale": scales,
        ".weight_zero_point": np.ascontiguousarray(words(zeros.T, 4).T),
        ".weight_shape": np.asarray(shape, np.int64),
    }
    spread = lambda x: np.repeat(x, size, axis=1)  # noqa: E731
    return tensors, (codes - spread(zeros)) * spread(scales.astype(np.float32))


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True, "sym": False}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False}
METHODS: dict[str, tuple[dict[str, Any], str, Callable[..., Packed], tuple[Any, ...]]] = {
    "nf4": (BITSANDBYTES, "bfloat16", blocks, ("nf4", False)),
    "nf4 nested": (BITSANDBYTES, "bfloat16", blocks, ("nf4", True)),
    "fp4": (BITSANDBYTES, "bfloat16", blocks, ("fp4", False)),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "float16", rows, ()),
    "gptq": (GPTQ, "float16", integers, ("gptq",)),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, "float16", integers, ("gptq_v2",)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 8}, "float16", integers, ("awq",)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 24]}, "bfloat16", rectangles, ()),
    "compressed": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        },
        "bfloat16",
        grouped,
        (),
    ),
}
"""Name -> `quantization_config`, dtype of what the library reads, packer and its arguments."""


def quantise(
    folder: Path, method: str, *, seed: int = 0, **changed: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Puts random quantised weights in the place of a folder's linear layers.

    `changed` replaces tensors by name, or leaves them out. Returns all tensors as the library reads
    them.
    """
    config, dtype, pack, arguments = METHODS[method]
    rng = np.random.default_rng(seed)
    tensors, whole = {}, {}
    for name, values in load_file(folder / "model.safetensors").items():
        if "blocks." not in name or values.ndim != 2:
            tensors[name] = whole[name] = values
            continue
        parts, found = pack(rng, values.shape, *arguments)
        tensors |= {name.removesuffix(".weight") + part: x for part, x in parts.items()}
        whole[name] = found.astype(dtype)
    tensors = {name: x for name, x in (tensors | changed).items() if x is not None}
    save(tensors, folder / "model.safetensors")
    told = json.loads((folder / "config.json").read_text())
    told |= {"quantization_config": config, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(told))
    return whole


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes safetensors; 8-bit floats, which the library's own writer has not, as bytes first."""
    floats = {n for n, x in tensors.items() if x.dtype == ml_dtypes.float8_e4m3fn}
    save_file({n: x.view(np.uint8) if n in floats else x for n, x in tensors.items()}, path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name in floats:
        header[name]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
