"""Documents cut into windows."""

import itertools
import random

import pytest
import tiny
from tokenizers import processors

from sama_jax.errors import DataError, UsageError
from sama_jax.storage.documents import document_rows
from sama_jax.texts.read import Text, collect
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.texts.windows import LEAST, windows_of


def tokenizer(*, ends: bool = False) -> TextTokenizer:
    made = tiny.tokenizer()
    if ends:
        made.post_processor = processors.TemplateProcessing(
            "<|endoftext|> $A <|endoftext|>", None, [("<|endoftext|>", 0)]
        )
    return TextTokenizer(made, "here")


def document(seed: int, size: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choices(["ka", "ro ", "sun", "😀", "日本", "\n", "é ", "  "], k=size))


@pytest.mark.parametrize("ends", [False, True])
def test_windows_make_up_the_document_and_fit(ends: bool):
    made = tokenizer(ends=ends)
    for seed in range(20):
        text = document(seed, 300)
        found = windows_of([Text("d", text, 1, "f:1")], made, 40, 40)
        lengths = [len(e.ids) for e in made.encode([w.text for w in found], 1000)]
        assert max(lengths) <= 40
        joined = "".join(w.text for w in found)
        rest = text[len(joined) :]
        assert text == joined + rest
        assert len(made.starts(rest)) < LEAST
        assert min(lengths[:-1]) > 30
        assert [w.id for w in found] == [f"d [{i + 1}]" for i in range(len(found))]
        assert {(w.document, w.group, w.label) for w in found} == {("d", "document d", 1)}


def test_a_stride_makes_windows_overlap_and_leaves_nothing_out():
    made, text = tokenizer(), document(3, 200)
    found = windows_of([Text("d", text, None, "f:1")], made, 40, 10)
    places = [text.index(w.text) for w in found]
    assert len(found) > len(made.starts(text)) // 10 - 4
    assert places == sorted(places)
    for (a, b), start in zip(itertools.pairwise(found), places):
        assert text.index(b.text) <= start + len(a.text)
    assert text.endswith(found[-1].text)


def test_a_short_document_is_its_own_window():
    given = Text("d", "ka ro", 0, "f:1", "book")
    (only,) = windows_of([given], tokenizer(), 40, 40)
    assert only == given._replace(document="d")
    assert windows_of([given._replace(text="")], tokenizer(), 40, 40)[0].text == ""


def test_what_cannot_be_cut_is_refused():
    text = Text("d", document(0, 300), None, "f:1")
    for stride in (0, 41):
        with pytest.raises(UsageError, match="expected 1 to 40"):
            windows_of([text], tokenizer(), 40, stride)
    with pytest.raises(DataError, match="id of another one's window"):
        windows_of([text, Text("d [1]", "ka", None, "f:2")], tokenizer(), 40, 40)
    assert collect([text]).repeated == 0


def window(name: str, score: float | None, **more) -> dict:
    return {
        "id": f"{name} [1]",
        "document": name,
        "top": 2,
        "n_tokens": 5,
        "truncated": False,
        "status": "ok",
        "scores": {"sama": score},
        "passes": {"sama": 4},
        **more,
    }


def test_a_documents_scores_are_the_mean_and_that_of_the_largest():
    rows = [window("a", x, label=1, group=0, baseline=x) for x in (1.0, 4.0, 2.0)]
    rows += [window("b", None, group=1, undefined={"sama": "why"}), window("b", 3.0, group=1)]
    rows += [window("c", None, group=1, status="empty", undefined={"sama": "why"})]
    a, b, c = document_rows(rows)
    assert a == {
        "id": "a",
        "label": 1,
        "status": "ok",
        "n_tokens": 15,
        "truncated": False,
        "windows": 3,
        "baseline": 7 / 3,
        "scores": {"sama": 7 / 3, "sama@top2": 3.0},
        "passes": {"sama": 12, "sama@top2": 12},
    }
    assert (b["scores"], b["group"]) == ({"sama": 3.0, "sama@top2": 3.0}, 1)
    assert c["scores"] == {"sama": None, "sama@top2": None}
    assert c["undefined"] == {"sama": "why", "sama@top2": "why"}
    assert c["status"] == "empty"
