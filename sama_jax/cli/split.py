"""`sama-jax split`: members and non-members, drawn at random before training."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(
        commands,
        "split",
        "Draw members and non-members at random, before training.",
        run,
        continues=False,
    )
    p.add_argument("data", type=Path, metavar="FILE", help="texts, optionally with a field group")
    flags.add_text_fields(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    p.add_argument(
        "--members", type=int, metavar="N", help="texts to train on, about (default: half)"
    )
    p.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")


def run(args: argparse.Namespace) -> None:
    """Draws the split and says what was made."""
    from sama_jax.errors import UsageError
    from sama_jax.programs.split import run_split

    flags.at_least_one(args, "members")
    if args.seed < 0:
        raise UsageError(f"--seed must be 0 or more, got {args.seed}")
    print(
        run_split(
            args.data,
            args.out,
            members=args.members,
            seed=args.seed,
            text_field=args.text_field,
            label_field=args.label_field,
        )
    )
