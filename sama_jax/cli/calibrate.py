"""`sama-jax calibrate`: a threshold from held-out non-members, for texts of later audits."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(
        commands,
        "calibrate",
        "Make a threshold from the held-out non-members of a finished audit.",
        run,
        continues=False,
    )
    p.add_argument("run_folder", type=Path, metavar="RUN", help="an audit's --out")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the calibration")
    p.add_argument(
        "--attack",
        default="sama",
        metavar="NAME",
        help="chosen before its scores were seen; `best`: chosen on a third of the texts, "
        "calibrated on another, measured on the last (default: sama)",
    )
    p.add_argument(
        "--fpr",
        type=flags.share,
        default=0.01,
        metavar="X",
        help="share of non-members that is flagged (default: 0.01)",
    )
    p.add_argument(
        "--guarantee",
        type=flags.share,
        metavar="G",
        help="keep the share with this probability, not only on average: 0.9",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the file and says what it is."""
    from sama_jax.programs.calibrate import run_calibrate, told

    made = run_calibrate(
        args.run_folder, args.out, attack=args.attack, fpr=args.fpr, guarantee=args.guarantee
    )
    for line in told(*made):
        print(line)
