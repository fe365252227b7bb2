"""LoRA adapters made by PEFT itself: the same logits, one base in memory, and what is refused."""

import functools
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_llama
import oracle_moe
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoints_convert import convert
from sama_jax.cli import entry
from sama_jax.errors import ModelError, UsageError
from sama_jax.weights import (
    adapter_patterns,
    loading,
    model_folder,
    orbax,
    placing,
    tensor_map,
)

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.transformer"
LENGTH = 16


def small(**changes: Any) -> dict[str, Any]:
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48}
    return oracle.config(**{**sizes, "vocab_size": 300, **changes})


def lora(*targets: str, **changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": list(targets), **changes})


def patterns() -> peft.LoraConfig:
    """Ranks and scales that differ by module: by the end of a name, by regex, by a whole name.

    `ff_out` adapts the blocks and the head.
    """
    return lora(
        *("k_proj", "attn_out", "ff_proj", "ff_out"),
        r=2,
        use_rslora=True,
        rank_pattern={r"blocks\.[01]\.ff_proj": 5, "model.transformer.blocks.2.k_proj": 3},
        alpha_pattern={"attn_out": 4, r"^model\.transformer\.ff_out": 3, "ff_out": 6},
    )


ADAPTERS = {
    "sama_default": lambda: lora("q_proj", "v_proj", lora_dropout=0.05),
    "rslora_and_patterns": patterns,
    "head": lambda: lora("model.transformer.ff_out"),
    "all_linear": lambda: lora(r=4, target_modules="all-linear"),
    "embedding": lambda: lora("wte", "up_proj", r=3),
    "some_layers": lambda: lora("up_proj", layers_to_transform=[1, 2], layers_pattern="blocks"),
}


def make_adapter(module: torch.nn.Module, config: peft.LoraConfig, path: Path, seed: int = 0):
    """Wraps `module` in place and saves the adapter, A and B random.

    With the scales of the tests the adapter is 0.2 to 1 times as large as the weights: it shows,
    and logits stay of order one.
    """
    wrapped = peft.get_peft_model(module, config).eval()  # pyright: ignore  no stub
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and parameter.ndim == 2:
                spread = (0.1 if "B" in name else 1.0) / parameter.shape[1] ** 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(path)
    return wrapped


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, valid):
    return model.logits(params, model.hidden(params, tokens, valid))


