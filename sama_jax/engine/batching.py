"""Decides the shapes of batches: padded lengths, rows, and the slots of scored positions.

All from what is the same in every process and for every choice of attacks, so that a text is padded
to the same length and gets the same bits in any of them, and in a run that is continued.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sama_jax.arrays import Model
from sama_jax.config import AuditSettings
from sama_jax.core import losses
from sama_jax.devices import memory
from sama_jax.devices.strategy import Layout
from sama_jax.engine.plans import PLAN_ROWS
from sama_jax.engine.tasks import Task
from sama_jax.engine.text_table import TextTable, visible_length
from sama_jax.texts.buckets import bucket_lengths, plan_batches

TOKENS_A_STEP = 1536
"""Tokens a device works on at once on a CPU: 16 rows of 96. Larger batches ran slower there."""
ACCELERATOR_TOKENS = 16384
"""The same of an accelerator; more brought nothing on an H200."""
PROGRAM_FLOPS = {"cpu": 3e11, "accelerator": 1e15}
"""What a device computes while a program compiles (some 3 s on a CPU, 5 s for an accelerator): a
bucket that saves less padding than that joins the next one."""
MOST_ROWS = 64


class Batch(NamedTuple):
    """Texts that are padded to one length and run together."""

    length: int
    rows: Int[np.ndarray, " b"]
    """Rows of the view's table, -1 in unused places."""

    @property
    def texts(self) -> list[int]:
        """The rows that hold a text."""
        return [int(row) for row in self.rows if row >= 0]


