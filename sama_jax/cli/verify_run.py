"""`sama-jax verify-run`: is a finished run still what it has written?"""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(
        commands,
        "verify-run",
        "Check every file of a run folder, and its metrics against its scores.",
        run,
        continues=False,
    )
    p.add_argument("run_folder", type=Path, metavar="DIR", help="an audit's --out")


def run(args: argparse.Namespace) -> None:
    """Says what was verified; ends with an error that names what was changed."""
    from sama_jax.programs.audit_gates import require_valid
    from sama_jax.programs.verify_run import verify_run

    found = verify_run(args.run_folder)
    print(f"{found.files} files are as the run has written them; the scores give its metrics")
    print(f"sha256 of manifest.json: {found.manifest}")
    require_valid(args.run_folder, found.metrics["validity"])
