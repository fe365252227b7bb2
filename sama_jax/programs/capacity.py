"""`sama-jax plan`: what scoring a model will take on machines that need not be here.

The very scorer is compiled ahead of time for a topology; XLA says how much memory it takes, and
the rest is arithmetic. No weights are read.
"""

import contextlib
import math
import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from sama_jax import attacks
from sama_jax.arrays import Params
from sama_jax.attacks.queries import Probes, flatten
from sama_jax.core import losses
from sama_jax.devices import compile_ahead, memory
from sama_jax.devices.compile_ahead import Compiled
from sama_jax.devices.mesh import AXES, mesh_sizes
from sama_jax.devices.sharding import parameter_shardings
from sama_jax.devices.topology import Topology, read_topology
from sama_jax.engine.batching import ACCELERATOR_TOKENS, rows_a_device, usual_rows
from sama_jax.errors import UsageError
from sama_jax.models.registry import build_model, read_config
from sama_jax.programs.jobs import PlanJob
from sama_jax.terminal import Terminal, binary_size, duration
from sama_jax.weights import folder_files


class Subject(NamedTuple):
    """The model and the passes to plan for."""

    config: dict[str, Any]
    where: str
    model: Any
    shapes: Params
    slots: tuple[int, ...]
    """Sizes that the scorer is compiled for, ascending."""
    passes: int
    """Forward passes of one text, both models together."""
    flops: float
    """Floating-point operations of those passes."""


def read_subject(job: PlanJob) -> Subject:
    """Reads the config alone.

    Raises:
      ModelError: it is not that of a supported model.
      UsageError: none of the attacks has passes.
    """
    path = job.model / folder_files.CONFIG if job.model.is_dir() else job.model
    config = folder_files.read_config_file(path)
    family = read_config(config, str(path))
    dtype = "bfloat16" if job.settings.dtype == "auto" else job.settings.dtype
    model = build_model(family, family.mask_id or 0, jnp.dtype(dtype))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))  # starts no backend
    length = job.settings.max_length
    sizes, passes, flops = set(), 0, 0.0
    seen = set()
    for attack in attacks.select(job.attacks):
        for query in flatten(attack.queries(job.settings)):
            if not isinstance(query.reads, Probes) or (query.view_name, query.identity) in seen:
                continue
            seen.add((query.view_name, query.identity))
            each = losses.slot_sizes(query.reads.slot_bounds(length), length)
            roles = len(query.roles)
            sizes |= set(each.tolist())
            passes += roles * len(each)
            flops += roles * sum(model.flops_per_text(length, float(n)) for n in each)
    if not sizes:
        raise UsageError(f"attacks {','.join(job.attacks)}: none of them has passes to plan")
    return Subject(config, str(path), model, shapes, tuple(sorted(sizes)), passes, flops)


class Case(NamedTuple):
    """A job on one mesh of its topology."""

    job: PlanJob
    topology: Topology
    subject: Subject
    mesh: tuple[int, int]
    """Devices along `data` and `model`."""
    one: int
    """Bytes of one model's parameters on a device."""

    def shape(self, rows: int) -> memory.BatchShape:
        """Describes what a device works on that has `rows` rows of its own."""
        length, slots = self.job.settings.max_length, self.subject.slots[-1]
        platform = self.topology.platform
        return memory.BatchShape(rows, length, slots, parts=self.mesh[1], platform=platform)

    def closed_form(self, rows: int) -> memory.Footprint:
        """Returns what a device keeps, by the closed form."""
        model, parameters = self.subject.model, self.job.models * self.one
        return memory.footprint(model.arch, model.dtype, self.shape(rows), parameters)

    def largest_rows(self) -> int:
        """Returns the most rows that fit, by the closed form."""
        model, parameters = self.subject.model, self.job.models * self.one
        capacity = self.topology.memory
        return memory.largest_rows(model.arch, model.dtype, self.shape(0), parameters, capacity)

    def request(self, rows: int) -> compile_ahead.Request:
        """Returns what the compiler is asked."""
        return compile_ahead.Request(
            self.subject.config,
            self.subject.where,
            str(self.subject.model.dtype),
            self.topology.platform,
            self.topology.name,
            self.topology.options,
            self.mesh,
            rows,
            self.job.settings.max_length,
            self.subject.slots,
        )