def usual_rows(length: int, tokens: int) -> int:
    """Returns the rows of a device that works on `tokens` tokens at once, memory aside.

    Plans are drawn and scores computed for `PLAN_ROWS` texts at once. Not below 4: a single row
    takes other kernels, and small batches waste both cores.
    """
    rows = min(MOST_ROWS, tokens // length)
    return rows // PLAN_ROWS * PLAN_ROWS or 4


def rows_a_device(length: int, tokens: int, fit: int) -> int:
    """Returns the rows that a device works on at once: the usual ones, if `fit` rows fit.

    At least one, which may yet fit. More than `PLAN_ROWS` are a multiple of it.
    """
    rows = min(usual_rows(length, tokens), max(1, fit))
    return rows - rows % PLAN_ROWS if rows > PLAN_ROWS else rows


@dataclass(frozen=True)
class BatchShapes:
    """Everything that decides the shapes of a run's batches."""

    model: Model
    """The target's network."""
    context: int
    """Tokens that fit into the context of all models."""
    settings: AuditSettings
    layout: Layout
    parameter_bytes: int
    """Of the models that are resident at once, on one device."""
    device_bytes: int
    """Memory of a device, the same in every process."""
    batch_size: int | None = None
    """Rows of a device, if the user has fixed them."""
    others: tuple[Model, ...] = ()
    """The references' networks, where they may be others than the target's."""

    @property
    def models(self) -> tuple[Model, ...]:
        """All networks of the run."""
        return self.model, *self.others

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        return self.layout.devices[0].platform == "cpu"

    @property
    def tokens_a_step(self) -> int:
        """Tokens that a device works on at once."""
        return TOKENS_A_STEP if self.on_cpu else ACCELERATOR_TOKENS

    @property
    def product(self) -> tuple[int, int, int]:
        """The shape (m, k, n) of one of the model's products on what a device works on at once."""
        return self.tokens_a_step, self.model.arch.width, self.model.arch.mlp_width

    def buckets(self, longest: int) -> tuple[int, ...]:
        """Returns the lengths of hidden padding that may be used, for up to `longest` tokens."""
        settings = self.settings
        limit = settings.max_length
        if longest > limit:  # a view with a prefix, which fits into the models' context
            limit = max(longest, min(limit + settings.prefix.tokens, self.context))
        return bucket_lengths(limit)

    def rows(self, length: int) -> int:
        """Returns the rows of a batch of a padded length, on all devices together."""
        parts = self.layout.row_parts
        if self.batch_size is not None:
            return self.batch_size * parts
        return rows_a_device(length, self.tokens_a_step, self._rows_that_fit(length)) * parts

    def _rows_that_fit(self, length: int) -> int:
        """Returns, by the closed form, the rows that fit beside the models.

        As if every position were scored, so that it is the same whichever attacks are asked for.
        """
        shape = self.shape(0, length, length)
        sizes = self.parameter_bytes, self.device_bytes
        return min(memory.largest_rows(m.arch, m.dtype, shape, *sizes) for m in self.models)

    def shape(self, rows: int, length: int, slots: int) -> memory.BatchShape:
        """Describes what a device works on that has `rows` rows of its own."""
        parts, platform = self.layout.model_parts, self.layout.devices[0].platform
        return memory.BatchShape(rows, length, slots, parts=parts, platform=platform)

    def pays(self, count: int, length: int, larger: int) -> bool:
        """Tells whether padding `count` texts to `length`, not to `larger`, is worth a program.

        By SAMA's operations for both models, whatever the attacks are, so that a text is padded the
        same whichever are asked for.
        """
        passes = 2 * self.settings.sama.passes
        saved = self.model.flops_per_text(larger, 0.0) - self.model.flops_per_text(length, 0.0)
        platform = "cpu" if self.on_cpu else "accelerator"
        return count * passes * saved >= PROGRAM_FLOPS[platform] * len(self.layout.devices)

    def batches(self, table: TextTable, rows: Collection[int]) -> list[Batch]:
        """Makes batches of some rows of a view.

        All texts together decide on a text's bucket, so that a resumed run, which has fewer left,
        pads it to the same length and computes the same bits.
        """
        distinct = distinct_rows(table)
        members: dict[int, list[int]] = {}
        if self.settings.padding == "visible":
            for row in distinct:
                view = table.row(row)
                assert view is not None
                length = visible_length(view, self.settings, self.context)
                members.setdefault(length, []).append(row)
        else:
            lengths = table.lengths[np.array(distinct, np.int32)]
            buckets = self.buckets(int(lengths.max(initial=1)))
            for batch in plan_batches(lengths, buckets, self.rows, self.pays):
                places = batch.rows[batch.rows >= 0]
                members.setdefault(batch.length, []).extend(distinct[i] for i in places)
        wanted, found = set(rows), []
        for length, places in sorted(members.items(), reverse=True):
            left = [row for row in places if row in wanted]
            size = self.rows(length)
            for start in range(0, len(left), size):
                chunk = left[start : start + size]
                filled = np.array(chunk + [-1] * (size - len(chunk)), np.int32)
                found.append(Batch(length, filled))
        return found


def distinct_rows(table: TextTable) -> list[int]:
    """Returns the first row of each distinct sequence of tokens that has something to mask."""
    first: dict[str, int] = {}
    for row in np.flatnonzero(table.readable).tolist():
        first.setdefault(table.store_keys[row], row)
    return list(first.values())


def same_tokens(table: TextTable) -> dict[str, list[int]]:
    """Groups the rows of a view by their key in the store."""
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(table.store_keys):
        groups.setdefault(key, []).append(row)
    return groups


# --- slots ---------------------------------------------------------------------------------------


def slot_sizes(
    task: Task, length: int, max_length: int, tables: Mapping[str, TextTable]
) -> Int[np.ndarray, " t"]:
    """Returns the static number of scored tokens of each pass of a plan, padded to `length`.

    In a view of `tables` whose texts are scored by spans, each may be as wide as the widest.
    """
    assert task.source is not None, "procedures have no slots"
    most, widest = min(length, max_length), 1
    if task.view in tables:
        widest = tables[task.view].widest
    return losses.slot_sizes(task.source.slot_bounds(most) * widest, most)


def slots_of_programs(
    tasks: Iterable[Task],
    length: int,
    max_length: int,
    tables: Mapping[str, TextTable],
    channels: tuple[str, ...] | None = None,
) -> tuple[int, ...]:
    """Returns all sizes that plans need in a bucket, or those plans that read just `channels`.

    One program serves them all, and each size costs a second of compiling.
    """
    plans = [t for t in tasks if t.source is not None]
    if channels is not None:
        plans = [t for t in plans if channels in t.channels.values()]
    return tuple(sorted({int(s) for t in plans for s in slot_sizes(t, length, max_length, tables)}))


def program_slots(
    task: Task,
    tasks: Sequence[Task],
    length: int,
    max_length: int,
    channels: tuple[str, ...],
    tables: Mapping[str, TextTable],
) -> tuple[int, ...]:
    """Returns the sizes of the program that reads `channels`: not all, if a run continues."""
    whole = channels in task.channels.values()
    return slots_of_programs(tasks, length, max_length, tables, channels if whole else None)
