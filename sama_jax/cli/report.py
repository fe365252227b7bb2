"""`sama-jax report`: the reports and figures of a finished run, written again."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(commands, "report", "Write the reports and figures of a run folder again.", run)
    p.add_argument("run_folder", type=Path, metavar="DIR", help="an audit's --out")


def run(args: argparse.Namespace) -> None:
    """Writes the report and prints where it is."""
    from sama_jax.programs.audit_gates import require_valid
    from sama_jax.reporting import report
    from sama_jax.reporting.results import metrics_of

    metrics = metrics_of(*report.read_finished(args.run_folder))
    print(report.write_report(args.run_folder, metrics=metrics))
    require_valid(args.run_folder, metrics["validity"])
