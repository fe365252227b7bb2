"""What files beside `tokenizer.json` say of a tokenizer; the oracle is `transformers`."""

import json
import logging

import pytest
import tiny
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from sama_jax.errors import ModelError
from sama_jax.texts import tokenizer_config
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.special_tokens import tokenizer_mask

TEXTS = ["Karo mite", "", "a<|endoftext|>b", "a <X> b", "a<X>b", "É 中文 karo [X]", " x", "lxr"]
END = "<|endoftext|>"
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}

NAMED = {"__type": "AddedToken"}


def token(content, **flags):
    usual = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": True, **usual, **flags}


def bytes_pairs(*, space=False, begins=False, **added):
    """A byte-level BPE; `added` are the flags of a token <X>."""
    made = tiny.tokenizer()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)  # pyright: ignore
    if begins:
        made.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single=f"{END} $A", special_tokens=[(END, 0)]
        )
    raw = json.loads(made.to_str())
    if added:
        raw["added_tokens"].append({"id": 298, **token("<X>"), **added})
    return raw


def bert(**settings):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [
        *names,
        *["karo", "Karo", "mite", "é", "e", "É", "中", "文", "中文", "a", "A", "x", "lxr", "##x"],
    ]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.add_special_tokens(names)
    made.normalizer = normalizers.BertNormalizer(**settings)  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # pyright: ignore
    return json.loads(made.to_str())


def folder(path, raw, config, /, **others):
    files = {"tokenizer": raw, "tokenizer_config": config, **others}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def ids(tokenizer):
    return [encoded.ids.tolist() for encoded in tokenizer.encode(TEXTS, 99)]


def by_transformers(path):
    logging.getLogger("transformers").setLevel(50)
    return AutoTokenizer.from_pretrained(str(path))(TEXTS)["input_ids"]


GPT2, BERT = {"tokenizer_class": "GPT2TokenizerFast"}, {"tokenizer_class": "BertTokenizer"}
CONTRADICTIONS = {
    "add_prefix_space is True": (bytes_pairs(), GPT2 | {"add_prefix_space": True}),
    "add_prefix_space is False": (bytes_pairs(space=True), GPT2 | {"add_prefix_space": False}),
    "do_lower_case is False": (bert(), BERT | {"do_lower_case": False}),
    "do_lower_case is True": (bert(lowercase=False), BERT),
    "strip_accents is False": (bert(), BERT | {"strip_accents": False}),
    "strip_accents is True": (bert(strip_accents=False), BERT),
    "tokenize_chinese_chars is False": (bert(), BERT | {"tokenize_chinese_chars": False}),
    "tokenize_chinese_chars is True": (bert(handle_chinese_chars=False), BERT),
    "unk_token is": (bert(), BERT | {"unk_token": "[MASK]"}),
    "added_tokens_decoder has '<X>', but": (
        bytes_pairs(),
        PLAIN | {"added_tokens_decoder": {"0": token(END), "298": token("<X>")}},
    ),
    "mask_token has '<X>'": (bytes_pairs(), PLAIN | {"mask_token": "<X>"}),
    "pad_token has '<X>'": (bytes_pairs(), PLAIN | {"pad_token": NAMED | token("<X>")}),
    "additional_special_tokens has '<X>'": (
        bytes_pairs(),
        PLAIN | {"additional_special_tokens": ["<X>"]},
    ),
    "extra_special_tokens has '<X>'": (
        bytes_pairs(),
        PLAIN | {"extra_special_tokens": {"image_token": "<X>"}},
    ),
    **{
        f"'<X>' with {flag} True": (
            bytes_pairs(id=298),
            PLAIN | {"added_tokens_decoder": {"298": token("<X>", **{flag: True})}},
        )
        for flag in ("lstrip", "rstrip", "single_word")
    },
}


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_what_transformers_takes_from_the_config_is_in_tokenizer_json_too(said, tmp_path):
    raw, config = CONTRADICTIONS[said]
    folder(tmp_path, raw, config)
    read = TextTokenizer.from_file(tmp_path / "tokenizer.json", None)
    assert by_transformers(tmp_path) != ids(read)
    with pytest.raises(ModelError) as caught:
        TextTokenizer.from_folder(tmp_path, None)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tokenizer_config.json'}: ")
    assert said in message
    assert "save it again" in message
    assert "\n" not in message


@pytest.mark.parametrize("file", ["added_tokens", "special_tokens_map"])
def test_tokens_of_other_files_count_unless_the_config_lists_them(file, tmp_path):
    content = {"added_tokens": {"<X>": 298}, "special_tokens_map": {"mask_token": "<X>"}}[file]
    folder(tmp_path, bytes_pairs(), PLAIN, **{file: content})
    read = TextTokenizer.from_file(tmp_path / "tokenizer.json", None)
    assert by_transformers(tmp_path) != ids(read)
    with pytest.raises(ModelError, match=r"has '<X>', but tokenizer\.json adds no such token"):
        TextTokenizer.from_folder(tmp_path, None)
    folder(tmp_path, bytes_pairs(), PLAIN | {"added_tokens_decoder": {"0": token(END)}})
    assert by_transformers(tmp_path) == ids(TextTokenizer.from_folder(tmp_path, None))


