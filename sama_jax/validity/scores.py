"""Gates about the scores of one attack: ties, saturation, and texts without a score."""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import fisher_exact

from sama_jax.validity import bounds
from sama_jax.validity.gate import Gate, gate


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
    """Warns where one class lacks scores more often than the other."""
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
    p = float(fisher_exact(table)[1])  # pyright: ignore
    return gate(
        "missing_scores",
        "warn" if p < bounds.MISSING_P else "pass",
        f"{table[0][1]} members and {table[1][1]} non-members have no score of {name}.",
        "One class lacks them more often, so the rest is no fair sample: see `undefined` in "
        "scores.jsonl for the reasons.",
        statistic=p,
        bound=bounds.MISSING_P,
    )
