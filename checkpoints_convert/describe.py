"""Describes for `inspect` what a model folder holds and whether it would be refused.

Loads no weights.
"""

import re
from pathlib import Path
from typing import Any

from sama_jax import gguf_header
from sama_jax.errors import ModelError
from sama_jax.models.families.family import UNLIMITED
from sama_jax.models.registry import read_config
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.untrusted import printable
from sama_jax.weights import folder_files, hub, model_folder
from sama_jax.weights.orbax_source import OrbaxSource

CARD_BYTES = 2**20
"""Read of a model card; its front matter stands at its beginning."""


def describe(src: str | Path, mask_id: int | None = None) -> dict[str, Any]:
    """Returns everything that can be told of a folder; what cannot is absent.

    Returns:
      `path`, `loadable`, `refused` (messages), and as far as they are known `family`, `kind`,
      `architecture`, `mask_id`, `shift`, `max_length` (None: its config sets no limit),
      `parameters`, `stored_dtypes` {dtype: tensors; dequantised}, `quantised` (method or None),
      `storage`, `bfloat16_bytes`, `float32_bytes`,
      `licence`, `converted_from`.
    """
    found: dict[str, Any] = {"path": str(src), "loadable": False, "refused": []}
    try:
        path = hub.resolve(src)
        found["path"] = str(path)
        gguf = gguf_header.find(path)
        if path.is_dir() or gguf is not None:
            found["licence"] = _licence(path, gguf)
        config = folder_files.read_json_config(path)
        family = read_config(config, str(path / folder_files.CONFIG))
        found |= {
            "family": family.family,
            "kind": family.kind,
            "architecture": _plain(family.arch),
            "mask_id": family.mask_id if mask_id is None else mask_id,
            "shift": family.shift,
        }
        folder = model_folder.open_folder(path, mask_id=mask_id, dtype="float32")
    except ModelError as error:
        found["refused"].append(str(error))
        return found
    names = [tensor.dtype for tensor in folder.source.tensors.values()]
    orbax = isinstance(folder.source, OrbaxSource)
    found |= {
        "mask_id": folder.model.mask_id,
        "max_length": None if folder.max_length == UNLIMITED else folder.max_length,
        "parameters": folder.num_params,
        "stored_dtypes": {name: names.count(name) for name in sorted(set(names))},
        "quantised": folder.quantised[0] if folder.quantised else None,
        "storage": "orbax" if orbax else "safetensors" if gguf is None else "gguf",
        "bfloat16_bytes": 2 * folder.num_params,
        "float32_bytes": 4 * folder.num_params,
    }
    record = folder_files.object_if_there(path / folder_files.RECORD)
    if isinstance(record.get("source"), str):
        found["converted_from"] = printable(record["source"], 300)
    try:
        TextTokenizer.from_folder(path, folder.model.vocab_size)
    except ModelError as error:
        found["refused"].append(str(error))
    found["loadable"] = not found["refused"]
    return found


def _plain(arch: Any) -> dict[str, Any]:
    """Returns an architecture's fields that JSON can hold."""
    fields = {name: getattr(arch, name) for name in arch.__dataclass_fields__}
    return {k: v for k, v in fields.items() if isinstance(v, int | float | str) or v is None}


def _licence(path: Path, gguf: Path | None) -> str | None:
    """Returns the licence by the model card's front matter, else the name of a licence file.

    A GGUF file may say it itself.
    """
    told = None if gguf is None else gguf_header.read_header(gguf).metadata.get("general.license")
    if isinstance(told, str):
        return printable(told, 200)
    card = path / "README.md"
    if card.is_file():
        with card.open("rb") as file:
            text = file.read(CARD_BYTES).decode("utf-8", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        stated = re.findall(r"^license(?:_name)?:[ \t]*(\S.*)$", front[1] if front else "", re.M)
        if stated:
            return printable(", ".join(value.strip().strip("'\"") for value in stated), 200)
    files = sorted(f.name for f in path.glob("LICEN[CS]E*"))
    return f"see {files[0]}" if files else None


def _binary(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"


def print_description(found: dict[str, Any]) -> None:
    """Prints what `describe` returns for people, one line a fact."""
    lines: dict[str, Any] = {"folder": found["path"]}
    if "family" in found:
        arch = found["architecture"]
        sizes = ("num_layers", "width", "num_heads", "num_kv_heads", "mlp_width", "vocab_size")
        shift = "predicts the next position" if found["shift"] else "predicts its own position"
        lines |= {
            "family": f"{found['family']} ({found['kind']})",
            "sizes": ", ".join(f"{n.replace('_', ' ')} {arch[n]}" for n in sizes if n in arch),
            "mask id": found["mask_id"],
            "output": shift,
        }
    if "parameters" in found:
        dtypes = ", ".join(f"{count} x {name}" for name, count in found["stored_dtypes"].items())
        made = f", dequantised from {found['quantised']}" if found["quantised"] else ""
        memory = [_binary(found[name]) for name in ("bfloat16_bytes", "float32_bytes")]
        lines |= {
            "maximum length": found["max_length"] or "not limited by its config",
            "stored": f"{dtypes} ({found['storage']}{made})",
            "parameters": f"{found['parameters']:,}",
            "memory": f"{memory[0]} in bfloat16, {memory[1]} in float32",
        }
    if found.get("converted_from"):
        lines["converted from"] = found["converted_from"]
    if "licence" in found:
        lines["licence"] = found["licence"] or "not stated"
    lines["loadable"] = "yes" if found["loadable"] else "no"
    for name, value in lines.items():
        print(f"{name:<16}{value}")
    for message in found["refused"]:
        print(f"{'refused':<16}{message}")
