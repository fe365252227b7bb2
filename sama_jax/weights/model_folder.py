"""Opens and checks model folders in the Hugging Face layout, without loading their weights.

Composes `models` (architecture) and the tensors of a folder. Reads `config.json`, safetensors and
tokenizer files; never imports torch, never runs code from a folder.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sama_jax.arrays import Model, Params
from sama_jax.errors import ModelError, UsageError
from sama_jax.models.registry import FamilyConfig, build_model, read_config
from sama_jax.weights import checks, peft, safetensors
from sama_jax.weights.folder_files import CONFIG, PARAMS, RECORD, json_object, read_json_config
from sama_jax.weights.hub import resolve
from sama_jax.weights.mask_token import known_mask
from sama_jax.weights.orbax_source import OrbaxSource
from sama_jax.weights.source import Source, open_source


@dataclass(frozen=True)
class ModelFolder:
    """Describes a checked folder whose weights have not been loaded yet."""

    path: Path
    config: dict[str, Any]
    family: FamilyConfig
    model: Model
    source: Source
    abstract_params: Params = field(repr=False)
    """Shapes of the parameter tree, float32; without an adapter."""
    identity: str
    """16 hex digits over architecture, headers, sizes and sampled bytes of the weight files, and
    over all of an adapter."""
    base_identity: str
    """The same without the adapter: folders that share it can share their weights."""
    adapter: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """A LoRA adapter that stands beside the weights, as `peft.leaves` makes it (host)."""

    @property
    def max_length(self) -> int:
        """Returns how many tokens the model was made for; 2^20 if its config does not say."""
        names = ("max_sequence_length", "max_position_embeddings", "n_positions", "model_length")
        names += ("block_size",)
        found = [self.config[n] for n in names if isinstance(self.config.get(n), int)]
        return min(found, default=2**20)

    @property
    def num_params(self) -> int:
        """Counts the parameters, unused embedding rows included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))


def num_bytes(folders: Sequence[ModelFolder]) -> int:
    """Returns the bytes of the parameters of several folders, each set of weights once.

    Adapters are not counted.
    """
    bases = {(f.base_identity, str(f.model.dtype)): f for f in folders}
    return sum(f.num_params * jnp.dtype(f.model.dtype).itemsize for f in bases.values())


def open_folder(
    path: Path,
    *,
    mask_id: int | None = None,
    dtype: str = "auto",
    adapter: Path | None = None,
    merge: bool = False,
    longest: int = 0,
    attention: str = "xla",
) -> ModelFolder:
    """Opens and checks a folder without loading it.

    Args:
      path: folder with `config.json` and safetensors, or with parameters that
        `checkpoints_convert to-orbax` wrote; or a Hub id.
      mask_id: replaces the config's mask id, or the tokenizer's where the config names none.
      dtype: of activations and loaded weights; `auto` is float32 on CPU, else the stored dtype.
      adapter: folder or Hub id of a LoRA adapter for this model.
      merge: add the adapter to the weights as they are read (in float32, then cast), for an
        ordinary parameter tree, instead of keeping it beside them.
      longest: tokens of the longest text that the model has to read.
      attention: `xla`, `cudnn`, or `auto` for what `with_attention` chooses.

    Raises:
      UsageError: `cudnn` cannot compute this model here.
      ModelError: one message that lists every tensor that does not fit.
    """
    path = resolve(path)
    config = read_json_config(path)
    family = read_config(config, str(path / CONFIG))
    limit = family.arch.max_length
    if limit is not None and longest > limit:
        raise ModelError(
            f"{path}: has position embeddings for {limit} tokens, but texts may have {longest}; "
            f"give --max-length {limit} or less"
        )
    shapes = build_model(family, 0, jnp.dtype("float32"))  # they depend on the architecture alone
    abstract = jax.eval_shape(lambda: shapes.init(jax.random.key(0)))  # starts no backend
    source = _open_source(path, family, abstract)
    mask = known_mask(path, family) if mask_id is None else mask_id
    if not isinstance(mask, int) or not 0 <= mask < family.arch.vocab_size:
        raise ModelError(
            f"{path}: the mask token id is {mask!r}, but the embedding has "
            f"{family.arch.vocab_size} rows; give the right one with --mask-id"
        )
    if dtype == "auto":
        stored = source.dtype() if jax.default_backend() != "cpu" else "float32"
        dtype = stored if stored == "bfloat16" else "float32"
    model = with_attention(attention, build_model(family, mask, jnp.dtype(dtype)))
    checks.check(source, family.weights, model.num_layers, abstract, str(path))
    identity = _identity(path, repr(family.arch))
    folder = ModelFolder(path, config, family, model, source, abstract, identity, identity)
    return folder if adapter is None else _with_adapter(folder, adapter, merge)


