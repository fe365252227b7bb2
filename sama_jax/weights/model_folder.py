"""Opens and checks model folders in the Hugging Face layout, without loading their weights.

Composes `models` (architecture) and the tensors of a folder. Reads `config.json`, safetensors and
tokenizer files, or a GGUF file alone; never imports torch, never runs code from a folder.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sama_jax import gguf_header
from sama_jax.arrays import Model, Params
from sama_jax.errors import ModelError, UsageError
from sama_jax.models.registry import (
    FamilyConfig,
    build_model,
    read_config,
    with_attention_mask,
)
from sama_jax.untrusted import printable, shown
from sama_jax.weights import checks, peft, quantised, safetensors
from sama_jax.weights.folder_files import CONFIG, PARAMS, read_json_config
from sama_jax.weights.gguf_source import open_gguf
from sama_jax.weights.hub import resolve
from sama_jax.weights.jax_settings import usable_settings
from sama_jax.weights.orbax_source import OrbaxSource, read_stored
from sama_jax.weights.source import Source, open_source
from sama_jax.weights.special_tokens import known_mask, padding_token

ORBAX_TENSORS = 2**18
"""Most tensors of one parameter that is kept stacked: a model of 61 layers and 384 experts has
23,424."""

BESIDE_GGUF = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json")
"""Ends of the names of other weights, which may be another model's than the GGUF file there."""


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
    adapter: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """A LoRA adapter that stands beside the weights, as `peft.leaves` makes it (host)."""
    adapter_identity: str = ""
    """Of an adapter, beside or merged: over all of its bytes and scales."""
    adapter_is_nothing: bool = False
    """Whether there are adapters, and none of them changes anything."""
    adapters: tuple[Path, ...] = ()
    """The adapters' folders, in their order."""
    asked_mask: str | None = None
    """The mask of attention that it was opened with; None: the config's, or else the family's."""
    quantised: tuple[str, ...] = ()
    """How the weights are stored if they are quantised: the method, and what decides values."""

    @property
    def identity(self) -> str:
        """Returns 32 hex digits over all stored bytes, an adapter's too, and what they are read as.

        Every byte of the files is read when it is first asked for. Raises `ModelError`.
        """
        read_as = self.family._replace(weights=None, network=None, mask_id=None)  # pyright: ignore
        return _name(self.source.digest, repr(read_as), self.adapter_identity, *self.quantised)

    @property
    def base_identity(self) -> str:
        """Returns a name that folders share if they are the same files, but for an adapter beside.

        Reads no weights.
        """
        merged = "" if self.adapter else self.adapter_identity
        return _name(self.source.stamp, repr(self.family.arch), merged, *self.quantised)

    @property
    def pad_id(self) -> int | None:
        """Returns the id of visible padding; None if the config names none.

        Raises `ModelError` for one that is not in the embedding.
        """
        rows, where = self.family.arch.vocab_size, str(self.path / CONFIG)
        return padding_token(self.config, rows, where)

    @property
    def max_length(self) -> int:
        """Returns how many tokens the model was made for; 2^20 if its config does not say."""
        return self.family.max_length

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
    adapter: Path | Sequence[Path] | None = None,
    merge: bool = False,
    longest: int = 0,
    attention: str = "xla",
    attention_mask: str | None = None,
) -> ModelFolder:
    """Opens and checks a folder without loading it.

    Args:
      path: folder with `config.json` and safetensors, or with parameters that
        `checkpoints_convert to-orbax` wrote; a GGUF file, or a folder with one; or a Hub id.
      mask_id: replaces the config's mask id, or the tokenizer's where the config names none.
      dtype: of activations and loaded weights; `auto` is float32 on CPU, else the stored dtype.
      adapter: folder or Hub id of an adapter for this model; or several, each for the model with
        those before it.
      merge: change the weights as they are read (in float32, then cast), for an ordinary parameter
        tree, also where adapters could be kept beside them.
      longest: tokens of the longest text that the model has to read.
      attention: `xla`, `cudnn`, or `auto` for what `with_attention` chooses.
      attention_mask: replaces the mask of attention, by its name in `models.attention_mask`.

    Raises:
      UsageError: `cudnn` cannot compute this model here; the model has no such mask of attention;
        `usable_settings`.
      ModelError: one message that lists every tensor that does not fit.
    """
    usable_settings()
    path = resolve(path)
    config = read_json_config(path)
    family = _family_of(path, config, attention_mask)
    limit = family.arch.max_length
    if limit is not None and longest > limit:
        raise ModelError(
            f"{path}: has position embeddings for {limit} tokens, but texts may have {longest}; "
            f"give --max-length {limit} or less"
        )
    method = quantised.read_method(config, str(path / CONFIG))
    source, abstract = _open_source(path, family, method)
    mask = known_mask(path, family) if mask_id is None else mask_id
    if type(mask) is not int or not 0 <= mask < family.arch.vocab_size:
        raise ModelError(
            f"{path}: the mask token id is {shown(mask)}, but the embedding has "
            f"{family.arch.vocab_size} rows; give the right one with --mask-id"
        )
    if dtype == "auto":
        stored = source.dtype() if jax.default_backend() != "cpu" else "float32"
        dtype = stored if stored == "bfloat16" else "float32"
    model = with_attention(attention, build_model(family, mask, jnp.dtype(dtype)))
    checks.check(source, family.weights, model.num_layers, abstract, str(path))
    require_one_set(path)
    folder = ModelFolder(path, config, family, model, source, abstract, asked_mask=attention_mask)
    if method is not None:
        folder = replace(folder, quantised=(method.name, method.settings))
    paths = [adapter] if isinstance(adapter, Path | str) else [*(adapter or ())]
    return _with_adapters(folder, paths, merge) if paths else folder


