"""Gates about the scores of one attack: ties, saturation, and texts without a score."""

import numpy as np
import scipy
from jaxtyping import Float, Int

from sama_jax.core import inference, intervals, metrics
from sama_jax.validity import bounds
from sama_jax.validity.gate import Gate, gate

PIPELINE = "pipeline_control"
DOCUMENTS = "documents"


def ties(name: str, scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Gate:
    """Voids an attack whose scores are all equal; warns where many pairs of both classes tie.

    Args:
      name: the attack's.
      scores: NaN where there is none.
      labels: 1, 0, or -1 where there is none.
    """
    kept = np.isfinite(scores) & (labels >= 0)
    values, counts = np.unique(scores[kept], return_counts=True)
    members, others = (
        np.array([(scores[kept & (labels == label)] == v).sum() for v in values], float)
        for label in (1, 0)
    )
    pairs = members.sum() * others.sum()
    if not pairs:
        return gate("ties", "not run", f"{name} has no scores of both classes.")
    share, top = float((members * others).sum() / pairs), float(others[-1] / others.sum())
    equal = len(values) == 1 and counts[0] > 1
    weak = share > bounds.TIED_PAIRS or top > bounds.TOP_SHARE
    return gate(
        "ties",
        "void" if equal else "warn" if weak else "pass",
        f"All texts have the same score of {name}: there is nothing to rank."
        if equal
        else f"{name} gives one score to {100 * share:.1f} % of the pairs of a member and a "
        f"non-member, and its highest one to {100 * top:.1f} % of the non-members.",
        "Give it more passes, or texts with more tokens."
        if not equal
        else "Look at the losses: such scores mean that the attack could see nothing.",
        statistic=share,
        bound=bounds.TIED_PAIRS,
    )


def missing_scores(
    name: str, scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> Gate:
    """Warns where many texts lack scores, or one class more often than the other."""
    table = [
        [
            int((np.isfinite(scores) & (labels == label)).sum()),
            int((~np.isfinite(scores) & (labels == label)).sum()),
        ]
        for label in (1, 0)
    ]
    lacking = table[0][1] + table[1][1]
    if not lacking:
        return gate("missing_scores", "pass", f"Every labelled text has a score of {name}.")
    p = float(scipy.stats.fisher_exact(table)[1])  # pyright: ignore
    many = lacking > bounds.MISSING_SHARE * (lacking + table[0][0] + table[1][0])
    why = "So many lack one" if many else "One class lacks them more often"
    return gate(
        "missing_scores",
        "warn" if many or p < bounds.MISSING_P else "pass",
        f"{table[0][1]} members and {table[1][1]} non-members have no score of {name}.",
        f"{why}, so the rest is no fair sample: see `undefined` in scores.jsonl for the reasons.",
        statistic=p,
        bound=bounds.MISSING_P,
    )


def documents(
    name: str,
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None,
) -> Gate:
    """Warns where a class is so few documents that what they have in common looks like membership.

    Args:
      name: the attack's.
      scores: NaN where there is none.
      labels: 1 or 0.
      groups: documents that the texts belong to; -1 or None: none.
    """
    units, scored = intervals.numbered(groups, len(scores)), np.isfinite(scores)
    own = [units[scored & (labels == label)] for label in (1, 0)]
    counts = [np.unique(of).size for of in own]
    few = any(count < min(bounds.DOCUMENTS, len(of)) for count, of in zip(counts, own))
    return gate(
        DOCUMENTS,
        "warn" if few else "pass",
        f"The texts that {name} scored come from {counts[0]} documents of members and {counts[1]} "
        "of non-members"
        + (": so few may score alike for another reason than membership." if few else "."),
        f"Give texts of at least {bounds.DOCUMENTS} documents of each class.",
        statistic=min(counts),
        bound=bounds.DOCUMENTS,
    )


def pipeline_control(
    name: str,
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    *,
    before: float,
    after: float,
    steps: int,
) -> Gate:
    """Warns where texts that the reference was made to learn are not found.

    Args:
      name: the attack's.
      scores: of texts that were learnt and of others, by the model that has learnt them.
      labels: 1 for those that were learnt.
      before: their loss, in nats a token.
      after: the same when they were learnt; not finite: training broke the model.
      steps: of that training.
    """
    if not np.isfinite(after):
        return gate(
            PIPELINE,
            "warn",
            f"The reference could not be made to learn texts: in {steps} steps its loss went from "
            f"{before:.3f} to {after} nats a token.",
            "Give texts that the target was surely trained on instead (--control FILE).",
        )
    p = float(inference.permutation_tests(scores[:, None], labels).p[0])
    found = p <= bounds.CONTROL_P
    return gate(
        PIPELINE,
        "pass" if found else "warn",
        f"A copy of the reference was made to learn {(labels == 1).sum()} of the non-members (from "
        f"{before:.3f} to {after:.3f} nats a token, in {steps} steps), and {name} "
        f"{'found' if found else 'did not find'} them among {(labels == 0).sum()} others "
        f"(p = {p:.4f}).",
        "The same pipeline could not have found members: give the attack more passes, or texts "
        "with more tokens.",
        statistic=p,
        bound=bounds.CONTROL_P,
    )


def negative_control(
    name: str, scores: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None = None
) -> Gate:
    """Voids an attack by which random halves of the non-members can be told apart too often.

    Labels mean nothing there, so 95 % of the intervals must hold an AUC of 0.5: a check of what is
    computed from these very scores, with their ties and groups. Each half has whole groups.

    Args:
      name: the attack's.
      scores: of non-members; NaN where there is none.
      groups: documents that they belong to.
    """
    known = np.isfinite(scores)
    units = intervals.numbered(groups, len(scores))[known]
    drawn = np.unique(units)
    if len(drawn) < bounds.HALVED:
        return gate(
            "negative_control", "not run", f"{len(drawn)} non-members are too few to halve."
        )
    draw, apart = np.random.default_rng(0), 0
    for _ in range(bounds.HALVINGS):
        half = np.isin(units, draw.permutation(drawn)[: len(drawn) // 2])
        low, high = metrics.auc_interval(scores[known], half.astype(np.int64), units)
        apart += not low <= 0.5 <= high
    share = apart / bounds.HALVINGS
    return gate(
        "negative_control",
        "void" if share > bounds.HALVES_APART else "pass",
        f"{name} tells the halves of {apart} of {bounds.HALVINGS} random halvings of the "
        f"non-members apart, where {0.05 * bounds.HALVINGS:g} are expected.",
        "The numbers of this audit cannot be trusted; please report it with these scores.",
        statistic=share,
        bound=bounds.HALVES_APART,
    )


def mask_noise(
    name: str,
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
) -> Gate:
    """Warns where scores under other masks are other scores.

    Args:
      name: the attack's.
      first: its scores.
      second: the same under another seed; NaN for texts that were not scored again.
      labels: 1, 0, or -1 where there is none.
    """
    both = np.isfinite(first) & np.isfinite(second)
    a, b, of = first[both], second[both], labels[both]
    if both.sum() < 3 or not a.std() * b.std():
        return gate("mask_noise", "not run", f"{both.sum()} texts have scores to compare.")
    r = float(np.corrcoef(a, b)[0, 1])
    aucs = [metrics.auc(x[of >= 0], of[of >= 0]) for x in (a, b)] if {0, 1} <= {*of} else []
    differ = aucs and abs(aucs[0] - aucs[1]) > bounds.SAME_AUC
    said = f", and have AUCs of {aucs[0]:.3f} and {aucs[1]:.3f}" if differ else ""
    return gate(
        "mask_noise",
        "warn" if r < bounds.RELIABLE else "pass",
        f"Under two draws of masks the scores of {name} on the same {both.sum()} texts correlate "
        f"by {r:.2f}{said}: {100 * (1 - max(r, 0)):.0f} % of their variance is luck of the masks.",
        "Give it more passes (--passes).",
        statistic=r,
        bound=bounds.RELIABLE,
    )
