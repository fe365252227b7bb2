"""Compares the reading of a GGUF file with that of transformers: weights, logits, token ids.

    python experiments/gguf_agreement.py model.gguf

Of architectures that transformers reads (llama, qwen2, qwen3). Needs torch and gguf.
"""

import argparse
import random
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from sama_jax.gguf_header import read_header
from sama_jax.models.stages import stages
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import loading, model_folder

TEXT = (
    "The capital of France is Paris, and the river that runs through it is the Seine. It rises in "
    "Burgundy, flows past Rouen and reaches the sea at Le Havre.\n\ndef area(r):\n    return r ** 2"
    "\n\n1. First, measure the radius.\n2. Then square it. 中文字符 😀 café\n"
)
TOKENS = 96
RANGES = ((0x20, 0x7F), (0, 0x250), (0x600, 0x700), (0x4E00, 0xA000), (0xAC00, 0xD7A4))
RANGES += ((0x1F300, 0x1FB00), (0, 0xD800))
PIECES = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "1",
    "23",
    "a",
    "B",
    ".",
    "'s",
    "'LL",
    "_x",
    "e\u0301",
    "½",
]


def strings(count: int) -> list[str]:
    """Code, words, numbers between spaces, and characters of many scripts and none."""
    draw, code = random.Random(0), Path(__file__).read_text("utf-8")
    found = []
    for i in range(count):
        if i % 3 == 0:
            at = draw.randrange(len(code))
            found.append(code[at : at + draw.randrange(1, 300)])
        elif i % 3 == 1:
            found.append("".join(draw.choices(PIECES, k=draw.randrange(1, 60))))
        else:
            low, high = draw.choice(RANGES)
            found.append("".join(chr(draw.randrange(low, high)) for _ in range(40)))
    return found


def compare_weights(folder: model_folder.ModelFolder, theirs: torch.nn.Module) -> None:
    """Prints how many values differ in a bit."""
    state, source, differ = theirs.state_dict(), folder.source, 0
    for name, tensor in source.tensors.items():
        ours = source.window(name, (slice(None),) * len(tensor.shape)).astype(np.float32)
        differ += int((ours.view(np.uint32) != state[name].numpy().view(np.uint32)).sum())
    print(f"weights: {len(source.tensors)} tensors, {differ} values that differ")


def compare_logits(folder: model_folder.ModelFolder, theirs: torch.nn.Module, ids: list) -> None:
    """Prints the errors of both in float32 against PyTorch in float64."""
    params = loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    tokens = jnp.asarray([ids])
    *_, (_, last) = stages(folder.model, params, tokens, jnp.ones_like(tokens, bool))
    ours = np.asarray(folder.model.logits(params, last), np.float64)[0]
    with torch.no_grad():
        single = theirs(torch.tensor([ids])).logits[0].double().numpy()
        exact = theirs.double()(torch.tensor([ids])).logits[0].numpy()
    for name, found in (("ours", ours), ("PyTorch", single)):
        error = np.abs(found - exact)
        print(f"logits of {len(ids)} tokens, {name}: {error.max():.1e}, mean {error.mean():.1e}")


def compare_ids(
    ours: TextTokenizer, theirs: Tokenizer, splitting: str, count: int = 10_000
) -> None:
    """Prints how many strings get other ids."""
    texts = strings(count)
    rows = [encoded.ids.tolist() for encoded in ours.encode(texts, 10**5)]

    def differ() -> list[str]:
        found = [encoded.ids for encoded in theirs.encode_batch(texts)]
        return [text for text, a, b in zip(texts, rows, found) if a != b]

    wrong = differ()
    numbers = sum(any(unicodedata.category(c)[0] == "N" for c in text) for text in wrong)
    print(f"ids: {len(wrong)} of {count} strings differ, {numbers} of them with numbers")
    if splitting == "smollm":
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
        print(f"ids, digits split first by both: {len(differ())} of {count} strings differ")


def main() -> None:
    """Runs all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    transformers.utils.logging.set_verbosity_error()
    given = {"gguf_file": file.name, "local_files_only": True}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **given
    )
    folder = model_folder.open_folder(file, dtype="float32")
    tokenizer = TextTokenizer.from_folder(file, folder.model.vocab_size)
    compare_weights(folder, theirs)
    compare_logits(folder, theirs, tokenizer.encode([TEXT], TOKENS)[0].ids.tolist())
    backend = transformers.AutoTokenizer.from_pretrained(file.parent, **given).backend_tokenizer
    compare_ids(tokenizer, backend, str(read_header(file).metadata.get("tokenizer.ggml.pre")))


if __name__ == "__main__":
    main()