def _family_of(path: Path, config: dict[str, Any], attention_mask: str | None) -> FamilyConfig:
    """Reads a config, with another mask of attention where one is asked for."""
    family = read_config(config, str(path / CONFIG))
    if attention_mask is None:
        return family
    try:
        return with_attention_mask(family, attention_mask)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; correct --attention-mask or leave it out") from None


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


def _open_source(
    path: Path, family: FamilyConfig, method: quantised.Method | None
) -> tuple[Source, Params]:
    """Opens the tensors of a folder, and returns the shapes of its parameters.

    Nothing is built that the files have no room for, whatever the config claims.
    """
    stored, layout = None, (family.weights, family.arch.num_layers)
    file = gguf_header.find(path)
    if method is not None and (file is not None or (path / PARAMS).is_dir()):
        raise ModelError(
            f"{path / CONFIG}: has a {quantised.FIELD} ({method.name}), but the weights beside it "
            "are not safetensors; remove it if it is another model's"
        )
    if (path / PARAMS).is_dir():
        stored = read_stored(path)
        held, apart = len(jax.tree.leaves(stored.params)), 1 + family.arch.stacked_layers
    elif file is not None:
        source = open_gguf(file, family)
        held, apart = len(source.tensors), 1
    else:
        source = open_source(path, family.weights, family.block_group_size, method)
        held, apart = len(source.tensors), 1
    if family.arch.num_layers > held * apart:
        raise ModelError(
            f"{path}: its config.json promises {family.arch.num_layers:,} layers, but the files "
            f"hold {held:,} tensors in all; is it another model's config?"
        )
    shapes = build_model(family, 0, jnp.dtype("float32"))  # they depend on the architecture alone
    abstract = jax.eval_shape(lambda: shapes.init(jax.random.key(0)))  # starts no backend
    most = held if stored is None else ORBAX_TENSORS
    checks.require_possible(abstract, *layout, most, str(path))
    if stored is not None:
        source = OrbaxSource(stored, *layout, abstract)
    return source, abstract


