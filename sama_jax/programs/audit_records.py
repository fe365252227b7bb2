"""Records what an audit is and what it found: identity, manifest, index, replay files."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from sama_jax.arrays import Encoded, ProbePlan
from sama_jax.attacks.code import codes
from sama_jax.config import settings_hash
from sama_jax.core.spread import spread
from sama_jax.devices.processes import Peers
from sama_jax.engine.evidence import Evidence
from sama_jax.engine.plans import PLAN_ROWS
from sama_jax.engine.readings import Readings
from sama_jax.engine.roles import attention_of
from sama_jax.engine.tasks import ROLES, Tasks
from sama_jax.engine.text_table import TextTable, described
from sama_jax.errors import DataError, Interrupted, UsageError
from sama_jax.models.attention_mask import mask_of
from sama_jax.programs.audit_inputs import Chosen, Inputs, Prefixes, Tokenised
from sama_jax.programs.jobs import AuditJob
from sama_jax.programs.run_identity import digest, run_identity, source_digest
from sama_jax.storage import replay
from sama_jax.storage.files import require_free, write_json
from sama_jax.storage.protocol import Protocol, known_protocol, require_same, write_protocol
from sama_jax.storage.run_folder import CONFIG, DENSITIES, RunFolder, manifest_of, read_manifest
from sama_jax.storage.text_index import INDEX, read_index, write_index
from sama_jax.storage.yaml_file import REPEATS, write_yaml
from sama_jax.texts.read import Text, group_numbers
from sama_jax.validity.blind import Blind
from sama_jax.validity.overlap import joined, relate
from sama_jax.weights.identity import matmul_precision

OWN = "its own, not the target's: losses are summed over spans of characters that both share"
"""What a manifest says of a reference with another tokenizer."""


class OpenRun(NamedTuple):
    """The output folder of a run, open."""

    folder: RunFolder
    shared: bool
    """Whether all processes of the run see this very folder."""


@contextlib.contextmanager
def open_run(
    job: AuditJob, inputs: Inputs, chosen: Chosen, tokenised: Tokenised, devices: str
) -> Iterator[OpenRun]:
    """Opens the output folder, a new one or that of this very run, and writes its manifest.

    Args:
      job: what is audited.
      inputs: texts and models.
      chosen: the attacks.
      tokenised: the texts as tokens, and the plans that are replayed.
      devices: how the models are placed, in words; the same in every process.

    Raises:
      UsageError: the folder belongs to another run, or the processes do not agree.
      Interrupted: a signal stopped the run in good order.
    """
    run, protocol = declared(job, inputs, chosen, tokenised)
    names = [a.name for a in chosen.attacks]
    require_same_everywhere(job.peers, [run, names, devices, asdict(protocol)])
    _require_protocol(job, run, protocol)
    folder, shared = _open_folder(job, run, about(job, inputs))
    try:
        fixed = _fix(job, folder, protocol, inputs.store_keys)
        if job.flags and folder.writes:
            flags = _repeating(job.flags, names, folder, fixed)
            write_yaml(job.out / CONFIG, REPEATS.format("audit"), flags)
        folder.write_manifest(
            protocol=asdict(fixed),
            attacks=names,
            not_computed=chosen.left_out,
            settings=asdict(job.settings),
            store_keys=inputs.store_keys,
            store=str(job.store.resolve()) if job.store else None,
            prefix_classes=sorted(chosen.prefixes.texts) if chosen.prefixes.taken else [],
            corpus_attacks=[a.name for a in chosen.attacks if a.corpus is not None],
        )
        yield OpenRun(folder, shared)
    except KeyboardInterrupt:
        raise interrupted(job) from None
    finally:
        folder.close()


def _repeating(
    flags: Mapping[str, Any], names: Sequence[str], folder: RunFolder, protocol: Protocol
) -> dict[str, Any]:
    """Returns flags that repeat a whole folder, with what its earlier goes scored and declared."""
    made = [name for name in ("pipeline_control", "second_seed") if (folder.path / name).is_dir()]
    found = {**flags, **{name.replace("_", "-"): True for name in made}}
    if earlier := [name for name in folder.manifest.get("codes") or {} if name not in names]:
        found |= {"attacks": [*names, *earlier], "primary": protocol.primary}
        found |= {"family": list(protocol.family), "margin": protocol.margin}
    return found


def declared(
    job: AuditJob, inputs: Inputs, chosen: Chosen, tokenised: Tokenised
) -> tuple[dict[str, Any], Protocol]:
    """Returns the identity of a run, and what it sets out to show. Raises `UsageError`."""
    run = run_identity(
        inputs.texts, tokenised.encoded, inputs.tokenizer, inputs.roles, job.settings
    )
    if inputs.reference_tokenizer is not None:
        run["reference_tokenizer"] = inputs.reference_tokenizer.fingerprint
    run["plan"] = tokenised.replayed and tokenised.replayed.identity
    if job.windows:
        documents = len({text.document for text in inputs.texts})
        run["windows"] = {"stride": job.stride, "top": job.top_windows, "texts": documents}
    run["prefixes"] = digest(job.prefixes.texts) if job.prefixes else None
    names = [a.name for a in chosen.attacks]
    return run, Protocol.of(names, job.primary, job.family, job.margin)


def require_open(job: AuditJob, inputs: Inputs, chosen: Chosen, tokenised: Tokenised) -> None:
    """Raises the `UsageError` of `open_run` for a folder of another run or protocol, if it is one.

    Writes nothing.
    """
    run, protocol = declared(job, inputs, chosen, tokenised)
    _require_protocol(job, run, protocol)
    manifest_of(job.out, run)


def _fix(
    job: AuditJob, folder: RunFolder, protocol: Protocol, store_keys: Mapping[str, str]
) -> Protocol:
    """Writes the protocol of a new run, or returns that of the run that is continued."""
    if not folder.writes:
        return protocol
    known = known_protocol(job.out, folder.manifest)
    if known is None:
        records = folder.store.keys()
        # Those of a reference alone give no score that compares the two.
        seen = any(model == store_keys["target"] for model, _, _ in records)
        known = replace(protocol, stored=seen)
    write_protocol(job.out, known)
    return known


def _require_protocol(job: AuditJob, run: dict[str, Any], protocol: Protocol) -> None:
    """Raises `UsageError`, before a folder is touched, if its run has another protocol."""
    manifest = read_manifest(job.out) or {}
    known = known_protocol(job.out, manifest) if manifest.get("run") == run else None
    if known is not None:
        given = {"primary": job.primary, "family": job.family, "margin": job.margin}
        require_same(job.out, known, protocol, [name for name, value in given.items() if value])


def interrupted(job: AuditJob) -> Interrupted:
    """Makes the error that a signal during an audit turns into."""
    return Interrupted(
        f"interrupted; finished batches are kept in {job.out}: the same command continues"
    )


def require_same_everywhere(peers: Peers, what: Any) -> None:
    """Raises `UsageError` unless all processes were started for the same thing."""
    text = json.dumps(what, sort_keys=True, default=str)
    found = peers.gather("run", hashlib.sha256(text.encode()).hexdigest())
    other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
    if other is not None:
        raise UsageError(
            f"processes 0 and {other} do not agree on texts, models, settings, attacks or devices; "
            "start all with the same command, on the same files"
        )


def _open_folder(
    job: AuditJob, run: dict[str, Any], about: dict[str, Any]
) -> tuple[RunFolder, bool]:
    """Opens it in process 0 first; the others find out whether they see the same folder."""
    peers, session = job.peers, {"session": secrets.token_hex(8)}
    if peers.rank == 0:
        folder = RunFolder(job.out, run, about | session, job.store, codes=codes())
        peers.gather("folder", session["session"])
        return folder, all(peers.gather("shared", True))
    session["session"] = peers.gather("folder", "")[0]
    seen = _sees(job, session["session"])
    shared = all(peers.gather("shared", seen))
    options = {"rank": peers.rank, "writes": not seen, "codes": codes()}
    return RunFolder(job.out, run, about, job.store, **options), shared


def _sees(job: AuditJob, session: str) -> bool:
    """Tells whether process 0's manifest is here; a network disk may take a moment."""
    for wait in (0.0, 0.5, 2.0):
        time.sleep(wait)
        if ((read_manifest(job.out) or {}).get("session")) == session:
            return True
    return False


