"""Finds the place of each tensor of an adapter in its base, and makes the changes of it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Table
from sama_jax.weights import adapter_config, adapter_tensors
from sama_jax.weights.adapter_changes import Change, Dora, Experts, LowRank, Read, Rows, Whole
from sama_jax.weights.adapter_config import CONFIG
from sama_jax.weights.source import Source
from sama_jax.weights.tensor_map import leaf_paths, rule_of, sources

EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""Stacked parameters of a module of experts, in the order in which PEFT wraps them: that of their
definition in `models/llada2_moe/modeling_llada2_moe.py` of `inclusionAI/dFactory`."""


@dataclass(frozen=True)
class Base:
    """Holds what an adapter is checked against."""

    source: Source
    table: Table
    num_layers: int
    abstract: Any
    """The parameter tree, as for `checks.check`."""
    block_group_size: int = 1
    """How many blocks a group of the base holds."""

    def name_of(self, stored: str) -> str:
        """Returns the canonical name of a stored tensor."""
        return self.table.name_of(stored, self.block_group_size)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Canonical name of each tensor -> its shape, and whether it is looked up by token."""
        found, leaves = {}, leaf_paths(self.abstract)
        for path in leaves:
            for _, name, shape in sources(path, leaves, self.table, self.num_layers):
                found[name] = (shape, path.endswith("/embedding"))
        if self.tied and self.table.tied_field:
            head, embedding = self.tied
            found[head] = (found[embedding][0], False)
        return found

    @functools.cached_property
    def tied(self) -> tuple[str, str] | None:
        """Head and embedding if they are one tensor."""
        has_head = any(path.startswith("lm_head/") for path in leaf_paths(self.abstract))
        return None if has_head else self.table.tied_head

    @functools.cached_property
    def tables(self) -> tuple[str, str | None]:
        """Embedding and head, which is None where the network has none of its own."""
        leaves = leaf_paths(self.abstract)
        names = {}
        for path in ("embed/embedding", "lm_head/kernel"):
            if path in leaves:
                names[path] = rule_of(path, leaves, self.table, self.num_layers).source
        head = names.get("lm_head/kernel")
        if self.tied and self.table.tied_field:
            head = self.tied[0]
        return names["embed/embedding"], head

    def read(self, name: str) -> Read:
        """Returns how to read a tensor; a tied head is its embedding."""
        head, embedding = self.tied or ("", "")
        return functools.partial(self.source.window, embedding if name == head else name)


Shapes = Mapping[str, tuple[tuple[int, ...], bool]]
"""Canonical name -> shape, and whether it is looked up by token."""


@dataclass
class Placed:
    """Collects what the tensors of one adapter do, and what is wrong with them."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    base: Base
    changes: dict[str, list[Change]] = field(default_factory=dict)
    """Canonical name of the base's tensor -> what is done to it, in this order."""
    modules: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Module that `target_modules` must choose -> its matrix, and a tensor of it in the file."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the base's config, where tables are resized."""
    problems: list[str] = field(default_factory=list)

    def place_all(self) -> "Placed":
        """Places every tensor: whole ones first, since others have their rows."""
        self._place_wholes()
        shapes, self.fields, wrong = _resized(self.base, self.changes)
        self.problems += wrong
        self._place_low_ranks(shapes)
        self._place_tokens(shapes)
        return self

    # --- whole tensors ---------------------------------------------------------------------------

    def _place_wholes(self) -> None:
        """Replaces tensors that were saved whole, unless they are the base's own."""
        names: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            if adapter_tensors.is_special(name) or adapter_tensors.whole_of(name) is None:
                continue
            weight = self.base.name_of(adapter_tensors.whole_of(name) or "")
            if weight not in self.base.shapes or tensor.ndim != len(self.base.shapes[weight][0]):
                self.problems.append(f"  unexpected {name} {list(tensor.shape)}")
            elif weight in names:  # PEFT saves a trained table of a resized model twice
                if not np.array_equal(tensor, self.tensors[names[weight]]):
                    self.problems.append(f"  twice      {name}: also {names[weight]}")
            else:
                names[weight] = name
                self._replace(weight, name, tensor)
        wanted = self.config.get("modules_to_save") or []
        for one in wanted:
            saved = {"modules_to_save": [one]}
            found = (adapter_tensors.whole_of(name) or "" for name in names.values())
            if not any(adapter_config.is_saved(saved, name.rpartition(".")[0]) for name in found):
                self.problems.append(f"  missing    the tensors of {one}, by modules_to_save")

    def _replace(self, weight: str, name: str, tensor: np.ndarray) -> None:
        shape, table = self.base.shapes[weight][0], weight in self.base.tables
        wanted = [tensor.shape[0] if table else shape[0], *shape[1:]]
        wrong = adapter_tensors.unfit(name, tensor, wanted)
        if wrong:
            self.problems += wrong
            return
        change = Whole(tensor.astype(np.float32))
        if tensor.shape == shape and change.is_nothing(self.base.read(weight)):
            return
        module = (adapter_tensors.whole_of(name) or "").rpartition(".")[0]
        if ".base_layer." in name:  # PEFT loads it into a layer that it has wrapped
            sides = filter(None, map(adapter_tensors.lora_side, self.tensors))
            loaded = table and any(side.module == module for side in sides)
        else:
            loaded = table or adapter_config.is_saved(self.config, module)
        if not loaded:
            told = f"not the base's {weight}, and modules_to_save does not name it"
            self.problems.append(f"  differs    {name}: {told}")
            return
        self.changes[weight] = [change]

    # --- low rank --------------------------------------------------------------------------------

    def _place_low_ranks(self, shapes: Shapes) -> None:
        """Adds LoRA and DoRA to the matrices that they are for."""
        pairs: dict[tuple[str, str], dict[str, str]] = {}
        for name, tensor in self.tensors.items():
            side = adapter_tensors.lora_side(name)
            if side is None:
                continue
            weight, module = self._weight_of(side.module)
            known = weight in shapes and shapes[weight][1] == side.embedding
            pair = pairs.setdefault((weight, module), {}) if known else {}
            if not known or len(shapes[weight][0]) not in (2, 3):
                kind, shape = "embedding" if side.embedding else "linear", list(tensor.shape)
                missing = f"the base has no such {kind} layer"
                self.problems.append(f"  unexpected {name} {shape}: {missing}")
            elif side.side in pair:
                self.problems.append(f"  twice      {name}: also {pair[side.side]}")
            else:
                pair[side.side] = name
        magnitudes = self._magnitudes(shapes)
        for (weight, module), sides in pairs.items():
            if len(sides) == 1:
                ((side, name),) = sides.items()
                lost = "B" if side == "A" else "A"
                self.problems.append(f"  missing    lora_{lost} to {name}")
            else:
                self._add(weight, module, sides, shapes[weight], magnitudes.pop(weight, None))
        for name in magnitudes.values():
            self.problems.append(f"  unexpected {name} {list(self.tensors[name].shape)}")

    def _weight_of(self, module: str) -> tuple[str, str]:
        """Returns the matrix that a module's LoRA is for, and the name that patterns match.

        Of a module of stacked experts, the depth of the wrapper tells which parameter it is.
        """
        inner = module.removesuffix(".base_layer")
        depth = (len(module) - len(inner)) // len(".base_layer")
        while inner.endswith(".base_layer"):
            inner, depth = inner.removesuffix(".base_layer"), depth + 1
        stacked = [
            name
            for name in (f"{inner}.{one}" for one in EXPERTS)
            if self.base.name_of(name) in self.base.shapes
            and adapter_config.is_parameter(self.config, name)
        ]
        if stacked and depth < len(stacked):
            name = stacked[len(stacked) - 1 - depth]
            return self.base.name_of(name), name
        return self.base.name_of(f"{module}.weight"), module

    def _magnitudes(self, shapes: Shapes) -> dict[str, str]:
        """Returns the tensors of magnitudes by the matrices that they are for."""
        found = {}
        for name in self.tensors:
            module = adapter_tensors.magnitude_of(name)
            if module is None:
                continue
            weight = self.base.name_of(f"{module}.weight")
            if weight in found or weight not in shapes or not self.config.get("use_dora"):
                self.problems.append(f"  unexpected {name} {list(self.tensors[name].shape)}")
            else:
                found[weight] = name
        return found

    def _add(
        self,
        weight: str,
        module: str,
        sides: dict[str, str],
        expected: tuple[tuple[int, ...], bool],
        magnitude: str | None,
    ) -> None:
        """Makes the LoRA, or DoRA, of one matrix."""
        shape, embedding = expected
        parameter = f"{module}.weight"
        if not adapter_config.is_parameter(self.config, module):
            if adapter_config.is_parameter(self.config, parameter):
                module = parameter  # what PEFT matches its patterns with
            else:
                self.modules[module] = (weight, sides["A"])
        made = _low_rank(self.config, sides, self.tensors, module, shape, embedding, self.path)
        if isinstance(made, list):
            self.problems += made
            return
        if self.config.get("use_dora") and isinstance(made, LowRank):
            made = self._dora(made, shape, magnitude, sides["A"])
        if made is not None:
            self.changes.setdefault(weight, []).append(made)

    def _dora(
        self, low: LowRank, shape: tuple[int, ...], magnitude: str | None, first: str
    ) -> Dora | None:
        if magnitude is None:
            self.problems.append(f"  missing    lora_magnitude_vector to {first}")
            return None
        values = self.tensors[magnitude].reshape(-1)  # older versions keep it as [1, out]
        wrong = adapter_tensors.unfit(magnitude, values, [len(low.b)])
        self.problems += wrong
        return None if wrong else Dora(low, values.astype(np.float32), (shape[0], shape[1]))

    # --- trained tokens --------------------------------------------------------------------------

    def _place_tokens(self, shapes: Shapes) -> None:
        """Replaces the rows of trained tokens."""
        for name, tensor in self.tensors.items():
            module = adapter_tensors.tokens_of(name)
            if module is None:
                continue
            weight = self.base.name_of(f"{module}.weight")
            try:
                ids = adapter_config.token_ids(self.config, module, weight == self.base.tables[0])
            except ValueError as error:
                raise ModelError(f"{self.path / CONFIG}: {error}") from None
            if ids is None or weight not in self.base.tables:
                self.problems.append(
                    f"  unexpected {name} {list(tensor.shape)}: trainable_token_indices does not "
                    "name its module"
                )
                continue
            rows, width = shapes[weight][0]
            wrong = adapter_tensors.unfit(name, tensor, [len(ids), width])
            if ids and max(ids) >= rows:
                wrong.append(f"  rows       {name}: token {max(ids)} of {rows} rows")
            self.problems += wrong
            if not wrong:
                made = Rows(np.array(ids, np.int64), tensor.astype(np.float32))
                self.changes.setdefault(weight, []).append(made)


