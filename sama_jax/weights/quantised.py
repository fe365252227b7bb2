"""Finds out how a folder's weights are quantised, and makes its tensors whole again.

`quantization_config` names the method. A quantised weight is stored as several tensors, its parts;
what stands in their place afterwards is one tensor, of which windows are dequantised as they are
read. A module without parts is plain, whatever lists of modules the config has.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sama_jax.errors import ModelError
from sama_jax.models.families.fields import Fields
from sama_jax.untrusted import printable, shown
from sama_jax.weights import (
    quantised_blocks,
    quantised_compressed,
    quantised_packed,
    quantised_scaled,
)
from sama_jax.weights.parts import Part, Tensor

FIELD = "quantization_config"
"""Of a `config.json`."""
WEIGHT = "weight"
"""The part that has the name of the whole."""


class Method(NamedTuple):
    """Says how the weights of a folder are quantised."""

    name: str
    """What `quant_method` says."""
    settings: str
    """All that decides values and is not stored with them: part of the model's identity."""
    companions: re.Pattern[str]
    """Of a part's name: the groups are its module and which part it is."""
    build: Callable[[str, Mapping[str, Part]], Tensor]
    """(name of the weight, its parts) -> the tensor. Raises `ModelError`."""

    def assembled(self, parts: Sequence[Part]) -> list[Tensor]:
        """Returns the tensors of a folder; where a weight has several parts, one tensor for them.

        Raises `ModelError` for parts that do not fit or are there twice.
        """
        sets: dict[str, dict[str, Part]] = {}
        for part in parts:
            if found := self.companions.fullmatch(part.name):
                _put(sets.setdefault(f"{found[1]}.{WEIGHT}", {}), found[2], part)
        plain: list[Tensor] = []
        for part in parts:
            if part.name in sets:
                _put(sets[part.name], WEIGHT, part)
            elif not self.companions.fullmatch(part.name):
                plain.append(part)
        return plain + [self.build(name, found) for name, found in sets.items()]


def _put(found: dict[str, Part], label: str, part: Part) -> None:
    if label in found:
        raise ModelError(
            f"{part.file}: tensor {printable(part.name, 200)} is in {found[label].file.name}, too"
        )
    found[label] = part


def read_method(config: Mapping[str, Any], where: str) -> Method | None:
    """Returns how the weights of a `config.json` are quantised; None: they are not.

    `where` is the file's path, for messages. Raises `ModelError` for a method, or a setting of one,
    that is not read.
    """
    if not config.get(FIELD):
        return None
    settings = Fields(config, where).section(FIELD)
    name = settings.get("quant_method")
    if name is None and any(settings.get(f"load_in_{bits}bit") for bits in (4, 8)):
        name = "bitsandbytes"  # which older versions of transformers did not write
    if not isinstance(name, str) or name not in READERS:
        settings.refuse(
            f"the weights are quantised by {shown(name)}, which is not read; expected one of "
            f"{', '.join(READERS)}, or weights saved in bfloat16 or float32"
        )
    dtype = config.get("dtype") or config.get("torch_dtype")
    companions, build, told = READERS[name](settings, dtype)
    return Method(name, repr(told), re.compile(companions), build)


Reader = Callable[[Fields, Any], tuple[str, Callable[[str, Mapping[str, Part]], Tensor], Any]]
"""(the method's settings, the config's dtype) -> companions, build, what decides values."""

READERS: dict[str, Reader] = {
    "bitsandbytes": quantised_blocks.read_settings,
    "gptq": quantised_packed.read_gptq,
    "awq": quantised_packed.read_awq,
    "fp8": quantised_scaled.read_fp8,
    "compressed-tensors": quantised_compressed.read_settings,
}
