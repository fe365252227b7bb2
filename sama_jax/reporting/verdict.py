"""Says what a run shows, by rules that were fixed before its first pass.

Four verdicts: no conclusion, found, nothing above a margin, undecided. "Cannot be told from
guessing" is none of them: an audit of few texts would say so of any model.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from jaxtyping import Float, Int

from sama_jax.core import inference, metrics
from sama_jax.storage.protocol import Protocol
from sama_jax.storage.run_folder import Row, groups_of
from sama_jax.validity import bounds
from sama_jax.validity import scores as score_gates
from sama_jax.validity.blind import NAME as BLIND
from sama_jax.validity.gate import Gate, gate, voids

Kind = Literal["no conclusion", "found", "nothing above the margin", "undecided", "unlabelled"]

CAUTION = (
    "A low result is not proof of safety, because a stronger attack may exist, and it holds for "
    "this one training run, these texts, these attacks and what they had for a reference."
)


class Declared(TypedDict):
    """What permuted labels say of a declared attack."""

    auc: float
    simultaneous_ci: list[float]
    """Interval of the AUC that holds for all declared attacks at once (95 %)."""
    p: float
    """One-sided, of this attack alone."""
    adjusted_p: float
    """Corrected for all declared attacks."""


class Excess(TypedDict):
    """What the primary attack has beyond the best baseline that sees no model."""

    baseline_auc: float
    difference: float
    ci: list[float]
    """95 % interval of the difference of the AUCs, on the texts that both scored."""


class Verdict(TypedDict):
    """What the run shows."""

    kind: Kind
    sentence: str
    primary: NotRequired[str]
    alpha: NotRequired[float]
    margin: NotRequired[float]
    declared: NotRequired[dict[str, Declared]]
    detectable_auc: NotRequired[float | None]
    """AUC that so many texts show in 80 % of audits; None: none would be."""
    detectable_tpr: NotRequired[float | None]
    """The same of the TPR at 1 % FPR."""
    excess: NotRequired[Excess]
    """Absent where no baseline was computed."""


class Columns(NamedTuple):
    """The scores of the declared attacks on the labelled texts."""

    names: list[str]
    scores: Float[np.ndarray, "n k"]
    labels: Int[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"] | None


def judge(
    rows: Sequence[Row], protocol: Protocol, gates: Sequence[Gate]
) -> tuple[Verdict, list[Gate]]:
    """Judges a run.

    Args:
      rows: lines of scores.jsonl.
      protocol: what was declared.
      gates: about models, texts and losses.

    Returns:
      the verdict, and all gates: those given and those about the declared attacks' scores.
    """
    columns = _columns(rows, protocol)
    members, nonmembers = ((columns.labels == label).sum() for label in (1, 0))
    if not members or not nonmembers:
        if failed := voids(gates):
            return {"kind": "no conclusion", "sentence": _no_conclusion(failed[0])}, [*gates]
        return {"kind": "unlabelled", "sentence": _UNLABELLED}, [*gates]
    declared = _declared(columns)
    all_gates = [*gates, *_score_gates(columns, protocol, declared, rows)]
    if protocol.primary not in declared:
        return {"kind": "no conclusion", "sentence": _no_conclusion(voids(all_gates)[0])}, all_gates
    texts = _independent(columns, protocol.primary)
    verdict: Verdict = {
        "kind": "undecided",
        "sentence": "",
        "primary": protocol.primary,
        "alpha": protocol.alpha,
        "margin": protocol.margin,
        "declared": declared,
        "detectable_auc": inference.detectable_auc(*texts, alpha=protocol.alpha),
        "detectable_tpr": inference.detectable_tpr(*texts, alpha=protocol.alpha),
    }
    excess = _excess(rows, protocol.primary)
    if excess is not None:
        verdict["excess"] = excess
    failed, unfair = voids(all_gates), _sources_differ(all_gates)
    few = [g for g in all_gates if g["name"] == score_gates.DOCUMENTS and g["status"] == "warn"]
    if failed:
        verdict |= {"kind": "no conclusion", "sentence": _no_conclusion(failed[0])}
    elif few:
        verdict["sentence"] = f"Undecided: {few[0]['sentence']} {few[0]['remedy']}"
    elif declared[protocol.primary]["p"] <= protocol.alpha:
        beyond = excess is not None and excess["ci"][0] > 0
        if unfair is None:
            verdict |= {"kind": "found", "sentence": _found(protocol, declared)}
        elif beyond:
            sentence = f"{_found(protocol, declared)} {_beyond(unfair, excess)}"
            verdict |= {"kind": "found", "sentence": sentence}
        else:
            verdict["sentence"] = _by_the_source(protocol, declared, unfair, excess)
    else:
        doubts, control = _doubts(protocol, columns, declared), _control(all_gates)
        if _below(protocol, declared) and control is not None and not doubts:
            sentence = _nothing_above(protocol, declared, control)
            verdict |= {"kind": "nothing above the margin", "sentence": sentence}
        else:
            verdict["sentence"] = " ".join([_undecided(protocol, verdict, texts, control), *doubts])
    return verdict, all_gates


def _excess(rows: Sequence[Row], primary: str) -> Excess | None:
    """Compares the primary attack with the rows' baseline; None if no text of a class has both."""
    both = [
        row
        for row in rows
        if row.get("label") is not None
        and row.get("baseline") is not None
        and (row.get("scores") or {}).get(primary) is not None
    ]
    labels = [row.get("label") for row in both]
    if len(set(labels)) < 2:
        return None
    baseline = [row.get("baseline") for row in both]
    difference, low, high = metrics.paired_difference(
        [(row.get("scores") or {})[primary] for row in both],  # pyright: ignore  not None above
        baseline,  # pyright: ignore  not None above
        labels,  # pyright: ignore  not None above
        groups_of(both),
    )
    auc = metrics.auc(baseline, labels)  # pyright: ignore
    return {"baseline_auc": auc, "difference": difference, "ci": [low, high]}


