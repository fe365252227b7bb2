"""GGUF files are the same models as the folders that they were made from, or are refused."""

import builtins
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import jax
import numpy as np
import pytest
import tiny
from fuzz import seeds

from checkpoints_convert import convert, describe
from sama_jax import gguf_header
from sama_jax.errors import ModelError
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import loading, model_folder
from sama_jax.weights.gguf_source import GgufTensor

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
WIDE = {**seeds.DECODER, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**seeds.DECODER, "model_type": "llama"},
    "llama with biases": {
        **seeds.DECODER, "model_type": "llama", "attention_bias": True, "mlp_bias": True
    },
    "qwen2": {**seeds.DECODER, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**seeds.DECODER, "model_type": "qwen3"},
    "dream": seeds.CONFIGS["dream"],
    "llada": tiny.config(n_layers=2, n_heads=4, include_qkv_bias=True, weight_tying=False),
}  # fmt: skip
LONGER = {"max_position_embeddings": 10**6}
TYPES = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K")
TYPES += ("Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_S", "TQ1_0", "MXFP4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return seeds.model(tmp_path_factory.mktemp("gguf") / "llama", CONFIGS["llama"])


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Its rows hold whole blocks of every type."""
    return seeds.model(tmp_path_factory.mktemp("gguf") / "wide", {**WIDE, "model_type": "llama"})


def opened(path: Path, **options: Any) -> model_folder.ModelFolder:
    return model_folder.open_folder(path, dtype="float32", **options)


def refusal(path: Path) -> str:
    """What refuses a file, in one line and soon."""
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        opened(path)
    assert time.monotonic() - start < 5
    said = str(caught.value).split("\n")[0]
    assert said.isprintable()
    assert path.name in said
    return said


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_is_the_model_that_it_was_made_from(name, tmp_path):
    made = seeds.model(tmp_path / "folder", CONFIGS[name])
    path = gguf_files.write(tmp_path / "model.gguf", made, name.split(" ")[0])
    ours, theirs = opened(path), opened(made)
    assert ours.family.arch == theirs.family.arch
    assert ours.family.kind == theirs.family.kind
    assert ours.model.mask_id == theirs.model.mask_id
    a, b = (loading.load(model, ONE_DEVICE) for model in (ours, theirs))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_dequantised_bit_for_bit_as_by_the_package(kind, wide, tmp_path):
    rows = ("token_embd", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.ffn_up")
    kinds = {f"{name}.weight": kind for name in rows}
    path = gguf_files.write(tmp_path / "model.gguf", wide, "llama", kinds=kinds)
    source = opened(path).source
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in source.tensors.values():
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(stored[tensor.name].data, stored[tensor.name].tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            order = gguf_files.paired(np.arange(len(expected)), len(expected) // 8)
            expected = expected[np.argsort(order)]
        window = gguf_window(source, tensor.name)
        same(window[:,] if expected.ndim == 1 else window[:, :], expected)
        if expected.ndim == 2:
            same(window[3:7, :], expected[3:7])
            same(window[:, 10:11], expected[:, 10:11])


def gguf_window(source: Any, name: str) -> GgufTensor:
    (file,) = source._handles.values()
    return file.get_slice(name)


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal in every bit, NaN too, but for the type of halves that are not widened yet."""
    assert actual.shape == expected.shape
    assert np.array_equal(actual.astype(np.float32).view(np.uint32), expected.view(np.uint32))


def test_more_rows_than_are_dequantised_at_once_are_read(wide, tmp_path, monkeypatch):
    path = gguf_files.write(tmp_path / "a.gguf", wide, "llama", kinds={"token_embd.weight": "Q4_1"})
    source, name = opened(path).source, "model.embed_tokens.weight"
    whole = source.window(name, (slice(None), slice(None)))
    monkeypatch.setattr("sama_jax.weights.gguf_source.PIECE", 7 * 256)
    assert np.array_equal(source.window(name, (slice(None), slice(None))), whole)
    assert len(np.unique(whole)) > 1000


def test_the_identity_covers_weights_and_metadata_but_not_the_place(folder, tmp_path):
    def identity(name: str, **changes: Any) -> str:
        (tmp_path / name).mkdir()
        return opened(
            gguf_files.write(tmp_path / name / "m.gguf", folder, "llama", **changes)
        ).identity

    first = identity("a")
    assert identity("b") == first
    others = [
        identity("c", tokenizer={"pre": "qwen2"}),
        identity("d", fields={"llama.rope.freq_base": 5e5}),
        identity("e", kinds={"blk.0.ffn_up.weight": "F16"}),
    ]
    assert len({first, *others}) == 4


def test_a_folder_with_one_file_is_that_file(folder, tmp_path):
    gguf_files.write(tmp_path / "m.gguf", folder, "llama")
    assert opened(tmp_path).identity == opened(tmp_path / "m.gguf").identity
    shutil.copy(tmp_path / "m.gguf", tmp_path / "n.gguf")
    with pytest.raises(ModelError, match="2 GGUF files"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "tf_model.h5"])
