"""Reads `adapter_config.json` of PEFT: which options an adapter has, and each module's scale."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.untrusted import printable, shown
from sama_jax.weights import adapter_patterns
from sama_jax.weights.folder_files import read_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Fields that are used here, and fields that cannot change what a trained adapter computes: where
# it came from, dropout, and options of options that must be off.
_USED = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters"),
    "ensure_weight_tying",
)
_SILENT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    "eva_config",
)
# Any other field must be off, also one that a later PEFT adds. Initialisations that are not in this
# list change the base (PiSSA, OLoRA, CorDA, LoftQ, ...) or the forward pass.
_VALUES = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_FLAGS = ("use_rslora", "use_dora", "ensure_weight_tying")
_OR_NULL = _FLAGS[1:]
_NAMES = ("modules_to_save", "target_parameters")
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
"""Beginnings of initialisations that PEFT can save as plain LoRA on the base as it was."""


def read_config(path: Path) -> dict[str, Any]:
    """Reads `adapter_config.json`. Raises `ModelError` if it asks for what is not read."""
    file = path / CONFIG
    if not file.is_file():
        raise ModelError(
            f"{path}: has no {CONFIG}; expected an adapter folder of PEFT ({CONFIG}, {WEIGHTS})"
        )
    config = read_object(file)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{file}: peft_type is {shown(config.get('peft_type'))}, only 'LORA' is supported"
        )
    refused = [
        f"{printable(name)} is {shown(value)}"
        for name, value in config.items()
        if name not in _USED + _SILENT and not _is_off(name, value)
    ]
    if refused:
        raise ModelError(
            f"{file}: not supported: {'; '.join(refused)}. {_way_out(config)} Merge it with PEFT "
            "(merge_and_unload) and use the merged folder"
        )
    wrong = [
        *(f"{n} is {shown(config[n])}" for n in _FLAGS if not _is_flag(n, config.get(n, False))),
        *(f"{n} is {shown(config[n])}" for n in _NAMES if not _are_names(config.get(n) or [])),
    ]
    if wrong:
        raise ModelError(f"{file}: unusable: {'; '.join(wrong)}; expected what PEFT writes")
    return config


def _is_off(name: str, value: Any) -> bool:
    if name in _VALUES:
        return any(value is v or (isinstance(v, str) and value == v) for v in _VALUES[name])
    return value is None or value is False or value in ([], {}, "")


def _is_flag(name: str, value: Any) -> bool:
    return type(value) is bool or (value is None and name in _OR_NULL)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, str) and n for n in value)


def _way_out(config: Mapping[str, Any]) -> str:
    if str(config.get("init_lora_weights")).lower().startswith(_CONVERTIBLE):
        return (
            "Its base is not the model but what the initialisation left of it: save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it whole."
        )
    return ""


def rank_and_scale(config: dict[str, Any], module: str, where: Path) -> tuple[int, float]:
    """Returns r and alpha / r of a module.

    The first pattern that matches the end of its name decides.
    """

    def get(pattern: str, default: str) -> Any:
        for key, value in adapter_patterns.checked(config, pattern).items():
            if adapter_patterns.compiled(key).match(module):
                return value
        return config.get(default, 8)  # the default of PEFT's class, for both

    try:
        rank, alpha = get("rank_pattern", "r"), get("alpha_pattern", "lora_alpha")
        if type(rank) is not int or not 0 < rank < 2**31 or type(alpha) not in (int, float):
            raise ValueError(f"rank {shown(rank)} and alpha {shown(alpha)} for {module}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not abs(scale) <= float(np.finfo(np.float32).max):
            raise ValueError(f"scale {scale} for {module}, which is no float32")
    except (re.error, OverflowError, ValueError) as error:
        raise ModelError(f"{where / CONFIG}: unusable rank or alpha ({error})") from None
    return rank, scale


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Tells whether `modules_to_save` names a module, or one that it is part of.

    PEFT takes every module whose name ends so, be it in the middle of a word.
    """
    ends = tuple(config.get("modules_to_save") or ())
    parts = module.split(".")
    return any(".".join(parts[:n]).endswith(ends) for n in range(1, len(parts) + 1) if ends)


def is_parameter(config: Mapping[str, Any], name: str) -> bool:
    """Tells whether `target_parameters` names a parameter, by its whole name or the end of it."""
    found = config.get("target_parameters") or ()
    return any(name == one or name.endswith(f".{one}") for one in found)


def token_ids(config: Mapping[str, Any], module: str, embedding: bool) -> list[int] | None:
    """Returns the tokens whose rows a module trains; None for a module that the config leaves out.

    A list is of the embedding's; an object names modules by the ends of their names.

    Raises `ValueError` if they are no token ids, or one stands twice.
    """
    found = config.get("trainable_token_indices")
    if isinstance(found, dict):
        found = next((ids for name, ids in found.items() if module.endswith(name)), None)
    elif not embedding:
        return None
    if found is None:
        return None
    usable = isinstance(found, list) and all(type(i) is int and 0 <= i < 2**31 for i in found)
    if not usable or len(set(found)) < len(found):
        raise ValueError(f"trainable_token_indices is {shown(found)}; expected distinct token ids")
    return found
