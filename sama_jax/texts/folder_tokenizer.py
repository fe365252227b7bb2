"""Makes the tokenizer of a folder that has no `tokenizer.json`, by the class that it names.

Read are byte-level BPE from `vocab.json` and `merges.txt`, WordPiece from `vocab.txt`, and
SentencePiece's `.model`; `transformers` builds them. Classes of a folder's own code are never run:
a fixed table says which class of `transformers` does the same. Sources: the slow classes of
transformers 4.57.1, with which ids were compared (docs/models.md). Dream's class follows Qwen2's.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

from sama_jax.errors import ModelError
from sama_jax.texts.tokenizer_config import CONFIG, read_object, require_agreement
from sama_jax.untrusted import JSON_BYTES, printable, read_bytes, read_json, shown

DECODER = "added_tokens_decoder"
CLASSES = {
    "DreamTokenizer": "Qwen2Tokenizer",
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "GPT2Tokenizer": "GPT2Tokenizer",
    "RobertaTokenizer": "RobertaTokenizer",
    "BertTokenizer": "BertTokenizer",
    "DistilBertTokenizer": "BertTokenizer",
    "LlamaTokenizer": "LlamaTokenizer",
}
"""Class that a folder names, without `Fast` -> the class of `transformers` that gives its ids."""
MODELS = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "Dream": "Qwen2Tokenizer"}
MODELS |= {"bert": "BertTokenizer", "distilbert": "BertTokenizer", "llama": "LlamaTokenizer"}
MODELS |= {"gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer"}
"""`model_type` -> the class of a folder that names none."""
_NO_ENDS = {"add_bos_token": False, "add_eos_token": False}
NEUTRAL: dict[str, dict[str, Any]] = {
    "Qwen2Tokenizer": {**_NO_ENDS, "add_prefix_space": False},
    "GPT2Tokenizer": _NO_ENDS,
    "RobertaTokenizer": _NO_ENDS,
    "BertTokenizer": {"do_basic_tokenize": True, "never_split": []},
    "LlamaTokenizer": {"sp_model_kwargs": {}},
}
"""Class -> fields that some version follows, others not: they must be null or have this value."""
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt")


def build(path: Path) -> Tokenizer:
    """Makes the tokenizer of a folder.

    Raises:
      ModelError: its class is not known, or a file is missing or damaged.
      Exception: whatever the libraries raise for files that make no sense.
    """
    _require_files(path)
    name, config = class_named(path), read_object(path / CONFIG)
    for field, neutral in NEUTRAL[name].items():
        if config.get(field) not in (None, neutral):
            raise ModelError(
                f"{path / CONFIG}: {field} is {shown(config[field])}, which versions of "
                f"transformers follow or not for {name}; put a tokenizer.json beside it"
            )
    made = _by_transformers(path, name)
    model = json.loads(made.model.__getstate__())
    if name in ("GPT2Tokenizer", "RobertaTokenizer", "Qwen2Tokenizer"):
        _require_merges(path, model)
    if name == "LlamaTokenizer":
        _as_sentencepiece(made, model, config, path)
    mask = config.get("mask_token", "<mask>")
    if name == "RobertaTokenizer" and isinstance(mask, str) and not config.get(DECODER):
        # The space before it is part of it up to transformers 4; version 5 has lost that.
        made.add_special_tokens([AddedToken(mask, lstrip=True, normalized=False)])
    require_agreement(made, path, f"its class, {name},")
    return made


def class_named(path: Path) -> str:
    """Returns the class of `transformers` that reads a folder. Raises `ModelError`."""
    config = read_object(path / CONFIG)
    listed = (config.get("auto_map") or {}).get("AutoTokenizer")
    listed = listed if isinstance(listed, list) else [listed]
    own = next((n.rpartition(".")[2] for n in listed if isinstance(n, str)), None)
    model = read_object(path / "config.json")
    told = own or config.get("tokenizer_class") or model.get("tokenizer_class")
    if told is None:
        told = MODELS.get(str(model.get("model_type")))
    name = CLASSES.get(str(told).removesuffix("Fast"))
    if name is None:
        raise ModelError(
            f"{path}: has no tokenizer.json, and its tokenizer's class is {shown(told)}"
            f"{', code of its own, which is never run' if own else ''}; known are "
            f"{', '.join(CLASSES)}. Put a tokenizer.json beside it: save_pretrained of a fast "
            "class of transformers writes one"
        )
    return name


def _as_sentencepiece(made: Tokenizer, model: dict[str, Any], config: Any, path: Path) -> None:
    """Adds a space before every text, as SentencePiece and transformers 4 do, if it is `legacy`.

    Version 5 does not where the text begins with one, whatever the config says. Raises
    `ModelError` for a model that is no BPE, which has not been compared.
    """
    if model["type"] != "BPE":
        raise ModelError(f"{path}: its SentencePiece model is {model['type']}; only BPE is read")
    if config.get("legacy") is not False:
        if config.get("add_prefix_space") is False:
            raise ModelError(f"{path / CONFIG}: add_prefix_space is False, but legacy is not")
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(parts)  # pyright: ignore  stub: no setter
        made.pre_tokenizer = None  # pyright: ignore


def _require_files(path: Path) -> None:
    """Raises `ModelError` unless what is read is regular files of bounded size."""
    files = [f for f in path.iterdir() if f.name in VOCABULARIES or f.suffix == ".model"]
    for file in files:
        try:
            content = read_bytes(file, JSON_BYTES)
            if file.suffix != ".model":
                content.decode("utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: cannot be read ({printable(str(error), 200)})") from None
        if file.suffix == ".model":
            _require_sentencepiece(file)
    names = {file.name for file in files}
    if names & {"vocab.json"} and "merges.txt" not in names:
        raise ModelError(
            f"{path}: no usable tokenizer; it has vocab.json without merges.txt: download that, too"
        )
    if not files:
        raise ModelError(
            f"{path}: no usable tokenizer; expected tokenizer.json, vocab.json with merges.txt, "
            "vocab.txt or a SentencePiece .model"
        )


def _require_sentencepiece(file: Path) -> None:
    if importlib.util.find_spec("sentencepiece") is None:  # transformers reads the file with it
        raise ModelError(
            f"{file}: reading a SentencePiece tokenizer needs a package: pip install "
            "'sama-jax[sentencepiece]', or put the model's tokenizer.json beside it"
        )


def _by_transformers(path: Path, name: str) -> Tokenizer:
    import transformers
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(50)  # it comments on classes of another name
    try:
        read = getattr(transformers, name).from_pretrained(str(path), local_files_only=True)
    finally:
        logging.set_verbosity(level)
    made = Tokenizer.from_str(read.backend_tokenizer.to_str())
    made.encode_special_tokens = read.backend_tokenizer.encode_special_tokens
    return made


def _require_merges(path: Path, model: dict[str, Any]) -> None:
    """Raises `ModelError` unless the vocabulary and the merges are those of the files.

    Versions of `transformers` differ in which first lines and repeated ids they drop.
    """
    vocab = read_json(path / "vocab.json")
    sound = isinstance(vocab, dict) and all(type(i) is int for i in vocab.values())
    if not sound or len(set(vocab.values())) < len(vocab) or model["vocab"] != vocab:
        raise ModelError(f"{path / 'vocab.json'}: expected a JSON object of tokens and their ids")
    lines = (path / "merges.txt").read_text("utf-8").split("\n")
    lines = lines[lines[0].startswith("#version") :]
    told = [line.split(" ") for line in map(str.rstrip, lines) if line]
    if told != [list(pair) for pair in model["merges"]]:
        raise ModelError(
            f"{path / 'merges.txt'}: has {len(told):,} merges, of which {len(model['merges']):,} "
            "are read; expected a line '#version: 0.2', then two tokens a line"
        )
