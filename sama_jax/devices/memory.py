"""What scoring keeps in a device's memory, in closed form: from sizes alone, nothing is compiled.

Parameters are what they are. Temporaries are the largest of three phases of a pass, beside the
residual stream: attention of one layer, the MLP of one layer, the vocabulary head at the scored
positions. `sama-jax plan` prints them beside what XLA allots (docs/plan.md compares the two).
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from sama_jax.arrays import Architecture, Params
from sama_jax.core import losses
from sama_jax.models.transformer import CPU_SCORE_BYTES, query_parts

MARGIN = 0.15
"""Of the temporaries: the closed form is within that of what XLA allots (tests/test_plan.py)."""
RESERVED = 0.04
"""Of a device's memory, which XLA, the program itself and the system keep."""


class Load(NamedTuple):
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
    """JAX's name of it; what XLA fuses differs."""


class Temporaries(NamedTuple):
    """Bytes on one device beside parameters and inputs."""

    copies: int
    """Of parameters in another layout, made before the first pass."""
    stream: int
    """The residual stream: alive in every phase, on TPUs twice."""
    result: int
    """The losses: so, too."""
    attention: int
    mlp: int
    head: int

    @property
    def peak(self) -> int:
        """What is alive in every phase, and the largest phase: one uses the others' memory."""
        return self.copies + self.stream + self.result + max(self.attention, self.mlp, self.head)


class Footprint(NamedTuple):
    """Bytes on one device while it scores."""

    parameters: int
    """Of all models that are resident."""
    inputs: int
    temporaries: Temporaries

    @property
    def total(self) -> int:
        """Returns the bytes that a device needs at the peak."""
        return self.parameters + self.inputs + self.temporaries.peak


def parameter_bytes(shapes: Params, dtype: Any, shardings: Params | None = None) -> int:
    """Bytes of one model's parameters on one device; without shardings, all of them.

    Args:
      shapes: tree of arrays or `ShapeDtypeStruct`.
      dtype: that they are held in.
      shardings: tree of `jax.sharding.Sharding`, the same structure.
    """
    leaves = [tuple(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    if shardings is not None:
        leaves = [s.shard_shape(x) for x, s in zip(leaves, jax.tree.leaves(shardings))]
    return sum(map(math.prod, leaves)) * np.dtype(dtype).itemsize


def input_bytes(load: Load) -> int:
    """Bytes of a `ForwardBatch` on one device."""
    a_pass = load.length + 4 * load.slots  # mask and positions
    return load.rows * (5 * load.length + load.passes * a_pass)


def temporaries(arch: Architecture, dtype: Any, load: Load) -> Temporaries:
    """Bytes that a pass needs on the way, by phase, on one device.

    Args:
      arch: the network's sizes (`Model.arch`).
      dtype: of the activations.

    An MLP holds its input (not on GPUs), gate, up, and their product. The head holds float32 logits
    of `losses.HEAD_BYTES`, or of all scored positions if they are fewer. Attention depends on what
    XLA fuses. On a CPU float32 scores exist once, beside queries, keys, values and the result;
    those of some heads or queries if they are many (`transformer.CPU_SCORE_BYTES`), beside all of
    these twice. On GPUs float32 scores and the activations' exponentials of them, beside queries,
    keys and values, or none of that with cuDNN's attention; and a copy of one layer's MLP
    parameters, which the scan cuts out (within 8 % for an 8B model and 8 to 128 texts on an H200).

    On TPUs the softmax is fused: its weights exist once, in the activations' dtype, with queries,
    keys and values; so is the MLP's product, but for the last block, which holds its stream and
    input at scored positions, too. The scanned blocks' stream exists twice, and XLA turns their
    projections of queries, keys and values around for all layers at once (fitted to six compiled
    programs of an 8B model, within 13 %: docs/plan.md).
    """
    size, (rows, length, slots) = np.dtype(dtype).itemsize, load[:3]
    heads, kv_heads, head_size = arch.num_heads, arch.num_kv_heads, arch.head_size
    tokens, tpu = rows * length, load.platform == "tpu"
    scores = tokens * length * _part(heads, load.parts)
    query, key = (size * tokens * head_size * _part(n, load.parts) for n in (heads, kv_heads))
    in_parts = rows > 1 and 4 * rows * heads * length**2 > CPU_SCORE_BYTES
    if load.platform == "tpu":
        attention = size * scores + query + 2 * key
    elif load.platform != "cpu":
        fused = arch.attention == "cudnn"
        attention = query + 2 * key + (0 if fused else (4 + size) * scores)
    elif in_parts:
        parts = rows * query_parts(heads, length, length)
        attention = 4 * scores // parts + 2 * (query + 2 * key)
    else:
        attention = 4 * scores + 2 * (query + key)
    inner, stacked = arch.active_width, arch.stacked_layers
    stream, wide = size * tokens * arch.width, size * tokens * _part(inner, load.parts)
    columns = head_size * (_part(heads, load.parts) + 2 * _part(kv_heads, load.parts))
    copies, mlp = 0, stream + 3 * wide
    if tpu:
        mlp = max(stream + 2 * wide, (2 * stream + 3 * wide) * slots // length)
        stream *= 2
        copies = size * stacked * arch.width * columns
    elif load.platform != "cpu":
        mlp = 3 * wide
        copies = 3 * size * arch.width * _part(inner, load.parts) if stacked else 0
    return Temporaries(
        copies=copies,
        stream=stream,
        result=4 * load.passes * rows * slots,
        attention=attention,
        mlp=mlp,
        head=logit_bytes(arch.vocab_size, rows * slots, load.parts),
    )


def _part(count: int, parts: int) -> int:
    """What a device has of `count` things that are split if they can be."""
    return count // parts if count % parts == 0 else count


def logit_bytes(vocab_size: int, positions: int, parts: int = 1) -> int:
    """Float32 logits that are held at once when losses of `positions` are read."""
    chunk = max(1, losses.HEAD_BYTES // (4 * vocab_size))
    return 4 * min(positions, chunk) * _part(vocab_size, parts)


def full_logits_bytes(vocab_size: int, rows: int, length: int, parts: int = 1) -> int:
    """Float32 logits of every position at once, which scoring never makes."""
    return 4 * rows * length * _part(vocab_size, parts)


def footprint(
    arch: Architecture,
    dtype: Any,
    load: Load,
    shapes: Params,
    shardings: Params | None = None,
    models: int = 1,
) -> Footprint:
    """All of it, with the parameters of `models` models of one architecture."""
    parameters = models * parameter_bytes(shapes, dtype, shardings)
    return Footprint(parameters, input_bytes(load), temporaries(arch, dtype, load))


def fits(found: Footprint, capacity: int) -> bool:
    """Whether it goes into a device's `capacity` bytes, `RESERVED` and `MARGIN` to spare."""
    temporaries = (1 + MARGIN) * found.temporaries.peak
    return found.parameters + found.inputs + temporaries <= (1 - RESERVED) * capacity


def largest_rows(
    arch: Architecture, dtype: Any, load: Load, parameters: int, capacity: int, most: int = 4096
) -> int:
    """The most rows (`load.rows` is not looked at) that fit beside `parameters` bytes; 0: none."""
    low, high = 0, most
    while low < high:
        rows = (low + high + 1) // 2
        some = load._replace(rows=rows)
        found = Footprint(parameters, input_bytes(some), temporaries(arch, dtype, some))
        low, high = (rows, high) if fits(found, capacity) else (low, rows - 1)
    return low
