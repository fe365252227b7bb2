"""Writes the report of a finished run, `report.md` and `figures/`, from its folder alone.

Reads `scores.jsonl` and `manifest.json`; computes the metrics from the scores.
"""

from pathlib import Path
from typing import Any

from sama_jax.errors import DataError, UsageError
from sama_jax.reporting.markdown import markdown
from sama_jax.reporting.results import Metrics, metrics_of
from sama_jax.storage.files import write_atomic
from sama_jax.storage.run_folder import (
    MANIFEST,
    SCORES,
    Row,
    read_manifest,
    read_rows,
    read_unchanged_rows,
    record_also,
)


def read_finished(folder: Path, *, checked: bool = True) -> tuple[list[Row], dict[str, Any]]:
    """Reads the rows and the manifest of a finished run.

    Args:
      folder: the run's.
      checked: refuse rows that were changed after the run had finished.

    Raises `UsageError`: `folder` is not a finished run.
    """
    manifest = read_manifest(folder)
    for name in (MANIFEST, SCORES):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is not a finished run: it has no {name}; run `sama-jax audit --out "
                f"{folder}` (or the same command again) first"
            )
    assert manifest is not None, "it is there"
    try:
        rows = read_unchanged_rows(folder, manifest) if checked else read_rows(folder)
    except DataError as error:
        raise UsageError(str(error)) from None
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
    return rows, manifest


def write_report(folder: Path, *, figures: bool = True, metrics: Metrics | None = None) -> Path:
    """Writes `report.md` of a run folder and, if wanted, its figures; returns the report's path.

    A run without labels gets a report of its scores alone. The metrics are computed from the
    scores, unless they are given because they just have been.

    Raises:
      UsageError: `folder` is not a finished run.
      OutputError: `folder` cannot be written to.
    """
    rows, manifest = read_finished(folder, checked=metrics is None)
    if metrics is None:
        metrics = metrics_of(rows, manifest)
    drawn = []
    if figures:
        from sama_jax.reporting import figures as pictures  # Matplotlib: a second to import

        drawn = pictures.write_figures(folder, rows)
    path = folder / "report.md"
    write_atomic(path, markdown(rows, metrics, manifest, figures))
    record_also(folder, ["report.md", *(f"figures/{file.name}" for file in drawn)])
    return path