def about(job: AuditJob, inputs: Inputs) -> dict[str, Any]:
    """Returns what a manifest says besides the identity: versions, device, preset, command."""
    packages = ("sama-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "source tree"
    devices, target = jax.local_devices(), inputs.roles["target"].folder
    return {
        "versions": versions,
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "dtype": str(target.model.dtype),
        "attention": attention_of(target),
        "attention_mask": _masks(inputs),
        "matmul_precision": matmul_precision() or "default",
        "preset": job.settings.preset_label,
        "preset_hash": settings_hash(job.settings.sama, job.settings.likelihood),
        "seed": job.settings.seed,
        "command": job.command,
        "source": source_digest(),
        "target": str(job.target),
        **({"reference": _named(job.references)} if job.references else {}),
        **({"reference_tokenizer": OWN} if inputs.reference_tokenizer is not None else {}),
        **({"adapter": _adapters(job)} if job.adapter else {}),
    }


def _adapters(job: AuditJob) -> str | list[str]:
    """Names the adapters in their order, or the only one."""
    given = job.adapter or ()
    return _named([given] if isinstance(given, str | Path) else given)


def _named(paths: Sequence[str | Path]) -> str | list[str]:
    names = [str(path) for path in paths]
    return names if len(names) > 1 else names[0]


def _masks(inputs: Inputs) -> str:
    """Says which mask of attention the models are read with."""
    names = {n: mask_of(r.folder.model.arch) for n, r in inputs.roles.items()}
    if len(set(names.values())) == 1:
        return names["target"]
    return ", ".join(f"{mask} ({name})" for name, mask in names.items())


def text_rows(
    job: AuditJob,
    inputs: Inputs,
    tokenised: Tokenised,
    prefixes: Prefixes,
    blind: Blind | None = None,
    again: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Returns what each line of scores.jsonl says about its text, without scores.

    Args:
      job: of the run.
      inputs: its texts.
      tokenised: the same as tokens.
      prefixes: texts that are not scored.
      blind: the best baseline without a model.
      again: id -> score of the primary attack under other masks.
    """
    rows = []
    baseline = np.full(len(inputs.texts), np.nan) if blind is None else blind.scores
    numbers, truncated = document_numbers(inputs.texts, tokenised.encoded), tokenised.truncated
    for i, text in enumerate(inputs.texts):
        group, view, tokens = numbers[i], tokenised.views[i], tokenised.encoded[i]
        row: dict[str, Any] = {"id": text.id}
        if text.label is not None:
            row["label"] = text.label
        if group is not None:  # a number: names of documents and authors are private
            row["group"] = group
        row["n_tokens"] = tokens.own_tokens
        row["truncated"] = truncated[i]
        if text.document is not None:
            row |= {"document": text.document, "top": job.top_windows}
        if tokens.prompt_cut:
            row["prompt_cut"] = tokens.prompt_cut
        status = "ok" if view.maskable.any() else "empty"
        row["status"] = "prefix" if text.id in prefixes.taken else status
        if text.control:
            row["control"] = True
        if np.isfinite(baseline[i]):
            row["baseline"] = float(baseline[i])
        if text.id in again:
            row["again"] = again[text.id]
        if job.include_text:
            row["text"] = text.text
        rows.append(row)
    return rows


def document_numbers(texts: list[Text], encoded: Sequence[Encoded]) -> list[int | None]:
    """Numbers the groups of texts, and, of known members, also what counts as one text.

    Those are copies, near duplicates, and texts that are equal after they were cut: given thirty
    times, one text that was learnt would be thirty known members that are found.
    """
    numbers = group_numbers(texts)
    known = [i for i, text in enumerate(texts) if text.control]
    if not known:
        return numbers
    related = relate([texts[i] for i in known]).units.tolist()
    units = joined(related, [encoded[i].ids.tobytes() for i in known]).tolist()
    given = {unit: numbers[i] for i, unit in zip(known, units) if numbers[i] is not None}
    first = 1 + max((number for number in numbers if number is not None), default=-1)
    sizes = Counter(units)
    for i, unit in zip(known, units):
        if unit in given or sizes[unit] > 1:
            numbers[i] = given.setdefault(unit, first + unit)
    return numbers


def update_index(
    folder: RunFolder, rows: Sequence[dict[str, Any]], tables: Mapping[str, TextTable]
) -> None:
    """Writes what scoring without the texts needs; views of earlier parts of the run stay in it."""
    index, run = folder.path / INDEX, folder.manifest["run"]
    earlier: dict[str, list[dict[str, Any] | None]] = {}
    with contextlib.suppress(DataError):  # none, or damaged: the losses of its views are kept
        earlier = read_index(index, run)[1]
    write_index(index, run, rows, earlier | {view: described(t) for view, t in tables.items()})


def save_replay(job: AuditJob, readings: Readings, inputs: Inputs, tokenised: Tokenised) -> None:
    """Writes --save-plan and --save-losses: SAMA's probes and its losses."""
    if not job.save_plan and not job.save_losses:
        return
    task = readings.tasks.first("sama")
    pieces, losses = [], []
    for start in range(0, len(inputs.ids), PLAN_ROWS):
        rows = list(range(start, min(start + PLAN_ROWS, len(inputs.ids))))
        pieces.append(ProbePlan(*(x[: len(rows)] for x in readings.plan(task, rows))))
        losses.append([readings.values(task, rows, role)[: len(rows)] for role in ROLES])
    if job.save_plan:
        tokens = np.full((len(inputs.ids), job.settings.max_length), -1, np.int32)
        for row, view in enumerate(tokenised.views):
            tokens[row, : len(view.ids)] = view.ids
        whole = jax.tree.map(lambda *x: np.concatenate(x), *pieces)
        replay.save_plan(job.save_plan, inputs.ids, tokens, whole, job.settings.preset)
    if job.save_losses:
        target, reference = (np.concatenate(found) for found in zip(*losses))
        replay.save_losses(job.save_losses, inputs.ids, target, reference)


def write_densities(out: Path, found: Evidence, labels: Int[np.ndarray, " n"]) -> None:
    """Writes densities.json: how loss differences depend on what is masked."""
    if (content := spread(found.differences, found.densities, labels)) is not None:
        write_json(out / DENSITIES, content)


def require_outputs(job: AuditJob) -> None:
    """Raises `UsageError` if a replay file would replace another file, or the other one."""
    require_free(job.save_plan, frozenset({"ids", "tokens", "masks", "scored"}))
    require_free(job.save_losses, frozenset({"ids", "target", "reference"}))
    given = [p.resolve() for p in (job.plan, job.save_plan, job.save_losses) if p is not None]
    if len(set(given)) < len(given):
        raise UsageError("--plan, --save-plan and --save-losses must name different files")


def require_sama(job: AuditJob, tasks: Tasks) -> None:
    """Raises `UsageError` if SAMA's probes are to be saved, but SAMA is not computed."""
    if (job.save_plan or job.save_losses) and "sama" not in tasks.queries:
        raise UsageError("--save-plan and --save-losses write SAMA's probes: add sama to --attacks")
    if job.save_losses and len(job.references) > 1:
        raise UsageError("--save-losses writes the losses of one reference; give --reference once")
