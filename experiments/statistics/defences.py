"""Measures what adapters and private training do to membership inference, and to the held-out loss.

    python experiments/statistics/defences.py OUT [--seeds N]

A LLaDA of two layers learns 1,500 texts of 32 words of a made-up language, and is then fine-tuned
on members of the same language: all its weights, adapters of several ranks, and both with
differential privacy. Each target is audited against the base, on its members and on as many texts
that nobody learnt. A line a target: epsilon, the loss on those others before and after (nats a
token), and the AUC of each attack with its 95 % interval. Finished models and audits are kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from sama_jax import AuditJob, AuditSettings, run_audit
from sama_jax.config import LoraSettings, PrivacySettings, TrainSettings
from sama_jax.errors import ValidityError
from sama_jax.programs import finetune
from sama_jax.texts.read import read_split

WORDS, ROWS, LENGTH, KNOWN, MEMBERS = 20, 32, 32, 1500, 256
CONFIG = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_hidden_size": 64,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_theta": 100.0,
    "weight_tying": False,
    "vocab_size": ROWS,
    "embedding_size": ROWS,
    "mask_token_id": ROWS - 1,
    "eos_token_id": ROWS - 2,
}
PRETRAIN = TrainSettings(epochs=24, batch_size=32, learning_rate=1e-2, max_length=LENGTH)
TUNE = {"epochs": 60, "batch_size": 32, "max_length": LENGTH}
FULL, LOW = 3e-3, 1e-2
"""Learning rates of all weights, and of adapters."""
TARGETS: dict[str, dict[str, Any]] = {
    "all weights": {"learning_rate": FULL},
    "adapter of rank 16": {"learning_rate": LOW, "lora": LoraSettings(r=16, alpha=32)},
    "adapter of rank 4": {"learning_rate": LOW, "lora": LoraSettings(r=4, alpha=8)},
    "adapter of rank 1": {"learning_rate": LOW, "lora": LoraSettings(r=1, alpha=2)},
    "all weights, epsilon 8": {"learning_rate": FULL, "dp": PrivacySettings(epsilon=8)},
    "all weights, epsilon 1": {"learning_rate": FULL, "dp": PrivacySettings(epsilon=1)},
    "adapter of rank 4, epsilon 1": {
        "learning_rate": LOW,
        "lora": LoraSettings(r=4, alpha=8),
        "dp": PrivacySettings(epsilon=1),
    },
}
ATTACKS = ("sama", "ratio", "complement", "loss")


def texts_of(seed: int, count: int) -> list[str]:
    """Draws texts: a word leaves four choices for the one after the next."""
    draw = np.random.default_rng(seed)
    found = draw.integers(0, WORDS, (count, LENGTH))
    for place in range(2, LENGTH):
        found[:, place] = (7 * found[:, place - 2] + draw.integers(1, 5, count)) % WORDS
    return [" ".join(f"w{word}" for word in row) for row in found]


def prepare(out: Path, seed: int) -> Path:
    """Writes the texts, and trains the base; returns its folder."""
    out.mkdir(parents=True, exist_ok=True)
    texts = texts_of(seed, KNOWN + 2 * MEMBERS)
    parts = {"known": texts[:KNOWN], "members": texts[KNOWN : KNOWN + MEMBERS]}
    parts["others"] = texts[KNOWN + MEMBERS :]
    for name, found in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in found)
        (out / f"{name}.jsonl").write_text("".join(lines))
    (out / "config.json").write_text(json.dumps(CONFIG))
    vocabulary = {f"w{i}": i for i in range(ROWS - 2)} | {"<|endoftext|>": ROWS - 2}
    vocabulary |= {"<|mdm_mask|>": ROWS - 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    made.add_special_tokens(["<|endoftext|>", "<|mdm_mask|>"])
    made.save(str(out / "tokenizer.json"))
    given = out / "config.json", out / "known.jsonl", out / "base", PRETRAIN
    finetune.pretrain(*given, tokenizer=out / "tokenizer.json", quiet=True)
    return out / "base"


def audited(out: Path, base: Path, name: str, seed: int) -> dict[str, Any]:
    """Trains one target and audits it; returns what a line tells."""
    folder = out / name.replace(" ", "-").replace(",", "")
    settings = TrainSettings(seed=seed, **TUNE, **TARGETS[name])
    members, others = out / "members.jsonl", out / "others.jsonl"
    result = finetune.finetune(base, members, folder, settings, heldout=others, quiet=True)
    adapter = folder if settings.lora.r else None
    job = AuditJob(
        target=folder if adapter is None else base,
        adapter=adapter,
        reference=base,
        texts=read_split(members, others),
        out=out / "audits" / folder.name,
        store=out / "losses",
        attacks=ATTACKS,
        settings=AuditSettings(max_length=LENGTH),
        figures=False,
        quiet=True,
    )
    void = False
    try:
        run_audit(job)
    except ValidityError:  # a target that has learnt nothing, say
        void = True
    metrics = json.loads((job.out / "metrics.json").read_text())["attacks"]
    found = {a: (m["auc"], *m["auc_ci"]) for a, m in metrics.items()}
    epsilon = result.get("privacy", {}).get("epsilon")
    losses = result["nll_before"], result["nll_after"]
    return {"epsilon": epsilon, "nll": losses, "auc": found, "void": void}


def main() -> None:
    """Prints a line a target and seed, and writes them into OUT/defences.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    everything: dict[str, Any] = {}
    for seed in range(args.seeds):
        base = prepare(args.out / f"s{seed}", seed)
        for name in TARGETS:
            found = audited(args.out / f"s{seed}", base, name, seed)
            everything[f"{name}, seed {seed}"] = found
            aucs = (
                f"{a} {v:.3f} ({lo:.3f} to {hi:.3f})" for a, (v, lo, hi) in found["auc"].items()
            )
            epsilon = "none" if found["epsilon"] is None else f"{found['epsilon']:.3f}"
            before, after = found["nll"]
            told = f"seed {seed}, {name}: epsilon {epsilon}, loss {before:.3f} -> {after:.3f}; "
            print(told + ", ".join(aucs), flush=True)
            (args.out / "defences.json").write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
