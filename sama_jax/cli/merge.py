"""`sama-jax merge`: one result from hosts that share no disk."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.results import print_result
from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(commands, "merge", "Join the parts of an audit whose hosts share no disk.", run)
    p.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    p.add_argument("parts", type=Path, nargs="+", metavar="PART_DIR", help="the hosts' --out")
    flags.add_quiet(p)


def run(args: argparse.Namespace) -> None:
    """Joins the parts and prints the table."""
    from sama_jax.programs.merge import run_merge

    result = run_merge(args.out, args.parts, quiet=args.quiet)
    if not args.quiet:
        print_result(result)
