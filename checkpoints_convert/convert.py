"""Writes a model folder again, by Orbax or as safetensors: the commands to-orbax and to-hf.

A folder is opened and checked whole before anything is written. `conversion.json` is the first file
of the output and `config.json` the last, so an interrupted conversion can be told from a finished
one, and the same command starts it over.
"""

import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.output import claimed, finish, make_record, record_sizes
from sama_jax import untrusted
from sama_jax.devices.mesh import make_mesh
from sama_jax.devices.sharding import split_sharding
from sama_jax.errors import ModelError, UsageError
from sama_jax.models.families.weight_table import Table
from sama_jax.models.registry import read_config
from sama_jax.storage.files import writing
from sama_jax.terminal import ByteBar, duration
from sama_jax.texts.folder_template import one_template
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import (
    folder_files,
    hub,
    loading,
    model_folder,
    orbax,
    pickled,
    safetensors,
    saving,
    special_tokens,
    tensor_map,
)
from sama_jax.weights.adapter_tokenizer import require_adapters_ids
from sama_jax.weights.folder_files import CONFIG, PARAMS
from sama_jax.weights.model_folder import ModelFolder
from sama_jax.weights.orbax_source import OrbaxSource

HOST_BASE_BYTES = 0.35 * 2**30
"""Python, JAX and Orbax themselves."""
BYTES_PER_SECOND = 150e6
"""Of parameters read, transposed and written, as measured on two busy cores (90 to 280 MB/s)."""


class Converted(NamedTuple):
    """Says what a conversion did."""

    out: Path
    num_params: int
    bytes_read: int
    """From the source's tensors by this process; 0 if OUT was finished already."""
    bytes_written: int
    """Parameters, over all processes."""
    seconds: float


def to_orbax(
    src: str | Path,
    out: Path,
    *,
    dtype: str = "keep",
    mesh: str | None = None,
    allow_pickle: bool = False,
    mask_id: int | None = None,
    quiet: bool = False,
) -> Converted:
    """Writes the parameters through Orbax, with config and tokenizer next to them.

    The folder loads onto any mesh in any dtype. With several processes all call this together.

    Args:
      src: model folder or Hub id.
      out: a new folder, or one where the same conversion was interrupted.
      dtype: of the stored parameters; `keep` is each tensor's own.
      mesh: `data=N,model=M` over all devices; each process reads and writes what its devices hold.
        None is the first device.
      allow_pickle: read `.bin` weights, by torch's weights-only loading.
      mask_id: instead of the config's, and written in its place.

    Raises:
      ModelError: everything that does not fit, in one message.
      UsageError: `out` holds something else.
      OutputError: the disk.
    """
    with _opened(src, out, allow_pickle, mask_id) as folder:
        kept = _stored_dtypes(folder)
        wanted = kept if dtype == "keep" else dict.fromkeys(kept, jnp.dtype(dtype))
        dtype = dtype if wanted != kept else "keep"
        _refuse_float64(folder, wanted)
        place = _places(folder, mesh)
        record = make_record(folder, "orbax", src, dtype, mask_id)
        with claimed(out, record, quiet) as finished:
            if finished:
                return Converted(out, folder.num_params, 0, 0, 0.0)
            sizes = _local_bytes(folder, wanted, place)
            # Orbax makes a copy of one leaf at a time to write it.
            host = sum(sizes.values()) + 2 * max(sizes.values()) + HOST_BASE_BYTES
            leaves = tensor_map.leaf_paths(folder.abstract_params)
            total = sum(leaf.size * wanted[path].itemsize for path, leaf in leaves.items())
            _announce(src, folder, total, host, quiet)

            start = time.monotonic()
            with ByteBar("reading", total, quiet=quiet) as told:
                params = loading.read_params(folder, lambda p, _: (wanted[p], place[p]), told)
            if not quiet:
                print(f"writing {out / PARAMS}", file=sys.stderr)
            orbax.save_params(out / PARAMS, params)
            record_sizes(out, record)
            finish(folder, out, folder.config, dtype)
            seconds = time.monotonic() - start
            return Converted(out, folder.num_params, folder.source.bytes_read, total, seconds)