def with_attention(asked: str, model: Model) -> Model:
    """Returns the model with `arch.attention` set to `xla` or `cudnn`.

    cuDNN's takes bfloat16 and heads of up to 128 channels, a multiple of 8, on NVIDIA GPUs of
    compute capability 8.0 or more. `auto` takes it there if there is one device: it was measured on
    one (docs/performance.md). Raises `UsageError` where it is asked for and cannot be.
    """
    fused = model.with_cudnn()
    possible = fused is not None and _cuda()
    if asked == "xla" or (asked == "auto" and not (possible and jax.device_count() == 1)):
        return model
    if fused is None or not possible:
        raise UsageError(
            "attention cudnn: expected NVIDIA GPUs of compute capability 8.0 or more, and a LLaDA "
            "or another Llama-like model in bfloat16 with heads of up to 128 channels, a multiple "
            f"of 8; found {jax.devices()[0].device_kind} and {jnp.dtype(model.dtype).name}; choose "
            "xla or auto"
        )
    return fused


def _cuda() -> bool:
    """Returns whether cuDNN's attention runs here; AMD's devices have a name for a capability."""
    found = re.match(r"(\d+)\.", str(getattr(jax.devices()[0], "compute_capability", "")))
    return found is not None and int(found[1]) >= 8


def _open_source(path: Path, family: FamilyConfig, abstract: Params) -> Source:
    """Opens the tensors of a folder, in safetensors or kept by Orbax."""
    if not (path / PARAMS).is_dir():
        return open_source(path, family.weights, family.block_group_size)
    sizes = json_object(path / RECORD).get("sizes", {})
    files = {name: path / PARAMS / name for name in sizes}
    found = {name: file.stat().st_size for name, file in files.items() if file.is_file()}
    wrong = [
        f"  {name}: expected {size} bytes, found {found.get(name, 'no file')}"
        for name, size in sizes.items()
        if found.get(name) != size
    ]
    if wrong:
        raise ModelError(
            f"{path / PARAMS}: {len(wrong)} files of its Orbax checkpoint are missing or "
            "incomplete; copy or convert the model again\n" + "\n".join(wrong)
        )
    return OrbaxSource(path / PARAMS, family.weights, family.arch.num_layers, abstract)


def _with_adapter(folder: ModelFolder, path: Path, merge: bool) -> ModelFolder:
    """Returns the folder with a LoRA adapter, merged or beside its weights."""
    family, abstract = folder.family, folder.abstract_params
    layout = (family.weights, folder.model.num_layers, abstract)
    adapter = peft.open_adapter(resolve(path), folder.source, *layout, family.block_group_size)
    digest = hashlib.sha256(f"{folder.identity} {adapter.identity} {merge}".encode())
    identity = digest.hexdigest()[:16]
    if merge:
        source = peft.merge(folder.source, adapter, *layout)
        return replace(folder, source=source, identity=identity, base_identity=identity)
    leaves = peft.leaves(adapter, *layout, folder.model.lora_paths)
    lora = tuple((name, a.shape[-1]) for name, (a, _) in leaves.items())
    return replace(with_options(folder, lora=lora), identity=identity, adapter=leaves)


def _identity(path: Path, architecture: str, samples: int = 4, block: int = 4096) -> str:
    """Hashes a few blocks of every tensor instead of 16 GB.

    Small tensors, the norms among them, are hashed whole, so that training any of them shows. An
    Orbax folder has the identity of what it was made from, unless dtype or architecture changed.
    """
    if (path / PARAMS).is_dir():
        record = json_object(path / RECORD)
        if record.get("architecture") == architecture and "identity" in record:
            return str(record["identity"])
        return hashlib.sha256(f"{record} {architecture}".encode()).hexdigest()[:16]
    digest = hashlib.sha256(architecture.encode())
    for file in safetensors.weight_files(path):
        with file.open("rb") as handle:
            header = handle.read(int.from_bytes(handle.read(8), "little"))
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                whole = end - start <= samples * block
                for i in range(1 if whole else samples):
                    skip = i * (end - start - block) // (samples - 1)
                    handle.seek(8 + len(header) + start + skip)
                    digest.update(handle.read(end - start if whole else block))
    return digest.hexdigest()[:16]


def with_options(folder: ModelFolder, **changes: Any) -> ModelFolder:
    """Returns the same folder with other model options, such as `remat=True`."""
    return replace(folder, model=replace(folder.model, **changes))  # pyright: ignore  a protocol
