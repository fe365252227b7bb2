"""Tokenizers that others made: what they may not change, and how they fail."""

import json
import os

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, models

from sama_jax.errors import DataError, ModelError
from sama_jax.texts import tokenizer_calls as module
from sama_jax.texts.tokenizer import TextTokenizer

TEXTS = tiny.texts(8)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(tiny.tokenizer(), "memory")


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SLOW = {"pattern": {"Regex": "(a+)+$"}}
"""Takes more attempts than the library allows; it panics."""


def replacing(content):
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def stored(**parts):
    """The JSON of a tokenizer with other parts."""
    raw = json.loads(tiny.tokenizer().to_str())
    model = {**raw["model"], **parts.pop("model", {})}
    return {**raw, "model": model, **parts}


def loaded_from(raw, rows=None):
    return TextTokenizer(Tokenizer.from_str(json.dumps(raw)), "memory", rows)


def template(ids):
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}},
    }


def test_a_tokenizer_draws_nothing(tokenizer):
    drawing = loaded_from(stored(model={"dropout": 0.9}))
    for a, b in zip(drawing.encode(TEXTS, 100), tokenizer.encode(TEXTS, 100)):
        np.testing.assert_array_equal(a.ids, b.ids)
    assert drawing.fingerprint == tokenizer.fingerprint
    pieces = [("<unk>", 0.0), *((p, -1.0) for p in ("a", "b", "ab", "ba", "aba", "bab", "abab"))]
    raw = Tokenizer(models.Unigram(pieces, 0, alpha=0.1, nbest_size=8))
    sampling = TextTokenizer(raw, "memory")
    assert len({tuple(sampling.encode(["abab" * 20], 99)[0].ids) for _ in range(9)}) == 1


@pytest.mark.parametrize("ids", [[320], [2**31], [2**32 - 1], [5, 320]])
@pytest.mark.parametrize("rows", [None, 320])
def test_ids_of_a_template_have_a_row(ids, rows):
    with pytest.raises(ModelError, match=rf"gives id {max(ids)}, but .* correct"):
        loaded_from(stored(post_processor=template(ids)), rows)


def test_ids_of_added_tokens_have_a_row():
    raw = tiny.tokenizer()
    raw.add_tokens(["karo"])
    number = raw.token_to_id("karo")
    assert number == raw.get_vocab_size() - 1
    with pytest.raises(ModelError, match=f"largest id is {number}, but the embedding has"):
        TextTokenizer(raw, "memory", number)
    known = TextTokenizer(raw, "memory", number + 1)
    assert known.encode(["karo"], 9)[0].ids.tolist() == [number]


@pytest.mark.parametrize(
    "change",
    [
        {"post_processor": template([1])},
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {**BYTES, "add_prefix_space": True}},
        {"model": {"ignore_merges": True}},
        {"model": {"merges": []}},
    ],
)
def test_a_fingerprint_changes_with_what_can_change_ids(change, tokenizer):
    assert loaded_from(stored(**change)).fingerprint != tokenizer.fingerprint


def test_a_fingerprint_sees_what_the_settings_do_not_say():
    plain, other = tiny.tokenizer(), tiny.tokenizer()
    other.encode_special_tokens = True
    assert plain.to_str() == other.to_str()
    a, b = (TextTokenizer(raw, "memory").fingerprint for raw in (plain, other))
    assert a != b


@pytest.mark.parametrize(
    "raw",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "<unk>"}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}},
        {
            "pre_tokenizer": {
                **BYTES,
                "type": "Split",
                **SLOW,
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"normalizer": {"type": "Replace", **SLOW, "content": ""}},
    ],
)
def test_a_tokenizer_that_fails_is_one_line_and_says_nothing_of_the_text(raw, capfd):
    failing = loaded_from({**json.loads(tiny.tokenizer().to_str()), **raw})
    with pytest.raises(ModelError, match="memory: the tokenizer fails") as caught:
        failing.encode(["a" * 60 + " secret"], 9)
    assert "secret" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert len(failing.fingerprint) == 64


def test_what_others_say_while_texts_are_tokenised_is_not_lost(tokenizer, capfd):
    def say(count):
        os.write(2, b"progress\n")

    tokenizer.encode(["x"], 9, say)
    with module.called("problem"):
        os.write(2, b"warning\n")
    assert capfd.readouterr().err == "progress\nwarning\n"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (stored(post_processor=template([1] * 2000)), "adds 2000 tokens to a text"),
        (stored(normalizer=replacing("a" * 2000)), "2,001 characters of one"),
        (stored(normalizer={"type": "Prepend", "prepend": "a" * 2000}), "2,001 characters of one"),
        (
            stored(normalizer={"type": "Sequence", "normalizers": [replacing("aa")] * 30}),
            "characters of one",
        ),
        (stored(model={"unk_token": "x" * 300}), "unk_token has 300 characters"),
    ],
)
def test_settings_that_multiply_a_text_are_refused(raw, words):
    with pytest.raises(ModelError, match=words):
        loaded_from(raw)


@pytest.fixture
def small(monkeypatch):
    """Makes texts long that take no second to tokenise."""
    monkeypatch.setattr(module, "WHOLE_BYTES", 2**15)
    monkeypatch.setattr(module, "STEP", 2**10)


@pytest.mark.usefixtures("small")
def test_a_long_text_is_tokenised_as_far_as_it_is_needed(tokenizer):
    text = " ".join(TEXTS) * 100
    assert len(text) > 3 * module.WHOLE_BYTES
    (whole,) = tokenizer.encode([text[: 2**14]], 2000)
    (found,) = tokenizer.encode([text], 2000)
    np.testing.assert_array_equal(found.ids, whole.ids)
    assert found[2:] == whole[2:]
    with pytest.raises(DataError, match=r"text 2 of 2 is too long .* 32,768 bytes"):
        tokenizer.encode(["short", text], 2**31 - 1)


@pytest.mark.usefixtures("small")
def test_a_text_that_a_normaliser_lengthens_counts_as_long_as_it_becomes():
    grows = loaded_from(stored(normalizer=replacing("b" * 500)))
    assert grows.encode(["a" * 60], 99_999)[0].characters == 60
    with pytest.raises(DataError, match="too long"):
        grows.encode(["a" * 2000], 2**31 - 1)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
def test_a_pipe_in_a_folder_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=f"{name} is no regular file"):
        TextTokenizer.from_folder(tmp_path, None)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "{", "", "\udcff"])
def test_a_file_that_is_no_tokenizer(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"json: not a usable tokenizer file \(.*\)$") as caught:
        TextTokenizer.from_folder(tmp_path, None)
    assert "\n" not in str(caught.value)
