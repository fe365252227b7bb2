"""Turns the lines of `scores.jsonl` into numbers: metrics.json, and paired comparisons.

Draws nothing, so whoever wants an AUC does not import Matplotlib.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
from jaxtyping import Float, Int

from sama_jax.core import metrics as measure
from sama_jax.core.metrics import FPRS, AttackMetrics, tpr_name
from sama_jax.errors import DataError
from sama_jax.reporting.verdict import CAUTION, Verdict, judge
from sama_jax.storage.protocol import PRIMARY, Protocol
from sama_jax.storage.run_folder import Row, groups_of
from sama_jax.validity.gate import Gate, gate

_NO_GATES = gate(
    "gates",
    "void",
    "The folder does not say whether its models, texts and losses were checked.",
    "Run the audit's own command again: it checks them, and computes nothing twice.",
)
MAIN_ATTACK = "sama"
"""The attack that the paired differences compare the others with."""


class Paired(TypedDict):
    """AUC of one attack minus that of another on the texts that both scored."""

    difference: float
    ci: list[float] | None
    """Ends of its 95 % interval; None: both attacks put these texts in the same order."""
    n_members: int
    n_nonmembers: int


class Metrics(TypedDict):
    """The content of metrics.json."""

    verdict: Verdict
    validity: list[Gate]
    attacks: dict[str, AttackMetrics]
    paired: NotRequired[dict[str, Paired]]
    """`"sama - NAME"` -> the comparison."""


Scores = Float[np.ndarray, " n"]
"""Finite scores of the texts of one class."""


class Metric(NamedTuple):
    """One number that metrics.json and the tables give for each attack."""

    name: str
    """Its key in an attack's part of metrics.json."""
    column: str
    """The header of its column in the tables."""
    cell: Callable[[AttackMetrics], str | None]
    """Writes it, given an attack's part of metrics.json; None: there is no number."""
    compute: Callable[[Scores, Scores], float] | None = None
    """Computes it from the scores of members and of non-members, both of which are there.

    None: `core.metrics.summarize` computes it, since it has an interval or notes.
    """

    def shown(self, found: AttackMetrics) -> str | None:
        """Returns the cell of an attack; None if there is no number."""
        return None if found.get(self.name) is None else self.cell(found)


def _auc_cell(found: AttackMetrics) -> str | None:
    low, high = found["auc_ci"] or (float("nan"), float("nan"))
    return f"{found['auc']:.3f} ({low:.3f}–{high:.3f})"


def _tpr_metric(fpr: str) -> Metric:
    def cell(found: AttackMetrics) -> str | None:
        result = found["tpr_at_fpr"].get(fpr)
        if result is None:
            return None
        low, high = (100 * x for x in result["ci"])
        digits = 0 if low >= 10 else 1
        return f"{100 * result['tpr']:.1f} % ({low:.{digits}f}–{high:.{digits}f})"

    return Metric("tpr_at_fpr", tpr_name(fpr), cell)


METRICS = [
    Metric("auc", "AUC (95 % interval)", _auc_cell),
    *(_tpr_metric(fpr) for fpr in FPRS[:2]),
]
"""The metrics that the tables show, in their order. Append a `Metric` to add one."""


def compute_metrics(
    rows: Sequence[Row], protocol: Protocol | None = None, gates: Sequence[Gate] = ()
) -> Metrics:
    """Computes the content of metrics.json.

    `attacks` holds `metrics.summarize` of each attack in the order of the rows, over the labelled
    texts that have a score (a note counts the others); it is empty if no text has a label.
    `paired` compares SAMA with each other attack; it is absent if there is nothing to compare.
    Texts of one group count as such, and those without one for themselves, if any has one.

    Args:
      rows: lines of scores.jsonl.
      protocol: what was declared; None: what is usual among the rows' attacks.
      gates: about models, texts and losses.
    """
    labelled = [row for row in rows if row.get("label") is not None]
    names = attack_names(rows)
    verdict, validity = judge(rows, protocol or Protocol.of(names or [PRIMARY]), gates)
    content: Metrics = {"verdict": verdict, "validity": validity, "attacks": {}}
    if not labelled:
        return content
    content["attacks"] = {name: _attack_metrics(labelled, name) for name in names}
    compared: dict[str, Paired] = {}
    for other in (name for name in names if name != MAIN_ATTACK and MAIN_ATTACK in names):
        with contextlib.suppress(DataError):  # a class has no text that both scored
            compared[f"{MAIN_ATTACK} - {other}"] = paired(labelled, MAIN_ATTACK, other)
    if compared:
        content["paired"] = compared
    return content


