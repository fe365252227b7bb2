"""Asks whether SAMA finds more on the responses that a training learned than on the whole texts.

    python experiments/statistics/responses.py OUT [--pairs N] [--seeds N]

Pairs are functions of the standard library: the head of one is the prompt, its docstring the
response. A small LLaDA is pre-trained on other pairs, and fine-tuned on the responses of half of N
pairs. Then all N are audited twice, by their responses and by the whole rendered texts, and the
AUCs are compared on the same pairs. 200 pairs and one seed take some minutes of two cores; the same
command goes on where it was stopped. Prints Markdown.
"""

import argparse
import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sama_jax.config import AuditSettings, TrainSettings
from sama_jax.programs.audit import run_audit
from sama_jax.programs.demo import CONFIG
from sama_jax.programs.finetune import finetune, pretrain
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting import results
from sama_jax.storage.files import write_atomic, write_json
from sama_jax.storage.run_folder import Row, json_lines
from sama_jax.texts.conversations import Form, LossOn, named_template
from sama_jax.texts.read import Fields, read_texts

ATTACKS = ("sama", "ratio", "loss")
TEMPLATE = named_template("chatml")
LENGTH = 128
LOSS_ON: tuple[LossOn, ...] = ("response", "text")


def functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (head, docstring) of the documented functions of a Python file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
            said = said.split("\n\n")[0]
            if 40 <= len(said) <= 200:
                yield f"def {node.name}({ast.unparse(node.args)})", said


def all_pairs(seed: int, files: str = "*/*.py") -> list[dict[str, str]]:
    """Returns the standard library's pairs with responses of 40 to 200 characters, shuffled."""
    found: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob(files)):
        if path.parent.name != "site-packages":
            found |= {said: head for head, said in functions(path) if len(head) < 100}
    pairs = [{"prompt": head, "response": said} for said, head in found.items()]
    random.Random(seed).shuffle(pairs)
    return pairs


def prepare(
    out: Path, seed: int, pairs: int, others: int, epochs: tuple[float, float], **config: Any
) -> None:
    """Makes the texts, the base and the target of one seed.

    Args:
      out: their folder.
      seed: of the shuffle and of both trainings.
      pairs: that are audited; the first half is learned.
      others: pairs that the base is trained on.
      epochs: of the pre-training and of the fine-tuning.
      config: changes to the demo's network.
    """
    found = all_pairs(seed)
    audited, rest = found[:pairs], found[pairs : pairs + others]
    rows = [{"id": f"p{i}", "label": int(i < pairs // 2), **pair} for i, pair in enumerate(audited)]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "pairs.jsonl", json_lines(rows))
    write_atomic(out / "other.jsonl", json_lines(rest))
    write_json(out / "config.json", CONFIG | config)
    whole, answers = (Fields(form=Form(TEMPLATE, on)) for on in ("text", "response"))
    first = TrainSettings(epochs=epochs[0], learning_rate=2e-3, max_length=LENGTH, seed=seed)
    data = out / "config.json", out / "other.jsonl", out / "base"
    pretrain(*data, first, quiet=True, fields=whole)
    second = TrainSettings(epochs=epochs[1], learning_rate=1e-3, max_length=LENGTH, seed=seed)
    # Non-members of a labelled file are left out of a training.
    data = out / "base", out / "pairs.jsonl", out / "target"
    finetune(*data, second, quiet=True, fields=answers)


def audit(out: Path, on: LossOn, settings: AuditSettings) -> list[Row]:
    """Audits all pairs by their responses, or by the whole texts."""
    job = AuditJob(
        target=out / "target",
        reference=out / "base",
        texts=read_texts(out / "pairs.jsonl", form=Form(TEMPLATE, on)),
        out=out / on,
        attacks=(*ATTACKS, "prompt") if on == "response" else ATTACKS,
        settings=settings,
        figures=False,
        quiet=True,
    )
    result = run_audit(job)
    assert result is not None
    return result.rows


def compare(found: dict[str, list[Row]], attack: str) -> dict[str, Any]:
    """Returns the AUCs of an attack on both, and their paired difference with its interval."""
    rows = [
        {**one, "scores": {on: found[on][i]["scores"][attack] for on in LOSS_ON}}
        for i, one in enumerate(found["text"])
    ]
    aucs = {on: results.auc(rows, on) for on in LOSS_ON}  # pyright: ignore[reportArgumentType]
    return {"attack": attack, **aucs, **results.paired(rows, *LOSS_ON)}  # pyright: ignore


def main() -> None:
    """Runs all seeds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    settings = AuditSettings.of(max_length=LENGTH)
    print("| seed | attack | AUC on responses | AUC on whole texts | difference (95 %, paired) |")
    print("| --- | --- | --- | --- | --- |")
    for seed in range(args.seeds):
        out = args.out / str(seed)
        prepare(out, seed, args.pairs, 2000, (8, 10))
        found = {on: audit(out, on, settings) for on in LOSS_ON}
        compared = [compare(found, attack) for attack in ATTACKS]
        write_json(out / "compared.json", compared)
        prompt = results.auc(found["response"], "prompt")
        print(f"| {seed} | prompt | {prompt:.3f} | | |")
        for one in compared:
            gained = results.paired_text(one["difference"], one["ci"])
            cells = seed, one["attack"], f"{one['response']:.3f}", f"{one['text']:.3f}", gained
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
