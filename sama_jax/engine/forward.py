"""Makes the inputs of forward passes from texts and plans, and reads their outputs (host).

A job is one task of one batch under one model. It takes one call of a compiled program, or several
where its plan has more passes than a call makes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from sama_jax import rng
from sama_jax.arrays import ForwardBatch, Model, Params, TextKeyData
from sama_jax.attacks.queries import Procedure
from sama_jax.core import losses
from sama_jax.devices.runner import FORWARD_ROWS, Runner
from sama_jax.devices.strategy import Layout
from sama_jax.engine.batching import Batch, program_slots, slot_sizes
from sama_jax.engine.plans import PLAN_ROWS
from sama_jax.engine.readings import Readings
from sama_jax.engine.roles import ModelRole
from sama_jax.engine.tasks import Task
from sama_jax.engine.text_table import TextTable, padded


class Job(NamedTuple):
    """One task of one batch under one model."""

    batch: Batch
    task: Task
    role: ModelRole
    channels: tuple[str, ...]
    """What is read: all that is missing for any of its texts."""
    missing: Mapping[int, tuple[str, ...]]
    """Place in the batch -> the channels that are missing for that text."""


class Call(NamedTuple):
    """One call of a compiled program on a job's texts."""

    job: Job
    function: "LossScorer | ProcedureRun"
    """The computation; equal ones share a program."""
    row_axes: tuple[Any, ...]
    """Axis of the texts in each argument."""
    args: tuple[Any, ...]
    passes: int
    """Passes that are read of the result; the others fill the program up."""
    positions: Int[np.ndarray, "t b k"] | None
    """Scored positions of all passes of the job, in the text's own coordinates."""
    ends_job: bool
    ends_batch: bool


@dataclass(frozen=True)
class LossScorer:
    """The program of a plan: losses of a batch, or other channels, at each pass's positions."""

    model: Model
    slots: tuple[int, ...]
    channels: tuple[str, ...]

    def __call__(self, params: Params, batch: ForwardBatch) -> Float[Array, "r b k"]:
        """Runs the passes; see `losses.loss_batch`."""
        return losses.loss_batch(self.model, self.slots, params, batch, self.channels)


@dataclass(frozen=True)
class ProcedureRun:
    """The program of a procedure: its values for a batch of texts."""

    model: Model
    procedure: Procedure

    def __call__(
        self,
        params: Params,
        seed: UInt32[Array, ""],
        high: UInt32[Array, " b"],
        low: UInt32[Array, " b"],
        tokens: Int[Array, "b l"],
        valid: Bool[Array, "b l"],
        maskable: Bool[Array, "b l"],
    ) -> Float[Array, "t b l"]:
        """Runs it with each text's own key."""

        def key(high: UInt32[Array, ""], low: UInt32[Array, ""]) -> Key[Array, ""]:
            return rng.text_key(seed, TextKeyData(high, low))

        keys = jax.vmap(key)(high, low)
        return self.procedure.run(self.model, params, keys, tokens, valid, maskable)


def jobs_of(
    batch: Batch, tasks: Sequence[Task], roles: Mapping[str, ModelRole], readings: Readings
) -> Iterator[Job]:
    """Yields what is missing of a batch under some models.

    Where target and reference are one model, one job reads what is missing for either.
    """
    for task in tasks:
        keys = readings.tables[task.view].store_keys
        models: dict[str, list[ModelRole]] = {}
        for name in task.channels:
            if name in roles:
                models.setdefault(roles[name].store_key, []).append(roles[name])
        for same in models.values():
            missing = {
                place: _joined(readings.missing(task, role.name, keys[row]) for role in same)
                for place, row in enumerate(batch.rows.tolist())
                if row >= 0
            }
            wanted = {channel for found in missing.values() for channel in found}
            every = _joined(task.channels[role.name] for role in same)
            channels = tuple(c for c in every if c in wanted)
            if channels:
                yield Job(batch, task, same[-1], channels, missing)


