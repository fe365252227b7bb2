"""Gates about texts, tokens and labels, asked before any model runs: values in, a gate out."""

import math
from collections.abc import Sequence

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from sama_jax.core.intervals import allowed_false_alarms
from sama_jax.core.metrics import FPRS, tpr_name
from sama_jax.validity import bounds
from sama_jax.validity.gate import Gate, Status, gate

Labels = Int[np.ndarray, " n"]
"""1 member, 0 non-member, -1 unknown."""


def too_few(labels: Labels) -> Gate:
    """Says which true-positive rates so few non-members cannot show; what they can is no fault."""
    count = int((labels == 0).sum())
    lacking = [x for x in FPRS if allowed_false_alarms(count, float(x)) is None]
    if not lacking:
        said = f"{count:,} non-members suffice for every false-alarm rate of the report."
        return gate("too_few", "pass", said, statistic=count)
    needed = math.ceil(1 / float(lacking[0]) - 1 - 1e-9)
    return gate(
        "too_few",
        "not run",
        f"No {' and no '.join(map(tpr_name, lacking))}: there are {count:,} non-members, and the "
        f"first needs {needed:,}.",
        statistic=count,
        bound=needed,
    )


def duplicates(texts: Sequence[str], labels: Labels) -> Gate:
    """Counts texts that repeat an earlier one of their class."""
    repeated = len(texts) - len(set(zip(texts, labels.tolist())))
    if not repeated:
        return gate("duplicates", "pass", "No text repeats another one of its class.", statistic=0)
    return gate(
        "duplicates",
        "warn",
        f"texts that repeat an earlier one: {repeated}; they count twice, as if independent.",
        "Keep each text once.",
        statistic=repeated,
        bound=0,
    )


def contradictions(texts: Sequence[str], labels: Labels) -> Gate:
    """Counts texts that are member and non-member at once."""
    classes: dict[str, set[int]] = {}
    for text, label in zip(texts, labels.tolist()):
        classes.setdefault(text, set()).add(label)
    both = {text for text, found in classes.items() if {0, 1} <= found}
    return _wrong_labels(
        "contradictions",
        len(both),
        sum(text in both for text in texts) / max(1, len(texts)),
        "texts that occur as member and as non-member",
        "Take them out of the non-members.",
    )


def equal_after_cutting(
    texts: Sequence[str], tokens: Sequence[Int[np.ndarray, "..."]], labels: Labels
) -> Gate:
    """Counts different texts of both classes that have the same tokens."""
    seen: dict[bytes, dict[int, set[str]]] = {}
    for text, ids, label in zip(texts, tokens, labels.tolist()):
        if len(ids):
            seen.setdefault(ids.tobytes(), {}).setdefault(label, set()).add(text)
    both = {k for k, one in seen.items() if {0, 1} <= one.keys() and one[0] != one[1]}
    return _wrong_labels(
        "equal_after_cutting",
        len(both),
        sum(ids.tobytes() in both for ids in tokens) / max(1, sum(len(ids) > 0 for ids in tokens)),
        "texts of both classes that have the same tokens, after they are cut",
        "Raise --max-length, or take them out of the non-members.",
    )


def near_duplicates(near_other: Bool[np.ndarray, " d"]) -> Gate:
    """Counts texts that nearly equal another text of the other class.

    Args:
      near_other: for each distinct text, whether it does.
    """
    count = int(near_other.sum())
    return _wrong_labels(
        "near_duplicates",
        count,
        count / max(1, len(near_other)),
        "texts that share most of their words with one of the other class",
        "Draw the split again with sama-jax split, which keeps near duplicates on one side.",
    )


def _wrong_labels(name: str, count: int, share: float, what: str, remedy: str) -> Gate:
    """Makes a gate of texts about which no attack can be right: any weakens, many void.

    Args:
      name: the gate's.
      count: different texts.
      share: of all texts, copies counted.
      what: they are.
      remedy: what to do.
    """
    status: Status = "void" if share > bounds.WRONG_LABELS else "warn" if count else "pass"
    said = f"{what}: {count}; no attack can be right about both." if count else f"No {what}."
    return gate(name, status, said, remedy, statistic=share, bound=bounds.WRONG_LABELS)


