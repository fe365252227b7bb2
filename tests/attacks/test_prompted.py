"""What a response loses without its prompt, against PyTorch on masks drawn here."""

import json
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
import tiny
import torch
from scored import SCORED
from scored import oracle as oracle_of

from sama_jax import rng
from sama_jax.attacks.perturbed import shared_probes
from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.errors import UsageError
from sama_jax.programs.audit import run_audit
from sama_jax.programs.jobs import AuditJob
from sama_jax.texts.conversations import Form, named_template
from sama_jax.texts.read import Texts, collect, read_texts

MODELS = ("target", "reference")
SETTINGS = AuditSettings(max_length=32, passes=4, sama=SamaSettings(steps=2, subsets=8))
PAIRS = list(zip(tiny.texts(12, (3, 8)), tiny.texts(12, (3, 8), seed=1)))


def conversations(path: Path) -> Texts:
    rows = [{"prompt": p, "response": r, "label": i % 2} for i, (p, r) in enumerate(PAIRS)]
    rows.append({"prompt": "", "response": "karo", "label": 1})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_texts(path, form=Form(named_template("plain")))


def torch_nll(module: oracle.Llada, ids: np.ndarray, masks: np.ndarray, hidden: np.ndarray):
    """The bound of the masked tokens, where `hidden` ones hold the mask token in every pass."""
    whole, values = torch.tensor(ids.astype(np.int64)), []
    seen = torch.where(torch.tensor(hidden), oracle.MASK_ID, whole)
    for mask in masks:
        logits, _ = module(torch.where(torch.tensor(mask), oracle.MASK_ID, seen)[None])
        nll = torch.nn.functional.cross_entropy(logits[0], whole, reduction="none").numpy()
        values.append(nll[mask].mean())
    return float(np.mean(values))


@oracle_of("prompt")
def test_prompt_against_pytorch_behind_visible_and_masked_prompts(tmp_path: Path):
    config = oracle.config(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, mlp_hidden_size=32)
    module, _ = (oracle.random_folder(tmp_path / name, config, len(name)) for name in MODELS)
    for name in MODELS:
        tiny.tokenizer().save(str(tmp_path / name / "tokenizer.json"))
    texts = conversations(tmp_path / "pairs.jsonl")
    job = AuditJob(
        target=tmp_path / "target",
        reference=tmp_path / "reference",
        texts=texts,
        out=tmp_path / "out",
        attacks=("prompt",),
        settings=SETTINGS,
        figures=False,
        quiet=True,
    )
    result = run_audit(job)
    assert result is not None
    probes, tokenizer = shared_probes(SETTINGS, 2), tiny.tokenizer()
    for row, (prompt, response) in zip(result.rows, PAIRS):
        ids = np.array(tokenizer.encode(prompt + response).ids, np.int32)
        starts = np.cumsum([0, *(len(tokenizer.id_to_token(int(i))) for i in ids)])[:-1]
        hidden = starts < len(prompt)
        ids, hidden = ids[-32:], hidden[-32:]
        maskable = np.zeros(32, bool)
        maskable[: len(ids)] = ~hidden
        key = rng.text_key(42, rng.text_key_data(ids))
        masks = np.asarray(jax.jit(probes.plan)(key, maskable).masks)[:, : len(ids)]
        with_prompt, without = (
            torch_nll(module, ids, masks, hidden & blind) for blind in (False, True)
        )
        np.testing.assert_allclose(row["scores"]["prompt"], without - with_prompt, atol=2e-5)
    assert result.rows[-1]["scores"]["prompt"] is None  # it has no prompt
    assert "no prompt" in result.rows[-1]["undefined"]["prompt"]
    SCORED.add("prompt")


def test_prompt_needs_prompts(tmp_path: Path):
    for name in MODELS:
        tiny.folder(tmp_path / name, seed=len(name))
    texts = collect(conversations(tmp_path / "pairs.jsonl").texts)
    flat = collect([text._replace(rendered=None) for text in texts.texts])
    job = AuditJob(
        target=tmp_path / "target",
        reference=tmp_path / "reference",
        texts=flat,
        out=tmp_path / "out",
        attacks=("prompt",),
        settings=SETTINGS,
        quiet=True,
    )
    with pytest.raises(UsageError, match="defined for prompts and responses"):
        run_audit(job)
