"""The experiment that counts gates on sound audits still runs, and counts every split."""

import subprocess
import sys
from pathlib import Path

import tiny

ROOT = Path(__file__).parents[2]


def test_gates_of_splits_are_counted(tmp_path: Path):
    tiny.folder(tmp_path / "base", seed=0)
    data = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(40, (10, 20)))
    script = ROOT / "experiments" / "statistics" / "gates.py"
    numbers = ["--targets", "1", "--splits", "3", "--texts", "12", "--max-length", "24"]
    command = [sys.executable, script, tmp_path / "base", data, tmp_path / "out", *numbers]
    done = subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    table = {
        tuple(cell.strip(" `") for cell in line.split("|")[1:3]): line.split("|")[3:6]
        for line in done.stdout.splitlines()
        if line.startswith(("| true", "| permuted"))
    }
    for labels in ("true", "permuted"):
        names = {name for kind, name in table if kind == labels}
        assert {"same_losses", "target_learnt", "reference_learnt", "direction", "ties"} <= names
    assert all(sum(map(int, counts)) <= 3 for counts in table.values())
    assert "of 3 splits each" in done.stdout
