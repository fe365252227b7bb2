"""Which texts the controls of an audit take."""

import numpy as np
import pytest

from sama_jax.errors import DataError
from sama_jax.programs.pipeline_control import TEXTS, choose_halves
from sama_jax.programs.second_seed import choose_texts
from sama_jax.texts.read import Text
from sama_jax.validity import bounds


def texts_of(count: int, label: int | None = 0, chunks: int = 0) -> list[Text]:
    """Texts, of which `chunks` each are of one document; 0: no document is named."""
    return [
        Text(f"{label}-{i}", f"text {label} {i}", label, "", f"d{i // chunks}" if chunks else None)
        for i in range(count)
    ]


def test_a_pipeline_control_takes_one_text_of_each_document_and_non_members_alone():
    texts = [*texts_of(100, 1), *texts_of(100, 0, chunks=2), *texts_of(9, None)]
    readable = [text.id != "0-0" for text in texts]
    found = choose_halves(texts, readable, 42)
    assert [text.label for text in found.texts] == [1] * 25 + [0] * 25
    assert len({text.group for text in found.texts}) == 50
    assert {text.id[:2] for text in found.texts} == {"0-"}
    assert "0-0" not in {text.id for text in found.texts}
    assert len(choose_halves(texts_of(500), [True] * 500, 42).learnt) == TEXTS


def test_a_text_that_stands_there_twice_is_taken_once():
    twice = [text._replace(id=f"{text.id}#2") for text in texts_of(20)]
    found = choose_halves(texts_of(20) + twice, [True] * 40, 42)
    assert len({text.text for text in found.texts}) == len(found.texts) == 20


def test_what_a_control_takes_does_not_depend_on_the_order_of_the_file():
    texts = texts_of(200)
    mixed = [texts[i] for i in np.random.default_rng(0).permutation(200)]
    first, second = (choose_halves(some, [True] * 200, 42) for some in (texts, mixed))
    assert first == second
    assert choose_halves(texts, [True] * 200, 43) != first
    assert choose_texts(texts, (), 42) == choose_texts(mixed, (), 42)


def test_too_few_documents_are_refused_with_what_else_to_give():
    few = 2 * bounds.CONTROL_TEXTS - 1
    with pytest.raises(DataError, match=rf"needs 14 .*found {few}; give more.*--control FILE"):
        choose_halves(texts_of(5 * few, chunks=5), [True] * 5 * few, 42)
    assert choose_halves(texts_of(few + 1), [True] * (few + 1), 42).texts


def test_half_of_each_class_is_scored_again_and_others_take_free_places():
    texts = [*texts_of(300, 1), *texts_of(20, 0), *texts_of(300, None)]
    known = texts_of(5, 1)[0]._replace(id="known", text="known", control=True)
    found = choose_texts([*texts, known], {"0-0"}, 42)
    assert len(found) == len({text.id for text in found}) == bounds.SECOND_TEXTS
    assert sum(text.label == 0 for text in found) == 19
    assert sum(text.label == 1 for text in found) >= 50
    assert not {"known", "0-0"} & {text.id for text in found}
