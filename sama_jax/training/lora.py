"""Trains a low-rank adapter (LoRA) beside weights that stay, and saves it as PEFT 0.21.2 does.

For a linear layer with kernel W [in, out], A [in, r] and B [r, out] are trained, and the layer
computes `x W + scale (x A) B`. A starts random and B at zero, so that training begins at the base.
Where PyTorch has one layer for several of our kernels, such as Q, K and V, those share their A.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sama_jax import untrusted
from sama_jax.arrays import Params
from sama_jax.config import LoraSettings
from sama_jax.errors import OutputError, UsageError
from sama_jax.models.families.weight_table import Table
from sama_jax.storage.files import write_atomic
from sama_jax.weights import adapter_config, peft, safetensors
from sama_jax.weights.tensor_map import leaf_paths, rule_of, sources

_TREE = "lora_a", "lora_b"


class Layout(NamedTuple):
    """Says where an adapter stands. Hashable, so it can be a static argument."""

    rank: int
    scale: float
    places: tuple[tuple[str, str], ...]
    """Path of each kernel, and that of the first of those that share its A."""


class Adapter(NamedTuple):
    """An adapter to be trained, and the base that it is for."""

    settings: LoraSettings
    layout: Layout
    shapes: Params
    """Of the base."""
    table: Table
    num_layers: int
    base: str
    """The folder, as it was given."""


class _Layer(NamedTuple):
    """One linear layer of PyTorch's, or the part of one that is a kernel of ours."""

    module: str
    place: tuple[int, ...]
    path: str


# --- which layers ---------------------------------------------------------------------------------


def plan(
    settings: LoraSettings, shapes: Params, table: Table, num_layers: int, base: str
) -> Adapter:
    """Chooses the layers of a base that get an adapter.

    Raises:
      UsageError: `targets` names no linear layer, or some whose adapters are not trained here.
    """
    found = _layers(shapes, table, num_layers)
    chosen = [layer for layer in found if _is_target(settings.targets, layer)]
    wrong = _refusal(settings.targets, found, chosen)
    if wrong:
        names = sorted({_short(layer.module) for layer in found if _has_adapter(layer.path)})
        told = untrusted.printable(", ".join(names), 300)
        raise UsageError(f"{base}: lora.targets {wrong}; expected 'all' or some of: {told}")
    first: dict[str, str] = {}
    for layer in chosen:
        first.setdefault(layer.module, layer.path)
    places = {layer.path: first[layer.module] for layer in chosen}
    scale = settings.alpha / (math.sqrt(settings.r) if settings.rslora else settings.r)
    layout = Layout(settings.r, scale, tuple(places.items()))
    return Adapter(settings, layout, shapes, table, num_layers, base)


def _layers(shapes: Params, table: Table, num_layers: int) -> list[_Layer]:
    """Lists all kernels and embeddings by the names of their modules in PyTorch."""
    leaves = leaf_paths(shapes)
    return [
        _Layer(name.removesuffix(".weight"), place, path)
        for path in leaves
        if path.endswith(("/kernel", "/embedding"))
        for place, name, _ in sources(path, leaves, table, num_layers)
    ]


def _has_adapter(path: str) -> bool:
    """Tells whether a parameter is that of a `Linear`, which applies an adapter beside it.

    Experts are chosen and computed together, by other layers (`models.moe`).
    """
    return path.endswith("/kernel") and "/moe/" not in path


def _is_target(targets: str, layer: _Layer) -> bool:
    """Tells whether a layer is meant: by the end of its name, as in PEFT."""
    if targets == "all":
        return _has_adapter(layer.path) and "block" in layer.path.partition("/")[0]
    return any(f".{layer.module}".endswith(f".{name}") for name in targets.split("+"))


def _refusal(targets: str, found: list[_Layer], chosen: list[_Layer]) -> str:
    """Says why there can be no such adapter, if so."""
    for name in targets.split("+"):
        if name != "all" and not any(_is_target(name, layer) for layer in found):
            return f"names '{untrusted.printable(name, 60)}', which is no layer of this model"
    for layer in chosen:
        if not _has_adapter(layer.path):
            return f"chooses {layer.module}, an embedding or a part of a mixture of experts"
        whole = sum(other.path == layer.path for other in found)
        if sum(other.path == layer.path for other in chosen) < whole:
            return f"chooses {layer.module}, but not all layers of its stack"
    return ""


