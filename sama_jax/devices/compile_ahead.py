"""The scorer compiled ahead of time for devices that need not be here: XLA's own word on memory.

`python -m sama_jax.ahead` reads one `Request` as JSON and prints what it found as JSON. It is a
process of its own, because a topology needs environment variables that must be set before JAX
starts, and because libtpu writes to standard error as it likes. `plan` is its caller.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sama_jax.arrays import ForwardBatch
from sama_jax.core import losses
from sama_jax.devices import parallel
from sama_jax.errors import ModelError, UsageError
from sama_jax.models.registry import build_model, read_config

ROW_AXES = ForwardBatch(0, 0, masks=1, positions=1, group=None, passes=None)  # pyright: ignore
"""Axis of the rows in each field of the scorer's input."""


TICK_SECONDS = 10.0


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


# --- in the child --------------------------------------------------------------------------------


def compile_scorer(request: Request) -> dict[str, Any]:
    """Compiles `losses.score_batch` as `parallel` would run it, from shapes alone.

    Returns bytes on one device, and what passes between devices; or, where the program does not
    fit, `exhausted` with XLA's message. Raises `SamaError`.
    """
    family = read_config(request.config, request.where)
    model = build_model(family, family.mask_id or 0, jnp.dtype(request.dtype))
    mesh = Mesh(
        np.array(_devices(request)).reshape(request.mesh),
        parallel.AXES,
        axis_types=(AxisType.Auto,) * 2,
    )
    layout = parallel.Layout(mesh, "sharded" if request.mesh[1] > 1 else "pmap")
    model = layout.adapt(model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, model.dtype, sharding=at),
        shapes,
        layout.shardings(shapes, model.arch),
    )

    def score(params: Any, batch: ForwardBatch) -> jax.Array:
        return losses.score_batch(model, request.slots, params, batch, request.channels)

    start = time.monotonic()
    lowered = parallel.program(score, layout, (ROW_AXES,), 1).lower(params, _batch(request, layout))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"exhausted": str(error), "compile_seconds": time.monotonic() - start}
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    return {
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "compile_seconds": seconds,
        "collectives": collectives(compiled.as_text()),
    }


def _devices(request: Request) -> list[Any]:
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


