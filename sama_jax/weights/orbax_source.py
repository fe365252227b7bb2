"""Reads an Orbax checkpoint of ours tensor by tensor, as if it were a safetensors folder.

So what reads tensors by name (checks, adapters, `to-hf`, `verify`) reads both. Loading onto devices
does not go through here: Orbax reads each device's part itself.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Table
from sama_jax.weights import orbax
from sama_jax.weights.source import Source, SourceTensor
from sama_jax.weights.tensor_map import export_tensors, leaf_paths

TOGETHER_BYTES = 32 * 2**20


class OrbaxSource(Source):
    """Holds the parameters of the tensor that was read last, and small ones behind them."""

    def __init__(self, folder: Path, table: Table, num_layers: int, abstract: Any):
        """Raises `ModelError` unless the parameters have the shapes of `abstract`."""
        self.folder = folder
        self.params = orbax.stored_params(folder)
        """Shapes and stored dtypes."""
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
        )

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
                "the model again\n" + "\n".join(sorted(problems))
            )