def logits(folder: model_folder.ModelFolder, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    params = loading.load(folder, ONE_DEVICE)
    raw = replace(folder.model, shift=False)  # what PyTorch's logits are
    return np.asarray(forward(raw, params, tokens, valid).astype(jnp.float32))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Two texts, one of them padded on the right."""
    tokens = np.random.default_rng(0).integers(0, 297, (2, LENGTH)).astype(np.int32)
    return tokens, np.arange(LENGTH)[None] < np.array([[LENGTH], [11]])


def params_of(base: Path, adapter: Path | None = None, **options: Any) -> Any:
    return loading.load(model_folder.open_folder(base, adapter=adapter, **options), ONE_DEVICE)


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


class Made(NamedTuple):
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Made:
    """A base of three layers and an adapter of all its linear layers; not to be changed."""
    path = tmp_path_factory.mktemp("saved")
    module = oracle.random_folder(path / "base", small(), seed=0)
    make_adapter(module, lora(r=4, target_modules="all-linear"), path / "adapter")
    return Made(path / "base", path / "adapter")


@pytest.fixture
def made(saved, tmp_path) -> Made:
    """A copy of the adapter, to be changed."""
    shutil.copytree(saved.adapter, tmp_path / "adapter")
    return Made(saved.base, tmp_path / "adapter")


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(path: Path, change: Any) -> None:
    """`change` maps name and tensor to the new pairs."""
    found = load_file(path / WEIGHTS)
    new = [pair for name, tensor in found.items() for pair in change(name, tensor)]
    save_file(dict(new), path / WEIGHTS, {"format": "pt"})


def rename(path: Path, change: Any) -> None:
    edit_tensors(path, lambda name, tensor: [(change(name), tensor)])


# The same logits as PEFT's


@pytest.mark.parametrize("name", ADAPTERS)
def test_kept_and_merged_adapters_give_the_logits_of_peft(tmp_path, name):
    module = oracle.random_folder(tmp_path / "base", small(), seed=1, shards=2)
    tokens, valid = inputs()
    args = (torch.from_numpy(tokens).long(), torch.from_numpy(valid))
    before = module(*args)[0].numpy()
    wrapped = make_adapter(module, ADAPTERS[name](), tmp_path / "adapter")
    theirs = wrapped(*args)[0].numpy()
    assert np.abs(theirs - before)[valid].max() > 0.5
    assert 0.5 < theirs[valid].std() < 5
    kept, merged = (
        model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter", merge=merge)
        for merge in (False, True)
    )
    assert kept.model.lora
    assert not merged.model.lora
    for folder in (kept, merged):
        ours = logits(folder, tokens, valid)
        np.testing.assert_allclose(ours[valid], theirs[valid], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        logits(kept, tokens, valid), logits(merged, tokens, valid), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("changes", [{"n_layers": 1}, {"n_layers": 4, "block_group_size": 2}])
def test_one_block_and_block_groups(tmp_path, changes):
    module = oracle.random_folder(tmp_path / "base", small(**changes), seed=2)
    tokens, valid = inputs()
    wrapped = make_adapter(module, lora("q_proj", "ff_out"), tmp_path / "adapter")
    theirs = wrapped(torch.from_numpy(tokens).long(), torch.from_numpy(valid))[0].numpy()
    folder = model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(
        logits(folder, tokens, valid)[valid], theirs[valid], rtol=0, atol=1e-5
    )


# Dream's names, and those of transformers' Qwen2: the same


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


DREAM = {
    "sama_default": lambda: lora("q_proj", "v_proj"),
    "rslora_and_patterns": lambda: lora(
        *("q_proj", "o_proj", "down_proj"),
        r=2,
        use_rslora=True,
        rank_pattern={r"layers\.[02]\.mlp\.down_proj": 4},
        alpha_pattern={"self_attn.q_proj": 5},
    ),
    "head": lambda: lora("lm_head"),
    "all_linear": lambda: lora(r=4, target_modules="all-linear"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft.utils.save_and_load")  # an adapted head
@pytest.mark.parametrize("name", DREAM)
def test_dream(tmp_path, name):
    config = {
        **SIZES,
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "mask_token_id": 299,
    }
    module = oracle_llama.Decoder(config)
    oracle_llama.randomise(module, False, seed=0)
    oracle.write_folder(tmp_path / "base", config, dict(module.state_dict()))
    wrapped = make_adapter(module, DREAM[name](), tmp_path / "adapter")
    tokens, valid = inputs()
    theirs = wrapped(torch.from_numpy(tokens).long(), torch.from_numpy(valid)).numpy()
    folder = model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter")
    ours = logits(folder, tokens, valid)
    np.testing.assert_allclose(ours[valid], theirs[valid], rtol=0, atol=1e-5)


QWEN2 = {
    "all linear layers but the head": (False, lora(r=4, target_modules="all-linear"), 21),
    "embedding and head": (False, lora("embed_tokens", "lm_head", "v_proj"), 5),
    "embedding under a tied head": (True, lora("embed_tokens", "gate_proj"), 4),
}


@pytest.mark.filterwarnings(
    "ignore:.*save_embedding_layers",
    "ignore:.*tie_word_embeddings",
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # PEFT's use of transformers
)
@pytest.mark.parametrize("name", QWEN2)
def test_qwen2_of_transformers(tmp_path, name):
    """PEFT saves the adapted tables, too: copies of the base's."""
    tied, config, modules = QWEN2[name]
    module = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    oracle_llama.randomise(module, tied, seed=1)
    module.save_pretrained(tmp_path / "base")
    wrapped = make_adapter(module, config, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert len([n for n in saved if "lora_" in n]) == 2 * modules
    assert any("base_layer" in n for n in saved) == ("embed_tokens" in config.target_modules)
    tokens, _ = inputs()
    with torch.no_grad():
        theirs = wrapped(torch.from_numpy(tokens).long()).logits.numpy()
    folder = model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter")
    ours = logits(folder, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    merged = model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter", merge=True)
    found = logits(merged, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-5)
    assert "lm_head" in merged.abstract_params  # PEFT's forward leaves a tied head alone


def test_llada2_with_fused_projections_shared_experts_and_a_dense_layer(tmp_path):
    config = oracle_moe.llada2_config(num_hidden_layers=2)
    module = oracle_moe.random_folder(tmp_path / "base", config, seed=0)
    adapter = lora(
        *("query_key_value", "dense", "shared_experts.up_proj", "layers.0.mlp.down_proj"), r=3
    )
    wrapped = make_adapter(module, adapter, tmp_path / "adapter")
    tokens, valid = inputs()
    theirs = wrapped(torch.from_numpy(tokens).long(), torch.from_numpy(valid))[0].numpy()
    folder = model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter")
    ours = logits(folder, tokens, valid)
    np.testing.assert_allclose(ours[valid], theirs[valid], rtol=0, atol=1e-5)


def test_experts_cannot_keep_an_adapter_and_are_merged(tmp_path):
    module = oracle_moe.random_folder(tmp_path / "base", oracle_moe.llada2_config(), seed=0)
    make_adapter(module, lora("experts.5.up_proj", "dense"), tmp_path / "adapter")
    plain, merged = (params_of(tmp_path / "base", *rest) for rest in ((), (tmp_path / "adapter",)))
    asked = params_of(tmp_path / "base", tmp_path / "adapter", merge=True)
    assert same(merged, asked)
    a, b = (
        np.asarray(p["last_block"]["moe"]["experts"]["up_proj"]["kernel"]) for p in (plain, merged)
    )
    assert [i for i in range(32) if np.any(a[i] != b[i])] == [5]
    name = "base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_{}.weight"
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    delta = 2 * (tensors[name.format("B")] @ tensors[name.format("A")]).numpy().T
    np.testing.assert_allclose(b[5] - a[5], delta, rtol=0, atol=1e-6)


def test_an_adapter_of_zeros_changes_no_bit(made):
    edit_tensors(made.adapter, lambda n, t: [(n, t * 0 if "lora_B" in n else t)])
    tokens, valid = inputs()
    base = logits(model_folder.open_folder(made.base), tokens, valid)
    with_zeros = logits(model_folder.open_folder(made.base, adapter=made.adapter), tokens, valid)
    assert with_zeros.tobytes() == base.tobytes()


def test_bfloat16_merges_in_float32_and_rounds_once(tmp_path):
    """Products of integers are exact, and many of their sums need more bits than bfloat16 has."""
    module = oracle.random_folder(tmp_path / "base", small(), seed=4, dtype=torch.bfloat16)
    config = lora("ff_proj", "wte", r=3, lora_alpha=3 / 16)
    make_adapter(module, config, tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda n, t: [(n, torch.round(t * 12 / t.std()))])
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    params = params_of(tmp_path / "base", tmp_path / "adapter", merge=True, dtype="bfloat16")
    for layer in range(3):
        name = f"transformer.blocks.{layer}.ff_proj"
        a, b = (tensors[f"base_model.model.model.{name}.lora_{s}.weight"] for s in "AB")
        wanted = (weights[f"model.{name}.weight"].float() + b @ a / 16).bfloat16()
        stack = params["blocks"]["mlp"]["gate_proj"]["kernel"]
        ours = stack[layer] if layer < 2 else params["last_block"]["mlp"]["gate_proj"]["kernel"]
        assert np.asarray(ours).T.tobytes() == wanted.view(torch.uint8).numpy().tobytes()
    a, b = (tensors[f"{PREFIX}.wte.lora_embedding_{s}"] for s in "AB")
    wanted = (weights["model.transformer.wte.weight"].float() + (b @ a).T / 16).bfloat16()
    ours = np.asarray(params["embed"]["embedding"])
    assert ours.tobytes() == wanted.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_kept_adapter_is_float32_beside_bfloat16(saved):
    params = params_of(saved.base, saved.adapter, dtype="bfloat16")
    projection = params["blocks"]["attn"]["q_proj"]
    assert {k: str(v.dtype) for k, v in projection.items()} == {
        "kernel": "bfloat16",
        "lora_a": "float32",
        "lora_b": "float32",
    }


def test_an_adapter_merges_into_an_orbax_base_one_read_at_a_time(saved, tmp_path, monkeypatch):
    """What reads safetensors by several threads holds one leaf of an Orbax folder."""
    convert.to_orbax(saved.base, tmp_path / "orbax", quiet=True)
    expected = params_of(saved.base, saved.adapter, merge=True)
    plain, busy, most, reads = orbax.load_params, [], [], []

    def slow(folder, tree):
        busy.append(True)
        most.append(len(busy))
        reads.append(sum(leaf is not None for leaf in jax.tree.leaves(tree)))
        time.sleep(0.01)
        found = plain(folder, tree)
        busy.pop()
        return found

    monkeypatch.setattr(orbax, "load_params", slow)
    monkeypatch.setattr(placing, "READERS", 8)
    monkeypatch.setattr(placing, "SLAB", 100)
    assert same(params_of(tmp_path / "orbax", saved.adapter, merge=True), expected)
    assert max(most) == 1
    assert sum(reads) == len(tensor_map.leaf_paths(expected))  # each leaf once


def test_to_hf_writes_what_peft_merges(saved, tmp_path):
    out = tmp_path / "out"
    done = convert.to_hf(saved.base, out, adapter=saved.adapter, quiet=True)
    assert done.bytes_read == (saved.base / "model.safetensors").stat().st_size - header(saved.base)
    assert same(params_of(out), params_of(saved.base, saved.adapter, merge=True))
    module = oracle.random_module(small(), seed=0)
    adapted = peft.PeftModel.from_pretrained(module, saved.adapter)  # pyright: ignore  no stub
    merged = adapted.merge_and_unload()
    ours, theirs = load_file(out / "model.safetensors"), merged.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6, err_msg=name)
    assert json.loads((out / "conversion.json").read_text())["adapter"] == str(saved.adapter)
    with pytest.raises(UsageError, match="another conversion"):
        convert.to_hf(saved.base, out, quiet=True)


def header(folder: Path) -> int:
    """Bytes before the values of a safetensors file."""
    with (folder / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# One base in memory


def leaf_paths(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def test_target_and_reference_share_the_very_arrays(tmp_path):
    """Measured in live bytes: one base (1.6 MB here) and the adapter."""
    config = small(d_model=128, mlp_hidden_size=256)
    module = oracle.random_folder(tmp_path / "base", config, seed=0)
    make_adapter(module, lora("q_proj", "v_proj", r=2), tmp_path / "adapter")
    target = model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter")
    reference = model_folder.open_folder(tmp_path / "base")
    told: list[int] = []
    before = live_bytes()
    with_adapter, plain = loading.load_together([target, reference], ONE_DEVICE, told.append)
    grown = live_bytes() - before
    targets, references = leaf_paths(with_adapter), leaf_paths(plain)
    assert all(targets[name] is leaf for name, leaf in references.items())
    extra = {name: leaf for name, leaf in targets.items() if name not in references}
    assert len(extra) == 8  # A and B of queries and of values, in the stack and in the last block
    assert all("lora_" in name for name in extra)
    base_bytes = sum(x.nbytes for x in references.values())
    adapter_bytes = sum(x.nbytes for x in extra.values())
    assert grown == base_bytes + adapter_bytes == sum(told)
    assert adapter_bytes < base_bytes / 50


def test_only_equal_weights_in_equal_dtypes_are_shared(saved, tmp_path):
    """The same files are, wherever they are named; a copy is not, since nothing compares it."""
    shutil.copytree(saved.base, tmp_path / "links", copy_function=os.link)
    shutil.copytree(saved.base, tmp_path / "copy")
    oracle.random_folder(tmp_path / "other", small(), seed=9)
    folders = [
        model_folder.open_folder(saved.base, adapter=saved.adapter),
        model_folder.open_folder(tmp_path / "links"),
        model_folder.open_folder(tmp_path / "copy"),
        model_folder.open_folder(tmp_path / "other"),
        model_folder.open_folder(saved.base, dtype="bfloat16"),
        model_folder.open_folder(saved.base, adapter=saved.adapter, merge=True),
    ]
    first, *others = loading.load_together(folders, ONE_DEVICE)
    shared = [p["final_norm"]["scale"] is first["final_norm"]["scale"] for p in others]
    assert shared == [True, False, False, False, False]


def test_layers_without_an_adapter_and_smaller_ranks_are_zeros(tmp_path):
    module = oracle.random_folder(tmp_path / "base", small(n_layers=4), seed=0)
    config = lora(
        "blocks.0.q_proj", "blocks.2.q_proj", "blocks.3.up_proj", r=5, rank_pattern={"0.q_proj": 2}
    )
    make_adapter(module, config, tmp_path / "adapter")
    folder = model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter")
    assert set(folder.model.lora) == {
        ("blocks/attn/q_proj/kernel", 5),
        ("last_block/mlp/up_proj/kernel", 5),
    }
    params = loading.load(folder, ONE_DEVICE)
    stack = params["blocks"]["attn"]["q_proj"]
    assert stack["lora_a"].shape == (3, 32, 5)
    assert stack["lora_b"].shape == (3, 5, 32)
    used = [np.flatnonzero(np.abs(stack["lora_b"][i]).sum(axis=1)).tolist() for i in range(3)]
    assert used == [[0, 1], [], [0, 1, 2, 3, 4]]
    assert not np.asarray(stack["lora_a"][1]).any()
    assert not np.asarray(stack["lora_a"][0][:, 2:]).any()
    assert set(params["last_block"]["attn"]["q_proj"]) == {"kernel"}


# Names


VARIANTS = {
    "with the adapter's name": lambda n: n.replace(".weight", ".default.weight"),
    "without PEFT's prefix": lambda n: n.removeprefix("base_model.model."),
    "of the inner model": lambda n: n.replace("base_model.model.model.", "base_model.model."),
    "compiled before": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "wrapped after": lambda n: "module._orig_mod." + n,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_other_ways_of_saving(made, variant):
    wanted = params_of(made.base, made.adapter)
    rename(made.adapter, VARIANTS[variant])
    assert any(".lora_A" in name for name in load_file(made.adapter / WEIGHTS))
    assert same(params_of(made.base, made.adapter), wanted)


def test_a_copy_of_the_base_beside_the_adapter_is_accepted_if_it_is_equal(made):
    """PEFT saves the whole table of an adapted `embed_tokens` or `lm_head`."""
    wanted = params_of(made.base, made.adapter)
    table = load_file(made.base / "model.safetensors")["model.transformer.wte.weight"]
    name = f"{PREFIX}.wte.base_layer.weight"
    tensors = load_file(made.adapter / WEIGHTS)
    save_file({**tensors, name: table}, made.adapter / WEIGHTS)
    assert same(params_of(made.base, made.adapter), wanted)
    save_file({**tensors, name: table + 1}, made.adapter / WEIGHTS)
    assert f"differs    {name}" in refusal(made.base, made.adapter)


def test_absent_fields_take_the_defaults_of_peft(made):
    edit(made.adapter, r=8, lora_alpha=8)
    edit_tensors(made.adapter, lambda n, t: [(n, t.repeat(*((2, 1) if "_A" in n else (1, 2))))])
    wanted = params_of(made.base, made.adapter)
    targets = json.loads((made.adapter / CONFIG).read_text())["target_modules"]
    config = {"peft_type": "LORA", "target_modules": targets}
    (made.adapter / CONFIG).write_text(json.dumps(config))
    defaults = peft.LoraConfig()
    assert (defaults.r, defaults.lora_alpha, defaults.use_rslora) == (8, 8, False)
    assert same(params_of(made.base, made.adapter), wanted)


# Which modules have an adapter

EVERY = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
CHOICES: dict[str, dict[str, Any]] = {
    "some names": {"target_modules": ["q_proj", "ff_out"]},
    "the end of a name, not of a word": {"target_modules": ["proj", "out"]},
    "a whole name": {"target_modules": ["model.transformer.blocks.1.q_proj"]},
    "longer ends": {"target_modules": ["transformer.ff_out", "0.v_proj"]},
    "a regular expression": {"target_modules": r".*\.[01]\.(q_proj|v_proj)"},
    "one that fits a part only": {"target_modules": r"blocks\.0\.q_proj"},
    "one layer": {"target_modules": EVERY, "layers_to_transform": 1},
    "some layers": {"target_modules": EVERY, "layers_to_transform": [0, 2]},
    "no layer": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers of a list": {
        **{"target_modules": ["up_proj", "k_proj"], "layers_to_transform": [2]},
        "layers_pattern": "blocks",
    },
    "layers of other lists": {
        **{"target_modules": ["up_proj", "model.transformer.blocks.0.q_proj"]},
        **{"layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    },
    "all but some": {"target_modules": EVERY, "exclude_modules": ["v_proj", "blocks.0.q_proj"]},
    "all but an expression": {"target_modules": EVERY, "exclude_modules": r".*\.2\..+"},
    "none excluded": {"target_modules": EVERY, "exclude_modules": []},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_modules_without_an_adapter_are_those_of_peft(choice, tmp_path):
    module = oracle.random_folder(tmp_path / "base", small(), seed=0)
    names = {n: True for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    config = CHOICES[choice]
    left_out = adapter_patterns.left_out(config, names)
    try:
        wrapped = peft.get_peft_model(module, peft.LoraConfig(r=2, **config))  # pyright: ignore
        state = peft.get_peft_model_state_dict(wrapped)
        adapted = {n.removeprefix("base_model.model.").split(".lora_")[0] for n in state}
    except ValueError:  # it has found none
        adapted = set()
    assert names.keys() - left_out.keys() == adapted
    assert set(left_out.values()) <= config.keys()


def test_an_adapter_that_peft_would_not_load_whole_is_refused_by_field(made):
    targets = json.loads((made.adapter / CONFIG).read_text())["target_modules"]
    wanted = params_of(made.base, made.adapter)
    block = f"{PREFIX}.blocks.0.v_proj.lora_A.weight"
    for field, value, name in [
        ("target_modules", [t for t in targets if t != "v_proj"], block),
        ("target_modules", "all-linear", f"{PREFIX}.ff_out.lora_A.weight"),  # but the head
        ("layers_to_transform", [0, 1], f"{PREFIX}.blocks.2."),
        ("exclude_modules", ["v_proj"], block),
    ]:
        edit(made.adapter, **{"target_modules": targets, field: value})
        message = refusal(made.base, made.adapter)
        assert f"{CONFIG}: {field} is {repr(value)[:20]}" in message
        assert name in message
        assert "\n" not in message
        edit(made.adapter, **{"target_modules": targets, field: None})
    edit(made.adapter, target_modules=targets, exclude_modules=["wte"], layers_to_transform=[])
    assert same(params_of(made.base, made.adapter), wanted)


def test_all_linear_layers_are_all_but_the_head(tmp_path):
    module = oracle.random_folder(tmp_path / "base", small(), seed=0)
    make_adapter(module, lora(*EVERY[:-1]), tmp_path / "adapter")
    wanted = params_of(tmp_path / "base", tmp_path / "adapter")
    edit(tmp_path / "adapter", target_modules="all-linear")
    assert same(params_of(tmp_path / "base", tmp_path / "adapter"), wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": None},  # PEFT then takes those of its own table
        {"target_modules": 5},
        {"target_modules": ["q_proj", 5]},
        {"target_modules": "(a+)+$"},
        {"target_modules": ".*", "layers_to_transform": [0]},
        {"exclude_modules": {"q_proj": 1}},
        {"exclude_modules": "(.*)*(.*)*"},
        {"layers_to_transform": [True]},
        {"layers_to_transform": "0"},
        {"layers_to_transform": [0], "layers_pattern": 3},
        {"layers_to_transform": [0], "layers_pattern": "(a+)+"},
        {"layers_to_transform": [0], "layers_pattern": ["h"] * 99},
    ],
)
def test_a_choice_of_modules_that_cannot_be_followed_is_refused(made, changes):
    edit(made.adapter, **changes)
    message = refusal(made.base, made.adapter)
    assert f"{CONFIG}: unusable choice of modules (" in message
    assert "\n" not in message


# Identity


def identity(made: Made, **options: Any) -> str:
    return model_folder.open_folder(made.base, adapter=made.adapter, **options).identity


def test_identity_covers_the_adapters_bytes_and_scales_and_nothing_else(made):
    plain = model_folder.open_folder(made.base)
    first = identity(made)
    found = {plain.identity, first, identity(made, merge=True)}
    assert len(found) == 3
    adapted = model_folder.open_folder(made.base, adapter=made.adapter)
    merged = model_folder.open_folder(made.base, adapter=made.adapter, merge=True)
    assert adapted.base_identity == plain.base_identity != merged.base_identity
    edit(made.adapter, inference_mode=False, lora_dropout=0.5, base_model_name_or_path="x/y")
    assert identity(made) == first
    # The ends of names, but no whole parts of them.
    edit(made.adapter, alpha_pattern={"proj": 99, "_out": 99}, rank_pattern={"q_pro": 1})
    assert identity(made) == first
    edit(made.adapter, lora_alpha=17)
    found.add(identity(made))
    edit(made.adapter, use_rslora=True)
    found.add(identity(made))
    edit(made.adapter, alpha_pattern={"blocks.1.q_proj": 3})
    found.add(identity(made))
    assert len(found) == 6

    def nudge(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        tensor.view(-1)[0] += 1e-3 if name.endswith("blocks.1.up_proj.lora_A.weight") else 0
        return [(name, tensor)]

    edit_tensors(made.adapter, nudge)
    assert identity(made) not in found


# Audits


def test_an_audit_with_an_adapter_reads_the_losses_of_the_merged_model(tmp_path, capsys):
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "model"))
    module = oracle.random_folder(base, small(d_model=16, n_layers=1), seed=0)
    make_adapter(module, lora("q_proj", "v_proj", "ff_proj"), adapter)
    tiny.tokenizer().save(str(base / "tokenizer.json"))
    convert.to_hf(base, merged, adapter=adapter, quiet=True)
    texts = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(8), labels=False)
    common = ["audit", "--reference", str(base), "--data", str(texts), "--attacks", "sama"]
    common += [*tiny.SETTINGS, "--quiet"]
    losses = {}
    for name, target in {
        "kept": ["--adapter", str(adapter)],
        "merged": ["--target", str(merged)],
    }.items():
        out = ["--out", str(tmp_path / name), "--save-losses", str(tmp_path / f"{name}.npz")]
        assert entry.main([*common, *target, *out]) == 0
        losses[name] = dict(np.load(tmp_path / f"{name}.npz"))
    kept, plain = losses["kept"], losses["merged"]
    assert kept["reference"].tobytes() == plain["reference"].tobytes()
    np.testing.assert_allclose(kept["target"], plain["target"], rtol=0, atol=1e-5)
    assert np.nanmax(np.abs(kept["target"] - kept["reference"])) > 0.5
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    assert manifest["adapter"] == str(adapter)
    assert manifest["target"] == manifest["reference"] == str(base)
    # The same folder as --target says the same; another scale is another target.
    again = [*common, "--adapter", str(adapter), "--out", str(tmp_path / "kept")]
    assert entry.main([*again, "--target", str(base)]) == 0
    second = shutil.copytree(adapter, tmp_path / "second")
    capsys.readouterr()
    two = [*common, "--adapter", str(adapter), "--adapter", str(second), "--dry-run"]
    assert entry.main([*two, "--out", str(tmp_path / "two")]) == 2  # the same, twice
    assert "second: this adapter is given twice" in capsys.readouterr().err
    edit(second, lora_alpha=2)
    assert entry.main([*two, "--out", str(tmp_path / "two")]) == 0
    edit(adapter, lora_alpha=1)
    capsys.readouterr()
    assert entry.main(again) == 2
    assert "target" in capsys.readouterr().err


# What is refused


def refusal(base: Path, adapter: Path, **options: Any) -> str:
    """The message; it opens with the place, and only lists of offenders follow its first line."""
    with pytest.raises(ModelError) as caught:
        model_folder.open_folder(base, adapter=adapter, **options)
    message = str(caught.value)
    assert message.startswith(str(adapter))
    assert all(line.startswith("  ") for line in message.split("\n")[1:])
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", 1),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"corda_method": "ipm"}),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("kasa_config", {}),
        ("arrow_config", {"top_k": 3}),
        ("alora_invocation_tokens", [5]),
        ("megatron_config", {"hidden_size": 8}),
        ("a_field_of_next_year", True),
        ("a_number_of_next_year", 0),
    ],
)
def test_options_that_are_not_read_are_refused_by_name(made, field, value):
    edit(made.adapter, **{field: value})
    if value == {}:  # the empty settings of an option are no option
        assert identity(made)
        return
    message = refusal(made.base, made.adapter)
    assert f"{field} is {value!r}" in message
    assert "\n" not in message


def test_other_kinds_of_adapters_are_refused_by_name(made):
    for kind in ("LOHA", "IA3", "PREFIX_TUNING", None):
        edit(made.adapter, peft_type=kind)
        assert f"peft_type is {kind!r}" in refusal(made.base, made.adapter)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["ln_f"]}, "transformer.ln_f.weight"),
    ],
)
def test_tensors_of_more_than_lora_are_refused_whatever_the_config_says(tmp_path, changes, told):
    module = oracle.random_folder(tmp_path / "base", small(), seed=0)
    wrapped = make_adapter(module, lora("q_proj", **changes), tmp_path / "adapter")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 1  # trained
    wrapped.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", **dict.fromkeys(changes))
    message = refusal(tmp_path / "base", tmp_path / "adapter")
    offenders = [n for n in load_file(tmp_path / "adapter" / WEIGHTS) if told in n]
    assert offenders
    assert all(name in message for name in offenders)
    assert len(message.split("\n")) == 1 + len(offenders)