def _sources_differ(gates: Sequence[Gate]) -> Gate | None:
    """Returns the gate that could not show that members and non-members have one source, if any."""
    return next((g for g in gates if g["name"] == BLIND and g["status"] != "pass"), None)


def _columns(rows: Sequence[Row], protocol: Protocol) -> Columns:
    labelled = [r for r in rows if r.get("label") is not None and r.get("status") != "prefix"]
    names = [n for n in protocol.family if any(n in (r.get("scores") or {}) for r in labelled)]
    scores = [[(row.get("scores") or {}).get(name) for name in names] for row in labelled]
    labels = np.array([row.get("label") for row in labelled], np.int64)
    return Columns(
        names,
        np.array(scores, np.float64).reshape(len(labelled), len(names)),
        labels,
        groups_of(labelled),
    )


def _independent(columns: Columns, primary: str) -> tuple[int, int]:
    """Counts members and non-members that the primary scored; documents, where they are known."""
    scored = np.isfinite(columns.scores[:, columns.names.index(primary)])
    units = np.arange(len(scored)) if columns.groups is None else columns.groups
    members, others = (np.unique(units[scored & (columns.labels == c)]).size for c in (1, 0))
    return members, others


def _declared(columns: Columns) -> dict[str, Declared]:
    """Tests the declared attacks together; those without a score of both classes are left out."""
    data = columns.scores, columns.labels, columns.groups
    tests, ends = inference.permutation_tests(*data), inference.simultaneous_intervals(*data)
    return {
        name: {
            "auc": float(ends.auc[i]),
            "simultaneous_ci": [float(ends.low[i]), float(ends.high[i])],
            "p": float(tests.p[i]),
            "adjusted_p": float(tests.adjusted[i]),
        }
        for i, name in enumerate(columns.names)
        if np.isfinite(ends.auc[i])
    }


