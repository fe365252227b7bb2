"""Reads adapters as PEFT saves them, and merges them or keeps them beside their base.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`; nothing else is
read, nothing is unpickled. For a module with weight W, LoRA has A and B and stands for

    linear     W [out, in] + scale * B [out, r] A [r, in]
    embedding  W [v, d]    + scale * (B [d, r] A [r, v])^T

with scale = alpha / r, or alpha / sqrt(r) under `use_rslora`. What else an adapter may do to a
tensor is in `adapter_changes`. Plain LoRA can be kept beside its base; anything else is merged
while the base is read. Names, scales and patterns were compared with PEFT 0.21.2, which the tests
run.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.untrusted import shown
from sama_jax.weights import adapter_config, adapter_patterns, adapter_tensors
from sama_jax.weights.adapter_changes import Change, LowRank, MergedSource, Rows, Whole
from sama_jax.weights.adapter_config import CONFIG, WEIGHTS
from sama_jax.weights.adapter_places import Base, Placed
from sama_jax.weights.checks import listing
from sama_jax.weights.source import Source
from sama_jax.weights.tensor_map import leaf_paths, rule_of, sources

Leaves = dict[str, tuple[np.ndarray, np.ndarray]]
"""Parameter path -> `lora_a` [*n, in, r] and `lora_b` [*n, r, out]."""


class Adapter(NamedTuple):
    """Holds a checked adapter: every tensor of its file has found its place."""

    path: Path
    changes: dict[str, list[Change]]
    """Canonical name of the base's tensor -> what is done to it, in this order."""
    fields: dict[str, Any]
    """Of the base's config, which an adapter with resized tables changes."""
    tie: str
    """What becomes of a head that is tied to its embedding: `same`, it is changed alike; `apart`,
    it is not; empty, neither is changed, or they were never tied."""
    is_nothing: bool
    """Whether the base stays what it is."""
    identity: str
    """16 hex digits over the file's bytes and every module's scale."""

    @property
    def modules(self) -> dict[str, LowRank] | None:
        """Canonical name -> what is added, if nothing but that is done; else None."""
        plain = {
            name: made[0]
            for name, made in self.changes.items()
            if len(made) == 1 and isinstance(made[0], LowRank)
        }
        whole = len(plain) == len(self.changes) and not self.fields and self.tie != "same"
        return plain if whole else None


def open_adapter(path: Path, base: Base) -> Adapter:
    """Reads an adapter and checks it against a base.

    Raises:
      ModelError: one message that lists every tensor that does not fit.
    """
    config = adapter_config.read_config(path)
    tensors, digest = adapter_tensors.read_tensors(path)
    placed = Placed(path, config, tensors, base).place_all()
    tie = _tie(base, placed.changes, bool(config.get("ensure_weight_tying")), placed.problems)
    if placed.problems:
        named = config.get("base_model_name_or_path")
        told = f" (it was trained on {shown(named)})" if named else ""
        raise ModelError(
            f"{path}: {len(placed.problems)} adapter tensors do not fit the base model; is it an "
            f"adapter for another one{told}?\n" + listing(placed.problems)
        )
    if not any(map(adapter_tensors.is_special, tensors)) and not placed.changes:
        raise ModelError(f"{path / WEIGHTS}: holds no LoRA tensor; expected lora_A and lora_B")
    _require_chosen(placed, tie)
    plain = [(n, m.scale) for n, made in placed.changes.items() for m in _scaled(made)]
    for fact in sorted(plain):
        digest.update(repr(fact).encode())
    rows = [(n, m.ids.tolist()) for n, made in placed.changes.items() for m in _rows(made)]
    if rows or tie == "same":
        digest.update(repr((sorted(rows), tie)).encode())
    nothing = all(_is_nothing(base, name, made) for name, made in placed.changes.items())
    return Adapter(path, placed.changes, placed.fields, tie, nothing, digest.hexdigest()[:16])


def _scaled(made: Sequence[Change]) -> list[Any]:
    return [m for m in (getattr(change, "low", change) for change in made) if hasattr(m, "scale")]


def _rows(made: Sequence[Change]) -> list[Rows]:
    return [change for change in made if isinstance(change, Rows)]


def _is_nothing(base: Base, name: str, made: Sequence[Change]) -> bool:
    """Tells whether a tensor stays what it is; one that is replaced was compared before."""
    read = base.read(name)
    for change in made:
        if isinstance(change, Whole) or not change.is_nothing(read):
            return False
        read = functools.partial(change.window, read)
    return True


def _tie(base: Base, changes: dict[str, list[Change]], ensured: bool, problems: list[str]) -> str:
    """Returns what becomes of a tied head (`Adapter.tie`), and forgets its copy of a change.

    As PEFT 0.21.2 does: what it does to an embedding leaves the head alone, but for trained
    tokens and under `ensure_weight_tying`; a table that was resized is saved for both.
    """
    if base.tied is None:
        return ""
    head, embedding = base.tied
    first, second = changes.get(embedding, []), changes.get(head, [])
    if not first and not second:
        return ""
    if base.table.tied_field is None:
        return "apart"
    own = [change for change in first if not isinstance(change, Rows)]
    if _rows(first) and not _rows(second):
        # Trained tokens are the head's, too.
        second = [*(second or (own if ensured else ())), *_rows(first)]
        changes[head] = second
    if _alike(first, second) or (ensured and not second):
        changes.pop(head, None)
        return "same"
    if ensured:
        problems.append(f"  differs    {head}: not changed as {embedding}; ensure_weight_tying")
    return "apart"


