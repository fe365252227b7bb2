"""The `sama-jax` command line: all commands, and the entry point of the console script."""

import sys
from collections.abc import Sequence

from sama_jax import __version__
from sama_jax.cli import (
    apply,
    attacks,
    audit,
    bench,
    calibrate,
    canary,
    compare,
    demo,
    experiment,
    explain,
    finetune,
    merge,
    nll,
    plan,
    report,
    score,
    split,
    verify_run,
)
from sama_jax.cli.running import Parser, run_program
from sama_jax.devices import processes

COMMANDS = (
    demo,
    audit,
    split,
    finetune,
    attacks,
    bench,
    score,
    calibrate,
    apply,
    canary,
    merge,
    nll,
    plan,
    experiment,
    report,
    explain,
    compare,
    verify_run,
)
"""The modules of the commands, in the order of `--help`."""


def build_parser() -> Parser:
    """Returns the whole command line."""
    parser = Parser(
        prog="sama-jax",
        description="Membership-inference audits of fine-tuned diffusion language models.",
    )
    parser.add_argument("--version", action="version", version=f"sama-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of `argv`, or of the process, and returns its exit code."""
    code = run_program("sama-jax", build_parser(), argv)
    processes.leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
