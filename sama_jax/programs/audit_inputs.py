"""Reads and checks what an audit works on, and chooses the attacks that can be computed."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sama_jax import attacks as attack_suite
from sama_jax.arrays import Encoded
from sama_jax.attacks.registry import Attack
from sama_jax.config import AuditSettings
from sama_jax.engine.plans import ReplayedPlans
from sama_jax.engine.roles import ModelRole, model_key, pad_id
from sama_jax.engine.text_table import TextTable, TextView, original_view, table_of
from sama_jax.engine.views import ViewSources
from sama_jax.errors import ModelError, UsageError, ValidityError
from sama_jax.programs.jobs import AuditJob
from sama_jax.programs.split import require_split
from sama_jax.storage import replay
from sama_jax.storage.run_folder import read_manifest
from sama_jax.terminal import ProgressBar
from sama_jax.texts.read import Text, collect, with_control
from sama_jax.texts.tokenizer import TextTokenizer, require_same_ids
from sama_jax.texts.windows import windows_of
from sama_jax.weights import model_folder

MANY_TEXTS = 2000
"""Texts from which on tokenising takes some seconds and shows its progress."""
MIN_CLASS = 5
"""Texts of each class that an attack on texts and labels needs."""


class Inputs(NamedTuple):
    """Texts, models and tokenizer of an audit: checked, nothing loaded."""

    texts: list[Text]
    roles: dict[str, ModelRole]
    tokenizer: TextTokenizer

    @property
    def ids(self) -> list[str]:
        """The texts' ids, in order."""
        return [text.id for text in self.texts]

    @property
    def store_keys(self) -> dict[str, str]:
        """Role -> the name of that model's losses in the store."""
        return {name: role.store_key for name, role in self.roles.items()}

    @property
    def labels(self) -> np.ndarray:
        """int32 [n], 1 member, 0 not, -1 a text without a label."""
        return np.array([-1 if t.label is None else t.label for t in self.texts], np.int32)


class Prefixes(NamedTuple):
    """Texts that stand before the scored ones, for the attacks that want them."""

    texts: dict[str, list[str]]
    """`nonmember`, `member` -> the prefix texts of that class."""
    taken: set[str]
    """Ids of texts that were taken from the evaluation and are not scored."""
    possible: frozenset[str] = frozenset()
    """Classes that have texts enough to give prefixes."""


class Chosen(NamedTuple):
    """The attacks of a run."""

    attacks: list[Attack]
    left_out: dict[str, str]
    """Name -> why it cannot be computed here."""
    prefixes: Prefixes


class Tokenised(NamedTuple):
    """The texts of an audit as tokens."""

    encoded: list[Encoded]
    views: list[TextView]
    """Of every text, prefixes included."""
    table: TextTable
    """Of the texts that are scored: those taken as prefixes are empty rows."""
    replayed: ReplayedPlans | None


def wanted_attacks(job: AuditJob) -> list[Attack]:
    """Returns the attacks that a job names, and those on all texts that the folder holds already.

    The latter are scored again, since a new prefix changes what they see.
    """
    before = read_manifest(job.out) or {}
    return attack_suite.select([*job.attacks, *before.get("corpus_attacks", [])])


def read_inputs(job: AuditJob) -> Inputs:
    """Reads texts and tokenizer and opens both model folders; loads no weights.

    Raises:
      DataError, ModelError, UsageError: what is wrong, where, and what to do.
    """
    settings = job.settings
    texts = collect(job.texts.texts[: job.limit])
    if job.split is not None:
        require_split(job.split, texts.texts, job.limit)
    texts = with_control(texts, job.control)
    options: dict[str, Any] = {
        "mask_id": job.mask_id,
        "dtype": settings.dtype,
        "longest": settings.pad_to or settings.max_length,
        "attention": settings.attention,
        "attention_mask": job.attention_mask,
    }
    target = model_folder.open_folder(job.target, adapter=job.adapter, **options)
    if settings.dtype == "auto":  # each folder's own would look like a difference of the models
        options["dtype"] = str(target.model.dtype)
    options["attention_mask"] = job.reference_attention_mask or job.attention_mask
    reference = model_folder.open_folder(job.reference, **options)
    require_one_kind(target, reference)
    tokenizer = common_tokenizer(target, reference, texts.texts)
    pad = pad_id(target, settings)
    roles = {
        name: ModelRole(name, folder, model_key(folder, settings, pad))
        for name, folder in (("target", target), ("reference", reference))
    }
    require_two_models(roles)
    return Inputs(_windows(job, texts.texts, tokenizer), roles, tokenizer)