def run_plan(job: PlanJob) -> dict[str, Any]:
    """Plans a job; the result is what `--json` writes.

    Raises:
      SamaError: wrong flags, a config that cannot be read, or a model that does not fit.
    """
    topology, subject = read_topology(job.topology), read_subject(job)
    if job.rows is not None and job.rows < 1:
        raise UsageError("--rows must be at least 1")
    if job.mesh:
        case = make_case(job, topology, subject, read_mesh(job.mesh, topology.chips))
    else:
        case = propose_case(job, topology, subject)
    if topology.platform == "tpu" and not (find_spec("libtpu") or os.getenv("TPU_LIBRARY_PATH")):
        raise UsageError(
            f"--topology {topology.name} needs the TPU compiler: pip install 'sama-jax[tpu]' "
            "(a CPU-only machine will do, no TPU is used); --topology cpu:8 goes without"
        )
    length = job.settings.max_length
    rows = job.rows or rows_a_device(length, ACCELERATOR_TOKENS, case.largest_rows())
    return _result(case, *compile_what_fits(case, rows, Terminal(quiet=job.quiet)))


def compile_what_fits(case: Case, rows: int, terminal: Terminal) -> tuple[int, Compiled]:
    """Compiles, with half as many rows until they fit, unless the job has fixed their number.

    Returns:
      the rows, and what the compiler says of them.
    """
    while True:
        terminal.say(
            f"compiling for {case.topology.name}, {_mesh_name(case.mesh)}, {rows} texts of "
            f"{case.job.settings.max_length} tokens; this may take a minute"
        )
        compiled = compile_ahead.run(
            case.request(rows), lambda seconds: terminal.say(f"compiling: {seconds:.0f} s")
        )
        if compiled.fits or case.job.rows is not None or rows == 1:
            return rows, compiled
        terminal.say(f"{rows} texts do not fit; trying {rows // 2}")
        rows //= 2


def make_case(job: PlanJob, topology: Topology, subject: Subject, mesh: tuple[int, int]) -> Case:
    """Returns the job on a mesh. Raises `UsageError` if it cannot split the parameters."""
    abstract = AbstractMesh(mesh, AXES, axis_types=(AxisType.Auto,) * 2)
    arch, dtype = subject.model.arch, subject.model.dtype
    shardings = parameter_shardings(abstract, subject.shapes, arch)
    one = memory.parameter_bytes(subject.shapes, dtype, shardings)
    return Case(job, topology, subject, mesh, one)


