"""Joins an estimate over repetitions, such as several trainings of one model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy


class Pooled(NamedTuple):
    """The mean of an estimate over repetitions."""

    mean: float
    low: float
    """Ends of its 95 % interval."""
    high: float
    count: int


def pool(estimates: Sequence[float], intervals: Sequence[Sequence[float]]) -> Pooled:
    """Averages estimates of equal weight, each with its own 95 % interval.

    The interval of the mean is the wider of two: by the repetitions' own intervals, as if they were
    independent, and by how much the estimates differ (Student's t). The first knows nothing of what
    varies between trainings, the second little with two or three of them.

    Args:
      estimates: one a repetition, at least one.
      intervals: its ends `(low, high)`.
    """
    values, ends = np.asarray(estimates, np.float64), np.asarray(intervals, np.float64)
    count, mean = len(values), float(values.mean())
    width = np.sqrt(np.square((ends[:, 1] - ends[:, 0]) / 2).sum()) / count
    if count == 1:
        return Pooled(mean, float(ends[0, 0]), float(ends[0, 1]), 1)
    between = (
        values.std(ddof=1)
        / np.sqrt(count)
        * scipy.stats.t.ppf(scipy.stats.norm.cdf(1.96), count - 1)
    )
    half = float(max(width, between))
    return Pooled(mean, mean - half, mean + half, count)
