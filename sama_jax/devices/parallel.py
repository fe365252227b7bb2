"""One scorer, any number of devices: what each device holds, and two ways to run a function.

A `Layout` says which devices work and how. `pmap` splits rows over the devices of this process;
every device holds all parameters (one device is plain `jax.jit`). `sharded` is one program over a
`data` x `model` mesh, of several processes too: rows are split over `data`, parameters over `model`
by the `RULES` below, and XLA adds the collectives. Either way a device works on the rows and, but
for what `model` splits, the shapes that a single device would.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from sama_jax.arrays import Params
from sama_jax.errors import UsageError

AXES = ("data", "model")


# --- what each device holds ----------------------------------------------------------------------


class Rule(NamedTuple):
    """How the parameters whose whole path matches `pattern` are split."""

    pattern: str
    spec: tuple[str | None, ...] = ()
    """Of the last axes; those before count layers and experts and are never split."""
    heads: str | None = None
    """Field of the architecture that `model` must divide, so that no head is cut in two."""
    or_replicated: bool = False
    """What does not divide is held whole by every device; else it is an error."""


_COLUMN, _ROW, _VECTOR = (None, "model"), ("model", None), ("model",)

RULES = (
    # A product's output is split (column), and the next one sums over what is split (row).
    Rule(r".*/lora_[ab]"),  # rank 8 to 64: small
    Rule(r".*/attn/q_proj/kernel", _COLUMN, heads="num_heads"),
    Rule(r".*/attn/q_proj/bias", _VECTOR, heads="num_heads"),
    Rule(r".*/attn/[kv]_proj/kernel", _COLUMN, heads="num_kv_heads", or_replicated=True),
    Rule(r".*/attn/[kv]_proj/bias", _VECTOR, heads="num_kv_heads", or_replicated=True),
    Rule(r".*/attn/o_proj/kernel", _ROW, heads="num_heads"),
    Rule(r".*/(mlp|shared|moe/experts)/(gate|up)_proj/kernel", _COLUMN),
    Rule(r".*/(mlp|shared)/(gate|up)_proj/bias", _VECTOR),
    Rule(r".*/(mlp|shared|moe/experts)/down_proj/kernel", _ROW),
    # Vocabulary rows. BERT's 30,522 and GPT-2's 50,258 have few divisors; such models are small.
    Rule(r"embed/embedding", _ROW, or_replicated=True),
    Rule(r"lm_head/kernel", _COLUMN, or_replicated=True),
    Rule(r"(lm_head|head)/bias", _VECTOR, or_replicated=True),
    # Held whole: what is added after a sum over devices, norms, routers, conditions, small tables.
    Rule(r".*/(o|down)_proj/bias"),
    Rule(r"(.*/)?\w*norm/(scale|bias)"),
    Rule(r".*/moe/router/(kernel|expert_bias)"),
    Rule(r"(positions|types)/embedding"),
    Rule(r"head/dense/(kernel|bias)"),
    Rule(r"time/dense_[01]/(kernel|bias)"),
    Rule(r"(.*/|final_)modulation/(kernel|bias)"),
)
"""The first that matches counts."""


def parameter_shardings(
    mesh: Mesh, abstract_params: Params, arch: Any, *, fully_sharded: bool = False
) -> Params:
    """A tree of `NamedSharding`, by `RULES`, for a tree of shapes (arrays or `ShapeDtypeStruct`).

    Args:
      mesh: with the axes `data` and `model`.
      arch: the network's architecture, for its numbers of heads.
      fully_sharded: split matrices over `data`, too; each device then fetches a layer when it needs
        it.

    Raises:
      UsageError: one line a parameter that no rule covers or whose rule does not divide.
    """
    problems: list[str] = []

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(str(k.key) for k in path)
        try:
            spec = _spec(name, tuple(leaf.shape), mesh.shape["model"], arch)
        except ValueError as error:
            problems.append(f"  {name} {tuple(leaf.shape)}: {error}")
            spec = ()
        if fully_sharded:
            spec = _over_data(spec, leaf.shape, mesh.shape["data"])
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(place, abstract_params)
    if problems:
        raise UsageError(
            f"{len(problems)} parameters cannot be split over model={mesh.shape['model']}; choose "
            "another --mesh\n" + "\n".join(problems)
        )
    return shardings


def _spec(name: str, shape: tuple[int, ...], size: int, arch: Any) -> tuple[str | None, ...]:
    """The partition of one parameter; ValueError if there is none."""
    rule = next((r for r in RULES if re.fullmatch(r.pattern, name)), None)
    if rule is None:
        raise ValueError("no sharding rule matches this path")
    if "model" not in rule.spec:
        return ()
    spec = (None,) * (len(shape) - len(rule.spec)) + rule.spec
    axis = spec.index("model")
    count, what = shape[axis], f"axis {axis}"
    if rule.heads is not None:
        count = getattr(arch, rule.heads, None) or arch.num_heads
        what = f"{rule.heads} {count}"
    if count % size == 0 and shape[axis] % size == 0:
        return spec
    if rule.or_replicated:
        return ()
    raise ValueError(f"{what} is not divisible by model={size}")


def _over_data(
    spec: tuple[str | None, ...], shape: tuple[int, ...], size: int
) -> tuple[str | None, ...]:
    """`spec` with `data` on the longest of a matrix's two axes that is whole and divides.

    Not on the axis of layers: a scan over it would fetch all layers at once.
    """
    whole = spec or (None,) * len(shape)
    last = range(max(len(shape) - 2, 0), len(shape))
    free = [i for i in last if whole[i] is None and shape[i] % size == 0]
    if len(shape) < 2 or not free:
        return spec
    longest = max(free, key=lambda i: shape[i])
    return tuple("data" if i == longest else s for i, s in enumerate(whole))


@dataclass(frozen=True)
class Layout:
    """Where a scorer runs. Hashable: programs are kept by it."""

    mesh: Mesh
    """Axes `data` and `model`. For `pmap`, devices of this process on `data`."""
    kind: Literal["pmap", "sharded"] = "pmap"
    fully_sharded: bool = False

    @property
    def devices(self) -> tuple[jax.Device, ...]:  # pyright: ignore
        return tuple(self.mesh.devices.flat)

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are split into; it must divide their number."""
        return self.mesh.shape["data"]

    def adapt(self, model: Any) -> Any:
        """The model as it is computed here: where heads are split, they are not taken apart too."""
        if self.mesh.shape["model"] == 1 or not hasattr(model.arch, "heads_apart"):
            return model
        return replace(model, arch=replace(model.arch, heads_apart=False))

    def shardings(self, abstract_params: Params, arch: Any) -> Params:
        """A tree of shardings: where each parameter goes."""
        if self.kind == "sharded":
            return parameter_shardings(
                self.mesh, abstract_params, arch, fully_sharded=self.fully_sharded
            )
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda _: everywhere, abstract_params)

    def held(self, rows: int) -> np.ndarray:
        """bool [rows]: whose results this process gets."""
        return np.repeat(self._local().any(axis=1), rows // self.row_parts)

    def owned(self, rows: int) -> np.ndarray:
        """bool [rows]: a choice of those, so that each row belongs to one process."""
        return np.repeat(self._local()[:, 0], rows // self.row_parts)

    def _local(self) -> np.ndarray:
        process = jax.process_index()
        return np.vectorize(lambda d: d.process_index == process, otypes=[bool])(self.mesh.devices)


class Fit(NamedTuple):
    """How a run's models are placed."""

    layout: Layout
    together: bool
    """Both models at once, or one after the other."""


def choose_layout(
    kind: str,
    mesh: str | None,
    models: str,
    bytes_together: int,
    bytes_one: int,
    splits: Callable[[Mesh], object],
    *,
    fully_sharded: bool = False,
    room: int | None = None,
) -> Fit:
    """The simplest placement that fits; what the caller fixes stays fixed.

    Both models on every device; else one after the other; else split over as few devices as it
    takes, together, else in turn. Four fifths of a device's memory are for parameters.

    Args:
      kind: `auto`, `pmap` or `sharded`.
      mesh: `data=N,model=M`, which implies `sharded`; None: chosen.
      models: `auto`, `together` or `in-turn`.
      bytes_together: of all parameters; `bytes_one`: of the larger model.
      splits: raises `UsageError` where parameters cannot be split over a mesh.
      room: bytes of memory a device; None: what this process' devices have.

    Raises:
      UsageError: nothing fits, or the flags contradict each other.
    """
    if mesh is not None and kind == "pmap":
        raise UsageError("--mesh belongs to --parallel sharded; leave one of the two out")
    room = int(0.8 * (device_bytes() if room is None else room))
    turns = {"auto": (True, False), "together": (True,), "in-turn": (False,)}[models]
    whole = mesh is None and kind != "sharded"
    if mesh is not None:
        grid = make_mesh(mesh)
        splits(grid)
        meshes = [grid]
    elif kind == "pmap":
        meshes = []
    else:
        meshes = _meshes(splits, whole)
    fits = [(local_layout(), 1)] if whole else []
    options = [(layout, size, together) for layout, size in fits for together in turns]
    for together in turns:
        for grid in meshes:
            size = grid.shape["model"] * (grid.shape["data"] if fully_sharded else 1)
            options.append((Layout(grid, "sharded", fully_sharded), size, together))
    for layout, size, together in options:
        if (bytes_together if together else bytes_one) <= size * room:
            return Fit(layout, together)
    if kind != "auto" or mesh is not None or len(options) == 1:  # as the caller wishes
        return Fit(options[-1][0], options[-1][2])
    raise UsageError(
        f"the larger model has {bytes_one / 2**30:.1f} GiB of parameters, and the "
        f"{jax.device_count()} devices hold {room / 2**30:.1f} GiB of them each at most, split as "
        "far as its heads and widths allow; use more devices, --dtype bfloat16, or force a "
        "placement with --parallel"
    )


def _meshes(splits: Callable[[Mesh], object], only_split: bool) -> list[Mesh]:
    """Meshes of all devices that the parameters can be split over, few parts first."""
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
    """Memory of the smallest device of this process; CPU devices share the machine's."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in devices]
    return min((n for n in limits if n), default=2**63)


def local_layout(devices: Sequence[jax.Device] | None = None) -> Layout:  # pyright: ignore
    """Rows over devices of this process, by default all of them, each with all parameters."""
    chosen = np.array(jax.local_devices() if devices is None else devices)
    return Layout(_mesh(chosen.reshape(-1, 1)))


def mesh_sizes(text: str) -> tuple[int, int]:
    """`data` and `model` of `data=N,model=M`; an axis left out is 1. Raises `UsageError`."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() not in sizes or not number.strip().isdigit() or int(number) < 1:
            raise UsageError(f"mesh {text!r}: expected data=N,model=M with numbers, found {part!r}")
        sizes[name.strip()] = int(number)
    return sizes["data"], sizes["model"]


def make_mesh(text: str) -> Mesh:
    """A mesh of all devices of all processes from `data=N,model=M`. Raises `UsageError`."""
    sizes = mesh_sizes(text)
    if math.prod(sizes) != jax.device_count():
        raise UsageError(
            f"mesh {text!r}: needs {math.prod(sizes)} devices, there are "
            f"{jax.device_count()} ({jax.default_backend()})"
        )
    return _mesh(np.array(jax.devices()).reshape(sizes))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


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


# --- several processes ---------------------------------------------------------------------------


def connect(address: str, count: int, rank: int) -> None:
    """Makes this one of several JAX processes; all call it, before anything touches a device."""
    jax.distributed.initialize(address, count, rank)


def disconnect() -> None:
    """After the last common computation; all call it. This process' own devices stay in use."""
    jax.distributed.shutdown()


# --- running -------------------------------------------------------------------------------------


def row_sharding(mesh: Mesh, axis: int) -> Sharding:
    """Of an array whose `axis` counts parts of the rows, one for each place on `data`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def program(
    function: Callable[..., jax.Array], layout: Layout, row_axes: tuple[Any, ...], out_axis: int
) -> Any:
    """`function(params, *args)` on a layout, to be lowered and compiled.

    Rows come in parts, on an axis before their own: `row_axes` has for each argument (or leaf of
    one) the axis of its rows, None where it has none. The result's rows are on `out_axis`.
    """
    axes = (None, *row_axes)
    if len(layout.devices) == 1:
        return jax.jit(function)
    if layout.kind == "pmap":
        devices = list(layout.devices)
        return jax.pmap(
            function, axis_name="data", in_axes=axes, out_axes=out_axis, devices=devices  # pyright: ignore
        )  # fmt: skip
    # A part is what one device would work on, also where the function takes its rows in chunks:
    # a chunk then has rows of every part, and no row leaves its device.
    parts = jax.vmap(function, in_axes=axes, out_axes=out_axis, spmd_axis_name="data")
    return jax.jit(parts, out_shardings=row_sharding(layout.mesh, out_axis))


class Runner:
    """A function of parameters and rows on a layout: compiled ahead, one program a shape.

    Call `compile` before the first batch of a shape; so compiling is timed on its own, and a shape
    that does not fit the device fails before any scoring. See `program` for the arguments.
    """

    def __init__(
        self,
        function: Callable[..., jax.Array],
        layout: Layout,
        row_axes: tuple[Any, ...],
        out_axis: int = 1,
    ):
        self.layout, self._row_axes, self._out_axis = layout, row_axes, out_axis
        self._jitted = program(function, layout, row_axes, out_axis)
        self._programs: dict[Any, Any] = {}

    def is_compiled(self, *args: Any) -> bool:
        """Whether a program for arguments of these shapes exists."""
        return _shapes(args) in self._programs

    def compile(self, params: Params, *args: Any) -> None:
        """Makes the program for arguments of these shapes."""
        self._programs[_shapes(args)] = self._jitted.lower(params, *self._split(args)).compile()

    def start(self, params: Params, *args: Any) -> jax.Array:
        """Hands host arrays, the same in every process, to the devices; for `fetch`.

        Rows must be a multiple of `row_parts`.
        """
        return self._programs[_shapes(args)](params, *self._split(args))

    def fetch(self, out: jax.Array) -> np.ndarray:
        """What was started, when it is done (host); NaN in rows that lie on no device of ours."""
        if len(self.layout.devices) == 1:
            return np.asarray(out)
        values, axis = self._own(out), self._out_axis
        return values.reshape(*values.shape[:axis], -1, *values.shape[axis + 2 :])

    def __call__(self, params: Params, *args: Any) -> np.ndarray:
        """`start` and `fetch`."""
        return self.fetch(self.start(params, *args))

    def _own(self, out: jax.Array) -> np.ndarray:
        if out.is_fully_addressable:
            return np.asarray(out)
        whole = np.full(out.shape, np.nan, out.dtype)
        for shard in out.addressable_shards:
            whole[shard.index] = np.asarray(shard.data)
        return whole

    def _split(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """An axis of parts before the rows; for a mesh, global arrays."""
        if len(self.layout.devices) == 1:
            return args
        parts = self.layout.row_parts

        def split(axis: int | None, x: Any) -> Any:
            if axis is not None:
                x = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
            if self.layout.kind == "pmap":
                return x
            x, mesh = np.asarray(x), self.layout.mesh
            at = NamedSharding(mesh, PartitionSpec()) if axis is None else row_sharding(mesh, axis)
            return jax.make_array_from_callback(x.shape, at, lambda index: x[index])

        return jax.tree.map(split, self._row_axes, args, is_leaf=lambda a: a is None)


def _shapes(args: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(x) for x in jax.tree.leaves(args))
