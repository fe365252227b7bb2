"""The converter's commands: exact round trips, every byte read once, refusals, interruptions."""

import functools
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_folders
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_dit
import oracle_llama
import oracle_moe
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints_convert import __main__ as program
from checkpoints_convert import convert
from sama_jax.cli import entry
from sama_jax.devices.mesh import make_mesh
from sama_jax.devices.sharding import split_sharding
from sama_jax.devices.strategy import local_layout
from sama_jax.errors import ModelError
from sama_jax.storage import files
from sama_jax.weights import (
    loading,
    model_folder,
    orbax_source,
    placing,
    safetensors,
    stored_bytes,
    tensor_map,
)
from sama_jax.weights.hub import resolve
from sama_jax.weights.source import Source

ROOT = Path(__file__).parents[2]
ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
LLADA: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48}


def run(*command: str | Path) -> int:
    """The command line inside this process."""
    try:
        return program.main([str(word) for word in command])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of all weight files, read by the safetensors library and PyTorch."""
    parts = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    return {name: tensor for part in parts for name, tensor in part.items()}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def assert_same_parameters(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# --- families ------------------------------------------------------------------------------------


def save_module(module: Any, path: Path, seed: int) -> None:
    """A transformers model with random parameters, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(path)


_WORDS: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
_LAYERS: dict[str, Any] = {**_WORDS, "num_hidden_layers": 3, "intermediate_size": 48}
_SPECIAL = ("pad", "bos", "eos", "cls", "sep")
_IDS: dict[str, Any] = {f"{name}_token_id": i for i, name in enumerate(_SPECIAL)}
TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_LAYERS)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_LAYERS)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**_LAYERS, **_IDS)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_LAYERS, num_key_value_heads=2)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_LAYERS, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_LAYERS, num_key_value_heads=2)
    ),
}
SMDM: dict[str, Any] = {
    **{"model_type": "smdm", "n_layer": 3, "n_head": 4, "n_query_groups": 2, "n_embd": 32},
    **{"intermediate_size": 48, "vocab_size": 63},
}


