"""Judges the texts of a finished run by a calibration: p-values, discoveries, one collection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sama_jax.core import conformal
from sama_jax.core.metrics import percent
from sama_jax.errors import DataError, UsageError, ValidityError
from sama_jax.programs.calibrate import (
    FinishedRun,
    identity_of,
    read_run,
    require_alone,
    require_sound,
)
from sama_jax.reporting import results
from sama_jax.storage.calibration_file import (
    DECISIONS,
    SUMMARY,
    Calibration,
    read_calibration,
)
from sama_jax.storage.files import only_writer, write_atomic, write_json
from sama_jax.storage.run_folder import differences, json_lines, record_also
from sama_jax.untrusted import printable
from sama_jax.validity.drift import same_lengths, within_lengths
from sama_jax.validity.gate import Gate, told

ASSUMPTION = (
    "p is the share of held-out texts that look at least as much like members; it is not the "
    "probability that this text was not used. It holds if the text would be one of the held-out "
    "texts, had it not been used: same source, time, kind and length."
)


class Applied(NamedTuple):
    """What was written."""

    summary: dict[str, Any]
    sentences: list[str]


def run_apply(
    folder: Path,
    calibration: Path,
    *,
    fdr: float | None = None,
    smoothed: bool = False,
    collection: bool = False,
) -> Applied:
    """Writes `decisions.jsonl` and `decisions.json` into a run's folder.

    The known members of `--control` are none of the texts that are judged, and a text with fewer or
    more tokens than any that calibrated gets no verdict.

    Args:
      folder: the audit of the texts to be judged, made as the calibrating one was.
      calibration: the file of `calibrate`.
      fdr: flags by Benjamini and Hochberg at this false-discovery rate, not by the threshold.
      smoothed: breaks ties by the text's hash.
      collection: tests all texts together, too, one of each group.

    Raises:
      UsageError: the file was changed, or the run was made otherwise.
      DataError: a text helped to calibrate, or no text has a score.
      ValidityError: these texts are of other lengths, or the result of their run is void.
    """
    run, content = _comparable(folder, calibration)
    name = content["attack"]
    values, _ = results.column(run.rows, name)
    scored = _scored(folder, run, content, values)
    judged, gate = _of_known_lengths(folder, run, content, scored)
    scores, known = values[judged], np.array(content["scores"])
    keys = [run.keys[i] for i in judged]
    broken = conformal.uniform_of(keys, "smoothed") if smoothed else None
    p = conformal.p_values(scores, known, broken)
    flagged = p <= content["rank"] / (len(known) + 1)
    if fdr is not None:
        flagged = conformal.adjusted(p) <= fdr
    summary: dict[str, Any] = {
        "attack": name,
        "calibration": content.get("sha256"),
        "texts": len(judged),
        "of_other_lengths": len(scored) - len(judged),
        "lengths": [content["lengths"][0], content["lengths"][-1]],
        "flagged": int(flagged.sum()),
        "fdr": fdr,
        "fpr": None if fdr is not None else content["fpr"],
        "calibration_texts": len(known),
        "smallest_p_possible": 1 / (len(known) + 1),
        "smoothed": smoothed,
        "gates": [gate],
        "assumption": ASSUMPTION,
    }
    if collection:
        alone = conformal.one_of_each(run.groups[judged], keys)
        tested = conformal.collection_test(scores[alone], known)
        summary["collection"] = tested._asdict() | {"texts": len(alone)}
    lines = _decisions(run, values, judged, p, flagged)
    with only_writer(folder):
        write_atomic(folder / DECISIONS, json_lines(lines))
        write_json(folder / SUMMARY, summary)
        record_also(folder, [DECISIONS, SUMMARY])
    return Applied(summary, _sentences(summary))


def _scored(
    folder: Path, run: FinishedRun, content: Calibration, values: Float[np.ndarray, " n"]
) -> Int[np.ndarray, " k"]:
    """Returns the texts with a score but known members. Raises `DataError` if one calibrated."""
    known_members = np.array([bool(row.get("control")) for row in run.rows])
    scored = np.flatnonzero(np.isfinite(values) & ~known_members)
    if not scored.size:
        raise DataError(f"{folder}: no text has a score of {content['attack']}")
    _require_others(folder, run, content, scored)
    return scored


def _of_known_lengths(
    folder: Path, run: FinishedRun, content: Calibration, scored: Int[np.ndarray, " k"]
) -> tuple[Int[np.ndarray, " j"], Gate]:
    """Returns those of the texts whose lengths calibrated, and the gate on all lengths.

    Raises `ValidityError` if the lengths differ, or none of them calibrated.
    """
    tokens = np.array([run.rows[i].get("n_tokens", 0) for i in scored], np.int64)
    gate = same_lengths(tokens.tolist(), content["lengths"])
    if gate["status"] == "void":
        raise ValidityError(f"{folder}: {told(gate)}")
    judged = scored[within_lengths(tokens, content["lengths"])]
    if not judged.size:
        raise ValidityError(f"{folder}: {_outside(len(scored), content['lengths'])}")
    return judged, gate


def _comparable(folder: Path, calibration: Path) -> tuple[FinishedRun, Calibration]:
    """Reads a run that is not void, and a calibration of runs that were made as it was."""
    run, content = read_run(folder), read_calibration(calibration)
    require_alone(content["attack"], run)
    require_sound(folder)
    _require_same(folder, identity_of(folder, run, content["attack"]), content["identity"])
    return run, content


def _decisions(
    run: FinishedRun,
    values: Float[np.ndarray, " n"],
    judged: Int[np.ndarray, " k"],
    p: Float[np.ndarray, " k"],
    flagged: Bool[np.ndarray, " k"],
) -> list[dict[str, Any]]:
    """Returns a line for each text of a run but known members; without a verdict it says why."""
    found = dict(zip(judged.tolist(), zip(p.tolist(), flagged.tolist())))
    lines: list[dict[str, Any]] = []
    for place, row in enumerate(run.rows):
        if row.get("control"):
            continue
        score = float(values[place]) if np.isfinite(values[place]) else None
        verdict = found.get(place, (None, None))
        lines.append({"id": row["id"], "score": score, "p": verdict[0], "flagged": verdict[1]})
        if place not in found:
            lines[-1]["reason"] = "no score" if score is None else "length"
    return lines


def _outside(count: int, lengths: Sequence[int]) -> str:
    """Says that texts have no verdict for their length."""
    return (
        f"{results.num_texts(count)} {'has' if count == 1 else 'have'} no verdict: of fewer or "
        f"more tokens than any text that calibrated ({lengths[0]} to {lengths[-1]}); calibrate on "
        "held-out texts of their lengths."
    )


def _require_same(folder: Path, run: dict[str, Any], calibrated: dict[str, Any]) -> None:
    """Raises `UsageError` if the scores of the two runs cannot be compared."""
    if told := differences(calibrated, run):
        raise UsageError(
            f"{folder}: was not made as the calibration was, so its scores cannot be compared; "
            f"audit these texts with the same models, settings and devices. Differences: {told}"
        )


def _require_others(
    folder: Path, run: FinishedRun, content: Calibration, scored: np.ndarray
) -> None:
    """Raises `DataError` if a text of the calibration is to be judged by it."""
    known = set(content["keys"])
    same = [run.rows[i]["id"] for i in scored if run.keys[i] in known]
    if same:
        ids = ", ".join(printable(text_id) for text_id in same[:5])
        raise DataError(
            f"{folder}: {results.num_texts(len(same))} of these helped to calibrate and cannot be "
            f"judged by it ({ids}{', ...' if len(same) > 5 else ''}); leave them out"
        )


def _sentences(summary: dict[str, Any]) -> list[str]:
    """Says what was found."""
    rule = (
        f"of which at most {percent(summary['fdr'])} are false on average (false-discovery rate)"
        if summary["fdr"] is not None
        else f"where {percent(summary['fpr'])} of non-members would be"
    )
    lines = [
        f"{summary['flagged']} of {results.num_texts(summary['texts'])} flagged by "
        f"{summary['attack']}, {rule}.",
        summary["assumption"],
    ]
    if summary["of_other_lengths"]:
        lines.insert(1, _outside(summary["of_other_lengths"], summary["lengths"]))
    if found := summary.get("collection"):
        power = "no AUC"
        if found["detectable"] is not None:
            power = f"an AUC of {found['detectable']:.2f} in 80 % of cases"
        lines.append(
            f"The collection of {results.num_texts(found['texts'])}: p = {found['p']:.4g}, AUC "
            f"{found['auc']:.3f} ({found['low']:.3f} to {found['high']:.3f}) against the held-out "
            f"texts; so many texts show {power} at p <= 0.05."
        )
    return lines
