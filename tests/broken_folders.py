"""Spoils model folders in every way that a command has to refuse; used by several tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def drop(path: Path) -> None:
    path.unlink()


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def config_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def index_names_nothing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')


def large_tokenizer(folder: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save(str(folder / "tokenizer.json"))


MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (no_folder, ["no such folder", "config.json"]),
    "a file": (file_for_folder, ["no such folder"]),
    "no config": (lambda f: drop(f / "config.json"), ["has no config.json"]),
    "config is a folder": (config_is_a_folder, ["has no config.json"]),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), ["not readable as JSON"]),
    "config is binary": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        ["not readable"],
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ["expected a JSON object"],
    ),
    "unknown family": (lambda f: edit_config(f, model_type="lada"), ["'lada'", "'llada'"]),
    "no family": (lambda f: edit_config(f, model_type=None), ["model_type is None"]),
    "other architecture": (
        lambda f: edit_config(f, architectures=["OLMoModelLM"]),
        ["OLMoModelLM", "LLaDAModelLM"],
    ),
    "mask id": (lambda f: edit_config(f, mask_token_id=300), ["300", "--mask-id"]),
    "no mask id": (lambda f: edit_config(f, mask_token_id=50256), ["50256", "--mask-id"]),
    "heads": (lambda f: edit_config(f, n_heads=3), ["n_heads 3"]),
    "a size that is a word": (lambda f: edit_config(f, d_model="wide"), ["d_model is 'wide'"]),
    "no weights": (lambda f: drop(f / WEIGHTS), [WEIGHTS, "found neither"]),
    "pickled weights": (pickled, ["pickled", "safetensors"]),
    "a shard is missing": (index_names_nothing, ["b.safetensors", "missing"]),
    "truncated weights": (lambda f: cut(f / WEIGHTS, 0.5), [WEIGHTS, "not a complete safetensors"]),
    "truncated header": (lambda f: cut(f / WEIGHTS, 0.01), [WEIGHTS, "not a complete safetensors"]),
    "empty weights": (lambda f: cut(f / WEIGHTS, 0), [WEIGHTS, "not a complete safetensors"]),
    "no tokenizer": (lambda f: drop(f / "tokenizer.json"), ["no usable tokenizer"]),
    "truncated tokenizer": (lambda f: cut(f / "tokenizer.json", 0.5), ["tokenizer.json: not"]),
    "large tokenizer": (large_tokenizer, ["largest id", "300 rows"]),
}