def save_smdm(path: Path) -> None:
    """Q, K and V of each key/value head in one matrix."""
    module = oracle_llama.Smdm({**SMDM, "norm_eps": 1e-5})
    oracle_llama.randomise(module, False, 0)
    oracle.write_folder(path, SMDM, dict(module.state_dict()), shards=2)


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "llada": lambda p: oracle.random_folder(p, oracle.config(**LLADA), 0),
    "llada_bfloat16_shards": lambda p: oracle.random_folder(
        p, oracle.config(**LLADA), 0, shards=3, dtype=torch.bfloat16
    ),
    "llada_everything": lambda p: oracle.random_folder(
        p,
        oracle.config(
            **LLADA, include_bias=True, bias_for_layer_norm=None, attention_layer_norm=True
        ),
        0,
        shards=2,
    ),
    "smdm": save_smdm,
    "mdlm": lambda p: oracle_dit.random_folder(p, oracle_dit.mdlm_config(), 0, shards=2),
    "bd3lm": lambda p: oracle_dit.random_folder(
        p, oracle_dit.bd3lm_config(adaln=False), 0, shards=2
    ),
    "llada_moe_bfloat16": lambda p: oracle_moe.random_folder(
        p, oracle_moe.llada_moe_config(num_experts=4), 0, shards=3, dtype=torch.bfloat16
    ),
    "llada2_bfloat16": lambda p: oracle_moe.random_folder(
        p, oracle_moe.llada2_config(), 0, shards=3, dtype=torch.bfloat16
    ),
    **{name: lambda p, make=make: save_module(make(), p, 0) for name, make in TRANSFORMERS.items()},
}
MESHES = {"one device": None, "split": "model=8", "split and copied": "data=4,model=2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Path]:
    """Folders of `FOLDERS`, each written once."""
    base = tmp_path_factory.mktemp("folders")

    def get(name: str) -> Path:
        if not (base / name).exists():
            FOLDERS[name](base / name)
        return base / name

    return get


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """Tensor name -> bytes of it that were read from safetensors."""
    found: Counter[str] = Counter()
    original = Source.window

    def window(self, name, index):
        values = original(self, name, index)
        found[name] += values.nbytes
        return values

    monkeypatch.setattr(Source, "window", window)
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_a_round_trip_through_orbax_keeps_every_byte(name, made, reads, tmp_path):
    source, mesh = made(name), list(MESHES.values())[list(FOLDERS).index(name) % len(MESHES)]
    tensors = convert_source(source).tensors
    everything = read_tensors(source)
    stored = {t.name: everything[t.name] for t in tensors.values()}  # without rotary frequencies
    reads.clear()
    done = convert.to_orbax(source, tmp_path / "orbax", mesh=mesh, quiet=True)
    sizes = {name: stored[t.name].nbytes for name, t in tensors.items()}
    assert dict(reads) == sizes
    assert done.bytes_read == sum(sizes.values())
    run("to-hf", tmp_path / "orbax", tmp_path / "hf", "--max-shard", "20KB", "--quiet")
    assert_same_tensors(read_tensors(tmp_path / "hf"), stored)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == config
    if name in TRANSFORMERS:
        module = type(TRANSFORMERS[name]()).from_pretrained(tmp_path / "hf")
        original = type(module).from_pretrained(source)
        assert_same_tensors(module.state_dict(), original.state_dict())


def convert_source(path: Path) -> Source:
    return model_folder.open_folder(path, mask_id=0, dtype="float32").source


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("name", ["llada_bfloat16_shards", "llada2_bfloat16", "mdlm"])
def test_sharded_loading_reads_each_byte_once(name, mesh, made, reads, monkeypatch):
    """In slabs smaller than a tensor, too; and the values are those of one plain read."""
    folder = model_folder.open_folder(made(name), mask_id=0, dtype="bfloat16")
    expected = loading.load(folder, ONE_DEVICE)
    reads.clear()
    monkeypatch.setattr(placing, "SLAB", 500)
    grid = make_mesh(mesh) if mesh else None
    loaded = loading.read_params(
        folder,
        lambda _, x: (jnp.bfloat16, split_sharding(grid, x.shape) if grid else ONE_DEVICE),
    )
    assert_same_parameters(loaded, expected)
    assert reads == {
        n: np.dtype(t.dtype).itemsize * int(np.prod(t.shape))
        for n, t in folder.source.tensors.items()
    }
    if mesh == "model=8":
        largest = max(jax.tree.leaves(loaded), key=lambda x: x.nbytes)
        assert largest.addressable_shards[0].data.nbytes * 8 == largest.nbytes


def test_replicated_leaves_are_read_once_for_all_devices(made, reads):
    folder = model_folder.open_folder(made("llada"), dtype="float32")
    everywhere = local_layout().shardings
    params = loading.load(folder, everywhere)
    assert len(params["embed"]["embedding"].addressable_shards) == 8
    assert sum(reads.values()) == 4 * folder.num_params


def test_bfloat16_stays_bfloat16_while_it_is_read(made, monkeypatch):
    """Nothing wider is allocated on the way, neither a slab nor a leaf."""
    seen = set()
    original = placing.copy_values
    monkeypatch.setattr(
        placing, "copy_values", lambda out, v: (seen.update((out.dtype, v.dtype)), original(out, v))
    )
    folder = model_folder.open_folder(made("llada_bfloat16_shards"), dtype="bfloat16")
    loading.load(folder, ONE_DEVICE)
    assert seen == {jnp.dtype("bfloat16")}


def test_what_was_read_into_is_the_array_itself(made, monkeypatch):
    """On a CPU, so that a leaf is in memory once: JAX copies what is not aligned."""
    starts = []
    original = placing.aligned_empty

    def record(*args: Any) -> np.ndarray:
        starts.append((made := original(*args)).ctypes.data)
        return made

    monkeypatch.setattr(placing, "aligned_empty", record)
    folder = model_folder.open_folder(made("llada_bfloat16_shards"), dtype="bfloat16")
    leaves = jax.tree.leaves(loading.load(folder, ONE_DEVICE))
    assert [leaf.unsafe_buffer_pointer() for leaf in leaves] == starts


def test_folders_are_converted_directly_bit_for_bit(made, tmp_path):
    source = made("llada_bfloat16_shards")
    assert run("to-hf", source, tmp_path / "out", "--quiet") == 0
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(source))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_mixed_dtypes_are_kept(tmp_path):
    """Norms in float32 among bfloat16, as some trainers save them."""
    config = oracle.config(**LLADA)
    tensors = {
        name: t if "norm" in name else t.bfloat16()
        for name, t in oracle.random_module(config, 0).state_dict().items()
    }
    oracle.write_folder(tmp_path / "source", config, tensors, shards=3)
    convert.to_orbax(tmp_path / "source", tmp_path / "orbax", quiet=True)
    convert.to_hf(tmp_path / "orbax", tmp_path / "hf", quiet=True)
    assert_same_tensors(read_tensors(tmp_path / "hf"), tensors)


def test_dtype_rounds_once_and_is_recorded(made, tmp_path):
    source = made("llada")
    wanted = {name: t.bfloat16() for name, t in read_tensors(source).items()}
    for kind in ("to-hf", "to-orbax"):
        assert run(kind, source, tmp_path / kind, "--dtype", "bfloat16", "--quiet") == 0
        assert (
            json.loads((tmp_path / kind / "config.json").read_text())["torch_dtype"] == "bfloat16"
        )
    assert_same_tensors(read_tensors(tmp_path / "to-hf"), wanted)
    convert.to_hf(tmp_path / "to-orbax", tmp_path / "again", quiet=True)
    assert_same_tensors(read_tensors(tmp_path / "again"), wanted)


