"""Makes a tokenizer of what the metadata of a GGUF file say: byte-level BPE.

The format names how a text is split before the merges (`tokenizer.ggml.pre`), it does not describe
it. Names whose splitting has been compared with the tokenizers of `transformers` are read, others
are refused. Sources: `tokenizer.ggml.*` in `docs/gguf.md` of `ggml-org/ggml`; `llama-vocab.cpp` of
`ggml-org/llama.cpp`; `Qwen2Tokenizer`, `GPT2Tokenizer` and the file `tokenizer.json` of SmolLM2 and
Llama 3.
"""

import json
import re
from itertools import zip_longest
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sama_jax.gguf_header import Header
from sama_jax.untrusted import shown

KEYS = "tokenizer.ggml."
CLASS = "PreTrainedTokenizerFast"
"""A class of transformers that leaves `tokenizer.json` as it is."""
WORD, CONTROL, USER, UNUSED = 1, 3, 4, 5
"""Kinds of tokens: of the vocabulary; special; added by a user; none (fills the embedding)."""
MOST_ADDED = 2**14
"""Most tokens that are looked for in texts as they are; Gemma 3 has some 6,400. The library takes
20 s for a million of them."""
_KNOWN = re.compile(
    r"model|pre|tokens|token_type|merges|add_[be]os_token|\w+_token_ids?"
    # Of other kinds of tokenizers, and of generating.
    r"|scores|token_type_count|suppress_tokens"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _split(pattern: str) -> list[dict[str, Any]]:
    regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**regex, "invert": False}, _bytes(use_regex=False)]


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    """Spells bytes as characters, if asked after splitting as GPT-2 does."""
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


_KINDS: dict[str, dict[str, Any]] = {
    "gpt-2": {"split": [_bytes(use_regex=True)]},
    "smollm": {"split": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)]},
    "llama-bpe": {"split": _split(_LLAMA3), "ignore_merges": True, "bos": True},
    "qwen2": {"split": _split(_QWEN2), "normalizer": {"type": "NFC"}},
}
"""Name -> splitting; whether words of the vocabulary are taken whole; whether a text begins with
the token for its beginning where the file does not say; normaliser."""
_KINDS["deepseek-r1-qwen"] = _KINDS["qwen2"]


def build(header: Header) -> Tokenizer:
    """Makes the tokenizer of a file.

    Raises:
      ModelError: it is of a kind that is not read.
      Exception: whatever the library raises for a vocabulary that makes no sense.
    """
    return Tokenizer.from_str(json.dumps(as_json(header)))


def as_json(header: Header) -> dict[str, Any]:
    """Returns the content of a `tokenizer.json`. Raises `ModelError`."""
    model, pre = (header.get(KEYS + name, str) for name in ("model", "pre"))
    own = "put the model's own tokenizer.json beside the file, in a folder"
    if header.get("general.architecture", str) == "llada":
        header.refuse(
            "the converter says of every llada that its tokenizer begins texts with a token, "
            f"whatever it does; {own}"
        )
    if model != "gpt2" or pre not in _KINDS:
        known = ", ".join(_KINDS)
        header.refuse(
            f"its tokenizer is {shown(model)} with the splitting {shown(pre)}; expected gpt2 with "
            f"one of {known}; {own}"
        )
    _require_known(header)
    kind, (tokens, types) = _KINDS[pre], vocabulary(header)
    merges = header.get(KEYS + "merges", list)
    if not merges:  # every text would be spelled in bytes
        header.refuse(f"has no {KEYS}merges, so its tokenizer is not whole; {own}")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token, **flags, "special": bool(types[i] == CONTROL)}
        for token, i in added_tokens(header).items()
    ]
    words = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": kind.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": kind["split"]},
        "post_processor": _ends(header, tokens, kind.get("bos", False)),
        "decoder": {**_bytes(use_regex=True), "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind.get("ignore_merges", False),
            "vocab": words,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _require_known(header: Header) -> None:
    """Raises `ModelError` for a field below `KEYS` that is not known and not off."""
    for key, value in header.metadata.items():
        name = key.removeprefix(KEYS)
        if name != key and not _KNOWN.fullmatch(name) and value is not False:
            header.refuse(f"{key} is {shown(value)}, which is not understood; it may change ids")


def vocabulary(header: Header) -> tuple[list[str], np.ndarray]:
    """Returns the tokens by their ids, and their kinds. Raises `ModelError`."""
    tokens = header.get(KEYS + "tokens", list) or []
    stored = header.get(KEYS + "token_type", np.ndarray)
    types: np.ndarray = np.zeros(0, int) if stored is None else stored
    if len(types) != len(tokens) or types.dtype.kind not in "iu":
        header.refuse(f"has {len(tokens):,} tokens, but {len(types):,} kinds of tokens (integers)")
    if strange := set(types.tolist()) - {WORD, CONTROL, USER, UNUSED}:
        header.refuse(f"has tokens of the kinds {sorted(strange)[:3]}; byte-level BPE has none")
    used = [token for token, kind in zip(tokens, types.tolist()) if kind != UNUSED]
    if len(set(used)) < len(used):
        header.refuse("has two tokens of one text, of which readers take either")
    return tokens, types


def added_tokens(header: Header) -> dict[str, int]:
    """Returns the ids of special tokens and of those that a user added. Raises `ModelError`."""
    if header.get(KEYS + "model", str) != "gpt2":
        return {}
    tokens, types = vocabulary(header)
    ids = np.flatnonzero((types == CONTROL) | (types == USER)).tolist()
    if len(ids) > MOST_ADDED:
        header.refuse(f"has {len(ids):,} special and added tokens, expected at most {MOST_ADDED:,}")
    return {tokens[i]: i for i in ids}


def settings(header: Header) -> dict[str, Any]:
    """Returns a `tokenizer_config.json` that says the same as `as_json`, and the chat template."""
    added = {i: token for token, i in added_tokens(header).items()}
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "mask": "mask"}
    ids = {name: header.get(f"{KEYS}{key}_token_id", int) for name, key in named.items()}
    found = {f"{name}_token": added[i] for name, i in ids.items() if i in added}
    template = header.get("tokenizer.chat_template", str)
    return {
        "tokenizer_class": CLASS,
        **found,
        **({} if template is None else {"chat_template": template}),
    }


