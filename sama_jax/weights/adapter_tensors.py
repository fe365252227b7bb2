"""Reads the tensors of an adapter, and tells by their names what each of them is.

Names, in PEFT 0.21.2's words, behind `base_model.model.` and the name of a module:

    lora_A.weight, lora_B.weight                 of a linear layer, or of a parameter
    lora_embedding_A, lora_embedding_B           of an embedding
    lora_magnitude_vector                        DoRA
    token_adapter.trainable_tokens_delta         rows of trained tokens
    weight, bias, ...                            a whole tensor of the base, trained or resized

Modules that PEFT has wrapped several times have `base_layer` in their names once more each time.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sama_jax.errors import ModelError
from sama_jax.untrusted import printable
from sama_jax.weights import stored_bytes
from sama_jax.weights.adapter_config import WEIGHTS
from sama_jax.weights.safetensors import tensor_starts

DTYPES = ("float32", "bfloat16", "float16", "float64")
_LORA = re.compile(
    r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.(?!weight$)(?P<adapter>[^.]+))?"
    r"(?P<weight>\.weight)?$"
)
_MAGNITUDE = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
_TOKENS = re.compile(r"^(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")


class Side(NamedTuple):
    """One of the two matrices of LoRA."""

    module: str
    """As it is stored; an inner wrapper ends in `.base_layer`."""
    side: str
    embedding: bool


def lora_side(name: str) -> Side | None:
    """Returns which matrix of LoRA a tensor is; None for any other tensor."""
    match = _LORA.match(name)
    if match is None or bool(match["weight"]) == bool(match["kind"]):
        return None
    return Side(plain_name(match["module"]), match["side"], bool(match["kind"]))


def magnitude_of(name: str) -> str | None:
    """Returns the module whose magnitudes a tensor holds; None for any other tensor."""
    match = _MAGNITUDE.match(name)
    return None if match is None else plain_name(match[1])


def tokens_of(name: str) -> str | None:
    """Returns the module whose rows a tensor holds; None for any other tensor."""
    match = _TOKENS.match(name)
    return None if match is None else plain_name(match[1])


def is_special(name: str) -> bool:
    """Tells whether a tensor is PEFT's own, and not in the place of one of the base's."""
    return any(look(name) is not None for look in (lora_side, magnitude_of, tokens_of))


def whole_of(name: str) -> str | None:
    """Returns the base's tensor that stands in a tensor's place; None for one that PEFT keeps
    beside what was trained in its stead."""
    return None if ".original_module." in name else _WRAPPED.sub("", plain_name(name))


def plain_name(name: str) -> str:
    """Returns a name in the wrapped model: without PEFT's `base_model.model.`."""
    return re.sub(r"^(?:.*?\.)?base_model\.model\.", "", name)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    """Reads all tensors of the adapter, and a running SHA-256 of the file's bytes."""
    file = path / WEIGHTS
    if not file.is_file():
        hint = ""
        if any(path.glob("*.bin")):
            hint = "; its weights are pickled (.bin), which are never read: save as safetensors"
        raise ModelError(f"{path}: has no {WEIGHTS}{hint}")
    try:
        stamp = stored_bytes.same_files([(WEIGHTS, file)])
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256")
        with safe_open(file, framework="numpy") as handle:
            tensor_starts(file)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if stored_bytes.same_files([(WEIGHTS, file)]) != stamp:
            raise ValueError("it has changed while it was read")
        return tensors, digest
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError, KeyError) as error:
        # The last three: a type that NumPy has not, such as 8-bit floats.
        raise ModelError(
            f"{file}: not a complete safetensors file of floating-point numbers "
            f"({printable(str(error), 200)}); download or save it again"
        ) from None


def misfits(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, list[int]]) -> list[str]:
    """Returns which of some tensors have another shape than wanted, or a type that is not read.

    Args:
      tensors: all of an adapter.
      wanted: names -> their shapes.
    """
    found = []
    for name, shape in wanted.items():
        tensor = tensors[name]
        if list(tensor.shape) != shape:
            found.append(f"  shape      {name}: expected {shape}, found {list(tensor.shape)}")
        if str(tensor.dtype) not in DTYPES:
            found.append(f"  dtype      {name}: {tensor.dtype} is not supported")
    return found


def unfit(name: str, tensor: np.ndarray, shape: list[int]) -> list[str]:
    """Returns what is wrong with a tensor: its shape, its type, or a value that is not finite."""
    return misfits({name: tensor}, {name: shape}) or finite(name, tensor)


def finite(name: str, tensor: np.ndarray) -> list[str]:
    """Returns what is wrong with the values of a tensor in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        fits = np.isfinite(tensor.astype(np.float32)).all()
    return [] if fits else [f"  values     {name}: it is not finite in float32"]
