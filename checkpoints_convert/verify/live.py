"""Compares PyTorch and JAX on the same weights and masked texts, block by block."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table

from checkpoints_convert.verify.exchange import rank_agreement
from checkpoints_convert.verify.ours import (
    PARITY,
    RANKS,
    TOLERANCE,
    WHY,
    Ours,
    in_units,
    open_ours,
    token_losses,
)
from sama_jax.arrays import Params
from sama_jax.engine import output_position
from sama_jax.errors import ModelError
from sama_jax.models.stages import stages
from sama_jax.terminal import results_console
from sama_jax.texts.read import read_texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.model_folder import ModelFolder, open_folder

DENSITIES = (0.15, 0.4, 0.65, 0.9)
"""Shares of masked tokens, text by text."""
TOKENS = 32
"""Of each built-in text; of a text of --texts at most four times as many."""


class Inputs(NamedTuple):
    """Holds what both networks read. The last row is half of the first, padded."""

    tokens: Int[np.ndarray, "b l"]
    masks: Bool[np.ndarray, "b l"]
    valid: Bool[np.ndarray, "b l"]


class Line(NamedTuple):
    """Holds a line of the table: a stage of the network, compared at all valid positions."""

    stage: str
    largest: float
    mean: float
    in_units: float
    """Largest difference in the stage's own unit; of losses, in nats."""
    allowed: float
    note: str
    agrees: bool


class Options(NamedTuple):
    """Holds the flags that both sides need."""

    dtype: str
    adapter: Path | None
    mask_id: int | None
    texts: Path | None
    trust_remote_code: bool


