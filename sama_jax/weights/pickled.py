"""Rewrites pickled PyTorch weights (`.bin`) as safetensors, on request only.

A pickle can run any code when it is read. Torch's weights-only loading refuses everything but
tensors and plain containers; what it gives is written as safetensors, which all else reads.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes

from sama_jax.errors import ModelError
from sama_jax.untrusted import printable, shown
from sama_jax.weights import folder_files, safetensors

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def has_only_pickles(folder: Path) -> bool:
    """Returns whether a folder's weights exist as pickles and not as safetensors."""
    return not safetensors.has_weights(folder) and bool(_files(folder))


def rewrite(folder: Path, out: Path) -> None:
    """Copies `folder` to `out`, which exists, with safetensors for pickles.

    One file of the source at a time is in memory. Raises `ModelError`.
    """
    files = _files(folder)
    config = folder_files.read_json_config(folder)
    (out / folder_files.CONFIG).write_text(json.dumps(config), "utf-8")
    folder_files.copy_companions(folder, out)
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        tensors = _load(file)
        if twice := sorted(weight_map.keys() & tensors.keys()):
            raise ModelError(f"{file}: the same tensor in two files: {', '.join(twice)}")
        safetensors.write_file(out / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / safetensors.INDEX).write_text(json.dumps(index), "utf-8")


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return folder_files.listed_files(folder / INDEX)
    return [folder / SINGLE] if (folder / SINGLE).is_file() else []


def _load(file: Path) -> dict[str, safetensors.Pending]:
    try:
        import torch
    except ImportError:
        raise ModelError(
            f"{file}: reading pickled weights needs torch: pip install 'sama-jax[verify]'"
        ) from None
    try:
        mapped = zipfile.is_zipfile(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # damage can fail in any way in there
        reason = printable(str(error).strip().split("\n")[0], 200)
        raise ModelError(
            f"{file}: not read by torch's weights-only loading ({type(error).__name__}: {reason})"
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a dictionary of tensors, found {type(found).__name__}")
    wrong = {shown(k): type(v).__name__ for k, v in found.items() if not _is_plain(k, v)}
    if wrong:
        name, kind = next(iter(wrong.items()))
        raise ModelError(
            f"{file}: {len(wrong)} entries are no plain tensors with a name (first {name}: "
            f"{kind}); expected dense tensors of integers or of {', '.join(safetensors.DTYPES)}"
        )
    return {name: _pending(tensor) for name, tensor in found.items()}


def _is_plain(name: Any, tensor: Any) -> bool:
    """Returns whether safetensors can hold a tensor."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return False
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    kind = str(tensor.dtype).removeprefix("torch.")
    return dense and not tensor.is_quantized and kind in safetensors.CODES


def _pending(tensor: Any) -> safetensors.Pending:
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # NumPy's view of it, bit for bit
        values = plain.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        values = plain.numpy()
    return safetensors.Pending(values.shape, values.dtype, lambda: values)
