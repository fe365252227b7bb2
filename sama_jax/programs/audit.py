"""The audit: texts and two model folders in, a folder of scores and a report out.

Batches are independent and their results are appended as they are made, so a run can be cut off
at any moment and continued by the same command.
"""

import hashlib
import importlib.metadata
import json
import platform
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sama_jax import attacks as attack_suite
from sama_jax.arrays import Encoded, Params, ProbePlan
from sama_jax.attacks.registry import Attack
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.devices import parallel, processes
from sama_jax.engine import output_position, reading, scoring
from sama_jax.errors import Interrupted, UsageError, ValidityError
from sama_jax.programs.jobs import AuditJob
from sama_jax.storage import replay
from sama_jax.storage.files import write_json
from sama_jax.storage.run_folder import METRICS, Row, RunFolder, read_manifest
from sama_jax.terminal import ProgressBar, console
from sama_jax.texts import data
from sama_jax.weights import model_folder

if TYPE_CHECKING:
    from sama_jax.reporting.results import Metrics


class AuditResult(NamedTuple):
    """What `run_audit` returns; the same is in the output folder."""

    rows: list[Row]
    metrics: "Metrics"
    cost: dict[str, Any]
    out: Path


def run_audit(job: AuditJob) -> AuditResult | None:
    """Runs or continues an audit; returns None for a dry run, and where another process or
    `merge` writes the results.

    Raises the errors of `sama_jax.errors`; `Interrupted` when a signal stopped it in good order.
    """
    peers = job.peers
    quiet = job.quiet or peers.rank > 0
    say, settings = console(quiet), job.settings
    before = read_manifest(job.out) or {}
    # Attacks on all texts together are scored again: a new prefix changes what they see.
    wanted = attack_suite.select([*job.attacks, *before.get("corpus_attacks", [])])
    chosen_texts = data.collect(job.texts.texts[: job.limit])
    texts, notes = chosen_texts.texts, _data_notes(chosen_texts)
    options: dict[str, Any] = {
        "mask_id": job.mask_id,
        "dtype": settings.dtype,
        "longest": settings.pad_to or settings.max_length,
        "attention": settings.attention,
    }
    target = model_folder.open_folder(job.target, adapter=job.adapter, **options)
    reference = model_folder.open_folder(job.reference, **options)
    tokenizer = _tokenizer(target, reference, texts)
    prefixes = _prefixes(job, wanted, texts, before.get("prefix_classes", []))
    chosen, left_out = _supported(job, wanted, target, texts, prefixes)
    shown = len(texts) >= 2000  # some seconds
    with ProgressBar("tokenise", len(texts), "texts", quiet=quiet or not shown) as bar:
        encoded = tokenizer.encode([t.text for t in texts], settings.max_length, bar.advance)
    items = [reading.text_item(e, settings, target.model.shift) for e in encoded]
    roles = [
        scoring.Role("target", target, scoring.model_key(target, settings)),
        scoring.Role("reference", reference, scoring.model_key(reference, settings)),
    ]
    ids = [t.id for t in texts]
    replayed = reading.load_replayed(job.plan, settings, ids, items) if job.plan else None
    kept = [None if t.id in prefixes.taken else item for t, item in zip(texts, items)]
    keys = {r.name: r.store_key for r in roles}
    reader = reading.Reader(chosen, settings, {"text": kept}, keys, None, replayed)
    if (job.save_plan or job.save_losses) and "sama" not in [a.name for a in chosen]:
        raise UsageError("--save-plan and --save-losses write SAMA's probes: add sama to --attacks")
    for note in notes:
        say.print(f"note: {note}")
    truncated = sum(e.truncated for e in encoded)
    if truncated:
        say.print(f"{truncated} of {len(texts)} texts are cut at {settings.max_length} tokens")
    if prefixes.taken:
        say.print(f"{len(prefixes.taken)} texts serve as prefixes and are not evaluated")
    for name, reason in left_out.items():
        say.print(f"not computed: {name} ({reason})")
    maker = _ViewMaker(reader, texts, tokenizer, prefixes, settings, roles)
    for view, made in reader.views.items():
        if view != "text" and not maker.guided(view):
            assert made is not None
            reader.items[view] = maker(view)
    probe_ids = tokenizer.encode([output_position.TEXT], output_position.MAX_TOKENS)[0].ids

    def check(role: scoring.Role, params: Params) -> None:
        warning = output_position.check(role.folder.model, params, probe_ids)
        if warning is not None:
            notes.append(f"{role.name}: {warning}")
            say.print(f"note: {notes[-1]}")

    # The same everywhere, or processes would split the work differently.
    room = min(peers.gather("memory", parallel.device_bytes()))
    placed = _placement(job, roles, room)
    say.print(_describe(placed))
    work = scoring.Work(
        reader,
        roles,
        settings,
        make_items=maker,
        check=check,
        batch_size=job.batch_size,
        layout=placed.layout,
        in_turn=not placed.together,
        device_bytes=room,
        peers=peers,
        include_votes=job.include_votes,
        quiet=quiet,
    )
    if job.dry_run:
        say.print(work.estimate(everything=True))
        return None
    run = _run_identity(job, texts, roles)
    _same_everywhere(peers, [run, [a.name for a in chosen], _describe(placed)])
    folder = _open_folder(job, run, _about(job, roles))
    store = str(job.store.resolve()) if job.store else None
    folder.write_manifest(
        attacks=[a.name for a in chosen],
        not_computed=left_out,
        settings=asdict(settings),
        store_keys=keys,
        store=store,
        prefix_classes=sorted(prefixes.texts) if prefixes.taken else [],
        corpus_attacks=[a.name for a in chosen if a.corpus is not None],
    )
    try:
        work.run(folder, ids, say)
        costs: list[dict[str, Any]] = []
        text_rows = _text_rows(job, texts, items, encoded, prefixes)
        if peers.count > 1:
            costs = peers.gather("passes", work.cost(folder))
            parallel.disconnect()
            if not folder.shared:
                _write_index(job, text_rows, reader)
                folder.write_manifest(cost=costs[peers.rank])
                say.print(_HINT)
                return None
            if peers.rank > 0:
                return None
            folder.refresh()
            scoring.score_rows(
                reader, folder, ids, range(len(ids)), include_votes=job.include_votes
            )
        labels = [t.label for t in texts]
        known = None if None in labels else np.array(labels, np.int32)
        scoring.score_corpus(reader, folder, ids, [t.text for t in texts], known)
        _write_index(job, text_rows, reader)
        rows = folder.join(text_rows, [a.name for a in chosen])
        # SciPy's statistics and scikit-learn: two seconds to import.
        from sama_jax.reporting import report, results

        metrics = results.compute_metrics(rows, settings.seed)
        write_json(job.out / METRICS, metrics)
        _save_replay(job, work, folder, texts, items)
        empty = sum(not i.maskable.any() for i in items)
        notes += [f"texts without a usable token: {empty}"] if empty else []
        cost = work.cost(folder) if peers.count == 1 else scoring.sum_costs(costs)
        folder.write_manifest(notes=notes, finished=True, cost=cost)
        folder.log("finished", texts=len(rows))
        report.write_report(job.out, figures=job.figures)
    except KeyboardInterrupt:
        raise interrupted(job) from None
    finally:
        folder.close()
    if job.strict and notes:
        raise ValidityError(f"{job.out}: finished, but under --strict: " + "; ".join(notes))
    return AuditResult(rows, metrics, folder.manifest["cost"], job.out)


