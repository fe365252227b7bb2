"""Layouts: which devices run a function of parameters and rows, and what each of them holds.

A strategy is one small class with the methods of `Layout`. The rows of a batch come in equal parts,
one for each place on the mesh's `data` axis, so a device works on the rows and, but for what a mesh
splits over `model`, on the shapes that a single device would. docs/recipes/add_a_device_strategy.md
shows how to add one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Bool

from sama_jax.arrays import Architecture, Model, Params
from sama_jax.devices.mesh import Device, grid
from sama_jax.devices.sharding import parameter_shardings

RowAxes = Any
"""For each argument after the parameters, or for each leaf of it, the axis that counts rows; None
where there is none. A tree whose structure begins that of the arguments."""


@dataclass(frozen=True)
class Layout(ABC):
    """Where a function runs. Hashable and comparable."""

    mesh: Mesh
    """The devices, on the axes `data` and `model`."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices of the mesh."""
        return tuple(self.mesh.devices.flat)

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are split into; it must divide their number."""
        return self.mesh.shape["data"]

    @property
    def model_parts(self) -> int:
        """Devices that a layer's heads and widths are split over."""
        return self.mesh.shape["model"]

    @property
    def parameter_parts(self) -> int:
        """Devices that hold a model's parameters between them."""
        return self.model_parts

    @property
    def works_on_all_batches(self) -> bool:
        """Whether all processes work on each batch together, else each on batches of its own."""
        return False

    def adapt(self, model: Model) -> Model:
        """Returns the model as this layout runs it.

        If the mesh already splits the heads, the CPU must not also loop over them.
        """
        return model if self.model_parts == 1 else model.with_split_heads()

    def shardings(self, abstract_params: Params, arch: Architecture) -> Params:
        """Returns a tree of shardings: where each parameter of a tree of shapes goes."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda _: everywhere, abstract_params)

    def held(self, rows: int) -> Bool[np.ndarray, " rows"]:
        """Tells which rows' results this process gets."""
        return np.ones(rows, bool)

    def owned(self, rows: int) -> Bool[np.ndarray, " rows"]:
        """Tells which of the held rows count as this process'; each row belongs to one process."""
        return np.ones(rows, bool)

    @abstractmethod
    def describe(self) -> str:
        """Says in a few words what each device holds."""

    @abstractmethod
    def program(
        self, function: Callable[..., jax.Array], row_axes: RowAxes, out_axis: int
    ) -> "jax.stages.Wrapped | _OneProgram":
        """Returns `function(params, *args)` on these devices, to be lowered and compiled.

        Its arguments are what `split` makes of them; the rows of its result are on `out_axis`.
        """

    @abstractmethod
    def split(self, args: tuple[Any, ...], row_axes: RowAxes) -> tuple[Any, ...]:
        """Brings host arrays, the same in every process, into the form that `program` wants."""

    @abstractmethod
    def abstract(self, args: tuple[Any, ...], row_axes: RowAxes) -> tuple[Any, ...]:
        """Does for shapes (`jax.ShapeDtypeStruct`) what `split` does for arrays."""

    @abstractmethod
    def fetch(self, out: jax.Array, out_axis: int) -> np.ndarray:
        """Waits for a program's result and returns it in one piece; NaN in rows not `held`."""


@partial(jax.jit, static_argnums=0)
def _call(function: Callable[..., jax.Array], *args: Any) -> jax.Array:
    return function(*args)


