"""Model folders that were made to do harm: refused in one line, at once, with nothing built."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert
from sama_jax.errors import ModelError
from sama_jax.weights import adapter_patterns, folder_files, loading, model_folder, orbax, saving
from sama_jax.weights.safetensors import INDEX, SINGLE
from sama_jax.weights.special_tokens import padding_token

DEEP = "[" * 200_000
SECONDS = 5.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refusal(path: Path, **options: Any) -> str:
    """The first line of a refusal, which must come soon."""
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        model_folder.open_folder(path, **options)
    assert time.monotonic() - start < SECONDS
    first, *rest = str(caught.value).split("\n")
    assert all(line.startswith("  ") for line in rest)
    assert first.isprintable()
    return first


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path) -> dict[str, str]:
    """Puts an index beside the weights, and returns its map."""
    names = dict.fromkeys(load_file(folder / SINGLE), "a.safetensors")
    (folder / SINGLE).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return names


# JSON that is none, and files that are none

FILES = ("config.json", INDEX, "tokenizer_config.json", "special_tokens_map.json")
FILES += ("added_tokens.json", "tokenizer.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [DEEP, '{"a":' * 100_000, "[]", "1e999", '"\\ud800"', "\0"])
def test_json_that_is_no_object_is_refused(folder, name, content):
    (folder / name).write_text(content)
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_named_pipe_is_no_file(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == INDEX:  # then there is none
        model_folder.open_folder(folder)
    else:
        assert "expected a regular file" in (told := refusal(folder)) or "has no config" in told


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/passwd", "x" * 5000, "", "a\0b", ".", "a/../../b", "\x1b[31m"],
)
def test_an_index_names_files_of_its_folder_only(folder, name):
    names = shard(folder)
    assert model_folder.open_folder(folder)
    shutil.copy(folder / "a.safetensors", folder.parent / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {**names, "more": name}}))
    assert "names 1 files that are not below its folder" in refusal(folder)


@pytest.mark.parametrize("tokens", [{"<|mask|>": 2**70}, {"<|mask|>": "7"}, {"<|mask|>": [1]}])
def test_ids_of_added_tokens_are_integers(folder, tokens):
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    assert "added token" in (told := refusal(folder)) or "the mask token id" in told


@pytest.mark.parametrize("mask", [True, 1.0, "7", [7], 2**70, -1])
def test_a_mask_is_a_row(folder, mask):
    edit(folder / "config.json", mask_token_id=mask)
    assert "the mask token id is" in refusal(folder)


# The padding token


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pad_token_id": 3, "eos_token_id": 5}, 3),
        ({"pad_token_id": None, "eos_token_id": 5}, 5),
        ({"eos_token_id": [5, 6]}, 5),
        ({"pad_token_id": 0, "eos_token_id": 5}, 0),
        ({"pad_token_id": None, "eos_token_id": None}, None),
        ({"eos_token_id": []}, "eos_token_id is []"),
        ({"pad_token_id": 10, "eos_token_id": 5}, "pad_token_id is 10"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"pad_token_id": 2**40}, "pad_token_id is 1099511627776"),
        ({"pad_token_id": True}, "pad_token_id is True"),
        ({"pad_token_id": 7.9}, "pad_token_id is 7.9"),
        ({"pad_token_id": "7"}, "pad_token_id is '7'"),
        ({}, None),
    ],
)
def test_the_padding_token_is_a_row_or_none(config, expected):
    if not isinstance(expected, str):
        assert padding_token(config, 10, "here") == expected
    else:
        with pytest.raises(ModelError, match=r"has 10 rows") as caught:
            padding_token(config, 10, "here")
        assert expected in str(caught.value)


# Claims


CLAIMS: dict[str, dict[str, Any]] = {
    "layers": {"n_layers": 16_384},
    "more layers": {"n_layers": 10**9},
    "dense layers": {"first_k_dense_replace": 10**9},
    "experts": {"num_experts": 16_384, "n_group": 1, "topk_group": 1},
    "both": {"num_experts": 16_384, "num_hidden_layers": 16_384, "n_group": 1, "topk_group": 1},
    "wide": {"d_model": 2**22, "mlp_hidden_size": 2**22, "embedding_size": 2**22},
    "wider": {"d_model": 2**40},
    "rows": {"embedding_size": 10**15},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_config_that_claims_much_is_refused_before_it_is_built(folder, claim):
    changes = CLAIMS[claim]
    if "num_experts" in changes or "first_k_dense_replace" in changes:
        moe = {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]}
        moe |= {"moe_intermediate_size": 8, "vocab_size": 300, "hidden_size": 16}
        moe |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        edit(folder / "config.json", rope=None, alibi=None, **{**moe, **changes})
    else:
        edit(folder / "config.json", **changes)
    before = peak()
    refusal(folder)
    assert peak() - before < 2**28


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_a_checkpoint_that_claims_more_than_its_files_hold_is_refused(tmp_path, monkeypatch):
    orbax.save_params(tmp_path / "orbax", {"a": jax.numpy.ones((4, 4))})
    monkeypatch.setattr(orbax, "CLAIMED", 0.001)
    with pytest.raises(ModelError, match=r"its arrays claim 64 bytes, its files have [\d,]+"):
        orbax.stored_params(tmp_path / "orbax")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "I8", "BOOL", "C64"])
def test_a_tied_head_of_another_type_is_named(folder, dtype):
    bits = {"F4": 4, "C64": 64}.get(dtype, 8)
    tensors = load_file(folder / SINGLE)
    table = tensors["model.transformer.wte.weight"]
    header, body, at = {}, b"", 0
    for name, values in sorted(tensors.items()):
        raw = values.tobytes()
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [at, at + len(raw)]}
        body, at = body + raw, at + len(raw)
    size = table.size * bits // 8
    entry = {"dtype": dtype, "shape": table.shape, "data_offsets": [at, at + size]}
    header["model.transformer.ff_out.weight"] = entry
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + body + bytes(size))
    with pytest.raises(
        ModelError, match=r"ff_out.weight: \w+ is not a floating-point type|not a c"
    ):
        model_folder.open_folder(folder)


def twice(file: Path) -> None:
    """Names the first tensor of a file twice, with another type of the same size."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name, entry = next((n, e) for n, e in header.items() if n != "__metadata__")
    again = json.dumps({name: {**entry, "dtype": "I32"}})[1:-1]
    text = ("{" + again + "," + json.dumps(header)[1:]).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def test_a_header_that_names_a_tensor_twice_is_refused(folder, adapter):
    twice(adapter / "adapter_model.safetensors")
    assert "two tensors or fields of one name" in refusal(folder, adapter=adapter)
    twice(folder / SINGLE)
    assert "two tensors or fields of one name" in refusal(folder)


