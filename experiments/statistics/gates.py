"""Counts how often the gates about losses and scores fire where nothing is wrong, gate by gate.

    python experiments/statistics/gates.py BASE TEXTS OUT [--targets N] [--splits N] [--texts N]

BASE is a model folder and TEXTS a file of documents that it was not trained on, such as `base` and
members and non-members of a finished `sama-jax demo`. For each target the documents are halved at
random, BASE is fine-tuned on one half, and both halves are audited. A split is then a random part
of each half, whose gates are asked anew: whatever fires is a false alarm. With its labels permuted
there is nothing to be found either. 4 targets with 50 splits each take some minutes of two cores;
the same command goes on where it was stopped. Prints Markdown.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sama_jax import attacks
from sama_jax.config import AuditSettings, TrainSettings
from sama_jax.core.frequencies import frequency_losses
from sama_jax.engine.evidence import Evidence, gather_evidence
from sama_jax.engine.readings import Readings
from sama_jax.engine.tasks import tasks_of
from sama_jax.engine.text_table import table_from_description
from sama_jax.errors import ValidityError
from sama_jax.programs.audit import run_audit
from sama_jax.programs.audit_gates import loss_gates
from sama_jax.programs.finetune import finetune
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting.verdict import judge
from sama_jax.storage.loss_store import LossStore
from sama_jax.storage.protocol import Protocol
from sama_jax.storage.run_folder import Row, read_manifest, read_rows
from sama_jax.storage.text_index import INDEX, read_index
from sama_jax.texts.read import collect, read_texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.validity.losses import learnt

ATTACKS = ("sama", "loss", "ratio")


def audit_target(base: Path, data: Path, out: Path, number: int, length: int) -> Path:
    """Fine-tunes on a random half of the texts and audits all; returns the run's folder."""
    texts = read_texts(data).texts
    order = np.random.default_rng(number).permutation(len(texts)).tolist()
    mixed = [texts[row]._replace(label=int(i < len(order) // 2)) for i, row in enumerate(order)]
    out.mkdir(parents=True, exist_ok=True)
    members = [json.dumps({"text": text.text}) + "\n" for text in mixed if text.label]
    (out / "members.jsonl").write_text("".join(members), "utf-8")
    training = TrainSettings(epochs=10, learning_rate=1e-3, max_length=length, seed=number)
    finetune(base, out / "members.jsonl", out / "target", training, quiet=True)
    job = AuditJob(
        target=out / "target",
        reference=base,
        texts=collect(mixed),
        out=out / "audit",
        attacks=ATTACKS,
        settings=AuditSettings(max_length=length, seed=number),
        figures=False,
        quiet=True,
    )
    with contextlib.suppress(ValidityError):  # void: counted below
        run_audit(job)
    return out / "audit"


def evidence_of(run: Path) -> Evidence:
    """Reads what both models gave for each text of a run."""
    manifest = read_manifest(run) or {}
    keys, settings = manifest["store_keys"], AuditSettings(**_of_run(manifest["run"]))
    views = read_index(run / INDEX, manifest["run"])[1]
    tables = {name: table_from_description(view, str(run)) for name, view in views.items()}
    tasks = tasks_of(attacks.select(ATTACKS), settings, keys)
    with contextlib.closing(LossStore(run / "losses", "losses-00000.bin", writes=False)) as store:
        return gather_evidence(Readings(tasks, settings, tables, keys, store))


def _of_run(run: dict[str, Any]) -> dict[str, Any]:
    return {"max_length": run["max_length"], "seed": run["seed"]}


def split_gates(
    rows: Sequence[Row], found: Evidence, ids: Sequence[np.ndarray]
) -> tuple[str, dict[str, str]]:
    """Returns the verdict on some texts, and the status of each gate about their losses, scores."""
    labels = [row.get("label") for row in rows]
    frequencies = frequency_losses(list(ids))
    gates = [
        *loss_gates(found, labels),
        learnt("target", found.target, frequencies),
        learnt("reference", found.reference, frequencies),
    ]
    verdict, asked = judge(rows, Protocol.of(ATTACKS), gates)
    return verdict["kind"], {one["name"]: one["status"] for one in asked}


def splits_of(
    run: Path, base: Path, data: Path, length: int, splits: int, texts: int
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yields (labels, verdict, gates) of random parts of a run, and of them with mixed labels."""
    rows, found = read_rows(run), evidence_of(run)
    of_id = {text.id: text.text for text in read_texts(data).texts}
    tokenizer = TextTokenizer.from_folder(base, None)
    ids = [one.ids for one in tokenizer.encode([of_id[row["id"]] for row in rows], length)]
    classes = [[i for i, row in enumerate(rows) if row.get("label") == label] for label in (1, 0)]
    for seed in range(splits):
        draw = np.random.default_rng(seed)
        chosen = [int(i) for one in classes for i in draw.permutation(one)[:texts]]
        some = found.of(chosen)
        own, tokens = [rows[i] for i in chosen], [ids[i] for i in chosen]
        yield ("true", *split_gates(own, some, tokens))
        mixed = draw.permutation([row.get("label") for row in own])
        permuted: Any = [row | {"label": int(label)} for row, label in zip(own, mixed)]
        yield ("permuted", *split_gates(permuted, some, tokens))


def main() -> None:
    """Audits the targets that are left, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path, metavar="TEXTS")
    parser.add_argument("out", type=Path)
    parser.add_argument("--targets", type=int, default=4)
    parser.add_argument("--splits", type=int, default=50, help="of each target")
    parser.add_argument("--texts", type=int, default=60, help="of each class in a split")
    parser.add_argument("--max-length", type=int, default=96)
    args = parser.parse_args()
    counted: Counter[tuple[str, str, str]] = Counter()
    verdicts: Counter[tuple[str, str]] = Counter()
    for number in range(args.targets):
        out, length = args.out / str(number), args.max_length
        run = audit_target(args.base, args.data, out, number, length)
        for of, kind, gates in splits_of(
            run, args.base, args.data, length, args.splits, args.texts
        ):
            verdicts[of, kind] += 1
            counted.update((of, name, status) for name, status in gates.items())
    print("| labels | gate | not run | weakens | voids |\n| --- | --- | ---: | ---: | ---: |")
    for of, name in dict.fromkeys((of, name) for of, name, _ in counted):
        numbers = (str(counted[of, name, status]) for status in ("not run", "warn", "void"))
        print(f"| {of} | `{name}` | {' | '.join(numbers)} |")
    print(f"\nof {args.targets * args.splits} splits each: {dict(verdicts)}")


if __name__ == "__main__":
    main()
