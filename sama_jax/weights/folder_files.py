"""Names the files of a model folder and reads those that hold JSON."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sama_jax import gguf_header, untrusted
from sama_jax.errors import DataError, ModelError
from sama_jax.storage.files import copy_file, write_json
from sama_jax.texts import gguf_tokenizer
from sama_jax.weights import gguf_config

CONFIG = "config.json"
PARAMS = "orbax"
"""Subfolder of the parameters where Orbax keeps them, not safetensors."""
RECORD = "conversion.json"
"""Where a converted folder comes from; written first, so that an unfinished one can be told."""
LONGEST_NAME = 255
"""Bytes of a file's name, on Linux."""


def read_object(file: Path) -> dict[str, Any]:
    """Reads a file's JSON object. Raises `ModelError`."""
    try:
        found = untrusted.read_json(file)
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ModelError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def object_if_there(file: Path) -> dict[str, Any]:
    """Reads a file's JSON object; empty if there is no such file. Raises `ModelError`."""
    return read_object(file) if os.path.lexists(file) else {}


def read_json_config(path: Path) -> dict[str, Any]:
    """Reads the `config.json` of a folder, or what the metadata of a GGUF file say instead.

    Raises `ModelError`.
    """
    if (file := gguf_header.find(path)) is not None:
        told = None if file == path else object_if_there(path / CONFIG)
        header = gguf_header.read_header(file)
        return gguf_config.model_config(header, told or None, str(path / CONFIG))
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
            "model.safetensors, tokenizer.json), or a GGUF file"
        )
    return read_object(path / CONFIG)


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a config that says what type its weights have, under the name that it uses.

    `transformers` 5 writes `dtype`, earlier versions `torch_dtype`; it reads the first where both
    stand there, so neither may be left behind.
    """
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(names, dtype)}


def read_config_file(path: Path) -> dict[str, Any]:
    """Reads a `config.json`, wherever it lies. Raises `ModelError`."""
    if not os.path.lexists(path):
        raise ModelError(f"{path}: no such file; expected a model's {CONFIG}")
    return read_object(path)


def inside(folder: Path, name: str) -> Path | None:
    """Returns the file that another file of the folder names; None for a name that leads out."""
    parts = name.split("/")
    if not name.isprintable() or any(p in ("", ".", "..") for p in parts):
        return None
    if any(len(os.fsencode(p)) > LONGEST_NAME for p in parts) or len(parts) > 9:
        return None
    return folder / name


def listed_files(index: Path) -> list[Path]:
    """Returns the files that an index of weights lists, by name. Raises `ModelError`."""
    folder, listed = index.parent, read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(n, str) for n in listed.values()):
        raise ModelError(f"{index}: not an index of weights; expected names in its weight_map")
    names = sorted(set(listed.values()))
    files = [inside(folder, name) for name in names]
    wrong = [untrusted.printable(name) for name, file in zip(names, files) if file is None]
    if wrong:
        raise ModelError(
            f"{index}: names {len(wrong)} files that are not below its folder; first {wrong[0]!r}"
        )
    found = [file for file in files if file is not None]
    missing = [file.name for file in found if not file.is_file()]
    if missing or not found:
        raise ModelError(
            f"{folder}: {len(missing)} shards named in {index.name} are missing: "
            + untrusted.printable(", ".join(missing), 500)
        )
    return found


def companions(path: Path) -> list[Path]:
    """Lists what is neither config nor weights: tokenizer, generation settings, licence.

    Links that lead out of the folder are left out: whoever copies a folder would otherwise copy
    whatever they point to. Beside a GGUF file that is named itself, nothing belongs to it.
    """
    if path.is_file():
        return []
    files = (f for f in sorted(path.iterdir()) if f.is_file() and f.name != CONFIG)
    return [f for f in files if not _is_weights(f) and not _leads_out(f)]


def copy_companions(path: Path, out: Path, leave_out: Collection[str] = ()) -> None:
    """Copies the `companions` of a folder to `out`; writes the tokenizer of a GGUF file.

    Raises:
      ModelError: one of them cannot be read.
      OutputError: one cannot be written.
    """
    for file in companions(path):
        if file.name not in leave_out:
            try:
                copy_file(file, out / file.name)
            except DataError as error:
                raise ModelError(str(error)) from None
    for name, content in _tokenizer_files(path).items():
        write_json(out / name, content)


def companion_names(path: Path) -> list[str]:
    """Names the files that `copy_companions` writes."""
    return [*(file.name for file in companions(path)), *_tokenizer_files(path)]


def _tokenizer_files(path: Path) -> dict[str, Any]:
    """Returns the content of a GGUF file's tokenizer, by file; nothing if it has none of its own.

    Of one beside it, the name of a class that leaves it as it is: else the `config.json` that is
    written would choose another. Raises `ModelError` for a tokenizer that is not read.
    """
    file, names = gguf_header.find(path), ("tokenizer.json", "tokenizer_config.json")
    if file is None:
        return {}
    if (path / names[0]).is_file():
        own = (path / names[1]).is_file()
        return {} if own else {names[1]: {"tokenizer_class": gguf_tokenizer.CLASS}}
    header = gguf_header.read_header(file)
    if "tokenizer.ggml.model" not in header.metadata:
        return {}
    return dict(zip(names, (gguf_tokenizer.as_json(header), gguf_tokenizer.settings(header))))


def foreign_links(path: Path) -> list[str]:
    """Names the files that `companions` leaves out because they are links that lead out."""
    if path.is_file():
        return []
    return [f.name for f in sorted(path.iterdir()) if f.is_file() and _leads_out(f)]


def _leads_out(file: Path) -> bool:
    target, home = file.resolve(), file.parent.resolve()
    # A Hub cache keeps contents in blobs/, and links to them in snapshots/REVISION/.
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    return not (target.is_relative_to(home) or target.is_relative_to(blobs))


def _is_weights(file: Path) -> bool:
    return (
        file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".part", gguf_header.SUFFIX)
        or file.name.endswith(".index.json")
        or file.name == RECORD
    )