def repeated_sources(
    labels: Labels, units: Int[np.ndarray, " n"], groups: Sequence[str | None]
) -> Gate:
    """Asks whether texts that nearly repeat others of their class are said to belong together.

    A name that each text has for itself says as little as none.

    Args:
      labels: of each text.
      units: number of the group or the near duplicates that a text belongs to.
      groups: names of the groups, as given; a text without one counts for itself.
    """
    named = [i if group is None else group for i, group in enumerate(groups)]
    counted = len(set(zip(named, labels.tolist())))
    share = 1 - len(np.unique(units * 3 + labels)) / max(1, counted)
    grouped = any(group is not None for group in groups)
    if share <= bounds.REPEATED:
        said = "Texts count as independent: none of them names a group."
        if grouped:
            count = len(set(named))
            said = f"{len(groups):,} texts come from {count:,} groups; intervals count groups."
        return gate("independence", "pass", said, statistic=share, bound=bounds.REPEATED)
    return gate(
        "independence",
        "warn",
        f"{share:.0%} of the {'groups' if grouped else 'texts'} belong with others of their class, "
        "by the words they share, but count as independent: intervals are too narrow.",
        "Give every text a field group, the same for what belongs together.",
        statistic=share,
        bound=bounds.REPEATED,
    )


def overlap(shares: Float[np.ndarray, " m"]) -> Gate:
    """Asks how many non-members stand in members for the most part.

    Args:
      shares: for each non-member, the share of its runs of 13 words that stand in a member.
    """
    many = int((shares >= bounds.OVERLAP).sum())
    share = many / max(1, len(shares))
    status: Status = "pass" if share <= bounds.OVERLAPPING else "warn"
    status = "void" if share > bounds.WRONG_LABELS else status
    return gate(
        "overlap",
        status,
        f"{many:,} of {len(shares):,} non-members have at least {bounds.OVERLAP:.0%} of their runs "
        f"of {bounds.OVERLAP_WORDS} words in members.",
        "They are no non-members: take them out, or split whole documents.",
        statistic=share,
        bound=bounds.OVERLAPPING if status != "void" else bounds.WRONG_LABELS,
    )


def prefixes(near: int) -> Gate:
    """Asks whether scored texts nearly equal a text of `--prefixes`, which stands before them."""
    said = f"texts that share most of their words with one of --prefixes: {near}."
    remedy = "Take prefixes from other documents."
    status: Status = "warn" if near else "pass"
    return gate("prefixes", status, said, remedy, statistic=near, bound=0)


def truncation(cut: Bool[np.ndarray, " n"], labels: Labels) -> Gate:
    """Asks whether one class is cut at the maximum length more often than the other."""
    members, others = cut[labels == 1], cut[labels == 0]
    table = [[members.sum(), (~members).sum()], [others.sum(), (~others).sum()]]
    p = float(scipy.stats.fisher_exact(table).pvalue)  # pyright: ignore  # SciPy's result has no stub
    said = f"Cut: {members.mean():.0%} of the members, {others.mean():.0%} of the non-members"
    if p >= bounds.CUT_P:
        rest = "; the result speaks of their first tokens alone." if cut.any() else "."
        return gate("truncation", "pass", said + rest, statistic=p, bound=bounds.CUT_P)
    return gate(
        "truncation",
        "warn",
        f"{said}: a score can see length.",
        "Draw both classes from texts of the same lengths, or raise --max-length.",
        statistic=p,
        bound=bounds.CUT_P,
    )


def mask_tokens(tokens: Sequence[Int[np.ndarray, "..."]], mask_id: int) -> Gate:
    """Counts texts that spell the mask token."""
    return _none_of(
        "mask_tokens",
        sum(bool((ids == mask_id).any()) for ids in tokens),
        "texts that spell the mask token",
        "the models read it there as masked, though it is not",
        "Take the token out of the texts.",
    )


def template_marks(unknown: Sequence[str]) -> Gate:
    """Asks whether the marks of a template are tokens; `unknown` are those that are not."""
    if not unknown:
        return gate("template", "pass", "All marks of the template are tokens.", statistic=0)
    return gate(
        "template",
        "warn",
        f"Marks of the template that are no tokens of this model: {', '.join(unknown)}; it was "
        "hardly trained with them.",
        "Give the --template that the target was fine-tuned with.",
        statistic=len(unknown),
        bound=0,
    )


def empty_texts(tokens: Sequence[int]) -> Gate:
    """Counts texts of which no token can be masked, by the number of those that can."""
    return _none_of(
        "empty_texts",
        sum(not count for count in tokens),
        "texts without a usable token",
        "they have no score",
        "Leave them out.",
    )


def _none_of(name: str, count: int, what: str, why: str, remedy: str) -> Gate:
    """Makes a gate that a single such text weakens."""
    said = f"{what}: {count}; {why}." if count else f"No {what}."
    return gate(name, "warn" if count else "pass", said, remedy, statistic=count, bound=0)


def random_split(recorded: bool) -> Gate:
    """Says whether a split file shows that these classes were drawn at random."""
    if recorded:
        said = "Members and non-members are those that sama-jax split drew at random."
        return gate("random_split", "pass", said)
    said = "How members and non-members were separated is not recorded."
    return gate("random_split", "not run", said)
