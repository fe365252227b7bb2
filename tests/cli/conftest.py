"""Good inputs, a place of its own with them for each test, and a complete run on them."""

import shutil
from pathlib import Path

import pytest
import tiny
from wrong_inputs import Box

from sama_jax.cli import entry


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("inputs")
    tiny.folder(base / "target", seed=0)
    tiny.folder(base / "reference", seed=1)
    tiny.write_texts(base / "texts.jsonl", tiny.texts(20, (8, 28)))
    return base


@pytest.fixture
def box(originals: Path, tmp_path: Path) -> Box:
    for name in ("target", "reference"):
        shutil.copytree(originals / name, tmp_path / name)
    data = tmp_path / "texts.jsonl"
    shutil.copy(originals / "texts.jsonl", data)
    return Box(tmp_path, tmp_path / "target", tmp_path / "reference", data, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(originals: Path, figures: None) -> Path:
    """A complete run on the good inputs."""
    out = originals / "finished"
    box = Box(
        originals, originals / "target", originals / "reference", originals / "texts.jsonl", out
    )
    assert entry.main(box.command()) == 0
    return out
