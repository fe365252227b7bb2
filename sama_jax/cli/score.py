"""`sama-jax score`: more attacks from stored losses."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.results import print_result
from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(
        commands, "score", "Score more attacks from stored losses, without a model.", run
    )
    p.add_argument("--store", type=Path, required=True, metavar="DIR", help="an audit's --out")
    flags.add_attacks(p, "all")
    flags.add_compile_cache(p)
    flags.add_quiet(p)


def run(args: argparse.Namespace) -> None:
    """Scores and prints the table."""
    from sama_jax.programs.rescore import run_score

    result = run_score(args.store, args.attacks, quiet=args.quiet)
    if not args.quiet:
        print_result(result)
