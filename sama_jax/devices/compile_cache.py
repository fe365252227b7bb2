"""Keeps compiled programs between processes, by JAX's persistent compilation cache.

On by default, in a folder of the user's that nobody else can write to: whoever can, can run code in
this process. Imports no JAX, since JAX and the processes that are started read the environment.
"""

import hashlib
import importlib.util
import os
import platform
import stat
import sys
from pathlib import Path

from sama_jax.storage.files import writing

FOLDER = "JAX_COMPILATION_CACHE_DIR"
ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
MOST_BYTES = 2**30
"""What the default folder may hold: some thousand programs of a CPU. The ones that were not used
for longest go first."""


def use_compile_cache(folder: Path | None) -> None:
    """Keeps compiled programs in `folder`, by default in `JAX_COMPILATION_CACHE_DIR` if set.

    Keeps short compilations as well, where JAX would keep only those of a second and more. Whoever
    can write to the folder can run code in this process.

    Raises:
      OutputError: the folder cannot be written.
    """
    folder = folder or Path(os.environ.get(FOLDER, ""))
    if folder == Path():
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _configure({FOLDER: str(folder)})


def use_default_cache() -> str | None:
    """Keeps compiled programs in a folder of the user's, if no other one is named.

    Returns:
      why that folder is not used, where somebody should look at it; None: it is, or cannot be made.
    """
    if os.environ.get(FOLDER) or os.environ.get(ENABLED, "").lower() in ("0", "false", "off"):
        return None
    folder = default_folder()
    try:
        for part in (folder.parent, folder):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := _others_write(part):
                return f"compiled programs are not kept: {part} {reason}"
    except (OSError, RuntimeError):  # no home, or a full or read-only disk
        return None
    size = MOST_BYTES if importlib.util.find_spec("filelock") else -1  # which JAX needs to count
    _configure({FOLDER: str(folder), "JAX_COMPILATION_CACHE_MAX_SIZE": size})
    return None


def leave_compile_cache() -> None:
    """Compiles every program anew, and keeps none."""
    _configure({ENABLED: False})


def default_folder() -> Path:
    """Returns the folder of this user's programs for this kind of processor."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else "~/.cache"
    return Path(base).expanduser() / "sama-jax" / f"programs-{_machine()}"


def _machine() -> str:
    """Names what a program for CPUs is made for: instructions, and how many cores share its work.

    Home folders are shared between machines, and JAX's own key knows no instructions.
    """
    found = [platform.machine(), platform.processor(), str(len(_cores()))]
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = file.read(1 << 14).split("\n\n")[0].splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        found += [line for line in first if line.startswith(kinds)]
    except OSError:  # no Linux
        pass
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _cores() -> set[int]:
    known = getattr(os, "sched_getaffinity", None)
    return known(0) if known else set(range(os.cpu_count() or 1))


def _others_write(folder: Path) -> str | None:
    """Says what lets others than this user put files into a folder; None: nothing does."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if not hasattr(os, "getuid"):  # Windows keeps home folders apart by other means
        return None
    if found.st_uid != os.getuid():
        return "belongs to another user"
    if found.st_mode & 0o022:
        return "can be written by others: chmod go-w, or remove it"
    return None


def _configure(values: dict[str, str | int | bool]) -> None:
    """Sets what JAX reads when it is imported, here and in every process that is started."""
    values = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
        **values,
    }
    os.environ.update({name: str(value) for name, value in values.items()})
    if "jax" in sys.modules:  # it has read them
        import jax

        for name, value in values.items():
            jax.config.update(name.lower(), value)
