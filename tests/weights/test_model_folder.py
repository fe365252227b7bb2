"""Model folders: what is refused and how, what absent fields mean, and exact round trips."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from sama_jax import terminal
from sama_jax.errors import ModelError, OutputError, UsageError
from sama_jax.models.registry import build_model, read_config
from sama_jax.weights import loading, model_folder, safetensors, saving, stored_bytes
from sama_jax.weights.source import Source

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
SMALL = {
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 32,
    "embedding_size": 32,
    "mask_token_id": 31,
}
BLOCK = "model.transformer.blocks"


def small(**changes: Any) -> dict[str, Any]:
    return oracle.config(**{**SMALL, **changes})


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(oracle.random_module(config, seed).state_dict())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of all weight files, read by PyTorch."""
    parts = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(merged) == sum(map(len, parts))
    return merged


def load(path: Path, dtype: str = "float32") -> Any:
    return loading.load(model_folder.open_folder(path, dtype=dtype), ONE_DEVICE)


def assert_same_parameters(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def refusal(path: Path, **options: Any) -> str:
    """The message with which a folder is refused; it opens with the place it is about."""
    with pytest.raises(ModelError) as caught:
        model_folder.open_folder(path, **options)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert message.startswith(str(path))
    # The sentence is one line; only lists of offenders follow it.
    assert all(line.startswith("  ") for line in message.split("\n")[1:])
    return message


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound folder in three shards."""
    oracle.random_folder(tmp_path / "model", small(), seed=0, shards=3)
    return tmp_path / "model"


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


# Not a model folder


def test_no_such_folder_is_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "expected a model folder with config.json" in refusal(tmp_path / "model.safetensors")


def test_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
)
def test_config_that_is_no_json_object_is_refused(folder, content, complaint):
    (folder / "config.json").write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert complaint in message


# Another family


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("lada", "did you mean 'llada'?"),
        ("gpt2", "known: "),
        (None, "known: "),
        (["gpt2"], "known: "),
    ],
)
def test_unknown_family_is_refused_with_the_known_ones(folder, kind, hint):
    edit_config(folder, model_type=kind)
    message = refusal(folder)
    assert f"model_type is {kind!r}" in message
    assert hint in message


def test_foreign_architecture_under_the_name_llada_is_refused(folder):
    edit_config(folder, architectures=["LLaDA2MoeModelLM"])
    message = refusal(folder)
    assert "architectures is ['LLaDA2MoeModelLM']" in message
    assert "expected one of ['LLaDAModelLM', 'LLaDAModel']" in message


@pytest.mark.parametrize("architectures", [["LLaDAModel"], [], None])
def test_inner_class_or_no_architecture_is_accepted(folder, architectures):
    edit_config(folder, architectures=architectures)
    assert model_folder.open_folder(folder).family.family == "llada"


@pytest.mark.parametrize(
    "changes",
    [
        {"n_heads": "many"},
        {"n_heads": 0},
        {"n_heads": 5},
        {"n_kv_heads": 3},
        {"n_kv_heads": -2},
        {"n_heads": 16, "n_kv_heads": 16},  # heads of size 1 cannot be rotated
        {"d_model": None},
        {"d_model": 16.0},
        {"n_layers": "3"},
        {"n_layers": 0},
        {"mlp_hidden_size": "x"},
        {"embedding_size": "x"},
        {"block_group_size": None},
        {"rope_theta": "x"},
        {"rms_norm_eps": None},
        {"architectures": 5},
    ],
)
def test_unusable_numbers_are_refused(folder, changes):
    edit_config(folder, **changes)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: ")


def test_all_sizes_that_are_no_positive_integers_are_listed(folder):
    edit_config(folder, n_layers="3", d_model=-1, n_kv_heads=0.5)
    assert "but d_model is -1; n_layers is '3'; n_kv_heads is 0.5" in refusal(folder)


# Absent fields mean the config class's defaults, not the values of the 8B checkpoint


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("block_type", "sequential"),
        ("layer_norm_type", "default"),
        ("activation_type", "swiglu"),
        ("rope", False),
    ],
)
def test_absent_field_whose_default_is_unsupported_is_refused_naming_it(tmp_path, name, default):
    oracle.write_folder(tmp_path, without(small(), name), random_tensors(small()))
    message = refusal(tmp_path)
    assert f"{name} is {default!r} (class default, field is absent)" in message


def test_every_unsupported_switch_is_listed_in_one_message(folder):
    edit_config(folder, block_type="sequential", alibi=True, layer_norm_type="gemma_rms")
    message = refusal(folder)
    for part in ("block_type is 'sequential'", "alibi is True", "layer_norm_type is 'gemma_rms'"):
        assert part in message
    assert "class default" not in message


def test_absent_weight_tying_means_tied(tmp_path):
    tensors = random_tensors(small(weight_tying=True))
    assert "model.transformer.ff_out.weight" not in tensors
    oracle.write_folder(tmp_path, without(small(), "weight_tying"), tensors)
    assert "lm_head" not in load(tmp_path)


def test_absent_kv_heads_mean_as_many_as_heads(tmp_path):
    tensors = random_tensors(small(n_kv_heads=4))
    oracle.write_folder(tmp_path, without(small(), "n_kv_heads"), tensors)
    assert model_folder.open_folder(tmp_path).model.arch.num_kv_heads == 4


def test_absent_kv_heads_with_multi_query_attention_mean_one(tmp_path):
    config = {**without(small(), "n_kv_heads"), "multi_query_attention": True}
    oracle.write_folder(tmp_path, config, random_tensors(small(n_kv_heads=1)))
    assert model_folder.open_folder(tmp_path).model.arch.num_kv_heads == 1


def test_absent_numbers_take_class_defaults(tmp_path):
    names = ("rope_theta", "rms_norm_eps", "mlp_hidden_size", "rope_full_precision")
    tensors = random_tensors(small(mlp_hidden_size=4 * 16))
    oracle.write_folder(tmp_path, without(small(), *names), tensors)
    arch = model_folder.open_folder(tmp_path).model.arch
    assert (arch.rope_theta, arch.norm_eps, arch.mlp_width) == (10000.0, 1e-5, 4 * 16)
    assert arch.rope_float32


def test_absent_sizes_and_mask_id_take_class_defaults(tmp_path):
    names = ("embedding_size", "vocab_size", "mask_token_id")
    tensors = random_tensors(small(embedding_size=50304))
    oracle.write_folder(tmp_path, without(small(), *names), tensors)
    model = model_folder.open_folder(tmp_path).model
    assert (model.vocab_size, model.mask_id) == (50304, 50256)


def test_null_embedding_size_means_vocab_size(tmp_path):
    oracle.write_folder(tmp_path, small(embedding_size=None), random_tensors(small()))
    assert model_folder.open_folder(tmp_path).model.vocab_size == 32


def test_absent_layer_norm_bias_follows_include_bias(tmp_path):
    config = small(include_bias=True, bias_for_layer_norm=None)
    oracle.write_folder(tmp_path, without(config, "bias_for_layer_norm"), random_tensors(config))
    assert "bias" in load(tmp_path)["final_norm"]


@pytest.mark.parametrize("mask_id", [32, 50256, -1, None, "31", 3.5])
def test_mask_id_that_has_no_row_is_refused_until_given(folder, mask_id):
    edit_config(folder, mask_token_id=mask_id)
    message = refusal(folder)
    assert f"the mask token id is {mask_id!r}, but the embedding has 32 rows" in message
    assert "--mask-id" in message
    assert model_folder.open_folder(folder, mask_id=30).model.mask_id == 30


def test_given_mask_id_that_has_no_row_is_refused(folder):
    assert "the mask token id is 32" in refusal(folder, mask_id=32)


# Weights that do not fit


def test_all_tensors_that_do_not_fit_are_listed_in_one_error(tmp_path):
    tensors = random_tensors(small())
    for name in (f"{BLOCK}.1.v_proj.weight", "model.transformer.ln_f.weight"):
        del tensors[name]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(16, 16)
    tensors[f"{BLOCK}.3.attn_norm.weight"] = torch.zeros(16)  # a fourth block
    tensors[f"{BLOCK}.0.ff_out.bias"] = torch.zeros(16)
    tensors[f"{BLOCK}.2.ff_proj.weight"] = torch.zeros(16, 24)  # transposed
    tensors["model.transformer.wte.weight"] = torch.zeros(33, 16)
    tensors[f"{BLOCK}.0.attn_norm.weight"] = torch.zeros(16, dtype=torch.int32)
    oracle.write_folder(tmp_path, small(), tensors, shards=3)
    message = refusal(tmp_path)
    assert "8 tensors do not fit" in message
    assert sorted(message.split("\n")[1:]) == [
        f"  dtype      {BLOCK}.0.attn_norm.weight: I32 is not a floating-point type that is "
        "supported",
        "  missing    transformer.blocks.1.v_proj.weight [8, 16]",
        "  missing    transformer.ln_f.weight [16]",
        f"  shape      {BLOCK}.2.ff_proj.weight: expected [24, 16], found [16, 24]",
        "  shape      model.transformer.wte.weight: expected [32, 16], found [33, 16]",
        "  unexpected model.layers.0.self_attn.q_proj.weight [16, 16]",
        f"  unexpected {BLOCK}.0.ff_out.bias [16]",
        f"  unexpected {BLOCK}.3.attn_norm.weight [16]",
    ]


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file_is_refused(tmp_path, kept):
    oracle.random_folder(tmp_path, small(), seed=0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(tmp_path)
    assert message.startswith(f"{file}: not a complete safetensors file")


def test_truncated_shard_is_named(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(folder).startswith(f"{file}: not a complete safetensors file")


def test_missing_shards_are_all_named(folder):
    names = ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    for name in names:
        (folder / name).unlink()
    message = refusal(folder)
    assert ", ".join(names) in message
    assert "model-00002" not in message


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}']
)
def test_broken_index_is_refused(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors.index.json'}: ")
    assert re.search("not readable as JSON|expected a JSON object|not an index of weights", message)


def test_tensor_that_comes_twice_under_two_names_is_refused(tmp_path):
    tensors = random_tensors(small())
    name = f"{BLOCK}.0.q_proj.weight"
    tensors["module." + name] = tensors[name].clone()
    oracle.write_folder(tmp_path, small(), tensors, shards=3)
    message = refusal(tmp_path)
    assert "the same tensor twice" in message
    assert name in message
    assert "module." + name in message


def test_stored_head_of_a_tied_model_must_equal_the_embedding(tmp_path):
    config = small(weight_tying=True)
    tensors = random_tensors(config)
    oracle.write_folder(tmp_path / "without", config, tensors)
    head = tensors["model.transformer.wte.weight"].clone()
    tensors["model.transformer.ff_out.weight"] = head
    oracle.write_folder(tmp_path / "equal", config, tensors)
    assert_same_parameters(load(tmp_path / "equal"), load(tmp_path / "without"))
    head[5, 7] += 1e-6
    oracle.write_folder(tmp_path / "other", config, tensors)
    message = refusal(tmp_path / "other")
    assert "transformer.ff_out.weight: the head is tied, but differs" in message


def test_stored_head_of_a_tied_model_without_embedding_is_refused(tmp_path):
    config = small(weight_tying=True)
    tensors = random_tensors(config)
    tensors["model.transformer.ff_out.weight"] = tensors.pop("model.transformer.wte.weight")
    oracle.write_folder(tmp_path, config, tensors)
    message = refusal(tmp_path)
    assert "missing    transformer.wte.weight [32, 16]" in message
    assert "transformer.ff_out.weight: the head is tied, but differs" in message


class _Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("suffix", ["", "-00001-of-00001"])
def test_pickled_weights_are_refused_unread(tmp_path, suffix):
    marker = tmp_path / "unpickled"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(small()))
    (model / f"pytorch_model{suffix}.bin").write_bytes(pickle.dumps(_Bomb(marker)))
    assert "pickled (.bin), which only" in refusal(model)
    assert not marker.exists()


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small()))
    message = refusal(tmp_path)
    assert "expected model.safetensors or model.safetensors.index.json, found neither" in message


# Names


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module.model.",
        "_orig_mod.module.model.",
        "_fsdp_wrapped_module.model.",
        "_module.model.",
        "_forward_module.model.",
        "base_model.model.model.",
        "module._orig_mod.base_model.model.",
    ],
)
def test_wrapped_names_load_to_the_same_parameters(tmp_path, prefix):
    tensors = random_tensors(small())
    oracle.write_folder(tmp_path / "hub", small(), tensors)
    renamed = {prefix + n.removeprefix("model."): t for n, t in tensors.items()}
    oracle.write_folder(tmp_path / "wrapped", small(), renamed, shards=3)
    assert_same_parameters(load(tmp_path / "wrapped"), load(tmp_path / "hub"))


@pytest.mark.parametrize("infix", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_blocks_wrapped_one_by_one_load_to_the_same_parameters(tmp_path, infix):
    tensors = random_tensors(small())
    oracle.write_folder(tmp_path / "hub", small(), tensors)
    renamed = {
        ".".join([*n.split(".")[:4], infix, *n.split(".")[4:]]) if n.startswith(BLOCK) else n: t
        for n, t in tensors.items()
    }
    assert f"{BLOCK}.0.{infix}.q_proj.weight" in renamed
    oracle.write_folder(tmp_path / "wrapped", small(), renamed)
    assert_same_parameters(load(tmp_path / "wrapped"), load(tmp_path / "hub"))


def test_block_groups_load_to_the_same_parameters(tmp_path):
    plain = random_tensors(small(n_layers=4))
    groups = dict(
        zip(oracle.Llada(small(n_layers=4, block_group_size=2)).state_dict(), plain.values())
    )
    assert "model.transformer.block_groups.1.0.q_proj.weight" in groups
    oracle.write_folder(tmp_path / "plain", small(n_layers=4), plain)
    oracle.write_folder(tmp_path / "groups", small(n_layers=4, block_group_size=2), groups)
    assert_same_parameters(load(tmp_path / "groups"), load(tmp_path / "plain"))


# Round trips

ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"weight_tying": True},
    "everything": {"include_bias": True, "bias_for_layer_norm": None, "attention_layer_norm": True},
    "one_layer": {"n_layers": 1},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ROUND_TRIPS)
def test_saved_folder_has_the_bytes_of_its_source(tmp_path, variant, dtype):
    source, out = tmp_path / "source", tmp_path / "out"
    config = small(**ROUND_TRIPS[variant])
    oracle.random_folder(source, config, seed=1, shards=3, dtype=getattr(torch, dtype))
    (source / "tokenizer.json").write_text("{}")
    opened = model_folder.open_folder(source, dtype=dtype)
    params = loading.load(opened, ONE_DEVICE)
    saving.save_folder(out, params, opened.model, opened.config, source, opened.family.weights)

    assert_same_tensors(read_tensors(out), read_tensors(source))
    assert_same_parameters(load(out, dtype), params)
    saved = json.loads((out / "config.json").read_text())
    assert saved == {**config, "torch_dtype": dtype}
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(f.name for f in out.iterdir()) == names


@pytest.mark.parametrize("name", ["dtype", "torch_dtype", "both"])
def test_a_saved_config_says_one_type_under_every_name(tmp_path, name):
    names = ("dtype", "torch_dtype") if name == "both" else (name,)
    config = {n: v for n, v in small().items() if "dtype" not in n}
    config |= dict.fromkeys(names, "bfloat16")
    source, out = tmp_path / "source", tmp_path / "out"
    oracle.random_folder(source, config, seed=1)
    opened = model_folder.open_folder(source, dtype="float32")
    params = loading.load(opened, ONE_DEVICE)
    saving.save_folder(out, params, opened.model, opened.config, source, opened.family.weights)
    saved = json.loads((out / "config.json").read_text())
    assert {n: v for n, v in saved.items() if "dtype" in n} == dict.fromkeys(names, "float32")


def test_saved_shards_have_the_bytes_of_their_source(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 4000)
    opened = model_folder.open_folder(folder)
    out = tmp_path / "out"
    params = loading.load(opened, ONE_DEVICE)
    saving.save_folder(out, params, opened.model, opened.config, folder, opened.family.weights)
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert max(sum(t.nbytes for t in load_file(s).values()) for s in shards) <= 4000
    assert_same_tensors(read_tensors(out), read_tensors(folder))
    assert_same_parameters(load(out), params)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(out).values())


@pytest.mark.parametrize("first_shards", [1, 3])
@pytest.mark.parametrize("limit", [4000, 10**9])
def test_saving_over_a_folder_replaces_its_weights(tmp_path, monkeypatch, first_shards, limit):
    """Neither an old index nor an old single file may lead a reader back to the old weights."""
    out, source = tmp_path / "out", tmp_path / "source"
    oracle.random_folder(out, small(), seed=1, shards=first_shards)
    oracle.random_folder(source, small(), seed=2)
    opened = model_folder.open_folder(source)
    params = loading.load(opened, ONE_DEVICE)
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", limit)
    saving.save_folder(out, params, opened.model, opened.config, source, opened.family.weights)
    assert_same_parameters(load(out), params)
    single, index = out / "model.safetensors", out / "model.safetensors.index.json"
    assert single.is_file() != index.is_file()


def test_interrupted_save_over_a_folder_leaves_no_finished_one(folder, monkeypatch):
    opened = model_folder.open_folder(folder)
    params = loading.load(opened, ONE_DEVICE)

    def stop(*_):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_weights", stop)
    with pytest.raises(OutputError, match="disk full"):
        saving.save_folder(
            folder, params, opened.model, opened.config, folder, opened.family.weights
        )
    assert "has no config.json" in refusal(folder)


def test_block_groups_are_saved_as_plain_blocks(tmp_path):
    config = small(n_layers=4, block_group_size=2)
    source, out = tmp_path / "source", tmp_path / "out"
    oracle.random_folder(source, config, seed=0)
    opened = model_folder.open_folder(source)
    params = loading.load(opened, ONE_DEVICE)
    saving.save_folder(out, params, opened.model, opened.config, source, opened.family.weights)
    assert_same_parameters(load(out), params)
    assert read_tensors(out).keys() == random_tensors(small(n_layers=4)).keys()


def test_auto_dtype_is_float32_on_cpu_and_loads_bfloat16_exactly(tmp_path):
    oracle.random_folder(tmp_path, small(), seed=0, dtype=torch.bfloat16)
    wide, narrow = load(tmp_path, "auto"), load(tmp_path, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    assert_same_parameters(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), wide)


def test_number_of_parameters_equals_pytorch(folder):
    count = sum(t.numel() for t in read_tensors(folder).values())
    assert model_folder.open_folder(folder).num_params == count


def test_progress_adds_up_to_the_bytes_of_the_parameters(folder):
    seen = []
    params = loading.load(model_folder.open_folder(folder), ONE_DEVICE, seen.append)
    assert sum(seen) == sum(x.nbytes for x in jax.tree.leaves(params))


def test_progress_in_bytes_counts_whole_megabytes(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.0)
    with terminal.ByteBar("weights", 3_500_000) as told:
        told(1_700_000)
        told(1_700_000)  # 3.4 in all
        told(100_000)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == ["weights: 1/3 MB", "weights: 3/3 MB"]
    with terminal.ByteBar("weights", 3_500_000, least=10**9) as told:
        told(3_500_000)
    assert capsys.readouterr().err == ""


def test_a_tensor_that_cannot_be_read_ends_loading(folder, monkeypatch):
    """Whichever thread meets it."""
    source = model_folder.open_folder(folder).source
    window = Source.window

    def broken(self, name, index):
        if "blocks.1" in name:
            raise ModelError(f"cannot read tensor {name}")
        return window(self, name, index)

    monkeypatch.setattr(Source, "window", broken)
    assert any("blocks.1" in name for name in source.tensors)
    with pytest.raises(ModelError, match=r"cannot read tensor .*blocks\.1"):
        loading.load(model_folder.open_folder(folder), ONE_DEVICE)


# Identity


def identity(path: Path) -> str:
    return model_folder.open_folder(path).identity


@pytest.mark.parametrize("shards", [1, 3])
def test_identity_is_of_the_content_and_not_of_the_place(tmp_path, shards):
    oracle.random_folder(tmp_path / "a", small(), seed=0, shards=shards)
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "copy")
    assert identity(tmp_path / "a") == identity(tmp_path / "deep" / "copy")
    (tmp_path / "deep" / "copy" / "README.md").write_text("")
    assert identity(tmp_path / "a") == identity(tmp_path / "deep" / "copy")


@pytest.mark.parametrize("shards", [1, 3])
def test_identity_changes_with_any_byte(tmp_path, shards, monkeypatch):
    """In the first and the last byte of the tensors, at the borders of chunks, and between."""
    oracle.random_folder(tmp_path, small(), seed=0, shards=shards)
    monkeypatch.setattr(stored_bytes, "CHUNK", 2**12)
    monkeypatch.setattr(stored_bytes, "PIECE", 1000)
    file = max(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {identity(tmp_path)}
    for at in (start, 2**12 - 1, 2**12, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found.add(identity(tmp_path))
    file.write_bytes(content)
    assert len(found) == 6
    assert identity(tmp_path) in found


def test_only_an_identity_that_is_asked_for_is_computed(folder, monkeypatch):
    """Not to plan, and once for all that comes of a folder."""
    read: list[int] = []
    original = stored_bytes.digest
    monkeypatch.setattr(stored_bytes, "digest", lambda f: read.append(1) or original(f))
    opened = model_folder.open_folder(folder)
    assert opened.base_identity == model_folder.open_folder(folder).base_identity
    loading.load(opened, ONE_DEVICE)
    assert not read
    assert opened.identity == model_folder.with_options(opened, remat=True).identity
    assert len(read) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "Dream", "architectures": None},
        {"rope_theta": 2e6},
        {"rms_norm_eps": 1e-3},
        {"tie_word_embeddings": False},
        {"model_type": "qwen2"},
        {"max_position_embeddings": 64},
    ],
)
def test_identity_covers_what_the_config_makes_of_the_weights(tmp_path, changes):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "rope_theta": 1e6}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    full = {**sizes, "model_type": "a2d-qwen2", "tie_word_embeddings": True, "head_dim": 4}
    family = read_config(full, "here")
    shapes = jax.eval_shape(build_model(family, 31, jnp.float32).init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    model = build_model(family, 31, jnp.float32)
    saving.save_folder(tmp_path, zeros, model, full, tmp_path, family.weights)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    before = model_folder.open_folder(tmp_path, mask_id=31).identity
    edit_config(tmp_path, **changes)
    assert model_folder.open_folder(tmp_path, mask_id=31).identity != before


def test_identity_changes_with_the_architecture(folder):
    before = identity(folder)
    edit_config(folder, rope_theta=1.0)
    assert identity(folder) != before


# --- what computes attention ---------------------------------------------------------------------


class Gpu:
    device_kind = "a GPU"

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("asked", "capability", "devices", "dtype", "head", "expected"),
    [
        ("auto", "9.0", 1, "bfloat16", 8, "cudnn"),
        ("auto", "8.0", 1, "bfloat16", 128, "cudnn"),
        ("xla", "9.0", 1, "bfloat16", 8, "xla"),
        ("auto", "7.5", 1, "bfloat16", 8, "xla"),
        ("auto", "gfx942", 1, "bfloat16", 8, "xla"),
        ("auto", "9.0", 8, "bfloat16", 8, "xla"),
        ("cudnn", "9.0", 8, "bfloat16", 8, "cudnn"),
        ("auto", "9.0", 1, "float32", 8, "xla"),
        ("auto", "9.0", 1, "bfloat16", 12, "xla"),
        ("auto", "9.0", 1, "bfloat16", 256, "xla"),
        ("cudnn", "7.5", 1, "bfloat16", 8, None),
        ("cudnn", "9.0", 1, "float32", 8, None),
    ],
)
def test_cudnn_where_it_can_compute_the_model(
    monkeypatch, asked, capability, devices, dtype, head, expected
):
    family = read_config(small(d_model=4 * head), "config.json")
    model = build_model(family, 31, jnp.dtype(dtype))
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(capability)] * devices)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    if expected is None:
        with pytest.raises(UsageError, match=r"expected NVIDIA GPUs .* found a GPU"):
            model_folder.with_attention(asked, model)
    else:
        assert model_folder.with_attention(asked, model).arch.attention == expected