def _placement(job: AuditJob, roles: list[scoring.Role], room: int) -> parallel.Fit:
    """What each device holds."""
    folders = [role.folder for role in roles]

    def splits(mesh: Any) -> None:
        for folder in folders:
            parallel.parameter_shardings(mesh, folder.abstract_params, folder.model.arch)

    return parallel.choose_layout(
        job.parallel,
        job.mesh,
        job.models,
        model_folder.num_bytes(folders),
        max(model_folder.num_bytes([f]) for f in folders),
        splits,
        fully_sharded=job.fully_sharded,
        room=room,
    )


_HINT = (
    "each process has written its own part, since --out is not on a disk that all of them share: "
    "copy the folders to one machine, then sama-jax merge OUT PART_DIR..."
)


def _same_everywhere(peers: processes.Peers, what: Any) -> None:
    """Raises `UsageError` unless all processes were started for the same thing."""
    text = json.dumps(what, sort_keys=True, default=str)
    found = peers.gather("run", hashlib.sha256(text.encode()).hexdigest())
    other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
    if other is not None:
        raise UsageError(
            f"processes 0 and {other} do not agree on texts, models, settings, attacks or devices; "
            "start all with the same command, on the same files"
        )


def _open_folder(job: AuditJob, run: dict[str, Any], about: dict[str, Any]) -> RunFolder:
    """Process 0 opens it first; the others find out whether they see the same folder."""
    peers, session = job.peers, {"session": secrets.token_hex(8)}
    if peers.rank == 0:
        folder = RunFolder(job.out, run, about | session, job.store)
        peers.gather("folder", session["session"])
        folder.shared = all(peers.gather("shared", True))
        return folder
    session["session"] = peers.gather("folder", "")[0]
    seen = _sees(job.out, session["session"])
    shared = all(peers.gather("shared", seen))
    folder = RunFolder(job.out, run, about, job.store, rank=peers.rank, writes=not seen)
    folder.shared = shared
    return folder


