"""The recipe "change or add a metric", executed as the page shows it."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from score_rows import make_rows

from sama_jax.reporting import report, results, tables
from sama_jax.storage.files import write_json
from sama_jax.storage.run_folder import MANIFEST, METRICS, SCORES, json_lines

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "add_a_metric.md"


@pytest.fixture
def added(monkeypatch):
    """Runs the page's block on a copy of the list; returns the metric that it appends."""
    monkeypatch.setattr(results, "METRICS", [*results.METRICS])
    monkeypatch.setattr(tables, "METRICS", results.METRICS)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    exec(code, {})
    return results.METRICS[-1]


def best_balanced_accuracy(rows, name):
    """Tries every score as the threshold."""
    found = []
    for threshold in (row["scores"][name] for row in rows):
        right = [(row["scores"][name] >= threshold) == bool(row["label"]) for row in rows]
        shares = [np.mean([r for r, row in zip(right, rows) if row["label"] == x]) for x in (0, 1)]
        found.append(np.mean(shares))
    return max(found)


def test_a_metric_that_the_recipe_adds_is_in_every_result(added, tmp_path):
    rows = make_rows()
    (tmp_path / SCORES).write_text(json_lines(rows))
    write_json(tmp_path / MANIFEST, {"seed": 42})
    write_json(tmp_path / METRICS, results.compute_metrics(rows))
    written = json.loads((tmp_path / METRICS).read_text())
    console = Console(width=120, file=io.StringIO())
    console.print(tables.metrics_table(results.compute_metrics(rows), rows))
    report.write_report(tmp_path, figures=False)
    page = (tmp_path / "report.md").read_text()
    assert f"| {added.column} |" in page
    assert added.column in console.file.getvalue()
    for name in ("sama", "loss"):
        value = written["attacks"][name][added.name]
        assert value == pytest.approx(best_balanced_accuracy(rows, name))
        line = next(x for x in page.splitlines() if x.startswith(f"| `{name}` |"))
        assert f"| {value:.3f} |" in line
        assert f" {value:.3f} " in console.file.getvalue()


def test_an_added_metric_changes_nothing_else(added, monkeypatch):
    rows = make_rows()
    more = results.compute_metrics(rows)
    for found in more["attacks"].values():
        del found[added.name]
    monkeypatch.setattr(results, "METRICS", results.METRICS[:-1])
    assert json.dumps(more) == json.dumps(results.compute_metrics(rows))


def test_an_added_metric_is_missing_where_a_class_is(added):
    content = results.compute_metrics(make_rows(n=1)[:1])
    assert content["attacks"]["sama"][added.name] is None
    assert tables.table_rows(content)[0][1:5] == [tables.MISSING] * 4
