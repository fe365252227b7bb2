"""Cuts a window into a few rows at a time, so that little memory is taken beside the result."""

from collections.abc import Callable

import numpy as np

PIECE = 2**18
"""Values that are dequantised at once, which takes some 20 bytes for each meanwhile."""


def by_rows(
    shape: tuple[int, ...],
    dtype: str,
    index: tuple[slice, ...],
    rows: Callable[[int, int], np.ndarray],
) -> np.ndarray:
    """Returns a window of a matrix [rows, columns] that is made row by row.

    Args:
      shape: of the whole matrix.
      dtype: of the result, to which values are rounded once.
      index: the window.
      rows: (first, last) -> these rows, float32.
    """
    first, last, _ = index[0].indices(shape[0])
    low, high, _ = index[1].indices(shape[1])
    out = np.empty((max(last - first, 0), max(high - low, 0)), dtype)
    step = max(1, PIECE // shape[1])
    for at in range(first, last, step):
        end = min(at + step, last)
        with np.errstate(all="ignore"):  # what is no number is found when the model is used
            out[at - first : end - first] = rows(at, end)[:, low:high].astype(dtype)
    return out
