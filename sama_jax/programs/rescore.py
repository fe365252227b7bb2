"""New scores from an old store: no model, no text, no forward pass.

An audit leaves its losses and an index of what its plans derive from. A statistic that reads what
is stored gives here, bit for bit, what a full run would have given.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from sama_jax import attacks as attack_suite
from sama_jax.attacks.code import codes
from sama_jax.attacks.references import References, obstacle
from sama_jax.attacks.registry import Attack
from sama_jax.config import AuditSettings
from sama_jax.engine.evidence import gather_evidence
from sama_jax.engine.readings import Readings
from sama_jax.engine.scores import score_corpus, score_rows
from sama_jax.engine.tasks import SPANS, tasks_of
from sama_jax.engine.text_table import TextTable
from sama_jax.errors import DataError, UsageError
from sama_jax.programs.audit import AuditResult
from sama_jax.programs.audit_gates import loss_gates, require_valid, unit_of
from sama_jax.programs.audit_records import write_densities
from sama_jax.programs.stored import open_stored, store_of
from sama_jax.reporting import report, results
from sama_jax.storage.calibration_file import withdraw_stale
from sama_jax.storage.documents import WINDOWS
from sama_jax.storage.files import write_json
from sama_jax.storage.run_folder import METRICS, SCORES, RunFolder, read_rows
from sama_jax.storage.text_index import INDEX
from sama_jax.terminal import console
from sama_jax.validity.gate import voids, worst_of

_MADE = ("scores", "passes", "undefined", "votes")
"""Fields of a line of scores.jsonl that scoring makes; the others are kept."""


def run_score(store: Path, names: Sequence[str], *, quiet: bool = False) -> AuditResult:
    """Adds the scores of attacks to a finished audit, from its stored losses alone.

    Args:
      store: the audit's output folder, or the `losses` folder in it.
      names: attacks; of `all`, those whose losses are not stored are left out and listed.

    Raises:
      UsageError: an attack that was named needs passes that were never made.
      DataError: not the folder of a finished audit.
    """
    say = console(quiet)
    path, manifest, settings, rows, tables = open_stored(store)
    kept = _kept_rows(path, rows)
    store, options = store_of(path, manifest), {"computes": False, "codes": codes()}
    folder = RunFolder(path, manifest["run"], {}, store, **options)
    try:
        chosen, left_out = [], {}
        for attack in attack_suite.select(names):
            reason = _obstacle(attack, settings, tables, manifest, folder)
            if reason is None:
                chosen.append(attack)
            elif attack.name in names:
                raise UsageError(f"attack '{attack.name}' cannot be scored from {path}: {reason}")
            else:
                left_out[attack.name] = reason
        for name, reason in left_out.items():
            say.print(f"not computed: {name} ({reason})")
        readings = _readings(chosen, settings, tables, manifest, folder)
        ids = [row["id"] for row in rows]
        score_rows(readings, folder, ids, range(len(ids)))
        score_corpus(readings, folder, ids, None, None)
        _require_finished(path, folder, rows)
        joined = folder.join(kept, [a.name for a in chosen])
        found, labels = gather_evidence(readings), [row.get("label") for row in rows]
        asked = loss_gates(found, labels, unit_of(tables.get(SPANS.name)))
        gates = worst_of([manifest.get("gates") or [], asked])
        folder.write_manifest(gates=gates)
        metrics = results.metrics_of(joined, folder.manifest)
        write_json(path / METRICS, metrics)
        known = np.array([-1 if label is None else label for label in labels])
        write_densities(path, found, known)
        withdraw_stale(path, joined, void=bool(voids(metrics["validity"])))
        folder.write_manifest(finished=True)
        folder.log("scored", attacks=[a.name for a in chosen], passes_run=0)
        report.write_report(path, metrics=metrics)
        folder.record_files()
    finally:
        folder.close()
    say.print(f"{len(chosen)} attacks scored, 0 forward passes")
    require_valid(path, metrics["validity"])
    return AuditResult(joined, metrics, manifest.get("cost") or {}, path)


def _require_finished(path: Path, folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises `UsageError` unless the attacks of the audit itself are scored for every text.

    Those that read the texts are left out: a merge cannot compute them.
    """
    names = attack_suite.select(folder.manifest.get("attacks") or ["all"])
    own = [attack.name for attack in names if not attack.needs_texts]
    if lacking := folder.unscored(own, rows):
        raise UsageError(
            f"{path}: the audit is not finished: {', '.join(lacking[:5])} not scored for every "
            "text; run its own command again, which continues"
        )


def _kept_rows(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what scoring keeps of each line of scores.jsonl; without one, that of the index.

    Raises `DataError` if scores.jsonl is damaged: texts that stand in it would be lost.
    """
    name = WINDOWS if rows and "document" in rows[0] else SCORES
    if not (path / name).is_file():
        return rows
    before = cast(list[dict[str, Any]], read_rows(path, name))
    known = [{k: line[k] for k in row.keys() & line.keys()} for line, row in zip(before, rows)]
    if known != rows or len(before) != len(rows):
        raise DataError(
            f"{path / name}: does not hold the texts of {INDEX}; run the audit's own command "
            "again, which makes both anew"
        )
    return [{k: v for k, v in line.items() if k not in _MADE} for line in before]


def _obstacle(
    attack: Attack,
    settings: AuditSettings,
    tables: dict[str, TextTable],
    manifest: dict[str, Any],
    folder: RunFolder,
) -> str | None:
    """Says why an attack cannot be scored from the store; None if it can."""
    if attack.needs_texts:
        return "it reads the texts themselves"
    references = len(manifest["store_keys"]) - 1, bool(manifest["run"].get("reference_tokenizer"))
    if reason := obstacle(attack, settings, References(*references)):
        return reason
    if attack.name == "sama" and manifest["run"].get("plan"):
        return "the audit replayed a plan file"
    if attack.name in (known := manifest.get("not_computed") or {}):
        return known[attack.name]
    readings = _readings([attack], settings, tables, manifest, folder)
    text = tables["text"]
    # Where a view was never made, it is missing for all texts that can be read.
    made = all(task.view in tables for task in readings.tasks.all)
    scorable = readings.usable(attack) if made else text.readable
    rows = np.flatnonzero(scorable & text.readable).tolist()
    lacking = len(rows) - len(readings.ready(attack, rows))
    if not lacking:
        return None
    return (
        f"its passes were not made for {lacking} of {text.num_texts} texts; "
        f"run the audit with --attacks {attack.name} on the same --out"
    )


def _readings(
    attacks: Sequence[Attack],
    settings: AuditSettings,
    tables: dict[str, TextTable],
    manifest: dict[str, Any],
    folder: RunFolder,
) -> Readings:
    keys = manifest["store_keys"]
    own = bool(manifest["run"].get("reference_tokenizer"))
    tasks = tasks_of(attacks, settings, keys, own_tokenizer=own)
    return Readings(tasks, settings, tables, keys, folder.store)
