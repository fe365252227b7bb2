"""Scores what the loss store holds, and appends the scores to a run's folder."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sama_jax.attacks.queries import CorpusReading
from sama_jax.attacks.registry import Attack
from sama_jax.core import votes
from sama_jax.engine.plans import PLAN_ROWS
from sama_jax.engine.readings import Readings
from sama_jax.engine.tasks import passes
from sama_jax.storage.run_folder import RunFolder


def score_rows(
    readings: Readings,
    folder: RunFolder,
    ids: Sequence[str],
    rows: Iterable[int],
    *,
    include_votes: bool = False,
) -> None:
    """Appends the scores of single texts that the store allows for and the folder lacks.

    Args:
      readings: the run's texts and what is stored.
      folder: where the scores go.
      ids: of all texts of the run.
      rows: the texts to be looked at.
      include_votes: append SAMA's step votes as well.
    """
    plain = [a for a in readings.tasks.attacks if a.corpus is None]
    usable = {a.name: readings.usable(a) for a in plain}
    # A view that is not made yet is not missing: its attacks are scored later.
    made = [a for a in plain if _views(readings, a) <= readings.tables.keys()]
    rows = list(rows)
    todo: dict[int, list[Attack]] = {}
    for attack in made:
        votes_too = include_votes and attack.name == "sama"
        left = [
            row
            for row in rows
            if not folder.has_scores(ids[row], [attack.name])
            or (votes_too and not folder.has_votes(ids[row]))
        ]
        ready = readings.ready(attack, left)
        for row in left:
            if row in ready or not usable[attack.name][row]:
                todo.setdefault(row, []).append(attack)
    order = [row for row in dict.fromkeys(rows) if row in todo]
    for start in range(0, len(order), PLAN_ROWS):
        chunk = order[start : start + PLAN_ROWS]
        wanted = [a for a in plain if any(a in todo[r] for r in chunk)]
        scores = readings.statistics(wanted, chunk)
        details = None
        if include_votes and any(a.name == "sama" for a in wanted):
            details = step_votes(readings, chunk)
        lines = []
        for i, row in enumerate(chunk):
            values = {
                a.name: float(scores[a.name][i]) if usable[a.name][row] else None for a in todo[row]
            }
            line = _line(readings, ids[row], values)
            if details is not None and values.get("sama") is not None:
                line["votes"] = details[i]
            lines.append(line)
        folder.append_scores(lines)


def _views(readings: Readings, attack: Attack) -> set[str]:
    return {query.view_name for query in readings.tasks.queries[attack.name].values()}


def _line(readings: Readings, text_id: str, values: dict[str, float | None]) -> dict[str, Any]:
    """Makes a line of scores; None: the attack cannot read the text, which costs no pass."""
    line: dict[str, Any] = {"id": text_id, "scores": {}, "passes": {}}
    attacks = {a.name: a for a in readings.tasks.attacks}
    for name, value in values.items():
        finite = value is not None and bool(np.isfinite(value))
        line["scores"][name] = value if finite else None
        count = max(passes(attacks[name], readings.settings).values())
        line["passes"][name] = 0 if value is None else count
        if not finite:
            line.setdefault("undefined", {})[name] = attacks[name].undefined
    return line


def step_votes(readings: Readings, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Returns SAMA's step votes, weights and tie rate of up to `PLAN_ROWS` texts."""
    task = readings.tasks.first("sama")
    reading = readings.reading(task, next(iter(readings.tasks.queries["sama"].values())), rows)
    details = votes.batch_sign_statistics(
        jnp.asarray(reading.target),
        jnp.asarray(reading.reference),
        reading.plan,
        ties=readings.settings.sama.ties,
    )
    return [
        {
            "step_votes": np.asarray(details.step_votes[i]).tolist(),
            "step_weights": np.asarray(details.step_weights[i]).tolist(),
            "tie_rate": float(details.tie_rate[i]),
        }
        for i in range(len(rows))
    ]


def score_corpus(
    readings: Readings,
    folder: RunFolder,
    ids: Sequence[str],
    texts: Sequence[str] | None,
    labels: Int[np.ndarray, " n"] | None,
) -> None:
    """Appends the scores of attacks that look at all texts together, where they are new.

    They are computed each time, since a text that has become a prefix changes those of others.

    Args:
      readings: the run's texts and what is stored.
      folder: where the scores go.
      ids: of all texts of the run.
      texts: the texts themselves; None leaves out the attacks that read them.
      labels: 1 member, 0 not, -1 unknown; None without labels.
    """
    for attack in readings.tasks.attacks:
        if attack.corpus is None or (attack.needs_texts and texts is None):
            continue
        usable = np.flatnonzero(readings.usable(attack)).tolist()
        parts = np.zeros((len(usable), 0), np.float32)
        if attack.statistic is not None and usable:
            chunks = [usable[s : s + PLAN_ROWS] for s in range(0, len(usable), PLAN_ROWS)]
            found = [readings.statistics([attack], c)[attack.name] for c in chunks]
            parts = np.concatenate(found).reshape(len(usable), -1)
        # Texts that serve as prefixes are not usable, and need no label.
        known = None if labels is None or (labels[usable] < 0).any() else labels[usable]
        given = None if texts is None else [texts[row] for row in usable]
        corpus = CorpusReading(parts, given, known)
        values = np.full(len(ids), np.nan)
        if usable:
            values[usable] = attack.corpus(corpus, readings.settings)
        lines = []
        for text_id, value in zip(ids, values):
            score = float(value) if np.isfinite(value) else None
            if not folder.has_scores(text_id, [attack.name], [score]):
                lines.append(_line(readings, text_id, {attack.name: score}))
        if lines:
            folder.append_scores(lines)