def test_names_of_tensors_do_not_reach_the_terminal_raw(folder):
    tensors = load_file(folder / SINGLE)
    more = {f"\x1b[31m{i}" + "x" * 5000: np.zeros(1, np.float32) for i in range(500)}
    save_file({**tensors, **more}, folder / SINGLE)
    with pytest.raises(ModelError) as caught:
        model_folder.open_folder(folder)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 100_000
    assert str(caught.value).endswith("and 300 more")


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (
            lambda n: "base_model.model." + n.replace("q_proj.", "q_proj.base_layer."),
            "a state of PEFT's wrapper, with an adapter in it",
        ),
        (lambda n: n.replace(".weight", ".qweight"), "Its weights are quantised"),
    ],
)
def test_what_the_names_tell_is_said(folder, rename, hint):
    save_file({rename(n): t for n, t in load_file(folder / SINGLE).items()}, folder / SINGLE)
    assert hint in refusal(folder)


def test_a_wrapper_of_deepspeed_is_read(folder):
    tensors = load_file(folder / SINGLE)
    save_file({"_forward_module." + n: t for n, t in tensors.items()}, folder / SINGLE)
    assert model_folder.open_folder(folder)


# Links


def test_links_that_lead_out_are_not_copied(folder, tmp_path):
    (tmp_path / "id_rsa").write_text("PRIVATE")
    (tmp_path / "elsewhere").mkdir()
    (folder / "notes.txt").symlink_to(tmp_path / "id_rsa")
    (folder / "within.txt").symlink_to("config.json")
    names = [f.name for f in folder_files.companions(folder)]
    assert names == ["tokenizer.json", "within.txt"]
    assert folder_files.foreign_links(folder) == ["notes.txt"]
    (tmp_path / "link").symlink_to(folder)  # a folder that is itself reached through a link
    assert [f.name for f in folder_files.companions(tmp_path / "link")] == names