def require_one_set(path: Path) -> None:
    """Raises `ModelError` if a folder holds weights that are not read.

    A trainer that saves one file beside the shards that it started from leaves two models in a
    folder, and readers differ in which of them they take.
    """
    held = {f.name for f in path.glob("*.safetensors")} - {peft.WEIGHTS}
    converted = (path / PARAMS).is_dir()
    if converted:
        read = set()
    elif (file := gguf_header.find(path)) is not None:
        read = {file.name}
        held = {f.name for f in path.glob("*") if f.name.endswith(BESIDE_GGUF)}
    else:
        read = {f.name for f in safetensors.weight_files(path)}
    unread = sorted(held - read)
    if unread:
        kept = f"{PARAMS}/" if converted else ", ".join(sorted(read)[:3])
        raise ModelError(
            f"{path}: holds two sets of weights: {kept} and {printable(', '.join(unread[:3]), 200)}"
            "; move those away that are not the model's"
        )
    if (path / peft.CONFIG).is_file():
        raise ModelError(
            f"{path}: holds a LoRA adapter ({peft.CONFIG}) beside the model's own weights, which "
            "transformers would add; move it into a folder of its own, and give that as --adapter "
            "if the model has it"
        )


def _name(*parts: str) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _with_adapters(folder: ModelFolder, paths: Sequence[Path], merge: bool) -> ModelFolder:
    """Returns the folder with adapters, beside its weights if all of them can be, else merged."""
    paths = [resolve(path) for path in paths]
    kept: list[peft.Leaves] = []
    names, opened, at = [], [], folder
    for number, path in enumerate(paths, 1):
        base = peft.Base(
            at.source, at.family.weights, at.model.num_layers, at.abstract_params,
            at.family.block_group_size,
        )  # fmt: skip
        adapter = peft.open_adapter(path, base)
        if adapter.identity in names:
            raise UsageError(f"{path}: this adapter is given twice; give each once, in their order")
        names.append(adapter.identity)
        opened.append(adapter)
        beside = None if merge else peft.leaves(adapter, base, folder.model.lora_paths)
        kept += [] if beside is None else [beside]
        if number < len(paths) or len(kept) < number:  # else nobody reads it merged
            at = _merged(at, base, adapter)
    nothing = all(adapter.is_nothing for adapter in opened)
    identity = f"{' '.join(names)} {'beside' if len(kept) == len(paths) else 'merged'}"
    told: dict[str, Any] = {"adapter_identity": identity, "adapter_is_nothing": nothing}
    told["adapters"] = tuple(paths)
    if len(kept) < len(paths):
        checks.check(
            at.source, at.family.weights, at.model.num_layers, at.abstract_params, str(paths[-1])
        )
        return replace(at, **told)
    leaves = peft.stacked(kept)
    lora = tuple((name, a.shape[-1]) for name, (a, _) in leaves.items())
    return replace(with_options(folder, lora=lora), adapter=leaves, **told)


def _merged(folder: ModelFolder, base: peft.Base, adapter: peft.Adapter) -> ModelFolder:
    """Returns the folder of the merged model; its config and shapes may be others."""
    source, fields = peft.merge(base, adapter)
    if not fields:
        return replace(folder, source=source)
    config = folder.config | fields
    family, old = _family_of(folder.path, config, folder.asked_mask), folder.model
    if old.mask_id >= family.arch.vocab_size:
        raise ModelError(
            f"{adapter.path}: leaves {family.arch.vocab_size} rows, but the mask token id is "
            f"{old.mask_id}; is it an adapter for another model?"
        )
    model = build_model(family, old.mask_id, old.dtype)
    fused = model.with_cudnn() if old.arch.attention == "cudnn" else None
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    return replace(
        folder,
        config=config,
        family=family,
        model=fused or model,
        source=source,
        abstract_params=abstract,
    )


def with_options(folder: ModelFolder, **changes: Any) -> ModelFolder:
    """Returns the same folder with other model options, such as `remat=True`."""
    return replace(folder, model=replace(folder.model, **changes))  # pyright: ignore  a protocol