def _resized(
    base: Base, changes: Mapping[str, list[Change]]
) -> tuple[Shapes, dict[str, Any], list[str]]:
    """Returns the shapes of a base whose tables may be resized, the fields of its config that say
    so, and what is wrong with that."""
    shapes, rows = dict(base.shapes), {}
    for name in filter(None, base.tables):
        first = (changes.get(name) or [None])[0]
        if isinstance(first, Whole):
            shapes[name] = (first.values.shape, shapes[name][1])
        rows[name] = shapes[name][0][0]
    counts, names = set(rows.values()), base.table.rows_fields
    if counts == {base.shapes[name][0][0] for name in rows}:
        return shapes, {}, []
    if names and len(counts) == 1:
        return shapes, dict.fromkeys(names, *counts), []
    found = ", ".join(f"{name} has {count} rows" for name, count in rows.items())
    why = "all of them must be saved" if names else "of this family that is not read"
    return shapes, {}, [f"  resized    {found}: {why}"]


def _low_rank(
    config: dict[str, Any],
    sides: dict[str, str],
    tensors: dict[str, np.ndarray],
    module: str,
    shape: tuple[int, ...],
    embedding: bool,
    where: Path,
) -> LowRank | Experts | list[str]:
    """Makes the adapter of one matrix, or of a stack, or says what is wrong with its tensors."""
    rank, scale = adapter_config.rank_and_scale(config, module, where)
    count = shape[0] if len(shape) == 3 else 1
    out, inside = shape[::-1] if embedding else shape[-2:]
    wanted = {sides["A"]: [count * rank, inside], sides["B"]: [out, count * rank]}
    problems = adapter_tensors.misfits(tensors, wanted)
    if problems:
        return problems
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        a, b = (tensors[sides[side]].astype(np.float32) for side in "AB")
        b = np.float32(scale) * b
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return [f"  values     {sides['A']}: it, its B or their scale is not finite in float32"]
    if len(shape) == 3:  # B's columns: for each rank, one of each expert
        stacked = b.reshape(out, rank, count).transpose(2, 0, 1)
        return Experts(a.reshape(count, rank, inside), stacked, scale)
    return LowRank(module, a, b, scale, embedding)
