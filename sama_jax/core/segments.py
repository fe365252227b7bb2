"""Finds where the large values of a sequence stand together. NumPy only."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Segment(NamedTuple):
    """A stretch [start, end) of a sequence."""

    start: int
    end: int
    total: float
    """Sum of its values."""


def maximal_segments(values: Float[np.ndarray, " n"]) -> list[Segment]:
    """Finds all stretches whose sum no extension and no part of them exceeds, largest sum first.

    They are disjoint, and begin and end with positive values. By the linear algorithm of Ruzzo and
    Tompa (ISMB 1999). Values that are NaN count as 0.
    """
    found: list[tuple[int, int, float, float]] = []  # start, end, sum before it, sum with it
    total = 0.0
    for at, value in enumerate(np.where(np.isnan(values), 0.0, values).tolist()):
        before, total = total, total + value
        if value <= 0:
            continue
        start, end, left, right = at, at + 1, before, total
        while True:
            number = len(found) - 1
            while number >= 0 and found[number][2] >= left:
                number -= 1
            if number < 0 or found[number][3] >= right:
                break
            start, left = found[number][0], found[number][2]
            del found[number:]
        found.append((start, end, left, right))
    segments = [Segment(start, end, right - left) for start, end, left, right in found]
    return sorted(segments, key=lambda one: (-one.total, one.start))
