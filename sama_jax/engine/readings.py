"""Reads what the loss store holds for the texts of a run, and computes statistics from it.

No model and no device list: forward passes fill the store (`loop`), scores come out of it here,
so that a new statistic on an old store costs no pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from sama_jax.arrays import ProbePlan, Reading
from sama_jax.attacks.queries import Query, flatten
from sama_jax.attacks.registry import Attack
from sama_jax.config import AuditSettings
from sama_jax.engine.plans import PLAN_ROWS, PlanCache
from sama_jax.engine.tasks import ROLES, Task, Tasks, models_of
from sama_jax.engine.text_table import TextTable
from sama_jax.errors import DataError
from sama_jax.storage.loss_store import LossStore


@dataclass(frozen=True)
class Readings:
    """What the texts, tasks and loss store of a run say together."""

    tasks: Tasks
    settings: AuditSettings
    tables: Mapping[str, TextTable]
    """View -> its texts. A view whose guide has not been read yet is missing."""
    store_keys: Mapping[str, str]
    """Role -> the name of that model's losses in the store."""
    store: LossStore
    plans: PlanCache = field(default_factory=PlanCache)

    @property
    def num_texts(self) -> int:
        """Texts of the run."""
        return self.tables["text"].num_texts

    def with_view(self, name: str, table: TextTable) -> "Readings":
        """Returns the same with one more view."""
        return replace(self, tables={**self.tables, name: table})

    # --- what is stored --------------------------------------------------------------------------

    def missing(self, task: Task, role: str, text: str) -> tuple[str, ...]:
        """Returns the channels of a task that are not stored yet for a text.

        Args:
          task: what is read.
          role: from which model.
          text: the text's key in the store.
        """
        key, known = self.store_keys[role], self.store.exists
        return tuple(c for c in task.channels[role] if not known(key, task.stored(c), text))

    def lacks(self, task: Task, text: str) -> bool:
        """Tells whether anything of a task is missing for a text, in any process."""
        return any(self.missing(task, role, text) for role in task.channels)

    def usable(self, attack: Attack) -> Bool[np.ndarray, " n"]:
        """Tells which texts have every view that an attack reads, each with a maskable token."""
        names = {"text", *(q.view_name for q in flatten(dict(self.tasks.queries[attack.name])))}
        if not names <= self.tables.keys():
            return np.zeros(self.num_texts, bool)
        return np.logical_and.reduce([self.tables[name].readable for name in names])

    def ready(self, attack: Attack, rows: Iterable[int]) -> set[int]:
        """Returns those of some usable texts of which all that the score needs can be read here."""
        left = list(rows)
        for task in self.tasks.needed_by(attack.name):
            if task.view not in self.tables:
                return set()
            keys, exists = self.tables[task.view].store_keys, self.tables[task.view].exists
            stored = [
                self.store.texts(self.store_keys[role], task.stored(channel))
                for role, channels in task.channels.items()
                for channel in channels
            ]
            left = [row for row in left if exists[row] and all(keys[row] in s for s in stored)]
        return set(left)

    def values(
        self, task: Task, rows: Sequence[int], role: str, channel: str = "nll"
    ) -> Float[np.ndarray, "b t l"]:
        """Reads stored values of up to `PLAN_ROWS` texts, NaN where nothing is stored.

        Of several references, the values are their mean.

        Returns:
          float32 [PLAN_ROWS, task.rows, max_length].
        """
        shape = PLAN_ROWS, task.rows, self.settings.max_length
        out = np.full(shape, np.nan, np.float32)
        # In the order of their keys, which their contents give: sums then have the same bits.
        models = sorted(self.store_keys[one] for one in models_of(role, self.store_keys))
        name, keys = task.stored(channel), self.tables[task.view].store_keys
        for i, row in enumerate(rows):
            text = keys[row]
            if text and models and all(self.store.has(key, name, text) for key in models):
                found = [self.store.read(key, name, text).dense(shape[-1]) for key in models]
                out[i] = found[0] if len(found) == 1 else np.mean(found, axis=0)
        return out

    def plan(self, task: Task, rows: Sequence[int]) -> ProbePlan:
        """Returns the plans of up to `PLAN_ROWS` texts, filled up with empty rows (host)."""
        known = self.plans.get(task.view, task.identity, rows)
        if known is not None:
            return known
        assert task.source is not None, "procedures have no plan"
        guide = None
        if task.guide is not None and task.query.guides_probes:
            guide = self.values(task.guide, rows, next(iter(task.guide.channels)))
        drawn = task.source.plans(self.tables[task.view], rows, guide)
        return self.plans.put(task.view, task.identity, rows, drawn)

    # --- readings and scores ---------------------------------------------------------------------

    def reading(self, task: Task, query: Query, rows: Sequence[int]) -> Reading:
        """Makes a batch of `PLAN_ROWS` readings of one task (host)."""
        some = self.tables[task.view].take([*rows, *[-1] * (PLAN_ROWS - len(rows))])
        unread = np.full((PLAN_ROWS, task.rows, self.settings.max_length), np.nan, np.float32)
        found = {
            role: [
                self.values(task, rows, role, channel)
                if role in task.channels and role in query.roles
                else unread
                for channel in query.channels
            ]
            for role in ROLES
        }
        target, reference = (found[role] for role in ROLES)
        if task.source is None:
            plan = _read_anywhere(target[0], reference[0])
        else:
            plan = self.plan(task, rows)
            for role in query.roles:
                for values in found[role]:
                    _require_planned(values[: len(rows)], np.asarray(plan.scored)[: len(rows)])
        return Reading(
            target[0],
            reference[0],
            plan,
            some.num_tokens,
            some.zlib_bytes,
            some.characters,
            dict(zip(query.channels[1:], target[1:])),
            dict(zip(query.channels[1:], reference[1:])),
        )

    def statistics(self, attacks: Sequence[Attack], rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Computes every attack's statistic of up to `PLAN_ROWS` texts: [rows] or [rows, parts]."""
        read: dict[tuple[str, str, Query], Reading] = {}

        def reading(attack: Attack, name: str) -> Reading:
            task = self.tasks.task_of[attack.name, name]
            query = self.tasks.queries[attack.name][name]
            at = task.view, task.identity, replace(query, view=None, guide=None)
            if at not in read:
                read[at] = self.reading(task, query, rows)
            return read[at]

        # Statistics never see the seed; without it they are compiled once for all seeds.
        settings, found = replace(self.settings, seed=0), {}
        for attack in attacks:
            if attack.statistic is not None:
                first, *rest = self.tasks.queries[attack.name]
                own = reading(attack, first)._replace(views={n: reading(attack, n) for n in rest})
                found[attack.name] = statistic(attack, settings, own)
        # One is computed while the next one's readings are made.
        return {name: np.asarray(values)[: len(rows)] for name, values in found.items()}


def _require_planned(values: Float[np.ndarray, "b t l"], scored: Bool[np.ndarray, "b t l"]) -> None:
    """Raises `DataError` unless what is stored of each text stands where its plan scores.

    A text of which nothing is stored is not scored, whatever its plan.
    """
    read = ~np.isnan(values)
    stored = read.any(axis=(1, 2))
    if (read[stored] != scored[stored]).any() or not np.isfinite(values[read]).all():
        raise DataError(
            "the loss store holds values of other positions than the plans score, or that are not "
            "finite: texts.jsonl or the store is damaged, or made by another version; give --out "
            "(and --store) a new folder"
        )


def _read_anywhere(
    target: Float[np.ndarray, "b t l"], reference: Float[np.ndarray, "b t l"]
) -> ProbePlan:
    """Makes the plan that a procedure's values stand for: all that was read, each pass alike."""
    read = ~np.isnan(target) | ~np.isnan(reference)
    shape = read.shape[:2]
    subsets = np.zeros((*shape, 0, 1), np.int32)
    return ProbePlan(read, read, np.ones(shape, np.float32), subsets)


@partial(jax.jit, static_argnums=(0, 1))
def statistic(attack: Attack, settings: AuditSettings, readings: Reading) -> Float[Array, "b ..."]:
    """Computes an attack's statistic of a batch of texts from their readings.

    One program an attack, so that a score's bits do not depend on which others are computed.
    """
    function = attack.statistic
    assert function is not None
    return jax.vmap(lambda reading: function(reading, settings))(readings)
