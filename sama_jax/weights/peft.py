"""Reads LoRA adapters as PEFT saves them, and merges them or keeps them beside their base.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`; nothing else is
read, nothing is unpickled. For a module with weight W the adapter has A and B and stands for

    linear     W [out, in] + scale * B [out, r] A [r, in]
    embedding  W [v, d]    + scale * (B [d, r] A [r, v])^T

with scale = alpha / r, or alpha / sqrt(r) under `use_rslora`. Names, scales and patterns were
compared with PEFT 0.21.2, which the tests run.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Table
from sama_jax.untrusted import printable, shown
from sama_jax.weights import adapter_patterns, stored_bytes
from sama_jax.weights.checks import listing
from sama_jax.weights.folder_files import read_object
from sama_jax.weights.safetensors import tensor_starts
from sama_jax.weights.source import Source
from sama_jax.weights.tensor_map import leaf_paths, rule_of, sources

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Fields that are used here, and fields that cannot change what a trained adapter computes: where
# it came from, dropout, and options of options that must be off.
_USED = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
_SILENT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    "eva_config",
)
# Any other field must be off, also one that a later PEFT adds. Initialisations that are not in this
# list change the base (PiSSA, OLoRA, CorDA, LoftQ, ...) or the forward pass.
_VALUES = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TENSOR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.(?!weight$)(?P<adapter>[^.]+))?"
    r"(?P<weight>\.weight)?$"
)


class LowRank(NamedTuple):
    """Holds the adapter of one module, in PyTorch's layout."""

    module: str
    """Its name in the wrapped model: what patterns are matched with."""
    a: Float[np.ndarray, "r in"]
    b: Float[np.ndarray, "out r"]
    """Float32, the scale included."""
    scale: float
    embedding: bool

    def window(self, index: tuple[slice, ...]) -> Float[np.ndarray, "_ _"]:
        """Returns a window of what is added to the weight; float32."""
        rows, columns = index
        if self.embedding:
            return (self.b[columns] @ self.a[:, rows]).T
        return self.b[rows] @ self.a[:, columns]


class Adapter(NamedTuple):
    """Holds a checked adapter: every tensor of its file has found its place."""

    path: Path
    modules: dict[str, LowRank]
    """Canonical name of the base's tensor -> what is added to it."""
    identity: str
    """16 hex digits over the file's bytes and every module's scale."""


def read_config(path: Path) -> dict[str, Any]:
    """Reads `adapter_config.json`. Raises `ModelError` if it asks for more than plain LoRA."""
    file = path / CONFIG
    if not file.is_file():
        raise ModelError(
            f"{path}: has no {CONFIG}; expected an adapter folder of PEFT ({CONFIG}, {WEIGHTS})"
        )
    config = read_object(file)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{file}: peft_type is {shown(config.get('peft_type'))}, only 'LORA' is supported"
        )
    refused = [
        f"{printable(name)} is {shown(value)}"
        for name, value in config.items()
        if name not in _USED + _SILENT and not _is_off(name, value)
    ]
    if refused:
        raise ModelError(
            f"{file}: only plain LoRA is supported, but {'; '.join(refused)}. Merge it with PEFT "
            "(merge_and_unload) and use the merged folder"
        )
    if type(config.get("use_rslora", False)) is not bool:
        raise ModelError(
            f"{file}: use_rslora is {shown(config['use_rslora'])}; expected true or false"
        )
    return config


def _is_off(name: str, value: Any) -> bool:
    if name in _VALUES:
        return any(value is v or (isinstance(v, str) and value == v) for v in _VALUES[name])
    return value is None or value is False or value in ([], {}, "")