def _windows(job: AuditJob, texts: list[Text], tokenizer: TextTokenizer) -> list[Text]:
    """Returns the texts, or with --windows their windows. Raises `UsageError`."""
    if not job.windows:
        if job.stride is not None:
            raise UsageError("--stride is about windows: give --windows, too")
        return texts
    if job.second_seed:
        raise UsageError("--second-seed is of whole texts; leave it or --windows out")
    length = job.settings.max_length
    return windows_of(texts, tokenizer, length, length if job.stride is None else job.stride)


def require_one_kind(target: model_folder.ModelFolder, reference: model_folder.ModelFolder) -> None:
    """Raises `ModelError` if the models predict in different ways: losses then mean two things."""
    if target.model.kind != reference.model.kind:
        raise ModelError(
            f"{target.path} and {reference.path}: the target is a {target.model.kind} model, the "
            f"reference an {reference.model.kind} one, so their losses cannot be compared; give a "
            "reference of the target's kind, such as the converted model before its fine-tuning"
        )


def require_two_models(roles: Mapping[str, ModelRole]) -> None:
    """Raises `ValidityError` if target and reference are one model: nothing could differ."""
    target, reference = roles["target"], roles["reference"]
    if target.folder.adapter_is_nothing:
        raise ValidityError(
            f"{target.folder.path}: its adapter is zero, or changes nothing else, so target and "
            "reference are the same model: it was never trained, or not saved; give the trained "
            "adapter"
        )
    if target.store_key == reference.store_key:
        raise ValidityError(
            f"{target.folder.path} and {reference.folder.path}: target and reference are the same "
            "model, byte for byte, so no attack could find anything; give the fine-tuned model as "
            "--target (or its --adapter), and what it was made from as --reference"
        )


def common_tokenizer(
    target: model_folder.ModelFolder,
    reference: model_folder.ModelFolder,
    texts: list[Text],
) -> TextTokenizer:
    """Returns the target's tokenizer, after checking that both models read texts alike.

    Raises:
      ModelError: the tokenizers give other ids, or ids without an embedding.
      UsageError: the models have different mask tokens.
    """
    ours, theirs = (
        TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
        for folder in (target, reference)
    )
    require_same_ids(ours, theirs, texts)
    if target.model.mask_id != reference.model.mask_id:
        raise UsageError(
            f"target and reference have different mask ids ({target.model.mask_id} and "
            f"{reference.model.mask_id}); give the right one with --mask-id"
        )
    return ours


# --- attacks and prefixes ------------------------------------------------------------------------


def choose_attacks(job: AuditJob, wanted: Sequence[Attack], inputs: Inputs) -> Chosen:
    """Chooses the prefixes, the attacks that this run can compute, and says why not the others.

    Raises:
      UsageError: an attack that was asked for by name cannot be computed, or none can.
    """
    before = (read_manifest(job.out) or {}).get("prefix_classes", [])
    kind = inputs.roles["target"].folder.model.kind
    prefixes = choose_prefixes(job, [a for a in wanted if _fits(a, kind)], inputs.texts, before)
    chosen, left_out = [], {}
    for attack in wanted:
        reason = _obstacle(attack, job.settings, kind, inputs.texts, prefixes)
        if reason is None:
            chosen.append(attack)
        elif attack.name in job.attacks:
            raise UsageError(f"attack '{attack.name}' cannot be computed here: {reason}")
        else:
            left_out[attack.name] = reason
    if not chosen:
        raise UsageError("none of the attacks can be computed here")
    return Chosen(chosen, left_out, prefixes)


def choose_prefixes(
    job: AuditJob, wanted: Sequence[Attack], texts: list[Text], taken_before: Sequence[str]
) -> Prefixes:
    """Takes prefixes from `--prefixes`, else a few texts of each class that an attack can read.

    Which ones depends on the seed and their ids alone. Classes that an earlier part of this run
    took prefixes from (`taken_before`) stay without them.
    """
    pools = {name: _prefix_pool(job, texts, label) for name, label in _CLASSES.items()}
    possible = frozenset(name for name, pool in pools.items() if pool)
    read = [_contexts(attack, job.settings) for attack in wanted]
    classes = set(taken_before).union(*(one for one in read if one <= possible))
    found = {name: pools[name] for name in _CLASSES if name in classes & possible}
    used = {text for given in found.values() for text in given}
    taken = [text for text in texts if text.text in used]
    documents = {text.document for text in taken} - {None}
    ids = {text.id for text in taken} | {t.id for t in texts if t.document in documents}
    return Prefixes(found, ids, possible)


_CLASSES = {"nonmember": 0, "member": 1}


