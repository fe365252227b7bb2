"""Loads the weights of opened folders onto devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from sama_jax.arrays import Params
from sama_jax.weights import orbax, peft, placing
from sama_jax.weights.model_folder import ModelFolder
from sama_jax.weights.orbax_source import OrbaxSource
from sama_jax.weights.tensor_map import leaf_paths, rule_of

Placement = jax.sharding.Sharding | Callable[[Params, Any], Params]
"""Where parameters go: one sharding for all, or (tree of shapes, architecture) -> tree of them."""


def load(
    folder: ModelFolder, placement: Placement, progress: Callable[[int], None] | None = None
) -> Params:
    """Loads the weights onto devices in the model's dtype; `progress` is told bytes done.

    An adapter's leaves are float32.
    """
    (params,) = load_together([folder], placement, progress)
    return params


def load_together(
    folders: Sequence[ModelFolder],
    placement: Placement,
    progress: Callable[[int], None] | None = None,
) -> list[Params]:
    """Loads several folders; those with the same weights and dtype share the very arrays.

    So an adapter and its base, or two adapters of one base, cost one base in memory.
    """
    bases: dict[tuple[str, str], Params] = {}
    loaded = []
    for folder in folders:
        places = _places(folder, placement)
        dtype = folder.model.dtype
        key = (folder.base_identity, str(dtype))
        if key not in bases:
            bases[key] = read_params(folder, lambda path, _: (dtype, places[path]), progress)  # noqa: B023
        leaves = {}
        for path, pair in folder.adapter.items():
            names = [f"{path.rpartition('/')[0]}/{name}" for name in ("lora_a", "lora_b")]
            leaves[path] = tuple(_put(x, places[n]) for n, x in zip(names, pair))
        if leaves and progress:
            progress(sum(x.nbytes for x in jax.tree.leaves(leaves)))
        loaded.append(peft.attach(bases[key], leaves))
    return loaded


def _places(folder: ModelFolder, placement: Placement) -> dict[str, jax.sharding.Sharding]:
    """Returns the sharding of every parameter by path, an adapter's among them."""
    shapes = peft.attach(folder.abstract_params, dict(folder.adapter))
    if callable(placement):
        return leaf_paths(placement(shapes, folder.model.arch))
    return dict.fromkeys(leaf_paths(shapes), placement)


def _put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts a host array, the same in every process, onto devices of any of them."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def read_params(
    folder: ModelFolder,
    place: Callable[[str, jax.ShapeDtypeStruct], tuple[Any, jax.sharding.Sharding]],
    progress: Callable[[int], None] | None = None,
) -> Params:
    """Reads the weights, each leaf where and in the dtype that `place(its path, its shape)` says.

    Buffers keep their stored dtype. Of an Orbax folder, `progress` is told all bytes at the end.
    """
    shapes, layout = folder.abstract_params, (folder.family.weights, folder.model.num_layers)
    leaves = leaf_paths(shapes)
    ours = folder.source if isinstance(folder.source, OrbaxSource) else None
    if ours:
        _ = ours.digest  # refuses damage, which Orbax would load
    stored = leaf_paths(ours.params) if ours else {}

    def target(path: str) -> jax.ShapeDtypeStruct:
        dtype, sharding = place(path, leaves[path])
        if ours and rule_of(path, leaves, *layout).buffer:
            dtype = stored[path].dtype
        return jax.ShapeDtypeStruct(leaves[path].shape, dtype, sharding=sharding)

    abstract = jax.tree.unflatten(jax.tree.structure(shapes), list(map(target, leaves)))
    if ours:
        params = orbax.load_params(ours.folder, abstract)
    else:
        params = placing.load_params(folder.source, *layout, abstract, progress)
    jax.block_until_ready(params)
    folder.source.require_unchanged()
    if ours and progress:
        progress(sum(x.nbytes for x in jax.tree.leaves(params)))
    return params