def open_adapter(
    path: Path,
    source: Source,
    table: Table,
    num_layers: int,
    abstract: Any,
    block_group_size: int = 1,
) -> Adapter:
    """Reads an adapter and checks it against a base.

    Args:
      path: the adapter's folder.
      source: the base's tensors.
      table: the base's weight table, as for `source.open_source`.
      num_layers: how many blocks the base has.
      abstract: the base's parameter tree, as for `checks.check`.
      block_group_size: how many blocks a group of the base holds.

    Raises:
      ModelError: one message that lists every tensor that does not fit.
    """
    config = read_config(path)
    tensors, digest = _read_tensors(path)
    expected = _matrices(table, num_layers, abstract)
    pairs, others, problems = _pairs(tensors, expected, table, block_group_size)
    for name in others:
        problems += _other_tensor(name, tensors[name], source, table, block_group_size)
    modules = {}
    for weight, sides in pairs.items():
        if len(sides) == 1:
            ((side, name),) = sides.items()
            problems.append(f"  missing    lora_{'B' if side == 'A' else 'A'} to {name}")
            continue
        made = _low_rank(config, sides, tensors, *expected[weight], path)
        if isinstance(made, LowRank):
            modules[weight] = made
        else:
            problems += made
    if problems:
        base = config.get("base_model_name_or_path")
        told = f" (it was trained on {shown(base)})" if base else ""
        raise ModelError(
            f"{path}: {len(problems)} adapter tensors do not fit the base model; is it an adapter "
            f"for another one{told}?\n" + listing(problems)
        )
    if not modules:
        raise ModelError(f"{path / WEIGHTS}: holds no LoRA tensor; expected lora_A and lora_B")
    _require_chosen(config, modules, pairs, table, path)
    for weight, m in sorted(modules.items()):
        digest.update(repr((weight, m.scale)).encode())
    return Adapter(path, modules, digest.hexdigest()[:16])


def _require_chosen(
    config: dict[str, Any],
    modules: Mapping[str, LowRank],
    pairs: Mapping[str, dict[str, str]],
    table: Table,
    path: Path,
) -> None:
    """Raises `ModelError` if PEFT would not load all tensors, by what the config chooses."""
    head = table.tied_head[0] if table.tied_head else None
    linear = {m.module: not m.embedding and weight != head for weight, m in modules.items()}
    try:
        left_out = adapter_patterns.left_out(config, linear)
    except (re.error, ValueError) as error:
        raise ModelError(f"{path / CONFIG}: unusable choice of modules ({error})") from None
    for weight, m in modules.items():
        if m.module in left_out:
            field = left_out[m.module]
            raise ModelError(
                f"{path / CONFIG}: {field} is {shown(config.get(field))}, which leaves out "
                f"{pairs[weight]['A']} (the first of {len(left_out)} modules that {WEIGHTS} holds "
                "all the same): PEFT would not load it; correct the field, or save the adapter "
                "again with PEFT"
            )


def _pairs(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[tuple[int, ...], bool]],
    table: Table,
    block_group_size: int,
) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """Sorts the names of an adapter's tensors.

    Returns:
      `{matrix of the base: {"A": name, "B": name}}`, the names of tensors that are not LoRA's, and
      problems: tensors of matrices that the base has not, or that have a tensor for that side.
    """
    pairs: dict[str, dict[str, str]] = {}
    others, problems = [], []
    for name, tensor in tensors.items():
        match = _TENSOR.match(name)
        if match is None or bool(match["weight"]) == bool(match["kind"]):
            others.append(name)
            continue
        weight = table.name_of(_module(match["module"]) + ".weight", block_group_size)
        if weight not in expected or expected[weight][1] != bool(match["kind"]):
            kind = "embedding" if match["kind"] else "linear"
            shape = list(tensor.shape)
            problems.append(f"  unexpected {name} {shape}: the base has no such {kind} layer")
        elif match["side"] in pairs.setdefault(weight, {}):
            problems.append(f"  twice      {name}: also {pairs[weight][match['side']]}")
        else:
            pairs[weight][match["side"]] = name
    return pairs, others, problems


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    """Reads all tensors of the adapter, and a running SHA-256 of the file's bytes."""
    file = path / WEIGHTS
    if not file.is_file():
        hint = ""
        if any(path.glob("*.bin")):
            hint = "; its weights are pickled (.bin), which are never read: save as safetensors"
        raise ModelError(f"{path}: has no {WEIGHTS}{hint}")
    try:
        stamp = stored_bytes.same_files([(WEIGHTS, file)])
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256")
        with safe_open(file, framework="numpy") as handle:
            tensor_starts(file)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if stored_bytes.same_files([(WEIGHTS, file)]) != stamp:
            raise ValueError("it has changed while it was read")
        return tensors, digest
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError, KeyError) as error:
        # The last three: a type that NumPy has not, such as 8-bit floats.
        raise ModelError(
            f"{file}: not a complete safetensors file of floating-point numbers "
            f"({printable(str(error), 200)}); download or save it again"
        ) from None


