"""Tiny LLaDA folders with a tokenizer, and texts that it reads: inputs of whole runs in tests.

Without PyTorch, so that a process that runs an audit starts quickly. Not a test; tests import it
after putting this folder on `sys.path`.
"""

import functools
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sama_jax.arrays import Model
from sama_jax.models.registry import read_config
from sama_jax.models.transformer import TransformerModel
from sama_jax.weights import saving

VOCAB = 300
MASK_ID = VOCAB - 1
STEPS = ("sama.steps=2", "sama.subsets=8")
SETTINGS = ("--set", STEPS[0], "--set", STEPS[1], "--max-length", "32")
"""Flags of audits inside the test process: equal ones share their compiled programs."""
SYLLABLES = ["ka", "ro", "mi", "te", "sun", "dal", "fer", "no", "vi", "lo", "gra", "pe"]


class PartialModel(Model):
    """A base of stand-ins that need only a few members of a model: the others are here."""

    vocab_size = mask_id = num_layers = 0
    shift, kind, arch, dtype = False, "diffusion", None, "float32"
    lora_paths = re.compile("")


def config(**changes: Any) -> dict[str, Any]:
    """A `config.json` of width 16 and one layer."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "mlp_hidden_size": 32,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "rope_theta": 10000.0,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "vocab_size": VOCAB,
        "embedding_size": VOCAB,
        "weight_tying": True,
        "mask_token_id": MASK_ID,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **changes,
    }


def texts(count: int, words: tuple[int, int] = (12, 48), seed: int = 0) -> list[str]:
    """Distinct texts of about as many tokens as words."""
    draw = random.Random(seed)
    vocabulary = [a + b for a in SYLLABLES for b in SYLLABLES][:40]
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choices(vocabulary, k=draw.randint(*words)))] = None
    return list(found)


def tokenizer(vocab: int = VOCAB - 2, seed: int = 0) -> Tokenizer:
    """A byte-level BPE of at most `vocab` ids; another `seed` merges in another order."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(50, seed=seed), trainer)
    return made


@functools.lru_cache
def _init(model: TransformerModel) -> Any:
    """Compiled whole: operation by operation it takes three times as long."""
    return jax.jit(model.init)


def folder(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A model folder with random weights and `tokenizer.json`; `changes` to the config."""
    full = config(**changes)
    family = read_config(full, str(path))
    assert family.mask_id is not None
    model = TransformerModel(arch=family.arch, mask_id=family.mask_id)
    path.mkdir(parents=True, exist_ok=True)
    saving.save_folder(path, _init(model)(jax.random.key(seed)), model, full, path, family.weights)
    tokenizer().save(str(path / "tokenizer.json"))
    return path


def same_weights(folder: Path, path: Path) -> Path:
    """A copy whose numbers are the same, but whose file is another one."""
    shutil.copytree(folder, path)
    weights = path / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"copy": "1"})
    return path


def write_texts(path: Path, found: list[str], labels: bool = True) -> Path:
    """A JSONL file; ids `t0`, `t1`, ..; every other text a member."""
    with path.open("w") as file:
        for i, text in enumerate(found):
            row: dict[str, Any] = {"id": f"t{i}", "text": text}
            if labels:
                row["label"] = (i + 1) % 2
            file.write(json.dumps(row) + "\n")
    return path
