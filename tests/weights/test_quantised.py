"""Quantised folders are what their libraries read of them, or are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import quantised_files
import tiny
from quantised_files import METHODS, quantise
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert, describe
from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Rule, Table
from sama_jax.weights import loading, model_folder, quantised, source
from sama_jax.weights.tensor_map import leaf_paths

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"
PLAIN = Table(rule=lambda path, layers: Rule(path), hub_prefix="")
SIZES = {"d_model": 32, "mlp_hidden_size": 48, "n_layers": 2}
STATE = ".weight.quant_state.bitsandbytes__nf4"
LAYER = "model.transformer.blocks.0.q_proj"
EVERYTHING = (slice(None), slice(None))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("quantised") / "made", **SIZES)


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


def opened(path: Path, **options: Any) -> model_folder.ModelFolder:
    return model_folder.open_folder(path, dtype="float32", **options)


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        opened(path)
    said = str(caught.value)
    assert "\n" not in said
    assert said.isprintable()
    return said


def change_config(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | changes))


@pytest.mark.parametrize("name", sorted(path.stem for path in FIXTURES.iterdir()))
def test_what_a_library_wrote_is_dequantised_as_it_does(name, tmp_path):
    """Written by `python experiments/quantised_agreement.py --fixtures`."""
    path = FIXTURES / f"{name}.safetensors"
    with safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
    expected = load_file(path)["expected"]
    shutil.copy(path, tmp_path / "model.safetensors")
    told = {"quantization_config": config, "torch_dtype": "float16"}
    method = quantised.read_method(told, "config.json")
    read = source.open_source(tmp_path, PLAIN, 1, method).window("l.weight", EVERYTHING)
    assert read.dtype == expected.dtype
    assert np.array_equal(read.view(np.uint16), expected.view(np.uint16))
    assert len(np.unique(read)) > 50


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_what_the_format_says(method, folder, monkeypatch):
    whole = quantise(folder, method)
    monkeypatch.setattr("sama_jax.weights.pieces.PIECE", 100)  # rows come in several pieces
    tensors = opened(folder).source
    assert {f"model.{name}" for name in tensors.tensors} == set(whole)
    for name, expected in whole.items():
        found = tensors.window(name.removeprefix("model."), (slice(None),) * expected.ndim)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    layer = whole["model.transformer.blocks.1.ff_proj.weight"]
    for rows, columns in ((slice(0, 5), slice(3, 9)), (slice(21, 22), slice(0, 32))):
        part = tensors.window("transformer.blocks.1.ff_proj.weight", (rows, columns))
        assert np.array_equal(part, layer[rows, columns])


@pytest.mark.parametrize("method", ["nf4 nested", "fp8"])
def test_a_quantised_folder_is_the_dequantised_one(method, folder, tmp_path):
    whole = quantise(folder, method)
    found = describe.describe(folder)
    assert found["loadable"]
    assert found["quantised"] == METHODS[method][0]["quant_method"]
    convert.to_hf(folder, tmp_path / "hf", quiet=True)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {n: x.dtype for n, x in written.items()} == {n: x.dtype for n, x in whole.items()}
    assert all(np.array_equal(written[name], x) for name, x in whole.items())
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    plain = describe.describe(tmp_path / "hf")
    assert plain["quantised"] is None
    assert found["stored_dtypes"] == plain["stored_dtypes"]
    a, b = (loading.load(opened(path), ONE_DEVICE) for path in (folder, tmp_path / "hf"))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("shape", [(5, 7), (33, 50), (3, 64)])
def test_blocks_that_reach_over_rows_are_read(shape, tmp_path):
    rng = np.random.default_rng(3)
    for nested in (False, True):
        parts, expected = quantised_files.blocks(rng, shape, "nf4", nested)
        save_file({f"l{part}": x for part, x in parts.items()}, tmp_path / "model.safetensors")
        told = {"quantization_config": quantised_files.BITSANDBYTES}
        read = source.open_source(tmp_path, PLAIN, 1, quantised.read_method(told, ""))
        assert np.array_equal(read.window("l.weight", EVERYTHING), expected.astype("bfloat16"))
        part = (slice(1, 3), slice(2, 7))
        assert np.array_equal(read.window("l.weight", part), expected.astype("bfloat16")[part])


def test_codes_may_be_stored_as_floats(folder, tmp_path):
    """As FSDP wants them: `bnb_4bit_quant_storage`."""
    quantise(folder, "nf4")
    before = loading.load(opened(folder), ONE_DEVICE)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if f"{n}.absmax" in tensors]:
        tensors[name] = tensors[name].reshape(-1).view("bfloat16").reshape(-1, 1)
    save_file(tensors, folder / "model.safetensors")
    after = loading.load(opened(folder), ONE_DEVICE)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_the_parts_of_a_weight_may_lie_in_several_files(folder):
    quantise(folder, "nf4 nested")
    before = loading.load(opened(folder), ONE_DEVICE)
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: x for n, x in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    after = loading.load(opened(folder), ONE_DEVICE)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_the_identity_covers_what_the_weights_are_read_as(folder):
    quantise(folder, "gptq")
    first = opened(folder)
    config = {**METHODS["gptq"][0], "model_name_or_path": "elsewhere"}
    change_config(folder, quantization_config=config)
    assert opened(folder).identity == first.identity
    change_config(folder, quantization_config=METHODS["gptq v2"][0])
    other = opened(folder)
    assert other.identity != first.identity
    assert other.base_identity != first.base_identity


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "aqlm"}, "quantised by 'aqlm', which is not read; expected one of bits"),
        ({"group_size": 64, "bits": 4}, "quantised by None"),
        ("nf4", "expected an object"),
        ({**METHODS["gptq"][0], "bits": 3}, "bits is 3"),
        ({**METHODS["gptq"][0], "checkpoint_format": "marlin"}, "format is 'marlin'"),
        ({**METHODS["gptq"][0], "adapter": {"path": "eora"}}, "adapter is {'path': 'eora'}"),
        ({**METHODS["gptq"][0], "dynamic": {"up": {"bits": 8}}}, "dynamic is {'up'"),
        ({**METHODS["awq"][0], "version": "gemv"}, "packing is 'gemv'"),
        ({**METHODS["awq"][0], "zero_point": False}, "zero_point is False"),
        ({**METHODS["fp8"][0], "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({**METHODS["fp8"][0], "weight_block_size": [0, 8]}, "weight_block_size is [0, 8]"),
        ({**METHODS["compressed"][0], "format": "marlin-24"}, "format is 'marlin-24'"),
        (
            {**METHODS["compressed"][0], "transform_config": {"a": 1}},
            "transform_config is {'a': 1}",
        ),
    ],
)
def test_other_methods_and_settings_are_refused_by_name(config, said, folder):
    change_config(folder, quantization_config=config)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("method", "part", "values", "said"),
    [
        ("nf4", ".weight.absmax", None, "its absmax is missing"),
        ("nf4", ".weight.quant_map", np.ones(16, np.float32), "holds no values of nf4"),
        ("nf4", ".weight.absmax", np.ones(3, np.float32), "expected float32 [16]"),
        ("nf4", STATE, np.zeros(10, np.uint8), "is no JSON"),
        ("nf4", STATE, np.frombuffer(b'{"a": 1}', np.uint8), "is {'a': 1}; expected nf4 or"),
        ("nf4", STATE, None, "has 0 states"),
        ("nf4 nested", ".weight.nested_absmax", np.ones(2, np.float32), "expected float32 [1]"),
        ("int8", ".SCB", None, "its SCB is missing"),
        ("int8", ".weight_format", np.ones((), np.uint8), "expected 0 (rows)"),
        ("gptq", ".g_idx", np.full(32, 4, np.int32), "names groups from 4 to 4; expected 0 to 3"),
        ("gptq", ".scales", np.ones((4, 7), np.float16), "expected float16 or bfloat16 or float32"),
        ("awq", ".qzeros", None, "its qzeros is missing"),
        ("fp8", ".weight_scale_inv", np.ones((1, 1), np.float32), "expected float32 or"),
        ("compressed", ".weight_shape", np.asarray([-1, 7], np.int64), "expected I32 [1, 1]"),
    ],
)
def test_parts_that_do_not_fit_are_named(method, part, values, said, folder):
    quantise(folder, method, **{f"{LAYER}{part}": values})
    said_so = refusal(folder)
    assert said in said_so
    assert LAYER in said_so


def test_zero_points_that_libraries_read_differently_are_refused(folder):
    quantise(folder, "gptq", **{f"{LAYER}.qzeros": np.full((4, 4), -1, np.int32)})
    with pytest.raises(ModelError, match="zero points of 16"):
        loading.load(opened(folder), ONE_DEVICE)


def test_quantised_weights_without_a_word_in_the_config_are_named(folder):
    quantise(folder, "nf4")
    change_config(folder, quantization_config=None)
    with pytest.raises(ModelError, match=r"quantised, but config\.json has no quantization_config"):
        opened(folder)
    change_config(folder, quantization_config=METHODS["awq"][0])
    with pytest.raises(ModelError, match="or another method's"):
        opened(folder)


def test_a_stale_word_beside_plain_weights_of_another_format_is_refused(folder, tmp_path):
    convert.to_orbax(folder, tmp_path / "orbax", quiet=True)
    change_config(tmp_path / "orbax", quantization_config=quantised_files.BITSANDBYTES)
    assert "the weights beside it are not safetensors" in refusal(tmp_path / "orbax")


def test_an_adapter_stands_beside_a_quantised_base(folder, tmp_path):
    quantise(folder, "nf4 nested")
    convert.to_hf(folder, tmp_path / "plain", quiet=True)
    rng = np.random.default_rng(0)
    shapes = {f"{LAYER}.lora_A.weight": (2, 32), f"{LAYER}.lora_B.weight": (32, 2)}
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"base_model.model.{n}": rng.normal(size=s).astype("float32") for n, s in shapes.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(told))

    loaded = []
    for path in (folder, tmp_path / "plain"):
        folders = opened(path, adapter=tmp_path / "adapter"), opened(path)
        assert folders[0].model.dtype == folders[1].model.dtype
        target, reference = loading.load_together(folders, ONE_DEVICE)
        ours, base = (leaf_paths(tree) for tree in (target, reference))
        assert len(ours) == len(base) + 2
        assert all(ours[name] is leaf for name, leaf in base.items())  # once in memory
        merged = opened(path, adapter=tmp_path / "adapter", merge=True)
        loaded.append((target, reference, loading.load(merged, ONE_DEVICE)))
    assert jax.tree.all(jax.tree.map(np.array_equal, *loaded))
