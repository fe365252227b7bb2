"""Tells what scoring keeps in a device's memory, from sizes alone: a closed form.

The parameters take what their shapes say. Temporaries are the residual stream and the largest of
three phases of a pass: attention of one layer, the MLP of one layer, the vocabulary head at the
scored positions. `sama-jax plan` prints them next to what XLA allots (docs/plan.md).
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from sama_jax.arrays import Architecture, Params
from sama_jax.core import losses
from sama_jax.models.attention import CPU_SCORE_BYTES, query_parts

MARGIN = 0.15
"""Share of the temporaries by which the closed form may differ from what XLA allots."""
RESERVED = 0.04
"""Share of a device's memory that XLA, the program itself and the system keep."""


class BatchShape(NamedTuple):
    """What one device works on at once."""

    rows: int
    """Texts, on this device."""
    length: int
    """Padded tokens of a text."""
    slots: int
    """Most positions of a text that a pass scores."""
    passes: int = losses.PASSES_A_CALL
    """Passes in a call of the scorer."""
    parts: int = 1
    """Devices that the parameters are split over (`model` of a mesh)."""
    platform: str = "cpu"
    """The device's, by JAX's name. XLA fuses other operations on each."""


class Temporaries(NamedTuple):
    """Bytes on one device for everything but parameters and inputs."""

    copies: int
    """Parameters in another memory layout, made before the first pass."""
    stream: int
    """The residual stream, which is alive in every phase, on TPUs twice."""
    result: int
    """The losses, which are alive in every phase."""
    attention: int
    mlp: int
    head: int

    @property
    def peak(self) -> int:
        """What is alive in every phase, and the largest phase; the phases share their memory."""
        return self.copies + self.stream + self.result + max(self.attention, self.mlp, self.head)


class Footprint(NamedTuple):
    """Bytes on one device while it scores."""

    parameters: int
    """Those of all models that are resident."""
    inputs: int
    temporaries: Temporaries

    @property
    def total(self) -> int:
        """Returns the bytes that a device needs at the peak."""
        return self.parameters + self.inputs + self.temporaries.peak


