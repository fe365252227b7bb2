"""Model folders in the Hugging Face layout: open, check, load, save.

Composes `models` (architecture) and `checkpoints_convert` (tensors). Reads `config.json`,
safetensors and tokenizer files; never imports torch, never runs code from a folder.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sama_jax.arrays import Model, Params
from sama_jax.errors import ModelError, OutputError, UsageError
from sama_jax.models.families.weight_table import Table
from sama_jax.models.registry import FamilyConfig, build_model, read_config
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import orbax, peft, safetensors
from sama_jax.weights.orbax_source import OrbaxSource

CONFIG = "config.json"
PARAMS = "orbax"
"""Folder of the parameters beside the config, where Orbax keeps them, not safetensors."""
RECORD = "conversion.json"
"""Where a converted folder comes from; written first, so that an unfinished one can be told."""
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
"""What is downloaded of a Hub repository: no code, no pickles."""
PICKLES = ("pytorch_model*.bin",)
"""What is downloaded beside them where the caller reads pickles."""
MASK_NAMES = ("<|mask|>", "<|MASK|>", "<|mdm_mask|>", "<[MASK]>")
"""Mask tokens of published models whose tokenizers do not call them `mask_token`."""
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder whose weights have not been loaded yet."""

    path: Path
    config: dict[str, Any]
    family: FamilyConfig
    model: Model
    source: safetensors.Source
    identity: str
    """16 hex digits over architecture, headers, sizes and sampled bytes of the weight files, and
    over all of an adapter."""
    base_identity: str
    """The same without the adapter: folders that share it can share their weights."""
    adapter: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """A LoRA adapter that stands beside the weights, as `peft.leaves` makes it (host)."""

    @property
    def abstract_params(self) -> Params:
        """Shapes of the parameter tree, float32; without an adapter."""
        return _abstract_params(self.model)

    @property
    def max_length(self) -> int:
        """Tokens that the model was made for; a large number where its config does not say."""
        names = ("max_sequence_length", "max_position_embeddings", "n_positions", "model_length")
        names += ("block_size",)
        found = [self.config[n] for n in names if isinstance(self.config.get(n), int)]
        return min(found, default=2**20)

    @property
    def num_params(self) -> int:
        """Parameters, unused embedding rows included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))


def num_bytes(folders: Sequence[ModelFolder]) -> int:
    """Of the parameters of several folders, each set of weights once, without adapters."""
    bases = {(f.base_identity, str(f.model.dtype)): f for f in folders}
    return sum(f.num_params * jnp.dtype(f.model.dtype).itemsize for f in bases.values())


@functools.lru_cache(maxsize=64)
def _abstract_params(model: Model) -> Params:
    """Shapes only; remembered, since tracing a model's `init` takes about 0.1 s."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0)))  # starts no backend


