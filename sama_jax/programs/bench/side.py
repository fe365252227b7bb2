"""One framework in a process of its own: what it is told, asked, and answers.

The processes share nothing but a scratch folder with the tokens and, for the comparison of the
frameworks, the masks.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sama_jax.config import AuditSettings, from_dict
from sama_jax.devices.child_process import Child, serve
from sama_jax.programs.jobs import BenchJob

SCALE = 0.9
"""Factor on the final norm of the target, which makes the reference: its predictions are softer, as
those of a model that has not seen the texts."""
PLAN = "plan.npz"
"""File in the scratch folder: masks, subsets, losses and scores of the first texts."""
_TOKENS = "tokens.npy"


class Task(NamedTuple):
    """What a side is told before it is asked anything."""

    model: Path
    scratch: Path
    settings: AuditSettings
    batch_size: int | None
    compile_cache: Path | None

    @classmethod
    def of_json(cls, told: dict[str, Any]) -> "Task":
        """Returns the task that `to_json` wrote."""
        settings, cache = from_dict(AuditSettings, told["settings"]), told["compile_cache"]
        model, scratch = Path(told["model"]), Path(told["scratch"])
        return cls(model, scratch, settings, told["batch_size"], cache and Path(cache))

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "model": str(self.model),
            "scratch": str(self.scratch),
            "settings": asdict(self.settings),
            "batch_size": self.batch_size,
            "compile_cache": self.compile_cache and str(self.compile_cache),
        }

    def tokens(self) -> list[Int[np.ndarray, " n"]]:
        """Returns the token ids of the texts."""
        return [row[row >= 0] for row in np.load(self.scratch / _TOKENS)]


class Loaded(NamedTuple):
    """How a side computes, once its models are loaded."""

    threads: int
    device: str
    platform: str
    dtype: str
    attention: str


class Round(NamedTuple):
    """What one audit of all texts took, in seconds. PyTorch's side leaves out what it has not."""

    seconds: float
    cpu_seconds: float
    """Sum over all threads."""
    vote_seconds: float = 0.0
    compile_seconds: float = 0.0
    host_seconds: float = 0.0
    """While nothing was handed to the device."""
    padding: float = 0.0
    """Share of the tokens, not seconds."""


class End(NamedTuple):
    """What a side knows after all rounds. PyTorch's side says the memory alone."""

    peak_memory_bytes: int | None
    """Above the loaded weights; None where the system does not say."""
    flops: float = 0.0
    """Floating-point operations that one round needs, without padding."""
    head_flops: float = 0.0
    """Those of the vocabulary head among them."""
    vote_seconds: float = 0.0
    programs: int = 0


class Agreement(NamedTuple):
    """How far the two frameworks are apart under the same masks and subsets."""

    texts: int
    largest_loss_difference: float
    """In nats."""
    largest_score_difference: float


class Side:
    """Asks a process that runs one framework. A context manager, which ends it."""

    def __init__(self, name: str, module: str, job: BenchJob, ids: list[np.ndarray], scratch: Path):
        self.name = name
        tokens = np.full((len(ids), max(map(len, ids))), -1, np.int32)
        for row, text in zip(tokens, ids):
            row[: len(text)] = text
        np.save(scratch / _TOKENS, tokens)
        self._child = Child(
            name,
            module,
            # Else three quarters of a GPU's memory would be in use from the start.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
            advice="give a smaller --limit or --batch-size",
        )
        task = Task(job.model, scratch, job.settings, job.batch_size, job.compile_cache)
        self._told = task.to_json()

    def __enter__(self) -> "Side":
        try:
            self._child.ask(self._told)
        except BaseException:  # a `with` statement calls `__exit__` only after `__enter__`
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()

    def load(self) -> Loaded:
        """Loads the models."""
        return Loaded(**self._child.ask("load"))

    def round(self) -> Round:
        """Runs one audit of all texts."""
        return Round(**self._child.ask("round"))

    def write_plan(self) -> None:
        """Writes `PLAN`, for the other side's `check`."""
        self._child.ask("write_plan")

    def check(self) -> Agreement:
        """Computes losses and scores under the masks and subsets of `PLAN`."""
        return Agreement(**self._child.ask("check"))

    def products(self) -> dict[str, float]:
        """Measures matrix products: floating-point operations a second by shape."""
        return self._child.ask("products")

    def end(self) -> End:
        """Returns what is known after all rounds."""
        return End(**self._child.ask("end"))


def run_side(make: Callable[[Task], Any]) -> None:
    """Answers a `Side` in its process: `make` returns an object that has its methods."""
    made: list[Any] = []

    def answer(question: Any) -> Any:
        if not made:
            made.append(make(Task.of_json(question)))
            return None
        found = getattr(made[0], question)()  # the method that the question names
        return found._asdict() if hasattr(found, "_asdict") else found

    serve(answer)


def cores() -> int:
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