def _matrices(
    table: Table, num_layers: int, abstract: Any
) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Returns the base's matrices: canonical name -> (shape, whether it is an embedding table)."""
    found = {}
    leaves = leaf_paths(abstract)
    for path in leaves:
        for _, name, shape in sources(path, leaves, table, num_layers):
            if len(shape) == 2:
                found[name] = (shape, path.endswith("/embedding"))
    return found


def _module(name: str) -> str:
    """Returns a module's name in the wrapped model: without PEFT's `base_model.model.`."""
    return re.sub(r"^(?:.*?\.)?base_model\.model\.", "", name)


def _other_tensor(
    name: str, tensor: np.ndarray, source: Source, table: Table, block_group_size: int
) -> list[str]:
    """Returns what is wrong with a tensor that is not LoRA's.

    PEFT can save a whole embedding or head with its adapter; a copy of the base's own is accepted.
    """
    plain = table.name_of(_module(name.replace(".base_layer.", ".")), block_group_size)
    if plain not in source.tensors or source.tensors[plain].shape != tensor.shape:
        return [f"  unexpected {name} {list(tensor.shape)}"]
    whole = source.window(plain, (slice(None),) * tensor.ndim)
    if not np.array_equal(whole.astype(np.float32), tensor.astype(np.float32)):
        return [f"  differs    {name}: trained or resized, not the base's {plain}"]
    return []


def _low_rank(
    config: dict[str, Any],
    sides: dict[str, str],
    tensors: dict[str, np.ndarray],
    shape: tuple[int, ...],
    embedding: bool,
    where: Path,
) -> LowRank | list[str]:
    """Makes the adapter of one module, or says what is wrong with its two tensors."""
    match = _TENSOR.match(sides["A"])
    assert match is not None
    module = _module(match["module"])
    rank, scale = _rank_and_scale(config, module, where)
    out, inside = shape[::-1] if embedding else shape
    problems = []
    for side, wanted in (("A", [rank, inside]), ("B", [out, rank])):
        tensor = tensors[sides[side]]
        if list(tensor.shape) != wanted:
            problems.append(
                f"  shape      {sides[side]}: expected {wanted}, found {list(tensor.shape)}"
            )
        if str(tensor.dtype) not in _DTYPES:
            problems.append(f"  dtype      {sides[side]}: {tensor.dtype} is not supported")
    if problems:
        return problems
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        a, b = (tensors[sides[side]].astype(np.float32) for side in "AB")
        b = np.float32(scale) * b
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return [f"  values     {sides['A']}: it, its B or their scale is not finite in float32"]
    return LowRank(module, a, b, scale, embedding)


