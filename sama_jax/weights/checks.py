"""Checks a folder's tensors against its family's table, exhaustively on both sides."""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Rule, Table
from sama_jax.untrusted import printable
from sama_jax.weights.placing import slabs
from sama_jax.weights.safetensors import DTYPES, INDEX
from sama_jax.weights.source import Source
from sama_jax.weights.tensor_map import lead_axes, leaf_paths, rule_of, sources

LISTED = 200
"""Problems that a message lists; a folder may hold a million tensors that do not fit."""


def check(source: Source, table: Table, num_layers: int, abstract: Any, where: str) -> None:
    """Raises one `ModelError` for all that does not fit.

    Every tensor must be consumed, every parameter filled, every shape right.
    """
    expected: dict[str, tuple[int, ...]] = {}
    leaves = leaf_paths(abstract)
    for path in leaves:
        for _, name, shape in sources(path, leaves, table, num_layers):
            expected[name] = shape
    allowed = set(expected)
    problems = []
    tied, copies = table.tied_head, table.copies
    for copy, original in (*((tied,) if tied else ()), *copies):
        if copy in expected or copy not in source.tensors:
            continue
        allowed.add(copy)
        if not _equal(source, copy, original):
            problems.append(f"  differs    {copy}: the head is tied, but differs from {original}")
    problems += [
        f"  missing    {n} {list(s)}" for n, s in expected.items() if n not in source.tensors
    ]
    problems += [
        f"  unexpected {t.name} {list(t.shape)}"
        for n, t in source.tensors.items()
        if n not in allowed
    ]
    problems += [
        f"  shape      {source.tensors[n].name}: expected {list(s)}, found "
        f"{list(source.tensors[n].shape)}"
        for n, s in expected.items()
        if n in source.tensors and source.tensors[n].shape != s
    ]
    problems += [
        f"  dtype      {t.name}: {t.dtype} is not a floating-point type that is supported"
        for n, t in source.tensors.items()
        if n in allowed and t.dtype not in DTYPES.values()
    ]
    if problems:
        raise ModelError(
            f"{where}: {len(problems)} tensors do not fit its config.json; is it another model, or "
            f"an incomplete copy?{_hint(source)}\n" + listing(problems)
        )


def listing(problems: Iterable[str]) -> str:
    """Returns the lines of a list of problems, sorted and cut after `LISTED`."""
    lines = [f"  {printable(line.strip(), 300)}" for line in sorted(problems)]
    rest = len(lines) - LISTED
    return "\n".join(lines[:LISTED] + ([f"  and {rest:,} more"] if rest > 0 else []))


def _hint(source: Source) -> str:
    """Returns what the names of the tensors tell about how the folder came about."""
    names = [tensor.name for tensor in source.tensors.values()]
    if any(re.search(r"\.(base_layer|lora_\w+|modules_to_save)\.", name) for name in names):
        return (
            " It is a state of PEFT's wrapper, with an adapter in it: merge the adapter "
            "(merge_and_unload) and save the result."
        )
    if any(re.search(r"\.(absmax|quant_map|qweight|weight_scale(_inv)?)$", n) for n in names):
        return (
            " Its weights are quantised, but config.json has no quantization_config (or another "
            "method's) that says how."
        )
    unlisted = source.unlisted()
    return f" {INDEX} does not list {printable(', '.join(unlisted), 300)}." if unlisted else ""


def require_possible(abstract: Any, table: Table, num_layers: int, held: int, where: str) -> None:
    """Raises `ModelError` if one parameter alone needs more tensors than the files hold.

    So that whatever the config claims, what is listed afterwards is as large as the files.
    """
    leaves = leaf_paths(abstract)
    for path, leaf in leaves.items():
        needed = math.prod(leaf.shape[: lead_axes(rule_of(path, leaves, table, num_layers))])
        if needed > held:
            raise ModelError(
                f"{where}: its config.json promises {needed:,} tensors for {path}, but the files "
                f"hold {held:,} in all; is it another model's config?"
            )


def _equal(source: Source, a: str, b: str) -> bool:
    if b not in source.tensors or source.tensors[a].shape != source.tensors[b].shape:
        return False
    if not {source.tensors[a].dtype, source.tensors[b].dtype} <= set(DTYPES.values()):
        return True  # reported by its dtype, which NumPy may not have
    box = tuple(map(range, source.tensors[a].shape))
    parts = slabs(source.tensors[a], Rule(a), box)  # the same of b
    return all(np.array_equal(source.window(a, s.index), source.window(b, s.index)) for s in parts)
