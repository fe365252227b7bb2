"""Holds `tokenizer.json` to what the files beside it say of the same tokenizer.

`transformers` applies fields of `tokenizer_config.json` over `tokenizer.json`, and which ones
depends on its version and on the tokenizer's class. Both were compared in versions 4.57.1 and
5.23.0: a field that changes ids in one of them must agree with `tokenizer.json`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from sama_jax.errors import ModelError
from sama_jax.untrusted import read_json, shown

CONFIG = "tokenizer_config.json"
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
"""Classes of `transformers` (also ...Fast) that leave cases, accents and added tokens alone."""
_NO_ENDS = ("GPT2Tokenizer", "Qwen2Tokenizer")
"""Classes that leave `add_bos_token` and `add_eos_token` alone, as those above do."""
_BY_MODEL = {"bert": "BertTokenizer", "distilbert": "DistilBertTokenizer"}
_BY_MODEL |= {"llama": "LlamaTokenizer"}
"""`model_type` -> the class that is taken where no file names one, if its defaults change ids."""
_ENDS = {
    "LlamaTokenizer": ("<s>", "</s>", True),
    "CodeLlamaTokenizer": ("<s>", "</s>", True),
    "GemmaTokenizer": ("<bos>", "<eos>", True),
    "CohereTokenizer": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", True),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>", False),
}
"""Class -> its tokens for both ends, and whether version 4.57.1 adds the first unless told.

It adds the second only if told. Version 5.23.0 leaves both to `tokenizer.json`.
"""
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PIPELINES: dict[str, list[Any]] = {
    "GPT2Tokenizer": [["ByteLevel", True]],
    "RobertaTokenizer": [["ByteLevel", True]],
    "GPTNeoXTokenizer": [["NFC"], ["ByteLevel", True]],
    "CohereTokenizer": [["NFC"], ["Digits", True], ["ByteLevel", True]],
    "Qwen2Tokenizer": [
        ["NFC"],
        ["Split", {"Regex": _QWEN2}, "Isolated", False],
        ["ByteLevel", False],
    ],
}
"""Class -> normaliser and pre-tokenizer that version 5.23.0 gives it, whatever the file says."""
_WITHIN = ("use_regex", "individual_digits", "pattern", "behavior", "invert")
"""Of their parts, what changes where a text is split."""
_FLAGS = ("lstrip", "rstrip", "single_word")
"""Of an added token, what changes where it is found; `normalized` does under a normaliser."""


def splits_special_tokens(folder: Path) -> bool:
    """Tells whether special tokens that a text spells are split like other words.

    `tokenizer.json` has no field for it. Raises `ModelError` if it is neither true nor false.
    """
    told = read_object(folder / CONFIG).get("split_special_tokens") or False
    if not isinstance(told, bool):
        raise ModelError(
            f"{folder / CONFIG}: split_special_tokens is {shown(told)}; expected true or false"
        )
    return told


def require_agreement(tokenizer: Tokenizer, folder: Path, by: str = "tokenizer.json") -> None:
    """Raises `ModelError` if files beside `tokenizer.json` say what it, as read, does not do.

    `by` names what the tokenizer was made by, if not by that file.

    What they leave out is for `tokenizer.json` to say, but for the defaults that all classes of
    BERT's kind have, and those of `_ENDS`. Any other error is the library's, or of a value of
    another type.
    """
    config = read_object(folder / CONFIG)
    kind = _class(config, folder)
    unstated = f" (not stated: the default of {kind})"
    problems = [
        f"{field} is {shown(told)}{unstated if config.get(field) is None else ''}, but by "
        f"{by} it is {shown(does)}"
        for field, told, does in _settings(tokenizer, config, kind)
        if told != does
    ]
    problems += _tokens(tokenizer, config, folder, by)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelError(
            f"{folder / CONFIG}: {'; '.join(problems[:3])}{more}. Versions of transformers "
            "differ in which of them they follow: load the tokenizer with the one that trained "
            "the model and save it again (save_pretrained), or, if tokenizer.json is right, "
            "state the same in the other file"
        )


def doubts(tokenizer: Tokenizer, folder: Path, *, cut: bool) -> list[str]:
    """Says why a training may have read other ids than these, of texts of which some are `cut`.

    Version 5 makes the tokenizer of a class that it knows from vocabulary and merges alone, with
    the class's own normaliser and pre-tokenizer; version 4 reads those of `tokenizer.json`, which
    is right for most models that were published with it.
    """
    config = read_object(folder / CONFIG)
    kind, where, found = _class(config, folder), folder / CONFIG, []
    known = kind in _GENERIC or kind is None or "auto_map" in config
    own = None if known else _PIPELINES.get(kind or "")
    if own is not None and own != [_within(part) for part in _leaves(tokenizer)]:
        found.append(
            f"{where}: names {kind}, for which transformers 5 puts a normaliser and pre-tokenizer "
            "of its own in the place of those in tokenizer.json, which are others and were used "
            "here, as by transformers 4; a model that was trained with version 5 has read other "
            "tokens: save its tokenizer again with it (save_pretrained)"
        )
    if cut and config.get("truncation_side") == "left":
        found.append(
            f"{where}: truncation_side is left, but texts are cut at their end here; a training "
            "that followed it has learnt the ends of long texts: raise --max-length"
        )
    return found


def _leaves(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns the parts of normaliser and pre-tokenizer in their order, without sequences."""
    whole = [p for p in (tokenizer.normalizer, tokenizer.pre_tokenizer) if p is not None]
    parts = [json.loads(part.__getstate__()) for part in whole]
    while any(part["type"] == "Sequence" for part in parts):
        parts = [
            one
            for part in parts
            for one in (
                part.get("normalizers", part.get("pretokenizers", []))
                if part["type"] == "Sequence"
                else [part]
            )
        ]
    return parts