def _rank_and_scale(config: dict[str, Any], module: str, where: Path) -> tuple[int, float]:
    """Returns r and alpha / r of a module.

    The first pattern that matches the end of its name decides.
    """

    def get(pattern: str, default: str) -> Any:
        for key, value in adapter_patterns.checked(config, pattern).items():
            if adapter_patterns.compiled(key).match(module):
                return value
        return config.get(default, 8)  # the default of PEFT's class, for both

    try:
        rank, alpha = get("rank_pattern", "r"), get("alpha_pattern", "lora_alpha")
        if type(rank) is not int or not 0 < rank < 2**31 or type(alpha) not in (int, float):
            raise ValueError(f"rank {shown(rank)} and alpha {shown(alpha)} for {module}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not abs(scale) <= float(np.finfo(np.float32).max):
            raise ValueError(f"scale {scale} for {module}, which is no float32")
    except (re.error, OverflowError, ValueError) as error:
        raise ModelError(f"{where / CONFIG}: unusable rank or alpha ({error})") from None
    return rank, scale


# --- the two uses --------------------------------------------------------------------------------


class _MergedSource(Source):
    """Reads the base's tensors with the adapter added where it has something to add."""

    def __init__(self, base: Source, modules: dict[str, LowRank]):
        super().__init__(base.tensors, {}, base.stamp)
        self.base, self.modules = base, modules

    @property
    def files(self) -> list[tuple[str, Path]]:
        """The base's files."""
        return self.base.files

    @property
    def digest(self) -> str:
        """The base's; the adapter has a name of its own."""
        return self.base.digest

    def window(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads float32 where something is added, so the only rounding is the reader's cast."""
        base = self.base.window(name, index)
        with self._lock:
            self.bytes_read += base.nbytes
        if name not in self.modules:
            return base
        return base.astype(np.float32) + self.modules[name].window(index)


def merge(source: Source, adapter: Adapter, table: Table, num_layers: int, abstract: Any) -> Source:
    """Returns the tensors of the merged model; each window is merged when it is read.

    Raises `ModelError` for an embedding adapter under a tied head: its forward pass adapts what is
    looked up and not the head, so no single table is equal to it.
    """
    head, embedding = table.tied_head or ("", "")
    if embedding in adapter.modules and head not in _matrices(table, num_layers, abstract):
        raise ModelError(
            f"{adapter.path}: adapts the embedding of a model whose head is tied to it; merged, "
            "the head would change, too. Keep it beside the base instead (audit --adapter)"
        )
    return _MergedSource(source, adapter.modules)


def leaves(
    adapter: Adapter, table: Table, num_layers: int, abstract: Any, allowed: re.Pattern[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns an adapter by parameter path: `lora_a` [*n, in, r] and `lora_b` [*n, r, out].

    Float32, stacked over layers as the parameter is; layers without an adapter, or with one of
    smaller rank, are filled with zeros. Parameters that no layer adapts have none.

    Args:
      allowed: paths that the network applies an adapter to. Another one is a `ModelError`.
    """
    found, refused = {}, []
    shapes = leaf_paths(abstract)
    for path, leaf in shapes.items():
        named = [(p, n) for p, n, _ in sources(path, shapes, table, num_layers)]
        places = {p: adapter.modules[n] for p, n in named if n in adapter.modules}
        if not places:
            continue
        if not allowed.fullmatch(path):
            refused += [m.module for m in places.values()]
            continue
        fused = rule_of(path, shapes, table, num_layers).fused
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
    if refused:
        raise ModelError(
            f"{adapter.path}: {len(set(refused))} modules of this family cannot keep an adapter "
            f"beside the base (first {sorted(refused)[0]}); merge it (checkpoints_convert to-hf "
            "--adapter) and use the merged folder"
        )
    return found


def attach(params: Any, found: dict[str, tuple[Any, Any]]) -> Any:
    """Adds `lora_a` and `lora_b` next to the adapted parameters of a tree; copies no array."""

    def walk(tree: Any, at: str) -> Any:
        new = {k: walk(v, f"{at}{k}/") if isinstance(v, dict) else v for k, v in tree.items()}
        for name in tree:
            if at + name in found:
                new["lora_a"], new["lora_b"] = found[at + name]
        return new

    return walk(params, "")