def _batch(request: Request, layout: parallel.Layout) -> ForwardBatch:
    """The scorer's input as shapes, rows in parts as `parallel.program` wants them."""
    parts, rows, passes = request.mesh[0], request.rows, losses.PASSES_A_CALL
    split = len(layout.devices) > 1

    def array(axis: int | None, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(layout.mesh, PartitionSpec()) if split else None
        if split and axis is not None:
            shape = (*shape[:axis], parts, *shape[axis:])
            sharding = parallel.row_sharding(layout.mesh, axis)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    length, slots = request.length, request.slots[-1]
    return ForwardBatch(
        array(0, (rows, length), jnp.int32),  # pyright: ignore
        array(0, (rows, length), jnp.bool_),  # pyright: ignore
        array(1, (passes, rows, length), jnp.bool_),  # pyright: ignore
        array(1, (passes, rows, slots), jnp.int32),  # pyright: ignore
        array(None, (passes,), jnp.int32),  # pyright: ignore
        array(None, (), jnp.int32),  # pyright: ignore
    )


# --- what passes between devices -----------------------------------------------------------------

_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_OPERATION = re.compile(
    r" = (?P<result>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+\d+)\w*\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|calls|to_apply)=%?(?P<name>[\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{(?P<names>[^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")


class Traffic(NamedTuple):
    """Collectives of a kind in one pass of the scorer, on one device."""

    count: int
    bytes: int
    """Of their results; a ring moves about twice that for an all-reduce."""


def collectives(program: str) -> dict[str, Traffic]:
    """Counts the collectives of an HLO text (`compiled.as_text()`).

    A loop over layers or chunks counts as often as it runs, the loop over passes once, of the
    branches of a conditional the one with the most bytes.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head["name"]
            lines[name] = []
            entry = name if head["entry"] else entry
        elif name:
            lines[name].append(line)
    return _traffic(entry, lines, {})


def _traffic(
    name: str, lines: dict[str, list[str]], known: dict[str, dict[str, Traffic]]
) -> dict[str, Traffic]:
    """The collectives of a computation and of what it calls."""
    if name not in known:
        total: dict[str, Traffic] = {}
        for line in lines.get(name, []):
            operation = _OPERATION.search(line)
            if operation:
                one = Traffic(1, _bytes(operation))
                _add(total, {operation["kind"]: one}, 1)
                continue
            for called in _called(line, lines, known):
                _add(total, called, _trips(line, lines))
        known[name] = total
    return known[name]


def _trips(line: str, lines: dict[str, list[str]]) -> int:
    """How often an operation runs what it calls: XLA writes it down for CPUs; for TPUs it is the
    constant that the loop's condition compares its counter with. The loop over passes has none."""
    written, condition = _TRIPS.search(line), _CONDITION.search(line)
    if written:
        return int(written[1])
    found = _CONSTANT.findall("\n".join(lines.get(condition[1], []))) if condition else []
    return int(found[0]) if len(found) == 1 else 1


def _called(
    line: str, lines: dict[str, list[str]], known: dict[str, dict[str, Traffic]]
) -> Iterator[dict[str, Traffic]]:
    for called in _CALLED.finditer(line):
        yield _traffic(called["name"], lines, known)
    branches = _BRANCHES.search(line)
    if branches:
        names = [name.strip().lstrip("%") for name in branches["names"].split(",")]
        each = [_traffic(name, lines, known) for name in names]
        yield max(each, key=lambda found: sum(x.bytes for x in found.values()))


def _add(total: dict[str, Traffic], more: dict[str, Traffic], times: int) -> None:
    for kind, traffic in more.items():
        old = total.get(kind, Traffic(0, 0))
        total[kind] = Traffic(old.count + times * traffic.count, old.bytes + times * traffic.bytes)


def _bytes(operation: re.Match[str]) -> int:
    """Of the result. What starts an asynchronous one also returns its operand, which is not more;
    all but an all-reduce, which returns its results alone."""
    sizes = []
    for array in _ARRAY.finditer(operation["result"]):
        bits = 8 if array["type"] == "pred" else int(re.sub(r"\D", "", array["type"]))
        sizes.append(int(np.prod([int(n) for n in array["shape"].split(",") if n])) * bits // 8)
    if operation["start"] and operation["kind"] != "all-reduce":
        return max(sizes, default=0)
    return sum(sizes)


# --- in the caller -------------------------------------------------------------------------------


def run(request: Request, tick: Callable[[float], None] | None = None) -> dict[str, Any]:
    """`compile_scorer` in a process of its own, with the environment that the topology needs.

    `tick` is told the seconds so far, now and then. Raises `SamaError`.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if request.platform == "cpu":
        count = request.mesh[0] * request.mesh[1]
        kept = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env.get("XLA_FLAGS", ""))
        env["XLA_FLAGS"] = f"{kept} --xla_force_host_platform_device_count={count}".strip()
    else:
        # libtpu asks the cloud's metadata server for all of these unless they are set.
        env |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any will do: the topology is asked by name
        }
    command, pipe, start = (
        [sys.executable, "-m", "sama_jax.devices.compile_ahead"],
        subprocess.PIPE,
        time.time(),
    )
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env) as job:
        try:
            out, err = _communicate(job, json.dumps(request._asdict()), start, tick)
        finally:
            job.kill()
    try:
        found = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        last = (err.strip() or "it said nothing").split("\n")[-1]
        raise UsageError(
            f"compiling for {request.topology} failed (exit code {job.returncode}: {last}); a "
            "killed compiler (-9) usually means that this machine ran out of memory"
        ) from None
    for error in (UsageError, ModelError):
        if error.__name__ in found:
            raise error(found[error.__name__])
    found["collectives"] = {k: Traffic(*v) for k, v in found.get("collectives", {}).items()}
    return found


def _communicate(
    job: subprocess.Popen[str], text: str, start: float, tick: Callable[[float], None] | None
) -> tuple[str, str]:
    given: str | None = text
    while True:
        try:
            return job.communicate(given, timeout=TICK_SECONDS)
        except subprocess.TimeoutExpired:
            given = None  # it has the text by now, and may not be given it again
            if tick is not None:
                tick(time.time() - start)


def versions() -> dict[str, str]:
    """Of what decides about the program."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    """One request on standard input, one answer on standard output."""
    request = Request(**json.load(sys.stdin))
    request = request._replace(mesh=tuple(request.mesh), slots=tuple(request.slots))
    try:
        found = compile_scorer(request)
    except (UsageError, ModelError) as error:
        found = {type(error).__name__: str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