@pytest.mark.parametrize(
    ("raw", "config", "said"),
    [
        (bytes_pairs(), {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, "bos"),
        (bytes_pairs(), {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, "eos"),
        (
            bytes_pairs(begins=True),
            {"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": False},
            "bos",
        ),
        (bytes_pairs(), PLAIN | {"add_prefix_space": True}, "prefix_space"),
    ],
)
def test_what_transformers_4_takes_from_the_config_is_in_tokenizer_json_too(
    raw, config, said, tmp_path
):
    # Version 4.57.1 gives other ids for each of these than 5.23.0, which reads tokenizer.json.
    folder(tmp_path, raw, {"bos_token": END, "eos_token": END, "unk_token": END} | config)
    with pytest.raises(ModelError, match=f"add_{said}_token is|add_{said} is"):
        TextTokenizer.from_folder(tmp_path, None)


@pytest.mark.parametrize("model", ["bert", "distilbert"])
@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": None, "mask_token": "[MASK]"}])
def test_a_class_that_only_the_model_names_has_its_defaults(model, config, tmp_path):
    folder(tmp_path, bert(lowercase=False), config, config={"model_type": model})
    if config is None:
        (tmp_path / "tokenizer_config.json").unlink()
    read = TextTokenizer.from_file(tmp_path / "tokenizer.json", None)
    assert by_transformers(tmp_path) != ids(read)
    with pytest.raises(ModelError, match=r"do_lower_case is True \(not stated: the default of"):
        TextTokenizer.from_folder(tmp_path, None)
    folder(tmp_path, bert(), config or {}, config={"model_type": model})
    assert ids(TextTokenizer.from_folder(tmp_path, None)) == by_transformers(tmp_path)


NAMED_ENDS = {"bos_token": END, "eos_token": END, "unk_token": END}


@pytest.mark.parametrize(
    ("begins", "config", "model", "field"),
    [
        (False, NAMED_ENDS | {"tokenizer_class": "LlamaTokenizer"}, {}, "add_bos_token is True"),
        (False, NAMED_ENDS | {"tokenizer_class": "CodeLlamaTokenizerFast"}, {}, "add_bos_token"),
        (False, NAMED_ENDS | {"tokenizer_class": "GemmaTokenizer"}, {}, "add_bos_token"),
        (False, NAMED_ENDS, {"tokenizer_class": "CohereTokenizerFast"}, "add_bos_token"),
        (False, NAMED_ENDS, {"model_type": "llama"}, "add_bos_token is True"),
        (True, {"tokenizer_class": "GPTNeoXTokenizerFast"}, {}, "add_bos_token is False"),
    ],
)
def test_a_class_that_begins_texts_unless_told_must_be_told(begins, config, model, field, tmp_path):
    # Version 4.57.1 gives other ids for each of these than 5.23.0, which reads tokenizer.json.
    folder(tmp_path, bytes_pairs(begins=begins), config, config=model)
    with pytest.raises(ModelError, match=rf"{field}.*\(not stated: the default of") as caught:
        TextTokenizer.from_folder(tmp_path, None)
    assert "state the same in the other file" in str(caught.value)
    eos = {"eos_token": None}  # the same token begins and ends
    told = config | eos | {"add_bos_token": begins, "bos_token": END}
    folder(tmp_path, bytes_pairs(begins=begins), told, config=model)
    TextTokenizer.from_folder(tmp_path, None)


def test_an_end_that_is_told_for_needs_no_name(tmp_path):
    # 4.57.1 takes the class's own </s>, 5.23.0 what tokenizer.json says.
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True}
    folder(tmp_path, bytes_pairs(), config)
    with pytest.raises(ModelError, match=r"add_eos_token is True, but .* it is False"):
        TextTokenizer.from_folder(tmp_path, None)


ENDS = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": None}
AGREEING = {
    "LLaDA": (
        bytes_pairs(id=298),
        PLAIN
        | ENDS
        | {"add_bos_token": False, "add_eos_token": False, "gmask_token": "<X>"}
        | {"added_tokens_decoder": {"0": token(END), "298": token("<X>")}},
    ),
    "Dream, Qwen2": (
        bytes_pairs(id=298),
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END, "pad_token": END}
        | {"add_prefix_space": False, "split_special_tokens": False, "add_bos_token": False}
        | {"additional_special_tokens": ["<X>"], "bos_token": None, "errors": "replace"},
    ),
    "Llama 3": (
        bytes_pairs(begins=True),
        PLAIN | ENDS | {"model_input_names": ["input_ids", "attention_mask"]},
    ),
    "Llama 3, another fine-tuning": (bytes_pairs(begins=True), PLAIN | {"add_bos_token": False}),
    "ModernBERT": (
        bytes_pairs(id=298, lstrip=True),
        PLAIN
        | {"mask_token": NAMED | token("<X>", lstrip=True)}
        | {"clean_up_tokenization_spaces": True},
    ),
    "BERT": (
        bert(),
        {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True, **BERT},
    ),
    "BERT, cased": (
        bert(lowercase=False),
        BERT | {"do_lower_case": False, "unk_token": NAMED | token("[UNK]")},
    ),
    "any class": (bert(), {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}),
    "nothing": (bytes_pairs(space=True), {}),
    "Llama 2": (
        bytes_pairs(begins=True),
        ENDS | {"tokenizer_class": "LlamaTokenizer", "unk_token": END, "eos_token": None},
    ),
    "Llama, without the tokens of its class": (
        bytes_pairs(),
        PLAIN | {"tokenizer_class": "LlamaTokenizer"},
    ),
}


