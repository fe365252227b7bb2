"""Finds out which of several processes this is, of how many, and where they meet.

Standard library only.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sama_jax.errors import UsageError

MOST_PROCESSES = 10_000
"""Each is a connection and two threads of process 0."""


class Place(NamedTuple):
    """Which process this is, of how many, and where they meet."""

    coordinator: str
    """HOST:PORT of process 0."""
    count: int
    rank: int


def whole_number(text: str) -> int | None:
    """Reads a number of at most nine digits; None for any other text, such as "²" or "-1"."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def given_place(coordinator: str | None, count: int | None, rank: int | None) -> Place | None:
    """Returns the place that the flags give; None if there are none. Raises `UsageError`."""
    if coordinator is None and count is None and rank is None:
        return None
    if coordinator is None or count is None or rank is None:
        raise UsageError("--coordinator, --num-processes and --process-id belong together")
    host, _, port = coordinator.rpartition(":")
    if not host or not 0 < (whole_number(port) or 0) < 65536:
        raise UsageError(f"--coordinator {coordinator}: expected HOST:PORT")
    if not 0 < count <= MOST_PROCESSES:
        raise UsageError(f"--num-processes {count}: expected 1 to {MOST_PROCESSES}")
    if not 0 <= rank < count:
        raise UsageError(f"--process-id {rank}: expected 0 to {count - 1} for --num-processes")
    return Place(coordinator, count, rank)


def found_place(env: Mapping[str, str], metadata: Callable[[str], str] | None = None) -> Place:
    """Finds the place in the environment: Slurm (one task a node), or a Cloud TPU slice.

    A TPU slice is known by the variables that GKE sets, else by the metadata of the virtual machine
    (the two attributes that JAX's own detection reads).

    Raises:
      UsageError: it is neither.
    """
    if "SLURM_PROCID" in env and "SLURM_JOB_ID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
        tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "")
        found = [whole_number(text) for text in (env["SLURM_JOB_ID"], tasks, env["SLURM_PROCID"])]
        job, count, rank = found
        if match is None or job is None or count is None or rank is None or rank >= count:
            raise UsageError(
                "--distributed: cannot read Slurm's job, node list, number of tasks and number of "
                f"this task: found {nodes!r} and {found}"
            )
        return Place(f"{match[1]}{match[2] or ''}:{20000 + job % 10000}", count, rank)
    with contextlib.suppress(OSError, ValueError, IndexError):
        if "TPU_WORKER_HOSTNAMES" in env:
            hosts, rank = env["TPU_WORKER_HOSTNAMES"].split(","), int(env["TPU_WORKER_ID"])
        else:
            read = metadata or _metadata
            hosts = [w.split(":")[2] for w in read("worker-network-endpoints").split(",")]
            rank = int(read("agent-worker-number"))
        if 0 <= rank < len(hosts):
            return Place(f"{hosts[0]}:8479", len(hosts), rank)
    raise UsageError(
        "--distributed: neither Slurm nor a Cloud TPU slice is found here; give --coordinator "
        "HOST:PORT, --num-processes N and --process-id I"
    )


def _metadata(attribute: str) -> str:
    import urllib.request  # 30 ms, which only a Cloud TPU slice has to wait for

    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{attribute}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read(1 << 20).decode()