def _short(module: str) -> str:
    return module.rpartition(".")[2]


# --- the tree that is trained ---------------------------------------------------------------------


def init(adapter: Adapter, key: Key[Array, ""]) -> Params:
    """Draws an adapter as PEFT does: A uniform below 1 / sqrt(in), B zero; float32."""
    leaves, rank = leaf_paths(adapter.shapes), adapter.layout.rank
    a, b = {}, {}
    for number, (path, first) in enumerate(adapter.layout.places):
        *lead, inside, out = leaves[path].shape
        if path == first:
            draw, limit = jax.random.fold_in(key, number), inside**-0.5
            a[_key(path)] = jax.random.uniform(
                draw, (*lead, inside, rank), jnp.float32, -limit, limit
            )
        b[_key(path)] = jnp.zeros((*lead, rank, out), jnp.float32)
    return dict(zip(_TREE, (a, b)))


def beside(layout: Layout | None, base: Params | None, trained: Params) -> Params:
    """Returns the parameters of the network: the base with its adapter, if there is one."""
    if layout is None:
        return trained
    a, b = (trained[name] for name in _TREE)
    scale = np.float32(layout.scale)
    found = {path: (a[_key(first)], scale * b[_key(path)]) for path, first in layout.places}
    return peft.attach(base, found)


def _key(path: str) -> str:
    """Names a leaf without slashes, which files of checkpoints would take for folders."""
    return path.replace("/", ".")


# --- the folder -----------------------------------------------------------------------------------


def save(out: Path, trained: Params, adapter: Adapter) -> None:
    """Writes an adapter folder that PEFT loads: `adapter_config.json` comes last, atomically.

    Raises `OutputError`.
    """
    settings, prefix = adapter.settings, f"base_model.model.{adapter.table.hub_prefix}"
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "r": settings.r,
        "lora_alpha": int(settings.alpha) if settings.alpha % 1 == 0 else settings.alpha,
        "use_rslora": settings.rslora,
        "target_modules": _target_modules(adapter),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }
    tensors = {
        f"{prefix}{name}.weight": safetensors.Pending(x.shape, x.dtype, lambda x=x: x)
        for name, x in _tensors(trained, adapter).items()
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / adapter_config.CONFIG).unlink(missing_ok=True)
        safetensors.write_file(out / adapter_config.WEIGHTS, tensors)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomic(out / adapter_config.CONFIG, text)
    except OSError as error:
        raise OutputError(f"{out}: cannot write the adapter ({error})") from None


def _target_modules(adapter: Adapter) -> list[str]:
    """Returns names that choose these modules and no other: their ends where that is enough."""
    found = _layers(adapter.shapes, adapter.table, adapter.num_layers)
    paths = {path for path, _ in adapter.layout.places}
    taken = {_short(layer.module) for layer in found if layer.path not in paths}
    modules = {layer.module for layer in found if layer.path in paths}
    return sorted({n if _short(n) in taken else _short(n) for n in modules})


def _tensors(trained: Params, adapter: Adapter) -> dict[str, Float[np.ndarray, "_ _"]]:
    """Returns A [r, in] and B [out, r] of every module, as PyTorch keeps them."""
    leaves, layout = leaf_paths(adapter.shapes), adapter.layout
    table, num_layers = adapter.table, adapter.num_layers
    a, b = (trained[name] for name in _TREE)
    found: dict[str, Float[np.ndarray, "_ _"]] = {}
    for path, first in layout.places:
        fused = rule_of(path, leaves, table, num_layers).fused
        mine, shared = (np.asarray(x[_key(p)]) for x, p in ((b, path), (a, first)))
        for place, name, shape in sources(path, leaves, table, num_layers):
            module = name.removesuffix(".weight")
            if path == first:
                found[f"{module}.lora_A"] = shared[place].T
            rows = mine[place].T
            if fused:  # the rows of one B that belong to this kernel's part of the output
                empty = np.zeros((shape[0], layout.rank), np.float32)
                whole = found.setdefault(f"{module}.lora_B", empty)
                part = whole.reshape(*fused.view, layout.rank)
                part[fused.pick] = rows.reshape(part[fused.pick].shape)
            else:
                found[f"{module}.lora_B"] = rows
    return found