def _within(part: dict[str, Any]) -> list[Any]:
    """Returns a part's type and what changes where it splits."""
    return [part["type"], *(part[name] for name in _WITHIN if name in part)]


def _class(config: dict[str, Any], folder: Path) -> str | None:
    """Returns the class without `Fast`, found as `AutoTokenizer` does; None if none is known."""
    if (found := config.get("tokenizer_class")) is None:
        model = read_object(folder / "config.json")
        found = model.get("tokenizer_class") or _BY_MODEL.get(str(model.get("model_type")))
    return None if found is None else str(found).removesuffix("Fast")


def _settings(
    tokenizer: Tokenizer, config: dict[str, Any], kind: str | None
) -> Iterator[tuple[str, Any, Any]]:
    """Yields fields that some version applies: name, value, what the tokenizer does."""
    does: dict[str, Any] = {"fast_tokenizer_files": ["tokenizer.json"]}
    if isinstance(tokenizer.model, models.WordPiece) and kind not in _GENERIC:
        normalise = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        does["do_lower_case"] = normalise("A") == "a"
        does["tokenize_chinese_chars"] = normalise("中") != "中"
        does["strip_accents"] = normalise("é") == "e"
        does["unk_token"] = tokenizer.model.unk_token
        if kind is not None:  # all classes have these defaults
            config = {"do_lower_case": True, "tokenize_chinese_chars": True} | config
        if config.get("strip_accents") is None:  # then case decides
            config = config | {"strip_accents": config.get("do_lower_case")}
    elif kind not in _GENERIC or any(part["type"] == "ByteLevel" for part in _parts(tokenizer)):
        does["add_prefix_space"] = _adds_space(tokenizer)
    if kind not in _GENERIC + _NO_ENDS:
        around = tokenizer.encode("a")
        bos, eos, begins = _ENDS.get(kind or "", (None, None, False))
        for name, at, usual, added in (("bos", 0, bos, begins), ("eos", -1, eos, False)):
            token, field = _name(config.get(f"{name}_token", usual)), f"add_{name}_token"
            row = None if token is None else tokenizer.token_to_id(token)
            ends = around.special_tokens_mask if token is None else [i == row for i in around.ids]
            does[field] = bool(ends and ends[at])
            if usual is not None and row is not None:  # else 4.57.1 would make a token of it
                config = {field: added} | config
    for field, value in does.items():
        if config.get(field) is not None:
            told = _name(config[field]) if field == "unk_token" else config[field]
            yield field, told, value


def _parts(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Yields the settings of what changes and splits a text, also those within others."""
    found = [p for p in (tokenizer.normalizer, tokenizer.pre_tokenizer) if p is not None]
    parts = [json.loads(part.__getstate__()) for part in found]
    while parts:
        part = parts.pop()
        yield part
        parts += part.get("normalizers", []) + part.get("pretokenizers", [])


def _adds_space(tokenizer: Tokenizer) -> bool:
    """Tells whether the first word of a text is made to begin with a space."""
    return any(
        part["type"] == "Prepend"
        or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        or (part["type"] == "ByteLevel" and part.get("add_prefix_space") is True)
        for part in _parts(tokenizer)
    )


def _tokens(tokenizer: Tokenizer, config: dict[str, Any], folder: Path, by: str) -> Iterator[str]:
    """Yields what is wrong with the tokens that other files add or name."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder")
    told: list[tuple[str, Any]]
    told = [("added_tokens_decoder", token) for token in (decoder or {}).values()]
    places = [config]
    if decoder is None:  # only then are these files read
        places.append(read_object(folder / "special_tokens_map.json"))
        told = [("added_tokens.json", token) for token in read_object(folder / "added_tokens.json")]
    for place in places:
        for field, value in place.items():
            if field in ("additional_special_tokens", "extra_special_tokens"):
                values = value.values() if isinstance(value, dict) else value or []
                told += [(field, token) for token in values]
            elif field.endswith("_token") and _name(value) is not None:
                told.append((field, value))
    for field, token in told:
        name = _name(token)
        if name is None:
            raise ValueError(f"{field} holds {shown(token)}")
        if name not in added:
            yield f"{field} has {shown(name)}, but {by} adds no such token"
        elif field == "added_tokens_decoder":
            flags = _FLAGS if tokenizer.normalizer is None else (*_FLAGS, "normalized")
            does = {flag: getattr(added[name], flag) for flag in flags}
            yield from (
                f"{field} has {shown(name)} with {flag} {shown(token[flag])}, but by "
                f"{by} it is {value}"
                for flag, value in does.items()
                if token.get(flag, value) != value
            )


def _name(token: Any) -> str | None:
    """Returns the text of a token, which some files give with its flags."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def read_object(file: Path) -> dict[str, Any]:
    """Reads a file's JSON object; empty if there is no such file. Raises `ModelError`."""
    if not os.path.lexists(file):
        return {}
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{file}: not readable as JSON ({reason})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found
