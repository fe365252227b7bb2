"""`sama-jax experiment`: runs an experiment, or lists those that are shipped."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(commands, "experiment", "Run an experiment of experiments/, or list them.", run)
    p.add_argument("name", nargs="?", metavar="NAME|FILE", help="left out: list them")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="results go to DIR/NAME, the demo's models to DIR/demo (default: runs)",
    )
    flags.add_quiet(p)


def run(args: argparse.Namespace) -> None:
    """Runs the experiment, or prints the list."""
    from sama_jax.programs import experiment, experiment_file

    if args.name is None:
        for name, summary in experiment_file.available().items():
            print(f"{name}: {summary}")
    else:
        experiment.run_experiment(args.name, args.out, quiet=args.quiet)