def test_other_weights_beside_a_file_are_refused(name, folder, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", folder, "llama")
    (tmp_path / name).write_bytes(b"another model")
    with pytest.raises(ModelError, match=f"two sets of weights: m.gguf and {name}"):
        opened(tmp_path)
    opened(path)


def test_a_config_beside_a_file_may_say_how_it_is_used_and_nothing_else(folder, tmp_path):
    gguf_files.write(tmp_path / "m.gguf", folder, "llama")
    config = {**seeds.DECODER, "model_type": "a2d-llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert opened(tmp_path).family.kind == "diffusion"
    assert opened(tmp_path / "m.gguf").family.kind == "autoregressive"
    for change in ({"rope_theta": 5e5}, {"num_attention_heads": 1}, {"rms_norm_eps": 1e-5}, LONGER):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match="does not fit"):
            opened(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config()))
    with pytest.raises(ModelError, match="tells of a llada"):
        opened(tmp_path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama_3_are_its_scaling(factor, tmp_path):
    scaling = {**seeds.LLAMA3, "factor": factor, "original_max_position_embeddings": 8192}
    config = {**WIDE, "head_dim": 128, "model_type": "llama", "rope_parameters": scaling}
    made = seeds.model(tmp_path / "folder", config)
    factors = llama3_factors(128, factor)
    path = tmp_path / "m.gguf"
    gguf_files.write(path, made, "llama", tensors={"rope_freqs.weight": factors})
    assert opened(path).family.arch == opened(made).family.arch
    for wrong in (factors * np.float32(1.001), np.flip(factors), factors[:4], -factors):
        gguf_files.write(path, made, "llama", tensors={"rope_freqs.weight": wrong.copy()})
        assert "rope_freqs" in refusal(path)


def llama3_factors(size: int, factor: float) -> np.ndarray:
    """What each frequency is divided by, by the words of the paper's code: three cases."""
    found = []
    for j in range(size // 2):
        length = 2 * np.pi * 10000.0 ** (2 * j / size)
        blend = (8192 / length - 1) / 3
        middle = 1 / ((1 - blend) / factor + blend)
        found.append(1.0 if length < 2048 else factor if length > 8192 else middle)
    return np.array(found, np.float32)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another network": ({"general.architecture": "gemma3"}, "its architecture is 'gemma3'"),
    "scaled rope": ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
    "a window": ({"llama.attention.sliding_window": 512}, "attention.sliding_window is 512"),
    "a scale": ({"llama.attention.scale": 1.0}, "attention.scale is 1.0"),
    "scaled logits": ({"llama.logit_scale": 0.5}, "logit_scale is 0.5"),
    "half rotation": ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4"),
    "smaller values": ({"llama.attention.value_length": 4}, "value_length is 4"),
    "experts": ({"llama.expert_count": 8}, "expert_count is 8"),
    "open attention": ({"llama.attention.causal": False}, "attention.causal is False"),
    "other rows": ({"llama.vocab_size": 299}, "vocab_size is 299"),
    "no norm": ({"llama.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is None"),
    "heads a layer": ({"llama.attention.head_count": [2, 2]}, "head_count is [2, 2]"),
    "too many heads": ({"llama.attention.head_count": 3}, "do not fit"),
    "a part": ({"split.count": 3}, "one of 3 parts"),
    "an adapter": ({"general.type": "adapter"}, "general.type is 'adapter'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_that_change_the_network_are_refused_by_name(case, folder, tmp_path):
    fields, expected = REFUSED[case]
    name = fields.pop("general.architecture", "llama")
    path = gguf_files.write(tmp_path / "m.gguf", folder, name, fields=fields)
    assert expected in refusal(path)


def test_neutral_metadata_change_nothing(folder, tmp_path):
    fields = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.scaling.original_context_length": 4096,
        "llama.logit_scale": 1.0,
        "llama.attention.causal": True,
        "llama.vocab_size": tiny.VOCAB,
        "llama.rope.dimension_count": 8,
        "llama.tensor_data_layout": "Meta AI original pth",
        "general.quantization_version": 2,
        "split.count": 1,
    }
    path = gguf_files.write(tmp_path / "m.gguf", folder, "llama", fields=fields)
    assert opened(path).family.arch == opened(folder).family.arch


# --- files that were made to do harm --------------------------------------------------------------


def header(*, tensors: int = 0, fields: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    start = (
        struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    )
    return start + struct.pack("<IQ", kind, offset)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends before"),
    "another format": (b"GGML" + b"\0" * 40, "begins with b'GGML'"),
    "an old version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "a claim of fields": (header(fields=2**60), "1,152,921,504,606,846,976 fields"),
    "a claim of tensors": (header(tensors=2**60), "tensors, expected at most"),
    "a cut header": (header(fields=1), "ends before"),
    "a long string": (header(fields=1, rest=field(b"a", 8, b"\xff" * 8)), "a text of"),
    "no text": (header(fields=1, rest=field(b"a", 8, struct.pack("<Q", 1) + b"\xff")), "decode"),
    "a long list": (header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 8, 2**60))), "strings"),
    "short strings": (
        header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 8, 2**20 + 1) + bytes(2**23 + 8))),
        "1,048,577 strings",
    ),
    "a list that ends": (header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 8, 9))), "ends"),
    "long numbers": (header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 4, 2**60))), "ends"),
    "lists of lists": (header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 9, 1))), "type 9"),
    "an unknown type": (header(fields=1, rest=field(b"a", 13, b"")), "type 13"),
    "a field twice": (header(fields=2, rest=2 * field(b"a", 0, b"1")), "a is there twice"),
    "a tensor twice": (header(tensors=2, rest=2 * tensor(b"a", (1,))), "tensor a is there twice"),
    "many axes": (header(tensors=1, rest=tensor(b"a", (1,) * 5)), "5 axes"),
    "a long name": (header(tensors=1, rest=tensor(b"a" * 65, (1,))), "65 bytes"),
    "an odd place": (header(tensors=1, rest=tensor(b"a", (1,), offset=1)), "multiple of 32"),
    "odd alignment": (header(fields=1, rest=field(b"general.alignment", 4, bytes(4))), "is 0"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_is_not_sound_is_refused(case, tmp_path):
    content, expected = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(content)
    assert expected in refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shape": (2**40, 2**20)}, "ends at byte"),
        ({"shape": (2**62, 2**62)}, "ends at byte"),
        ({"shape": (0, 16)}, "expected one axis or two"),
        ({"shape": (16, 24, 1)}, "expected one axis or two"),
        ({"kind": 99}, "type 99"),
        ({"kind": 4}, "type 4"),
        ({"kind": 24}, "type I8"),
        ({"kind": 12}, "multiple of 256"),
        ({"start": 0}, "another tensor"),
        ({"start": 2**50}, "ends at byte"),
    ],
)
def test_a_tensor_without_a_place_is_refused(change, expected, folder, tmp_path, monkeypatch):
    path = gguf_files.write(tmp_path / "m.gguf", folder, "llama")
    found = gguf_header.read_header(path)
    name = "blk.1.ffn_up.weight"
    if change.get("start") == 0:
        change = {"start": found.tensors["output_norm.weight"].start}
    spoilt = {**found.tensors, name: found.tensors[name]._replace(**change)}
    monkeypatch.setattr(gguf_header, "read_header", lambda _: found._replace(tensors=spoilt))
    assert expected in refusal(path)