def _sees(path: Path, session: str) -> bool:
    """Whether process 0's manifest is here; a network disk may take a moment."""
    for wait in (0.0, 0.5, 2.0):
        time.sleep(wait)
        if ((read_manifest(path) or {}).get("session")) == session:
            return True
    return False


def _write_index(job: AuditJob, rows: list[dict[str, Any]], reader: reading.Reader) -> None:
    """What scoring without the texts needs: how plans are drawn again."""
    index = job.out / reading.INDEX
    earlier = reading.read_index(index)[1] if index.is_file() else {}
    reading.write_index(index, rows, earlier | reader.items)


def _describe(placed: parallel.Fit) -> str:
    mesh, one = placed.layout.mesh, len(placed.layout.devices) == 1
    where = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
    if placed.layout.kind == "sharded":
        how = f"sharded, data={mesh.shape['data']},model={mesh.shape['model']}"
        how += ", parameters split over data, too" if placed.layout.fully_sharded else ""
    else:
        how = "one device" if one else "pmap, every device holds the models"
    turns = "both models together" if placed.together else "one model after the other"
    return f"devices: {where}, {how}; {turns}"


# --- what can be computed ------------------------------------------------------------------------


class Prefixes(NamedTuple):
    """Texts that stand before the scored ones, for the attacks that want them."""

    texts: dict[str, list[str]]
    """`nonmember`, `member` -> the prefix texts of that class."""
    taken: set[str]
    """Ids of texts that were taken from the evaluation and are not scored."""


