"""`sama-jax demo`: a whole audit on a small model that is made here."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(commands, "demo", "A whole audit on a small model, made here, in minutes.", run)
    p.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    p.add_argument("--seed", type=int, default=42, help="of the split and of training")
    p.add_argument("--fresh", action="store_true", help="remove DIR and start over")
    flags.add_quiet(p)


def run(args: argparse.Namespace) -> None:
    """Makes the models, audits them, prints the result."""
    from sama_jax.programs.demo import run_demo

    run_demo(args.out, seed=args.seed, fresh=args.fresh, quiet=args.quiet, command=args.command)