@pytest.mark.parametrize("name", AGREEING)
def test_a_config_that_agrees_is_accepted(name, tmp_path):
    folder(tmp_path, *AGREEING[name])
    assert ids(TextTokenizer.from_folder(tmp_path, None)) == by_transformers(tmp_path)


def test_special_tokens_are_split_where_the_config_says_so(tmp_path):
    found = {}
    for split in (True, False):
        folder(tmp_path, bytes_pairs(), PLAIN | {"split_special_tokens": split})
        found[split] = TextTokenizer.from_folder(tmp_path, None)
        assert ids(found[split]) == by_transformers(tmp_path)
    assert ids(found[True]) != ids(found[False])
    assert found[True].fingerprint != found[False].fingerprint


def test_special_tokens_are_split_without_a_tokenizer_json_too(tmp_path):
    raw = bytes_pairs()
    merges = [" ".join(m) for m in raw["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = GPT2 | {"split_special_tokens": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ids(TextTokenizer.from_folder(tmp_path, None)) == by_transformers(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "expected a JSON object, found list"),
        ({"split_special_tokens": "yes"}, "split_special_tokens is 'yes'; expected true or false"),
        ({"added_tokens_decoder": [1]}, "cannot compare the tokenizer with the files beside it"),
        ({"added_tokens_decoder": {"1": 5}}, "added_tokens_decoder holds 5"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files is"),
    ],
)
def test_a_config_that_cannot_be_understood_is_refused(config, message, tmp_path):
    folder(tmp_path, bytes_pairs(), config)
    with pytest.raises(ModelError) as caught:
        TextTokenizer.from_folder(tmp_path, None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_mask_id_is_known_before_the_tokenizer_is_refused(tmp_path):
    raw = bytes_pairs()
    raw["model"]["vocab"]["<X>"] = 298
    folder(tmp_path, raw, PLAIN | {"mask_token": "<X>"})
    assert tokenizer_mask(tmp_path) == 298
    with pytest.raises(ModelError, match="mask_token has '<X>'"):
        TextTokenizer.from_folder(tmp_path, None)


def pipeline(normaliser, *parts):
    made = tiny.tokenizer()
    if normaliser is not None:
        made.normalizer = normaliser
    made.pre_tokenizer = pre_tokenizers.Sequence([*parts]) if len(parts) > 1 else parts[0]
    return json.loads(made.to_str())


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
QWEN2 = (
    pre_tokenizers.Split(Regex(tokenizer_config._QWEN2), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
)
NFC, LOWER = normalizers.NFC(), normalizers.Lowercase()
PIPELINES = {
    "GPT2Tokenizer": (None, BYTES),
    "GPTNeoXTokenizerFast": (NFC, BYTES),
    "Qwen2TokenizerFast": (NFC, *QWEN2),
    "CohereTokenizer": (NFC, DIGITS, BYTES),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_class_whose_version_5_pipeline_is_another_is_told(name, tmp_path):
    told = {"tokenizer_class": name, "eos_token": END, "add_bos_token": False}
    for other, parts in {**PIPELINES, "lower": (LOWER, BYTES), "digits": (None, *QWEN2)}.items():
        path = tmp_path / other
        path.mkdir()
        folder(path, pipeline(*parts), told)
        made = TextTokenizer.from_folder(path, None)
        doubts = made.doubts([])
        assert bool(doubts) == (other != name), other
        assert doubts or ids(made) == by_transformers(path)
    assert f"names {name.removesuffix('Fast')}, for which transformers 5" in doubts[0]
    for plain in ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"auto_map": {}} | told):
        folder(path, pipeline(LOWER, BYTES), plain)
        assert TextTokenizer.from_folder(path, None).doubts([]) == []


def test_texts_that_a_training_may_have_cut_at_their_beginning_are_told(tmp_path):
    folder(tmp_path, bytes_pairs(), PLAIN | {"truncation_side": "left"})
    made = TextTokenizer.from_folder(tmp_path, None)
    assert made.doubts(made.encode(TEXTS, 99)) == []
    (said,) = made.doubts(made.encode(TEXTS, 3))
    assert "truncation_side is left" in said
    folder(tmp_path, bytes_pairs(), PLAIN | {"truncation_side": "right"})
    assert TextTokenizer.from_folder(tmp_path, None).doubts(made.encode(TEXTS, 3)) == []