def _positive_control(rows: Sequence[Row], primary: str) -> Gate:
    """Asks whether known members are found among the non-members; texts of one document count once.

    `audit_records.document_numbers` says which of the known members are one.
    """
    texts = [row for row in rows if row.get("control") or row.get("label") == 0]
    own = [(row.get("scores") or {}).get(primary) for row in texts]
    known = np.array([int(bool(row.get("control"))) for row in texts], np.int64)
    scores, groups = np.array(own, np.float64).reshape(-1, 1), groups_of(texts)
    if not known.any():
        return gate(CONTROL, "not run", "No positive control was given (--control FILE).")
    units = np.arange(len(texts)) if groups is None else groups
    of_known = units[(known == 1) & np.isfinite(scores[:, 0])]
    count, enough = len(np.unique(of_known)), bounds.CONTROL_TEXTS
    p = float(inference.permutation_tests(scores, known, groups).p[0])
    found = count >= enough and p <= bounds.CONTROL_P
    copies = "" if count == len(of_known) else f" ({len(of_known)} texts)"
    what = f"{count} different known member{'' if count == 1 else 's'}{copies}"
    said = f"was {'' if found else 'not '}found among the non-members by {primary} (p = {p:.4f})."
    if count < enough:
        said = f"is too small: fewer than {enough} texts or documents show nothing (p = {p:.4f})."
    return gate(
        CONTROL,
        "pass" if found else "warn",
        f"A positive control of {what} {said}",
        f"Nothing follows from what this audit does not find. Give at least {enough} different "
        "texts that the target was surely trained on, such as canaries that stood in the training "
        "data many times; a text that stands here many times counts once.",
        statistic=p,
        bound=bounds.CONTROL_P,
    )


def _mask_noise(rows: Sequence[Row], primary: str) -> list[Gate]:
    """Compares the scores with those under other masks, if any were made."""
    texts = [row for row in rows if "again" in row]
    if not texts:
        return []
    first = np.array([(row.get("scores") or {}).get(primary) for row in texts], np.float64)
    second = np.array([row.get("again") for row in texts], np.float64)
    labels = [-1 if (label := row.get("label")) is None else label for row in texts]
    return [score_gates.mask_noise(primary, first, second, np.array(labels, np.int64))]


def _score_gates(
    columns: Columns, protocol: Protocol, declared: dict[str, Declared], rows: Sequence[Row]
) -> list[Gate]:
    """Asks the gates about the primary attack's scores."""
    name = protocol.primary
    if name not in declared:
        return [
            gate(
                "primary_scored",
                "void",
                f"The primary attack, {name}, has no score of both classes.",
                "Look at `undefined` in scores.jsonl, or declare another --primary.",
            )
        ]
    own = columns.scores[:, columns.names.index(name)]
    high, others = declared[name]["simultaneous_ci"][1], columns.labels == 0
    groups = None if columns.groups is None else columns.groups[others]
    return [
        score_gates.ties(name, own, columns.labels),
        score_gates.missing_scores(name, own, columns.labels),
        score_gates.documents(name, own, columns.labels, columns.groups),
        score_gates.negative_control(name, own[others], groups),
        *_mask_noise(rows, name),
        _positive_control(rows, name),
        gate(
            "direction",
            "void" if high < 0.5 else "pass",
            f"{name} ranks members {'below' if high < 0.5 else 'not surely below'} non-members "
            f"(AUC {declared[name]['auc']:.3f}, its upper end {high:.3f}).",
            "The labels may be swapped, target and reference exchanged, or the reference may know "
            "the members better.",
            statistic=high,
            bound=0.5,
        ),
    ]


# --- sentences -----------------------------------------------------------------------------------

_UNLABELLED = (
    "Without labelled members and non-members nothing can be said about how well the attacks work "
    "here."
)


def _no_conclusion(failed: Gate) -> str:
    return (
        f"No conclusion ({failed['name']}): {failed['sentence']} {failed['remedy']} The numbers "
        "below must not be read as a result."
    )


def _interval(found: Declared) -> str:
    low, high = found["simultaneous_ci"]
    return f"AUC {found['auc']:.3f}, 95 % interval {low:.3f} to {high:.3f}"


_WHEN = {
    False: "it was declared before this run's first pass; whether other runs of these texts had "
    "been seen by then is not known",
    True: "losses of this target were stored before it was declared, so nothing here shows that "
    "it was chosen without them",
}


def _found(protocol: Protocol, declared: dict[str, Declared]) -> str:
    own, k = declared[protocol.primary], len(declared)
    # The primary stands first: only once it is found are the others tested.
    sure = [n for n, d in declared.items() if d["adjusted_p"] <= protocol.alpha]
    also = list(dict.fromkeys([protocol.primary, *sure]))
    others = ""
    if k > 1:
        best = max(also, key=lambda n: declared[n]["simultaneous_ci"][0])
        low = declared[best]["simultaneous_ci"][0]
        others = (
            f" Of the {k} declared attacks {len(also)} do so, corrected for {k}; the strongest of "
            f"them, {best}, has an AUC of at least {low:.3f}."
        )
    return (
        f"The primary attack, {protocol.primary}, tells members from non-members "
        f"({_interval(own)}; p = {own['p']:.4f}); {_WHEN[protocol.stored]}.{others}"
    )


