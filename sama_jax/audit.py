"""The audit: texts and two model folders in, a folder of scores and a report out.

Batches are independent and their results are appended as they are made, so a run can be cut off
at any moment and continued by the same command.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sama_jax import attacks as attack_suite
from sama_jax import data, model_folder, replay, report, scoring
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.errors import Interrupted, UsageError, ValidityError
from sama_jax.files import write_json
from sama_jax.progress import console
from sama_jax.run_folder import METRICS, RunFolder
from sama_jax.types import ProbePlan


@dataclass(frozen=True, kw_only=True)
class AuditJob:
    """What to audit, and where the results go."""

    target: Path
    reference: Path
    texts: data.Texts
    out: Path
    attacks: Sequence[str] = ("all",)
    settings: AuditSettings = field(default_factory=AuditSettings)
    limit: int | None = None
    batch_size: int | None = None
    """Rows a device works on at once; None: from the padded length."""
    mask_id: int | None = None
    store: Path | None = None
    plan: Path | None = None
    """Replay file whose masks and subsets SAMA uses instead of its own."""
    save_plan: Path | None = None
    save_losses: Path | None = None
    include_text: bool = False
    include_votes: bool = False
    strict: bool = False
    dry_run: bool = False
    quiet: bool = False
    command: str = ""


class AuditResult(NamedTuple):
    """What `run_audit` returns; the same is in the output folder."""

    rows: list[dict[str, Any]]
    metrics: dict[str, Any]
    cost: dict[str, Any]
    out: Path


def run_audit(job: AuditJob) -> AuditResult | None:
    """Runs or continues an audit; returns None for a dry run.

    Raises the errors of `sama_jax.errors`; `Interrupted` when a signal stopped it in good order.
    """
    say = console(job.quiet)
    chosen = attack_suite.select(job.attacks)
    settings = job.settings
    chosen_texts = data.collect(job.texts.texts[: job.limit])
    texts, notes = chosen_texts.texts, _data_notes(chosen_texts)
    target = model_folder.open_folder(job.target, mask_id=job.mask_id, dtype=settings.dtype)
    reference = model_folder.open_folder(job.reference, mask_id=job.mask_id, dtype=settings.dtype)
    tokenizer = _tokenizer(target, reference, texts)
    encoded = tokenizer.encode([t.text for t in texts], settings.max_length)
    items = [scoring.prepare(e, settings, target.model.shift) for e in encoded]
    plans = scoring.make_plans(chosen, settings, items, texts, job.plan)
    if (job.save_plan or job.save_losses) and "sama" not in [a.name for a in chosen]:
        raise UsageError("--save-plan and --save-losses write SAMA's probes: add sama to --attacks")
    roles = [
        scoring.Role("target", target, scoring.model_key(target, settings)),
        scoring.Role("reference", reference, scoring.model_key(reference, settings)),
    ]
    for note in notes:
        say.print(f"note: {note}")
    truncated = sum(e.truncated for e in encoded)
    if truncated:
        say.print(f"{truncated} of {len(texts)} texts are cut at {settings.max_length} tokens")
    work = scoring.Work(
        items,
        plans,
        roles,
        settings,
        batch_size=job.batch_size,
        include_votes=job.include_votes,
        quiet=job.quiet,
    )
    if job.dry_run:
        say.print(work.estimate(work.pending(None)))
        return None
    folder = RunFolder(job.out, _run_identity(job, texts, roles), _about(job, roles), job.store)
    try:
        work.run(folder, [t.id for t in texts], say)
        rows = folder.join(_text_rows(job, texts, items), [a.name for a in chosen])
        metrics = report.compute_metrics(rows, settings.seed)
        write_json(job.out / METRICS, metrics)
        _save_replay(job, work, folder, texts)
        empty = sum(not i.maskable.any() for i in items)
        notes += [f"texts without a usable token: {empty}"] if empty else []
        folder.write_manifest(notes=notes, finished=True, cost=work.cost(folder))
        folder.log("finished", texts=len(rows))
        report.write_report(job.out)
    except KeyboardInterrupt:
        raise interrupted(job) from None
    finally:
        folder.close()
    if job.strict and notes:
        raise ValidityError(f"{job.out}: finished, but under --strict: " + "; ".join(notes))
    return AuditResult(rows, metrics, folder.manifest["cost"], job.out)


def _data_notes(texts: data.Texts) -> list[str]:
    notes = []
    if texts.in_both:
        some = ", ".join(texts.in_both[:5])
        notes.append(
            f"texts that occur as member and as non-member: {len(texts.in_both)} ({some}); no "
            "attack can be right about both"
        )
    if texts.repeated:
        notes.append(f"texts that repeat an earlier one: {texts.repeated}")
    return notes


def _tokenizer(
    target: model_folder.ModelFolder, reference: model_folder.ModelFolder, texts: list[data.Text]
) -> data.TextTokenizer:
    ours = data.TextTokenizer.from_folder(target.path)
    data.require_ids_fit(ours, target.model.vocab_size, str(target.path))
    theirs = data.TextTokenizer.from_folder(reference.path)
    data.require_ids_fit(theirs, reference.model.vocab_size, str(reference.path))
    data.require_same_ids(ours, theirs, texts)
    if target.model.mask_id != reference.model.mask_id:
        raise UsageError(
            f"target and reference have different mask ids ({target.model.mask_id} and "
            f"{reference.model.mask_id}); give the right one with --mask-id"
        )
    return ours


# --- what is recorded ----------------------------------------------------------------------------


def _text_rows(
    job: AuditJob, texts: list[data.Text], items: list[scoring.Item]
) -> list[dict[str, Any]]:
    rows = []
    for text, item in zip(texts, items):
        row: dict[str, Any] = {"id": text.id}
        if text.label is not None:
            row["label"] = text.label
        row["n_tokens"] = len(item.encoded.ids)
        row["truncated"] = item.encoded.truncated
        row["status"] = "ok" if item.maskable.any() else "empty"
        if job.include_text:
            row["text"] = text.text
        rows.append(row)
    return rows


def _run_identity(
    job: AuditJob, texts: list[data.Text], roles: list[scoring.Role]
) -> dict[str, Any]:
    """What must be equal for a folder to be continued. Attacks may be added, so they are not in."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr((text.id, text.label, text.text)).encode("utf-8", "surrogatepass"))
    settings = asdict(job.settings)
    flat = {k: v for k, v in settings.items() if not isinstance(v, dict)}
    flat |= {f"{g}.{k}": v for g in ("sama", "likelihood") for k, v in settings[g].items()}
    flat["dtype"] = str(roles[0].folder.model.dtype)
    return {
        "data": digest.hexdigest()[:16],
        "texts": len(texts),
        "target": roles[0].folder.identity,
        "reference": roles[1].folder.identity,
        "mask_id": roles[0].folder.model.mask_id,
        "plan": replay.load_plan(job.plan, job.settings.max_length).identity if job.plan else None,
        **flat,
    }


