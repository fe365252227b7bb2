"""Measures how heavy the tails of loss differences are, and what that means for a sign or a mean.

Excess kurtosis depends on how many values there are: of a law whose fourth moment is infinite it
grows without bound, so a value without its number of values says nothing. L-kurtosis and tail
indices do not. NumPy and SciPy only.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

TAIL = 0.05
"""Share of the values that a tail index is read from."""
NORMAL_L_KURTOSIS = 30 * math.atan(math.sqrt(2)) / math.pi - 9
"""0.1226 (J. R. M. Hosking, 1990)."""


class Tails(NamedTuple):
    """How heavy the tails of a sample are."""

    count: int
    kurtosis: float
    """Fourth central moment over the squared variance, minus 3: 0 for a normal law, 3 for Laplace's
    (biased, as the paper computes it)."""
    l_kurtosis: float
    """Fourth L-moment over the second: .123 for a normal law, .236 for Laplace's; at most 1."""
    upper: float
    """Hill's index of the upper tail, of the distances from the median: 0 to 1/4 where the fourth
    moment is finite, 1/2 and more where the variance is not. An estimate from a finite share of the
    values is above 0 for every law."""
    lower: float


def tails(values: Float[np.ndarray, " n"]) -> Tails:
    """Measures a sample of at least 100 finite values that are not all equal.

    Raises:
      ValueError: fewer values, or no spread.
    """
    if len(values) < 100 or not np.isfinite(values).all() or np.ptp(values) == 0:
        raise ValueError("expected at least 100 finite values that differ")
    away = values - np.median(values)
    return Tails(
        len(values),
        float(scipy.stats.kurtosis(values)),
        l_kurtosis(values),
        hill(away),
        hill(-away),
    )


def l_kurtosis(values: Float[np.ndarray, " n"]) -> float:
    """Computes the sample's L-kurtosis from unbiased probability-weighted moments (Hosking, 1990).

    Works for ties; needs at least four values.
    """
    ordered, n = np.sort(values), len(values)
    rank = np.arange(n, dtype=np.float64)
    weights, moments = np.ones(n), []
    for order in range(4):
        moments.append(float((weights * ordered).mean()))
        weights = weights * (rank - order) / (n - 1 - order)
    b0, b1, b2, b3 = moments
    return (20 * b3 - 30 * b2 + 12 * b1 - b0) / (2 * b1 - b0)


def hill(away: Float[np.ndarray, " n"], share: float = TAIL) -> float:
    """Estimates the index of the upper tail from the largest values (B. M. Hill, 1975).

    NaN where the values that it would read are not positive.
    """
    count = max(int(share * len(away)), 10)
    largest = np.sort(away)[-count - 1 :]
    if len(largest) <= count or largest[0] <= 0:
        return math.nan
    return float(np.log(largest[1:] / largest[0]).mean())


def interval(
    statistic: Callable[[Float[np.ndarray, " n"]], float],
    texts: list[Float[np.ndarray, " m"]],
    seed: int = 0,
    repetitions: int = 500,
) -> tuple[float, float]:
    """Returns the ends of a statistic's 95 % interval over texts drawn anew.

    Tokens of one text depend on each other, so whole texts are drawn, with replacement. For the
    kurtosis of heavy tails no such interval holds; it then shows how few texts decide the value.
    """
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(texts), size=len(texts)) for _ in range(repetitions))
    found = [statistic(np.concatenate([texts[i] for i in some])) for some in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


# --- what a location is read by ------------------------------------------------------------------


def sign_share(values: Float[np.ndarray, "... n"]) -> Float[np.ndarray, "..."]:
    """Returns the share of positive values, half for a zero."""
    return ((values > 0) + 0.5 * (values == 0)).mean(axis=-1)


def trimmed_mean(values: Float[np.ndarray, "... n"], share: float = 0.1) -> np.ndarray:
    """Averages without the given share of the values at each end."""
    cut = int(share * values.shape[-1])
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)


def winsorised_mean(values: Float[np.ndarray, "... n"], share: float = 0.1) -> np.ndarray:
    """Averages with the given share of the values at each end moved to the next one inside."""
    ordered, cut = np.sort(values, axis=-1), int(share * values.shape[-1])
    last = values.shape[-1] - 1 - cut
    return ordered[..., np.clip(np.arange(values.shape[-1]), cut, last)].mean(axis=-1)


def median_of_means(values: Float[np.ndarray, "... n"], parts: int = 8) -> np.ndarray:
    """Returns the median of the means of consecutive parts; what is left over is not read."""
    size = values.shape[-1] // parts
    shape = (*values.shape[:-1], parts, size)
    return np.median(values[..., : parts * size].reshape(shape).mean(axis=-1), axis=-1)


def t_statistic(values: Float[np.ndarray, "... n"]) -> np.ndarray:
    """Divides the mean by the deviation."""
    deviation = values.std(axis=-1, ddof=1)
    return values.mean(axis=-1) / np.where(deviation > 0, deviation, np.nan)


def signed_ranks(values: Float[np.ndarray, "... n"]) -> np.ndarray:
    """Sums the ranks of absolute values with the values' signs (F. Wilcoxon, 1945); no ties."""
    ranks = abs(values).argsort(axis=-1).argsort(axis=-1) + 1
    return (np.sign(values) * ranks).mean(axis=-1) / values.shape[-1]


LOCATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda values: values.mean(axis=-1),
    "sign": sign_share,
    "trimmed": trimmed_mean,
    "winsor": winsorised_mean,
    "median of means": median_of_means,
    "t": t_statistic,
    "rank": signed_ranks,
}
"""Name -> statistic of the values of one text along the last axis; higher where they are larger."""
