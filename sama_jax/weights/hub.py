"""Finds a model's folder: a path, or a repository of the Hugging Face Hub, downloaded."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from sama_jax.errors import ModelError
from sama_jax.terminal import unguarded

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
"""What is downloaded of a Hub repository: no code, no pickles."""
PICKLES = ("pytorch_model*.bin",)
"""What is downloaded as well where the caller reads pickles."""
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def resolve(name: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """Returns a model's folder: a path that exists, else that of a Hub id, downloaded.

    An id is `owner/name` or `owner/name@revision`. A name whose first part is a folder here is a
    path. `HF_HUB_OFFLINE=1` stays with what has been downloaded before. `files` are the patterns of
    what is downloaded. Raises `ModelError`.
    """
    path = Path(name)
    match = _HUB_ID.fullmatch(str(name))
    if match is None or os.path.isdir(path.parts[0]):
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(
            f"{name}: no such folder; to download it from the Hub, pip install 'sama-jax[hub]'"
        ) from None
    try:
        with unguarded():  # it draws a progress bar
            found = huggingface_hub.snapshot_download(
                match["id"], revision=match["revision"], allow_patterns=list(files)
            )
    except (OSError, ValueError, RuntimeError) as error:  # what its errors derive from
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(
            f"{name}: no such folder here, and not available from the Hub "
            f"({type(error).__name__}: {reason})"
        ) from None
    return Path(found)
