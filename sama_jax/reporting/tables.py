"""The table of results: one line for each attack, as plain cells and for the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from sama_jax.reporting.results import METRICS, Metrics, attack_names
from sama_jax.storage.run_folder import Row

MISSING = "–"
"""Stands where there is no number."""
PASSES = "passes (a model and text)"
_BROKEN = {PASSES: "passes a\nmodel\nand text"}
"""Headers that the terminal breaks, so that 80 columns hold every cell unbroken."""


def header() -> list[str]:
    """Returns the header of each column of `table_rows`."""
    return ["attack", *(metric.column for metric in METRICS), PASSES, "seconds"]


def table_rows(
    metrics: Metrics, rows: Sequence[Row] = (), cost: Mapping[str, Any] | None = None
) -> list[list[str]]:
    """Returns the cells of each attack, `MISSING` where there is no number.

    Args:
      rows: lines of scores.jsonl, for the passes; with no metrics, their attacks are listed.
      cost: the manifest's; `cost["seconds"]` maps an attack to its seconds.
    """
    attacks = metrics["attacks"]
    seconds = (cost or {}).get("seconds")
    seconds = seconds if isinstance(seconds, dict) else {}
    lines = []
    for name in attacks or attack_names(rows):
        found = attacks.get(name)
        cells = [metric.shown(found) if found else None for metric in METRICS]
        cells += [_passes(rows, name), _seconds(seconds.get(name))]
        lines.append([name, *(cell or MISSING for cell in cells)])
    return lines


def metrics_table(
    metrics: Metrics, rows: Sequence[Row] = (), cost: Mapping[str, Any] | None = None
) -> Table:
    """Lays `table_rows` out for the terminal."""
    table = Table(
        box=None, padding=(0, 1), pad_edge=False, collapse_padding=True, header_style="bold"
    )
    for i, column in enumerate(header()):
        table.add_column(
            _BROKEN.get(column, column).replace(" (", "\n("),
            justify="right" if i else "left",
            vertical="bottom",
            no_wrap=i == 0,  # a name cut in two cannot be copied
        )
    for cells in table_rows(metrics, rows, cost):
        table.add_row(*(Text(cell) for cell in cells))  # Text: brackets are not markup
    return table


def is_number(value: Any) -> bool:
    """Tells whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _seconds(value: Any) -> str | None:
    return f"{value:.1f}" if is_number(value) else None


def _passes(rows: Iterable[Row], name: str) -> str | None:
    """Writes the smallest and the largest number of passes of the texts that have a score."""
    scored = [row for row in rows if (row.get("scores") or {}).get(name) is not None]
    found = [(row.get("passes") or {}).get(name) for row in scored]
    passes = [p for p in found if p is not None]
    if not passes:
        return None
    return "–".join(f"{p:g}" for p in sorted({min(passes), max(passes)}))
