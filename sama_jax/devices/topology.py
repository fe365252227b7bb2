"""Topologies to plan for: kinds of chips, and how many of them stand in which shape."""

import math
import os
import re
from typing import Any, NamedTuple

from sama_jax.devices.rank import whole_number
from sama_jax.errors import UsageError

GIB = 2**30


class Chip(NamedTuple):
    """What a kind of chip has.

    From Google's pages on each (cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e).
    """

    memory: int
    """Bytes of HBM."""
    flops: float
    """Peak in bfloat16, operations a second."""
    axes: int
    """Dimensions of the interconnect, a 2D or 3D torus."""
    options: dict[str, Any] = {}  # noqa: RUF012


CHIPS = {
    # A v4 chip's two cores are one device; libtpu's description has two unless it is told.
    "v4": Chip(32 * GIB, 275e12, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * GIB, 197e12, 2),
    "v5p": Chip(95 * GIB, 459e12, 3),
    "v6e": Chip(32 * GIB, 918e12, 2),
}


class Topology(NamedTuple):
    """Devices to plan for."""

    name: str
    platform: str
    chips: int
    memory: int
    """Bytes of one device."""
    flops: float | None
    options: dict[str, Any]


def read_topology(name: str) -> Topology:
    """Returns a topology by its name, such as `v5e:4x4` or `cpu:8`.

    Raises:
      UsageError: there is no such topology.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu":
        count = whole_number(shape)
        if count is None or not 1 <= count <= 64:
            raise UsageError(f"topology {name!r}: expected cpu:N with N from 1 to 64")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Topology(name, "cpu", count, memory // count, None, {})
    if kind not in CHIPS:
        raise UsageError(f"topology {name!r}: unknown chip; known: {', '.join(CHIPS)}, cpu")
    chip = CHIPS[kind]
    if not re.fullmatch("[1-9][0-9]{0,5}" + "x[1-9][0-9]{0,5}" * (chip.axes - 1), shape):
        example = "x".join(["4"] * chip.axes)
        raise UsageError(
            f"topology {name!r}: expected {chip.axes} sizes after the colon, as in {kind}:{example}"
        )
    sizes = [int(n) for n in shape.split("x")]
    # Hosts have 2 x 2 chips; libtpu wants to be told of smaller ones.
    host = [min(2, sizes[0]), min(2, sizes[1]), 1]
    options = {**chip.options, "chips_per_host_bounds": host}
    return Topology(name, "tpu", math.prod(sizes), chip.memory, chip.flops, options)
