"""Asks whether texts to be judged look like those that calibrated. NumPy and SciPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from jaxtyping import Bool, Int

from sama_jax.validity.bounds import DRIFT_P
from sama_jax.validity.gate import Gate, gate


def same_lengths(suspects: Sequence[int], calibration: Sequence[int]) -> Gate:
    """Compares the lengths in tokens by Kolmogorov and Smirnov's test; void if they differ.

    A p-value compares a text with held-out ones, and scores depend on the length.
    """
    found: Any = scipy.stats.ks_2samp(suspects, calibration)
    p = float(found.pvalue)
    differ = p < DRIFT_P
    return gate(
        "lengths of calibration",
        "void" if differ else "pass",
        f"The lengths of these texts and of those that calibrated "
        f"{'differ' if differ else 'agree'} (p = {p:.2g}).",
        "Calibrate on held-out texts of the same lengths.",
        statistic=p,
        bound=DRIFT_P,
    )


def within_lengths(
    tokens: Int[np.ndarray, " n"], calibration: Sequence[int]
) -> Bool[np.ndarray, " n"]:
    """Tells which texts are no shorter and no longer than all that calibrated.

    The test of `same_lengths` is of all texts together: a few of a length that none has calibrated
    do not show in it, and a sum of losses alone would flag them. Of n + 1 texts of one source the
    last lies outside with a probability of at most 2 in n + 1.
    """
    return (tokens >= min(calibration)) & (tokens <= max(calibration))
