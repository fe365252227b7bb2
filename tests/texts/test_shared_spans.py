"""Spans that two tokenizers share: whole tokens on both sides, as short as they can be."""

import functools

import numpy as np
import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st
from properties import FEW
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sama_jax.errors import DataError, ModelError
from sama_jax.texts import tokenizer_calls
from sama_jax.texts.shared_spans import Shared, Tokens, boundaries, shared_spans
from sama_jax.texts.tokenizer import TextTokenizer

LONG = 10_000
ODD = [
    "né",
    "😀👩‍👩‍👧",
    "\u00a0",
    "\u200b",
    "ﬁ½",
    "日本語",
    "\r\n\t",
    "İ",
    "e\u0301",
    "<|endoftext|>",
    "A B",
]
TEXTS = st.lists(st.sampled_from([*tiny.texts(30, (1, 3)), " ", "  ", *ODD]) | st.text(max_size=6))
TEXTS = TEXTS.map("".join)


@functools.lru_cache
def byte_level(vocab: int, *, adds: bool = False) -> TextTokenizer:
    made = tiny.tokenizer(vocab, seed=vocab)
    if adds:
        end = ("<|endoftext|>", 0)
        made.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="<|endoftext|> $A <|endoftext|>", special_tokens=[end]
        )
    return TextTokenizer(made, f"bytes of {vocab}")


