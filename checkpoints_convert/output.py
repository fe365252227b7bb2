"""Keeps the output folder of a conversion: what it came from, whether it is finished and whole."""

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from sama_jax import __version__
from sama_jax.config import settings_hash
from sama_jax.errors import ModelError, UsageError
from sama_jax.storage.files import only_writer, write_json, writing
from sama_jax.weights import folder_files, quantised, stored_bytes
from sama_jax.weights.folder_files import CONFIG, PARAMS, RECORD
from sama_jax.weights.model_folder import ModelFolder
from sama_jax.weights.orbax_source import files_below


def make_record(
    folder: ModelFolder, kind: str, src: str | Path, dtype: str, mask_id: int | None = None
) -> dict[str, Any]:
    """Makes the content of `conversion.json`; `mask_id` is what replaces the config's, if any."""
    config = folder.path / CONFIG  # a GGUF file needs none
    copied = [*([config] if config.is_file() else []), *folder_files.companions(folder.path)]
    return {
        "format": kind,
        "source": str(src),
        "source_identity": folder.identity,
        "dtype": dtype,
        "mask_id": mask_id,
        "sama_jax": __version__,
        "files": folder_files.companion_names(folder.path),
        # Mask and padding ids, the tokenizer: what is written besides the weights.
        "source_files": stored_bytes.digest([(f.name, f) for f in copied]),
    }


def record_sizes(out: Path, record: dict[str, Any]) -> None:
    """Writes the record again with the sizes of Orbax's files and the SHA-256 of their bytes."""
    if jax.process_index() == 0:
        files = files_below(out / PARAMS)
        sizes = {name: file.stat().st_size for name, file in files}
        digest = stored_bytes.digest(files)
        write_json(out / RECORD, {**record, "sizes": sizes, "digest": digest})


@contextlib.contextmanager
def claimed(out: Path, record: dict[str, Any], quiet: bool) -> Iterator[bool]:
    """Keeps other conversions out of `out`, empties it, and writes the record.

    Yields True if the conversion is finished already; then nothing is changed. Raises `UsageError`
    if the folder holds anything else, or another process is converting into it.
    """
    _is_finished(out, record)  # before a folder is made
    first = jax.process_index() == 0
    with only_writer(out) if first else contextlib.nullcontext():
        finished = _is_finished(out, record)  # again: another one may have had it meanwhile
        _together("checked")  # no process looks at what another one has begun
        if finished and not quiet:
            print(f"{out}: finished before, nothing to do", file=sys.stderr)
        if not finished:
            _begin(out, record)
        yield finished


def _begin(out: Path, record: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        with writing(out):
            if out.is_dir():
                for item in out.iterdir():
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
        write_json(out / RECORD, record)
    _together("claimed")


def _is_finished(out: Path, record: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; give a new folder for the output")
    names = {item.name for item in out.iterdir()}
    if not names:
        return False
    try:
        before = folder_files.read_object(out / RECORD)
        files = {*before["files"], RECORD, CONFIG, PARAMS}
    except (ModelError, KeyError, TypeError):
        raise UsageError(
            f"{out}: is not empty and holds no conversion (no readable {RECORD}); give a new folder"
        ) from None
    if CONFIG in names:
        same = ("format", "source_identity", "dtype", "mask_id", "source_files")
        changed = [k for k in same if before.get(k) != record[k]]
        differs = [f"{k} was {before.get(k)!r}, is {record[k]!r}" for k in changed]
        if differs:
            raise UsageError(
                f"{out}: holds another conversion ({'; '.join(differs)}); give a new folder"
            )
        if before.get("written") != _written(out, before):
            raise UsageError(
                f"{out}: its files are no longer those that the conversion wrote; give a new "
                "folder, or delete this one"
            )
        return True
    weights = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    part = rf"({weights}|{re.escape(CONFIG)}|{re.escape(RECORD)})\.part"
    ours = re.compile(rf"{weights}|{part}|{PARAMS}\.orbax-checkpoint-tmp.*")
    foreign = sorted(name for name in names - files if not ours.fullmatch(name))
    if foreign:
        raise UsageError(
            f"{out}: holds an unfinished conversion and other files ({', '.join(foreign)}); move "
            "them away or give a new folder"
        )
    return False


def finish(folder: ModelFolder, out: Path, config: dict[str, Any], dtype: str) -> None:
    """Copies tokenizer and other files, then writes `config.json`, atomically.

    What is written is not quantised, whatever the source was.

    Raises `ModelError` if the source has changed meanwhile.
    """
    folder.source.require_unchanged()
    if jax.process_index() == 0:
        folder_files.copy_companions(folder.path, out)
        if dtype != "keep":
            config = folder_files.with_dtype(config, dtype)
        config = {name: x for name, x in config.items() if name != quantised.FIELD}
        record = folder_files.read_object(out / RECORD)
        record["outputs"] = sorted(name for name, _ in files_below(out) if name != RECORD)
        write_json(out / RECORD, {**record, "written": _written(out, record, config)})
        write_json(out / CONFIG, config)
    _together("finished")


def _written(
    out: Path, record: dict[str, Any], config: dict[str, Any] | None = None
) -> dict[str, str] | None:
    """Returns digests of the files that a conversion wrote, and of its config; None if any lacks.

    Args:
      out: the folder.
      record: its `conversion.json`, which lists the other files.
      config: the config that is yet to be written; None: read it.
    """
    try:
        found = folder_files.read_object(out / CONFIG) if config is None else config
        files = stored_bytes.digest([(name, out / name) for name in record["outputs"]])
    except (ModelError, KeyError, TypeError):
        return None
    return {"files": files, "config": settings_hash(found)}


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoints_convert {name}")