def _contexts(attack: Attack, settings: AuditSettings) -> set[str]:
    """Returns the classes whose texts an attack reads as prefixes."""
    views = (query.view for query in attack.queries(settings).values())
    return {view.context for view in views if view is not None and view.context is not None}


def _prefix_pool(job: AuditJob, texts: list[Text], label: int) -> list[str]:
    """Returns the prefix texts that a class can give; none if it is too small."""
    shots = job.settings.prefix.shots
    if job.prefixes is not None:
        return [t.text for t in job.prefixes.texts if (t.label or 0) == label][:shots]
    pool = sorted(
        (t for t in texts if t.label == label),
        key=lambda t: hashlib.sha256(f"{job.settings.seed} {t.id}".encode()).digest(),
    )
    # At least as many must be left to evaluate on.
    return [t.text for t in pool[:shots]] if len(pool) >= 2 * shots else []


def _fits(attack: Attack, kind: str) -> bool:
    """Tells whether an attack is defined for models of a kind."""
    return attack.statistic is None or kind in attack.kinds


def _obstacle(
    attack: Attack, settings: AuditSettings, kind: str, texts: list[Text], prefixes: Prefixes
) -> str | None:
    """Says why an attack cannot be computed; None if it can."""
    if not _fits(attack, kind):
        return f"it is defined for {' and '.join(attack.kinds)} models, this one is {kind}"
    for context in sorted(_contexts(attack, settings) - prefixes.possible):
        return (
            f"it needs {context} prefixes: give --prefixes FILE, or at least "
            f"{2 * settings.prefix.shots} labelled {context}s"
        )
    if attack.needs_prompts and not any(text.has_prompt for text in texts):
        return "it is defined for prompts and responses (--template)"
    if attack.needs_texts:
        left = [t.label for t in texts if t.id not in prefixes.taken]
        if min(left.count(0), left.count(1)) < MIN_CLASS or None in left:
            return "it needs labels, at least five texts of each class"
    return None


# --- tokens --------------------------------------------------------------------------------------


def tokenise(job: AuditJob, inputs: Inputs, prefixes: Prefixes, *, quiet: bool) -> Tokenised:
    """Tokenises the texts, and matches them with the plans that are replayed.

    Raises:
      DataError, UsageError: the plan file is of other texts or another length.
    """
    settings, texts = job.settings, inputs.texts
    quiet = quiet or len(texts) < MANY_TEXTS
    with ProgressBar("tokenise", len(texts), "texts", quiet=quiet) as bar:
        contents = [text.content for text in texts]
        encoded = inputs.tokenizer.encode(contents, settings.max_length, bar.advance)
    require_context(encoded, [role.folder for role in inputs.roles.values()], settings)
    shift = inputs.roles["target"].folder.model.shift
    views = [original_view(e, settings, shift=shift) for e in encoded]
    replayed = None
    if job.plan:
        loaded = replay.load_plan(job.plan, settings.max_length)
        row_of = replay.match(loaded, inputs.ids, [view.ids for view in views], job.plan)
        replay.require_visible(loaded, row_of, [one.prompt for one in encoded], job.plan)
        replayed = ReplayedPlans(loaded.identity, loaded.plan, row_of)
        suffixes = replay.store_suffixes(loaded)
        views = [
            view._replace(store_key=view.store_key + suffixes[row])
            for view, row in zip(views, row_of)
        ]
    scored = [None if t.id in prefixes.taken else view for t, view in zip(texts, views)]
    return Tokenised(encoded, views, table_of(scored), replayed)


def require_context(
    encoded: Sequence[Encoded], folders: Sequence[model_folder.ModelFolder], settings: AuditSettings
) -> None:
    """Raises `UsageError` if texts, visible padding included, are longer than a model was made for.

    Losses beyond that are those of a model that was never trained there.
    """
    longest = max((len(one.ids) for one in encoded), default=0)
    if settings.padding == "visible":
        longest = max(longest, settings.pad_to or settings.max_length)
    least = min(folder.max_length for folder in folders)
    if longest > least:
        where = next(folder.path for folder in folders if folder.max_length == least)
        raise UsageError(
            f"{where}: was made for {least:,} tokens, but a text has {longest:,} at --max-length "
            f"{settings.max_length}; give --max-length {least} (or less), or read documents in "
            "windows of it by --windows"
        )


def view_sources(job: AuditJob, inputs: Inputs, prefixes: Prefixes) -> ViewSources:
    """Returns what the views of this audit are made from."""
    folders = [role.folder for role in inputs.roles.values()]
    return ViewSources(
        [text.content for text in inputs.texts],
        inputs.tokenizer,
        prefixes.texts,
        job.settings,
        folders[0].model.shift,
        min(folder.max_length for folder in folders),
        folders[0].model.mask_id,
    )
