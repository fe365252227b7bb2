"""Readers of what a model folder holds: configs, weights in any format, adapters, tokenizers."""

import dataclasses
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import quantised_files
import tiny

from checkpoints_convert import convert
from fuzz import seeds
from fuzz.reader import MAX_LENGTH, Reader, audit
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import model_folder, safetensors, special_tokens


def _families(root: Path) -> None:
    for name, config in seeds.CONFIGS.items():
        seeds.model(root / name, config)


def _open(root: Path) -> None:
    """An architecture of finite numbers, and tensors that can be read to the end."""
    folder = model_folder.open_folder(root, dtype="float32", mask_id=None)
    _finite(folder.family.arch)
    assert folder.max_length >= 1
    for name, tensor in folder.source.tensors.items():
        window = folder.source.window(name, (slice(None),) * len(tensor.shape))
        assert window.shape == tensor.shape
    TextTokenizer.from_folder(root, folder.model.vocab_size)


def _finite(arch: Any) -> None:
    for field in dataclasses.fields(arch):
        value = getattr(arch, field.name)
        if dataclasses.is_dataclass(value):
            _finite(value)
        elif type(value) in (int, float) and field.name != "first_dense":
            assert math.isfinite(value), f"{field.name} is {value}"
            if "theta" in field.name or "eps" in field.name:
                assert value > 0, f"{field.name} is {value}"


def _inspect(root: Path, good: Path) -> list[str]:
    del good
    return ["convert", "inspect", str(root)]


def _convert(root: Path, good: Path) -> list[str]:
    del good
    return ["convert", "to-hf", str(root), str(root.with_name(root.name + "-out")), "--quiet"]


def _audit_model(root: Path, good: Path) -> list[str]:
    command = audit(root / "run", good, good / "texts.jsonl", "--dry-run")
    command[command.index("--target") + 1] = str(root)
    return command


def _shards(root: Path) -> None:
    tiny.folder(root / "whole")
    tiny.folder(root / "shards")
    convert.to_hf(str(root / "whole"), root / "parts", max_shard_bytes=8000, quiet=True)
    for name in ("one", "two"):
        (root / "parts" / f"{name}.safetensors").unlink(missing_ok=True)


def _quantised(root: Path) -> None:
    for method in quantised_files.METHODS:
        folder = tiny.folder(root / method)
        quantised_files.quantise(folder, method)


def _gguf(root: Path) -> None:
    """Files alone, and one with a config that says how it is used."""
    for name, kind in (("llama", "F32"), ("qwen2", "Q8_0"), ("llada", "BF16")):
        config = seeds.CONFIGS[name] | ({} if name == "llada" else {"rope_parameters": None})
        if kind == "Q8_0":  # rows of whole blocks
            config |= {"hidden_size": 32}
        made, kinds = seeds.model(root / f"{name}-made", config), {"token_embd.weight": kind}
        (root / name).mkdir()
        gguf_files.write(root / name / "m.gguf", made, name, kinds=kinds)
        shutil.copy(made / "tokenizer.json", root / name)
        shutil.rmtree(made)
    shutil.copytree(root / "llama", root / "a2d")
    a2d = {**seeds.DECODER, "model_type": "a2d-llama"}
    (root / "a2d" / "config.json").write_text(json.dumps(a2d))
    for name in ("llama", "qwen2"):
        (root / name / "tokenizer.json").unlink()