def metrics_of(rows: Sequence[Row], manifest: Mapping[str, Any]) -> Metrics:
    """Computes the metrics of a run by the protocol and the gates that its manifest holds.

    Without gates, as an older version has left it, nobody knows whether the result is sound.
    """
    stated = manifest.get("protocol")
    protocol = Protocol.from_dict(stated) if stated else None
    return compute_metrics(rows, protocol, manifest.get("gates", [_NO_GATES]))


def _attack_metrics(labelled: Sequence[Row], name: str) -> AttackMetrics:
    values, labels = column(labelled, name)
    known, groups = np.isfinite(values), groups_of(labelled)
    scores, labels = values[known], labels[known]
    found = measure.summarize(scores, labels, None if groups is None else groups[known])
    members, nonmembers = scores[labels == 1], scores[labels == 0]
    both = members.size and nonmembers.size
    added = {m.name: m.compute(members, nonmembers) if both else None for m in METRICS if m.compute}
    found = cast(AttackMetrics, found | added)
    if dropped := int((~known).sum()):
        found["notes"].append(f"{num_texts(dropped)} with a label but no score left out.")
    return found


def paired(rows: Sequence[Row], first: str, second: str) -> Paired:
    """Compares two attacks: AUC of `first` minus AUC of `second`.

    Only labelled texts that both scored count, so what makes a text easy for both cancels.

    Raises:
      DataError: one class has no such text.
    """
    labelled = [row for row in rows if row.get("label") is not None]
    (a, labels), (b, _) = column(labelled, first), column(labelled, second)
    both, groups = np.isfinite(a) & np.isfinite(b), groups_of(labelled)
    difference, low, high = measure.paired_difference(
        a[both], b[both], labels[both], None if groups is None else groups[both]
    )
    return {
        "difference": difference,
        "ci": None if low == high else [low, high],
        "n_members": int((labels[both] == 1).sum()),
        "n_nonmembers": int((labels[both] == 0).sum()),
    }


def auc(rows: Sequence[Row], name: str) -> float:
    """Returns the AUC of one attack on the labelled texts that it scored.

    Raises:
      DataError: one class has no such text.
    """
    labelled = [row for row in rows if row.get("label") is not None]
    scores, labels, _ = measure.usable(*column(labelled, name))
    return measure.auc(scores, labels)


def attack_names(rows: Iterable[Row]) -> list[str]:
    """Lists all attacks of the rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get("scores") or {}))


def column(rows: Sequence[Row], name: str) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns the scores of one attack (NaN where missing) and the labels (-1 where missing)."""
    scores = [(row.get("scores") or {}).get(name) for row in rows]
    labels = [-1 if (label := row.get("label")) is None else int(label) for row in rows]
    return np.array(scores, dtype=np.float64), np.array(labels, dtype=np.int64)


def columns_of(
    rows: Sequence[Row],
) -> dict[str, tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Returns of each attack the finite scores and the labels of those texts, -1 where missing.

    Attacks without a score are left out.
    """
    found = {name: measure.usable(*column(rows, name))[:2] for name in attack_names(rows)}
    return {name: columns for name, columns in found.items() if columns[0].size}


def paired_text(difference: float, ci: Sequence[float] | None) -> str:
    """Writes a difference of AUCs with its interval: "+0.031 (−0.010 to +0.070)"."""
    if ci is None:
        return "same scores"
    return f"{difference:+.3f} ({ci[0]:+.3f} to {ci[1]:+.3f})"


def num_texts(count: int) -> str:
    """Writes a number of texts: "1 text", "2 texts"."""
    return "1 text" if count == 1 else f"{count} texts"


def headline(metrics: Metrics) -> str:
    """Says in plain sentences what the run shows, and what that leaves open."""
    return f"{metrics['verdict']['sentence']} {CAUTION}"