def test_links_of_a_hub_cache_are_its_files(folder, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, cache / "blobs" / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    (snapshot / "notes.txt").symlink_to(tmp_path / "id_rsa")
    (tmp_path / "id_rsa").write_text("PRIVATE")
    assert [f.name for f in folder_files.companions(snapshot)] == ["tokenizer.json"]
    opened, plain = model_folder.open_folder(snapshot), model_folder.open_folder(folder)
    assert opened.identity == plain.identity


def test_saving_a_model_copies_no_foreign_link(folder, tmp_path):
    (tmp_path / "id_rsa").write_text("PRIVATE")
    (folder / "notes.txt").symlink_to(tmp_path / "id_rsa")
    opened = model_folder.open_folder(folder)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), opened.abstract_params)
    saving.save_folder(
        tmp_path / "out", zeros, opened.model, opened.config, folder, opened.family.weights
    )
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


# Adapters


@pytest.fixture
def adapter(tmp_path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.transformer.blocks.0.q_proj.lora_{}.weight"
    ones = {"A": np.ones((2, 16), np.float32), "B": np.ones((16, 2), np.float32)}
    save_file(
        {name.format(side): x for side, x in ones.items()}, path / "adapter_model.safetensors"
    )
    return path


EVIL = r"([a-z._0-9]+)+!"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        *(({"lora_alpha": x}, "unusable rank or alpha") for x in (10**400, 1e300, True, "4", [4])),
        ({"lora_alpha": float("nan")}, "unusable rank or alpha"),
        ({"lora_alpha": float("inf")}, "unusable rank or alpha"),
        *(({"r": x}, "unusable rank or alpha") for x in (0, -2, True, "2", 2.0, 10**400, None)),
        *(({"use_rslora": x}, "use_rslora is") for x in ("no", 0, None, [])),
        ({"rank_pattern": {EVIL: 2}}, "expected a module's name, or a regular expression"),
        ({"alpha_pattern": {EVIL: 2}}, "expected a module's name, or a regular expression"),
        ({"alpha_pattern": {"(a|a)" * 4: 2}}, "expected a module's name"),
        ({"alpha_pattern": {".*.*.*.*x": 2}}, "expected a module's name"),
        ({"alpha_pattern": {"(a+)+": 2}}, "expected a module's name"),
        ({"alpha_pattern": {"q_proj": 1e39}}, "which is no float32"),
        ({"rank_pattern": [1]}, "expected an object"),
        ({"rank_pattern": {"[": 2}}, "expected a module's name"),
        ({"lora_bias": True, "x" * 999: "\x1b" * 999}, "lora_bias is True"),
    ],
)
def test_an_adapter_whose_config_cannot_be_is_refused(folder, adapter, changes, complaint):
    assert model_folder.open_folder(folder, adapter=adapter).adapter
    edit(adapter / "adapter_config.json", **changes)
    assert complaint in refusal(folder, adapter=adapter)


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("q_proj", True),
        ("blocks.0.q_proj", True),
        (r".*\.0\.q_proj", True),
        (r"model\.transformer\.blocks\.\d+\.(q_proj|v_proj)", True),
        (r"^model.transformer.blocks.[0-9]+.q_proj", True),
        ("(?:q|k)_proj$", True),
        ("v_proj", False),
        ("proj", False),
        (r"blocks\.(1|2)\..*", False),
    ],
)
def test_patterns_mean_what_they_mean_to_peft(folder, adapter, pattern, fits):
    edit(adapter / "adapter_config.json", alpha_pattern={pattern: 8})
    (pair,) = model_folder.open_folder(folder, adapter=adapter).adapter.values()
    assert np.asarray(pair[1]).max() == (4.0 if fits else 2.0)


