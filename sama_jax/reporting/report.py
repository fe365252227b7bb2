"""Writes the report of a finished run, `report.md` and `figures/`, from its folder alone.

Reads `scores.jsonl` and `manifest.json`; computes the metrics from the scores.
"""

from pathlib import Path
from typing import Any

from sama_jax.errors import DataError, UsageError
from sama_jax.reporting.markdown import markdown
from sama_jax.reporting.results import Metrics, compute_metrics
from sama_jax.storage.files import read_whole_json_lines, write_atomic
from sama_jax.storage.run_folder import MANIFEST, MANIFEST_SHAPE, ROW_SHAPE, SCORES
from sama_jax.storage.shapes import Shape, misfit
from sama_jax.untrusted import read_json


def write_report(folder: Path, *, figures: bool = True, metrics: Metrics | None = None) -> Path:
    """Writes `report.md` of a run folder and, if wanted, its figures; returns the report's path.

    A run without labels gets a report of its scores alone. The metrics are computed from the
    scores, unless they are given because they just have been.

    Raises:
      UsageError: `folder` is not a finished run.
      OutputError: `folder` cannot be written to.
    """
    manifest = _read(folder, MANIFEST, MANIFEST_SHAPE)
    rows = _read(folder, SCORES, ROW_SHAPE)
    if manifest.get("finished") is False:
        raise UsageError(
            f"{folder} is not a finished run: it was interrupted; run the same `sama-jax audit` "
            "command again first"
        )
    texts = (manifest.get("run") or {}).get("texts", len(rows))
    if texts != len(rows) or len({row["id"] for row in rows}) < len(rows):
        raise UsageError(
            f"{folder / SCORES} has {len(rows)} lines, not one for each of {texts} texts; repeat "
            "the audit that made the folder to write it anew"
        )
    if metrics is None:
        metrics = compute_metrics(rows, int(manifest.get("seed") or 0))
    if figures:
        from sama_jax.reporting import figures as pictures  # Matplotlib: a second to import

        pictures.write_figures(folder, rows)
    path = folder / "report.md"
    write_atomic(path, markdown(rows, metrics, manifest, figures))
    return path


def _read(folder: Path, name: str, shape: Shape) -> Any:
    """Reads a `.json` (an object) or `.jsonl` (a list of objects) file of a run folder."""
    again = "repeat the audit that made the folder to write it anew"
    path = folder / name
    if not path.is_file():
        raise UsageError(
            f"{folder} is not a finished run: it has no {name}; "
            f"run `sama-jax audit --out {folder}` (or the same command again) first"
        )
    try:
        if name.endswith(".json"):
            found = [read_json(path)]
        else:
            found = read_whole_json_lines(path, "a line of scores")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); {again}") from None
    except DataError as error:
        raise UsageError(str(error)) from None
    for number, value in enumerate(found, 1):
        wrong = misfit(value, shape)
        if wrong is not None:
            raise UsageError(f"{path} line {number} has no usable field '{wrong}'; {again}")
    return found if name.endswith(".jsonl") else found[0]
