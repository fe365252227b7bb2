"""`sama-jax canary`: texts that nobody wrote, planted to see what a training keeps of them."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of
from sama_jax.config import TrainSettings


def add(commands: Any) -> None:
    """Adds the command, its four actions and their flags."""
    summary = "Plant canaries, and bound epsilon by what was learnt of them."
    parser = commands.add_parser("canary", help=summary, description=summary)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_make(actions)
    _add_insert(actions)
    _add_check(actions)
    _add_audit(actions)


def _add_make(actions: Any) -> None:
    p = command_of(
        actions, "make", "Make canaries; coins say which to train on.", run_make, continues=False
    )
    p.add_argument(
        "--reference", type=Path, required=True, metavar="DIR", help="model folder that samples"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    p.add_argument(
        "--count", type=int, default=200, metavar="N", help="about half are included (default: 200)"
    )
    p.add_argument(
        "--length", type=int, default=64, metavar="TOKENS", help="of each, about (default: 64)"
    )
    p.add_argument(
        "--copies",
        type=_numbers,
        default="1,4,16",
        metavar="a,b",
        help="how often an included one stands in the data, in turn (default: 1,4,16)",
    )
    p.add_argument("--kind", choices=("sampled", "random", "both"), default="both")
    p.add_argument(
        "--temperature",
        type=flags.finite,
        default=1.2,
        metavar="T",
        help="of sampling; 1: as the model has learnt (default: 1.2)",
    )
    p.add_argument(
        "--attack",
        default="sama",
        metavar="NAME",
        help="whose scores the bound will come from, fixed here (default: sama)",
    )
    p.add_argument(
        "--seed", type=int, metavar="S", help="of texts, coins and places (default: a secret one)"
    )


def _add_insert(actions: Any) -> None:
    p = command_of(
        actions, "insert", "Write training data anew, with canaries.", run_insert, continues=False
    )
    p.add_argument("data", type=Path, metavar="FILE", help="training data, JSON Lines")
    _add_canaries(p)
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new file")
    _add_field(p)


def _add_check(actions: Any) -> None:
    p = command_of(
        actions, "check", "Check that canaries reach the model whole.", run_check, continues=False
    )
    _add_canaries(p)
    p.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="whose tokenizer reads them"
    )
    flags.flags_of(p, TrainSettings, "max_length")
    p.add_argument("--data", type=Path, metavar="FILE", help="what is trained on, with canaries")
    _add_field(p)


def _add_audit(actions: Any) -> None:
    p = command_of(
        actions, "audit", "Bound epsilon by an audit of canaries.", run_audit, continues=False
    )
    p.add_argument("run_folder", type=Path, metavar="RUN", help="the --out of the canaries' audit")
    _add_canaries(p)
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the bounds, as JSON")
    p.add_argument(
        "--delta",
        type=flags.share,
        default=1e-5,
        metavar="D",
        help="below one over the number of training records (default: 1e-05)",
    )


def _add_canaries(parser: flags.Flags) -> None:
    parser.add_argument(
        "--canaries", type=Path, required=True, metavar="DIR", help="of `sama-jax canary make`"
    )


def _add_field(parser: flags.Flags) -> None:
    parser.add_argument(
        "--field", default="text", metavar="NAME", help="of a record, its text (default: text)"
    )


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() and 1 <= int(part) <= 1000 for part in parts):
        return tuple(map(int, parts))
    raise argparse.ArgumentTypeError(f"expected numbers of 1 to 1000, as 1,4,16, found {text!r}")


def run_make(args: argparse.Namespace) -> None:
    """Makes canaries and says what was made."""
    from sama_jax.errors import UsageError
    from sama_jax.programs.canary import Recipe, run_make

    flags.at_least_one(args, "count", "length")
    if args.length < 8:  # shorter ones repeat each other, and stand in other texts
        raise UsageError(f"--length must be at least 8, got {args.length}")
    if not 0.01 <= args.temperature <= 100:
        raise UsageError(f"--temperature must lie in 0.01..100, got {args.temperature:g}")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed must lie in 0..{2**32 - 1}, got {args.seed}")
    recipe = Recipe(args.count, args.length, args.copies, args.kind, args.temperature)
    print(run_make(args.reference, args.out, recipe, attack=args.attack, seed=args.seed))


def run_insert(args: argparse.Namespace) -> None:
    """Writes the data and says what was made."""
    from sama_jax.programs.canary import run_insert

    print(run_insert(args.data, args.canaries, args.out, args.field))


def run_check(args: argparse.Namespace) -> None:
    """Says what every check found; raises `DataError` unless all canaries pass all."""
    from sama_jax.errors import DataError
    from sama_jax.programs.canary import run_check

    flags.at_least_one(args, "max_length")
    found = run_check(args.canaries, args.model, args.max_length, args.data, args.field)
    for line in found.lines:
        print(line)
    if found.failed:
        raise DataError(
            f"{args.canaries}: some canaries do not reach the model whole "
            f"({', '.join(found.failed)}), so the training cannot learn them; make others, or "
            "change what is done to the data"
        )


def run_audit(args: argparse.Namespace) -> None:
    """Writes the bounds and says what they mean."""
    from sama_jax.programs.canary_audit import run_canary_audit

    _, sentences = run_canary_audit(args.run_folder, args.canaries, args.out, delta=args.delta)
    for line in sentences:
        print(line)
    print(f"results: {args.out}")
