"""Reads an Orbax checkpoint of ours tensor by tensor, as if it were a safetensors folder.

So what reads tensors by name (checks, adapters, `to-hf`, `verify`) reads both. Loading onto devices
does not go through here: Orbax reads each device's part itself.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Table
from sama_jax.weights import orbax, stored_bytes
from sama_jax.weights.checks import listing
from sama_jax.weights.folder_files import PARAMS, RECORD, read_object
from sama_jax.weights.source import Source, SourceTensor
from sama_jax.weights.tensor_map import export_tensors, leaf_paths

TOGETHER_BYTES = 32 * 2**20


class Stored(NamedTuple):
    """Describes the Orbax checkpoint of a model folder, as its record does."""

    folder: Path
    params: Any
    """Shapes and stored dtypes."""
    files: list[tuple[str, Path]]
    digest: str
    """SHA-256 of the files when they were written."""
    stamp: str
    """What `same_files` said of the files before they were read."""


def files_below(folder: Path) -> list[tuple[str, Path]]:
    """Returns all files of a checkpoint by their paths in it, in order."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(str(file.relative_to(folder)), file) for file in found]


def read_stored(model: Path) -> Stored:
    """Reads what a converted folder holds, no array of it.

    Raises:
      ModelError: no readable record, or other files than the record names.
    """
    folder = model / PARAMS
    if not (model / RECORD).is_file():
        raise ModelError(
            f"{model}: has {PARAMS}/ but no {RECORD}, which says what it holds; copy the folder "
            "whole or convert the model again"
        )
    record = read_object(model / RECORD)
    sizes, digest = record.get("sizes"), record.get("digest")
    if not isinstance(sizes, dict) or not isinstance(digest, str):
        raise ModelError(
            f"{model / RECORD}: does not say which bytes {PARAMS}/ holds (sizes, digest); convert "
            "the model again"
        )
    files = files_below(folder)
    found = {name: file.stat().st_size for name, file in files}
    wrong = [
        f"  {name}: expected {sizes.get(name, 'no file')}, found {found.get(name, 'no file')}"
        for name in sorted({*sizes, *found})
        if found.get(name) != sizes.get(name)
    ]
    if wrong:
        raise ModelError(
            f"{folder}: {len(wrong)} files of its Orbax checkpoint are missing, incomplete or not "
            "its own; copy or convert the model again\n" + listing(wrong)
        )
    stamp = stored_bytes.same_files(files)
    return Stored(folder, orbax.stored_params(folder), files, digest, stamp)


class OrbaxSource(Source):
    """Holds the parameters of the tensor that was read last, and small ones behind them."""

    def __init__(self, stored: "Stored", table: Table, num_layers: int, abstract: Any):
        """Raises `ModelError` unless the parameters have the shapes of `abstract`."""
        folder, self.params = stored.folder, stored.params
        self.folder = folder
        self._stored = stored
        self._leaves = leaf_paths(self.params)
        self._held: dict[str, np.ndarray] = {}
        self._wanted: set[str] = set()
        self._require_fit(leaf_paths(abstract))
        prefix = table.hub_prefix
        exported = export_tensors(self.params, table, num_layers, self._leaf)
        self._pending = {name.removeprefix(prefix): made for name, made in exported.items()}
        super().__init__(
            {
                name: SourceTensor(folder, prefix + name, made.shape, str(made.dtype))
                for name, made in self._pending.items()
            },
            {},
            stored.stamp,
        )

    @property
    def files(self) -> list[tuple[str, Path]]:
        """All files of the checkpoint, by their paths in it."""
        return self._stored.files

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of all stored bytes. Raises `ModelError` if it is not the recorded one."""
        found = stored_bytes.digest(self.files)
        self.require_unchanged()
        if found != self._stored.digest:
            raise ModelError(
                f"{self.folder}: is damaged: its bytes are not those that {RECORD} records; "
                "convert the model again"
            )
        return found

    def window(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a window of a tensor in its stored dtype, one thread at a time.

        Only what was read last is held.
        """
        with self._lock:
            self._wanted = set()
            values = self._pending[name].make()[index]
            self.bytes_read += values.nbytes
        return values

    def _leaf(self, path: str) -> np.ndarray:
        self._wanted.add(path)
        if path not in self._held:
            self._held = {p: leaf for p, leaf in self._held.items() if p in self._wanted}
            chosen = self._from(path)
            wanted = [np.ndarray if p in chosen else None for p in self._leaves]
            tree = jax.tree.unflatten(jax.tree.structure(self.params), wanted)
            read = leaf_paths(orbax.load_params(self.folder, tree))
            self._held |= {p: read[p] for p in chosen}
        return self._held[path]

    def _from(self, path: str) -> list[str]:
        """Returns this leaf and small ones behind it: each read has a fixed cost."""
        chosen, room = [path], TOGETHER_BYTES
        paths = list(self._leaves)
        for other in paths[paths.index(path) + 1 :]:
            room -= self._leaves[other].size * self._leaves[other].dtype.itemsize
            if room < 0:
                break
            chosen.append(other)
        return chosen

    def _require_fit(self, wanted: dict[str, Any]) -> None:
        found = self._leaves
        problems = [f"  missing    {p} {list(wanted[p].shape)}" for p in wanted if p not in found]
        problems += [f"  unexpected {p} {list(found[p].shape)}" for p in found if p not in wanted]
        problems += [
            f"  shape      {p}: expected {list(wanted[p].shape)}, found {list(found[p].shape)}"
            for p in wanted
            if p in found and wanted[p].shape != found[p].shape
        ]
        if problems:
            raise ModelError(
                f"{self.folder}: {len(problems)} parameters do not fit its config.json; convert "
                "the model again\n" + listing(problems)
            )