def test_an_adapter_of_another_base_names_every_tensor(saved, tmp_path):
    edit_copy = shutil.copytree(saved.adapter, tmp_path / "adapter")
    edit(Path(edit_copy), base_model_name_or_path="GSAI-ML/LLaDA-8B-Base")
    oracle.random_folder(tmp_path / "narrow", small(d_model=16), seed=0)
    message = refusal(tmp_path / "narrow", tmp_path / "adapter")
    names = load_file(saved.adapter / WEIGHTS)
    # Only the inner width of the MLP is the same: `A` of `ff_out`, `B` of `ff_proj` and `up_proj`,
    # and `B` of the head.
    fits = ("ff_out.lora_A", "ff_proj.lora_B", "up_proj.lora_B")
    for name in names:
        expected = "transformer.ff_out.lora_B" in name or (
            "blocks" in name and any(part in name for part in fits)
        )
        assert (f"shape      {name}:" in message) != expected, name
    assert "'GSAI-ML/LLaDA-8B-Base'" in message
    oracle.random_folder(tmp_path / "shallow", small(n_layers=2), seed=0)
    message = refusal(tmp_path / "shallow", tmp_path / "adapter")
    offenders = [n for n in names if "blocks.2." in n]
    assert all(f"unexpected {name} " in message for name in offenders)
    assert len(message.split("\n")) == 1 + len(offenders)


