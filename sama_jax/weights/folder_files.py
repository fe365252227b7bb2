"""Names the files of a model folder and reads those that hold JSON."""

import json
import os
from pathlib import Path
from typing import Any

from sama_jax.errors import ModelError
from sama_jax.weights import safetensors

CONFIG = "config.json"
PARAMS = "orbax"
"""Subfolder of the parameters where Orbax keeps them, not safetensors."""
RECORD = "conversion.json"
"""Where a converted folder comes from; written first, so that an unfinished one can be told."""


def json_object(file: Path) -> dict[str, Any]:
    """Reads a file's JSON object; empty if there is none to read."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json_config(path: Path) -> dict[str, Any]:
    """Reads the `config.json` of a folder. Raises `ModelError`."""
    if not os.path.isdir(path):
        raise ModelError(f"{path}: no such folder; expected a model folder with {CONFIG}")
    if not os.path.isfile(path / CONFIG) and os.path.isfile(path / RECORD):
        raise ModelError(
            f"{path}: a conversion that did not finish (it has a {RECORD} but no {CONFIG}); run "
            "the same command of checkpoints_convert again"
        )
    if not os.path.isfile(path / CONFIG):
        raise ModelError(
            f"{path}: has no {CONFIG}; expected a Hugging Face model folder ({CONFIG}, "
            f"{safetensors.SINGLE}, tokenizer.json)"
        )
    return read_config_file(path / CONFIG)


def read_config_file(path: Path) -> dict[str, Any]:
    """Reads a `config.json`, wherever it lies. Raises `ModelError`."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a model's {CONFIG}") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def companions(path: Path) -> list[Path]:
    """Lists what is neither config nor weights: tokenizer, generation settings, licence."""
    files = (f for f in sorted(path.iterdir()) if f.is_file() and f.name != CONFIG)
    return [f for f in files if not _is_weights(f)]


def _is_weights(file: Path) -> bool:
    return (
        file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".part")
        or file.name.endswith(".index.json")
        or file.name == RECORD
    )
