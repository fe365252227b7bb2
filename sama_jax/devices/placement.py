"""Chooses how a run's models are placed: the simplest way in which they fit."""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from sama_jax.devices.mesh import make_mesh
from sama_jax.devices.strategy import Layout, local_layout, mesh_layout
from sama_jax.errors import UsageError

PARAMETERS_SHARE = 0.8
"""Share of a device's memory that parameters may take."""
LOCAL: dict[str, Callable[[], Layout]] = {"pmap": local_layout}
"""Strategies in which every device holds the models, by their names for `--parallel`."""
_TURNS = {"auto": (True, False), "together": (True,), "in-turn": (False,)}


class Placement(NamedTuple):
    """How a run's models are placed."""

    layout: Layout
    together: bool
    """Both models at once, or one after the other."""


def choose_placement(
    kind: str,
    mesh: str | None,
    models: str,
    bytes_together: int,
    bytes_one: int,
    splits: Callable[[Mesh], object],
    *,
    fully_sharded: bool = False,
    room: int | None = None,
) -> Placement:
    """Returns the simplest placement that fits; what the caller fixes stays fixed.

    Both models on every device; else one after the other; else split over as few devices as it
    takes, together, else in turn.

    Args:
      kind: `auto`, `sharded`, or one of `LOCAL`; `auto` tries `pmap`, then meshes.
      mesh: `data=N,model=M`, which implies `sharded`; None: chosen.
      models: `auto`, `together` or `in-turn`.
      bytes_together: of all parameters.
      bytes_one: of the parameters of the larger model.
      splits: raises `UsageError` where parameters cannot be split over a mesh.
      fully_sharded: on a mesh, split parameters over `data` as well.
      room: bytes of memory a device; None: what this process' devices have.

    Raises:
      UsageError: nothing fits, or the flags contradict each other.
    """
    if mesh is not None and kind in LOCAL:
        raise UsageError("--mesh belongs to --parallel sharded; leave one of the two out")
    room = int(PARAMETERS_SHARE * (device_bytes() if room is None else room))
    whole = mesh is None and kind != "sharded"
    local = [LOCAL["pmap" if kind == "auto" else kind]()] if whole else []
    split = [] if kind in LOCAL else _meshes(mesh, splits, only_split=whole)
    meshes = [mesh_layout(grid, fully_sharded=fully_sharded) for grid in split]
    turns = _TURNS[models]
    options = [Placement(layout, together) for layout in local for together in turns]
    options += [Placement(layout, together) for together in turns for layout in meshes]
    for option in options:
        needed = bytes_together if option.together else bytes_one
        if needed <= option.layout.parameter_parts * room:
            return option
    if kind != "auto" or mesh is not None or len(options) == 1:  # as the caller wishes
        return options[-1]
    raise UsageError(
        f"the larger model has {bytes_one / 2**30:.1f} GiB of parameters, and the "
        f"{jax.device_count()} devices hold {room / 2**30:.1f} GiB of them each at most, split as "
        "far as its heads and widths allow; use more devices, --dtype bfloat16, or force a "
        "placement with --parallel"
    )


def _meshes(given: str | None, splits: Callable[[Mesh], object], only_split: bool) -> list[Mesh]:
    """Returns the mesh that is given, else those that parameters can be split over, few parts
    first. Raises `UsageError` if they cannot be split over the given one."""
    if given is not None:
        grid = make_mesh(given)
        splits(grid)
        return [grid]
    count, found = jax.device_count(), []
    for size in range(2 if only_split else 1, count + 1):
        if count % size == 0:
            grid = make_mesh(f"data={count // size},model={size}")
            try:
                splits(grid)
            except UsageError:
                continue
            found.append(grid)
    return found


def device_bytes() -> int:
    """Returns the memory of the smallest device of this process; CPUs share the machine's."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in devices]
    return min((n for n in limits if n), default=2**63)