def test_every_beginning_of_a_file_is_refused(folder, tmp_path):
    content = gguf_files.write(tmp_path / "m.gguf", folder, "llama").read_bytes()
    draw = np.random.default_rng(0)
    for size in [*draw.integers(0, len(content), 30), len(content) - 40]:
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        refusal(tmp_path / "cut.gguf")


def test_without_the_package_one_line_says_what_to_install(folder, tmp_path, monkeypatch):
    path = gguf_files.write(tmp_path / "m.gguf", folder, "llama")
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'sama-jax[gguf]'" in refusal(path)


# --- what is made of a file -----------------------------------------------------------------------


def test_to_hf_writes_the_folder_that_it_was_made_from(folder, tmp_path):
    (tmp_path / "in").mkdir()
    path = gguf_files.write(tmp_path / "in" / "m.gguf", folder, "llama")
    (tmp_path / "in" / "LICENSE").write_text("free")
    for name, source in (("alone", path), ("folder", path.parent)):
        convert.to_hf(source, tmp_path / name, quiet=True)
        out = opened(tmp_path / name)
        assert out.family.arch == opened(folder).family.arch
        a, b = (loading.load(model, ONE_DEVICE) for model in (out, opened(folder)))
        assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
        texts = [*tiny.texts(5), "a 12  3\n\n4 <|endoftext|> é 中"]
        first, again = (TextTokenizer.from_folder(p, tiny.VOCAB) for p in (path, tmp_path / name))
        assert first.fingerprint == again.fingerprint
        for x, y in zip(first.encode(texts, 99), again.encode(texts, 99)):
            assert x.ids.tolist() == y.ids.tolist()
    assert (tmp_path / "folder" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "alone" / "LICENSE").exists()
    assert not list(tmp_path.rglob("folder/*.gguf"))
    assert describe.describe(tmp_path / "alone")["loadable"]


