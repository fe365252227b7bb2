"""Tokenizers made of a GGUF file's metadata give the ids that transformers' own classes give."""

import json
import random
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import tiny
from fuzz import seeds
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from sama_jax.errors import ModelError
from sama_jax.gguf_header import Header
from sama_jax.texts import gguf_tokenizer
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.special_tokens import tokenizer_mask

PIECES = ["a", "B", " ", "  ", "\n", "\r\n", "\t", "1", "23", "4567", "'s", "'LL", "é", "e\u0301"]
PIECES += [
    "中",
    "文字",
    "😀",
    "👩\u200d👧",
    ".",
    "...",
    "_x",
    "²",
    "½",
    "\0",
    "\x07",
    "\u00a0",
    "ß",
]
PIECES += ["def f(x):\n    return x", " the ", "\ufb01", "ﷺ", "İ", "٣", "\u200b", "don't", "\n\n1."]
PIECES += ["<|end|>", "ß"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


def strings(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A byte-level BPE whose merges cross every boundary that a splitting may draw."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=8,
    )
    made.train_from_iterator([s.replace("<|end|>", "") for s in strings(400, seed=1)], trainer)
    model = json.loads(made.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def fields(trained: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The metadata of that tokenizer, with one special token at its end."""
    tokens = [*trained["vocab"], "<|end|>"]
    return {
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 1) + [3],
        "merges": [" ".join(pair) for pair in trained["merges"]],
        "bos_token_id": len(tokens) - 1,
        "eos_token_id": len(tokens) - 1,
        "mask_token_id": None,
        **changes,
    }


def ours(trained: dict[str, Any], **changes: Any) -> TextTokenizer:
    made = gguf_files.vocabulary(**fields(trained, **changes))
    found = {k: np.array(v) if k.endswith("token_type") else v for k, v in made.items()}
    plain = {k: v for k, v in found.items() if v is not None}
    return TextTokenizer(gguf_tokenizer.build(Header(Path("m.gguf"), plain, {}, 0)), "m.gguf")


def ids(tokenizer: TextTokenizer, texts: list[str]) -> list[list[int]]:
    return [encoded.ids.tolist() for encoded in tokenizer.encode(texts, 10**4)]


def theirs(kind: str, trained: dict[str, Any]) -> Tokenizer:
    made = (Qwen2Tokenizer if kind == "qwen2" else GPT2Tokenizer)(**trained).backend_tokenizer
    made.add_special_tokens(["<|end|>"])
    if kind == "smollm":
        made.pre_tokenizer = DIGITS  # pyright: ignore
    return made


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2"])
def test_ids_are_those_of_the_class_of_transformers(kind, trained):
    trained = {**trained, "vocab": {**trained["vocab"], "<|endoftext|>": len(trained["vocab"])}}
    texts, their = strings(1000), theirs(kind, trained)
    expected = [encoded.ids for encoded in their.encode_batch(texts)]
    own = ours(trained, pre=kind)
    end, last = their.token_to_id("<|end|>"), own.token_id("<|end|>")
    expected = [[last if i == end else i for i in row] for row in expected]
    assert ids(own, texts) == expected
    others = {"gpt-2", "smollm", "qwen2", "llama-bpe"} - {kind}
    assert all(ids(ours(trained, pre=k, add_bos_token=False), texts) != expected for k in others)


def test_ids_are_those_that_transformers_reads_from_the_file(trained, tmp_path):
    folder = seeds.model(tmp_path / "llama", {**seeds.DECODER, "model_type": "llama"})
    told = fields(trained, pre="llama-bpe", add_bos_token=True)
    gguf_files.write(tmp_path / "m.gguf", folder, "llama", tokenizer=told)
    their = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").backend_tokenizer
    their.model.ignore_merges = True  # as in Llama 3's own tokenizer.json
    texts = strings(1000)
    own = TextTokenizer.from_folder(tmp_path / "m.gguf", None)
    assert ids(own, texts) == [encoded.ids for encoded in their.encode_batch(texts)]


def test_llama_takes_words_of_the_vocabulary_whole_and_begins_texts_unless_told(trained):
    more = {**trained, "vocab": {**trained["vocab"], "qqzz": len(trained["vocab"])}}
    word, end = len(trained["vocab"]), len(trained["vocab"]) + 1
    assert ids(ours(more, pre="llama-bpe"), ["qqzz"]) == [[end, word]]
    assert ids(ours(more, pre="llama-bpe", add_bos_token=False), ["qqzz"]) == [[word]]
    told = ours(more, pre="qwen2", add_bos_token=True, add_eos_token=True)
    (row,) = ids(told, ["qqzz"])
    assert row[0] == row[-1] == end
    assert len(row) > 3
    assert told.encode(["qqzz"], 99)[0].special.tolist() == [True, *[False] * (len(row) - 2), True]
    assert end not in ids(ours(more, pre="qwen2"), ["qqzz"])[0]


def test_tokens_that_users_added_are_found_in_texts_and_unused_rows_are_none(trained):
    told = fields(trained)
    told["token_type"][-1] = 4
    told |= {"tokens": [*told["tokens"], "[PAD]"], "token_type": [*told["token_type"], 5]}
    own = ours(trained, **told)
    last = len(told["tokens"]) - 2
    assert ids(own, ["a<|end|>"])[0][-1] == last
    assert own.encode(["<|end|>"], 9)[0].special.tolist() == [False]
    assert own.decode([[last]]) == ["<|end|>"]
    assert ours(trained).decode([[last]]) == [""]  # there it is a special one
    assert own.max_id == last
    assert own.token_id("[PAD]") is None


MANY = {"tokens": [f"<{i}>" for i in range(2**14 + 1)], "token_type": [3] * (2**14 + 1)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sentencepiece": ({"model": "llama"}, "its tokenizer is 'llama'"),
    "another splitting": ({"pre": "deepseek-coder"}, "the splitting 'deepseek-coder'"),
    "no splitting": ({"pre": None}, "the splitting None"),
    "other kinds": ({"token_type": [6] * 300}, r"kinds \[6\]"),
    "too few kinds": ({"token_type": [1]}, "1 kinds of tokens"),
    "a token twice": ({"tokens": ["a"] * 300, "token_type": [1] * 300}, "two tokens of one text"),
    "no such end": ({"add_eos_token": True, "eos_token_id": 300}, "eos, whose id is 300"),
    "many special ones": (MANY, "16,385 special and added tokens"),
    "a prefix": ({"add_space_prefix": True}, "add_space_prefix is True"),
    "a normaliser": ({"normalizer.lowercase": True}, "normalizer.lowercase is True"),
    "no list": ({"merges": "a b"}, "merges is 'a b'"),
    "no merges": ({"merges": None}, "has no tokenizer.ggml.merges"),
    "no merge": ({"merges": ["a"]}, "cannot be used"),
    "unknown merges": ({"merges": ["zz qq"]}, "cannot be used"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gguf-tokenizer")
    return seeds.model(root / "llama", {**seeds.DECODER, "model_type": "llama"})


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizers_that_are_not_read_are_refused_by_name(case, folder, tmp_path):
    changes, expected = REFUSED[case]
    path = gguf_files.write(tmp_path / "m.gguf", folder, "llama", tokenizer=changes)
    with pytest.raises(ModelError, match=expected) as caught:
        TextTokenizer.from_folder(path, tiny.VOCAB)
    assert "\n" not in str(caught.value)


def test_fields_that_change_no_id_are_let_pass(folder, tmp_path):
    told = {"add_space_prefix": False, "eot_token_id": 0, "scores": [0.0] * tiny.VOCAB}
    path = gguf_files.write(tmp_path / "m.gguf", folder, "llama", tokenizer=told)
    plain = gguf_files.write(tmp_path / "n.gguf", folder, "llama")
    first, second = (TextTokenizer.from_folder(p, tiny.VOCAB).fingerprint for p in (path, plain))
    assert first == second


def test_what_the_converter_says_of_llada_is_not_believed(tmp_path):
    made = tiny.folder(tmp_path / "llada")
    path = gguf_files.write(tmp_path / "m.gguf", made, "llada")
    with pytest.raises(ModelError, match=r"tokenizer\.json beside the file"):
        TextTokenizer.from_folder(path, tiny.VOCAB)


def test_a_tokenizer_beside_the_file_is_read_if_it_has_the_same_tokens(folder, tmp_path):
    gguf_files.write(tmp_path / "m.gguf", folder, "llama", tokenizer={"pre": "deepseek-coder"})
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    own = TextTokenizer.from_folder(tmp_path, tiny.VOCAB)
    assert own.fingerprint == TextTokenizer.from_folder(folder, tiny.VOCAB).fingerprint
    tiny.tokenizer(seed=1).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="is it another model's tokenizer"):
        TextTokenizer.from_folder(tmp_path, tiny.VOCAB)


BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "a beginning": ({"add_bos_token": True, "bos_token_id": 0}, r"add_bos_token is True \(token 0"),
    "an end": ({"add_eos_token": True}, "add_eos_token is True .* does not add"),
    "merges": ({"merges": ["k a"]}, r"[2-9]\d+ merges, the file itself 1; merge 0 is"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_a_tokenizer_beside_the_file_has_its_merges_and_ends(case, folder, tmp_path):
    changes, expected = BESIDE[case]
    gguf_files.write(tmp_path / "m.gguf", folder, "llama", tokenizer=changes)
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=expected):
        TextTokenizer.from_folder(tmp_path, tiny.VOCAB)


def test_a_mask_that_is_named_beside_the_file_is_its_own(folder, tmp_path):
    gguf_files.write(tmp_path / "m.gguf", folder, "llama")
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "<|endoftext|>"}')
    with pytest.raises(ModelError, match=f"is {tiny.MASK_ID} by the GGUF file, but 0 by"):
        tokenizer_mask(tmp_path)


def test_the_mask_is_the_one_of_the_metadata_or_a_token_of_a_usual_name(folder, tmp_path):
    path = gguf_files.write(tmp_path / "a.gguf", folder, "llama")
    assert tokenizer_mask(path) == tiny.MASK_ID
    told = gguf_files.vocabulary()["tokenizer.ggml.tokens"]
    names = {"tokens": [*told[:-1], "<|mdm_mask|>"], "token_type": [1] * (len(told) - 1) + [3]}
    names |= {"mask_token_id": None}
    path = gguf_files.write(tmp_path / "b.gguf", folder, "llama", tokenizer=names)
    assert tokenizer_mask(path) == len(told) - 1
