"""A finished run is verified: any changed digit in any file is named."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from wrong_inputs import Box

from sama_jax.cli import entry
from sama_jax.programs.verify_run import differences
from sama_jax.storage.files import sealed, write_json
from sama_jax.storage.run_folder import record_also


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, figures: None) -> Path:
    base = tmp_path_factory.mktemp("verify")
    for seed, name in enumerate(("target", "reference")):
        tiny.folder(base / name, seed=seed)
    data = tiny.write_texts(base / "texts.jsonl", tiny.texts(24, (8, 20)))
    box = Box(base, base / "target", base / "reference", data, base / "run")
    assert entry.main(box.command(attacks="sama,loss", include_votes=True)) == 0
    return base / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def verify(folder: Path, capsys) -> tuple[int, str]:
    code = entry.main(["verify-run", str(folder)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_run_is_as_it_was_written_also_after_a_new_report(copied: Path, capsys):
    code, said = verify(copied, capsys)
    assert code == 0, said
    assert "files are as the run has written them" in said
    assert entry.main(["report", str(copied)]) == 0
    assert verify(copied, capsys)[0] == 0
    assert entry.main(["score", "--store", str(copied), "--attacks", "zlib"]) == 0
    assert verify(copied, capsys)[0] == 0


def test_a_changed_digit_in_any_file_is_found(run: Path, tmp_path: Path, capsys):
    names = [p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()]
    assert {"scores.jsonl", "metrics.json", "manifest.json", "protocol.json"} < set(names)
    assert {"figures/roc.png", "losses/losses-00000.bin", "log.jsonl", "report.md"} < set(names)
    for number, name in enumerate(names):
        copy = shutil.copytree(run, tmp_path / str(number))
        content = bytearray((copy / name).read_bytes())
        digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
        place = digits[len(digits) // 2]
        content[place] = ord("7") if content[place] != ord("7") else ord("8")
        (copy / name).write_bytes(bytes(content))
        code, said = verify(copy, capsys)
        assert code in (2, 3), (name, said)
        assert name in said


def test_files_that_are_gone_or_new_are_named(copied: Path, capsys):
    (copied / "report.md").unlink()
    (copied / "more.txt").write_text("1")
    code, said = verify(copied, capsys)
    assert code == 3
    assert "2 files are not as the run has written them" in said
    assert "\n  more.txt\n  report.md" in said


def test_metrics_that_the_scores_do_not_give_are_found_even_if_they_were_recorded(
    copied: Path, capsys
):
    path = copied / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["attacks"]["sama"]["auc"] += 0.01
    write_json(path, metrics)
    record_also(copied, ["metrics.json"])
    code, said = verify(copied, capsys)
    assert code == 3
    assert "attacks.sama.auc is" in said


def test_what_was_never_recorded_or_finished_is_refused(copied: Path, capsys):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest.pop("checksum", None)
    changes = {"records no files": {"files": {}}, "finished": {"finished": False}}
    for expected, change in changes.items():
        write_json(copied / "manifest.json", sealed(manifest | change))
        code, said = verify(copied, capsys)
        assert code == 2
        assert expected in said
    assert verify(copied / "none", capsys)[0] == 2


def test_numbers_may_differ_by_rounding_and_nothing_else_may():
    was = {"a": [1.0, None], "b": "x", "c": 1}
    assert list(differences(was, {"a": [1.0 + 1e-12, None], "b": "x", "c": 1})) == []
    assert [d[0] for d in differences(was, {"a": [1.1, 2.0], "b": "y"})] == [
        "a[0]",
        "a[1]",
        "b",
        "c",
    ]
