"""Turns the queries of the chosen attacks into tasks: the passes to be made, each once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sama_jax.attacks.queries import Probes, Procedure, Query, View, flatten
from sama_jax.attacks.registry import Attack
from sama_jax.attacks.views import SharedSpans
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.engine.plans import DrawnPlans, PlanSource, ReplayedPlans
from sama_jax.errors import UsageError

ROLES = ("target", "reference")
"""What a reading holds losses of. Several references of a run are `reference`, `reference2`, ..."""


class Task(NamedTuple):
    """One set of forward passes over one view of the texts, shared by all attacks that need it."""

    view: str
    identity: str
    """Names its losses in the store; other channels add `:channel`."""
    query: Query
    channels: Mapping[str, tuple[str, ...]]
    """Role -> what is read from that model."""
    guide: "Task | None"
    """What has to be read before: its values make the masks, or the view."""
    source: PlanSource | None
    """Where its plans come from; None: it runs `procedure` instead."""
    procedure: Procedure | None
    passes: int
    """Forward passes of a model on a text."""
    rows: int
    """The t of a reading."""

    def stored(self, channel: str) -> str:
        """Returns the plan's name in the store for one channel."""
        return self.identity if channel == "nll" else f"{self.identity}:{channel}"

    @property
    def guides_view(self) -> bool:
        """Whether the guide makes the view, not the masks."""
        return self.guide is not None and self.query.view is not None


class Tasks(NamedTuple):
    """All tasks of a run, and which query of which attack reads which."""

    attacks: tuple[Attack, ...]
    queries: Mapping[str, Mapping[str, Query]]
    """Attack -> its queries by name; the first is the reading itself."""
    task_of: Mapping[tuple[str, str], Task]
    """(attack, name of the query) -> task."""
    all: tuple[Task, ...]
    """Each once, guides before what they guide."""
    views: Mapping[str, View | None]
    """Name -> view, in the order in which they are read; `text` is the text itself."""

    def first(self, attack: str) -> Task:
        """Returns the task behind an attack's first query."""
        return self.task_of[attack, next(iter(self.queries[attack]))]

    def needed_by(self, attack: str) -> list[Task]:
        """Returns the tasks that an attack's score needs, guides included."""
        tasks = [self.task_of[attack, name] for name in self.queries[attack]]
        return tasks + [t.guide for t in tasks if t.guide is not None]

    def of_view(self, view: str) -> list[Task]:
        """Returns the tasks of one view, guides first."""
        guides = {t.guide.identity for t in self.all if t.guide is not None}
        tasks = [t for t in self.all if t.view == view]
        return sorted(tasks, key=lambda t: t.identity not in guides)


def tasks_of(
    attacks: Sequence[Attack],
    settings: AuditSettings,
    store_keys: Mapping[str, str],
    replayed: ReplayedPlans | None = None,
    *,
    own_tokenizer: bool = False,
) -> Tasks:
    """Collects what the attacks read; queries that read the same passes share a task.

    Args:
      attacks: the chosen ones.
      settings: the audit's.
      store_keys: role -> the name of that model's losses in the store.
      replayed: plans that SAMA uses instead of its own.
      own_tokenizer: whether the reference has other tokens than the target: what is read of both
        is then read by the spans that they share.

    Raises:
      UsageError: plans are replayed, but SAMA is not among the attacks.
    """
    known: dict[tuple[str, str], Task] = {}

    def add(query: Query, attack: Attack) -> tuple[str, str]:
        guide = None if query.guide is None else known[add(query.guide, attack)]
        replays = replayed if attack.name == "sama" else None
        task = _task(query, guide, settings, store_keys, replays)
        at = task.view, task.identity
        if at in known:
            task = task._replace(channels=_merged(known[at].channels, task.channels))
        known[at] = task
        return at

    queries = {a.name: dict(a.queries(settings)) for a in attacks}
    if own_tokenizer:
        queries = {a: {n: _by_spans(q) for n, q in of.items()} for a, of in queries.items()}
    places: dict[tuple[str, str], tuple[str, str]] = {}
    views: dict[str, View | None] = {"text": None}
    for attack in attacks:
        for name, query in queries[attack.name].items():
            places[attack.name, name] = add(query, attack)
            views.setdefault(query.view_name, query.view)
    if replayed is not None and not any(t.source is replayed for t in known.values()):
        raise UsageError("--plan replays SAMA's probes, but sama is not among the attacks")
    task_of = {name: known[at] for name, at in places.items()}
    return Tasks(tuple(attacks), queries, task_of, tuple(known.values()), views)


def _by_spans(query: Query) -> Query:
    """Returns what is read of a text by shared spans, if a reference reads it."""
    if "reference" not in query.roles:
        return query
    assert query.view is None, "refused before"
    return replace(query, view=SPANS)


SPANS = SharedSpans()
"""The view that both models read if their tokens differ."""


def _task(
    query: Query,
    guide: Task | None,
    settings: AuditSettings,
    store_keys: Mapping[str, str],
    replayed: ReplayedPlans | None,
) -> Task:
    """Makes the task of one query alone."""
    view = query.view_name
    read = tuple(dict.fromkeys(query.channels))
    channels = {name: read for role in query.roles for name in models_of(role, store_keys)}
    if replayed is not None:
        passes = replayed.plan.masks.shape[1]
        identity = replayed.identity
        return Task(view, identity, query, channels, guide, replayed, None, passes, passes)
    identity = settings_hash(query.identity, settings.seed)
    if guide is not None and query.guides_probes:
        identity = settings_hash(identity, *(store_keys.get(role) for role in guide.channels))
    if isinstance(query.reads, Probes):
        source, procedure = DrawnPlans(query.reads, settings.seed, settings.max_length), None
        passes = rows = query.reads.passes
    else:
        source, procedure = None, query.reads
        passes, rows = procedure.passes, procedure.rows
    return Task(view, identity, query, channels, guide, source, procedure, passes, rows)


def models_of(role: str, names: Iterable[str]) -> list[str]:
    """Returns the models of a run that stand for a role: the target, or all references."""
    return [name for name in names if name.startswith(role)]


def _merged(
    first: Mapping[str, tuple[str, ...]], second: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Joins what two queries read, in the order in which it was asked for."""
    roles = dict.fromkeys([*first, *second])
    return {r: tuple(dict.fromkeys(first.get(r, ()) + second.get(r, ()))) for r in roles}


def stages(tasks: Tasks) -> list[list[Task]]:
    """Splits the tasks so that each stands behind the one whose values it is guided by.

    Inside a stage they stand in the order of the views.
    """
    found: dict[int, list[Task]] = {}
    for view in tasks.views:
        for task in tasks.of_view(view):
            depth, guide = 0, task.guide
            while guide is not None:
                depth, guide = depth + 1, guide.guide
            found.setdefault(depth, []).append(task)
    return [found[depth] for depth in sorted(found)]


def passes(attack: Attack, settings: AuditSettings) -> dict[str, int]:
    """Counts the forward passes of each model that an attack needs for one text by itself."""
    count: dict[str, int] = dict.fromkeys(ROLES, 0)
    for query in flatten(attack.queries(settings)):
        for role in query.roles:
            count[role] += query.passes
    return count
