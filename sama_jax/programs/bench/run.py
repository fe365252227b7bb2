"""The benchmark: what scoring costs on this machine, and against plain PyTorch.

Each framework runs in a process of its own on the same token ids with the same number of threads,
round by round in turn. What is timed is a whole audit with SAMA but for reading texts, loading
weights and the report: plans, both models' passes, the loss store, votes, scores. The reference is
the target with its final norm scaled, so that votes have something to decide.
"""

import importlib.metadata
import platform
import re
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from sama_jax.errors import ModelError, UsageError
from sama_jax.programs.bench import summary
from sama_jax.programs.bench.side import Agreement, Loaded, Round, Side
from sama_jax.programs.bench.summary import Measured
from sama_jax.programs.bench.tokens import encode
from sama_jax.programs.jobs import BenchJob
from sama_jax.terminal import Terminal, duration
from sama_jax.weights.model_folder import ModelFolder, open_folder

JAX, TORCH = (f"sama_jax.programs.bench.{name}" for name in ("jax_side", "torch_side"))
TOLERANCE = 1e-3
"""Largest difference of the frameworks' losses, nats; float32 rounding is some 1e-5."""


def run_bench(job: BenchJob) -> dict[str, Any]:
    """Returns one JSON object: see docs/performance.md. Starts no JAX backend in this process.

    Raises:
      UsageError: PyTorch is asked for where it cannot be compared.
      ModelError: the two frameworks do not compute the same.
      OutOfMemory, Crashed: the process of a framework ended.
    """
    terminal, start = Terminal(quiet=job.quiet), time.monotonic()
    folder = open_folder(job.model, dtype="float32", longest=job.settings.max_length)
    if job.torch and (folder.config.get("model_type") != "llada" or folder.quantised):
        raise UsageError(
            f"{job.model}: the PyTorch form is written for dense LLaDA only, not quantised"
        )
    ids = encode(job, folder)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours, theirs = stack.enter_context(Side("jax", JAX, job, ids, scratch)), None
        loaded = ours.load()
        if job.torch:
            require_comparable(loaded)
            theirs = stack.enter_context(Side("torch", TORCH, job, ids, scratch))
            theirs.load()
        found = measure(job, ours, theirs, terminal)
    result = _describe(job, folder, ids, loaded) | summary.to_json(found, len(ids))
    if job.torch:
        result["torch"]["version"] = importlib.metadata.version("torch")
    result["bench_seconds"] = time.monotonic() - start
    return result


def require_comparable(loaded: Loaded) -> None:
    """Raises `UsageError` unless our side is a CPU in float32, where PyTorch's has been checked."""
    if (loaded.platform, loaded.dtype) != ("cpu", "float32"):
        raise UsageError(
            f"--against torch: expected a CPU and float32, found {loaded.platform} and "
            f"{loaded.dtype}; set JAX_PLATFORMS=cpu and give --dtype float32"
        )


def measure(job: BenchJob, ours: Side, theirs: Side | None, terminal: Terminal) -> Measured:
    """Runs the rounds of both sides in turn, products after each."""
    cold, agreement = ours.round(), None
    terminal.say(f"first round, with compiling: {cold.seconds:.1f} s")
    if theirs is not None:
        ours.write_plan()
        agreement = _require_agreement(theirs.check())
        terminal.say(
            "PyTorch computes the same: largest difference of a loss "
            f"{agreement.largest_loss_difference:.1e} nats"
        )
    rounds: dict[str, list[Round]] = {"jax": [], "torch": []}
    products: list[dict[str, float]] = []
    begin = time.monotonic()
    for number in range(job.rounds):
        title = f"round {number + 1} of {job.rounds}"
        for side in [ours] if theirs is None else [ours, theirs]:
            rounds[side.name].append(side.round())
            terminal.say(f"{title}, {side.name}: {rounds[side.name][-1].seconds:.1f} s")
        begun = time.monotonic()
        products.append(ours.products())
        terminal.say(f"{title}, products: {time.monotonic() - begun:.1f} s")
        if number == 0:
            terminal.say(f"about {duration((time.monotonic() - begin) * (job.rounds - 1))} left")
    end, torch_end = ours.end(), theirs and theirs.end()
    return Measured(cold, rounds["jax"], products, end, agreement, rounds["torch"], torch_end)


def _require_agreement(found: Agreement) -> Agreement:
    if not found.largest_loss_difference <= TOLERANCE:  # also where it is NaN
        raise ModelError(
            "JAX and PyTorch do not compute the same: largest difference of a loss "
            f"{found.largest_loss_difference:.2e} nats, expected at most {TOLERANCE}"
        )
    return found


def _describe(
    job: BenchJob, folder: ModelFolder, ids: list[np.ndarray], loaded: Loaded
) -> dict[str, Any]:
    """Says what was measured, and where."""
    model, lengths = folder.model, [len(t) for t in ids]
    full = sum(model.flops_per_text(n, float(n)) for n in lengths)
    head = 2.0 * model.arch.width * model.vocab_size
    return {
        "preset": job.settings.preset_label,
        "model": {
            "layers": model.num_layers,
            "width": model.arch.width,
            "vocabulary": model.vocab_size,
            "parameters": folder.num_params,
            "dtype": loaded.dtype,
            "attention": loaded.attention,
            "head_share_of_full_pass": head * sum(lengths) / full,
        },
        "texts": len(ids),
        "tokens_a_text": statistics.mean(lengths),
        "max_length": job.settings.max_length,
        "passes": job.settings.sama.passes,
        "machine": _machine() | {"device": loaded.device},
        "threads": loaded.threads,
        "rounds": job.rounds,
    }


def _machine() -> dict[str, str]:
    """This machine's processor, and the versions that decide about speed."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    found = {"cpu": model, "python": platform.python_version()}
    return found | {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax")}
