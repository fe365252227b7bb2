"""Tells whether a run is finished and nothing has changed since: then its folder is the answer."""

from typing import NamedTuple, cast

from sama_jax.attacks.code import codes
from sama_jax.errors import DataError
from sama_jax.programs.audit_inputs import Chosen, Inputs, Tokenised
from sama_jax.programs.audit_records import about, declared
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting.results import Metrics
from sama_jax.storage import checksums
from sama_jax.storage.run_folder import (
    CONFIG,
    MANIFEST,
    METRICS,
    Row,
    noted,
    read_manifest,
    read_rows,
)
from sama_jax.storage.yaml_file import read_yaml
from sama_jax.untrusted import read_json


class Finished(NamedTuple):
    """What a finished run has left."""

    rows: list[Row]
    metrics: Metrics
    cost: dict
    notes: list[str]


def finished_run(
    job: AuditJob, inputs: Inputs, chosen: Chosen, tokenised: Tokenised
) -> Finished | None:
    """Returns what the same command has left in the run's folder; None if anything differs.

    The same command of the same code on the same texts, models and machine; and every file of the
    folder is byte for byte what it wrote. Nothing is written.
    """
    manifest = read_manifest(job.out) or {}
    if job.peers.count > 1 or not job.command or manifest.get("finished") is not True:
        return None
    if job.save_plan or job.save_losses:  # files outside of the folder, which nobody recorded
        return None
    run, _ = declared(job, inputs, chosen, tokenised)
    names = [attack.name for attack in chosen.attacks]
    now = about(job, inputs) | {"run": run, "attacks": names, "not_computed": chosen.left_out}
    code, made = codes(), manifest.get("codes") or {}
    if any(manifest.get(name) != value for name, value in now.items()):
        return None
    if any(made.get(name) != code[name] for name in names) or not _same_flags(job):
        return None
    if not manifest.get("files") or checksums.changed(job.out, read_json(job.out / MANIFEST)):
        return None
    metrics = cast(Metrics, read_json(job.out / METRICS))
    return Finished(read_rows(job.out), metrics, manifest.get("cost") or {}, noted(job.out))


def _same_flags(job: AuditJob) -> bool:
    """Tells whether a config file that the command names says what it said."""
    try:
        return read_yaml(job.out / CONFIG) == dict(job.flags)
    except DataError:
        return False
