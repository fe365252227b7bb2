"""Folders without `tokenizer.json` are read by the class that they name, or refused.

`experiments/tokenizer_agreement.py` compares 10,000 strings with transformers 4.57.1.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sama_jax.errors import ModelError
from sama_jax.texts import folder_tokenizer
from sama_jax.texts.tokenizer import TextTokenizer

TEXTS = [
    *tiny.texts(5),
    "def f(x):\n    return x ** 2  # 1234",
    "  two  spaces, don't I'LL \t\r\n\n ",
    "中文 日本語 😀👩‍👩‍👧 e\u0301 Å ﬁ İ ß \x00\x07\x7f\u200b\ufeff",
    "a<|endoftext|>b <|mask|> c<mask> <s>[MASK]",
    "",
]
FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)


def write(folder: Path, name: str | None, added: tuple[str, ...] = (), **config: Any) -> Path:
    """A folder of byte-level BPE whose config names a class."""
    folder.mkdir(exist_ok=True)
    model = json.loads(tiny.tokenizer().to_str())["model"]
    words = ("<s>", "<pad>", "</s>", "<unk>", "<mask>") if "Roberta" in str(name) else ()
    vocab = {t: i for i, t in enumerate([*words, *sorted(model["vocab"], key=model["vocab"].get)])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    if added:
        decoder = {
            len(vocab) + i: {"content": t, **FLAGS, "special": True} for i, t in enumerate(added)
        }
        config["added_tokens_decoder"] = decoder
    told = {**config} if name is None else {"tokenizer_class": name, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def wordpiece(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "def", "two", "spaces", "e"]
    words += [a + b for a in tiny.SYLLABLES for b in tiny.SYLLABLES][:40]
    (folder / "vocab.txt").write_text(
        "\n".join([*words, *(f"##{c}" for c in "abcdefgx1234")]) + "\n"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ids(folder: Path) -> list[list[int]]:
    read = TextTokenizer.from_folder(folder, None)
    return [found.ids.tolist() for found in read.encode(TEXTS, 2**12)]


def theirs(folder: Path, name: str) -> list[list[int]]:
    return getattr(transformers, name).from_pretrained(str(folder))(TEXTS)["input_ids"]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "Qwen2Tokenizer"])
def test_byte_level_bpe_is_what_its_class_gives(name, tmp_path):
    added = ("<|endoftext|>", "<|mask|>", "<s>")
    write(tmp_path, name, added, eos_token="<|endoftext|>", mask_token="<|mask|>")
    found = ids(tmp_path)
    assert found == theirs(tmp_path, name.removesuffix("Fast"))
    assert all(found[:-1])


def test_dreams_own_class_is_qwen2s(tmp_path):
    added = ("<|beginoftext|>", "<|endoftext|>", "<|mask|>")
    told = {"mask_token": "<|mask|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    own = {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    write(tmp_path / "dream", "DreamTokenizer", added, **told, **own)
    (tmp_path / "dream" / "tokenization_dream.py").write_text("raise SystemExit(1)")
    write(tmp_path / "qwen2", "Qwen2Tokenizer", added, **told)
    assert ids(tmp_path / "dream") == theirs(tmp_path / "qwen2", "Qwen2Tokenizer")


def test_a_class_that_no_file_names_is_that_of_the_model_type(tmp_path):
    write(tmp_path, None)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert ids(tmp_path) == theirs(tmp_path, "Qwen2Tokenizer")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert ids(tmp_path) == theirs(tmp_path, "GPT2Tokenizer")


def test_robertas_mask_takes_the_space_before_it(tmp_path):
    write(tmp_path, "RobertaTokenizer")
    read = TextTokenizer.from_folder(tmp_path, None)
    mask, (first, last) = read.token_id("<mask>"), (read.token_id(t) for t in ("<s>", "</s>"))
    (found,) = read.encode([" <mask> \n<mask>"], 99)
    assert found.ids.tolist() == [first, mask, mask, last]
    assert found.special[[0, -1]].all()


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_is_what_its_class_gives(lower, tmp_path):
    wordpiece(tmp_path, tokenizer_class="BertTokenizer", do_lower_case=lower)
    found = ids(tmp_path)
    assert found == theirs(tmp_path, "BertTokenizer")
    assert len(set(found[0])) > 5


def test_the_space_before_a_text_is_sentencepieces(tmp_path):
    """Version 5 of transformers leaves it out where a text begins with one."""
    (tmp_path / "tokenizer_config.json").write_text("{}")
    made = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2}, merges=[("▁", "a")]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # pyright: ignore
    made.decoder = decoders.Metaspace()  # pyright: ignore
    assert made.encode(" a").ids == [2]
    model = json.loads(made.model.__getstate__())
    folder_tokenizer._as_sentencepiece(made, model, {"legacy": False}, tmp_path)
    assert made.encode(" a").ids == [2]
    folder_tokenizer._as_sentencepiece(made, model, {}, tmp_path)
    assert made.encode(" a").ids == [0, 2]
    assert made.encode("a").ids == [2]
    with pytest.raises(ModelError, match="Unigram; only BPE"):
        folder_tokenizer._as_sentencepiece(made, {"type": "Unigram"}, {}, tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path, "LlamaTokenizer")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05\n")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "pip install 'sama-jax[sentencepiece]'" in refusal(tmp_path)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        TextTokenizer.from_folder(folder, None)
    said = str(caught.value)
    assert said.isprintable()
    return said


def test_other_classes_are_refused_by_name_and_never_run(tmp_path):
    own = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    write(tmp_path, "Qwen2Tokenizer", **own)
    (tmp_path / "tokenization_x.py").write_text("raise SystemExit(1)")
    said = refusal(tmp_path)
    assert "'XTokenizer', code of its own, which is never run; known are DreamTokenizer" in said
    write(tmp_path, "T5Tokenizer")
    assert "class is 'T5Tokenizer'; known are" in refusal(tmp_path)
    write(tmp_path, None)
    assert "class is None; known are" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("GPT2Tokenizer", {"add_bos_token": True}),
        ("Qwen2Tokenizer", {"add_prefix_space": True}),
        ("BertTokenizer", {"do_basic_tokenize": False}),
    ],
)
def test_fields_that_versions_follow_differently_are_refused(name, told, tmp_path):
    wordpiece(tmp_path)
    write(tmp_path, name, **told)
    ((field, value),) = told.items()
    assert f"{field} is {value}, which versions of transformers follow or not" in refusal(tmp_path)


def test_damaged_files_are_named(tmp_path):
    write(tmp_path, "Qwen2Tokenizer")
    (tmp_path / "merges.txt").unlink()
    assert "vocab.json without merges.txt" in refusal(tmp_path)
    write(tmp_path, "Qwen2Tokenizer")
    lines = (tmp_path / "merges.txt").read_text().split("\n")
    (tmp_path / "merges.txt").write_text("\n".join([*lines[:3], "#version: 0.3", *lines[3:]]))
    assert "merges.txt" in refusal(tmp_path)
    write(tmp_path, "Qwen2Tokenizer")
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "again": 0}))
    assert "vocab.json: expected a JSON object of tokens and their ids" in refusal(tmp_path)
    write(tmp_path, "Qwen2Tokenizer")
    (tmp_path / "vocab.json").write_bytes(b"\xff\xfe")
    assert "vocab.json: cannot be read" in refusal(tmp_path)
