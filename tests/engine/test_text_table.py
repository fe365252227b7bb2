"""The columns that a run's texts are kept in."""

import numpy as np
import pytest

from sama_jax.arrays import Encoded
from sama_jax.attacks.queries import ViewText
from sama_jax.config import AuditSettings
from sama_jax.engine.text_table import (
    derived_view,
    described,
    original_view,
    padded,
    table_from_description,
    table_of,
)
from sama_jax.errors import DataError

SETTINGS = AuditSettings(max_length=64)


def view(*ids: int):
    tokens = np.array(ids, np.int32)
    return original_view(
        Encoded(tokens, np.zeros(len(ids), bool), False, 9, 12), SETTINGS, shift=False
    )


@pytest.mark.parametrize("alone", [True, False])
def test_a_text_of_none_but_the_tokenizers_own_tokens_is_empty(alone):
    special = np.array([True, alone, True])
    encoded = Encoded(np.array([1, 5, 2], np.int32), special, False, 9, 12)
    found = original_view(encoded, SETTINGS, shift=False)
    assert found.maskable.tolist() == [not alone] * 3
    assert table_of([found]).readable.tolist() == [not alone]


def test_rows_come_back_as_they_went_in():
    views = [view(5, 6, 7), None, view(8), view()]
    table = table_of(views)
    assert table.num_texts == 4
    assert table.exists.tolist() == [True, False, True, True]
    assert table.readable.tolist() == [True, False, True, False]
    assert table.lengths.tolist() == [3, 0, 1, 0]
    for row, expected in enumerate(views):
        found = table.row(row)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.store_key == expected.store_key
            assert found.key == expected.key
            np.testing.assert_array_equal(found.ids, expected.ids)


def test_rows_are_taken_in_order_and_minus_one_is_empty():
    table = table_of([view(5, 6, 7), view(8), view(9, 9)])
    some = table.take([2, -1, 0])
    assert some.lengths.tolist() == [2, 0, 3]
    assert some.store_keys[1] == ""
    tokens = padded(some.ids, 4, np.int32)
    assert tokens.tolist() == [[9, 9, 0, 0], [0, 0, 0, 0], [5, 6, 7, 0]]


def test_what_stands_before_a_text_counts_in_a_pass_and_is_not_masked():
    original = view(5, 6, 7)
    made = ViewText(original.ids, None, np.array([1, 2], np.int32), same_masks=True)
    table = table_of([derived_view(made, original, SETTINGS, shift=False, room=128)])
    assert table.lengths.tolist() == [5]
    assert table.offsets.tolist() == [2]
    assert table.num_tokens.tolist() == [3]
    assert table.store_keys[0] != original.store_key


def test_a_description_holds_no_token_and_gives_the_same_plans():
    table = table_of([view(5, 6, 7), None])
    again = table_from_description(described(table), "texts.jsonl")
    assert again.ids[0].size == 0
    assert again.store_keys == table.store_keys
    np.testing.assert_array_equal(again.high, table.high)
    np.testing.assert_array_equal(again.low, table.low)
    np.testing.assert_array_equal(again.maskable[0], table.maskable[0])


@pytest.mark.parametrize("bad", [{"key": "zz"}, {"tokens": "many"}, {"store_key": None}])
def test_another_description_is_refused(bad):
    (good, *_) = described(table_of([view(5, 6, 7)]))
    del good["characters"]
    with pytest.raises(DataError, match=r"texts\.jsonl"):
        table_from_description([good | bad], "texts.jsonl")