class _OneProgram(NamedTuple):
    """A function under `jax.jit`. Equal functions share their programs, in later runs as well.

    A `jax.jit` of its own would be traced and compiled again by each audit of a process.
    """

    function: Callable[..., jax.Array]

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers the call with these arguments, or their shapes."""
        return _call.lower(self.function, *args)


class OneDevice(Layout):
    """Runs a plain `jax.jit` on one device."""

    def describe(self) -> str:
        return "one device"

    def program(self, function, row_axes, out_axis):
        return _OneProgram(function)

    def split(self, args, row_axes):
        return args

    def abstract(self, args, row_axes):
        return args

    def fetch(self, out, out_axis):
        return np.asarray(out)


class Replicated(Layout):
    """Runs `jax.pmap`: every device of this process holds all parameters, and has its rows.

    JAX keeps pmap in maintenance alone; this class is all that uses it.
    """

    def describe(self) -> str:
        return "pmap, every device holds the models"

    def program(self, function, row_axes, out_axis):
        return jax.pmap(
            function,
            axis_name="data",
            in_axes=(None, *row_axes),
            out_axes=out_axis,  # pyright: ignore[reportArgumentType]  # its type is too narrow
            devices=list(self.mesh.devices.flat),
        )

    def split(self, args, row_axes):
        parts = self.row_parts
        return _map(lambda axis, x: x.reshape(in_parts(np.shape(x), axis, parts)), args, row_axes)

    def abstract(self, args, row_axes):
        return _abstract_parts(self.mesh, args, row_axes)

    def fetch(self, out, out_axis):
        return _in_one_piece(np.asarray(out), out_axis)


@dataclass(frozen=True)
class OnMesh(Layout):
    """Runs one program over a mesh, of several processes too; XLA adds the collectives.

    Parameters are split over `model` by `sharding.RULES`, rows over `data`.
    """

    fully_sharded: bool = False
    """Split matrices over `data` as well; a device fetches each layer when it needs it."""

    @property
    def parameter_parts(self) -> int:
        return self.model_parts * (self.row_parts if self.fully_sharded else 1)

    @property
    def works_on_all_batches(self) -> bool:
        return True

    def shardings(self, abstract_params: Params, arch: Architecture) -> Params:
        return parameter_shardings(
            self.mesh, abstract_params, arch, fully_sharded=self.fully_sharded
        )

    def held(self, rows: int) -> Bool[np.ndarray, " rows"]:
        return np.repeat(self._local().any(axis=1), rows // self.row_parts)

    def owned(self, rows: int) -> Bool[np.ndarray, " rows"]:
        return np.repeat(self._local()[:, 0], rows // self.row_parts)

    def _local(self) -> Bool[np.ndarray, "data model"]:
        """Tells which devices are those of this process."""
        process = jax.process_index()
        return np.vectorize(lambda d: d.process_index == process, otypes=[bool])(self.mesh.devices)

    def describe(self) -> str:
        how = f"sharded, data={self.row_parts},model={self.model_parts}"
        return how + (", parameters split over data, too" if self.fully_sharded else "")

    def program(self, function, row_axes, out_axis):
        # A part is what one device would work on, also where the function takes its rows in chunks:
        # a chunk then has rows of every part, and no row leaves its device.
        axes = (None, *row_axes)
        parts = jax.vmap(function, in_axes=axes, out_axes=out_axis, spmd_axis_name="data")
        return jax.jit(parts, out_shardings=row_sharding(self.mesh, out_axis))

    def split(self, args, row_axes):
        def place(axis: int | None, x: Any) -> jax.Array:
            x = np.asarray(x).reshape(in_parts(np.shape(x), axis, self.row_parts))
            at = row_sharding(self.mesh, axis)
            return jax.make_array_from_callback(x.shape, at, lambda index: x[index])

        return _map(place, args, row_axes)

    def abstract(self, args, row_axes):
        return _abstract_parts(self.mesh, args, row_axes)

    def fetch(self, out, out_axis):
        if out.is_fully_addressable:
            return _in_one_piece(np.asarray(out), out_axis)
        whole = np.full(out.shape, np.nan, out.dtype)
        for shard in out.addressable_shards:
            whole[shard.index] = np.asarray(shard.data)
        return _in_one_piece(whole, out_axis)


def local_layout(devices: Sequence[Device] | None = None) -> Layout:
    """Returns the layout of devices of this process, by default all, that each hold everything."""
    chosen = jax.local_devices() if devices is None else list(devices)
    mesh = grid(chosen, (len(chosen), 1))
    return OneDevice(mesh) if len(chosen) == 1 else Replicated(mesh)


def mesh_layout(mesh: Mesh, *, fully_sharded: bool = False) -> Layout:
    """Returns the layout that splits parameters and rows over a mesh."""
    return OneDevice(mesh) if mesh.size == 1 else OnMesh(mesh, fully_sharded)


def row_sharding(mesh: Mesh, axis: int | None) -> Sharding:
    """Returns the sharding of an array whose `axis` counts parts; None: whole on every device."""
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")
    return NamedSharding(mesh, spec)


def in_parts(shape: tuple[int, ...], axis: int | None, parts: int) -> tuple[int, ...]:
    """Returns the shape with an axis of parts before the axis of rows."""
    if axis is None:
        return shape
    return (*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])


def _map(f: Callable[[int | None, Any], Any], args: tuple[Any, ...], row_axes: RowAxes) -> Any:
    return jax.tree.map(f, row_axes, args, is_leaf=lambda axis: axis is None)


def _abstract_parts(mesh: Mesh, args: tuple[Any, ...], row_axes: RowAxes) -> tuple[Any, ...]:
    def place(axis: int | None, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = in_parts(x.shape, axis, mesh.shape["data"])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=row_sharding(mesh, axis))

    return _map(place, args, row_axes)


def _in_one_piece(values: np.ndarray, axis: int) -> np.ndarray:
    """Joins an axis of parts with the axis of rows after it."""
    return values.reshape(*values.shape[:axis], -1, *values.shape[axis + 2 :])