def to_hf(
    src: str | Path,
    out: Path,
    *,
    dtype: str = "keep",
    max_shard_bytes: int = saving.MAX_SHARD_BYTES,
    adapter: Path | Sequence[Path] | None = None,
    allow_pickle: bool = False,
    mask_id: int | None = None,
    quiet: bool = False,
) -> Converted:
    """Writes safetensors under the names of the published checkpoints; one process.

    Args:
      src: model folder (safetensors, or what `to_orbax` wrote) or Hub id.
      out, allow_pickle, mask_id: as in `to_orbax`.
      dtype: `keep` copies every tensor bit for bit; another one leaves buffers alone.
      max_shard_bytes: a file holds at most this many, or one larger tensor.
      adapter: one or several of PEFT's that are merged into the tensors, in float32.

    Raises:
      as `to_orbax`.
    """
    with _opened(src, out, allow_pickle, mask_id, adapter) as folder:
        tensors = _hub_tensors(folder, dtype)
        kept = all(
            t.dtype == np.dtype(s.dtype)
            for t, s in zip(tensors.values(), folder.source.tensors.values())
        )
        record = make_record(folder, "hf", src, "keep" if kept else dtype, mask_id)
        if adapter is not None:
            paths = [adapter] if isinstance(adapter, str | Path) else adapter
            record["adapter"] = ", ".join(map(str, paths))
        with claimed(out, record, quiet) as finished:
            if finished:
                return Converted(out, folder.num_params, 0, 0, 0.0)
            total = sum(t.nbytes for t in tensors.values())
            largest = max(t.nbytes for t in tensors.values())
            if isinstance(folder.source, OrbaxSource):  # it reads whole leaves
                leaves = tensor_map.leaf_paths(folder.source.params)
                largest += max(x.size * x.dtype.itemsize for x in leaves.values())
            _announce(src, folder, total, 2 * largest + HOST_BASE_BYTES, quiet)

            start = time.monotonic()
            with ByteBar("writing", total, quiet=quiet) as told, writing(out):
                safetensors.save_weights(out, tensors, max_shard_bytes, told)
            saved = folder.family.weights.saved_config
            config = {k: saved.get(k, value) for k, value in folder.config.items()}
            finish(folder, out, config, "keep" if kept else dtype)
            return Converted(
                out, folder.num_params, folder.source.bytes_read, total, time.monotonic() - start
            )


# --- the source ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(
    src: str | Path,
    out: Path,
    allow_pickle: bool,
    mask_id: int | None,
    adapter: Path | Sequence[Path] | None = None,
) -> Iterator[ModelFolder]:
    """Opens and checks the source, an adapter merged.

    Pickles are first rewritten to a new folder next to `out`, which is removed in the end.
    """
    path = hub.resolve(src)
    # Only then, since many repositories hold both formats.
    if allow_pickle and not safetensors.has_weights(path):
        path = hub.resolve(src, (*hub.HUB_FILES, *hub.PICKLES))
    unpickle = allow_pickle and path.is_dir() and pickled.has_only_pickles(path)
    with contextlib.ExitStack() as stack:
        if unpickle:
            with writing(out):
                beside = out.resolve()  # `out` may be `.`
                beside.parent.mkdir(parents=True, exist_ok=True)
                made = tempfile.TemporaryDirectory(
                    prefix=f"{beside.name[:99]}.unpickled-", dir=beside.parent
                )
                rewritten = Path(stack.enter_context(made))
        try:
            if unpickle:
                with writing(out):
                    pickled.rewrite(path, rewritten)
                path = rewritten
            holder = 0 if mask_id is None and _names_no_mask(path) else mask_id
            folder = model_folder.open_folder(
                path, mask_id=holder, dtype="float32", adapter=adapter, merge=True
            )
            if mask_id is not None and folder.model.kind != "autoregressive":  # they mask nothing
                folder = replace(folder, config=folder.config | {"mask_token_id": mask_id})
            _check_tokenizer(folder)
            yield folder
        except ModelError as error:
            if not unpickle:
                raise
            named = str(error).replace(str(rewritten), str(src))  # it goes away
            raise ModelError(named) from None


def _names_no_mask(path: Path) -> bool:
    """Returns whether neither config nor tokenizer know a mask token (BERT without tokenizer)."""
    where = str(path / CONFIG)
    family = read_config(folder_files.read_json_config(path), where)
    return family.mask_id is None and special_tokens.known_mask(path, family) is None


