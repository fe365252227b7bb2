"""Asks whether texts to be judged look like those that calibrated. NumPy and SciPy."""

from collections.abc import Sequence
from typing import Any

from scipy.stats import ks_2samp

from sama_jax.validity.bounds import DRIFT_P
from sama_jax.validity.gate import Gate, gate


def same_lengths(suspects: Sequence[int], calibration: Sequence[int]) -> Gate:
    """Compares the lengths in tokens by Kolmogorov and Smirnov's test; void if they differ.

    A p-value compares a text with held-out ones, and scores depend on the length.
    """
    found: Any = ks_2samp(suspects, calibration)
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
