"""Checks a folder's tensors against its family's table, exhaustively on both sides."""

from typing import Any

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Rule, Table
from sama_jax.weights.placing import slabs
from sama_jax.weights.safetensors import DTYPES, INDEX
from sama_jax.weights.source import Source
from sama_jax.weights.tensor_map import leaf_paths, sources


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
        unlisted = source.unlisted()
        hint = f" {INDEX} does not list {', '.join(unlisted)}." if unlisted else ""
        raise ModelError(
            f"{where}: {len(problems)} tensors do not fit its config.json; is it another model, or "
            f"an incomplete copy?{hint}\n" + "\n".join(sorted(problems))
        )


def _equal(source: Source, a: str, b: str) -> bool:
    if b not in source.tensors or source.tensors[a].shape != source.tensors[b].shape:
        return False
    box = tuple(map(range, source.tensors[a].shape))
    parts = slabs(source.tensors[a], Rule(a), box)  # the same of b
    return all(np.array_equal(source.window(a, s.index), source.window(b, s.index)) for s in parts)
