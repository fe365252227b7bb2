"""Describes how a text's loss difference depends on which of its tokens are masked. NumPy only.

The paper (arXiv 2601.20125) argues that one mask says little: within a text the difference varies
more between masks than between members and non-members. These numbers show it for a run's masks.
"""

from typing import TypedDict

import numpy as np
from jaxtyping import Float, Int

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CLASSES = {"members": 1, "non-members": 0, "texts without a label": -1}


class ClassSpread(TypedDict):
    """What the texts of one class give, in nats a token."""

    texts: int
    by_pass: list[list[float]]
    """Pass by pass, the `QUANTILES` over texts of the mean difference at the scored tokens."""
    within: float
    """Standard deviation between the passes of one text, on average over texts."""
    mean: float
    """Of the texts' means over all passes."""


class Spread(TypedDict):
    """The content of densities.json."""

    densities: list[float]
    """Share of a text's tokens that each pass masks, on average over the first 256 texts."""
    classes: dict[str, ClassSpread]
    """By the names of `CLASSES`; those without a text are left out."""


def spread(
    differences: Float[np.ndarray, "n t"],
    densities: Float[np.ndarray, " t"],
    labels: Int[np.ndarray, " n"],
) -> Spread | None:
    """Sums up loss differences by class and pass.

    Args:
      differences: mean of reference minus target over the scored tokens of each pass, in nats.
      densities: share of tokens masked in each pass.
      labels: 1 member, 0 not, -1 unknown.

    Returns:
      None if no text has a difference in every pass.
    """
    whole = np.isfinite(differences).all(axis=1) & (differences.shape[1] > 0)
    if not whole.any():
        return None
    found: Spread = {"densities": [float(share) for share in densities], "classes": {}}
    for name, label in CLASSES.items():
        values = differences[whole & (labels == label)]
        if len(values):
            found["classes"][name] = {
                "texts": len(values),
                "by_pass": np.quantile(values, QUANTILES, axis=0).T.tolist(),
                "within": float(values.std(axis=1).mean()),
                "mean": float(values.mean()),
            }
    return found
