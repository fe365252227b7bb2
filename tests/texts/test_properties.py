"""Texts that are written and read again are the same texts, in every format."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from properties import FEW

from sama_jax.texts.read import content_id, read_texts
from sama_jax.texts.tokenizer import TextTokenizer

FIELDS = ("id", "text", "label")
words = st.text(st.characters(codec="utf-8"), max_size=12)
names = words.filter(lambda name: name and "\0" not in name)
"""Ids: one that holds a NUL is refused, since arrays of strings would lose it."""
odd = st.sampled_from(
    ["", " ", '"', "a,b", "a\nb", "a\r\nb", "'", "\u2028", "\ufeffx", "{", "[]", "😀"]
)


@st.composite
def records(draw) -> list[dict[str, Any]]:
    texts = draw(st.lists(words | odd, min_size=1, max_size=6))
    ids = draw(st.lists(names, min_size=len(texts), max_size=len(texts), unique=True))
    labels = st.sampled_from([0, 1, None])
    return [
        {"id": name if draw(st.booleans()) else None, "text": text, "label": draw(labels)}
        for name, text in zip(ids, texts)
    ]


def as_jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_plain_jsonl(rows) -> bytes:
    """Without escapes, without fields that are null, with the line ends of Windows."""
    kept = [{k: v for k, v in row.items() if v is not None} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in kept).encode()


def as_columns(rows) -> bytes:
    return json.dumps({"data": {key: [row[key] for row in rows] for key in FIELDS}}).encode()


def as_csv(rows) -> bytes:
    made = io.StringIO(newline="")
    writer = csv.DictWriter(made, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    return made.getvalue().encode()


def as_parquet(rows) -> bytes:
    kinds = pa.schema([("id", pa.string()), ("text", pa.string()), ("label", pa.int64())])
    made = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, kinds), made)
    return made.getvalue().to_pybytes()


FORMATS = {
    "t.jsonl": as_jsonl,
    "plain.jsonl": as_plain_jsonl,
    "t.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "t.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "columns.json": as_columns,
    "t.csv": as_csv,
    "t.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
@FEW
@given(rows=records())
def test_every_format_gives_back_the_texts(tmp_path: Path, name: str, rows):
    path = tmp_path / name
    path.write_bytes(FORMATS[name](rows))
    found = read_texts(path).texts
    assert [(t.text, t.label) for t in found] == [(r["text"], r["label"]) for r in rows]
    for text, row in zip(found, rows):
        if row["id"] is not None:
            assert text.id == row["id"]
        else:  # of equal texts the later ones, and one whose id is another's name, get a number
            assert text.id.partition("#")[0] == content_id(row["text"])
    assert len({t.id for t in found}) == len(found)


@FEW
@given(texts=st.lists(words | odd, min_size=1, max_size=5), length=st.integers(1, 9))
def test_a_text_has_the_same_ids_beside_any_others(texts, length):
    tokenizer = TextTokenizer(tiny.tokenizer(), "memory")
    together = tokenizer.encode(texts, length)
    whole = tokenizer.encode(texts, 1000)
    for text, beside, full in zip(texts, together, whole):
        (alone,) = tokenizer.encode([text], length)
        np.testing.assert_array_equal(alone.ids, beside.ids)
        np.testing.assert_array_equal(beside.ids, full.ids[:length])
        assert beside.truncated == (len(full.ids) > length)
