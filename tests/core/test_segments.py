"""Maximal segments against all stretches, by the definition of Ruzzo and Tompa."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sama_jax.core.segments import maximal_segments


def by_definition(values: list[int]) -> list[tuple[int, int, float]]:
    """Takes the best stretch (the shortest of equal ones), then those left and right of it."""
    best, found = 0.0, None
    for start in range(len(values)):
        for end in range(start + 1, len(values) + 1):
            total = sum(values[start:end])
            if total > best or (found and total == best and end - start < found[1] - found[0]):
                best, found = total, (start, end)
    if found is None:
        return []
    start, end = found
    right = [(a + end, b + end, t) for a, b, t in by_definition(values[end:])]
    return [*by_definition(values[:start]), (start, end, float(best)), *right]


@given(st.lists(st.integers(-6, 6), max_size=14))
def test_they_are_those_of_the_definition(values: list[int]):
    found = maximal_segments(np.array(values, float))
    assert sum(one.total for one in found) == sum(t for _, _, t in by_definition(values))
    assert [one.total for one in found] == sorted((o.total for o in found), reverse=True)
    for one in found:
        assert one.total == sum(values[one.start : one.end])
        assert values[one.start] > 0 < values[one.end - 1]


def test_the_example_of_the_paper():
    values = np.array([4, -5, 3, -3, 1, 2, -2, 2, -2, 1, 5], float)
    assert maximal_segments(values) == [(4, 11, 7.0), (0, 1, 4.0), (2, 3, 3.0)]


@pytest.mark.parametrize("values", [[], [-1.0, 0.0], [np.nan, np.nan]])
def test_without_a_positive_value_there_are_none(values: list[float]):
    assert maximal_segments(np.array(values, float)) == []


def test_what_was_not_read_joins_its_neighbours():
    assert maximal_segments(np.array([1.0, np.nan, 2.0])) == [(0, 3, 3.0)]
