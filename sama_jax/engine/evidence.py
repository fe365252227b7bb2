"""Sums up what both models gave for each text, for the gates that look at losses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sama_jax.engine.plans import PLAN_ROWS
from sama_jax.engine.readings import Readings
from sama_jax.engine.tasks import ROLES, SPANS, Task

SAME_NATS = 1e-4
"""Losses that differ by less are called equal. Those of one model from two batch shapes differ by
about 1e-5 in float32, those of the demo's two models by .2 in the median."""
DENSITY_TEXTS = 256
"""Texts whose masks are drawn again to see how dense they are. All of 10,000 would take 7 s, as
long as scoring them."""


class Evidence(NamedTuple):
    """What was read of each text, over all masked positions of all passes.

    Positions are tokens, or the spans that tokens of two tokenizers make up.
    """

    target: Float[np.ndarray, " n"]
    """Mean loss in nats; NaN where nothing was read."""
    reference: Float[np.ndarray, " n"]
    same: Float[np.ndarray, " n"]
    """Share of positions at which both models give the same loss."""
    differences: Float[np.ndarray, "n t"]
    """Mean loss of the reference minus that of the target in each pass, NaN where none was read."""
    densities: Float[np.ndarray, " t"]
    """Share of a text's tokens that each pass masks, on average over the first texts; NaN where
    there is no plan."""
    references: Mapping[str, Float[np.ndarray, " n"]] = MappingProxyType({})
    """Role -> mean loss of each of several references, whose mean `reference` is."""
    pairs: Mapping[tuple[str, str], Float[np.ndarray, " n"]] = MappingProxyType({})
    """Two roles -> share of positions at which they give the same loss, if there are several."""

    def of(self, rows: Sequence[int]) -> "Evidence":
        """Returns what was read of some texts; densities stay those of all."""
        at = list(rows)
        return Evidence(
            self.target[at],
            self.reference[at],
            self.same[at],
            self.differences[at],
            self.densities,
            {role: losses[at] for role, losses in self.references.items()},
            {roles: shares[at] for roles, shares in self.pairs.items()},
        )


def gather_evidence(readings: Readings) -> Evidence:
    """Reads the losses of the first passes that both models made over the texts themselves.

    Where no attack reads both models, those of the first that reads one; the rest is NaN.
    """
    found = np.full((3, readings.num_texts), np.nan)
    task = _widest(readings)
    passes = task.rows if task else 0
    several = list(readings.store_keys) if len(readings.store_keys) > 2 else []
    means = {role: np.full(readings.num_texts, np.nan) for role in several}
    pairs = {two: np.full(readings.num_texts, np.nan) for two in combinations(several, 2)}
    differences, masked = np.full((2, readings.num_texts, passes), np.nan)
    for start in range(0, readings.num_texts if task else 0, PLAN_ROWS):
        assert task is not None
        rows = range(start, min(start + PLAN_ROWS, readings.num_texts))
        target, reference = (
            readings.values(task, rows, role)[: len(rows)].astype(np.float64) for role in ROLES
        )
        for number, values in enumerate((target, reference)):
            found[number, rows] = _means(values)
        found[2, rows] = _same(target, reference)
        alone = {role: _of_model(readings, role, task, rows) for role in several}
        for role, values in alone.items():
            means[role][rows] = _means(values)
        for (one, other), shares in pairs.items():
            shares[rows] = _same(alone[one], alone[other])
        differences[rows] = _means(reference - target, axes=2)
        if task.source is not None and start < DENSITY_TEXTS:
            counts = np.asarray(readings.plan(task, rows).masks)[: len(rows)].sum(axis=2)
            tokens = readings.tables[task.view].num_tokens[rows.start : rows.stop, None]
            masked[rows] = np.where(tokens > 0, counts / np.maximum(tokens, 1), np.nan)
    densities, references = _means(masked.T, axes=1), {r: means[r] for r in several[1:]}
    return Evidence(found[0], found[1], found[2], differences, densities, references, pairs)


def _of_model(
    readings: Readings, role: str, task: Task, rows: Sequence[int]
) -> Float[np.ndarray, "b t l"]:
    """Reads the losses of one model, which a mean of several hides."""
    alone = replace(readings, store_keys={"target": readings.store_keys[role]})
    return alone.values(task, rows, "target")[: len(rows)].astype(np.float64)


def _same(one: Float[np.ndarray, "b t l"], other: Float[np.ndarray, "b t l"]) -> np.ndarray:
    """Returns the share of each text's positions at which two models give the same loss."""
    gaps = abs(one - other)
    return _means(np.where(np.isnan(gaps), np.nan, gaps < SAME_NATS))


def differences_by_token(readings: Readings, row: int) -> Float[np.ndarray, " l"]:
    """Averages a text's loss differences, token by token, over all passes that both models made.

    Returns:
      float64 [max_length], reference minus target in nats; NaN for a token that no pass read.
    """
    total, count = np.zeros((2, readings.settings.max_length))
    for task in readings.tasks.all:
        if task.view == "text" and all("nll" in task.channels.get(role, ()) for role in ROLES):
            target, reference = (
                readings.values(task, [row], role)[0].astype(np.float64) for role in ROLES
            )
            read = ~np.isnan(reference - target)
            total += np.where(read, reference - target, 0).sum(axis=0)
            count += read.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _widest(readings: Readings) -> Task | None:
    """Returns the first task on the texts themselves with the losses of most models."""
    tasks = [
        (sum("nll" in channels for channels in task.channels.values()), task)
        for task in readings.tasks.all
        if task.view in ("text", SPANS.name)
    ]
    most = max((count for count, _ in tasks), default=0)
    return next((task for count, task in tasks if count == most > 0), None)


def _means(
    values: Float[np.ndarray, "..."], axes: int | tuple[int, int] = (1, 2)
) -> Float[np.ndarray, "..."]:
    """Averages what is a number; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=axes)
    return np.where(
        count > 0, np.where(known, values, 0).sum(axis=axes) / np.maximum(count, 1), np.nan
    )
