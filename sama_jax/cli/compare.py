"""`sama-jax compare` and `sama-jax watch`: the same texts under several targets."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sama_jax.cli import audit
from sama_jax.cli.config_file import save_config
from sama_jax.cli.running import command_of
from sama_jax.errors import UsageError

if TYPE_CHECKING:
    from sama_jax.reporting.comparison import Line

_ALL: Mapping[str, str] = MappingProxyType({})
"""No run is without a result."""


def add(commands: Any) -> None:
    """Adds both commands and their flags."""
    p = command_of(commands, "compare", "Compare finished audits of the same texts.", compare)
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="DIR", help="audits; the first is the base"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="write comparison.html and .json there")
    p = command_of(commands, "watch", "Audit every checkpoint of a training, and compare.", watch)
    p.add_argument(
        "checkpoints", type=Path, metavar="DIR", help="a folder of model folders or adapters"
    )
    audit.add_flags(p)


def compare(args: argparse.Namespace) -> None:
    """Prints the table; with --out, writes it and the figure."""
    from sama_jax.programs.compare import PAGE, compare_runs, require_sound

    lines = compare_runs(args.runs, args.out)
    _show(lines, args.out and args.out / PAGE)
    require_sound(lines)


def watch(args: argparse.Namespace) -> None:
    """Audits what is new among the checkpoints, and prints the table of all."""
    for name in ("target", "adapter", "plan", "save_plan", "save_losses"):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is of one audit, and a watch makes several; leave it out")
    if args.coordinator or args.distributed:
        raise UsageError("a watch runs on one host; audit the checkpoints one by one")
    from sama_jax.programs.compare import PAGE, first_model, require_all, watch

    # Stands in for each of them; a folder's own template is read from it.
    args.target = first_model(args.checkpoints) or (args.reference or [None])[0]
    settings = audit.checked(args)
    del args.flags["target"]
    save_config(args.save_config, "watch CHECKPOINTS", args.flags)
    found = watch(audit.job_of(args, settings), args.checkpoints)
    if found.lines and not args.quiet:
        _show(found.lines, args.out / PAGE, found.without)
    require_all(found.failed)


def _show(lines: "list[Line]", page: Path | None, without: Mapping[str, str] = _ALL) -> None:
    """Prints what has to be known, then the table."""
    from sama_jax.reporting import comparison
    from sama_jax.terminal import results_console

    for line in comparison.first_lines(lines, without):
        print(line)
    results_console().print(comparison.table(lines))
    print(comparison.NOTE)
    if page is not None:
        print(f"comparison: {page}")
