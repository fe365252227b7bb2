"""Gives a new model its tokenizer: trained on the texts or given, and named in its config."""

import hashlib
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sama_jax import untrusted
from sama_jax.errors import ModelError
from sama_jax.storage import files
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.training.runs import Run

MOST_IDS = 2**22
"""Of a new model: sixteen times the largest vocabularies in use."""
END, MASK = "<|endoftext|>", "<|mdm_mask|>"
MASK_TOKENS = (MASK, "[MASK]", "<mask>")
"""Mask tokens that a given tokenizer may have."""


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of exactly `vocab_size` ids; the last two are end of text and mask.

    Where the texts give fewer merges, reserved tokens that no text contains fill the rest.
    """
    tokenizer = Tokenizer(models.BPE())
    # The library's types declare these two without their setters.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    clean = (t.encode("utf-8", "replace").decode() for t in texts)
    tokenizer.train_from_iterator(clean, trainer, length=len(texts))
    missing = vocab_size - 2 - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(missing)])
    tokenizer.add_special_tokens([END, MASK])
    assert tokenizer.token_to_id(MASK) == vocab_size - 1
    return tokenizer


def read_new_config(path: Path) -> dict[str, Any]:
    """Reads the config.json of a model to be made. Raises `ModelError`."""
    try:
        config = untrusted.read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a model's config.json") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict) or type(config.get("vocab_size")) is not int:
        raise ModelError(f"{path}: expected a JSON object with an integer vocab_size")
    if not 258 <= config["vocab_size"] <= MOST_IDS:
        raise ModelError(
            f"{path}: vocab_size is {untrusted.printable(str(config['vocab_size']))}; expected at "
            f"least 258 (256 bytes, end of text and mask) and at most {MOST_IDS}"
        )
    return config


def trained_ids(kind: str, vocab_size: int) -> dict[str, int | None]:
    """Returns the ids that `train_tokenizer` gives the tokens that a config of this kind names."""
    ids: dict[str, int | None] = dict.fromkeys(("eos_token_id", "pad_token_id"), vocab_size - 2)
    if kind == "autoregressive":  # transformers' classes would assume id 1
        return {**ids, "bos_token_id": vocab_size - 2}
    return {"mask_token_id": vocab_size - 1, **ids}


def given_ids(kind: str, tokenizer: TextTokenizer) -> dict[str, int | None]:
    """Returns the ids that a config of this kind takes from a given tokenizer."""
    if kind == "autoregressive":
        return {}
    return {"mask_token_id": tokenizer.token_id(_mask_token(tokenizer) or MASK)}


def _mask_token(tokenizer: TextTokenizer) -> str | None:
    return next((name for name in MASK_TOKENS if tokenizer.token_id(name) is not None), None)


def place_tokenizer(given: Path | None, run: Run, vocab_size: int, rows: int) -> TextTokenizer:
    """Puts the tokenizer into the output folder: copied, or trained once and then kept.

    Writes `tokenizer.json` and a `tokenizer_config.json` that names its special tokens.

    Args:
      given: the tokenizer.json to copy; None: one of `vocab_size` ids is trained.
      run: the training.
      vocab_size: of the config.
      rows: embedding rows of the model.

    Raises:
      ModelError: the tokenizer cannot be used, or has ids beyond the rows.
    """
    path = run.out / "tokenizer.json"
    placed = run.manifest.get("tokenizer_sha256")
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != placed:
        if given is None:
            run.terminal.say(
                f"training a tokenizer of {vocab_size:,} ids on {len(run.texts):,} texts"
            )
            trained = train_tokenizer(list(map(str, run.texts)), vocab_size)
            content = trained.to_str(pretty=True).encode()
        else:
            content = given.read_bytes()
        files.write_atomic(path, content)
        written = TextTokenizer.from_file(path, rows)
        end = END if written.token_id(END) is not None else None
        special = {"eos_token": end, "pad_token": end, "mask_token": _mask_token(written)}
        # transformers would add a token that the tokenizer lacks, above the model's last row.
        fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
        fast |= {k: name for k, name in special.items() if name is not None}
        files.write_json(run.out / "tokenizer_config.json", fast)
        run.remember(tokenizer_sha256=hashlib.sha256(content).hexdigest())
    return TextTokenizer.from_file(path, rows)


def with_token_ids(
    config: dict[str, Any], ids: dict[str, int | None], where: str
) -> dict[str, Any]:
    """Fills the ids of `{field: id}` into a config. Raises `ModelError` where they differ."""
    wrong = [
        f"{field} is {config[field]}, but the tokenizer gives it {number}"
        for field, number in ids.items()
        if number is not None and config.get(field) not in (None, number)
    ]
    if wrong:
        raise ModelError(f"{where}: {'; '.join(wrong)}; correct the field or leave it out")
    return {**config, **{f: n for f, n in ids.items() if n is not None}}
