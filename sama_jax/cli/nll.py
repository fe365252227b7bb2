"""`sama-jax nll`: the likelihood bound of texts under one model."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of
from sama_jax.config import AuditSettings
from sama_jax.errors import UsageError
from sama_jax.programs.jobs import AuditJob


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(commands, "nll", "Likelihood bound of texts, with its standard error.", run)
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder")
    p.add_argument("--data", type=Path, required=True, metavar="F", help="texts")
    flags.add_text_fields(p)
    flags.add_conversations(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="results")
    # Not the budget of an audit, whose name is `passes` among the settings.
    p.add_argument(
        "--passes",
        type=int,
        default=128,
        metavar="Q",
        dest="estimates",
        help="forward passes a text (default: LLaDA's 128)",
    )
    flags.flags_of(p, AuditSettings, "max_length", "dtype", "seed")
    flags.flags_of(p, AuditJob, "mask_id", "attention_mask")
    flags.add_compile_cache(p)
    flags.add_set(p)
    flags.add_quiet(p)


def run(args: argparse.Namespace) -> None:
    """Writes the bounds and prints their mean."""
    if args.estimates < 2:
        raise UsageError("--passes must be at least 2: one pass has no standard error")
    args.set = [f"likelihood.passes={args.estimates}", *args.set]
    settings = flags.settings_of(args, AuditSettings)
    from sama_jax.programs.forms import form_of
    from sama_jax.programs.nll import RESULT, run_nll
    from sama_jax.texts.read import read_texts

    form = form_of(args.template, args.loss_on, args.end_tokens, args.model)
    texts = read_texts(args.data, args.text_field, args.label_field, form=form)
    options = {"mask_id": args.mask_id, "attention_mask": args.attention_mask}
    rows = run_nll(args.model, texts, args.out, settings, **options, quiet=args.quiet)
    known = [row for row in rows if row["nll"] is not None]
    if known and not args.quiet:
        mean = sum(row["nll"] for row in known) / len(known)
        print(f"{len(known)} texts, {mean:.4f} nats a token on average: {args.out / RESULT}")