def _prefixes(
    job: AuditJob, wanted: list[Attack], texts: list[data.Text], taken_before: Sequence[str]
) -> Prefixes:
    """From `--prefixes`, else a few texts of each class, chosen by the seed and their ids alone.

    Classes that an earlier part of this run took prefixes from stay without them.
    """
    classes = set(taken_before) | {
        query.view.context
        for attack in wanted
        for query in attack.queries(job.settings).values()
        if query.view is not None and query.view.context is not None
    }
    if not classes:
        return Prefixes({}, set())
    shots, names = job.settings.prefix.shots, {"nonmember": 0, "member": 1}
    found: dict[str, list[str]] = {}
    for name, label in names.items():
        if job.prefixes is not None:
            given = [t.text for t in job.prefixes.texts if (t.label or 0) == label]
            if given:
                found[name] = given[:shots]
            continue
        pool = sorted(
            (t for t in texts if t.label == label),
            key=lambda t: hashlib.sha256(f"{job.settings.seed} {t.id}".encode()).digest(),
        )
        # At least as many must be left to evaluate on.
        if name in classes and len(pool) >= 2 * shots:
            found[name] = [t.text for t in pool[:shots]]
    used = {text for given in found.values() for text in given}
    return Prefixes(found, {t.id for t in texts if t.text in used})


def _supported(
    job: AuditJob,
    wanted: list[Attack],
    target: model_folder.ModelFolder,
    texts: list[data.Text],
    prefixes: Prefixes,
) -> tuple[list[Attack], dict[str, str]]:
    """The attacks that this run can compute, and why not the others.

    An attack that was asked for by name is an error instead.
    """
    chosen, left_out = [], {}
    for attack in wanted:
        reason = _obstacle(attack, job.settings, target.model.kind, texts, prefixes)
        if reason is None:
            chosen.append(attack)
        elif attack.name in job.attacks:
            raise UsageError(f"attack '{attack.name}' cannot be computed here: {reason}")
        else:
            left_out[attack.name] = reason
    if not chosen:
        raise UsageError("none of the attacks can be computed here")
    return chosen, left_out


def _obstacle(
    attack: Attack, settings: AuditSettings, kind: str, texts: list[data.Text], prefixes: Prefixes
) -> str | None:
    if attack.statistic is not None and kind not in attack.kinds:
        return f"it is defined for {' and '.join(attack.kinds)} models, this one is {kind}"
    for query in attack.queries(settings).values():
        context = query.view.context if query.view else None
        if context is not None and context not in prefixes.texts:
            return (
                f"it needs {context} prefixes: give --prefixes FILE, or at least "
                f"{2 * settings.prefix.shots} labelled {context}s"
            )
    if attack.needs_texts:
        left = [t.label for t in texts if t.id not in prefixes.taken]
        if min(left.count(0), left.count(1)) < 5 or None in left:
            return "it needs labels, at least five texts of each class"
    return None


class _ViewMaker:
    """Makes the items of a view, all texts at once."""

    def __init__(
        self,
        reader: reading.Reader,
        texts: list[data.Text],
        tokenizer: data.TextTokenizer,
        prefixes: Prefixes,
        settings: AuditSettings,
        roles: list[scoring.Role],
    ):
        self.reader, self.texts, self.settings = reader, texts, settings
        self.shift = roles[0].folder.model.shift
        self.room = min(r.folder.max_length for r in roles)
        self.joined = {name: " ".join(found) for name, found in prefixes.texts.items()}
        self._encode = lambda text: tokenizer.encode([text], settings.max_length)[0]
        # A prefix may be longer than a text: it is cut from its beginning by the view. Without the
        # tokens that a tokenizer adds: an end of text would cut the prefix off from the text.
        whole = ["".join(t + "\n\n" for t in found) for found in prefixes.texts.values()]
        ids = [e.ids[~e.special] for e in tokenizer.encode(whole, 65535)]
        self.contexts = dict(zip(prefixes.texts, ids))

    def guided(self, view: str) -> bool:
        return any(t.guide is not None and t.query.probes is not None and t.query.view is not None
                   for t in self.reader.tasks.values() if t.view == view)  # fmt: skip

    def __call__(self, view: str) -> list[reading.Item | None]:
        made, task = self.reader.views[view], None
        assert made is not None
        if self.guided(view):
            task = next(t for t in self.reader.tasks.values() if t.view == view).guide
        items: list[reading.Item | None] = []
        for row, original in enumerate(self.reader.items["text"]):
            if original is None or original.ids is None or not len(original.ids):
                items.append(None)
                continue
            guide = None
            if task is not None:
                role = next(iter(task.channels))
                guide = self.reader.values(task, [row], role, "nll")[0][:, : len(original.ids)]
            tools = reading.view_tools(
                original,
                self.settings,
                encode=self._encode,
                contexts=self.contexts,
                joined=self.joined,
                room=self.room,
                guide=guide,
            )
            text = made.make(self.texts[row].text, original.ids, tools)
            items.append(text and reading.view_item(text, original, self.settings, self.shift))
        return items


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
    job: AuditJob,
    texts: list[data.Text],
    items: list[reading.Item],
    encoded: list[Encoded],
    prefixes: Prefixes,
) -> list[dict[str, Any]]:
    rows = []
    for text, item, tokens in zip(texts, items, encoded):
        row: dict[str, Any] = {"id": text.id}
        if text.label is not None:
            row["label"] = text.label
        row["n_tokens"] = len(tokens.ids)
        row["truncated"] = tokens.truncated
        status = "ok" if item.maskable.any() else "empty"
        row["status"] = "prefix" if text.id in prefixes.taken else status
        if job.include_text:
            row["text"] = text.text
        rows.append(row)
    return rows