def test_to_hf_keeps_a_tokenizer_beside_the_file(folder, tmp_path):
    (tmp_path / "in").mkdir()
    changes = {"pre": "another"}
    gguf_files.write(tmp_path / "in" / "m.gguf", folder, "llama", tokenizer=changes)
    assert "another" in describe.describe(tmp_path / "in")["refused"][0]
    shutil.copy(folder / "tokenizer.json", tmp_path / "in")
    convert.to_hf(tmp_path / "in", tmp_path / "out", quiet=True)
    assert describe.describe(tmp_path / "out")["refused"] == []
    first, again = (TextTokenizer.from_folder(tmp_path / p, tiny.VOCAB) for p in ("in", "out"))
    assert first.fingerprint == again.fingerprint


def test_an_interrupted_conversion_is_started_over(folder, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", folder, "llama")
    convert.to_orbax(path, tmp_path / "out", quiet=True)
    (tmp_path / "out" / "config.json").unlink()
    convert.to_orbax(path, tmp_path / "out", quiet=True)
    assert convert.to_orbax(path, tmp_path / "out", quiet=True).bytes_written == 0
    assert opened(tmp_path / "out").family.arch == opened(path).family.arch


def test_inspect_says_what_a_file_is(folder, tmp_path):
    fields = {"general.license": "apache-2.0"}
    path = gguf_files.write(tmp_path / "m.gguf", folder, "llama", fields=fields)
    found = describe.describe(path)
    assert found["loadable"]
    assert (found["storage"], found["licence"]) == ("gguf", "apache-2.0")
    assert found["stored_dtypes"] == {"float32": 21}
