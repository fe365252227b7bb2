"""Compares finished audits of the same texts, and audits the checkpoints of a training one by one.

The checkpoints share one loss store, so the reference is read once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sama_jax.errors import ModelError, UsageError, ValidityError
from sama_jax.programs.audit import run_audit
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting import comparison
from sama_jax.reporting.comparison import Finished, Line
from sama_jax.reporting.report import read_finished
from sama_jax.reporting.results import metrics_of
from sama_jax.storage.files import MADE_BY, require_free, write_atomic, write_json
from sama_jax.terminal import console

NUMBERS, PAGE, STORE = "comparison.json", "comparison.html", "losses"
_MADE_BY = "sama-jax compare"
_MODEL, _ADAPTER = "config.json", "adapter_config.json"


class Watched(NamedTuple):
    """What a watch found."""

    lines: list[Line]
    """The comparison; empty for a dry run, or where fewer than two checkpoints have a result."""
    failed: dict[str, ModelError | ValidityError]
    """Checkpoint -> why its audit is void, or was not made."""
    without: dict[str, str]
    """Those of them that have no scores -> the same in words."""


def compare_runs(
    folders: Sequence[Path],
    out: Path | None = None,
    without: Mapping[str, str] = MappingProxyType({}),
) -> list[Line]:
    """Compares finished runs with the first one.

    Args:
      folders: of the runs; their last parts that tell them apart are their names.
      out: folder for comparison.json and comparison.html; None: nothing is written.
      without: what would have been a run -> why it is none; the comparison says so.

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
        content = {MADE_BY: _MADE_BY, "note": comparison.NOTE, "runs": lines}
        write_json(out / NUMBERS, content | {"without_result": dict(without)})
        write_atomic(out / PAGE, comparison.page(lines, without))
    return lines


def require_sound(lines: Sequence[Line]) -> None:
    """Raises `ValidityError` if a run of a comparison is void."""
    void = [line["name"] for line in lines if line["void"]]
    if void:
        raise ValidityError(f"void: {', '.join(void)}; their numbers mean nothing")


def require_all(failed: Mapping[str, ModelError | ValidityError]) -> None:
    """Raises an error that names the checkpoints whose audit is void, or was not made.

    `ValidityError` if any of them is void, else `ModelError`.
    """
    if not failed:
        return
    void = [error for error in failed.values() if isinstance(error, ValidityError)]
    name, error = next((n, e) for n, e in failed.items() if not void or e is void[0])
    count = "1 checkpoint has" if len(failed) == 1 else f"{len(failed)} checkpoints have"
    others = f" ({', '.join(failed)})" if len(failed) > 1 else ""
    raise type(error)(f"{count} no valid result{others}; {name}: {error}")


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
      UsageError: there are none, or one that cannot be told or named.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one that holds checkpoints")
    found = [p for p in folder.iterdir() if (p / _MODEL).is_file() or (p / _ADAPTER).is_file()]
    if not found:
        raise UsageError(
            f"{folder}: holds no folder with {_MODEL} or {_ADAPTER}; expected checkpoints such as "
            "checkpoint-500 (sama-jax finetune --snapshots N writes them)"
        )

    both = [p for p in found if (p / _MODEL).is_file() and (p / _ADAPTER).is_file()]
    if both:
        raise UsageError(
            f"{both[0]}: holds {_MODEL} and {_ADAPTER}, so it is a whole model or an adapter; "
            "move the one that it is not away"
        )
    if taken := {p.name for p in found} & {NUMBERS, PAGE, STORE}:
        raise UsageError(
            f"{folder / min(taken)}: a watch writes its own {min(taken)} beside the results of "
            "checkpoints; give this one another name"
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


def watch(job: AuditJob, checkpoints: Path) -> Watched:
    """Audits every checkpoint of a folder, or what of them is new, and compares the runs.

    Args:
      job: an audit; its target and adapter are replaced. Its `out` gets a folder for each
        checkpoint, their common loss store, and the comparison.
      checkpoints: folder of model folders or adapters.

    Raises what `run_audit` and `compare_runs` raise, but goes on behind a void audit and a model
    that cannot be read, such as one that is just being written; `require_all` raises these.
    """
    say, outs, failed = console(job.quiet), list[Path](), dict[str, ModelError | ValidityError]()
    found = checkpoints_of(checkpoints)
    for number, path in enumerate(found, 1):
        say.print(f"checkpoint {number} of {len(found)}: {path.name}")
        models: dict[str, Any] = {"target": path, "adapter": None}
        if not (path / _MODEL).is_file():
            models = {"target": _base(job), "adapter": path}
        own_flags = {k: v for k, v in job.flags.items() if k not in ("target", "adapter", "store")}
        own_flags |= {k: str(v.resolve()) for k, v in models.items() if v is not None}
        store = job.store or job.out / STORE
        own = replace(job, **models, out=job.out / path.name, store=store, flags=own_flags)
        try:
            run_audit(own)
        except (ModelError, ValidityError) as error:
            failed[path.name] = error
            say.print(f"{'void' if isinstance(error, ValidityError) else 'not audited'}: {error}")
        if (own.out / "scores.jsonl").is_file():
            outs.append(own.out)
    made = {out.name for out in outs}
    without = {name: str(error) for name, error in failed.items() if name not in made}
    if job.dry_run or len(outs) < 2:
        return Watched([], failed, without)
    return Watched(compare_runs(outs, job.out, without), failed, without)
