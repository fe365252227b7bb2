"""Parses, calls and prints for `python -m checkpoints_convert`; no JAX before it is needed."""

# ruff: noqa: E402
import os
import sys

# `python -m` looks for modules in the current folder first, where a model folder could bring a
# `sama_jax` of its own; `isolate` does the rest.
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not sys.flags.safe_path and os.path.abspath(sys.path[0]) == os.getcwd() != _HOME:
    del sys.path[0]

from sama_jax.isolation import isolate

isolate()

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sama_jax.cli.running import Parser, command_of, run_program
from sama_jax.errors import ModelError, UsageError

PROGRAM = "python -m checkpoints_convert"
DTYPES = ["keep", "float32", "bfloat16"]


def build_parser(command: str | None = None) -> Parser:
    """Returns the command line; `verify` gets its flags only if it is the command: it is large."""
    parser = Parser(prog=PROGRAM, description="Model folders between formats.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str, run: Callable[[argparse.Namespace], int | None]) -> Parser:
        return command_of(commands, name, summary, run, continues=False)

    summary = "Write parameters through Orbax: loads onto any mesh, in any dtype."
    p = add("to-orbax", summary, _to_orbax)
    _add_conversion(p)
    p.add_argument("--mesh", metavar="data=N,model=M", help="spread over all devices")

    p = add("to-hf", "Write safetensors in the Hugging Face layout.", _to_hf)
    _add_conversion(p)
    p.add_argument("--max-shard", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    p.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        action="append",
        help="merge an adapter of SRC; repeatable, in their order",
    )

    summary = "Say what a folder holds and whether it would be refused (exit code 4)."
    p = add("inspect", summary, _inspect)
    p.add_argument("src", metavar="SRC", help="model folder or Hub id")
    p.add_argument("--mask-id", type=int, help="replaces the mask token id of config.json")
    p.add_argument("--json", action="store_true")

    p = add("verify", "Compare the losses of a model with PyTorch's.", _verify)
    if command == "verify":
        from checkpoints_convert import verify

        verify.add_arguments(p)
    return parser


def _add_conversion(p: argparse.ArgumentParser) -> None:
    p.add_argument("src", metavar="SRC", help="model folder or Hub id (owner/name[@revision])")
    p.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    p.add_argument("--dtype", default="keep", choices=DTYPES)
    p.add_argument(
        "--allow-pickle", action="store_true", help="read .bin, by torch's weights-only loading"
    )
    p.add_argument("--mask-id", type=int, help="replaces the mask token id of config.json")
    p.add_argument("--quiet", action="store_true")


def _size(text: str) -> int:
    number = r"([0-9]{1,15}(?:\.[0-9]+)?)"
    match = re.fullmatch(number + r"\s*([KMG]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard {text!r}: expected a size such as 5GB or 500MB")
    return size


def _to_orbax(args: argparse.Namespace) -> None:
    if args.mesh is None:  # nothing is computed; an accelerator's memory would only be in the way
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from checkpoints_convert import convert

    done = convert.to_orbax(
        args.src,
        args.out,
        dtype=args.dtype,
        mesh=args.mesh,
        allow_pickle=args.allow_pickle,
        mask_id=args.mask_id,
        quiet=args.quiet,
    )
    _print_done(done, args.quiet)


def _to_hf(args: argparse.Namespace) -> None:
    max_shard_bytes = _size(args.max_shard)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from checkpoints_convert import convert

    done = convert.to_hf(
        args.src,
        args.out,
        dtype=args.dtype,
        max_shard_bytes=max_shard_bytes,
        adapter=args.adapter,
        allow_pickle=args.allow_pickle,
        mask_id=args.mask_id,
        quiet=args.quiet,
    )
    _print_done(done, args.quiet)


def _print_done(done, quiet: bool) -> None:
    from checkpoints_convert.convert import size

    if not quiet and done.bytes_read:
        print(
            f"{done.out}: {done.num_params:,} parameters, {size(done.bytes_read)} read, "
            f"{size(done.bytes_written)} written, in {done.seconds:.1f} s"
        )


def _inspect(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from checkpoints_convert import describe

    found = describe.describe(args.src, args.mask_id)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        describe.print_description(found)
    return 0 if found["loadable"] else ModelError.exit_code


def _verify(args: argparse.Namespace) -> int:
    from checkpoints_convert import verify

    return verify.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code; errors are one line on stderr."""
    words = sys.argv[1:] if argv is None else argv
    command = next((word for word in words if not word.startswith("-")), None)
    return run_program(PROGRAM, build_parser(command), argv)


if __name__ == "__main__":
    sys.exit(main())
