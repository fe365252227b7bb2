"""A finished folder knows what it holds: any change is named."""

import json

import pytest

from sama_jax.storage import checksums
from sama_jax.storage.files import sealed, write_json


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("scores.jsonl", "report.md", "figures/roc.png"):
        (tmp_path / name).write_bytes(f"{name} 0.5".encode())
    write_json(tmp_path / "manifest.json", sealed({"files": checksums.record(tmp_path)}))
    return tmp_path


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_nothing_was_changed(folder):
    assert checksums.changed(folder, manifest(folder)) == []


@pytest.mark.parametrize("name", ["scores.jsonl", "report.md", "figures/roc.png"])
def test_a_digit_is_found(name, folder):
    path = folder / name
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6"))
    assert checksums.changed(folder, manifest(folder)) == [name]
    assert checksums.is_changed(folder, manifest(folder), name)


def test_new_lost_and_edited_files_are_found(folder):
    (folder / "more.txt").write_text("x")
    (folder / "report.md").unlink()
    edited = manifest(folder) | {"seed": 3}
    assert checksums.changed(folder, edited) == ["manifest.json", "more.txt", "report.md"]
