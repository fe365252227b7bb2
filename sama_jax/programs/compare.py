"""Compares finished audits of the same texts, and audits the checkpoints of a training one by one.

The checkpoints share one loss store, so the reference is read once.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sama_jax.errors import UsageError, ValidityError
from sama_jax.programs.audit import run_audit
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting import comparison
from sama_jax.reporting.comparison import Finished, Line
from sama_jax.reporting.report import read_finished
from sama_jax.reporting.results import metrics_of
from sama_jax.storage.files import MADE_BY, require_free, write_atomic, write_json
from sama_jax.terminal import console

NUMBERS, PAGE = "comparison.json", "comparison.html"
_MADE_BY = "sama-jax compare"
_MODEL, _ADAPTER = "config.json", "adapter_config.json"


def compare_runs(folders: Sequence[Path], out: Path | None = None) -> list[Line]:
    """Compares finished runs with the first one.

    Args:
      folders: of the runs; their last parts that tell them apart are their names.
      out: folder for comparison.json and comparison.html; None: nothing is written.

    Raises:
      UsageError: a folder is no finished run, or runs are not of the same texts.
      ValidityError: a run is void; what was compared is written all the same.
    """
    runs = []
    for name, folder in zip(_names(folders), folders):
        rows, manifest = read_finished(folder)
        runs.append(Finished(name, rows, manifest, metrics_of(rows, manifest)))
    lines = comparison.compare(runs)
    if out is not None:
        require_free(out / NUMBERS, _MADE_BY)
        write_json(out / NUMBERS, {MADE_BY: _MADE_BY, "note": comparison.NOTE, "runs": lines})
        write_atomic(out / PAGE, comparison.page(lines))
    return lines


def require_sound(lines: Sequence[Line]) -> None:
    """Raises `ValidityError` if a run of a comparison is void."""
    void = [line["name"] for line in lines if line["void"]]
    if void:
        raise ValidityError(f"void: {', '.join(void)}; their numbers mean nothing")


def _names(folders: Sequence[Path]) -> list[str]:
    """Names runs by the last parts of their paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UsageError("a run is given twice; a comparison is of different runs")
    longest = max(map(len, parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


def checkpoints_of(folder: Path) -> list[Path]:
    """Returns the model folders and adapters directly below a folder, numbers in their order.

    Raises:
      UsageError: there are none.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one that holds checkpoints")
    found = [p for p in folder.iterdir() if (p / _MODEL).is_file() or (p / _ADAPTER).is_file()]
    if not found:
        raise UsageError(
            f"{folder}: holds no folder with {_MODEL} or {_ADAPTER}; expected checkpoints such as "
            "checkpoint-500 (sama-jax finetune --snapshots N writes them)"
        )

    def order(path: Path) -> list[Any]:
        words = re.split(r"(\d+)", path.name)
        return [(int(word), "") if word.isdigit() else (-1, word) for word in words]

    return sorted(found, key=order)


def first_model(checkpoints: Path) -> Path | None:
    """Returns the first checkpoint that is a model folder; None if all are adapters."""
    found = checkpoints_of(checkpoints)
    return next((path for path in found if (path / _MODEL).is_file()), None)


def _base(job: AuditJob) -> Path:
    """Returns what checkpoints that are adapters are put on. Raises `UsageError`."""
    if len(job.references) != 1:
        raise UsageError(
            f"{len(job.references)} references are given; checkpoints that are adapters need one, "
            "their base"
        )
    return job.references[0]


def watch(job: AuditJob, checkpoints: Path) -> list[Line]:
    """Audits every checkpoint of a folder, or what of them is new, and compares the runs.

    Args:
      job: an audit; its target and adapter are replaced. Its `out` gets a folder for each
        checkpoint, their common loss store, and the comparison.
      checkpoints: folder of model folders or adapters.

    Returns:
      the comparison; empty for a dry run, or where fewer than two checkpoints have a result.

    Raises what `run_audit` and `compare_runs` raise, but goes on behind a void audit.
    """
    say, outs = console(job.quiet), list[Path]()
    found = checkpoints_of(checkpoints)
    for number, path in enumerate(found, 1):
        say.print(f"checkpoint {number} of {len(found)}: {path.name}")
        models: dict[str, Any] = {"target": path, "adapter": None}
        if not (path / _MODEL).is_file():
            models = {"target": _base(job), "adapter": path}
        own_flags = {k: v for k, v in job.flags.items() if k not in ("target", "adapter", "store")}
        own_flags |= {k: str(v.resolve()) for k, v in models.items() if v is not None}
        store = job.store or job.out / "losses"
        own = replace(job, **models, out=job.out / path.name, store=store, flags=own_flags)
        try:
            run_audit(own)
        except ValidityError as error:
            say.print(f"void: {error}")
        if (own.out / "scores.jsonl").is_file():
            outs.append(own.out)
    if job.dry_run or len(outs) < 2:
        return []
    return compare_runs(outs, job.out)
