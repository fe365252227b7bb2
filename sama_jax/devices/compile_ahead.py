"""Compiles the scorer ahead of time for devices that need not be here; XLA says what it takes.

`python -m sama_jax.devices.compile_ahead` answers one `Request`. It is a process of its own,
because a topology needs environment variables that must be set before JAX starts, and because
libtpu writes to standard error as it likes. `sama-jax plan` asks it.
"""

import contextlib
import importlib.metadata
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sama_jax.arrays import ForwardBatch, Params
from sama_jax.core import losses
from sama_jax.devices.child_process import Child, serve
from sama_jax.devices.collectives import Traffic, collectives
from sama_jax.devices.mesh import Device, grid
from sama_jax.devices.runner import FORWARD_ROWS, Runner
from sama_jax.devices.strategy import Layout, local_layout, mesh_layout
from sama_jax.errors import UsageError
from sama_jax.models.registry import build_model, read_config

# libtpu asks the cloud's metadata server for all of these unless they are set.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any will do: the topology is asked by name
}


class Request(NamedTuple):
    """One program: which network, on which devices, for which shapes."""

    config: dict[str, Any]
    where: str
    """Path of the config, for messages."""
    dtype: str
    platform: str
    """`tpu` or `cpu`."""
    topology: str
    """Name for libtpu such as `v5e:4x4`; not used on a CPU."""
    options: dict[str, Any]
    """More of libtpu's description of the topology."""
    mesh: tuple[int, int]
    """Devices along `data` and `model`."""
    rows: int
    """Texts on each place along `data`."""
    length: int
    slots: tuple[int, ...]
    channels: tuple[str, ...] = ("nll",)


class Compiled(NamedTuple):
    """What XLA says of a program; bytes are those of one device."""

    compile_seconds: float
    fits: bool = True
    """False: XLA found that the device has too little memory; the rest is then empty."""
    arguments_bytes: int = 0
    temporaries_bytes: int = 0
    output_bytes: int = 0
    collectives: dict[str, Traffic] = {}  # noqa: RUF012


def run(request: Request, tick: Callable[[float], None] | None = None) -> Compiled:
    """Compiles in a process of its own, with the environment that the topology needs.

    `tick` is told the seconds so far, now and then.

    Raises:
      UsageError: the topology is unknown, or the mesh does not fit the model.
      ModelError: the config is wrong.
      OutOfMemory, Crashed: the compiler was killed, or crashed.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if request.platform == "cpu":
        count = request.mesh[0] * request.mesh[1]
        kept = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env.get("XLA_FLAGS", ""))
        env["XLA_FLAGS"] = f"{kept} --xla_force_host_platform_device_count={count}".strip()
    else:
        env |= _NO_TPU_HERE
    name = f"compiler for {request.topology}"
    with Child(name, "sama_jax.devices.compile_ahead", env=env, show_errors=False) as child:
        found = Compiled(**child.ask(request._asdict(), tick))
    return found._replace(collectives={k: Traffic(*v) for k, v in found.collectives.items()})


def versions() -> dict[str, str]:
    """Returns the versions of what decides about the program."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- in the child --------------------------------------------------------------------------------


def compile_scorer(request: Request) -> Compiled:
    """Compiles `losses.loss_batch` as an audit would run it, from shapes alone.

    Raises:
      SamaError: see `run`.
    """
    family = read_config(request.config, request.where)
    mesh = grid(_devices(request), request.mesh)
    split = request.mesh[1] > 1
    layout = mesh_layout(mesh) if split else local_layout([*mesh.devices.flat])
    model = layout.adapt(build_model(family, family.mask_id or 0, jnp.dtype(request.dtype)))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, model.dtype, sharding=at),
        shapes,
        layout.shardings(shapes, model.arch),
    )

    def score(params: Params, batch: ForwardBatch) -> jax.Array:
        return losses.loss_batch(model, request.slots, params, batch, request.channels)

    start = time.monotonic()
    lowered = Runner(score, layout, (FORWARD_ROWS,)).lower(params, _batch(request, layout))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(time.monotonic() - start, fits=False)
    seconds, memory, text = time.monotonic() - start, compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, "CPUs and TPUs have both"
    assert text is not None
    return Compiled(
        seconds,
        arguments_bytes=memory.argument_size_in_bytes,
        temporaries_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        collectives=collectives(text),
    )


def _devices(request: Request) -> list[Device]:
    if request.platform == "cpu":
        return jax.devices("cpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=request.topology, **request.options
        ).devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"topology {request.topology!r}: not known to libtpu ({reason})") from None


def _batch(request: Request, layout: Layout) -> ForwardBatch:
    """Returns the scorer's input as shapes, the rows of all places along `data` together."""

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, passes, length = request.rows * layout.row_parts, losses.PASSES_A_CALL, request.length
    return ForwardBatch._make(
        (
            array(rows, length),
            array(rows, length, dtype=jnp.bool_),
            array(passes, rows, length, dtype=jnp.bool_),
            array(passes, rows, request.slots[-1]),
            array(passes),
            array(),
        )
    )


def main() -> None:
    """Answers the requests on standard input."""

    def answer(told: dict[str, Any]) -> dict[str, Any]:
        request = Request(**told)
        request = request._replace(mesh=tuple(request.mesh), slots=tuple(request.slots))
        return compile_scorer(request)._asdict()

    serve(answer)


if __name__ == "__main__":
    main()