def parameter_bytes(shapes: Params, dtype: DTypeLike, shardings: Params | None = None) -> int:
    """Returns the bytes of one model's parameters on one device; without shardings, all of them.

    Args:
      shapes: tree of arrays or `ShapeDtypeStruct`.
      dtype: that they are held in.
      shardings: tree of `jax.sharding.Sharding`, the same structure.
    """
    leaves = [tuple(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    if shardings is not None:
        leaves = [s.shard_shape(x) for x, s in zip(leaves, jax.tree.leaves(shardings))]
    return sum(map(math.prod, leaves)) * np.dtype(dtype).itemsize


def input_bytes(batch: BatchShape) -> int:
    """Returns the bytes of a `ForwardBatch` on one device."""
    a_pass = batch.length + 4 * batch.slots  # mask and positions
    return batch.rows * (5 * batch.length + batch.passes * a_pass)


def temporaries(arch: Architecture, dtype: DTypeLike, batch: BatchShape) -> Temporaries:
    """Returns the bytes that a pass needs on the way, by phase, on one device.

    The head holds float32 logits of `losses.HEAD_BYTES`, or of all scored positions if they are
    fewer. The rest depends on what XLA fuses: see `_on_cpu`, `_on_gpu` and `_on_tpu`.

    Args:
      arch: the network's sizes (`Model.arch`).
      dtype: of the activations.
    """
    phases = {"cpu": _on_cpu, "tpu": _on_tpu}.get(batch.platform, _on_gpu)
    read = batch._replace(length=2 * batch.length) if arch.clean_context else batch
    found = phases(arch, read, _arrays(arch, np.dtype(dtype).itemsize, read))
    return Temporaries(
        copies=found.copies,
        stream=found.stream,
        result=4 * batch.passes * batch.rows * batch.slots,
        attention=found.attention,
        mlp=found.mlp,
        head=logit_bytes(arch.vocab_size, batch.rows * batch.slots, batch.parts),
    )


class _Arrays(NamedTuple):
    """Sizes of what a block computes on one device, bytes in the activations' dtype."""

    itemsize: int
    """Bytes of one number."""
    stream: int
    """The residual stream."""
    wide: int
    """One array of the MLP's width."""
    inner: int
    """Width of the MLP, numbers in the device's part of a column."""
    query: int
    key: int
    """The keys; the values are as large."""
    columns: int
    """Columns of the projections to queries, keys and values together."""
    scores: int
    """Attention scores, numbers and not bytes."""


def _arrays(arch: Architecture, itemsize: int, batch: BatchShape) -> _Arrays:
    tokens, head_size = batch.rows * batch.length, arch.head_size
    heads, kv_heads, inner = (
        _part(n, batch.parts) for n in (arch.num_heads, arch.num_kv_heads, arch.active_width)
    )
    return _Arrays(
        itemsize,
        stream=itemsize * tokens * arch.width,
        wide=itemsize * tokens * inner,
        inner=inner,
        query=itemsize * tokens * head_size * heads,
        key=itemsize * tokens * head_size * kv_heads,
        columns=head_size * (heads + 2 * kv_heads),
        scores=tokens * batch.length * heads,
    )


class _Phases(NamedTuple):
    attention: int
    mlp: int
    stream: int
    copies: int = 0


def _on_cpu(arch: Architecture, batch: BatchShape, of: _Arrays) -> _Phases:
    """Counts one copy of the float32 scores, along with q, k, v and the output.

    If the scores exceed `CPU_SCORE_BYTES`, only one part of them is alive, but q, k, v and the
    output exist twice. An MLP holds its input, gate, up, and their product.
    """
    rows, length, heads = batch.rows, batch.length, arch.num_heads
    if rows > 1 and 4 * rows * heads * length**2 > CPU_SCORE_BYTES:
        parts = rows * query_parts(heads, length, length)
        attention = 4 * of.scores // parts + 2 * (of.query + 2 * of.key)
    else:
        attention = 4 * of.scores + 2 * (of.query + of.key)
    return _Phases(attention, of.stream + 3 * of.wide, of.stream)


def _on_gpu(arch: Architecture, batch: BatchShape, of: _Arrays) -> _Phases:
    """Counts float32 scores and their exponentials, along with q, k and v.

    cuDNN's attention has neither scores nor exponentials. An MLP holds gate, up, and their product.
    The scan over layers copies one layer's MLP parameters. Within 8 % for an 8B model and 8 to 128
    texts on an H200.
    """
    fused = arch.attention == "cudnn"
    scores = 0 if fused else (4 + of.itemsize) * of.scores
    copies = 3 * of.itemsize * arch.width * of.inner if arch.stacked_layers else 0
    return _Phases(of.query + 2 * of.key + scores, 3 * of.wide, of.stream, copies)


def _on_tpu(arch: Architecture, batch: BatchShape, of: _Arrays) -> _Phases:
    """Counts the weights of a fused softmax once, along with q, k and v.

    The MLP's product is fused as well, except in the last block, which holds its stream and input
    at the scored positions. The scanned blocks' stream exists twice, and XLA transposes the
    projections to q, k and v for all layers at once. Fitted to six compiled programs of an 8B
    model, within 13 % (docs/plan.md).
    """
    last = (2 * of.stream + 3 * of.wide) * batch.slots // batch.length
    return _Phases(
        attention=of.itemsize * of.scores + of.query + 2 * of.key,
        mlp=max(of.stream + 2 * of.wide, last),
        stream=2 * of.stream,
        copies=of.itemsize * arch.stacked_layers * arch.width * of.columns,
    )


def _part(count: int, parts: int) -> int:
    """Returns how many of `count` things a device has, which are split if they can be."""
    return count // parts if count % parts == 0 else count


def logit_bytes(vocab_size: int, positions: int, parts: int = 1) -> int:
    """Returns the bytes of float32 logits held at once when losses of `positions` are read."""
    chunk = max(1, losses.HEAD_BYTES // (4 * vocab_size))
    return 4 * min(positions, chunk) * _part(vocab_size, parts)


def full_logits_bytes(vocab_size: int, rows: int, length: int, parts: int = 1) -> int:
    """Returns the bytes of float32 logits of every position, which scoring never makes at once."""
    return 4 * rows * length * _part(vocab_size, parts)


def footprint(
    arch: Architecture, dtype: DTypeLike, batch: BatchShape, parameters: int
) -> Footprint:
    """Returns all that a device keeps, with `parameters` bytes of the models that are resident."""
    return Footprint(parameters, input_bytes(batch), temporaries(arch, dtype, batch))


def fits(found: Footprint, capacity: int) -> bool:
    """Tells whether it goes into `capacity` bytes, with `RESERVED` and `MARGIN` to spare."""
    temporaries = (1 + MARGIN) * found.temporaries.peak
    return found.parameters + found.inputs + temporaries <= (1 - RESERVED) * capacity


def largest_rows(
    arch: Architecture,
    dtype: DTypeLike,
    batch: BatchShape,
    parameters: int,
    capacity: int,
    most: int = 4096,
) -> int:
    """Returns the most rows that fit next to `parameters` bytes, 0 if none do.

    The rows of `batch` are ignored.
    """
    low, high = 0, most
    while low < high:
        rows = (low + high + 1) // 2
        found = footprint(arch, dtype, batch._replace(rows=rows), parameters)
        low, high = (rows, high) if fits(found, capacity) else (low, rows - 1)
    return low