def test_float64_needs_a_dtype(tmp_path, capsys):
    config = oracle.config(**LLADA)
    tensors = {n: t.double() for n, t in oracle.random_module(config, 0).state_dict().items()}
    oracle.write_folder(tmp_path / "source", config, tensors)
    assert run("to-orbax", tmp_path / "source", tmp_path / "orbax") == 2
    assert "float64" in capsys.readouterr().err
    assert not (tmp_path / "orbax").exists()
    assert run("to-orbax", tmp_path / "source", tmp_path / "orbax", "--dtype", "float32") == 0
    assert run("to-hf", tmp_path / "source", tmp_path / "hf") == 0
    assert_same_tensors(read_tensors(tmp_path / "hf"), tensors)


# --- an Orbax folder is a model ------------------------------------------------------------------


def test_an_orbax_folder_loads_onto_any_mesh_in_any_dtype(made, tmp_path):
    source = made("llada_bfloat16_shards")
    convert.to_orbax(source, tmp_path / "orbax", mesh="data=2,model=4", quiet=True)
    grid = make_mesh("model=8")

    def load(folder: model_folder.ModelFolder, told: list[int]) -> Any:
        def place(_: str, leaf: Any) -> Any:
            return folder.model.dtype, split_sharding(grid, leaf.shape)

        return loading.read_params(folder, place, told.append)

    for dtype in ("float32", "bfloat16"):
        plain = model_folder.open_folder(source, dtype=dtype)
        kept = model_folder.open_folder(tmp_path / "orbax", dtype=dtype)
        told: list[int] = []
        loaded = load(kept, told)
        assert_same_parameters(loaded, loading.load(plain, ONE_DEVICE))
        assert sum(told) == sum(x.nbytes for x in jax.tree.leaves(loaded))


def test_buffers_of_an_orbax_folder_keep_their_dtype(made, tmp_path):
    """The bias that balances experts stays float32 among bfloat16."""
    convert.to_orbax(made("llada2_bfloat16"), tmp_path / "orbax", quiet=True)
    plain, kept = (
        loading.load(model_folder.open_folder(path, dtype="bfloat16"), ONE_DEVICE)
        for path in (made("llada2_bfloat16"), tmp_path / "orbax")
    )
    assert_same_parameters(kept, plain)
    assert {str(x.dtype) for x in jax.tree.leaves(kept)} == {"float32", "bfloat16"}


def test_an_orbax_folder_is_known_by_its_own_bytes(made, tmp_path):
    source = made("llada")
    for dtype in ("keep", "bfloat16"):
        convert.to_orbax(source, tmp_path / dtype, dtype=dtype, quiet=True)
    shutil.copytree(tmp_path / "keep", tmp_path / "copy")
    names = {
        p.name: model_folder.open_folder(p).identity
        for p in (source, *(tmp_path / d for d in ("keep", "bfloat16", "copy")))
    }
    assert names["copy"] == names["keep"]
    assert len(set(names.values())) == 3
    broken_folders.edit_config(tmp_path / "keep", rope_theta=3.0)
    assert model_folder.open_folder(tmp_path / "keep").identity not in names.values()


def record_again(out: Path) -> None:
    """Makes the record fit whatever lies in `orbax/` now."""
    files = orbax_source.files_below(out / "orbax")
    record = json.loads((out / "conversion.json").read_text())
    record |= {"sizes": {n: f.stat().st_size for n, f in files}}
    (out / "conversion.json").write_text(
        json.dumps(record | {"digest": stored_bytes.digest(files)})
    )


def flip(out: Path) -> None:
    """Flips bytes of the largest file: Orbax loads them without a word."""
    file = max(orbax_source.files_below(out / "orbax"), key=lambda f: f[1].stat().st_size)[1]
    content = bytearray(file.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 50)
    content[middle] = bytes(b ^ 1 for b in content[middle])
    file.write_bytes(content)


