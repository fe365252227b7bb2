"""Runs a whole audit with a known answer, on a model made here, in minutes on two cores.

Its corpus is the source of the standard library that runs it. A small LLaDA is pre-trained on one
part; a random half of the rest is fine-tuned on (the members); then every attack says which half.
"""

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sama_jax.config import AuditSettings, PrefixSettings, TrainSettings
from sama_jax.errors import UsageError
from sama_jax.programs import audit, finetune
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting import results, tables
from sama_jax.storage.files import write_atomic, write_json
from sama_jax.storage.run_folder import Row, json_lines
from sama_jax.terminal import Terminal
from sama_jax.texts.installed import stdlib_documents
from sama_jax.texts.read import read_split, read_texts

NUM_MEMBERS = 125
"""Members, and as many non-members."""
MAX_TOKENS = 96
NUM_PREFIXES = 7
"""Texts of each class for the prefixes of ReCaLL and CON-ReCall, none of them evaluated."""
MASK_SEEDS = (0, 1, 2, 3, 4)
SEED_TEXTS = 100
"""Texts that SAMA and Ratio are compared on with every mask seed. All 250 would be 64,000 forward
passes, almost as many as the 80,000 of all attacks together."""

CONFIG: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 128,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 384,
    "vocab_size": 1024,
    "embedding_size": 1024,
    "weight_tying": True,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_sequence_length": 4 * MAX_TOKENS,  # room for prefixes; trained on MAX_TOKENS
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 1022,
    "pad_token_id": 1022,
    "mask_token_id": 1023,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 384,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4 * MAX_TOKENS,
}
"""A next-token model of the demo's size: the same blocks, each position sees those before it."""
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 576,  # two matrices instead of three: as many parameters
    "vocab_size": 1024,
    "max_position_embeddings": 4 * MAX_TOKENS,
}
"""A masked language model of the demo's size."""
NETWORKS = {"llada": CONFIG, "llama": LLAMA, "bert": BERT}
"""Name of a network, as `prepare` takes it -> its config.json."""
PRETRAIN = TrainSettings(epochs=2, learning_rate=2e-3, max_length=MAX_TOKENS)
FINETUNE = TrainSettings(epochs=40, learning_rate=1e-3, max_length=MAX_TOKENS)
"""Forty epochs, so that the members are memorised."""


def audit_settings() -> AuditSettings:
    """Returns the settings of the main audit."""
    prefix = PrefixSettings(tokens=MAX_TOKENS)
    return AuditSettings(max_length=MAX_TOKENS, seed=MASK_SEEDS[0], prefix=prefix)


class Prepared(NamedTuple):
    """The demo's models and texts."""

    base: Path
    target: Path
    members: Path
    nonmembers: Path
    finetune: Path
    """The members, and the few members that serve as prefixes."""
    prefixes: Path
    """A few members that the auditor knows (label 1) and as many non-members (label 0)."""
    length: int

    @classmethod
    def below(cls, out: Path, length: int) -> "Prepared":
        """Returns where everything lies in the folder `out`."""
        folder = out / "corpus"
        return cls(
            base=out / "base",
            target=out / "target",
            members=folder / "members.jsonl",
            nonmembers=folder / "nonmembers.jsonl",
            finetune=folder / "finetune.jsonl",
            prefixes=folder / "prefixes.jsonl",
            length=length,
        )

    def write_texts(
        self,
        members: list[str],
        known: list[str],
        nonmembers: list[str],
        others: list[str],
        learnt: Sequence[str] = (),
    ) -> None:
        """Writes the texts that are audited, those to learn, and the prefixes.

        Args:
          members: to be learnt and audited.
          known: to be learnt, too; prefixes of label 1.
          nonmembers: to be audited.
          others: prefixes of label 0.
          learnt: to be learnt only.
        """
        shots = [(t, 1) for t in known] + [(t, 0) for t in others]
        write_atomic(self.prefixes, json_lines([{"text": t, "label": y} for t, y in shots]))
        parts = {self.members: members, self.nonmembers: nonmembers}
        parts |= {self.finetune: [*members, *learnt, *known]}
        for path, texts in parts.items():
            write_atomic(path, json_lines([{"text": t} for t in texts]))


def prepare(
    out: Path,
    *,
    network: str = "llada",
    seed: int = 42,
    fresh: bool = False,
    quiet: bool = False,
) -> Prepared:
    """Makes the corpus, the base and the target in `out`, or finds them made.

    Models of another `network` of `NETWORKS` lie in a folder of its name; the corpus and the
    settings of training are the same.

    Raises:
      UsageError: `out` is not a demo's folder, or that of another seed.
    """
    terminal = Terminal(quiet=quiet)
    pretraining, finetuning = (dataclasses.replace(s, seed=seed) for s in (PRETRAIN, FINETUNE))
    if fresh and out.is_dir():
        _remove(out)
    _claim(out, seed)
    made, config = _corpus(out, seed, terminal), out / "corpus" / "config.json"
    if network != "llada":
        config = out / network / "config.json"
        write_json(config, NETWORKS[network])
        made = made._replace(base=out / network / "base", target=out / network / "target")
    name = NETWORKS[network]["architectures"][0]
    terminal.say(f"1/4 pre-training a small {name} on the standard library's source")
    finetune.pretrain(
        config,
        out / "corpus" / "pretrain.jsonl",
        made.base,
        pretraining,
        tokenizer=None,
        heldout=made.nonmembers,
        quiet=quiet,
    )
    terminal.say(f"2/4 fine-tuning on {NUM_MEMBERS + NUM_PREFIXES} members")
    finetune.finetune(
        made.base, made.finetune, made.target, finetuning, heldout=made.nonmembers, quiet=quiet
    )
    return made


