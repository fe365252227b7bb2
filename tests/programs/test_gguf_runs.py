"""Runs on GGUF files give what runs on the folders give that the files were made from."""

import json
import shutil
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import tiny
from fuzz import reader, seeds

from checkpoints_convert import __main__ as convert
from sama_jax.cli import entry


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Target and reference as folders, and as folders with a GGUF file and a tokenizer."""
    root = tmp_path_factory.mktemp("gguf-runs")
    for seed, name in enumerate(("target", "reference")):
        folder = tiny.folder(root / "folders" / name, seed=seed)
        (root / "files" / name).mkdir(parents=True)
        gguf_files.write(root / "files" / name / f"{name}.gguf", folder, "llada")
        shutil.copy(folder / "tokenizer.json", root / "files" / name)
    tiny.write_texts(root / "texts.jsonl", tiny.texts(12, (4, 20)))
    return root


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_give_the_losses_of_folders(models, tmp_path):
    found = []
    for kind in ("folders", "files"):
        given = ["--model", str(models / kind / "target"), "--data", str(models / "texts.jsonl")]
        out = tmp_path / kind
        assert entry.main(["nll", *given, "--out", str(out), "--passes", "2", "--quiet"]) == 0
        found.append(rows(out / "nll.jsonl"))
    assert found[0] == found[1]


def test_an_audit_reads_files(models, tmp_path, capsys):
    data = models / "texts.jsonl"
    command = reader.audit(tmp_path, models / "files", data, "--attacks", "loss", "--dry-run")
    assert entry.main(command) == 0
    shutil.copytree(models / "files" / "target", tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").unlink()
    command[2] = str(tmp_path / "target")
    assert entry.main(command) == 4
    assert "tokenizer.json beside the file" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_refused(models, tmp_path, capsys):
    shutil.copytree(models / "files" / "target", tmp_path / "m")
    path = tmp_path / "m" / "target.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:-64] + np.full(16, np.nan, np.float32).tobytes())
    given = ["--model", str(tmp_path / "m"), "--data", str(models / "texts.jsonl")]
    assert entry.main(["nll", *given, "--out", str(tmp_path / "out"), "--passes", "2"]) == 4
    assert "NaN" in capsys.readouterr().err


def test_pytorch_reads_a_file_by_itself_and_agrees(tmp_path, capsys):
    for name in ("llama", "dream"):
        config = {**seeds.CONFIGS["dream"], "model_type": "Dream" if name == "dream" else name}
        config["architectures"] = None if name != "dream" else ["DreamModel"]
        made = seeds.model(tmp_path / name, config)
        path = gguf_files.write(tmp_path / f"{name}.gguf", made, name)
        code = convert.main(["verify", str(path)])
        said = capsys.readouterr()
        if name == "dream":
            assert code == 4
            assert "`to-hf` writes" in said.err
        else:
            assert code == 0, said
            assert "de-quantizing" not in said.err
