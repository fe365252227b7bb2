"""Reads and checks what an audit works on, and chooses the attacks that can be computed."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sama_jax import attacks as attack_suite
from sama_jax.arrays import Encoded
from sama_jax.attacks.references import References, obstacle
from sama_jax.attacks.registry import Attack
from sama_jax.config import AuditSettings
from sama_jax.engine.plans import ReplayedPlans
from sama_jax.engine.roles import ModelRole
from sama_jax.engine.tasks import Tasks, tasks_of
from sama_jax.engine.text_table import TextTable, TextView, original_view, table_of
from sama_jax.engine.views import ViewSources
from sama_jax.errors import UsageError
from sama_jax.programs.audit_models import open_models
from sama_jax.programs.jobs import AuditJob
from sama_jax.programs.split import require_split
from sama_jax.storage import replay
from sama_jax.storage.run_folder import read_manifest
from sama_jax.terminal import ProgressBar
from sama_jax.texts.read import Text, collect, with_control
from sama_jax.texts.tokenizer import TextTokenizer
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
    """`target`, and the references, if there are any, in an order of their own."""
    tokenizer: TextTokenizer
    """The target's; it is the references', too, unless they have one of their own."""
    reference_tokenizer: TextTokenizer | None = None
    """The reference's own, where its tokens are others than the target's."""

    @property
    def ids(self) -> list[str]:
        """The texts' ids, in order."""
        return [text.id for text in self.texts]

    @property
    def store_keys(self) -> dict[str, str]:
        """Role -> the name of that model's losses in the store."""
        return {name: role.store_key for name, role in self.roles.items()}

    @property
    def references(self) -> References:
        """What the run has for references."""
        return References(len(self.roles) - 1, self.reference_tokenizer is not None)

    def tokenizer_of(self, role: str) -> TextTokenizer:
        """Returns the tokenizer of a model."""
        own = None if role == "target" else self.reference_tokenizer
        return own or self.tokenizer

    def tasks_of(
        self, attacks: Sequence[Attack], settings: AuditSettings, replayed: ReplayedPlans | None
    ) -> Tasks:
        """Collects what attacks read of these models."""
        own = self.references.own_tokenizer
        return tasks_of(attacks, settings, self.store_keys, replayed, own_tokenizer=own)

    @property
    def shift(self) -> bool:
        """Whether any of the models reads the output before a token (`Model.shift`)."""
        return any(role.folder.model.shift for role in self.roles.values())

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
    reference: list[Encoded] | None = None
    """By the reference's own tokenizer; None: it has none."""

    @property
    def truncated(self) -> list[bool]:
        """Tells of each text whether it is cut: both models read what fits into either's tokens."""
        cut = [one.truncated for one in self.encoded]
        others = cut if self.reference is None else [one.truncated for one in self.reference]
        return [one or other for one, other in zip(cut, others)]

    def ids_of(self, role: str) -> list[np.ndarray]:
        """Returns each text as a model reads it: int32 [n]."""
        own = None if role == "target" else self.reference
        return [one.ids for one in own or self.encoded]


def wanted_attacks(job: AuditJob) -> list[Attack]:
    """Returns the attacks that a job names, and those on all texts that the folder holds already.

    The latter are scored again, since a new prefix changes what they see.
    """
    before = read_manifest(job.out) or {}
    return attack_suite.select([*job.attacks, *before.get("corpus_attacks", [])])


def read_inputs(job: AuditJob) -> Inputs:
    """Reads texts and tokenizers and opens the model folders; loads no weights.

    Raises:
      DataError, ModelError, UsageError: what is wrong, where, and what to do.
    """
    texts = collect(job.texts.texts[: job.limit])
    if job.split is not None:
        require_split(job.split, texts.texts, job.limit)
    texts = with_control(texts, job.control)
    models = open_models(job, texts.texts)
    return Inputs(_windows(job, texts.texts, models.tokenizer), *models)


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


# --- attacks and prefixes ------------------------------------------------------------------------


def choose_attacks(job: AuditJob, wanted: Sequence[Attack], inputs: Inputs) -> Chosen:
    """Chooses the prefixes, the attacks that this run can compute, and says why not the others.

    Raises:
      UsageError: attacks that were asked for by name cannot be computed, or none can.
    """
    before = (read_manifest(job.out) or {}).get("prefix_classes", [])
    kind = inputs.roles["target"].folder.model.kind
    fit = [a for a in wanted if _fits(a, kind) and not obstacle(a, job.settings, inputs.references)]
    prefixes = choose_prefixes(job, fit, inputs.texts, before)
    reasons = {a.name: _obstacle(a, job.settings, inputs, prefixes) for a in wanted}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    chosen = [attack for attack in wanted if attack.name not in left_out]
    if refused := [name for name in left_out if name in job.attacks]:
        usual = attack_suite.select(["all"])
        able = [a.name for a in usual if not _obstacle(a, job.settings, inputs, prefixes)]
        reason = left_out[refused[0]]
        same = ", ".join(f"'{name}'" for name in refused if left_out[name] == reason)
        raise UsageError(
            f"attack{'s' * (',' in same)} {same} cannot be computed here: {reason}; these can: "
            f"{', '.join(able) or 'none'}"
        )
    if not chosen:
        raise UsageError("none of the attacks can be computed here")
    return Chosen(chosen, left_out, prefixes)


def choose_prefixes(
    job: AuditJob, wanted: Sequence[Attack], texts: list[Text], taken_before: Sequence[str]
) -> Prefixes:
    """Takes prefixes from `--prefixes`, else a few texts of each class that an attack can read.

    Which ones depends on the seed and their ids alone. Classes that an earlier part of this run
    took prefixes from (`taken_before`) stay without them. Raises `UsageError` if `--prefixes` has
    fewer texts of a class than are read.
    """
    shots = job.settings.prefix.shots
    pools = {name: _prefix_pool(job, texts, label) for name, label in _CLASSES.items()}
    possible = frozenset(name for name, pool in pools.items() if pool)
    read = [_contexts(attack, job.settings) for attack in wanted]
    classes = set(taken_before).union(*(one for one in read if one <= possible))
    found = {name: pools[name] for name in _CLASSES if name in classes & possible}
    if lacking := [(name, pool) for name, pool in found.items() if len(pool) < shots]:
        (name, pool), *_ = lacking
        raise UsageError(
            f"--prefixes holds {len(pool)} texts of the class {name}, but prefix.shots is {shots}; "
            f"give as many, or --set prefix.shots={len(pool)}"
        )
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
    attack: Attack, settings: AuditSettings, inputs: Inputs, prefixes: Prefixes
) -> str | None:
    """Says why an attack cannot be computed; None if it can."""
    kind, texts = inputs.roles["target"].folder.model.kind, inputs.texts
    if not _fits(attack, kind):
        return f"it is defined for {' and '.join(attack.kinds)} models, this one is {kind}"
    if reason := obstacle(attack, settings, inputs.references):
        return reason
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
    own = None
    if inputs.reference_tokenizer is not None:
        own = inputs.reference_tokenizer.encode(contents, settings.max_length)
    for role in inputs.roles.values():
        read = encoded if own is None or role.name == "target" else own
        require_context(read, [role.folder], settings)
    views = [original_view(e, settings, shift=inputs.shift) for e in encoded]
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
    return Tokenised(encoded, views, table_of(scored), replayed, own)


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
        inputs.shift,
        min(folder.max_length for folder in folders),
        folders[0].model.mask_id,
        inputs.reference_tokenizer,
    )
