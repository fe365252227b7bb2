"""One scorer, any number of devices: the two ways to run `score_batch`.

`replicated` splits rows over the devices of this process with `jax.pmap`; every device holds all
parameters. One device is plain `jax.jit`. Numbers do not change: each device sees the rows and the
shapes that a single device would.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from sama_jax.errors import UsageError
from sama_jax.types import ForwardBatch, Params


class Runner:
    """A scorer on some devices: compiled ahead, one program a shape.

    Call `compile` before the first batch of a shape; so compiling is timed on its own, and a shape
    that does not fit the device fails before any scoring.
    """

    def __init__(
        self,
        score: Callable[[Params, ForwardBatch], jax.Array],
        devices: Sequence[jax.Device],  # pyright: ignore
    ):
        self.devices = tuple(devices)
        self._programs: dict[tuple[int, ...], Any] = {}
        if len(self.devices) == 1:
            self._jitted = jax.jit(score)
        else:
            rows = ForwardBatch(0, 0, masks=1, positions=1, group=None, passes=None)  # pyright: ignore
            self._jitted = jax.pmap(
                score,
                axis_name="data",
                in_axes=(None, rows),  # pyright: ignore
                out_axes=1,  # pyright: ignore
                devices=list(self.devices),
            )

    def is_compiled(self, batch: ForwardBatch) -> bool:
        """Whether a program for the batch's shape exists."""
        return _shape(batch) in self._programs

    def compile(self, params: Params, batch: ForwardBatch) -> None:
        """Makes the program for the batch's shape."""
        lowered = self._jitted.lower(params, self._split(batch))
        self._programs[_shape(batch)] = lowered.compile()

    def __call__(self, params: Params, batch: ForwardBatch) -> np.ndarray:
        """Runs host arrays; rows must be a multiple of the devices. float32 [t, b, k] (host)."""
        out = np.asarray(self._programs[_shape(batch)](params, self._split(batch)))
        return out.reshape(out.shape[0], -1, out.shape[-1])

    def _split(self, batch: ForwardBatch) -> ForwardBatch:
        """A device axis before the rows, as `pmap` wants it; nothing on one device."""
        num = len(self.devices)
        if num == 1:
            return batch

        def split(x: Any, axis: int) -> Any:
            return x.reshape(*x.shape[:axis], num, -1, *x.shape[axis + 1 :])

        return ForwardBatch(
            tokens=split(batch.tokens, 0),
            valid=split(batch.valid, 0),
            masks=split(batch.masks, 1),
            positions=split(batch.positions, 1),
            group=batch.group,
            passes=batch.passes,
        )


def _shape(batch: ForwardBatch) -> tuple[int, ...]:
    return (*batch.masks.shape, batch.positions.shape[-1])


class RowRunner:
    """Any function of parameters and arrays on some devices: one program a shape.

    `run(params, seed, *arrays)`; arrays have a leading axis of rows, which is split over devices.
    The result has its rows on axis 1.
    """

    def __init__(self, run: Callable[..., jax.Array], devices: Sequence[jax.Device]):  # pyright: ignore
        self.devices = tuple(devices)
        self._jitted = jax.jit(run)
        self._programs: dict[tuple[int, ...], Any] = {}

    def is_compiled(self, shape: tuple[int, ...]) -> bool:
        """Whether a program for tokens [b, l] of this shape exists."""
        return shape in self._programs

    def compile(self, params: Params, seed: Any, *arrays: np.ndarray) -> None:
        """Makes the program; the last array has the shape of the tokens."""
        lowered = self._jitted.lower(params, seed, *self._split(arrays))
        self._programs[arrays[-1].shape] = lowered.compile()

    def __call__(self, params: Params, seed: Any, *arrays: np.ndarray) -> np.ndarray:
        """Runs host arrays; rows must be a multiple of the devices."""
        program = self._programs[arrays[-1].shape]
        return np.asarray(program(params, seed, *self._split(arrays)))

    def _split(self, arrays: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
        if len(self.devices) == 1:
            return arrays
        rows = NamedSharding(Mesh(np.array(self.devices), ("data",)), PartitionSpec("data"))
        return tuple(jax.device_put(a, rows) for a in arrays)


def parameter_sharding(devices: Sequence[jax.Device]) -> Sharding:  # pyright: ignore
    """Parameters replicated over `devices`."""
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())


def make_mesh(text: str) -> Mesh:
    """A mesh of all devices of all processes from `data=N,model=M`; an axis left out is 1.

    Raises `UsageError`.
    """
    sizes = {"data": 1, "model": 1}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() not in sizes or not number.strip().isdigit():
            raise UsageError(f"mesh {text!r}: expected data=N,model=M with numbers, found {part!r}")
        sizes[name.strip()] = int(number)
    if math.prod(sizes.values()) != jax.device_count():
        raise UsageError(
            f"mesh {text!r}: needs {math.prod(sizes.values())} devices, there are "
            f"{jax.device_count()} ({jax.default_backend()})"
        )
    return Mesh(np.array(jax.devices()).reshape(tuple(sizes.values())), tuple(sizes))


def split_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A matrix or stack of them, split over `model` along its longest axis that this divides.

    Everything else is replicated. For storing and moving parameters: it ignores what they do.
    """
    size = mesh.shape["model"]
    axes = [i for i, n in enumerate(shape) if n % size == 0 and len(shape) > 1]
    if not axes:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda i: shape[i])
    return NamedSharding(
        mesh, PartitionSpec(*("model" if i == longest else None for i in range(len(shape))))
    )