def make_inputs(folder: ModelFolder, texts: Path | None, seed: int = 0) -> Inputs:
    """Draws masked texts, each at a density of its own; the same ones on every platform."""
    rng = np.random.default_rng(seed)
    rows = _token_rows(folder, texts, rng)
    rows.append(rows[0][: max(1, len(rows[0]) // 2)])
    tokens = np.zeros((len(rows), max(len(r) for r in rows)), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = row, True
    density = np.array([DENSITIES[i % len(DENSITIES)] for i in range(len(rows))])
    masks = (rng.random(tokens.shape) < density[:, None]) & valid
    masks[:, min(1, tokens.shape[1] - 1)] |= ~masks.any(axis=1) & valid[:, 0]
    return Inputs(tokens, masks & valid, valid)


def _token_rows(
    folder: ModelFolder, texts: Path | None, rng: np.random.Generator
) -> list[np.ndarray]:
    room = min(4 * TOKENS, folder.max_length)
    if texts is not None:
        tokenizer = TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
        found = read_texts(texts).texts[: len(DENSITIES)]
        encoded = [e.ids for e in tokenizer.encode([t.text for t in found], room) if len(e.ids)]
        if not encoded:
            raise ModelError(f"{texts}: none of its texts has a token by {folder.path}'s tokenizer")
        return encoded
    size = min(TOKENS, folder.max_length)
    ids, reason = _built_in(folder, size * len(DENSITIES))
    if len(ids) >= 4 * len(DENSITIES):
        return np.array_split(ids, len(DENSITIES))
    print(f"{reason}; random token ids take the place of texts")
    ids = rng.integers(0, folder.model.vocab_size - 1, (len(DENSITIES), size))
    return list(ids.astype(np.int32))


def _built_in(folder: ModelFolder, size: int) -> tuple[np.ndarray, str]:
    """Returns ids of the built-in text, and if they are few the reason."""
    try:
        tokenizer = TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
    except ModelError as error:
        return np.zeros(0, np.int32), str(error)
    # Without files, transformers makes an empty tokenizer for some model types.
    (encoded,) = tokenizer.encode([output_position.TEXT], size)
    return encoded.ids, f"{folder.path}: its tokenizer makes {len(encoded.ids)} tokens of a text"


def verify_live(path: Path, options: Options) -> int:
    """Prints a table for each dtype. Returns 0, or 6 if a verdict is against."""
    from sama_jax.programs.bench import torch_reference

    console, code = results_console(), 0
    exact = None
    for dtype in _dtypes(path, options):
        folder = open_folder(path, mask_id=options.mask_id, dtype=dtype, adapter=options.adapter)
        inputs = make_inputs(folder, options.texts)
        wanted = torch_reference.Wanted(
            folder.path,
            folder.config,
            folder.model.num_layers,
            folder.model.arch.block_length,
            dtype,
            options.adapter,
        )
        # One network at a time in memory: theirs is gone when ours is loaded.
        name, theirs = _run_reference(wanted, inputs, folder.model.mask_id, options)
        ours = open_ours(path, dtype=dtype, adapter=options.adapter, mask_id=options.mask_id)
        lines = list(compare(ours, inputs, theirs, exact))
        exact = theirs if dtype == "float32" else None
        code = _print(console, f"{name}, {dtype}", dtype, lines) or code
        _print_alignment(ours)
    return code


def _run_reference(
    wanted: Any, inputs: Inputs, mask_id: int, options: Options
) -> tuple[str, list[Any]]:
    """Runs the PyTorch side on every text, without padding."""
    from sama_jax.programs.bench import torch_reference

    reference = torch_reference.open_reference(wanted, trust_remote_code=options.trust_remote_code)
    read = masked_tokens(inputs, mask_id)
    return reference.name, [reference.run(row[keep]) for row, keep in zip(read, inputs.valid)]


def masked_tokens(inputs: Inputs, mask_id: int) -> Int[np.ndarray, "b l"]:
    """Returns what the networks read: the mask id at masked positions."""
    return np.where(inputs.masks, mask_id, inputs.tokens).astype(np.int32)


def _dtypes(path: Path, options: Options) -> list[str]:
    """Returns float32, then what is stored if that is bfloat16; or the one asked for."""
    if options.dtype != "auto":
        return [options.dtype]
    stored = open_folder(path, mask_id=options.mask_id, dtype="float32").source.dtype()
    return ["float32", "bfloat16"] if stored == "bfloat16" else ["float32"]


def compare(
    ours: Ours, inputs: Inputs, theirs: list[Any], exact: list[Any] | None = None
) -> Iterator[Line]:
    """Yields the lines of the table, from the embedding to the losses.

    `theirs` holds one `torch_reference.Stages` a text, without padding; `exact`, for a comparison
    in bfloat16, those of PyTorch in float32 from the same weights. What PyTorch's own rounding
    changes is allowed twice: two runs each round in their own way. In a LLaDA of 12 layers of width
    512 it already moves losses by 4e-2.
    """
    valid, read = inputs.valid, masked_tokens(inputs, ours.model.mask_id)

    def allowed(rounded: float) -> float:
        return max(TOLERANCE[ours.dtype], 2 * rounded)

    def line(stage: str, actual: np.ndarray, note: str = "") -> Line:
        expected = _joined(theirs, stage)
        difference = np.abs(actual - expected)
        moved = 0.0 if exact is None else in_units(expected, _joined(exact, stage)).max()
        most = allowed(float(moved))
        worst = float(in_units(actual, expected).max())
        sizes = float(difference.max()), float(difference.mean())
        return Line(stage, *sizes, worst, most, note, worst <= most)

    hidden = None
    for stage, hidden in stages(ours.model, ours.params, jnp.asarray(read), jnp.asarray(valid)):
        if stage in theirs[0].states:
            yield line(stage, np.asarray(hidden, np.float32)[valid])
    logits = np.asarray(_logits(ours.model, ours.params, hidden), np.float32)[valid]
    asked = inputs.masks[valid]
    yield line("logits", logits, _agreement(logits[asked], _joined(theirs, "logits")[asked]))

    answers = [row[keep] for row, keep in zip(inputs.tokens, valid)]

    def their_losses(texts: list[Any]) -> np.ndarray:
        parts = [aligned_losses(t.logits, a, ours.model.shift) for t, a in zip(texts, answers)]
        return np.concatenate(parts)[asked]

    nll = token_losses(ours, inputs.tokens, inputs.masks, valid)[valid][asked]
    expected = their_losses(theirs)
    difference = np.abs(nll - expected)
    moved = 0.0 if exact is None else np.abs(expected - their_losses(exact)).max()
    most = allowed(float(moved))
    ranks, worst = rank_agreement(nll, expected), float(difference.max())
    agrees = worst <= most and (ours.dtype == "float32" or ranks >= RANKS)
    note = f"{asked.sum()}, rank correlation {ranks:.6f}"
    yield Line("losses", worst, float(difference.mean()), worst, most, note, agrees)


def _joined(texts: list[Any], stage: str) -> Float[np.ndarray, "n d"]:
    """Joins a stage at all positions of all texts."""
    return np.concatenate([t.logits if stage == "logits" else t.states[stage] for t in texts])


@partial(jax.jit, static_argnums=0)
def _logits(model: Any, params: Params, hidden: Any) -> jax.Array:
    return model.logits(params, hidden)


def aligned_losses(
    logits: Float[np.ndarray, "l v"], answers: Int[np.ndarray, " l"], shift: bool
) -> Float[np.ndarray, " l"]:
    """Returns the loss of every answer in nats, float64.

    Output i - 1 (0 at 0) of a shifted model is for position i.
    """
    wide = logits.astype(np.float64)
    if shift:
        wide = wide[np.maximum(np.arange(len(wide)) - 1, 0)]
    top = wide.max(axis=-1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=-1)) + top
    return total - wide[np.arange(len(wide)), answers]


def _agreement(actual: np.ndarray, expected: np.ndarray) -> str:
    """Says KL divergence and agreement of the most probable token, at masked positions."""
    log_p, log_q = (
        x - x.max(-1, keepdims=True) for x in (expected.astype(np.float64), actual.astype(float))
    )
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    same = np.mean(actual.argmax(-1) == expected.argmax(-1))
    return f"KL at most {max(divergence.max(), 0):.1e}, same top token {same:.1%}"


def _print(console: Console, title: str, dtype: str, lines: list[Line]) -> int:
    """Prints the table and the verdict. Returns the exit code."""
    table = Table(title=title)
    for column in ("stage", "largest", "mean", "in its unit", "allowed", ""):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for x in lines:
        numbers = (f"{v:.1e}" for v in (x.largest, x.mean, x.in_units, x.allowed))
        table.add_row(x.stage, *numbers, "" if x.agrees else "DIFFERS")
    console.print(table)
    for x in lines:
        if x.note:
            print(f"{x.stage} at masked positions: {x.note}")
    print(WHY[dtype])
    first = next((x for x in lines if not x.agrees), None)
    # bfloat16 rounds every stage: only what comes out decides, the stages tell where.
    failed = first is not None if dtype == "float32" else not lines[-1].agrees
    if not failed:
        print(f"verdict, {dtype}: equal within {lines[-1].allowed:.2g}")
        return 0
    assert first is not None
    print(
        f"verdict, {dtype}: DIFFERENT; the first stage that differs is {first.stage} "
        f"({first.in_units:.1e} of its unit, allowed {first.allowed:.2g})"
    )
    return PARITY


def _print_alignment(ours: Ours) -> None:
    """Warns if the outputs predict a text better when read the other way; may raise."""
    ids, _ = _built_in(ours.folder, output_position.MAX_TOKENS)
    warning = output_position.check(ours.model, ours.params, ids)
    if warning:
        print(f"warning: {warning}")
