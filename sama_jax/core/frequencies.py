"""Computes what the frequencies of tokens alone predict: the least that a model must better."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def frequency_losses(texts: Sequence[Int[np.ndarray, "..."]]) -> Float[np.ndarray, " n"]:
    """Averages minus the log frequency of each text's tokens, in nats.

    The frequencies are those of all other texts, one added to each token that occurs anywhere
    (Laplace), so no text is predicted by itself.

    Args:
      texts: token ids of each text.

    Returns:
      float64 [n]; NaN for a text without tokens, and for all where there is no other text.
    """
    kinds, index = np.unique(np.concatenate([[], *texts]), return_inverse=True)
    ends = np.cumsum([0, *map(len, texts)])
    total = np.bincount(index, minlength=len(kinds))
    found = np.full(len(texts), np.nan)
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        own, counts = np.unique(index[start:end], return_counts=True)
        others = len(index) - (end - start)
        if end > start and others:
            frequency = (total[own] - counts + 1) / (others + len(kinds))
            found[i] = -(counts * np.log(frequency)).sum() / (end - start)
    return found
