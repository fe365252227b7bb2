"""`sama-jax plan`: memory and time of an audit on machines that need not be here."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of
from sama_jax.config import AuditSettings
from sama_jax.errors import UsageError
from sama_jax.programs.jobs import PlanJob


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    summary = "Memory and time of an audit on TPUs that you need not have, or on CPUs."
    p = command_of(commands, "plan", summary, run, continues=False)
    p.set_defaults(measures_compiling=True)
    flags.flags_of(p, PlanJob, "model", "topology", "mesh", "rows")
    p.add_argument(
        "--models",
        default="together",
        choices=["together", "in-turn"],
        help="both in memory, or one after the other",
    )
    audit = p.add_argument_group("the audit")
    flags.add_attacks(audit, flags.STANDARD)
    flags.add_budget(audit)
    flags.flags_of(audit, AuditSettings, "max_length")
    flags.flags_of(audit, AuditSettings, "dtype", help="auto: bfloat16")
    flags.flags_of(audit, PlanJob, "texts", "utilisation")
    flags.add_set(audit)
    outputs = p.add_argument_group("outputs")
    outputs.add_argument("--json", type=Path, metavar="F", help="write everything as JSON, too")
    flags.flags_of(outputs, PlanJob, "quiet")


def run(args: argparse.Namespace) -> None:
    """Plans and prints."""
    flags.at_least_one(args, "texts", "max_length", "rows")
    if not 0 < args.utilisation <= 1:
        raise UsageError(f"--utilisation must lie between 0 and 1, got {args.utilisation}")
    settings = flags.settings_of(args, AuditSettings)
    from sama_jax.programs import capacity
    from sama_jax.storage.files import MADE_BY, require_free, write_json

    require_free(args.json, "sama-jax plan")
    given = {"settings": settings, "models": 2 if args.models == "together" else 1}
    found = capacity.run_plan(PlanJob(**(flags.values_of(args, PlanJob) | given)))
    print("\n".join(capacity.lines(found)))
    if args.json:
        write_json(args.json, {MADE_BY: "sama-jax plan", **found})
