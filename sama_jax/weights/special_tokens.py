"""Finds a model's mask and padding tokens in its config and in its tokenizer's files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sama_jax import gguf_header
from sama_jax.errors import ModelError
from sama_jax.models.registry import FamilyConfig
from sama_jax.texts import gguf_tokenizer
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.untrusted import printable, shown
from sama_jax.weights.folder_files import CONFIG, object_if_there

MASK_NAMES = ("<|mask|>", "<|MASK|>", "<|mdm_mask|>", "<[MASK]>", "|<MASK>|")
"""Mask tokens of published models whose tokenizers do not call them `mask_token`."""
ENCODER_NAMES = ("[MASK]", "<mask>")
"""What the tokenizer classes of BERT and RoBERTa call `mask_token` where a folder does not say."""


def known_mask(path: Path, family: FamilyConfig) -> Any:
    """Returns the mask id of the config, else of the tokenizer.

    Raises `ModelError` if they disagree.
    """
    told = None if family.kind == "autoregressive" else tokenizer_mask(path)
    if told is None and family.kind == "masked":
        by_class = (_id_of(path, name, _added_tokens(path)) for name in ENCODER_NAMES)
        told = next((found for found in by_class if found is not None), None)
    if family.mask_id is None or told in (None, family.mask_id):
        return told if family.mask_id is None else family.mask_id
    raise ModelError(
        f"{path}: the mask token id is {shown(family.mask_id)} by {CONFIG} (or its "
        f"class's default), but {told} by the tokenizer's files; say with --mask-id which one is "
        "right"
    )


def tokenizer_mask(path: Path) -> int | None:
    """Returns the id of the mask token by the tokenizer's JSON files; None if they name none.

    It is what they call `mask_token`; else, since many leave that out, an added token of a usual
    name. Of a GGUF file, its metadata come first. Raises `ModelError` if they name several.
    """
    name, file = _mask_name(path), gguf_header.find(path)
    told = None
    if file is not None:
        told = gguf_header.read_header(file).get(f"{gguf_tokenizer.KEYS}mask_token_id", int)
    if told is not None and name is None:
        return told
    added = _added_tokens(path)
    if name is not None:
        named = _id_of(path, name, added)
        if told is not None and named not in (None, told):
            raise ModelError(
                f"{path}: the mask token id is {told} by the GGUF file, but {named} by the "
                "tokenizer's files beside it; say with --mask-id which one is right"
            )
        return named if told is None else told
    found = {name: added[name] for name in MASK_NAMES if name in added}
    if len(set(found.values())) > 1:
        raise ModelError(f"{path}: the tokenizer has several mask tokens: {found}; give --mask-id")
    return next(iter(found.values()), None)


def _mask_name(path: Path) -> str | None:
    """Returns what the tokenizer's files call `mask_token`; None if they name none."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = object_if_there(path / file).get("mask_token")
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            return name
    return None


def _id_of(path: Path, name: str, added: Mapping[str, int]) -> int | None:
    """Returns the id of a token by its name; None without such a token or a usable tokenizer."""
    if name in added:
        return added[name]
    try:
        stored = path / "tokenizer.json"
        if stored.is_file():
            return TextTokenizer.from_file(stored, None).token_id(name)
        return TextTokenizer.from_folder(path, None).token_id(name)
    except ModelError:  # whoever needs the tokenizer itself will say so
        return None


MOST_MASKS = 8
"""Tokens that a model is tried with in the place of its mask token."""


def possible_masks(path: Path, family: FamilyConfig) -> list[int]:
    """Lists tokens that could stand for a masked one: the config's, those that a tokenizer adds.

    Those with "mask" in their name stand first. Raises `ModelError` for files that are damaged.
    """
    added = _added_tokens(path)
    named = [i for name, i in added.items() if "mask" in name.lower()]
    own = [] if family.mask_id is None else [family.mask_id]
    known = dict.fromkeys([*own, *named, *added.values()])
    return [i for i in known if 0 <= i < family.arch.vocab_size][:MOST_MASKS]


def _added_tokens(path: Path) -> dict[str, int]:
    """Returns the ids of tokens added to the tokenizer's vocabulary, by any of its files."""
    decoder = object_if_there(path / "tokenizer_config.json").get("added_tokens_decoder") or {}
    listed = object_if_there(path / "tokenizer.json").get("added_tokens") or []
    file = gguf_header.find(path)
    gguf = {} if file is None else gguf_tokenizer.added_tokens(gguf_header.read_header(file))
    try:
        found = {
            **gguf,
            **object_if_there(path / "added_tokens.json"),
            **{token["content"]: int(i) for i, token in decoder.items()},
            **{token["content"]: token["id"] for token in listed},
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot read the tokenizer's added tokens ({shown(error)})"
        ) from None
    wrong = [name for name, i in found.items() if type(i) is not int or not isinstance(name, str)]
    if wrong:
        raise ModelError(
            f"{path}: the tokenizer's added token {printable(str(wrong[0]))!r} has the id "
            f"{shown(found[wrong[0]])}; expected an integer"
        )
    return found


def padding_token(config: Mapping[str, Any], rows: int, where: str) -> int | None:
    """Returns the id that visible padding consists of; None if the config names none.

    It is `pad_token_id`, else `eos_token_id`, the first where that is a list; null counts as
    absent. Raises `ModelError` unless it is one of the embedding's `rows`.
    """
    for name in ("pad_token_id", "eos_token_id"):
        value = config.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < rows:
            raise ModelError(
                f"{where}: {name} is {shown(value)}, but the embedding has {rows} rows; "
                "correct it, or remove it from the config"
            )
        return value
    return None