def _check_tokenizer(folder: ModelFolder) -> None:
    """Refuses a broken tokenizer, and adapters that bring another one or another chat template.

    Weights without any can be converted.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    stored = any((folder.path / name).is_file() for name in names)
    if stored or names[0] in folder_files.companion_names(folder.path):
        tokenizer = TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
        require_adapters_ids(folder.adapters, tokenizer)
    one_template(folder.path, *folder.adapters)


def _layout(folder: ModelFolder) -> tuple[Table, int]:
    return folder.family.weights, folder.model.num_layers


def _stored_dtypes(folder: ModelFolder) -> dict[str, np.dtype]:
    """Returns by parameter path the dtype that holds all of its tensors exactly."""
    leaves, stored = tensor_map.leaf_paths(folder.abstract_params), folder.source.tensors
    return {
        path: _common_dtype(
            {stored[n].dtype for _, n, _ in tensor_map.sources(path, leaves, *_layout(folder))}
        )
        for path in leaves
    }


def _refuse_float64(folder: ModelFolder, dtypes: dict[str, np.dtype]) -> None:
    wide = [path for path, found in dtypes.items() if found == np.float64]
    if wide:
        raise UsageError(
            f"{folder.path}: {len(wide)} parameters are stored in float64, which JAX does not "
            f"keep (first {wide[0]}); give --dtype float32"
        )


def _places(folder: ModelFolder, mesh: str | None) -> dict[str, jax.sharding.Sharding]:
    """Returns the sharding of every parameter by path: over a mesh, or on the first device."""
    leaves = tensor_map.leaf_paths(folder.abstract_params)
    if mesh is None:
        return dict.fromkeys(leaves, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    grid = make_mesh(mesh)
    return {path: split_sharding(grid, leaf.shape) for path, leaf in leaves.items()}


def _common_dtype(names: set[str]) -> np.dtype:
    if "float64" in names:  # JAX would make it float32
        return np.dtype("float64")
    return np.dtype(jnp.result_type(*map(np.dtype, names)))


def _hub_tensors(folder: ModelFolder, dtype: str) -> dict[str, safetensors.Pending]:
    """Returns every tensor of the source under its published name, read when it is written."""
    leaves, source = tensor_map.leaf_paths(folder.abstract_params), folder.source
    buffers = {
        name
        for path in leaves
        if tensor_map.rule_of(path, leaves, *_layout(folder)).buffer
        for _, name, _ in tensor_map.sources(path, leaves, *_layout(folder))
    }
    prefix = folder.family.weights.hub_prefix

    def pending(name: str) -> safetensors.Pending:
        tensor = source.tensors[name]
        keep = dtype == "keep" or name in buffers
        everything = (slice(None),) * len(tensor.shape)
        return safetensors.Pending(
            tensor.shape,
            np.dtype(tensor.dtype if keep else dtype),
            lambda: source.window(name, everything),
        )

    return {prefix + name: pending(name) for name in source.tensors}


# --- what is said beforehand ---------------------------------------------------------------------


def _local_bytes(folder: ModelFolder, dtypes: dict[str, Any], place: Any) -> dict[str, int]:
    """Returns by parameter path the bytes that this process' devices hold, equal windows once."""
    found = {}
    for path, leaf in tensor_map.leaf_paths(folder.abstract_params).items():
        local = place[path].addressable_devices_indices_map(leaf.shape).values()
        share = int(np.prod(place[path].shard_shape(leaf.shape)))
        found[path] = len({str(index) for index in local}) * share * dtypes[path].itemsize
    return found


def _announce(src: str | Path, folder: ModelFolder, total: int, host: float, quiet: bool) -> None:
    if quiet:
        return
    for name in folder_files.foreign_links(folder.path):
        left_out = untrusted.printable(name, 200)
        print(f"note: {left_out} is not copied: a link that leads out of {src}", file=sys.stderr)
    free = ""
    with contextlib.suppress(OSError):
        if match := re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text()):
            free = f" ({size(int(match[1]) * 1024)} available)"
    print(
        f"{src}: {folder.family.family}, {folder.num_params:,} parameters, "
        f"{size(total)} to write; host memory up to about {size(host)}{free}, about "
        f"{duration(total / BYTES_PER_SECOND)}",
        file=sys.stderr,
    )


def size(num_bytes: float) -> str:
    """Formats a number of bytes for people: "2.97 GB", "50 kB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes / 1e3:.0f} kB"
