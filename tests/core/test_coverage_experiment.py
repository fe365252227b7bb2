"""The experiment that measures coverage still runs, and its tables have the rows they speak of."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_experiment_are_printed():
    script = ROOT / "experiments" / "statistics" / "coverage.py"
    command = [sys.executable, str(script), "auc", "headline", "--repetitions", "2"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 16 + 2 + 4  # head and rule of each
    assert all(line.count("|") == 5 for line in lines[:18])