def _about(job: AuditJob, roles: list[scoring.Role]) -> dict[str, Any]:
    packages = ("sama-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "source tree"
    devices = jax.local_devices()
    return {
        "versions": versions,
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "dtype": str(roles[0].folder.model.dtype),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",  # pyright: ignore
        "preset": job.settings.preset_label,
        "preset_hash": settings_hash(job.settings.sama, job.settings.likelihood),
        "seed": job.settings.seed,
        "command": job.command,
        "target": str(job.target),
        "reference": str(job.reference),
    }


def _save_replay(
    job: AuditJob, work: scoring.Work, folder: RunFolder, texts: list[data.Text]
) -> None:
    """--save-plan and --save-losses, for SAMA's probes."""
    if not job.save_plan and not job.save_losses:
        return
    plan = next(p for p in work.plans if any(a.name == "sama" for a in p.attacks))
    ids, pieces, models = [t.id for t in texts], [], []
    for start in range(0, len(ids), scoring.PLAN_ROWS):
        rows = list(range(start, min(start + scoring.PLAN_ROWS, len(ids))))
        drawn = plan.draw(rows)
        pieces.append(ProbePlan(*(x[: len(rows)] for x in drawn)))
        models.append([work.read_losses(folder, plan, rows, r)[: len(rows)] for r in work.roles])
    if job.save_plan:
        tokens = np.full((len(ids), job.settings.max_length), -1, np.int32)
        for row, item in enumerate(work.items):
            tokens[row, : len(item.encoded.ids)] = item.encoded.ids
        whole = jax.tree.map(lambda *x: np.concatenate(x), *pieces)
        replay.save_plan(job.save_plan, ids, tokens, whole, job.settings.preset)
    if job.save_losses:
        target, reference = (np.concatenate(m) for m in zip(*models))
        replay.save_losses(job.save_losses, ids, target, reference)


def interrupted(job: AuditJob) -> Interrupted:
    """What a signal during an audit turns into."""
    return Interrupted(
        f"interrupted; finished batches are kept in {job.out}: the same command continues"
    )