def run_demo(
    out: Path, *, seed: int = 42, fresh: bool = False, quiet: bool = False, command: str = ""
) -> results.Metrics:
    """Makes the models, audits them and prints the result.

    `out` gets corpus/, base/ (kept and reused), target/, audit/ (the results) and seeds/. A demo
    that was interrupted continues; one with another `seed` needs `fresh` or another folder.

    Returns:
      the metrics of the audit.
    """
    start, terminal = time.monotonic(), Terminal(quiet=quiet)
    made = prepare(out, seed=seed, fresh=fresh, quiet=quiet)
    terminal.say(f"3/4 auditing {2 * NUM_MEMBERS} texts with every attack")
    job = AuditJob(
        target=made.target,
        reference=made.base,
        texts=read_split(made.members, made.nonmembers),
        prefixes=read_texts(made.prefixes),
        out=out / "audit",
        attacks=("all",),
        settings=audit_settings(),
        quiet=quiet,
        command=command,
    )
    result = audit.run_audit(job)
    assert result is not None
    terminal.say(f"4/4 SAMA and Ratio with other mask seeds, {SEED_TEXTS} texts")
    differences = _seed_study(job, result.rows, quiet)
    if not quiet:
        _print(result, differences, time.monotonic() - start)
    return result.metrics


def _remove(out: Path) -> None:
    """Deletes a folder only if a demo made it."""
    if (out / "demo.json").is_file() or not any(out.iterdir()):
        shutil.rmtree(out)
    else:
        raise UsageError(f"{out}: is not a demo's folder, --fresh does not delete it; choose --out")


def _claim(out: Path, seed: int) -> None:
    """Marks a folder as that of a demo with this seed. Raises `UsageError` if it is another's."""
    if out.is_dir() and any(out.iterdir()):
        try:
            made = json.loads((out / "demo.json").read_text())["seed"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UsageError(
                f"{out}: is not empty and no demo's folder; choose another --out"
            ) from None
        if made != seed:
            raise UsageError(
                f"{out}: was made with --seed {made}; start over with demo --fresh, or choose "
                "another --out"
            )
    write_json(out / "demo.json", {"seed": seed})


def _corpus(out: Path, seed: int, terminal: Terminal) -> Prepared:
    """Writes the texts once, and returns where everything of a LLaDA demo lies."""
    folder, made = out / "corpus", Prepared.below(out, MAX_TOKENS)
    if not (folder / "config.json").is_file():
        documents = stdlib_documents()
        if len(documents) < 4 * NUM_MEMBERS:
            raise UsageError(
                f"this Python's standard library holds {len(documents)} usable documents in source "
                f"form, the demo needs {4 * NUM_MEMBERS}; use a Python that ships its .py files"
            )
        random.Random(seed).shuffle(documents)
        _write_corpus(documents, made)
        terminal.say(f"corpus: {len(documents)} top-level functions and classes of this Python")
    return made


def _write_corpus(documents: list[str], made: Prepared) -> None:
    """Splits shuffled documents: members, their prefixes, non-members; the base learns the rest."""
    members, known = documents[:NUM_MEMBERS], documents[NUM_MEMBERS:][:NUM_PREFIXES]
    rest = documents[NUM_MEMBERS + NUM_PREFIXES :]
    nonmembers, pretrain = rest[:NUM_MEMBERS], rest[NUM_MEMBERS:]
    folder = made.members.parent
    made.write_texts(members, known, nonmembers, pretrain[-NUM_PREFIXES:])
    write_atomic(folder / "pretrain.jsonl", json_lines([{"text": t} for t in pretrain]))
    write_json(folder / "config.json", CONFIG)  # last: its presence means complete


def _seed_study(job: AuditJob, rows: Sequence[Row], quiet: bool) -> dict[int, tuple[float, float]]:
    """Returns the AUC of SAMA and of Ratio for each mask seed, on the first texts of both classes.

    The main audit is the first seed. Writes `seeds.json`.
    """
    aucs = {MASK_SEEDS[0]: _aucs(rows[:SEED_TEXTS])}
    for seed in MASK_SEEDS[1:]:
        settings = dataclasses.replace(job.settings, seed=seed)
        again = dataclasses.replace(
            job,
            out=job.out.parent / "seeds" / str(seed),
            attacks=("sama", "ratio"),
            limit=SEED_TEXTS,
            settings=settings,
            figures=False,
            quiet=True,
        )
        result = audit.run_audit(again)
        assert result is not None
        aucs[seed] = _aucs(result.rows)
        Terminal(quiet=quiet).say(f"    mask seed {seed}: SAMA {aucs[seed][0]:.3f}")
    write_json(
        job.out.parent / "seeds.json",
        {str(s): {"sama": a, "ratio": b} for s, (a, b) in aucs.items()},
    )
    return aucs


def _aucs(rows: Sequence[Row]) -> tuple[float, float]:
    return results.auc(rows, "sama"), results.auc(rows, "ratio")


def _print(result: audit.AuditResult, aucs: dict[int, tuple[float, float]], seconds: float) -> None:
    Terminal().show(tables.metrics_table(result.metrics, result.rows, result.cost))
    gaps = [sama - ratio for sama, ratio in aucs.values()]
    values = ", ".join(f"{gap:+.3f}" for gap in gaps)
    print(
        f"AUC of SAMA minus Ratio on {SEED_TEXTS} texts over mask seeds {MASK_SEEDS[0]} to "
        f"{MASK_SEEDS[-1]}: mean {sum(gaps) / len(gaps):+.3f} ({values})"
    )
    print(results.headline(result.metrics))
    print(f"{seconds:.0f} s. Results: {result.out} (report.html, scores.jsonl)")
