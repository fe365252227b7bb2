"""One scorer, any number of devices: the two ways to run `score_batch`.

`replicated` splits rows over the devices of this process with `jax.pmap`; every device holds all
parameters. One device is plain `jax.jit`. Numbers do not change: each device sees the rows and the
shapes that a single device would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from sama_jax.types import ForwardBatch, Params

ScoreFn = Callable[[Params, ForwardBatch], jax.Array]


@dataclass
class Runner:
    """A compiled scorer on some devices. Callable with host arrays; returns a device array."""

    score: ScoreFn
    devices: Sequence[jax.Device]
    programs: int = 0
    """Traces so far: one a distinct shape."""
    _shapes: set[tuple[int, ...]] = field(default_factory=set, repr=False)
    _run: Any = field(default=None, repr=False)

    def __post_init__(self):
        def counted(params: Params, batch: ForwardBatch) -> jax.Array:
            self.programs += 1  # runs once a trace, not once a call
            return self.score(params, batch)

        if len(self.devices) == 1:
            self._run = jax.jit(counted)
        else:
            rows = ForwardBatch(tokens=0, valid=0, masks=1, positions=1, group=None)  # pyright: ignore
            self._run = jax.pmap(
                counted,
                axis_name="data",
                in_axes=(None, rows),  # pyright: ignore
                out_axes=1,  # pyright: ignore
                devices=list(self.devices),
            )

    @property
    def sharding(self) -> Sharding:
        """Where parameters must lie: on every device, once, before the first call."""
        return parameter_sharding(self.devices)

    def is_new(self, batch: ForwardBatch) -> bool:
        """Whether a batch of this shape is seen for the first time and will be compiled."""
        shape = (*batch.masks.shape, batch.positions.shape[-1])
        known = shape in self._shapes
        self._shapes.add(shape)
        return not known

    def __call__(self, params: Params, batch: ForwardBatch) -> np.ndarray:
        """Runs `devices * rows` texts; `batch` rows must be a multiple of the devices."""
        num = len(self.devices)
        if num == 1:
            return np.asarray(self._run(params, batch))

        def split(x: np.ndarray, axis: int) -> np.ndarray:
            return x.reshape(*x.shape[:axis], num, -1, *x.shape[axis + 1 :])

        parts = ForwardBatch(
            tokens=split(batch.tokens, 0),  # pyright: ignore
            valid=split(batch.valid, 0),  # pyright: ignore
            masks=split(batch.masks, 1),  # pyright: ignore
            positions=split(batch.positions, 1),  # pyright: ignore
            group=batch.group,
        )
        out = np.asarray(self._run(params, parts))
        return out.reshape(out.shape[0], -1, out.shape[-1])


def parameter_sharding(devices: Sequence[jax.Device]) -> Sharding:
    """Parameters replicated over `devices`."""
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())