def test_a_head_adapter_does_not_fit_a_tied_model(saved, tmp_path):
    oracle.random_folder(tmp_path / "tied", small(weight_tying=True), seed=0)
    message = refusal(tmp_path / "tied", saved.adapter)
    for side in "AB":
        assert f"unexpected {PREFIX}.ff_out.lora_{side}.weight" in message
    assert len(message.split("\n")) == 3


def test_incomplete_repeated_and_integer_tensors_are_named(made):
    lone = f"{PREFIX}.blocks.0.q_proj.lora_A.weight"
    twice = f"{PREFIX}.blocks.0.v_proj.lora_A.weight"
    whole = f"{PREFIX}.blocks.1.v_proj.lora_B.weight"

    def change(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        if name == lone.replace("_A", "_B"):
            return []
        if name == twice:
            return [(name, tensor), (name.replace(".weight", ".second.weight"), tensor + 1)]
        return [(name, tensor.to(torch.int32) if name == whole else tensor)]

    edit_tensors(made.adapter, change)
    message = refusal(made.base, made.adapter)
    assert f"missing    lora_B to {lone}" in message
    assert "twice" in message
    assert twice in message
    assert f"dtype      {whole}" in message
    assert len(message.split("\n")) == 4


def test_a_rank_that_the_config_does_not_say_is_refused(made):
    edit(made.adapter, rank_pattern={r"blocks\.1\.q_proj": 3})
    message = refusal(made.base, made.adapter)
    name = f"{PREFIX}.blocks.1.q_proj.lora_A.weight"
    assert f"shape      {name}: expected [3, 32], found [4, 32]" in message
    assert len(message.split("\n")) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "4"},
        {"lora_alpha": "16"},
        {"lora_alpha": float("nan")},
        {"rank_pattern": {"(": 4}},
        {"alpha_pattern": [1]},
    ],
)
def test_unusable_ranks_and_scales(made, changes):
    edit(made.adapter, **changes)
    message = refusal(made.base, made.adapter)
    assert "unusable rank or alpha" in message
    assert "\n" not in message


def test_files_that_are_missing_pickled_or_broken(made):
    message = refusal(made.base, made.base.parent / "nowhere")
    assert f"has no {CONFIG}" in message
    weights = made.adapter / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    assert "not a complete safetensors file" in refusal(made.base, made.adapter)
    save_file({}, weights)
    assert "holds no LoRA tensor" in refusal(made.base, made.adapter)
    weights.unlink()
    assert f"has no {WEIGHTS}" in refusal(made.base, made.adapter)
    torch.save({}, made.adapter / "adapter_model.bin")
    assert "never read" in refusal(made.base, made.adapter)
    for broken in ("{", "[]"):
        (made.adapter / CONFIG).write_text(broken)
        assert CONFIG in refusal(made.base, made.adapter)