def propose_case(job: PlanJob, topology: Topology, subject: Subject) -> Case:
    """Proposes the mesh with the fewest parts of the model that fits by the closed form.

    Fewer parts mean fewer collectives. With as many texts as an audit takes, if there is such a
    mesh, else with one. Raises `UsageError` where none fits.
    """
    chips, cases = topology.chips, []
    for parts in (n for n in range(1, chips + 1) if chips % n == 0):
        # Heads or widths that this does not divide:
        with contextlib.suppress(UsageError):
            cases.append(make_case(job, topology, subject, (chips // parts, parts)))
    usual = usual_rows(job.settings.max_length, ACCELERATOR_TOKENS)
    for rows in (job.rows or usual, 1):
        for case in cases:
            if memory.fits(case.closed_form(rows), topology.memory):
                return case
    least = min(case.closed_form(1).total for case in cases)
    whole = memory.parameter_bytes(subject.shapes, subject.model.dtype)
    raise UsageError(
        f"{subject.where}: {job.models} x {binary_size(whole)} of parameters do not fit "
        f"{topology.name}, {chips} x {binary_size(topology.memory)}, however they are split (at "
        f"best {binary_size(least)} a chip); take more chips, or --models in-turn"
    )


def read_mesh(text: str, chips: int) -> tuple[int, int]:
    """Reads the sizes of `data` and `model`. Raises `UsageError`, also if a chip is left over."""
    sizes = mesh_sizes(text)
    if math.prod(sizes) != chips:
        raise UsageError(
            f"mesh {text!r}: uses {math.prod(sizes)} chips, the topology has {chips}; "
            "data times model must be equal to that"
        )
    return sizes


def _mesh_name(mesh: tuple[int, int]) -> str:
    return f"data={mesh[0]},model={mesh[1]}"


# --- what it says --------------------------------------------------------------------------------


def _result(case: Case, rows: int, compiled: Compiled) -> dict[str, Any]:
    """Returns the JSON object; bytes are those of one device."""
    job, topology, subject, mesh = case[:4]
    flops = job.texts * subject.flops
    peak = topology.flops and topology.flops * topology.chips * job.utilisation
    length = job.settings.max_length
    return {
        "model": subject.where,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(subject.shapes)),
        "dtype": str(subject.model.dtype),
        "models_resident": job.models,
        "topology": topology.name,
        "chips": topology.chips,
        "chip_bytes": topology.memory,
        "mesh": dict(zip(AXES, mesh)),
        "rows": rows,
        "max_length": length,
        "slots": list(subject.slots),
        **_memory(case, rows, compiled),
        "largest_rows": case.largest_rows(),
        "full_logits_bytes": memory.full_logits_bytes(
            subject.model.vocab_size, rows, length, mesh[1]
        ),
        "collectives": {kind: found._asdict() for kind, found in compiled.collectives.items()},
        "texts": job.texts,
        "passes": job.texts * subject.passes,
        "flops": flops,
        "utilisation": job.utilisation,
        "seconds": None if peak is None else flops / peak,
        "compile_seconds": round(compiled.compile_seconds, 1),
        "versions": compile_ahead.versions(),
    }


def _memory(case: Case, rows: int, compiled: Compiled) -> dict[str, Any]:
    """Returns bytes by the compiler, or by the closed form if nothing was compiled, and whether
    they fit."""
    closed = case.closed_form(rows)
    arguments, temporaries = closed.parameters + closed.inputs, None
    if compiled.fits:
        # Target and reference share the program, which takes the parameters of one of them.
        arguments = (case.job.models - 1) * case.one + compiled.arguments_bytes
        temporaries = compiled.temporaries_bytes + compiled.output_bytes
    total = arguments + (closed.temporaries.peak if temporaries is None else temporaries)
    return {
        "arguments_bytes": arguments,
        "temporaries_bytes": temporaries,
        "total_bytes": total,
        "fits": compiled.fits and total <= case.topology.memory,
        "closed_form": {
            "arguments_bytes": closed.parameters + closed.inputs,
            "temporaries_bytes": closed.temporaries.peak,
            "total_bytes": closed.total,
            **{f"{name}_bytes": n for name, n in closed.temporaries._asdict().items()},
        },
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Writes a result for people."""
    closed, mesh = found["closed_form"], found["mesh"]
    chip, parts = found["chip_bytes"], mesh["model"]
    both = "target and reference" if found["models_resident"] == 2 else "one model at a time"
    where = "a chip" if parts == 1 else f"{parts} chips"
    chips = "1 chip" if found["chips"] == 1 else f"{found['chips']} chips"
    rows = [
        f"{found['model']}: {found['parameters']:,} parameters in {found['dtype']}, {both}",
        f"{found['topology']}: {chips} of {binary_size(chip)}, "
        f"mesh {_mesh_name((mesh['data'], parts))}",
        f"{found['rows']} texts of {found['max_length']} tokens at once on {where}; compiled in "
        f"{found['compile_seconds']:.0f} s",
        "",
        f"{'memory of a chip':<34}{'compiled':>12}{'closed form':>14}",
    ]
    for name, key in (
        ("parameters and inputs", "arguments_bytes"),
        ("on the way (temporaries)", "temporaries_bytes"),
        ("together", "total_bytes"),
    ):
        shown = "does not fit" if found[key] is None else binary_size(found[key])
        rows.append(f"  {name:<32}{shown:>12}{binary_size(closed[key]):>14}")
    full = found["full_logits_bytes"]
    rows += [
        f"  full logits would add{binary_size(full):>37}",
        "",
        ("fits" if found["fits"] else "does not fit")
        + f": {binary_size(found['total_bytes'])} of {binary_size(chip)} a chip; at most "
        f"{found['largest_rows']} texts at once on {where} by the closed form",
    ]
    for kind, traffic in found["collectives"].items():
        rows.append(f"{kind}: {traffic['count']} a pass, {binary_size(traffic['bytes'])} a chip")
    rows.append(
        f"{found['texts']:,} texts: {found['passes']:,} passes, {found['flops'] / 1e15:,.3g} PFLOP"
        + _time(found)
    )
    return rows


def _time(found: dict[str, Any]) -> str:
    if found["seconds"] is None:
        return ""
    return f", {duration(found['seconds'])} at {found['utilisation']:.0%} of the chips' peak"
