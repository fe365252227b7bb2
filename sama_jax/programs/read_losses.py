"""Reads the token losses that an audit has stored, as arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from sama_jax import attacks as attack_suite
from sama_jax.arrays import ProbePlan
from sama_jax.engine.plans import PLAN_ROWS
from sama_jax.engine.readings import Readings
from sama_jax.engine.tasks import ROLES, tasks_of
from sama_jax.errors import UsageError
from sama_jax.programs.stored import Stored, open_stored, store_of
from sama_jax.storage.loss_store import LossStore


class Losses(NamedTuple):
    """What an attack's passes read of `n` texts, in the order of scores.jsonl."""

    ids: list[str]
    labels: Int[np.ndarray, " n"]
    """1 member, 0 not, -1 unknown."""
    target: Float[np.ndarray, "n t l"]
    """float32, nats; NaN where nothing was read, as everywhere in a text that was not scored."""
    reference: Float[np.ndarray, "n t l"]
    """All NaN for an attack that does without."""
    plan: ProbePlan
    """Which tokens each pass masks and reads, its weights and subsets: host arrays [n, ...]."""


def read_losses(run: Path, attack: str = "sama") -> Losses:
    """Reads the losses behind an attack of a finished audit, without a model.

    `sign_statistics(found.target, found.reference, found.plan)` gives SAMA's scores again.

    Args:
      run: the audit's folder.
      attack: one that reads the texts themselves under masks: `sama`, `ratio`, `complement` ...

    Raises:
      DataError: no folder of an audit, or a damaged one.
      UsageError: the audit has no such attack, or its passes follow no plan.
    """
    stored = open_stored(run)
    if attack not in (known := stored.manifest.get("attacks") or []):
        raise UsageError(f"{run}: has no attack '{attack}'; it has {', '.join(known)}")
    if stored.manifest["run"].get("reference_tokenizer"):
        raise UsageError(f"{run}: compared spans of two tokenizers; its losses share no tokens")
    readings = readings_of(stored, [attack])
    task = next((t for t in readings.tasks.all if t.view == "text" and t.source is not None), None)
    if task is None or stored.manifest["run"].get("plan"):
        why = "replays a plan file" if task else "reads no masked text by a plan of its own"
        raise UsageError(f"{run}: '{attack}' {why}, so its losses have no plan")
    rows, plans = range(readings.num_texts), list[ProbePlan]()
    found: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    for start in rows[::PLAN_ROWS]:
        own = rows[start : start + PLAN_ROWS]
        plans.append(ProbePlan(*(np.asarray(x)[: len(own)] for x in readings.plan(task, own))))
        for role, values in found.items():
            values.append(readings.values(task, own, role)[: len(own)])
    plan = jax.tree.map(lambda *parts: np.concatenate(parts), *plans)
    labels = [-1 if row.get("label") is None else row["label"] for row in stored.rows]
    target, reference = (np.concatenate(found[role]) for role in ROLES)
    ids = [row["id"] for row in stored.rows]
    return Losses(ids, np.array(labels, np.int32), target, reference, plan)


def readings_of(stored: Stored, attacks: Sequence[str]) -> Readings:
    """Opens the stored losses of some attacks; nothing is written."""
    keys = stored.manifest["store_keys"]
    store = LossStore(store_of(stored.path, stored.manifest), writes=False)
    tasks = tasks_of(attack_suite.select(attacks), stored.settings, keys)
    return Readings(tasks, stored.settings, stored.tables, keys, store)
