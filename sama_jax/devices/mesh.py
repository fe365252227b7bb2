"""Meshes: the devices of all processes on a grid of `data` x `model`."""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sama_jax.devices.rank import whole_number
from sama_jax.errors import UsageError

AXES = ("data", "model")
"""Rows of a batch are split over `data`, parameters over `model`."""


@runtime_checkable
class Device(Protocol):
    """A device of JAX, as far as this package looks at it."""

    platform: str
    device_kind: str
    process_index: int

    def memory_stats(self) -> dict[str, int] | None:
        """Returns counts of bytes by name; None where the backend does not count."""
        ...


def mesh_sizes(text: str) -> tuple[int, int]:
    """Reads the sizes of `data` and `model` from `data=N,model=M`; an axis left out is 1.

    Raises:
      UsageError: the text says something else.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() not in sizes or not whole_number(number.strip()):
            raise UsageError(f"mesh {text!r}: expected data=N,model=M with numbers, found {part!r}")
        sizes[name.strip()] = whole_number(number.strip()) or 1
    return sizes["data"], sizes["model"]


def make_mesh(text: str) -> Mesh:
    """Returns a mesh of all devices of all processes from `data=N,model=M`.

    Raises:
      UsageError: the product is not the number of devices.
    """
    sizes = mesh_sizes(text)
    if math.prod(sizes) != jax.device_count():
        raise UsageError(
            f"mesh {text!r}: needs {math.prod(sizes)} devices, there are "
            f"{jax.device_count()} ({jax.default_backend()})"
        )
    return grid(jax.devices(), sizes)


def grid(devices: Any, sizes: tuple[int, int]) -> Mesh:
    """Returns the mesh of a sequence of devices."""
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 2)


def connect(address: str, bind: str | None, count: int, rank: int) -> None:
    """Makes this one of several JAX processes; all call it, before anything touches a device.

    Process 0 listens on `bind`, on all of its addresses where that is None.
    """
    jax.distributed.initialize(
        address,
        count,
        rank,
        coordinator_bind_address=bind if rank == 0 else None,
        # JAX would abort with a stack dump after 100 s; the supervisors notice earlier, by a line.
        heartbeat_timeout_seconds=600,
    )


def disconnect() -> None:
    """Ends what `connect` began, after the last common computation; all processes call it.

    A process' own devices stay in use.
    """
    jax.distributed.shutdown()