def test_the_slowest_patterns_that_are_read_take_no_time():
    start, module = time.monotonic(), "model.layers.61.mlp.experts.383.shared.down_proj"
    for key in (".*.+(|.|a|[a-z])Z", "(a|.|a)(.|a|.).*Z", ".*.*.*Z", "[a-z.]+[a-z.]+Z"):
        assert not adapter_patterns.compiled(key).match(module)
    assert time.monotonic() - start < SECONDS


def test_many_patterns_are_read_if_they_are_names(folder, adapter):
    names = {f"blocks.{i}.q_proj": 8 for i in range(10_000, 0, -1)}
    edit(adapter / "adapter_config.json", alpha_pattern=names)
    assert model_folder.open_folder(folder, adapter=adapter)
    edit(adapter / "adapter_config.json", alpha_pattern={f"a{i}.*": 1 for i in range(17)})
    assert "more than 16 keys are regular" in refusal(folder, adapter=adapter)


@pytest.mark.parametrize("content", [DEEP, "[]", "{"])
def test_an_adapter_whose_config_is_no_object_is_refused(folder, adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    assert "adapter_config.json: " in refusal(folder, adapter=adapter)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8, np.bool_])
def test_an_adapter_of_another_type_is_refused(folder, adapter, dtype):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    file = adapter / "adapter_model.safetensors"
    if dtype == ml_dtypes.float8_e4m3fn:
        import torch

        save_torch({n: t.to(torch.float8_e4m3fn) for n, t in load_torch(file).items()}, file)
    else:
        save_file({n: t.astype(dtype) for n, t in load_file(file).items()}, file)
    assert refusal(folder, adapter=adapter)


@pytest.mark.parametrize(("side", "value"), [("A", np.nan), ("B", np.inf), ("B", 3e38)])
def test_an_adapter_that_is_not_finite_is_refused(folder, adapter, side, value):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if f"lora_{side}" in name)][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(ModelError, match="its B or their scale is not finite"):
        model_folder.open_folder(folder, adapter=adapter)


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("orbax", [True, False])
def test_weights_that_change_behind_their_identity_are_refused(
    tmp_path: Path, orbax: bool, replaced: bool
):
    """A trainer that saves over a checkpoint: in place, or by a new file of the same name."""
    path = tiny.folder(tmp_path / "a")
    if orbax:
        path = convert.to_orbax(path, tmp_path / "b", quiet=True).out
    folder = model_folder.open_folder(path)
    assert folder.identity
    file = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    times = file.stat()
    written = file.with_name("new") if replaced else file
    written.write_bytes(content)
    written.replace(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p and rsync -t do
    with pytest.raises(ModelError, match="have changed since they were opened"):
        loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize("extra", ["model.safetensors", "model-00009-of-00009.safetensors"])
@pytest.mark.parametrize("converted", [True, False])
def test_a_folder_with_two_sets_of_weights_is_refused(tmp_path: Path, converted: bool, extra: str):
    """As a trainer leaves them that saves one file beside the shards that it started from."""
    single = tiny.folder(tmp_path / "single")
    if converted:
        path = convert.to_orbax(single, tmp_path / "path", quiet=True).out
    else:
        path = convert.to_hf(single, tmp_path / "path", max_shard_bytes=4096, quiet=True).out
    model_folder.open_folder(path)
    shutil.copy(single / SINGLE, path / extra)
    with pytest.raises(ModelError, match="two sets of weights") as caught:
        model_folder.open_folder(path)
    assert extra in str(caught.value)


def test_an_adapter_inside_a_model_folder_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds a LoRA adapter" in refusal(folder)
