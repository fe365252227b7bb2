"""How time, memory and operations grow with the number of texts, their length and the passes."""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sama_jax.errors import DataError
from sama_jax.programs.bench.run import JAX
from sama_jax.programs.bench.side import Side
from sama_jax.programs.bench.tokens import encode
from sama_jax.programs.jobs import BenchJob
from sama_jax.terminal import Terminal
from sama_jax.weights.model_folder import ModelFolder, open_folder

AXES = {"texts": (100, 200, 400), "length": (64, 128, 256, 512), "passes": (4, 8, 16)}
"""Values of what grows; the other two have those of `FIXED` meanwhile."""
FIXED = {"texts": 100, "length": 128, "passes": 4}


def run_growth(job: BenchJob) -> list[dict[str, Any]]:
    """Returns one dict a point: `axis`, the three values, `seconds`, `flops`, `peak_memory_bytes`.

    Raises:
      DataError: the texts make too few windows.
    """
    terminal = Terminal(quiet=job.quiet)
    folder = open_folder(job.model, dtype="float32")
    points = []
    for axis, values in AXES.items():
        for value in values:
            point = {"axis": axis, **_measure(job, folder, FIXED | {axis: value})}
            points.append(point)
            memory = point["peak_memory_bytes"]
            terminal.say(
                f"{point['texts']} texts of {point['length']} tokens, {point['passes']} passes: "
                f"{point['seconds']:.2f} s, {point['flops'] / point['seconds'] / 1e9:.0f} GFLOP/s"
                + ("" if memory is None else f", {memory / 2**20:.0f} MiB")
            )
    return points


def _measure(job: BenchJob, folder: ModelFolder, at: dict[str, int]) -> dict[str, Any]:
    """Measures one point, the median over the rounds."""
    given = job.settings
    sama = replace(given.sama, steps=at["passes"])
    settings = replace(given, sama=sama, max_length=at["length"])
    job = replace(
        job, settings=settings, windows=True, limit=at["texts"], torch=False, compile_cache=None
    )
    ids = encode(job, folder)
    if len(ids) < at["texts"]:
        raise DataError(
            f"the texts make {len(ids)} windows of {at['length']} tokens, expected {at['texts']}: "
            "give --data more of them"
        )
    with (
        tempfile.TemporaryDirectory() as scratch,
        Side("jax", JAX, job, ids, Path(scratch)) as side,
    ):
        side.load()
        side.round()
        seconds = statistics.median(side.round().seconds for _ in range(job.rounds))
        end = side.end()
    return {
        **at,
        "seconds": seconds,
        "flops": end.flops,
        "peak_memory_bytes": end.peak_memory_bytes,
    }
