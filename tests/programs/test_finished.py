"""The same command on a finished run reads what it left, unless anything has changed."""

import json
from pathlib import Path

import pytest
import tiny
from wrong_inputs import Box

from sama_jax.cli import entry
from sama_jax.programs import audit, audit_records


def run(box: Box, **flags: object) -> int:
    """Runs it aloud."""
    command = box.command(**{"attacks": "sama,loss", **flags})
    return entry.main([word for word in command if word != "--quiet"])


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    base = tmp_path_factory.mktemp("finished")
    for seed, name in enumerate(("target", "reference")):
        tiny.folder(base / name, seed=seed)
    data = tiny.write_texts(base / "texts.jsonl", tiny.texts(24, (8, 20)))
    made = Box(base, base / "target", base / "reference", data, base / "run")
    assert run(made) == 0
    return made


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Bytes and time of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """Lists the folders that are opened to be written."""
    found: list[Path] = []
    kept = audit.open_run

    def counted(job, *rest):
        found.append(job.out)
        return kept(job, *rest)

    monkeypatch.setattr(audit, "open_run", counted)
    return found


def test_nothing_is_written_and_the_results_are_the_same(box: Box, opened, capsys):
    before = contents(box.out)
    assert run(box) == 0
    assert not opened
    assert contents(box.out) == before
    said = capsys.readouterr()
    assert "finished before, and nothing has changed since" in said.err
    assert "loss" in said.out


def test_another_command_does_its_work(box: Box, opened):
    assert run(box, attacks="sama,loss,zlib") == 0
    assert opened == [box.out]
    assert run(box) == 0
    assert opened == [box.out, box.out]


def test_a_changed_file_is_made_anew(box: Box, opened):
    scores = box.out / "scores.jsonl"
    good = scores.read_bytes()
    scores.write_bytes(good.replace(b"1", b"2", 1))
    assert run(box) == 0
    assert opened == [box.out]
    assert scores.read_bytes() == good


def test_other_code_makes_the_report_anew(box: Box, opened, monkeypatch):
    monkeypatch.setattr(audit_records, "source_digest", lambda: "other")
    assert run(box) == 0
    assert opened == [box.out]
    assert json.loads((box.out / "manifest.json").read_text())["source"] == "other"
