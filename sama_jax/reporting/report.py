"""Writes the report of a finished run, `report.md` and `figures/`, from its folder alone.

Reads `scores.jsonl`, `manifest.json` and `metrics.json` (computed if absent).
"""

import json
from pathlib import Path
from typing import Any, cast

from sama_jax.errors import UsageError
from sama_jax.reporting.markdown import markdown
from sama_jax.reporting.results import Metrics, compute_metrics
from sama_jax.storage.files import write_atomic
from sama_jax.storage.run_folder import MANIFEST, METRICS, SCORES


def write_report(folder: Path, *, figures: bool = True) -> Path:
    """Writes `report.md` of a run folder and, if wanted, its figures; returns the report's path.

    A run without labels gets a report of its scores alone.

    Raises:
      UsageError: `folder` is not a finished run.
      OutputError: `folder` cannot be written to.
    """
    manifest, rows = _read(folder, MANIFEST), _read(folder, SCORES)
    if (folder / METRICS).exists():
        metrics = cast(Metrics, {"attacks": {}} | _read(folder, METRICS))
    else:
        metrics = compute_metrics(rows, int(manifest.get("seed") or 0))
    if figures:
        from sama_jax.reporting import figures as pictures  # Matplotlib: a second to import

        pictures.write_figures(folder, rows)
    path = folder / "report.md"
    write_atomic(path, markdown(rows, metrics, manifest, figures))
    return path


def _read(folder: Path, name: str) -> Any:
    """Parses a `.json` (an object) or `.jsonl` (a list of objects) file of a run folder."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UsageError(
                f"{folder / name} cannot be read ({error}); "
                "repeat the audit that made the folder to write it anew"
            ) from None
        raise UsageError(
            f"{folder} is not a finished run: it has no {name}; "
            f"run `sama-jax audit --out {folder}` (or the same command again) first"
        ) from None
    # Not splitlines(): it also splits at separators that JSON allows inside a string.
    lines = text.split("\n") if name.endswith(".jsonl") else [text]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            value = error
        if isinstance(value, dict):
            found.append(value)
        elif value is not None or name.endswith(".json"):
            raise UsageError(
                f"{folder / name} line {number} is not a JSON object; "
                "repeat the audit that made the folder to write it anew"
            )
    return found if name.endswith(".jsonl") else found[0]