def _beyond(unfair: Gate, excess: Excess | None) -> str:
    """Says what the attack has beyond the best baseline."""
    found = unfair["sentence"]
    if excess is None:
        return f"{found} No baseline could be compared with it."
    low, high = excess["ci"]
    return (
        f"{found} On the same texts the attack's AUC is {excess['difference']:+.3f} "
        f"({low:+.3f} to {high:+.3f}) beyond that baseline's, and only this can mean membership."
    )


def _by_the_source(
    protocol: Protocol, declared: dict[str, Declared], unfair: Gate, excess: Excess | None
) -> str:
    own = declared[protocol.primary]
    return (
        f"Undecided: the primary attack, {protocol.primary}, tells members from non-members "
        f"({_interval(own)}; p = {own['p']:.4f}), but their source alone may do so. "
        f"{_beyond(unfair, excess)}"
    )


def _below(protocol: Protocol, declared: dict[str, Declared]) -> bool:
    return all(d["simultaneous_ci"][1] <= protocol.margin for d in declared.values())


def _doubts(protocol: Protocol, columns: Columns, declared: dict[str, Declared]) -> list[str]:
    """Says why small AUCs do not mean that nothing leaks."""
    found = []
    if lost := [name for name in protocol.family if name not in declared]:
        found.append(f"No scores were made by {', '.join(lost)}, which the protocol declares.")
    for name in declared:
        scores = columns.scores[:, columns.names.index(name)]
        known = np.isfinite(scores)
        groups = None if columns.groups is None else columns.groups[known]
        rate = metrics.tpr_at_fpr(scores[known], columns.labels[known], 0.01, groups)
        if rate is not None and rate["ci"][0] > 0.01:
            low, high = (100 * end for end in rate["ci"])
            found.append(
                f"But {name} surely finds more members than chance at 1 % FPR, "
                f"{100 * rate['tpr']:.1f} % ({low:.1f} to {high:.1f} %): some texts stand out."
            )
    return found


def _control(gates: Sequence[Gate]) -> Gate | None:
    """Returns a control that was passed; None, too, if another one was not."""
    made = [g for g in gates if g["name"] in (CONTROL, score_gates.PIPELINE)]
    passed = [g for g in made if g["status"] == "pass"]
    return passed[0] if passed and all(g["status"] in ("pass", "not run") for g in made) else None


CONTROL = "positive_control"
"""The gate of known members that must be found before "nothing above" is said."""


def _nothing_above(protocol: Protocol, declared: dict[str, Declared], control: Gate) -> str:
    highest = max(d["simultaneous_ci"][1] for d in declared.values())
    return (
        f"No declared attack reaches an AUC of {protocol.margin:g}: the largest upper end is "
        f"{highest:.3f} (95 %, for all {len(declared)} at once). {control['sentence']}"
    )


def _undecided(
    protocol: Protocol,
    verdict: Verdict,
    texts: tuple[int, int],
    control: Gate | None,
) -> str:
    declared = verdict.get("declared", {})
    own, reach = declared[protocol.primary], verdict.get("detectable_auc")
    power = (
        "So few texts show no attack at all"
        if reach is None
        else f"So many texts show an AUC of {reach:.3f} in 80 % of audits"
    )
    rate = verdict.get("detectable_tpr")
    power += "" if rate is None else f", or a TPR of {100 * rate:.0f} % at 1 % FPR"
    highest = max(d["simultaneous_ci"][1] for d in declared.values())
    text = (
        f"Undecided: with {texts[0]} members and {texts[1]} non-members the primary attack, "
        f"{protocol.primary}, shows nothing ({_interval(own)}; p = {own['p']:.4f}). {power}; AUCs "
        f"up to {highest:.3f} are not excluded."
    )
    if control is None:
        text += (
            " No control was found (--control, --pipeline-control), so the pipeline itself is not "
            "shown to work."
        )
    seen = [n for n, d in declared.items() if d["adjusted_p"] <= protocol.alpha]
    if seen:
        text += (
            f" {', '.join(seen)} stood out afterwards, which is no finding: declare it as "
            "--primary and audit other texts."
        )
    return text