@functools.lru_cache
def lower_case() -> TextTokenizer:
    """One like BERT's: no accents, no capitals, no white space, [CLS] and [SEP] around a text."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore
    made.normalizer = normalizers.BertNormalizer()  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    made.train_from_iterator([text.replace(" ", "") for text in tiny.texts(50)], trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))  # pyright: ignore
    return TextTokenizer(made, "lower case")


def of(ours: TextTokenizer, theirs: TextTokenizer, text: str, most: int = LONG) -> Shared | None:
    return shared_spans(ours.tokens(text), theirs.tokens(text), most)


def spelt(side: Tokens, spans: np.ndarray) -> dict[int, list[str]]:
    """The pieces of each span."""
    found: dict[int, list[str]] = {}
    for piece, span in zip(side.pieces, spans.tolist()):
        found.setdefault(span, []).append(piece)
    return found


@FEW
@given(TEXTS)
def test_tokens_of_one_tokenizer_are_spans(text: str):
    for one in (byte_level(270, adds=True), byte_level(290), lower_case()):
        tokens, found = one.tokens(text), of(one, one, text)
        if tokens.special.all():
            assert found is None
            continue
        assert found is not None
        (encoded,) = one.encode([text], LONG)
        each = np.arange(len(encoded.ids))
        for ids in (found.ids, found.tokens.reference_ids):
            np.testing.assert_array_equal(ids, encoded.ids)
        for spans in (found.tokens.target, found.tokens.reference):
            np.testing.assert_array_equal(spans, each)
        np.testing.assert_array_equal(found.special, encoded.special)
        assert not found.cut


@FEW
@given(TEXTS)
def test_spans_of_byte_level_tokenizers_spell_the_same_bytes(text: str):
    ours, theirs = (byte_level(v).tokens(text) for v in (270, 297))
    found = shared_spans(ours, theirs, LONG)
    if found is None:
        assert not text
        return
    spans = spelt(ours, found.tokens.target), spelt(theirs, found.tokens.reference)
    assert [list(one) for one in spans] == [list(range(len(found.special)))] * 2
    joined = [["".join(pieces) for pieces in one.values()] for one in spans]
    assert joined[0] == joined[1]
    # As short as they can be: at every character where both have an end, a span ends.
    ends = [set(np.cumsum([len(p) for p in side.pieces]).tolist()) for side in (ours, theirs)]
    characters = np.cumsum([0, *(len(c.encode("utf-8", "replace")) for c in text)])
    assert set(np.cumsum([len(p) for p in joined[0]])) >= ends[0] & ends[1] & set(characters)


@FEW
@given(TEXTS)
def test_spans_hold_the_same_characters_of_a_text_that_one_side_normalises(text: str):
    ours, theirs = byte_level(290).tokens(text), lower_case().tokens(text)
    found = shared_spans(ours, theirs, LONG)
    if found is None:
        assert theirs.special.all() or ours.special.all()
        return
    for spans in (found.tokens.target, found.tokens.reference):
        used = spans[spans >= 0]
        assert (np.diff(used) >= 0).all()
        np.testing.assert_array_equal(np.unique(used), np.arange(len(found.special)))
    # [CLS] and [SEP] belong to no span: the other side has none.
    np.testing.assert_array_equal(found.tokens.reference[[0, -1]], [-1, -1])
    assert (found.tokens.reference[1:-1] >= 0).all()
    previous = 0
    for span in range(len(found.special)):
        places = [
            side.places[np.flatnonzero(of_side == span)]
            for side, of_side in ((ours, found.tokens.target), (theirs, found.tokens.reference))
        ]
        # Only white space and what the normaliser drops may lie outside of the other side's tokens.
        assert min(p[:, 0].min() for p in places) >= previous
        last = span == len(found.special) - 1
        previous = max(p[:, 1].max() for p in places)
        assert last or places[0][:, 1].max() == places[1][:, 1].max()


@FEW
@given(TEXTS, st.integers(1, 30))
def test_a_cut_text_keeps_whole_spans_and_both_sides_fit(text: str, most: int):
    ours, theirs = byte_level(270, adds=True), lower_case()
    whole, found = of(ours, theirs, text), of(ours, theirs, text, most)
    if whole is None or found is None:
        assert whole is None or most < 5 or not found
        return
    kept = len(found.special)
    assert max(len(found.ids), len(found.tokens.reference_ids)) <= most
    assert found.cut == (kept < len(whole.special))
    for few, all_of in (
        (found.tokens.target, whole.tokens.target),
        (found.tokens.reference, whole.tokens.reference),
    ):
        np.testing.assert_array_equal(few[few >= 0], all_of[(all_of >= 0) & (all_of < kept)])
    if found.cut:  # the next span fits on one side at most
        more = [
            (spans == kept).sum() + len(ids)
            for spans, ids in (
                (whole.tokens.target, found.ids),
                (whole.tokens.reference, found.tokens.reference_ids),
            )
        ]
        assert max(more) > most


@FEW
@given(TEXTS, st.integers(4, 30))
def test_a_cut_text_of_one_tokenizer_is_the_text_as_it_is_cut_alone(text: str, most: int):
    one = byte_level(270, adds=True)
    found, (encoded,) = of(one, one, text, most), one.encode([text], most)
    if found is not None:
        np.testing.assert_array_equal(found.ids, encoded.ids)
        np.testing.assert_array_equal(found.special, encoded.special)


PLACES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8)


@FEW
@given(PLACES.map(lambda found: np.array([sorted(place) for place in found])))
@example(np.array([[0, 0], [0, 2], [2, 2], [2, 3]]))
def test_boundaries_are_where_no_token_is_on_both_sides(places: np.ndarray):
    at, after = boundaries(places)
    expected: dict[int, int] = {}
    for count in range(1, len(places)):
        character = places[:count, 1].max()
        if 0 < character <= places[count:, 0].min():
            expected.setdefault(int(character), count)
    assert dict(zip(at.tolist(), after.tolist())) == expected


@pytest.mark.parametrize("text", ["", " ", "\u200b"])
def test_a_text_of_no_token_on_one_side_has_no_spans(text: str):
    assert of(byte_level(290), lower_case(), text) is None


def test_a_tokenizer_that_hides_where_tokens_stand_is_refused(monkeypatch: pytest.MonkeyPatch):
    inside = tiny.tokenizer()
    end = "<|endoftext|>"
    inside.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"$A {end} $A", special_tokens=[(end, 0)]
    )
    with pytest.raises(ModelError, match=r"inside a text|have no places"):
        TextTokenizer(inside, "here").tokens("karo mite")
    monkeypatch.setattr(tokenizer_calls, "WHOLE_BYTES", 8)
    monkeypatch.setattr(tokenizer_calls, "STEP", 4)
    with pytest.raises(DataError, match="split it"):
        byte_level(290).tokens("karo mite sundal")