def _run_identity(
    job: AuditJob, texts: list[data.Text], roles: list[scoring.Role]
) -> dict[str, Any]:
    """What must be equal for a folder to be continued. Attacks may be added, so they are not in."""
    settings = asdict(job.settings)
    flat = {k: v for k, v in settings.items() if not isinstance(v, dict)}
    groups = {g: inner for g, inner in settings.items() if isinstance(inner, dict)}
    flat |= {f"{g}.{k}": v for g, inner in groups.items() for k, v in inner.items()}
    flat["dtype"] = str(roles[0].folder.model.dtype)
    flat["attention"] = scoring.attention_of(roles[0].folder)
    return {
        "data": _digest(texts),
        "texts": len(texts),
        "target": roles[0].folder.identity,
        "reference": roles[1].folder.identity,
        "mask_id": roles[0].folder.model.mask_id,
        "plan": replay.load_plan(job.plan, job.settings.max_length).identity if job.plan else None,
        "prefixes": _digest(job.prefixes.texts) if job.prefixes else None,
        **flat,
    }


def _digest(texts: list[data.Text]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr((text.id, text.label, text.text)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


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
        "attention": scoring.attention_of(roles[0].folder),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",  # pyright: ignore
        "preset": job.settings.preset_label,
        "preset_hash": settings_hash(job.settings.sama, job.settings.likelihood),
        "seed": job.settings.seed,
        "command": job.command,
        "target": str(job.target),
        "reference": str(job.reference),
        **({"adapter": str(job.adapter)} if job.adapter else {}),
    }


def _save_replay(
    job: AuditJob,
    work: scoring.Work,
    folder: RunFolder,
    texts: list[data.Text],
    items: list[reading.Item],
) -> None:
    """--save-plan and --save-losses, for SAMA's probes."""
    if not job.save_plan and not job.save_losses:
        return
    task = work.reader.task("sama")
    ids, pieces, models = [t.id for t in texts], [], []
    for start in range(0, len(ids), reading.PLAN_ROWS):
        rows = list(range(start, min(start + reading.PLAN_ROWS, len(ids))))
        drawn = task.draw(rows)
        pieces.append(ProbePlan(*(x[: len(rows)] for x in drawn)))
        found = [work.reader.values(task, rows, role, "nll") for role in reading.ROLES]
        models.append([x[: len(rows)] for x in found])
    if job.save_plan:
        tokens = np.full((len(ids), job.settings.max_length), -1, np.int32)
        for row, item in enumerate(items):
            tokens[row, : len(item.maskable)] = item.ids  # pyright: ignore
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