def _joined(channels: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Joins channels, each once."""
    return tuple(dict.fromkeys(channel for some in channels for channel in some))


def calls_of(
    jobs: Sequence[Job], readings: Readings, layout: Layout, pad_id: int | None
) -> Iterator[Call]:
    """Yields the calls that the jobs of one batch take, in order.

    Args:
      jobs: of one batch and one view.
      readings: the run's texts and what is stored.
      layout: where the programs run.
      pad_id: the token of visible padding; None: padding is hidden.
    """
    if not jobs:
        return
    batch = jobs[0].batch
    texts = readings.tables[jobs[0].task.view].take(batch.rows)
    alike = not any(texts.shared)
    task, inputs = None, {}  # by sizes of slots: both models read the same arrays, if they can
    for number, job in enumerate(jobs):
        if job.task is not task:
            task, inputs = job.task, {}
        reads = "target" if alike else job.role.name
        tokens, valid = padded_tokens(texts, reads, batch.length, pad_id)
        last, model = number == len(jobs) - 1, layout.adapt(job.role.folder.model)
        if job.task.procedure is not None:
            maskable = padded(texts.maskable, batch.length, np.bool_)
            seed = np.uint32(readings.settings.seed)
            args = seed, texts.high, texts.low, tokens, valid, maskable
            function = ProcedureRun(model, job.task.procedure)
            rows, count = (None, 0, 0, 0, 0, 0), job.task.rows
            yield Call(job, function, rows, args, count, None, True, last)
            continue
        limit, every = readings.settings.max_length, readings.tasks.all
        slots = program_slots(job.task, every, batch.length, limit, job.channels, readings.tables)
        if (slots, reads) not in inputs:
            given = job.task, batch, texts, tokens, valid, slots, readings
            inputs[slots, reads] = forward_batch(*given, reads)
        forward, own = inputs[slots, reads]
        chunks = list(in_calls(forward))
        function = LossScorer(model, slots, job.channels)
        for place, chunk in enumerate(chunks):
            ends = place == len(chunks) - 1
            count = int(chunk.passes)
            yield Call(job, function, (FORWARD_ROWS,), (chunk,), count, own, ends, ends and last)


def padded_tokens(
    texts: TextTable, role: str, length: int, pad_id: int | None
) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
    """Returns a model's tokens and where they are valid; what stands before a text comes first.

    Padding is hidden (not valid), unless it has a visible token.
    """
    joined = tuple(np.concatenate(pair) for pair in zip(texts.before, texts.tokens(role)))
    tokens = padded(joined, length, np.int32)
    valid = np.arange(length) < np.array([len(one) for one in joined])[:, None]
    if pad_id is not None:
        tokens = np.where(valid, tokens, np.int32(pad_id))
        valid = np.ones_like(valid)
    return tokens, valid


def forward_batch(
    task: Task,
    batch: Batch,
    texts: TextTable,
    tokens: Int[np.ndarray, "b l"],
    valid: Bool[np.ndarray, "b l"],
    slots: tuple[int, ...],
    readings: Readings,
    role: str = "target",
) -> tuple[ForwardBatch, Int[np.ndarray, "t b k"]]:
    """Makes the scorer's input for one batch under a plan; `role` reads tokens of its own.

    Returns:
      the input, and the scored positions in the text's own coordinates (-1 unused).
    """
    limit = readings.settings.max_length
    shape = task.passes, len(batch.rows), max(batch.length, limit)
    masks, scored = np.zeros(shape, bool), np.zeros(shape, bool)
    for start in range(0, len(batch.rows), PLAN_ROWS):
        chunk = [int(row) for row in batch.rows[start : start + PLAN_ROWS] if row >= 0]
        if chunk:
            plan, part = readings.plan(task, chunk), slice(start, start + len(chunk))
            width = plan.masks.shape[-1]
            masks[:, part, :width] = plan.masks[: len(chunk)].swapaxes(0, 1)
            scored[:, part, :width] = plan.scored[: len(chunk)].swapaxes(0, 1)
    for row, shared in enumerate(texts.shared):
        if shared is not None:
            for marks in (masks, scored):
                marks[:, row] = over_tokens(marks[:, row], shared.of(role))
    offsets = texts.offsets
    for row in np.flatnonzero(offsets):
        masks[:, row] = np.roll(masks[:, row], offsets[row], axis=-1)
    own = losses.scored_positions(scored, slots[-1])
    positions = np.where(own >= 0, own + offsets[None, :, None], -1).astype(np.int32)
    sizes = slot_sizes(task, batch.length, limit, readings.tables)
    group = np.searchsorted(np.array(slots), sizes)
    made = ForwardBatch(
        tokens,
        valid,
        masks[..., : batch.length],
        positions,
        group.astype(np.int32),
        np.int32(task.passes),
    )
    return made, own


def in_calls(forward: ForwardBatch) -> Iterator[ForwardBatch]:
    """Splits a plan's passes into calls of `losses.PASSES_A_CALL`, the last one filled up."""
    total, size = len(forward.group), losses.PASSES_A_CALL
    for start in range(0, total, size):
        stop = min(start + size, total)
        fill = size - (stop - start)

        def part(x: Any, start: int = start, stop: int = stop, fill: int = fill) -> Any:
            return np.pad(x[start:stop], ((0, fill), *[(0, 0)] * (x.ndim - 1)))

        yield forward._replace(
            masks=part(forward.masks),
            positions=part(forward.positions),
            group=part(forward.group),
            passes=np.int32(stop - start),
        )


def over_tokens(
    marks: Bool[np.ndarray, "t l"], spans: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, "t l"]:
    """Marks the tokens of marked spans; `spans` says which one each token belongs to, -1 none."""
    out = np.zeros_like(marks)
    out[:, : len(spans)] = marks[:, spans] & (spans >= 0)
    return out


def over_spans(
    values: Float[np.ndarray, "c t k"],
    positions: Int[np.ndarray, "t k"],
    spans: Int[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, "c t k"], Int[np.ndarray, "t k"]]:
    """Sums the values of one text's tokens over their spans; a span of one token keeps its bits.

    Args:
      values: of tokens.
      positions: of these tokens, ascending in each pass, -1 unused.
      spans: which span each token of the text belongs to.

    Returns:
      values by span, and the spans (-1 unused).
    """
    steps, slots = np.nonzero(positions >= 0)
    at = spans[positions[steps, slots]]
    sums = np.zeros((*values.shape[:2], int(spans.max(initial=-1)) + 1), values.dtype)
    for sum_of, given in zip(sums, values):
        np.add.at(sum_of, (steps, at), given[steps, slots])
    scored = np.zeros(sums.shape[1:], bool)
    scored[steps, at] = True
    found = np.full_like(positions, -1)
    some = losses.scored_positions(scored, positions.shape[1])
    found[:, : some.shape[1]] = some
    index = np.maximum(found, 0)[None].repeat(len(values), axis=0)
    return np.where(found >= 0, np.take_along_axis(sums, index, axis=2), np.nan), found


def values_of(
    call: Call, outputs: Sequence[Float[np.ndarray, "r b k"]], table: TextTable
) -> tuple[Float[np.ndarray, "c t b k"], Int[np.ndarray, "t b k"]]:
    """Joins the outputs of a job's calls.

    Args:
      call: the job's last one.
      outputs: of each call, cut to the passes that it really made; NaN where nothing was read.
      table: the texts of the job's view.

    Returns:
      values by channel, and their positions in the text (-1 unused): tokens, or shared spans.
    """
    if call.positions is not None:
        channels = len(call.job.channels)
        split = [rows.reshape(-1, channels, *rows.shape[1:]) for rows in outputs]
        values, positions = np.concatenate(split).swapaxes(0, 1), call.positions.copy()
        for place, row in enumerate(call.job.batch.rows):
            shared = table.shared[row] if row >= 0 else None
            if shared is not None:
                found = values[:, :, place], positions[:, place], shared.of(call.job.role.name)
                values[:, :, place], positions[:, place] = over_spans(*found)
        return values, positions
    (dense,) = outputs
    positions = losses.scored_positions(~np.isnan(dense), dense.shape[-1])
    values = np.take_along_axis(dense, np.maximum(positions, 0), axis=-1)
    return np.where(positions >= 0, values, np.nan)[None], positions


class Programs:
    """The compiled programs of a run, made when a shape first comes up."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._runners: dict[LossScorer | ProcedureRun, Runner] = {}

    def runner(self, call: Call) -> Runner:
        """Returns what runs a call's function."""
        if call.function not in self._runners:
            runner = Runner(call.function, self.layout, call.row_axes)
            self._runners[call.function] = runner
        return self._runners[call.function]
