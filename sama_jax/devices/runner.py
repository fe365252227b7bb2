"""Runs a function of parameters and rows on a layout, one compiled program a shape."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sama_jax.arrays import ForwardBatch, Params
from sama_jax.devices.strategy import Layout, RowAxes

FORWARD_ROWS = ForwardBatch._make((0, 0, 1, 1, None, None))
"""Axis of the rows in each field of a `ForwardBatch`."""


class Runner:
    """Holds the programs of one function on one layout.

    Call `compile` before the first batch of a shape; so compiling is timed on its own, and a shape
    that does not fit the device fails before any scoring.

    Args:
      function: `function(params, *args)`; its result has rows on `out_axis`.
      layout: where it runs.
      row_axes: the axis of the rows of each argument.
    """

    def __init__(
        self,
        function: Callable[..., jax.Array],
        layout: Layout,
        row_axes: RowAxes,
        out_axis: int = 1,
    ):
        self.layout, self._row_axes, self._out_axis = layout, row_axes, out_axis
        self._jitted = layout.program(function, row_axes, out_axis)
        self._programs: dict[tuple[tuple[int, ...], ...], jax.stages.Compiled] = {}

    def is_compiled(self, *args: Any) -> bool:
        """Tells whether there is a program for arguments of these shapes."""
        return _shapes(args) in self._programs

    def compile(self, params: Params, *args: Any) -> None:
        """Makes the program for arguments of these shapes."""
        split = self.layout.split(args, self._row_axes)
        self._programs[_shapes(args)] = self._jitted.lower(params, *split).compile()

    def lower(self, params: Params, *shapes: Any) -> jax.stages.Lowered:
        """Lowers the program for `jax.ShapeDtypeStruct`s; the devices need not be here."""
        return self._jitted.lower(params, *self.layout.abstract(shapes, self._row_axes))

    def start(self, params: Params, *args: Any) -> jax.Array:
        """Hands host arrays, the same in every process, to the devices; for `fetch`.

        Rows must be a multiple of the layout's `row_parts`.
        """
        return self._programs[_shapes(args)](params, *self.layout.split(args, self._row_axes))

    def fetch(self, out: jax.Array) -> np.ndarray:
        """Waits for what was started and returns it (host); NaN in rows that the layout does not
        hold in this process."""
        return self.layout.fetch(out, self._out_axis)

    def __call__(self, params: Params, *args: Any) -> np.ndarray:
        """Starts and fetches."""
        return self.fetch(self.start(params, *args))


def _shapes(args: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(x) for x in jax.tree.leaves(args))
