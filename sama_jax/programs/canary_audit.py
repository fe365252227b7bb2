"""Bounds epsilon by the scores of canaries in a finished audit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from jaxtyping import Bool, Float

from sama_jax.core import metrics
from sama_jax.core.epsilon import epsilon_bound
from sama_jax.errors import DataError
from sama_jax.programs.calibrate import identity_of, read_run, require_alone, require_sound
from sama_jax.storage.canary_file import TEXTS, CanaryKey, read_key
from sama_jax.storage.files import MADE_BY, require_free, write_json
from sama_jax.storage.run_folder import Row
from sama_jax.texts.read import content_id
from sama_jax.validity import bounds

CONFIDENCE = 0.95
NOT_ASKED = frozenset({"reference_learnt", "target_learnt", "blind"})
"""The first two ask whether a model predicts texts better than the frequencies of their tokens do:
of random tokens none does, and of texts sampled at a high temperature few do. `blind` asks whether
the sides were drawn from one source, which the coins have done."""
ENOUGH = 10
"""Canaries of a side, below which that p-value is hardly possible: with 7 of each it is 1/3432."""
_AUDIT = "sama-jax canary audit"


def run_canary_audit(
    run_folder: Path, folder: Path, out: Path, *, delta: float = 1e-5
) -> tuple[dict[str, Any], list[str]]:
    """Bounds epsilon from the scores of canaries in a finished audit, and writes the bounds.

    Args:
      run_folder: the audit of all canaries, included and held out.
      folder: of `run_make`.
      out: a JSON file.
      delta: of the (epsilon, delta) that is bounded.

    Returns:
      what was written, and sentences that say it.

    Raises:
      UsageError: not a finished audit, without the attack or the name of its code, or
        `jax_privacy` is not installed.
      DataError: canaries are missing, without a score, or with the label of the other side.
      ValidityError: the audit is void for another reason than what canaries are.
    """
    require_free(out, _AUDIT)
    key, run = read_key(folder), read_run(run_folder)
    name = require_alone(key.attack, run).name
    require_sound(run_folder, but_for=NOT_ASKED)
    scores = _scores(run_folder, name, run.rows, key)
    included = np.array([one.included for one in key.canaries])
    copies = np.array([one.copies for one in key.canaries])
    every = np.ones(len(scores), bool)
    tiers = sorted(set(copies.tolist()))
    content: dict[str, Any] = {
        MADE_BY: _AUDIT,
        "attack": name,
        "delta": delta,
        "confidence": CONFIDENCE,
        "all": _bounds(scores, included, every, 1 - CONFIDENCE, delta, key.seed),
        # All of them hold together with the confidence (Bonferroni).
        "by_copies": {
            str(n): _bounds(
                scores, included, copies == n, (1 - CONFIDENCE) / len(tiers), delta, key.seed
            )
            for n in tiers
        },
        "canaries": key.about,
        "run": identity_of(run_folder, run, name),
        "same_code": run.codes[name] == key.about.get("code"),
    }
    write_json(out, content)
    return content, _sentences(content)


def _scores(
    where: Path, attack: str, rows: Sequence[Row], key: CanaryKey
) -> Float[np.ndarray, " n"]:
    """Returns the scores of canaries in their order. Raises `DataError` unless all have one."""
    of_id = {row["id"]: row for row in rows}
    found = [of_id.get(one.sha256[: len(content_id(""))]) for one in key.canaries]
    missing = sum(row is None for row in found)
    scores = [(row or {}).get("scores", {}).get(attack) for row in found]
    unscored = sum(score is None for score in scores) - missing
    other = sum(
        row is not None and row.get("label") not in (None, int(one.included))
        for row, one in zip(found, key.canaries)
    )
    if missing or unscored or other:
        raise DataError(
            f"{where}: of {len(found)} canaries {missing} are not in this audit, {unscored} have "
            f"no score of {attack} and {other} have the label of the other side; audit the whole "
            f"{TEXTS}: leaving some out could make any bound"
        )
    return np.array(scores, np.float64)


def _bounds(
    scores: Float[np.ndarray, " n"],
    included: Bool[np.ndarray, " n"],
    chosen: Bool[np.ndarray, " n"],
    significance: float,
    delta: float,
    seed: int,
) -> dict[str, Any]:
    """Returns what some of the canaries show."""
    inside, outside = scores[chosen & included], scores[chosen & ~included]
    bound = epsilon_bound(inside, outside, significance=significance, delta=delta, seed=seed)
    found: dict[str, Any] = {
        "included": len(inside),
        "held_out": len(outside),
        "significance": significance,
        "epsilon": bound.epsilon,
        "largest_possible": bound.largest,
        "auc": None,
    }
    if len(inside) and len(outside):
        values, labels = scores[chosen], included[chosen].astype(int)
        found["auc"] = metrics.auc(values, labels)
        found["auc_ci"] = list(metrics.auc_interval(values, labels))
        found["p"] = float(scipy.stats.mannwhitneyu(inside, outside, alternative="greater").pvalue)
    return found


def _sentences(content: dict[str, Any]) -> list[str]:
    """Says what was found, and what it means."""
    every, tiers = content["all"], content["by_copies"]
    percent = f"{100 * content['confidence']:g} %"
    if every["epsilon"] > 0:
        first = (
            f"If this training was (epsilon, {content['delta']:g})-private for adding or removing "
            f"one canary with all its copies, epsilon is at least {every['epsilon']:.2f}, with "
            f"{percent} confidence."
        )
    else:
        first = f"No epsilon above 0 is shown, at {percent} confidence."
    lines = [
        first,
        f"{every['included']} included and {every['held_out']} held-out canaries can show at most "
        f"{every['largest_possible']:.2f}, with every guess right.",
        f"It is a lower bound, by the scores of {content['attack']} and from this one training: a "
        "small one proves nothing.",
    ]
    if not content["same_code"]:
        lines.append(
            f"The code of {content['attack']} is another one than when the canaries were made: if "
            "it was changed after scores of theirs were seen, this bounds nothing."
        )
    if len(tiers) > 1:
        lines.append(f"By copies, each the bound for a group of so many; together at {percent}:")
        lines += [f"  {n:>4}: {_tier(one)}" for n, one in tiers.items()]
    most = max(tiers, key=int)
    return lines if int(most) == 1 else [*lines, control(most, tiers[most])]


def control(copies: str, one: dict[str, Any]) -> str:
    """Says whether the canaries with most copies, which should be found, were found."""
    if min(one["included"], one["held_out"]) < ENOUGH:
        return f"There are too few canaries of {copies} copies to say whether they are found."
    p = f"(p = {one['p']:.2g})"
    if one["p"] <= bounds.CONTROL_P:
        return f"Control: canaries that stand there {copies} times were found {p}."
    return (
        f"Control: canaries that stand there {copies} times were not found {p}: this attack is "
        "blind here, which says nothing of privacy."
    )


def _tier(one: dict[str, Any]) -> str:
    """Says what the canaries of one number of copies show."""
    counts = f"{one['included']} included, {one['held_out']} held out"
    if one["auc"] is None:
        return counts
    low, high = one["auc_ci"]
    return (
        f"epsilon at least {one['epsilon']:.2f} of {one['largest_possible']:.2f} possible, AUC "
        f"{one['auc']:.3f} ({low:.3f} to {high:.3f}); {counts}"
    )