_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def resolve(name: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """A model's folder: a path that exists, else a Hub id `owner/name[@revision]`, downloaded.

    A name whose first part is a folder here is a path. `HF_HUB_OFFLINE=1` stays with what has been
    downloaded before. `files` are the patterns of what is downloaded. Raises `ModelError`.
    """
    path = Path(name)
    match = _HUB_ID.fullmatch(str(name))
    if match is None or os.path.isdir(path.parts[0]):
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(
            f"{name}: no such folder; to download it from the Hub, pip install 'sama-jax[hub]'"
        ) from None
    try:
        found = huggingface_hub.snapshot_download(
            match["id"], revision=match["revision"], allow_patterns=list(files)
        )
    except (OSError, ValueError, RuntimeError) as error:  # what its errors derive from
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(
            f"{name}: no such folder here, and not available from the Hub "
            f"({type(error).__name__}: {reason})"
        ) from None
    return Path(found)


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
    source = _open_source(path, family)
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
    abstract = _abstract_params(model)
    safetensors.check(source, family.weights, model.num_layers, abstract, str(path))
    identity = _identity(path, repr(family.arch))
    folder = ModelFolder(path, config, family, model, source, identity, identity)
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
    """Whether cuDNN's attention runs on the devices; AMD's have a name for a capability."""
    found = re.match(r"(\d+)\.", str(getattr(jax.devices()[0], "compute_capability", "")))
    return found is not None and int(found[1]) >= 8


def _open_source(path: Path, family: FamilyConfig) -> safetensors.Source:
    """The tensors of a folder, in safetensors or kept by Orbax."""
    if not (path / PARAMS).is_dir():
        return safetensors.open_source(path, family.weights, family.block_group_size)
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
    model = build_model(family, 0, jnp.dtype("float32"))
    return OrbaxSource(path / PARAMS, family.weights, model.num_layers, _abstract_params(model))


def _with_adapter(folder: ModelFolder, path: Path, merge: bool) -> ModelFolder:
    """A folder with a LoRA adapter, merged or beside its weights."""
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


def known_mask(path: Path, family: FamilyConfig) -> Any:
    """The mask id of the config, else of the tokenizer. Raises `ModelError` if they disagree."""
    told = None if family.kind == "autoregressive" else tokenizer_mask(path)
    if family.mask_id is None or told in (None, family.mask_id):
        return told if family.mask_id is None else family.mask_id
    raise ModelError(
        f"{path}: the mask token id is {family.mask_id!r} by {CONFIG} (or its class's default), "
        f"but {told} by the tokenizer's files; say with --mask-id which one is right"
    )


def tokenizer_mask(path: Path) -> int | None:
    """The id of the mask token by the tokenizer's files, read as JSON; None if they name none.

    What they call `mask_token`; else, since many leave that out, an added token of a usual name.
    """
    added = _added_tokens(path)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json_object(path / file).get("mask_token")
        name = token.get("content") if isinstance(token, dict) else token
        if name in added:
            return added[name]
        if isinstance(name, str):
            try:
                return TextTokenizer.from_folder(path).token_id(name)
            except ModelError:  # whoever needs the tokenizer itself will say so
                return None
    found = {name: added[name] for name in MASK_NAMES if name in added}
    if len(set(found.values())) > 1:
        raise ModelError(f"{path}: the tokenizer has several mask tokens: {found}; give --mask-id")
    return next(iter(found.values()), None)


def _added_tokens(path: Path) -> dict[str, int]:
    """Tokens that stand beside the tokenizer's vocabulary, by any of its files."""
    decoder = json_object(path / "tokenizer_config.json").get("added_tokens_decoder") or {}
    listed = json_object(path / "tokenizer.json").get("added_tokens") or []
    try:
        return {
            **json_object(path / "added_tokens.json"),
            **{token["content"]: int(i) for i, token in decoder.items()},
            **{token["content"]: int(token["id"]) for token in listed},
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: cannot read the tokenizer's added tokens ({error})") from None


def json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none to read."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder."""
    if not os.path.isdir(path):
        raise ModelError(f"{path}: no such folder; expected a model folder with {CONFIG}")
    if not os.path.isfile(path / CONFIG) and os.path.isfile(path / RECORD):
        raise ModelError(
            f"{path}: a conversion that did not finish (it has a {RECORD} but no {CONFIG}); run "
            "the same command of checkpoints_convert again"
        )
    if not os.path.isfile(path / CONFIG):
        raise ModelError(
            f"{path}: has no {CONFIG}; expected a Hugging Face model folder ({CONFIG}, "
            f"{safetensors.SINGLE}, tokenizer.json)"
        )
    return read_config_file(path / CONFIG)


def read_config_file(path: Path) -> dict[str, Any]:
    """A parsed `config.json`, wherever it lies. Raises `ModelError`."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a model's {CONFIG}") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


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
    """`load` of several folders. Those with the same weights and dtype share the very arrays: an
    adapter and its base, or two adapters of one base, cost one base in memory."""
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
    """The sharding of every parameter, an adapter's among them, by path."""
    shapes = peft.attach(folder.abstract_params, dict(folder.adapter))
    if callable(placement):
        return safetensors.leaf_paths(placement(shapes, folder.model.arch))
    return dict.fromkeys(safetensors.leaf_paths(shapes), placement)


def _put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array, the same in every process, onto devices of any of them."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def read_params(
    folder: ModelFolder,
    place: Callable[[str, jax.ShapeDtypeStruct], tuple[Any, jax.sharding.Sharding]],
    progress: Callable[[int], None] | None = None,
) -> Params:
    """The weights, each leaf where and in the dtype that `place(its path, its shape)` says.

    Buffers keep their stored dtype. Of an Orbax folder, `progress` is told all bytes at the end.
    """
    shapes, layout = folder.abstract_params, (folder.family.weights, folder.model.num_layers)
    leaves = safetensors.leaf_paths(shapes)
    ours = folder.source if isinstance(folder.source, OrbaxSource) else None
    stored = safetensors.leaf_paths(ours.params) if ours else {}

    def target(path: str) -> jax.ShapeDtypeStruct:
        dtype, sharding = place(path, leaves[path])
        if ours and safetensors.rule_of(path, leaves, *layout).buffer:
            dtype = stored[path].dtype
        return jax.ShapeDtypeStruct(leaves[path].shape, dtype, sharding=sharding)

    abstract = jax.tree.unflatten(jax.tree.structure(shapes), list(map(target, leaves)))
    if not ours:
        return safetensors.load_params(folder.source, *layout, abstract, progress)
    params = orbax.load_params(ours.folder, abstract)
    if progress:
        progress(sum(x.nbytes for x in jax.tree.leaves(params)))
    return params


def save_folder(
    out: Path,
    params: Params,
    model: Model,
    config: dict[str, Any],
    tokenizer_from: Path,
    weights: Table,
) -> None:
    """Writes a model folder that `open_folder` and the PyTorch code read.

    `config.json` comes last and atomically: a folder without it is not finished. Files beside the
    weights (tokenizer, generation settings) are copied from `tokenizer_from`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG).unlink(missing_ok=True)
        if tokenizer_from != out:
            for file in companions(tokenizer_from):
                shutil.copyfile(file, out / file.name)
        tensors = safetensors.export_tensors(params, weights, model.num_layers)
        safetensors.save_weights(out, tensors, MAX_SHARD_BYTES)
        dtypes = [str(a.dtype) for a in tensors.values()]
        commonest = max(sorted(set(dtypes)), key=dtypes.count)
        config = {**config, "torch_dtype": commonest, **weights.saved_config}
        part = out / (CONFIG + ".part")
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        os.replace(part, out / CONFIG)
    except OSError as error:
        raise OutputError(f"{out}: cannot write the model folder ({error})") from None


def companions(path: Path) -> list[Path]:
    """Files of a folder beside config and weights: tokenizer, generation settings, licence."""
    files = (f for f in sorted(path.iterdir()) if f.is_file() and f.name != CONFIG)
    return [f for f in files if not _is_weights(f)]


def _is_weights(file: Path) -> bool:
    return (
        file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".part")
        or file.name.endswith(".index.json")
        or file.name == RECORD
    )


def _identity(path: Path, architecture: str, samples: int = 4, block: int = 4096) -> str:
    """Hashes a few blocks of every tensor instead of 16 GB.

    Small tensors, the norms among them, are hashed whole, so that training any of them shows. An
    Orbax folder has that of what it was made from, unless dtype or architecture changed since.
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
    """The same folder with other model options, such as `remat=True`."""
    return replace(folder, model=replace(folder.model, **changes))  # pyright: ignore
