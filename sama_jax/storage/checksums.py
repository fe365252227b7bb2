"""Records what a finished run folder holds, and finds what was changed since."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sama_jax.storage.files import opened, unsealed

MANIFEST = "manifest.json"
PIECE = 2**20


def record(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file of a run folder, by its path in the folder.

    Left out is the manifest, which holds this and carries a checksum of its own. Raises `DataError`
    for what is no regular file.
    """
    return {name: sha256(folder / name) for name in sorted(_recorded(folder))}


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, 64 hex digits. Raises `DataError` if it cannot be read."""
    found = hashlib.sha256()
    with opened(path) as file:
        while piece := file.read(PIECE):
            found.update(piece)
    return found.hexdigest()


def changed(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names the files that are no longer what the manifest recorded: changed, gone or new."""
    before = manifest.get("files") or {}
    names = sorted(before.keys() | set(_recorded(folder)))
    found = [] if unsealed(dict(manifest)) is not None else [MANIFEST]
    for name in names:
        path = folder / name
        if name not in before or not path.is_file() or sha256(path) != before[name]:
            found.append(name)
    return found


def is_changed(folder: Path, manifest: Mapping[str, Any], name: str) -> bool:
    """Tells whether one file, if it was recorded, is another one now."""
    before = (manifest.get("files") or {}).get(name)
    return before is not None and sha256(folder / name) != before


def _recorded(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and path.suffix != ".part" and not path.is_dir():
            yield name
