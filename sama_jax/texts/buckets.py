"""Chooses the lengths that texts are padded to, and puts texts of a length into batches."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class BatchPlan(NamedTuple):
    """Which texts make up one batch."""

    length: int
    rows: Int[np.ndarray, " r"]
    """Indices into the caller's list, -1 for filling."""


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """Lists the padded lengths that may be used: four an octave, at least 32 apart, `max_length`.

    >>> bucket_lengths(400)
    (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 400)
    """
    lengths, length = [], 32
    while length < max_length:
        lengths.append(length)
        length += max(32, 2 ** (length.bit_length() - 3))
    return (*lengths, max_length)


def plan_batches(
    lengths: Int[np.ndarray, " n"],
    buckets: Sequence[int],
    rows_of: Callable[[int], int],
    pays: Callable[[int, int, int], bool] = lambda count, length, larger: True,
) -> list[BatchPlan]:
    """Assigns every text of length > 0 to a batch of its bucket.

    Longest bucket first, so that running out of memory shows at once; the given order inside a
    bucket; `rows_of(length)` rows in every batch of a bucket, the last one filled with -1. A
    bucket with fewer texts than half its rows, or that does not pay, joins the next larger one in
    use, which costs some padding and saves a compilation.

    Args:
      lengths: int [n], tokens of each text, none above the largest bucket.
      buckets: padded lengths, ascending.
      rows_of: rows of a batch of a padded length, at least 1.
      pays: whether `count` texts padded to `length` and not to `larger` are worth a program.
    """
    lengths = np.asarray(lengths)
    if lengths.size and lengths.max() > buckets[-1]:
        raise ValueError(f"a text of {lengths.max()} tokens exceeds the bucket of {buckets[-1]}")
    bucket_of = np.searchsorted(np.asarray(buckets), lengths)
    bucket_of[lengths == 0] = -1
    for i, bucket in enumerate(buckets):
        count, larger = int((bucket_of == i).sum()), bucket_of[bucket_of > i]
        if count and larger.size:
            next_one = larger.min()
            if 2 * count < rows_of(bucket) or not pays(count, bucket, buckets[next_one]):
                bucket_of[bucket_of == i] = next_one
    plans = []
    for i in range(len(buckets) - 1, -1, -1):
        members, rows = np.flatnonzero(bucket_of == i).astype(np.int32), rows_of(buckets[i])
        for start in range(0, len(members), rows):
            chunk = members[start : start + rows]
            filled = np.pad(chunk, (0, rows - len(chunk)), constant_values=-1)
            plans.append(BatchPlan(buckets[i], filled))
    return plans