def require_agreement(header: Header, tokenizer: Tokenizer) -> None:
    """Raises `ModelError` unless a tokenizer beside the file has its tokens, merges and ends.

    What the file says of the ends of a `llada` is not compared: the converter makes it up.
    """
    tokens = header.get(KEYS + "tokens", list) or []
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        if tokens and (i >= len(tokens) or tokens[i] != token):
            has = shown(tokens[i]) if i < len(tokens) else f"only {len(tokens):,} tokens"
            header.refuse(
                f"the tokenizer.json beside it has {shown(token)} as token {i:,}, the file itself "
                f"{has}; is it another model's tokenizer?"
            )
    _require_merges(header, tokenizer)
    if header.get("general.architecture", str) != "llada":
        _require_ends(header, tokenizer)


def _require_merges(header: Header, tokenizer: Tokenizer) -> None:
    told = header.get(KEYS + "merges", list)
    pairs = json.loads(tokenizer.model.__getstate__()).get("merges", [])
    found = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    if told is not None and found != told:
        both = enumerate(zip_longest(found, told))
        i, a, b = next((i, a, b) for i, (a, b) in both if a != b)
        header.refuse(
            f"the tokenizer.json beside it has {len(found):,} merges, the file itself "
            f"{len(told):,}; merge {i:,} is {shown(a)} there, {shown(b)} here; is it another "
            "model's tokenizer?"
        )


def _require_ends(header: Header, tokenizer: Tokenizer) -> None:
    """Raises `ModelError` unless texts get the ends that the file tells of."""
    ids = tokenizer.encode("a").ids
    for name, at in (("bos", 0), ("eos", -1)):
        told = header.get(f"{KEYS}add_{name}_token", bool)
        if told is None:
            continue
        i = header.get(f"{KEYS}{name}_token_id", int)
        does = bool(ids) and ids[at] == i
        if does != told:
            header.refuse(
                f"add_{name}_token is {told} (token {shown(i)}), but the tokenizer.json beside it "
                f"{'adds' if does else 'does not add'} that token to a text; correct one of them"
            )


def _ends(header: Header, tokens: list[str], begins: bool) -> dict[str, Any] | None:
    """Returns the post-processor that adds the tokens for the ends of a text; None: none."""
    bos = _end(header, tokens, "bos", begins)
    eos = _end(header, tokens, "eos", False)
    if not bos and not eos:
        return None

    def around(name: str) -> list[Any]:
        text = {"Sequence": {"id": name, "type_id": 0}}
        ends = [[{"SpecialToken": {"id": t, "type_id": 0}} for t in end] for end in (bos, eos)]
        return [*ends[0], text, *ends[1]]

    ids = {**bos, **eos}
    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A") + around("B"),
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in ids.items()},
    }


def _end(header: Header, tokens: list[str], name: str, usual: bool) -> dict[str, int]:
    """Returns the token that is added at one end of a text and its id; empty if none is."""
    told = header.get(f"{KEYS}add_{name}_token", bool)
    if not (usual if told is None else told):
        return {}
    i = header.get(f"{KEYS}{name}_token_id", int)
    if i is None or not 0 <= i < len(tokens):
        header.refuse(f"its tokenizer adds the token {name}, whose id is {shown(i)}")
    return {tokens[i]: i}
