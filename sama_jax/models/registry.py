"""Which family a folder's `config.json` belongs to, and the network to build. No files, no devices.

Each module of `families/` lists its families as `FAMILIES`; a new module is found by being there.
Fields that a config leaves out take the default of the family's own config class, never the value
of its best-known checkpoint.
"""

import functools
import pkgutil
from importlib import import_module
from typing import Any

from sama_jax.arrays import Model
from sama_jax.errors import ModelError, nearest
from sama_jax.models import families
from sama_jax.models.families.family import Family, FamilyConfig


@functools.cache
def known_families() -> dict[str, Family]:
    """Returns every family by its `model_type`, module by module."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        listed = vars(import_module(module.name)).get("FAMILIES", ())
        found |= {family.model_type: family for family in listed}
    return found


def build_model(family: FamilyConfig, mask_id: int, dtype: Any) -> Model:
    """Returns the pure functions of a family's network; `dtype` is that of the activations."""
    return family.network(
        arch=family.arch, mask_id=mask_id, shift=family.shift, kind=family.kind, dtype=dtype
    )


def read_config(config: dict[str, Any], where: str) -> FamilyConfig:
    """Reads a parsed `config.json` by `model_type` and `architectures` together.

    `where` is the file's path, for messages. Raises `ModelError` for what is not known: the two
    fields are both needed, since LLaDA-MoE's Hub config also says `llada`.
    """
    known = known_families()
    matching = (f for f in known.values() if f.matches is not None and f.matches(config))
    kind = config.get("model_type")
    family = next(matching, known.get(kind) if isinstance(kind, str) else None)
    if family is None:
        raise ModelError(
            f"{where}: model_type is {kind!r}, which is not a supported family"
            + nearest(str(kind), known)
        )
    architectures = config.get("architectures") or []
    listed = architectures if isinstance(architectures, list) else [architectures]
    if architectures and not any(name in listed for name in family.architectures):
        raise ModelError(
            f"{where}: model_type is '{family.model_type}' but architectures is {architectures}; "
            f"expected one of {list(family.architectures)}"
        )
    try:
        return family.read(config, where)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: a field has an unusable value ({error})") from None
