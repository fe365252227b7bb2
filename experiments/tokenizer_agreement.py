"""Compares the ids of folders without `tokenizer.json` with those of transformers' classes.

    python experiments/tokenizer_agreement.py make DIR                     writes the folders
    python experiments/tokenizer_agreement.py ours DIR                     ids by this program
    python experiments/tokenizer_agreement.py theirs DIR                   ids by transformers
    python experiments/tokenizer_agreement.py compare DIR                  counts differences

Each step may run in another environment: `theirs` in one with transformers 4.57.1, which has slow
classes and fast ones. `make` needs sentencepiece.
The vocabularies are trained on the source code and the messages of the Python standard library and
on invented words; 10,000 strings of code, prose, emoji, CJK, control characters, spaces at both
ends and special tokens inside are tokenised.
"""

import json
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

SPECIAL = ("<|beginoftext|>", "<|endoftext|>", "<|mask|>", "<|im_start|>", "<s>", "</s>", "<unk>")
SPECIAL += ("<pad>", "<mask>", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]")
OTHER = (
    *("中文字符", "日本語のテキスト", "한국어", "العربية", "हिन्दी", "ไทย", "Ελληνικά", "русский"),
    *("😀", "\U0001f469\u200d\U0001f469", "\U0001f3f3\ufe0f", "e\u0301", "Å", "\u212b", "ﬁ", "ß"),
    *("İ", "½", "²³", "٣", "ﷺ", "'s", "'LL", "don't", "\x00", "\x07", "\x1b[0m", "\x7f", "\x85"),
    *("\xa0", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", "\ufffd", "\U000e0001", "\t"),
    *("\n", "\r\n", "\n\n\n", "  ", "   ", " ", "##ing", "▁", "Ġ", "123", "3.14", "café", "naïve"),
)
KINDS = {
    "gpt2": ("GPT2Tokenizer", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "roberta": ("RobertaTokenizer", {}),
    "qwen2": ("Qwen2Tokenizer", {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
    "dream": (
        "DreamTokenizer",
        {
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            **{"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>"},
            **{"pad_token": "<|endoftext|>", "mask_token": "<|mask|>"},
        },
    ),
    "bert": ("BertTokenizer", {"do_lower_case": True}),
    "bert-cased": ("BertTokenizer", {"do_lower_case": False}),
    "llama": ("LlamaTokenizer", {"add_bos_token": True, "add_eos_token": False, "legacy": True}),
    "llama-new": ("LlamaTokenizer", {"add_bos_token": True, "legacy": False}),
}
"""Folder -> class, and the other fields of its tokenizer_config.json."""


def lines() -> list[str]:
    """Returns text to train and to test on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in ("argparse", "ast", "calendar", "csv", "decimal", "difflib", "inspect", "typing"):
        found += (folder / f"{name}.py").read_text("utf-8").splitlines()
    return [line for line in found if line.strip()]


def strings(count: int = 10_000, seed: int = 0) -> list[str]:
    """Draws what is tokenised."""
    draw, source = random.Random(seed), lines()
    found = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 4)):
            kind = draw.random()
            if kind < 0.4:
                line = draw.choice(source)
                start = draw.randrange(len(line))
                parts.append(line[start : start + draw.randint(1, 60)])
            elif kind < 0.7:
                parts.append("".join(draw.choices(OTHER, k=draw.randint(1, 4))))
            elif kind < 0.85:
                parts.append(draw.choice(SPECIAL))
            else:
                points = [draw.randrange(0x20, 0x3000) for _ in range(draw.randint(1, 8))]
                parts.append("".join(map(chr, points)))
        found.append(draw.choice(("", " ", "")).join(parts) + draw.choice(("", "", " ", "\n")))
    return found


def make(root: Path) -> None:
    """Writes a folder of each kind."""
    import sentencepiece
    from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

    texts = lines() + strings(5000, seed=1)
    for kind, (name, told) in KINDS.items():
        folder = root / kind
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": name, **told}
        if "bert" in kind and kind != "roberta":
            made = BertWordPieceTokenizer(lowercase=bool(told["do_lower_case"]))
            made.train_from_iterator(texts, vocab_size=3000, show_progress=False)
            made.save_model(str(folder))
        elif "llama" in kind:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_prefix=str(folder / "tokenizer"),
                **{"model_type": "bpe", "vocab_size": 3000, "byte_fallback": True},
                **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
                **{"hard_vocab_limit": False, "minloglevel": 2, "character_coverage": 0.99},
            )
            (folder / "tokenizer.vocab").unlink()
        else:
            first = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if kind == "roberta" else []
            made = ByteLevelBPETokenizer()
            made.train_from_iterator(
                texts, vocab_size=3000, special_tokens=first, show_progress=False
            )
            made.save_model(str(folder))
            if kind in ("gpt2", "qwen2", "dream"):
                start = len(json.loads((folder / "vocab.json").read_text()))
                added = [t for t in SPECIAL if "|" in t]
                flags = {
                    "lstrip": False,
                    "rstrip": False,
                    "single_word": False,
                    "normalized": False,
                }
                config["added_tokens_decoder"] = {
                    str(start + i): {"content": t, **flags, "special": t != "<|im_start|>"}
                    for i, t in enumerate(added)
                }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def ours(root: Path) -> None:
    """Writes the ids that this program gives."""
    from sama_jax.texts.tokenizer import TextTokenizer

    for kind in KINDS:
        read = TextTokenizer.from_folder(root / kind, None)
        ids = [found.ids.tolist() for found in read.encode(strings(), 2**15)]
        (root / f"{kind}.ours.json").write_text(json.dumps(ids))


def theirs(root: Path) -> None:
    """Writes the ids of transformers' own classes, of the slow ones if there are any."""
    import transformers

    for kind, (name, _) in KINDS.items():
        name = {"DreamTokenizer": "Qwen2Tokenizer"}.get(name, name)
        for speed, suffix in (("slow", ""), ("fast", "Fast")):
            cls = getattr(transformers, name + suffix, None)
            read = None if cls is None else cls.from_pretrained(root / kind)
            if read is not None and read.is_fast == (speed == "fast"):
                ids = [read(text)["input_ids"] for text in strings()]
                (root / f"{kind}.{speed}.json").write_text(json.dumps(ids))
    print("transformers", transformers.__version__)


def compare(root: Path) -> None:
    """Prints how many strings have other ids, and the first three of them."""
    texts = strings()
    for kind in KINDS:
        a = json.loads((root / f"{kind}.ours.json").read_text())
        for file in sorted(root.glob(f"{kind}.[sf]*.json")):
            b = json.loads(file.read_text())
            differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
            print(f"{file.stem}: {len(differ):,} of {len(texts):,} strings differ")
            for i in differ[:3]:
                print("   ", ascii(texts[i])[:200])


if __name__ == "__main__":
    steps = {"make": make, "ours": ours, "theirs": theirs, "compare": compare}
    steps[sys.argv[1]](Path(sys.argv[2]))
