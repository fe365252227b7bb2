"""`sama-jax apply`: verdicts on the texts of an audit, by a calibration."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(
        commands,
        "apply",
        "Judge the texts of a finished audit by a calibration.",
        run,
        continues=False,
    )
    p.add_argument("run_folder", type=Path, metavar="RUN", help="the --out of these texts' audit")
    p.add_argument(
        "--calibration", type=Path, required=True, metavar="FILE", help="of `sama-jax calibrate`"
    )
    p.add_argument(
        "--fdr",
        type=flags.share,
        metavar="Q",
        help="flag so many that on average a share of at most Q is false",
    )
    p.add_argument(
        "--smoothed", action="store_true", help="break ties of scores by the texts' hashes"
    )
    p.add_argument(
        "--collection", action="store_true", help="one p-value for all texts together, too"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the decisions and says what was found."""
    from sama_jax.programs.apply import DECISIONS, run_apply

    found = run_apply(
        args.run_folder,
        args.calibration,
        fdr=args.fdr,
        smoothed=args.smoothed,
        collection=args.collection,
    )
    for line in found.sentences:
        print(line)
    print(f"results: {args.run_folder / DECISIONS}")
