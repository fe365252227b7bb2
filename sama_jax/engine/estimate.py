"""Estimates passes, time and memory of what a run has to do."""

from collections.abc import Collection, Iterable, Mapping

from sama_jax.arrays import Model
from sama_jax.devices import memory
from sama_jax.engine.batching import BatchShapes, slot_sizes, slots_of_programs
from sama_jax.engine.roles import ModelRole
from sama_jax.engine.tasks import Task, Tasks
from sama_jax.engine.text_table import TextTable
from sama_jax.terminal import binary_size, duration

USED = 0.5
"""Share of the rate of one matrix product that scoring reaches, for the estimate."""


def estimate(
    tasks: Tasks,
    tables: Mapping[str, TextTable],
    left: Mapping[str, Collection[int]],
    roles: Mapping[str, ModelRole],
    shapes: BatchShapes,
    rate: float,
) -> str:
    """Says in one line how many passes are left, and what they take in time and memory.

    Args:
      tasks: of the run.
      tables: its texts by view; a view that is not made yet counts like the texts themselves.
      left: the rows of each view that have passes left.
      roles: the models.
      shapes: what decides the shapes of batches.
      rate: floating-point operations a second of a matrix product on one device.
    """
    texts, passes, tokens, flops = 0, 0, 0, 0.0
    found: set[tuple[int, int]] = set()
    for view, rows in left.items():
        texts = max(texts, len(rows))
        for batch in shapes.batches(tables.get(view, tables["text"]), rows):
            found.add((len(batch.rows), batch.length))
            for task in tasks.of_view(view):
                for role in task.channels:
                    passes += len(batch.texts) * task.passes
                    tokens += len(batch.texts) * task.passes * batch.length
                    model, limit = roles[role].folder.model, shapes.settings.max_length
                    flops += len(batch.rows) * _flops(task, model, batch.length, limit, tables)
    seconds = flops / (USED * rate * len(shapes.layout.devices))
    needed = memory_of(found, tasks, shapes, tables).total
    return (
        f"{texts} texts, {passes} forward passes, {tokens:,} tokens with padding, "
        f"{flops / 1e12:.2f} TFLOP: about {duration(seconds)} after compiling, "
        f"{binary_size(needed)} of a device's {binary_size(shapes.device_bytes)}"
    )


def memory_of(
    batches: Iterable[tuple[int, int]],
    tasks: Tasks,
    shapes: BatchShapes,
    tables: Mapping[str, TextTable],
) -> memory.Footprint:
    """Returns the bytes on one device in the largest batch (rows, length), by the closed form."""
    limit = shapes.settings.max_length
    found = memory.Footprint(shapes.parameter_bytes, 0, memory.Temporaries(0, 0, 0, 0, 0, 0))
    for rows, length in batches:
        slots = max(slots_of_programs(tasks.all, length, limit, tables), default=length)
        shape = shapes.shape(rows // shapes.layout.row_parts, length, slots)
        for model in shapes.models:
            some = memory.footprint(model.arch, model.dtype, shape, shapes.parameter_bytes)
            found = max(found, some, key=lambda f: f.total)
    return found


def _flops(
    task: Task, model: Model, length: int, max_length: int, tables: Mapping[str, TextTable]
) -> float:
    """Counts the floating-point operations of a task on one text, padded to `length`."""
    if task.source is None:
        return task.passes * model.flops_per_text(length, float(length))
    slots = slot_sizes(task, length, max_length, tables)
    return sum(model.flops_per_text(length, float(s)) for s in slots)
