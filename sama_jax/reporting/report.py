"""Writes the report of a finished run from its folder alone: report.html, report.md, figures/.

Reads scores.jsonl, manifest.json and densities.json; computes the metrics from the scores.
"""

import contextlib
import datetime
from pathlib import Path
from typing import Any, cast

from sama_jax.core.spread import QUANTILES, Spread
from sama_jax.errors import DataError, UsageError
from sama_jax.reporting import html as page
from sama_jax.reporting.markdown import markdown
from sama_jax.reporting.results import Metrics, metrics_of
from sama_jax.reporting.tokens import PAGE as TOKENS
from sama_jax.storage.files import write_atomic
from sama_jax.storage.run_folder import (
    DENSITIES,
    MANIFEST,
    SCORES,
    Row,
    read_manifest,
    read_rows,
    read_unchanged_rows,
    record_also,
)
from sama_jax.storage.shapes import Shape, fits
from sama_jax.untrusted import read_json

PAGE, TEXT = "report.html", "report.md"


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
    run = manifest.get("run") or {}
    texts = (run.get("windows") or run).get("texts", len(rows))
    if texts != len(rows) or len({row["id"] for row in rows}) < len(rows):
        raise UsageError(
            f"{folder / SCORES} has {len(rows)} lines, not one for each of {texts} texts; repeat "
            "the audit that made the folder to write it anew"
        )
    return rows, manifest


def write_report(folder: Path, *, figures: bool = True, metrics: Metrics | None = None) -> Path:
    """Writes report.html and report.md of a run folder, and figures; returns the page's path.

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
    write_atomic(folder / TEXT, markdown(rows, metrics, manifest, figures))
    shown = page.shown_figures(rows, metrics, read_spread(folder / DENSITIES)) if figures else []
    today = datetime.date.today().isoformat()
    words = TOKENS if (folder / TOKENS).is_file() else ""
    write_atomic(folder / PAGE, page.html(rows, metrics, manifest, shown, today, words))
    record_also(folder, [TEXT, PAGE, *(f"figures/{file.name}" for file in drawn)])
    return folder / PAGE


_SPREAD: Shape = {
    "densities": [float],
    "classes": {str: {"texts": int, "by_pass": [[float]], "within": float, "mean": float}},
}


def read_spread(path: Path) -> Spread | None:
    """Reads densities.json; None if it is not there, or is no such file any more."""
    with contextlib.suppress(OSError, ValueError):
        found = read_json(path)
        if fits(found, _SPREAD):
            lines = [one["by_pass"] for one in found["classes"].values()]
            wanted = [len(QUANTILES)] * len(found["densities"])
            if all([len(line) for line in by_pass] == wanted for by_pass in lines):
                return cast(Spread, found)
    return None
