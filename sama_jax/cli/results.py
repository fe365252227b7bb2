"""Prints what an audit, or what makes one of others, has found."""

import sys
from typing import TYPE_CHECKING

from sama_jax.terminal import results_console

if TYPE_CHECKING:
    from sama_jax.programs.audit import AuditResult


def print_result(result: "AuditResult") -> None:
    """Prints the table on standard output, and on standard error where the rest is."""
    from sama_jax.reporting.results import headline
    from sama_jax.reporting.tables import metrics_table

    results_console().print(metrics_table(result.metrics, result.rows, result.cost))
    print(headline(result.metrics))
    print(f"results: {result.out} (report.html, scores.jsonl, metrics.json)", file=sys.stderr)