def test_flipped_bytes_are_refused_before_they_are_loaded(source, tmp_path):
    out = tmp_path / "out"
    convert.to_orbax(source, out, quiet=True)
    before = model_folder.open_folder(out).identity
    flip(out)
    folder = model_folder.open_folder(out)
    for use in (lambda: folder.identity, lambda: loading.load(folder, ONE_DEVICE)):
        with pytest.raises(ModelError, match="is damaged: its bytes are not those that"):
            use()
    assert run("to-hf", out, tmp_path / "hf") == 4
    record_again(out)  # whoever does this on purpose has another model
    assert model_folder.open_folder(out).identity != before


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (lambda f: (f / "conversion.json").unlink(), "no conversion.json"),
        (lambda f: (f / "conversion.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "conversion.json").write_text("[" * 10**5), "nested too deep"),
        (lambda f: (f / "conversion.json").write_text("{}"), "does not say which bytes"),
        (lambda f: (f / "orbax" / "more").write_text("x"), "1 files of its Orbax checkpoint"),
    ],
)
def test_an_orbax_folder_without_its_record_is_refused(source, tmp_path, spoil, fragment):
    out = tmp_path / "out"
    convert.to_orbax(source, out, quiet=True)
    spoil(out)
    with pytest.raises(ModelError, match=fragment):
        model_folder.open_folder(out)


def test_audit_reads_an_orbax_folder(source, tmp_path, capsys):
    """As target, with the folder it was made from as reference."""
    texts = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(4, (8, 20)))
    convert.to_orbax(source, tmp_path / "orbax", quiet=True)
    flags = ["--target", tmp_path / "orbax", "--reference", source, "--data", texts]
    assert entry.main(["audit", *map(str, flags), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "4 texts" in capsys.readouterr().err


# --- output folders ------------------------------------------------------------------------------


def tiny_folder(path: Path, seed: int = 0) -> Path:
    """As `tiny.folder`, without a network to compile: two layers and a tokenizer."""
    oracle.random_folder(path, oracle.config(**tiny.config(n_layers=2)), seed)
    tiny.tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "source")


@pytest.fixture
def source(original, tmp_path) -> Path:
    """A tiny folder with a tokenizer."""
    return shutil.copytree(original, tmp_path / "source")


class Killed(BaseException):
    """Nothing of the program's own may catch it."""


def half_finished(source: Path, out: Path, command: str) -> None:
    """Leaves what a process leaves that is killed while it writes."""
    original = safetensors.write_file

    def stop(*_: Any) -> None:
        raise Killed

    def write_one(path: Path, *more: Any) -> None:
        (stop if "2-of" in path.name else original)(path, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "finish", stop)
        patch.setattr(safetensors, "write_file", write_one)
        to_hf = functools.partial(convert.to_hf, max_shard_bytes=9000)
        convert_it = to_hf if command == "to-hf" else convert.to_orbax
        with pytest.raises(Killed):
            convert_it(source, out, quiet=True)


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_a_half_finished_conversion_is_refused_and_done_again(command, source, tmp_path, capsys):
    out = tmp_path / "out"
    half_finished(source, out, command)
    assert not (out / "config.json").exists()
    assert len(list(out.iterdir())) > 1
    before = contents(out)
    for use in (
        ["to-hf", out, tmp_path / "x"],
        ["to-orbax", out, tmp_path / "x"],
        ["inspect", out],
    ):
        assert run(*use) == 4
        said = capsys.readouterr()
        assert (said.err + said.out).count("a conversion that did not finish") == 1
    with pytest.raises(ModelError, match="did not finish"):
        model_folder.open_folder(out)
    assert contents(out) == before
    assert not (tmp_path / "x").exists()
    # The other command, another source: starts over, too, and leaves nothing of the old one.
    assert run("to-hf", source, out, "--quiet") == 0
    assert_same_tensors(read_tensors(out), read_tensors(source))
    names = {"config.json", "conversion.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in out.iterdir()} == names


def test_an_unfinished_conversion_with_other_files_is_left_alone(source, tmp_path, capsys):
    half_finished(source, tmp_path / "out", "to-hf")
    for name in ("thesis.tex", "thesis.part", "orbax.backup"):
        (tmp_path / "out" / name).write_text("years of work")
        assert run("to-hf", source, tmp_path / "out") == 2
        assert name in capsys.readouterr().err
        assert (tmp_path / "out" / name).exists()
        (tmp_path / "out" / name).unlink()


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_output_that_holds_something_else_is_refused(command, source, tmp_path, capsys):
    other = tiny_folder(tmp_path / "other", seed=5)
    convert.to_hf(other, tmp_path / "converted", quiet=True)
    (tmp_path / "file").write_text("")
    for out, complaint in [
        (other, "holds no conversion"),
        (source, "holds no conversion"),
        (tmp_path / "converted", "holds another conversion"),
        (tmp_path / "file", "is a file"),
    ]:
        before = contents(tmp_path)
        assert run(command, source, out) == 2
        said = capsys.readouterr()
        assert complaint in said.err
        assert said.err.count("\n") == 1
        assert contents(tmp_path) == before
    assert run(command, source, tmp_path / "file" / "below") == 74
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_a_finished_conversion_is_not_done_again(command, source, tmp_path, capsys):
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    assert run(command, source, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert run(command, source, tmp_path / "out") == 0
    assert "finished before" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert run(command, source, tmp_path / "out", "--dtype", "bfloat16") == 2


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_two_conversions_into_one_folder_are_refused(command, source, tmp_path, capsys):
    half_finished(source, tmp_path / "out", command)
    before = contents(tmp_path / "out")
    with files.only_writer(tmp_path / "out"):
        assert run(command, source, tmp_path / "out") == 2
    assert "another process is writing to it" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert run(command, source, tmp_path / "out", "--quiet") == 0


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_a_mask_token_that_replaces_the_configs_is_kept(command, source, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(command, source, out, "--mask-id", "17", "--quiet") == 0
    assert model_folder.open_folder(out).model.mask_id == 17
    assert run(command, source, out, "--mask-id", "17", "--quiet") == 0
    assert run(command, source, out, "--mask-id", "18", "--quiet") == 2
    assert "mask_id was 17, is 18" in capsys.readouterr().err


def changed_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def flip_weights(folder: Path) -> None:
    file = max(folder.rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("source", lambda folder: changed_config(folder, mask_token_id=5)),
        ("source", lambda folder: changed_config(folder, pad_token_id=7)),
        ("source", lambda folder: (folder / "generation_config.json").write_text("{}")),
        ("out", lambda folder: changed_config(folder, mask_token_id=5)),
        ("out", lambda folder: (folder / "tokenizer.json").unlink()),
        ("out", flip_weights),
    ],
)
@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_a_finished_conversion_of_what_has_changed_is_no_success(
    command: str, where: str, change: Any, source: Path, tmp_path: Path, capsys
):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(source, copy)
    assert run(command, copy, out) == 0
    change({"source": copy, "out": out}[where])
    before = contents(out)
    capsys.readouterr()
    assert run(command, copy, out) == 2
    said = capsys.readouterr().err
    assert "holds another conversion" in said or "no longer those that the conversion" in said
    assert contents(out) == before


def test_memory_and_time_are_told_beforehand(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "read_params", lambda *_: sys.exit(9))
    assert run("to-orbax", source, tmp_path / "out") == 9
    first = capsys.readouterr().err.splitlines()[0]
    params = model_folder.open_folder(source).num_params
    for part in (f"{params:,} parameters", "host memory up to about", "GB available", "about 1 s"):
        assert part in first


def test_a_full_disk(source, tmp_path, monkeypatch, capsys):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.v1.save", full)
    assert run("to-orbax", source, tmp_path / "o", "--quiet") == 74
    monkeypatch.setattr(safetensors, "write_file", full)
    assert run("to-hf", source, tmp_path / "h", "--quiet") == 74
    said = capsys.readouterr().err
    assert said.count("No space left on device") == said.count("\n") == 2
    with pytest.raises(ModelError, match="did not finish"):
        model_folder.open_folder(tmp_path / "o")


# --- refusals ------------------------------------------------------------------------------------


def twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = max(tensors)
    tensors["module." + name] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors")


def untied(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.transformer.wte.weight"].clone()
    head[3, 3] += 1
    save_file({**tensors, "model.transformer.ff_out.weight": head}, folder / "model.safetensors")


def shard_left_out(folder: Path) -> None:
    """The index leaves one of the files out."""
    oracle.random_folder(folder, json.loads((folder / "config.json").read_text()) | _FULL, 0, 3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    kept = {n: f for n, f in index["weight_map"].items() if "00002" not in f}
    path.write_text(json.dumps({**index, "weight_map": kept}))
    (folder / "model.safetensors").unlink()


_FULL = oracle.config(d_model=16, n_heads=2, n_kv_heads=2, mlp_hidden_size=32, weight_tying=True)
REFUSALS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    **broken_folders.MODELS,
    "a tensor twice": (twice, ["the same tensor twice", "module.model"]),
    "untied": (untied, ["1 tensors do not fit", "the head is tied, but differs"]),
    "a shard is not in the index": (
        shard_left_out,
        ["tensors do not fit", "does not list model-", "missing    transformer.ln_f.weight"],
    ),
    "an empty Orbax folder": (lambda f: (f / "orbax").mkdir(), ["no conversion.json"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_audit_refuses_is_refused(case, source, tmp_path, capsys):
    spoil, fragments = REFUSALS[case]
    spoil(source)
    before = contents(tmp_path)
    capsys.readouterr()
    commands = [] if case == "no tokenizer" else [["to-hf", source, tmp_path / "out"]]
    for command in [*commands, *([["to-orbax", *c[1:]] for c in commands])]:
        assert run(*command) == 4
        said = capsys.readouterr()
        first, *rest = said.err.splitlines()
        assert first.startswith(f"checkpoints_convert: {source}")
        assert all(line.startswith("  ") for line in rest)  # only a list of tensors
        for fragment in fragments:
            assert fragment in said.err
        assert said.out == ""
    assert contents(tmp_path) == before
    assert run("inspect", source, "--json") == 4
    found = json.loads(capsys.readouterr().out)
    assert found["loadable"] is False
    for fragment in fragments:
        assert fragment in found["refused"][0]


def test_weights_without_a_tokenizer_are_converted(made, tmp_path):
    """Some families are published so; inspect and audit say what is missing."""
    assert run("to-orbax", made("mdlm"), tmp_path / "out", "--quiet") == 0
    assert run("inspect", tmp_path / "out") == 4


def test_a_damaged_checkpoint_is_refused_file_by_file(source, tmp_path, capsys):
    out = tmp_path / "out"
    convert.to_orbax(source, out, quiet=True)
    cut, gone = sorted(p for p in out.rglob("*") if p.is_file() and "ocdbt" in p.name)[:2]
    os.truncate(cut, 3)
    gone.unlink()
    assert run("to-hf", out, tmp_path / "x") == 4
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"checkpoints_convert: {out / 'orbax'}: 2 files of its Orbax checkpoint"
    )
    assert sorted(line.split(": expected")[0].strip() for line in rest) == sorted(
        str(p.relative_to(out / "orbax")) for p in (cut, gone)
    )
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_that_orbax_cannot_read_is_one_line(source, tmp_path):
    """In a process of its own: nothing of Orbax's log may reach the terminal."""
    out = tmp_path / "out"
    convert.to_orbax(source, out, quiet=True)
    (out / "orbax" / "state" / "manifest.ocdbt").unlink()
    record_again(out)
    command = [sys.executable, "-m", "checkpoints_convert", "inspect", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4
    assert "absl" not in done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"refused         {out / 'orbax'}: not a complete Orbax checkpoint")


def test_a_checkpoint_of_another_architecture_lists_every_parameter(source, tmp_path):
    out = tmp_path / "out"
    convert.to_orbax(source, out, quiet=True)
    broken_folders.edit_config(out, mlp_hidden_size=16, weight_tying=False)
    with pytest.raises(ModelError, match="7 parameters do not fit") as caught:
        model_folder.open_folder(out)
    assert "  shape      blocks/mlp/up_proj/kernel: expected [1, 16, 16], found [1, 16, 32]" in str(
        caught.value
    )
    assert "  missing    lm_head/kernel [16, 300]" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["to-hf", "SRC", "OUT", "--max-shard", "much"], "expected a size such as 5GB"),
        (["to-hf", "SRC", "OUT", "--max-shard", "0GB"], "expected a size such as 5GB"),
        (["to-hf", "SRC", "OUT", "--dtype", "int8"], "invalid choice"),
        (["to-orbax", "SRC", "OUT", "--mesh", "model=3"], "needs 3 devices, there are 8"),
        (["to-orbax", "SRC", "OUT", "--mesh", "rows=8"], "expected data=N,model=M"),
        (["to-orbax", "SRC"], "required: OUT"),
        (["to-torch", "SRC", "OUT"], "invalid choice"),
    ],
)
def test_usage_errors(words, fragment, source, tmp_path, capsys):
    places = {"SRC": source, "OUT": tmp_path / "out"}
    assert run(*(places.get(word, word) for word in words)) == 2
    said = capsys.readouterr()
    assert fragment in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- pickles -------------------------------------------------------------------------------------


class _Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def pickle_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    files: dict[str, dict[str, torch.Tensor]] = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        files.setdefault(f"pytorch_model-{i % shards}.bin", {})[name] = tensor
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    for file, part in files.items():
        torch.save(part, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("command", ["to-hf", "to-orbax"])
@pytest.mark.parametrize(("shards", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_pickles_are_read_on_request_only(command, shards, dtype, tmp_path, capsys):
    config, folder = oracle.config(**LLADA), tmp_path / "source"
    tensors = {n: t.to(dtype) for n, t in oracle.random_module(config, 0).state_dict().items()}
    oracle.write_folder(folder, config, {})
    (folder / "model.safetensors").unlink()
    pickle_weights(folder, tensors, shards)
    assert run(command, folder, tmp_path / "out") == 4
    assert "to-hf SRC OUT --allow-pickle" in capsys.readouterr().err
    assert run(command, folder, tmp_path / "out", "--allow-pickle", "--quiet") == 0
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
    convert.to_hf(tmp_path / "out", tmp_path / "again", quiet=True)
    pickle_weights(folder, dict(list(tensors.items())[1:]), shards)
    capsys.readouterr()
    assert run(command, folder, tmp_path / "broken", "--allow-pickle") == 4
    assert capsys.readouterr().err.startswith(f"checkpoints_convert: {folder}: 1 tensors")
    assert not (tmp_path / "broken").exists()
    assert_same_tensors(read_tensors(tmp_path / "again"), tensors)


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    folder, marker = tmp_path / "source", tmp_path / "unpickled"
    oracle.write_folder(folder, oracle.config(**LLADA), {})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": _Bomb(marker)}))
    assert run("to-hf", folder, tmp_path / "out", "--allow-pickle") == 4
    said = capsys.readouterr().err
    assert "weights-only loading" in said
    assert said.count("\n") == 1
    assert not marker.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to(torch.float8_e4m3fn),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        "text",
    ],
    ids=["complex", "float8", "sparse", "meta", "str"],
)
def test_what_is_no_plain_tensor_in_a_pickle_is_named(tmp_path, capsys, odd):
    folder = tmp_path / "source"
    oracle.write_folder(folder, oracle.config(**LLADA), {})
    (folder / "model.safetensors").unlink()
    for name in ("\x1b[31m", ("a", 1)):
        torch.save({name: odd}, folder / "pytorch_model.bin")
        assert run("to-hf", folder, tmp_path / "out", "--allow-pickle") == 4
        said = capsys.readouterr().err
        assert "1 entries are no plain tensors" in said or "weights-only loading" in said
        assert said.count("\n") == 1
        assert "\x1b" not in said


def test_small_integers_and_numbers_in_a_pickle_are_read(tmp_path, capsys):
    """And then refused as what they are: tensors that do not belong to the model."""
    folder = tmp_path / "source"
    oracle.write_folder(folder, oracle.config(**LLADA), {})
    (folder / "model.safetensors").unlink()
    kinds = (torch.int8, torch.int16, torch.uint16, torch.bool, torch.float64)
    odd = {f"odd.{i}": torch.zeros(2, dtype=kind) for i, kind in enumerate(kinds)}
    torch.save({**odd, "number": torch.tensor(1.0)}, folder / "pytorch_model.bin")
    assert run("to-hf", folder, tmp_path / "out", "--allow-pickle") == 4
    said = capsys.readouterr().err
    assert "unexpected odd.1 [2]" in said
    assert "unexpected number []" in said


def test_pickles_are_rewritten_in_a_folder_of_their_own(tmp_path, capsys, monkeypatch):
    """What lies beside OUT is the user's, whatever its name; OUT may be the current folder."""
    config, folder = oracle.config(**LLADA), tmp_path / "source"
    oracle.write_folder(folder, config, {})
    (folder / "model.safetensors").unlink()
    pickle_weights(folder, dict(oracle.random_module(config, 0).state_dict()), 1)
    out, mine = tmp_path / "out", tmp_path / "out.unpickled"
    for path in (out, mine):
        path.mkdir()
        (path / "precious.txt").write_text("mine")
    assert run("to-hf", folder, out, "--allow-pickle", "--quiet") == 2
    monkeypatch.chdir(out)
    assert run("to-hf", folder, Path("."), "--allow-pickle", "--quiet") == 2
    (out / "precious.txt").unlink()
    assert run("to-hf", folder, Path("."), "--allow-pickle", "--quiet") == 0
    assert model_folder.open_folder(out)
    assert (mine / "precious.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "out.unpickled"}


@pytest.mark.parametrize("command", ["to-hf", "to-orbax"])
def test_a_link_that_leads_out_is_not_copied_and_is_named(command, source, tmp_path, capsys):
    (tmp_path / "id_rsa").write_text("PRIVATE")
    (source / "notes.txt").symlink_to(tmp_path / "id_rsa")
    assert run(command, source, tmp_path / "out") == 0
    assert "note: notes.txt is not copied" in capsys.readouterr().err
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


# --- names ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(original, tmp_path, monkeypatch) -> Path:
    """An offline Hub whose cache holds `someone/tiny` at `main` and at `v1`."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(original, snapshot)
    for name in ("main", "v1"):
        ref = cache / "models--someone--tiny" / "refs" / name
        ref.parent.mkdir(exist_ok=True)
        ref.write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.mark.parametrize("name", ["someone/tiny", "someone/tiny@v1", "someone/tiny@" + "a" * 40])
def test_a_hub_id_that_was_downloaded_before_works_offline(name, hub, tmp_path):
    assert resolve(name) == hub
    assert model_folder.open_folder(Path(name)).identity == model_folder.open_folder(hub).identity
    assert run("to-hf", name, tmp_path / "out", "--quiet") == 0


@pytest.mark.parametrize("name", ["someone/other", "someone/tiny@v2"])
def test_a_hub_id_that_is_not_available_is_one_line(name, hub, capsys):
    assert run("inspect", name) == 4
    said = capsys.readouterr().out
    assert f"{name}: no such folder here, and not available from the Hub" in said
    with pytest.raises(ModelError, match="not available from the Hub") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_path_wins_over_the_hub(hub, tmp_path):
    own = Path("someone/tiny")
    own.mkdir(parents=True)
    assert resolve("someone/tiny") == own
    # A first part that is a folder here is a path, whatever is missing below it.
    assert resolve("someone/other") == Path("someone/other")


def test_code_and_pickles_are_not_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name@main") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("owner/name", "main")
    files = [
        "model-1-of-2.safetensors",
        "config.json",
        "tokenizer.json",
        "modeling.py",
        "w.bin",
        "w.pt",
        "merges.txt",
    ]
    got = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["patterns"]))
    assert got == [f for f in files if not f.endswith((".py", ".bin", ".pt"))]


def test_pickles_of_a_hub_id_are_downloaded_on_request_only(monkeypatch, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    oracle.write_folder(there, oracle.config(**LLADA), {})
    (there / "model.safetensors").unlink()
    tensors = dict(oracle.random_module(oracle.config(**LLADA), 0).state_dict())
    pickle_weights(there, tensors, 2)

    def snapshot_download(repo, revision, allow_patterns):
        for file in there.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, here)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert run("to-hf", "owner/name", tmp_path / "out") == 4
    assert not list(here.glob("*.bin"))
    assert run("to-hf", "owner/name", tmp_path / "out", "--allow-pickle", "--quiet") == 0
    assert_same_tensors(read_tensors(tmp_path / "out"), tensors)


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_says_what_a_folder_holds(made, source, tmp_path, capsys):
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: 'x-1'\n---\nlicense: no\n"
    )
    convert.to_orbax(source, tmp_path / "orbax", dtype="bfloat16", quiet=True)
    for path in (source, tmp_path / "orbax"):
        assert run("inspect", path, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        num = sum(t.numel() for t in read_tensors(source).values())
        expected = {
            "loadable": True,
            "refused": [],
            "family": "llada",
            "kind": "diffusion",
            "mask_id": tiny.MASK_ID,
            "shift": False,
            "max_length": 512,
            "parameters": num,
            "stored_dtypes": {"float32" if path == source else "bfloat16": 20},
            "bfloat16_bytes": 2 * num,
            "float32_bytes": 4 * num,
            "licence": "other, x-1",
        }
        assert {name: found[name] for name in expected} == expected
        assert found["architecture"]["num_layers"] == 2
    assert found["converted_from"] == str(source)
    assert run("inspect", source) == 0
    assert f"parameters      {num:,}\n" in capsys.readouterr().out
    (source / "README.md").unlink()
    (source / "LICENSE.txt").write_text("")
    run("inspect", source)
    assert "see LICENSE.txt" in capsys.readouterr().out


# --- several processes ---------------------------------------------------------------------------

TWO_PROCESSES = """
import json, sys
import jax, numpy as np
from pathlib import Path
source, out, port, rank = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import jax.numpy as jnp
from checkpoints_convert import convert
from sama_jax.devices.mesh import make_mesh
from sama_jax.devices.sharding import split_sharding
from sama_jax.weights import loading, model_folder, tensor_map
grid = make_mesh("model=4")
done = convert.to_orbax(source, Path(out), mesh="model=4", quiet=True)
result = {"converted": done.bytes_read}
expected = {}
for name, path in (("plain", Path(source)), ("orbax", Path(out))):
    folder = model_folder.open_folder(path, dtype="bfloat16")
    params = loading.read_params(
        folder, lambda _, x: (jnp.bfloat16, split_sharding(grid, x.shape)))
    result[name] = folder.source.bytes_read
    result["sums"] = {
        f"{p} {s.index}": int(np.asarray(s.data).view(np.uint16).astype(np.uint32).sum())
        for p, x in tensor_map.leaf_paths(params).items() for s in x.addressable_shards}
    expected.setdefault("sums", result["sums"])
    assert result["sums"] == expected["sums"]
    result["local"] = sum(
        {str(s.index): s.data.nbytes for s in x.addressable_shards}[i]
        for x in jax.tree.leaves(params) for i in {str(s.index) for s in x.addressable_shards})
print(json.dumps(result))
"""


def test_two_processes_convert_and_load_together(made, tmp_path):
    """Each reads its own windows and no other; what they write is what one process reads."""
    source, out = made("llada_bfloat16_shards"), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TWO_PROCESSES, str(source), str(out), str(port)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([*command, rank], env=env, stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        results = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in running]
    finally:
        for process in running:
            process.kill()
    folder = model_folder.open_folder(source, dtype="bfloat16")
    whole = 2 * folder.num_params
    params = loading.load(folder, ONE_DEVICE)
    norms = sum(x.nbytes for p, x in tensor_map.leaf_paths(params).items() if p.endswith("scale"))
    for result in results:
        assert result["converted"] == result["plain"] == result["local"]
        # Norm stacks [2, d] are split, single norms are held by both.
        assert whole / 2 <= result["local"] <= whole / 2 + norms
    for path, leaf in tensor_map.leaf_paths(params).items():
        index = {k: v for r in results for k, v in r["sums"].items() if k.startswith(path + " ")}
        split = split_sharding(make_mesh("model=8"), leaf.shape).spec
        if any(split):
            bits = np.asarray(leaf).view(np.uint16).astype(np.uint32)
            assert len(index) == 4
            assert sum(index.values()) == int(bits.sum())
    assert_same_parameters(
        loading.load(model_folder.open_folder(out, dtype="bfloat16"), ONE_DEVICE), params
    )
