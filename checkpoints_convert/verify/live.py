"""Runs PyTorch and JAX side by side on the same weights and masked texts, and gives the verdict."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from checkpoints_convert.verify.compare import Line, Theirs, compare, end_to_end, run_theirs
from checkpoints_convert.verify.inputs import built_in, make_inputs
from checkpoints_convert.verify.ours import PARITY, Ours, open_ours, reading_once
from sama_jax.engine import output_position
from sama_jax.terminal import results_console
from sama_jax.weights.model_folder import open_folder

IN_DOUBLE = (
    "each stage reads the same, what the stage before gave in float64; its noise is what PyTorch's "
    "own {dtype} is off there; a wrong formula or weight is off by hundreds of that or more"
)
BY_SIZE = "each stage reads the same; its unit is the size of its numbers"
WHY_BFLOAT16 = (
    "in bfloat16 only the losses decide: within 5e-2 nats of float64, or twice what PyTorch is off "
    "if that is more, and in the same order (rank correlation 0.99)"
)


class Options(NamedTuple):
    """Holds the flags that both sides need."""

    dtype: str
    adapters: Sequence[Path]
    mask_id: int | None
    texts: Path | None
    trust_remote_code: bool


def verify_live(path: Path, options: Options) -> int:
    """Prints a table for each dtype. Returns 0, or 6 if a verdict is against."""
    from sama_jax.programs.bench import torch_reference

    console, code = results_console(), 0
    for dtype in _dtypes(path, options):
        folder = open_folder(path, mask_id=options.mask_id, dtype=dtype, adapter=options.adapters)
        folder = reading_once(folder)
        inputs = make_inputs(folder, options.texts)
        wanted = torch_reference.Wanted(
            folder.path,
            folder.config,
            folder.model.num_layers,
            folder.model.arch.block_length,
            dtype,
            folder.adapters,
        )
        # One network at a time in memory: theirs is gone when ours is loaded.
        trust = options.trust_remote_code
        reference = torch_reference.open_reference(wanted, trust_remote_code=trust)
        theirs = run_theirs(reference, inputs, folder.model.mask_id)
        del reference
        ours = open_ours(path, dtype=dtype, adapters=options.adapters, mask_id=options.mask_id)
        ours = ours._replace(folder=reading_once(ours.folder))
        lines = list(compare(ours, inputs, theirs))
        code = _print(console, theirs, dtype, lines, end_to_end(ours, inputs, theirs)) or code
        _print_alignment(ours)
    return code


def _dtypes(path: Path, options: Options) -> list[str]:
    """Returns float32, then what is stored if that is bfloat16; or the one asked for."""
    if options.dtype != "auto":
        return [options.dtype]
    stored = open_folder(path, mask_id=options.mask_id, dtype="float32").source.dtype()
    return ["float32", "bfloat16"] if stored == "bfloat16" else ["float32"]


def _print(console: Console, theirs: Theirs, dtype: str, lines: list[Line], ends: str) -> int:
    """Prints the table and the verdict. Returns the exit code."""
    in_double = theirs.exact is not None
    yardstick = "float64" if in_double else "PyTorch"
    table = Table(title=f"{theirs.name}, {dtype}, against {yardstick}")
    unit = "in its noise" if in_double else "in its unit"
    for column in ("stage", "PyTorch off", "JAX off", unit, "allowed", ""):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for x in lines:
        numbers = (f"{x.theirs:.1e}", f"{x.ours:.1e}", f"{x.noises:.2g}", f"{x.allowed:.2g}")
        table.add_row(x.stage, *numbers, "" if x.agrees else "DIFFERS")
    console.print(table)
    print(ends)
    print(IN_DOUBLE.format(dtype=dtype) if in_double else BY_SIZE)
    first = next((x for x in lines if not x.agrees), None)
    failed = first is not None
    if dtype != "float32":  # every stage is rounded, the stages only tell where
        print(WHY_BFLOAT16)
        failed = not lines[-1].agrees
    if not failed:
        worst = max(x.noises / x.allowed for x in lines)
        print(f"verdict, {dtype}: equal; JAX is off by at most {worst:.0%} of what is allowed")
        return 0
    assert first is not None
    print(
        f"verdict, {dtype}: DIFFERENT; the first stage that differs is {first.stage} (PyTorch is "
        f"off by {first.theirs:.1e}, JAX by {first.ours:.1e}: {first.noises:.2g} {unit}, allowed "
        f"{first.allowed:.2g})"
    )
    return PARITY


def _print_alignment(ours: Ours) -> None:
    """Warns if the outputs predict a text better when read the other way; may raise."""
    ids, _ = built_in(ours.folder, output_position.MAX_TOKENS)
    warning = output_position.check(ours.model, ours.params, ids)
    if warning:
        print(f"warning: {warning}")
