"""The table of results, as cells and on a terminal."""

import io
import re

from rich.console import Console
from score_rows import make_rows

from sama_jax.reporting import results, tables


def test_table_shows_the_numbers_and_a_dash_where_there_is_none():
    rows = make_rows()
    rows[3]["passes"]["loss"] = 4
    rows[4]["scores"]["loss"], rows[4]["passes"]["loss"] = None, 0  # not scored: does not count
    content = results.compute_metrics(rows)
    sama, loss = tables.table_rows(content, rows, {"seconds": {"sama": 12.34}})
    summary = content["attacks"]["sama"]
    low, high = summary["auc_ci"]
    assert sama[0] == "sama"
    assert sama[1] == f"{summary['auc']:.3f} ({low:.3f}–{high:.3f})"
    assert sama[2].startswith(f"{100 * summary['tpr_at_fpr']['0.1']['tpr']:.1f} %")
    assert sama[3:] == [tables.MISSING, "16", "12.3"]  # 60 non-members: no TPR at 1 %
    assert loss[4:] == ["4–16", tables.MISSING]


def test_table_without_labels_lists_the_attacks():
    rows = make_rows(labelled=False)
    cells = tables.table_rows({"attacks": {}}, rows)
    assert [row[0] for row in cells] == ["sama", "loss"]
    assert {cell for row in cells for cell in row[1:4]} == {tables.MISSING}


def test_terminal_table_keeps_every_cell_whole_in_80_columns():
    rows = make_rows(n=120)
    content = results.compute_metrics(rows)
    cost = {"seconds": {"sama": 1234.5, "loss": 99.9}}
    console = Console(width=80, file=io.StringIO())
    console.print(tables.metrics_table(content, rows, cost))
    printed = console.file.getvalue()
    for cells in tables.table_rows(content, rows, cost):
        pattern = r"\s+".join(re.escape(cell) for cell in cells)
        assert re.search(pattern, printed), printed
