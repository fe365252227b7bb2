"""Does `explain` point at the half of a text that was learned?

    sama-jax demo --out runs/demo
    python experiments/statistics/halves.py runs/demo runs/halves

Fine-tunes the demo's base on one half, drawn at random, of 20 of its texts, audits the whole texts
beside 40 others, and counts in how many texts the learned half has more of what the target gained.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np

from sama_jax import AuditJob, AuditSettings, read_texts, run_audit
from sama_jax.config import TrainSettings
from sama_jax.programs.explain import explain
from sama_jax.programs.finetune import finetune
from sama_jax.texts.tokenizer import TextTokenizer

TEXTS, OTHERS, LENGTH, EPOCHS, SEED = 20, 40, 96, 20, 7


def main(demo: Path, out: Path) -> None:
    """Trains, audits, explains and prints the count."""
    tokenizer = TextTokenizer.from_folder(demo / "base", None)
    pool = read_texts(demo / "corpus" / "nonmembers.jsonl").texts
    long = [t for t in pool if len(tokenizer.starts(t.text)) + tokenizer.added >= LENGTH]
    chosen, draw = long[: TEXTS + OTHERS], random.Random(SEED)
    first = [draw.random() < 0.5 for _ in range(TEXTS)]
    out.mkdir(parents=True, exist_ok=True)
    learned = []
    for text, head in zip(chosen, first):
        middle = _middle(tokenizer, text.text)
        end = _end(tokenizer, text.text)
        learned.append({"text": text.text[:middle] if head else text.text[middle:end]})
    _write(out / "halves.jsonl", learned)
    labelled = [{"text": t.text, "id": t.id, "label": int(i < TEXTS)} for i, t in enumerate(chosen)]
    _write(out / "texts.jsonl", labelled)
    training = TrainSettings(epochs=EPOCHS, batch_size=10, learning_rate=5e-4, max_length=LENGTH)
    finetune(demo / "base", out / "halves.jsonl", out / "target", training, quiet=True)
    texts = read_texts(out / "texts.jsonl")
    run_audit(
        AuditJob(
            target=out / "target",
            reference=demo / "base",
            texts=texts,
            out=out / "audit",
            attacks=("sama", "complement"),
            settings=AuditSettings(max_length=LENGTH),
            quiet=True,
        )
    )
    ids = [text.id for text in chosen[:TEXTS]]
    found = explain(out / "audit", texts.texts, ids=ids)
    right = 0
    for one, head in zip(found.texts, first):
        gains = np.nan_to_num(one.differences - found.usual)
        own, other = gains[: len(gains) // 2].sum(), gains[len(gains) // 2 :].sum()
        own, other = (own, other) if head else (other, own)
        right += own > other
        print(f"{one.id}: learned half {own:+.2f} nats, the other {other:+.2f}")
    print(f"{right} of {TEXTS} texts point at the learned half")


def _middle(tokenizer: TextTokenizer, text: str) -> int:
    """Returns the character at which the second half of the tokens that are read begins."""
    return tokenizer.starts(text)[LENGTH // 2]


def _end(tokenizer: TextTokenizer, text: str) -> int:
    """Returns the character behind the last token that is read."""
    return [*tokenizer.starts(text), len(text)][LENGTH]


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
