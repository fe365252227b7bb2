"""`sama-jax attacks`: what each attack reads, its passes, its source."""

import argparse
import json
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of
from sama_jax.config import AuditSettings


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(
        commands, "attacks", "List the attacks: what each reads, its passes, its source.", run
    )
    flags.add_attacks(p, "all")
    flags.add_budget(p)
    flags.add_set(p)
    p.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> None:
    """Prints the list."""
    settings = flags.settings_of(args, AuditSettings)
    from sama_jax.programs import catalogue

    found = catalogue.describe(args.attacks, settings)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        catalogue.print_table(found)