def _spoil_gguf(draw: random.Random, root: Path) -> None:
    """Other numbers behind a key or a tensor's name."""
    file = next(root.glob("*.gguf"))
    content = bytearray(file.read_bytes())
    names = rb"general\.\w+|tokenizer\.ggml\.\w+|(?:llama|qwen2|llada)\.[\w.]+|blk\.[\w.]+"
    ends = [found.end() for found in re.finditer(names, content)]
    at = draw.choice(ends) + draw.choice([0, 4, 8, 12, 16, 20])
    number = draw.choice([0, 1, 2, 3, 6, 8, 9, 99, 2**16, 2**31, 2**32 - 1, 2**60, 2**64 - 1])
    size = draw.choice([4, 4, 8])
    content[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    file.write_bytes(content)


def _adapters(root: Path) -> None:
    tiny.folder(root / "one" / "base")
    seeds.adapter(root / "one" / "adapter")


def _open_adapter(root: Path) -> None:
    for merge in (False, True):
        folder = model_folder.open_folder(
            root / "base", adapter=root / "adapter", merge=merge, dtype="float32"
        )
        for a, b in folder.adapter.values():
            assert np.isfinite(a).all()
            assert np.isfinite(b).all()


def _audit_adapter(root: Path, good: Path) -> list[str]:
    command = audit(root / "run", good, good / "texts.jsonl", "--dry-run")
    command[1:5] = ["--reference", str(root / "base"), "--adapter", str(root / "adapter")]
    return command


def _orbax(root: Path) -> None:
    tiny.folder(root / "source")
    convert.to_orbax(str(root / "source"), root / "one", quiet=True)
    shutil.rmtree(root / "source")


def _pickles(root: Path) -> None:
    import torch
    from safetensors.torch import load_file

    for name, parts in (("single", 1), ("shards", 2)):
        folder = tiny.folder(root / name)
        tensors = load_file(folder / safetensors.SINGLE)
        (folder / safetensors.SINGLE).unlink()
        if parts == 1:
            torch.save(tensors, folder / "pytorch_model.bin")
            continue
        names = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(tensors)}
        for file in set(names.values()):
            torch.save({n: t for n, t in tensors.items() if names[n] == file}, folder / file)
        index = {"metadata": {}, "weight_map": names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _spoil_pickle(draw: random.Random, root: Path) -> None:
    """Tensors and other things that no weight is."""
    import torch

    file = draw.choice(sorted(root.glob("pytorch_model*.bin")))
    found = torch.load(file, weights_only=True)
    name = draw.choice(list(found))
    dtypes = [torch.int8, torch.int16, torch.uint16, torch.float8_e4m3fn, torch.complex64]
    dtypes += [torch.float16, torch.bfloat16, torch.float64, torch.bool]
    others: list[Any] = [torch.tensor(1.0), torch.zeros(2, 3).to_sparse(), torch.zeros(0), [], "x"]
    others += [torch.zeros(2, device="meta"), None, {"a": torch.zeros(1)}, torch.zeros(2, 3).T]
    others += [found[name].to(dtype) for dtype in dtypes]
    found[draw.choice([name, name, ("a", 1), 3, "\x1b[31m"])] = draw.choice(others)
    torch.save(found if draw.random() < 0.9 else list(found.values()), file)


def _convert_pickles(root: Path) -> None:
    out = root.with_name(root.name + "-out")
    convert.to_hf(str(root), out, allow_pickle=True, quiet=True)


SAMPLES = ["", "karo mite sun", "zz[MASK] é ﬁ 𝔘 \ud800", "a" * 300, "\0\x1b\n\r\u2028", "x" * 10**5]


def _tokenize(root: Path) -> None:
    """Ids have rows, and equal texts equal ids."""
    made = TextTokenizer.from_folder(root, tiny.VOCAB)
    special_tokens.tokenizer_mask(root)
    first, again = (made.encode(SAMPLES, MAX_LENGTH) for _ in range(2))
    for a, b in zip(first, again):
        assert np.array_equal(a.ids, b.ids), "ids differ from call to call"
        assert len(a.ids) == len(a.special) <= MAX_LENGTH
        assert ((a.ids >= 0) & (a.ids < tiny.VOCAB)).all(), "an id without a row"


def _inspect_tokenizer(root: Path, good: Path) -> list[str]:
    for name in ("config.json", safetensors.SINGLE):
        shutil.copyfile(good / "target" / name, root / name)
    return _audit_model(root, good)


READERS = {
    "config": Reader(_families, ("config.json",), _open, _inspect),
    "safetensors": Reader(_shards, ("*.safetensors", "*.index.json"), _open, _audit_model),
    "quantised": Reader(_quantised, ("*.safetensors", "config.json"), _open, _audit_model),
    "gguf": Reader(_gguf, ("*",), _open, _convert, extra=_spoil_gguf),
    "adapter": Reader(_adapters, ("adapter/*",), _open_adapter, _audit_adapter),
    "orbax": Reader(_orbax, ("conversion.json", "orbax/**/*", "config.json"), _open, _audit_model),
    "pickle": Reader(_pickles, ("pytorch*",), _convert_pickles, extra=_spoil_pickle),
    "tokenizer": Reader(seeds.tokenizers, ("*.json", "*.txt"), _tokenize, _inspect_tokenizer),
}