def _alike(first: Sequence[Change], second: Sequence[Change]) -> bool:
    """Tells whether an embedding and its head are changed in the same way."""
    if not second or len(first) != len(second):
        return False
    for one, other in zip(first, second):
        if isinstance(one, LowRank) and isinstance(other, LowRank):
            scale = np.float32(one.scale)
            if not np.array_equal(scale * one.a.T, other.b):
                return False
            if one.scale != other.scale or not np.array_equal(one.b.T, scale * other.a):
                return False
        elif isinstance(one, Rows) and isinstance(other, Rows):
            if not all(map(np.array_equal, one, other)):
                return False
        elif not (isinstance(one, Whole) and isinstance(other, Whole)) or not np.array_equal(
            one.values, other.values
        ):
            return False
    return True


def _require_chosen(placed: Placed, tie: str) -> None:
    """Raises `ModelError` if PEFT would not load all tensors, by what the config chooses."""
    table, config, path = placed.base.table, placed.config, placed.path
    head = table.tied_head[0] if table.tied_head else None
    linear = {
        module: weight != head and not placed.base.shapes[weight][1]
        for module, (weight, _) in placed.modules.items()
        if not (tie == "same" and weight == head)  # PEFT adapts it whatever the config chooses
    }
    try:
        left_out = adapter_patterns.left_out(config, linear) if linear else {}
    except (re.error, ValueError) as error:
        raise ModelError(f"{path / CONFIG}: unusable choice of modules ({error})") from None
    for module, (_, name) in placed.modules.items():
        if module in left_out:
            field = left_out[module]
            raise ModelError(
                f"{path / CONFIG}: {field} is {shown(config.get(field))}, which leaves out "
                f"{name} (the first of {len(left_out)} modules that {WEIGHTS} holds "
                "all the same): PEFT would not load it; correct the field, or save the adapter "
                "again with PEFT"
            )


# --- the two uses --------------------------------------------------------------------------------


def merge(base: Base, adapter: Adapter) -> tuple[Source, dict[str, Any]]:
    """Returns the tensors of the merged model, and the fields of its config that are others.

    Each window is merged when it is read. An embedding and its tied head become two tensors where
    the adapter changes them in different ways.

    Raises `ModelError` in a family whose head is always its embedding.
    """
    copies, fields = {}, dict(adapter.fields)
    if adapter.tie == "apart" and base.tied is not None:
        if base.table.tied_field is None:
            raise ModelError(
                f"{adapter.path}: adapts the embedding of a model whose head is tied to it; "
                "merged, the head would change, too, which it does not in PEFT's forward pass"
            )
        copies, fields = dict([base.tied]), fields | {base.table.tied_field: False}
    return MergedSource(base.source, adapter.changes, copies), fields


def leaves(adapter: Adapter, base: Base, allowed: re.Pattern[str]) -> Leaves | None:
    """Returns an adapter by parameter path: `lora_a` [*n, in, r] and `lora_b` [*n, r, out].

    Float32, stacked over layers as the parameter is; layers without an adapter, or with one of
    smaller rank, are filled with zeros. Parameters that no layer adapts have none.

    Args:
      adapter: what `open_adapter` returns.
      base: what it was opened for.
      allowed: paths that the network applies an adapter to.

    Returns:
      None if it does more than that, or elsewhere: it must be merged.
    """
    found, shapes, modules = {}, leaf_paths(base.abstract), adapter.modules
    if modules is None or (base.tied is not None and base.tied[0] in modules):
        return None
    for path, leaf in shapes.items():
        named = [(p, n) for p, n, _ in sources(path, shapes, base.table, base.num_layers)]
        places = {p: modules[n] for p, n in named if n in modules}
        if not places:
            continue
        if not allowed.fullmatch(path):
            return None
        fused = rule_of(path, shapes, base.table, base.num_layers).fused
        rank = max(len(m.a) for m in places.values())
        lead = leaf.shape[:-2]
        a = np.zeros((*lead, leaf.shape[-2], rank), np.float32)
        b = np.zeros((*lead, rank, leaf.shape[-1]), np.float32)
        for place, m in places.items():
            rows = m.b
            if fused:  # the rows of B that belong to this parameter's part of the output
                rows = rows.reshape(*fused.view, len(m.a))[fused.pick].reshape(-1, len(m.a))
            a[place][:, : len(m.a)] = m.a.T
            b[place][: len(m.a)] = rows.T
        found[path] = (a, b)
    return found


def stacked(found: Sequence[Leaves]) -> Leaves:
    """Returns several adapters as one, whose rank is the sum of theirs."""
    paths = dict.fromkeys(path for one in found for path in one)
    both = {path: [one[path] for one in found if path in one] for path in paths}
    return {
        path: (
            np.concatenate([a for a, _ in pairs], axis=-1),
            np.concatenate([b for _, b in pairs], axis=-2),
        )
        for path, pairs in both.items()
    }


def attach(params: Any, found: Mapping[str, tuple[Any, Any]]) -> Any:
    """Adds `lora_a` and `lora_b` next to the adapted parameters of a tree; copies no array."""

    def walk(tree: Any, at: str) -> Any:
        new = {k: walk(v, f"{at}{k}/") if isinstance(v, dict) else v for k, v in tree.items()}
        for name in tree:
            if at + name in found:
                new["lora_a"], new["lora_b"] = found[at + name]
        return new

    return walk(params, "")
