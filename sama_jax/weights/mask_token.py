"""Finds a model's mask token in its config and in its tokenizer's files."""

from pathlib import Path
from typing import Any

from sama_jax.errors import ModelError
from sama_jax.models.registry import FamilyConfig
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.folder_files import CONFIG, json_object

MASK_NAMES = ("<|mask|>", "<|MASK|>", "<|mdm_mask|>", "<[MASK]>")
"""Mask tokens of published models whose tokenizers do not call them `mask_token`."""


def known_mask(path: Path, family: FamilyConfig) -> Any:
    """Returns the mask id of the config, else of the tokenizer.

    Raises `ModelError` if they disagree.
    """
    told = None if family.kind == "autoregressive" else tokenizer_mask(path)
    if family.mask_id is None or told in (None, family.mask_id):
        return told if family.mask_id is None else family.mask_id
    raise ModelError(
        f"{path}: the mask token id is {family.mask_id!r} by {CONFIG} (or its class's default), "
        f"but {told} by the tokenizer's files; say with --mask-id which one is right"
    )


def tokenizer_mask(path: Path) -> int | None:
    """Returns the id of the mask token by the tokenizer's JSON files; None if they name none.

    It is what they call `mask_token`; else, since many leave that out, an added token of a usual
    name.
    """
    added = _added_tokens(path)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json_object(path / file).get("mask_token")
        name = token.get("content") if isinstance(token, dict) else token
        if name in added:
            return added[name]
        if isinstance(name, str):
            try:
                return TextTokenizer.from_folder(path, None).token_id(name)
            except ModelError:  # whoever needs the tokenizer itself will say so
                return None
    found = {name: added[name] for name in MASK_NAMES if name in added}
    if len(set(found.values())) > 1:
        raise ModelError(f"{path}: the tokenizer has several mask tokens: {found}; give --mask-id")
    return next(iter(found.values()), None)


def _added_tokens(path: Path) -> dict[str, int]:
    """Returns the ids of tokens added to the tokenizer's vocabulary, by any of its files."""
    decoder = json_object(path / "tokenizer_config.json").get("added_tokens_decoder") or {}
    listed = json_object(path / "tokenizer.json").get("added_tokens") or []
    try:
        return {
            **json_object(path / "added_tokens.json"),
            **{token["content"]: int(i) for i, token in decoder.items()},
            **{token["content"]: int(token["id"]) for token in listed},
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: cannot read the tokenizer's added tokens ({error})") from None
