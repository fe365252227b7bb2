"""Turns JAX's persistent compilation cache on: a second process then compiles nothing."""

import os
from pathlib import Path

import jax

from sama_jax.storage.files import writing


def use_compile_cache(folder: Path | None) -> None:
    """Keeps compiled programs in `folder`, by default in `JAX_COMPILATION_CACHE_DIR` if set.

    Keeps short compilations as well, where JAX would keep only those of a second and more. Whoever
    can write to the folder can run code in this process.

    Raises:
      OutputError: the folder cannot be written.
    """
    folder = folder or Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
    if folder == Path():
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
