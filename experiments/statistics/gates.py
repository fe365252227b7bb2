"""Counts how often gates fire on fair audits of real texts, gate by gate.

    python experiments/statistics/gates.py BASE TEXTS OUT [--splits N] [--texts N] [--epochs N]

BASE is a small model folder, such as `sama-jax pretrain` makes, and TEXTS a file of documents that
it was not trained on. Each split draws 120 documents and halves them at random; BASE is fine-tuned
on one half, and both are audited: nothing is wrong, so whatever fires is a false alarm. Then the
labels of each audit are permuted, so that there is nothing to find either. What is counted stays
in OUT/splits.jsonl, and the same command goes on where it was stopped. A split takes some seconds
of one core. Prints Markdown.
"""

import argparse
import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sama_jax.config import AuditSettings, SamaSettings, TrainSettings
from sama_jax.errors import ValidityError
from sama_jax.programs.audit import run_audit
from sama_jax.programs.finetune import finetune
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting.results import metrics_of
from sama_jax.storage.run_folder import METRICS, read_manifest, read_rows
from sama_jax.texts.read import Text, collect, read_texts

ATTACKS = ("sama", "loss", "ratio")
LENGTH = 64


def audit_split(base: Path, texts: list[Text], out: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Trains on half of the texts and audits all; returns the status of each gate, by its name."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    labelled = [text._replace(label=int(i < len(texts) // 2)) for i, text in enumerate(texts)]
    data = out / "members.jsonl"
    members = (json.dumps({"text": text.text}) + "\n" for text in labelled if text.label)
    data.write_text("".join(members), "utf-8")
    training = TrainSettings(
        epochs=epochs, learning_rate=2e-3, max_length=LENGTH, seed=seed, checkpoint_every=10**9
    )
    finetune(base, data, out / "target", training, quiet=True)
    run = out / "audit"
    job = AuditJob(
        target=out / "target",
        reference=base,
        texts=collect(labelled),
        out=run,
        attacks=ATTACKS,
        settings=AuditSettings(max_length=LENGTH, seed=seed, sama=SamaSettings(steps=8)),
        figures=False,
        quiet=True,
    )
    with contextlib.suppress(ValidityError):  # void: counted below
        run_audit(job)
    found = json.loads((run / METRICS).read_text("utf-8"))
    manifest, rows = read_manifest(run) or {}, read_rows(run)
    permuted = np.random.default_rng([seed, 1]).permutation([row.get("label") for row in rows])
    null: list[Any] = [row | {"label": int(label)} for row, label in zip(rows, permuted)]
    nothing = metrics_of(null, manifest | {"gates": []})
    return {
        "seed": seed,
        "auc": found["attacks"]["sama"]["auc"],
        "verdict": found["verdict"]["kind"],
        "gates": {one["name"]: one["status"] for one in found["validity"]},
        "permuted": {one["name"]: one["status"] for one in nothing["validity"]},
        "permuted_verdict": nothing["verdict"]["kind"],
    }


def table(splits: list[dict[str, Any]]) -> Iterator[list[object]]:
    """Yields a row for each gate."""
    yield ["gate", "splits", "not run", "weakens", "voids"]
    for field, said in (("gates", ""), ("permuted", ", permuted labels")):
        for name in dict.fromkeys(name for split in splits for name in split[field]):
            counts = Counter(split[field].get(name, "not run") for split in splits)
            yield [
                f"`{name}`{said}",
                len(splits),
                *(counts[status] for status in ("not run", "warn", "void")),
            ]
    for field in ("verdict", "permuted_verdict"):
        yield [
            f"{field}: {dict(Counter(split[field] for split in splits))}",
            len(splits),
            "",
            "",
            "",
        ]


def main() -> None:
    """Audits the splits that are left, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path, metavar="TEXTS")
    parser.add_argument("out", type=Path)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--texts", type=int, default=120, help="documents of a split")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    known = args.out / "splits.jsonl"
    splits = [json.loads(line) for line in known.read_text().splitlines()] if known.exists() else []
    pool = read_texts(args.data).texts
    for seed in range(len(splits), args.splits):
        drawn = np.random.default_rng(seed).permutation(len(pool))[: args.texts]
        texts = [pool[int(i)] for i in drawn]
        splits.append(audit_split(args.base, texts, args.out / "split", args.epochs, seed))
        with known.open("a") as file:
            file.write(json.dumps(splits[-1]) + "\n")
    for place, row in enumerate(table(splits)):
        print(f"| {' | '.join(map(str, row))} |")
        if place == 0:
            print("|" + " --- |" * len(row))


if __name__ == "__main__":
    main()
