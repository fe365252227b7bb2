"""Maps parameters to the tensors that fill them by a family's table, and back for writing."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sama_jax.models.families.weight_table import Fused, Rule, Table
from sama_jax.weights.safetensors import Pending


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Returns `{"blocks/attn/q_proj/kernel": leaf, ...}` of a nested dict."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in flat}


def rule_of(path: str, leaves: Mapping[str, Any], table: Table, num_layers: int) -> Rule:
    """Returns the rule of one of `leaves` (by `leaf_paths`), with `joined` turned into `fused`."""
    rule = table.rule(path, num_layers)
    if not rule.joined:
        return rule
    parent, module, leaf = path.rsplit("/", 2)
    rows = {name: leaves[f"{parent}/{name}/{leaf}"].shape[-1] for name in rule.joined}
    start = sum(rows[name] for name in rule.joined[: rule.joined.index(module)])
    part = Fused((sum(rows.values()),), (slice(start, start + rows[module]),))
    return rule._replace(fused=part)


def sources(
    path: str, leaves: Mapping[str, Any], table: Table, num_layers: int
) -> Iterator[tuple[tuple[int, ...], str, tuple[int, ...]]]:
    """Yields (place on the leading axes, source name, source shape) of every layer and expert."""
    rule, shape = rule_of(path, leaves, table, num_layers), leaves[path].shape
    lead = lead_axes(rule)
    inner = swap(shape[lead:]) if rule.transpose else shape[lead:]
    if rule.fused:
        inner = (math.prod(rule.fused.view), *inner[1:])
    for place in np.ndindex(*shape[:lead]):
        yield place, _source_name(rule, place, shape, num_layers), inner


def swap(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Swaps the last two axes: [out, in] and [in, out], of one matrix or of a stack."""
    return (*axes[:-2], axes[-1], axes[-2])


def lead_axes(rule: Rule) -> int:
    """Returns how many leading axes of a parameter count layers and experts."""
    return ("{i}" in rule.source) + ("{e}" in rule.source)


def _source_name(
    rule: Rule, place: tuple[int, ...], shape: tuple[int, ...], num_layers: int
) -> str:
    """Names the source at `place` on the leading axes; a stack ends before the last block."""
    names = {}
    if "{i}" in rule.source:
        names["i"] = num_layers - 1 - shape[0] + place[0]
    if "{e}" in rule.source:
        names["e"] = place[-1]
    return rule.source.format(**names)


def export_tensors(
    params: Any,
    table: Table,
    num_layers: int,
    get: Callable[[str], np.ndarray] | None = None,
) -> dict[str, Pending]:
    """Returns the parameters under their Hub names, in their own dtype.

    Args:
      params: the tree, or its shapes and dtypes.
      get: parameter path -> its values (host); left out, they are taken from `params`.
    """
    leaves = leaf_paths(params)
    get = get or (lambda path: np.asarray(leaves[path]))
    parts: dict[str, list[tuple[str, Rule, tuple[int, ...]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in leaves:
        rule = rule_of(path, leaves, table, num_layers)
        for place, name, shape in sources(path, leaves, table, num_layers):
            parts.setdefault(name, []).append((path, rule, place))
            shapes[name] = shape

    def make(name: str) -> np.ndarray:
        whole = None
        for path, rule, place in parts[name]:
            piece = get(path)[place]
            piece = piece.swapaxes(-1, -2) if rule.transpose else piece
            if rule.fused is None:
                return piece
            whole = np.empty(shapes[name], piece.dtype) if whole is None else whole
            rest = piece.shape[1:]
            part = whole.reshape(*rule.fused.view, *rest)
            part[rule.fused.pick] = piece.reshape(part[rule.fused.pick].shape)
        assert whole is not None
        return whole

    prefix = table.hub_prefix
    return {
        prefix + name: Pending(
            shapes[name], np.dtype(leaves[of[0][0]].dtype), functools.partial(make, name)
        )
        for name, of in parts.items()
    }
