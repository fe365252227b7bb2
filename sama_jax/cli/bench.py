"""`sama-jax bench`: what scoring costs on this machine."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of
from sama_jax.config import AuditSettings
from sama_jax.programs.jobs import BenchJob


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    summary = "What scoring costs on this machine, and beside plain PyTorch."
    p = command_of(commands, "bench", summary, run, continues=False)
    inputs = p.add_argument_group("model and texts")
    flags.flags_of(inputs, BenchJob, "model")
    inputs.add_argument("--data", type=Path, required=True, metavar="F", help="texts")
    flags.add_text_fields(inputs)
    flags.flags_of(inputs, BenchJob, "windows", "limit")
    flags.flags_of(inputs, AuditSettings, "max_length")
    work = p.add_argument_group("what is measured")
    flags.flags_of(work, AuditSettings, "preset", default="official")
    flags.flags_of(work, AuditSettings, "dtype")
    flags.flags_of(work, BenchJob, "batch_size", "rounds")
    work.add_argument("--against", choices=["torch"], help="measure plain PyTorch in the same run")
    work.add_argument(
        "--growth", action="store_true", help="instead: cost by number of texts, length and passes"
    )
    flags.add_compile_cache(work, "nowhere, since compiling is measured")
    p.set_defaults(measures_compiling=True)
    flags.add_set(work)
    outputs = p.add_argument_group("outputs")
    outputs.add_argument("--json", type=Path, metavar="F", help="write the results there, too")
    flags.flags_of(outputs, BenchJob, "quiet")


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    flags.at_least_one(args, "limit", "batch_size", "rounds")
    settings = flags.settings_of(args, AuditSettings)
    from sama_jax.programs.bench.growth import run_growth
    from sama_jax.programs.bench.run import run_bench
    from sama_jax.programs.bench.table import print_growth, print_table
    from sama_jax.storage.files import MADE_BY, require_free, write_json
    from sama_jax.texts.read import read_texts

    require_free(args.json, "sama-jax bench")
    given = {
        "texts": read_texts(args.data, args.text_field, args.label_field).texts,
        "settings": settings,
        "torch": args.against == "torch",
    }
    job = BenchJob(**(flags.values_of(args, BenchJob) | given))
    measure, show = (run_growth, print_growth) if args.growth else (run_bench, print_table)
    found: Any = measure(job)
    if args.json:
        write_json(args.json, {MADE_BY: "sama-jax bench", **found})
    show(found)
