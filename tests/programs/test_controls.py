"""Which texts the controls of an audit take."""

import numpy as np
import pytest

from sama_jax.arrays import Encoded
from sama_jax.errors import DataError
from sama_jax.programs.audit_records import document_numbers
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


@pytest.mark.parametrize("end", ["", " again"])
def test_a_text_that_stands_there_twice_is_taken_once(end):
    long = [text._replace(text=" ".join(f"{i}w{j}" for j in range(30))) for i, text in
            enumerate(texts_of(20))]  # fmt: skip
    twice = [text._replace(id=f"{text.id}#2", text=text.text + end) for text in long]
    found = choose_halves(long + twice, [True] * 40, 42)
    assert len({text.id.split("#")[0] for text in found.texts}) == len(found.texts) == 20


def test_copies_near_duplicates_and_equal_tokens_of_a_control_are_one_document():
    words = [" ".join(f"{i}w{j}" for j in range(30)) for i in range(7)]
    given = [words[0], words[0], f"{words[0]} again", words[1], words[2], words[3], words[4]]
    groups = [None, None, None, None, "d", "d", None]
    known = [
        Text(f"c{i}", text, None, "", group, control=True)
        for i, (text, group) in enumerate(zip(given, groups))
    ]
    audited = [text._replace(group="e") for text in texts_of(2)]
    last = Text("c7", words[5], None, "", control=True)  # cut to the tokens of words[1]
    texts = [*audited, *known, last]
    ids = [np.array([i]) for i in range(len(texts))]
    ids[-1] = ids[5]
    encoded = [Encoded(one, np.zeros(1, bool), False, 0, 0) for one in ids]
    found = document_numbers(texts, encoded)
    assert found[:2] == [0, 0]
    assert found[2] == found[3] == found[4] != found[5] == found[9]
    assert found[6] == found[7] == 1
    assert found[8] is None
    assert len({*found}) == 5
    assert document_numbers(audited, encoded[:2]) == [0, 0]


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
