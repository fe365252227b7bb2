"""Finds the family that a folder's `config.json` belongs to, and builds the network. No files, no
devices.

Each module of `families/` lists its families as `FAMILIES`; a new module is found by being there,
one of another package by an entry point. Fields that a config leaves out take the default of the
family's own config class, never the value of its best-known checkpoint.
"""

import dataclasses
import importlib.metadata
import pkgutil
from importlib import import_module
from typing import Any

from sama_jax.arrays import Model
from sama_jax.errors import ModelError, nearest
from sama_jax.models import attention_mask, families
from sama_jax.models.families.family import UNLIMITED, Family, FamilyConfig
from sama_jax.models.families.fields import Fields
from sama_jax.untrusted import shown

ENTRY_POINTS = "sama_jax.models.families"
"""Group of entry points of other packages: each names a module that lists its `FAMILIES`."""
LENGTHS = ("max_sequence_length", "max_position_embeddings", "n_positions", "model_length")
"""Fields that say how many tokens a model was made for; the least one counts. `block_size` is not
among them: lit-gpt means that by it, block-diffusion models the length of their blocks."""


def known_families() -> dict[str, Family]:
    """Returns every family by its `model_type`, module by module; ours win over those of other
    packages. Raises `ModelError` for a module of another package that cannot be loaded."""
    modules = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            modules.append(entry.load())
        except Exception as error:  # foreign code: whatever it raises must name its origin
            raise ModelError(
                f"the module of families '{entry.value}' of another package cannot be loaded "
                f"({error}); uninstall or update that package"
            ) from error
    ours = pkgutil.iter_modules(families.__path__, f"{families.__name__}.")
    modules += [import_module(module.name) for module in ours]
    listed = [family for module in modules for family in vars(module).get("FAMILIES", ())]
    return {family.model_type: family for family in listed}


def build_model(family: FamilyConfig, mask_id: int, dtype: Any) -> Model:
    """Returns the pure functions of a family's network; `dtype` is that of the activations."""
    return family.network(
        arch=family.arch, mask_id=mask_id, shift=family.shift, kind=family.kind, dtype=dtype
    )


def with_attention_mask(family: FamilyConfig, name: str) -> FamilyConfig:
    """Returns a family whose network attends as `attention_mask` names it.

    Raises `ValueError` for an unknown name, and for a model that leaves no choice: one of another
    kind than diffusion, or a network of another package without blocks.
    """
    arch = family.arch
    new = {
        "block_length": attention_mask.block_length_of(name),
        "clean_context": attention_mask.has_clean_context(name),
    }
    choice = new.keys() <= getattr(arch, "__dataclass_fields__", {}).keys()
    if family.kind != "diffusion" or not choice:
        raise ValueError(
            f"attention mask '{name}': a choice of diffusion models alone, this one is a "
            f"{family.kind} {family.family} model"
        )
    changed: Any = dataclasses.replace(arch, **new)  # pyright: ignore  a protocol
    return family._replace(arch=changed)


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
            f"{where}: model_type is {shown(kind)}, which is not a supported family"
            + nearest(str(kind)[:99], known)
        )
    architectures = config.get("architectures") or []
    listed = architectures if isinstance(architectures, list) else [architectures]
    if architectures and not any(name in listed for name in family.architectures):
        raise ModelError(
            f"{where}: model_type is '{family.model_type}' but architectures is "
            f"{shown(architectures)}; "
            f"expected one of {list(family.architectures)}"
        )
    fields = Fields(config, where)
    try:
        read = family.read(fields)
        stated = fields.get(attention_mask.FIELD) if read.kind == "diffusion" else None
        if stated is not None:
            read = with_attention_mask(read, str(stated)[:99])
        known_lengths = [n for n in LENGTHS if fields.get(n) is not None]
        lengths = fields.sizes(*known_lengths, limit=2**31 - 1)
        fields.get("quantization_config")  # of the weights, whose reader refuses what it must
        fields.refuse_rest()
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{where}: a field has an unusable value ({error})") from None
    own = (read.max_length, read.arch.max_length or UNLIMITED)
    return read._replace(max_length=min(*own, *lengths))
