"""The forms that people have their texts in: labels, names of fields, packings, encodings."""

import csv
import gzip
import io
import json
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sama_jax.errors import DataError, UsageError
from sama_jax.texts import streams
from sama_jax.texts.read import read_split, read_texts

TEXTS = ["first", 'zweiter é, "so"', "third 😀\nof two lines", "fourth", "fifth", "sixth"]
MEMBERS, NONMEMBERS = (TEXTS[::2], TEXTS[1::2])


def rows(yes, no, text="text", label="label"):
    return [{text: t, label: no if i % 2 else yes} for i, t in enumerate(TEXTS)]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows):
    made = io.StringIO(newline="")
    writer = csv.DictWriter(made, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return made.getvalue()


def parquet(rows):
    made = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), made)
    return made.getvalue().to_pybytes()


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path, *names, kind=DataError, **more):
    with pytest.raises(kind) as caught:
        read_texts(path, *names, **more)
    return str(caught.value)


def found_in(path, *names, **more):
    return [(t.id, t.text, t.label) for t in read_texts(path, *names, **more).texts]


# --- labels --------------------------------------------------------------------------------------

SPELLINGS = [
    (1, 0),
    (True, False),
    (1.0, 0.0),
    ("1", "0"),
    ("1.0", "0.0"),
    ("true", "False"),
    (" TRUE", "false "),
    ("member", "nonmember"),
    ("Member", "Non-Member"),
]


@pytest.mark.parametrize(("yes", "no"), SPELLINGS)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet"])
def test_a_label_is_read_the_same_however_it_is_written(name, yes, no, tmp_path):
    made = rows(yes, no)
    form = {"t.jsonl": jsonl, "t.json": json.dumps, "t.csv": as_csv, "t.parquet": parquet}[name]
    assert [t.label for t in read_texts(put(tmp_path / name, form(made))).texts] == [1, 0] * 3


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_null_and_empty_labels_are_none(name, tmp_path):
    form = {"t.jsonl": jsonl, "t.csv": as_csv, "t.parquet": parquet}[name]
    made = [{"text": "a", "label": "1"}, {"text": "b", "label": ""}, {"text": "c", "label": None}]
    found = read_texts(put(tmp_path / name, form(made))).texts
    assert [t.label for t in found] == [1, None, None]


@pytest.mark.parametrize("label", ["yes", "0.5", "2", "-1", "nan"])
def test_a_label_that_could_mean_anything_is_refused_in_csv_and_parquet(label, tmp_path):
    made = [{"text": "a", "label": label}]
    for path in (put(tmp_path / "t.csv", as_csv(made)), put(tmp_path / "t.parquet", parquet(made))):
        assert f": label is another string ({len(label)} characters); expected" in error_of(path)


@pytest.mark.parametrize("label", [0.5, 2.0, float("nan"), float("inf")])
def test_a_number_that_is_no_label_is_refused_in_parquet(label, tmp_path):
    path = put(tmp_path / "t.parquet", parquet([{"text": "a", "label": label}]))
    assert error_of(path).startswith(
        "t.parquet:row 1: label is another number; expected 1 (member)"
    )


# --- one set of texts in every form --------------------------------------------------------------

FORMS = {
    "t.jsonl": lambda: jsonl(rows(1, 0)),
    "t.csv": lambda: as_csv(rows("member", "Non-member")),
    "t.parquet": lambda: parquet(rows(True, False)),
    "t.json": lambda: json.dumps(rows(1.0, 0.0)),
    "t.jsonl.gz": lambda: gzip.compress(jsonl(rows("true", "false")).encode()),
    "t.jsonl.zst": lambda: zstandard.compress(jsonl(rows("1", "0")).encode()),
    "t.csv.zst": lambda: zstandard.compress(as_csv(rows(1.0, 0.0)).encode()),
    "t.json.zst": lambda: zstandard.compress(json.dumps(rows(True, False)).encode("utf-16")),
    "unnamed.jsonl": lambda: zstandard.compress(jsonl(rows(1, 0)).encode()),
    "16.jsonl": lambda: b"\xff\xfe" + jsonl(rows("MEMBER", "NONMEMBER")).encode("utf-16-le"),
    "be.csv": lambda: b"\xfe\xff" + as_csv(rows("1.0", "0.0")).encode("utf-16-be"),
    "16.json": lambda: json.dumps(rows(True, 0)).encode("utf-16"),
    "pairs.jsonl": lambda: jsonl(
        {"member": a, "nonmember": b} for a, b in zip(MEMBERS, NONMEMBERS)
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_texts_are_read_from_every_form(name, tmp_path):
    expected = found_in(put(tmp_path / "expected.jsonl", jsonl(rows(1, 0))))
    assert found_in(put(tmp_path / name, FORMS[name]())) == expected
    assert len({id for id, *_ in expected}) == len(TEXTS)


def test_a_split_reads_them_the_same(tmp_path):
    members = put(tmp_path / "m.jsonl", jsonl(MEMBERS))
    nonmembers = put(tmp_path / "n.json", json.dumps(NONMEMBERS).encode("utf-16"))
    found = [(t.id, t.text, t.label) for t in read_split(members, nonmembers).texts]
    assert found == found_in(put(tmp_path / "expected.jsonl", jsonl(rows(1, 0))))


# --- bare strings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", jsonl(TEXTS)),
        ("t.json", json.dumps(TEXTS)),
        ("t.json", jsonl(TEXTS)),
        ("t.jsonl", json.dumps(TEXTS)),
        ("t.json", '["first",\n' + ",\n".join(map(json.dumps, TEXTS[1:])) + "]"),
    ],
)
def test_bare_strings_are_texts(name, content, tmp_path):
    found = read_texts(put(tmp_path / name, content)).texts
    assert [(t.text, t.label) for t in found] == [(text, None) for text in TEXTS]


def test_bare_strings_are_no_texts_where_a_field_was_named(tmp_path):
    message = error_of(put(tmp_path / "t.jsonl", jsonl(["private"])), "input")
    assert message == "t.jsonl:1: expected a JSON object, found a string"


# --- names of fields -----------------------------------------------------------------------------

NAMED = {"t.jsonl": jsonl, "t.json": json.dumps, "t.csv": as_csv, "t.parquet": parquet}


@pytest.mark.parametrize("name", [*NAMED, "columns.json"])
def test_fields_that_are_named_are_read(name, tmp_path):
    made = rows(1, 0, "input", "seen")
    for row in made:
        row |= {"text": "no text", "label": 7, "Label": "x"}
    content = json.dumps({key: [row[key] for row in made] for key in made[0]})
    path = put(tmp_path / name, NAMED[name](made) if name in NAMED else content)
    expected = found_in(put(tmp_path / "expected.jsonl", jsonl(rows(1, 0))))
    assert found_in(path, "input", "seen") == expected


def test_wikimia_is_read(tmp_path):
    path = put(tmp_path / "t.jsonl", jsonl(rows(1, 0, "input")))
    assert found_in(path, "input") == found_in(put(tmp_path / "e.jsonl", jsonl(rows(1, 0))))


@pytest.mark.parametrize("near", ["input", "content", "document", "Text", "TEXT ", "texts"])
@pytest.mark.parametrize("name", NAMED)
def test_texts_under_another_name_are_refused_with_the_flag(name, near, tmp_path):
    path = put(tmp_path / name, NAMED[name]([{near: "private words", "label": 1}]))
    message = error_of(path)
    assert "--text-field NAME" in message
    assert "private" not in message
    assert read_texts(path, near).texts[0].text == "private words"


@pytest.mark.parametrize("near", ["is_member", "labels", "Label"])
def test_labels_under_another_name_are_refused_with_the_flag(near, tmp_path):
    path = put(tmp_path / "t.jsonl", jsonl([{"text": "a", near: True}, {"text": "b", near: 0.0}]))
    assert "leave it out, or name it: --label-field NAME" in error_of(path)
    assert [t.label for t in read_texts(path, label_field=near).texts] == [1, 0]


@pytest.mark.parametrize("name", NAMED)
def test_a_name_that_the_file_does_not_have_is_refused_with_its_fields(name, tmp_path):
    path = put(tmp_path / name, NAMED[name]([{"text": "private", "author": "Jane"}]))
    for names, lacks in ((("body",), "body"), ((None, "seen"), "seen")):
        message = error_of(path, *names)
        assert f"has no {'column' if lacks == 'body' and name[2] in 'cp' else 'field'} " in message
        assert f"'{lacks}'" in message
        assert "text, author)" in message
        assert "private" not in message
        assert "Jane" not in message
        assert "\n" not in message


def test_a_file_may_lack_labels_where_they_are_not_needed_but_not_under_another_name(tmp_path):
    path = put(tmp_path / "t.jsonl", jsonl([{"text": "a"}]))
    assert found_in(path, None, "seen", labels_needed=False) == found_in(path)
    put(path, jsonl([{"text": "a", "is_member": 0}]))
    assert "has a field 'is_member'" in error_of(path, None, "seen", labels_needed=False)


def test_labels_that_are_null_in_a_named_field_are_not_sought_elsewhere(tmp_path):
    path = put(tmp_path / "t.jsonl", jsonl([{"text": "a", "seen": None, "Label": 1}]))
    assert read_texts(path, label_field="seen").texts[0].label is None


def test_named_columns_are_checked_as_the_others(tmp_path):
    path = put(tmp_path / "t.csv", "input,input\na,b\n")
    assert error_of(path, "input") == "t.csv:1: has several columns 'input'; keep one of them"
    path = put(tmp_path / "t.parquet", parquet([{"input": b"private"}]))
    assert "its column 'input' holds binary, expected strings" in error_of(path, "input")


def test_pairs_are_not_taken_for_named_fields(tmp_path):
    path = put(tmp_path / "t.jsonl", jsonl([{"member": "a", "nonmember": "b"}]))
    assert "has no field 'input'" in error_of(path, "input")
    assert [(t.text, t.label) for t in read_texts(path, "member").texts] == [("a", None)]


def test_one_field_is_not_both(tmp_path):
    path = put(tmp_path / "t.jsonl", jsonl(rows(1, 0)))
    assert "cannot hold both" in error_of(path, "label", kind=UsageError)


# --- zstd and UTF-16 -----------------------------------------------------------------------------


def test_what_a_zstd_file_unpacks_to_is_bounded(tmp_path):
    packing = zstandard.ZstdCompressor().compressobj()
    frame = b"".join(packing.compress(b"a" * 2**24) for _ in range(64)) + packing.flush()
    assert len(frame) < 2**18
    path = put(tmp_path / "t.jsonl.zst", frame)
    tracemalloc.start()
    with path.open("rb") as file, pytest.raises(DataError, match="more than 268,435,456 bytes"):
        read_all(path, file)  # reading texts, the limit of a line would come first
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**27


def read_all(path, file):
    stream = streams.unpacked(path, file)
    while stream.read(2**20):
        pass


@pytest.mark.parametrize("left", [1, 5, 300])
def test_a_truncated_or_damaged_zstd_file_is_refused(left, tmp_path):
    content = zstandard.compress(jsonl({"text": str(i)} for i in range(1000)).encode())
    path = put(tmp_path / "t.jsonl.zst", content[:-left])
    assert "the zstd file is truncated or damaged" in error_of(path)
    put(path, content[:20] + bytes(9) + content[29:])
    assert "the zstd file is truncated or damaged" in error_of(path)
    put(path, content + b"more")
    assert "the zstd file is truncated or damaged" in error_of(path)


def test_frames_of_zstd_follow_each_other_and_some_are_skipped(tmp_path):
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    frames = [zstandard.compress(jsonl([{"text": t}]).encode()) for t in TEXTS]
    path = put(tmp_path / "t.jsonl.zst", skipped + skipped.join(frames) + skipped)
    assert [t.text for t in read_texts(path).texts] == TEXTS


def test_zstd_without_its_package_names_the_extra(tmp_path, monkeypatch):
    path = put(tmp_path / "t.jsonl.zst", zstandard.compress(b'{"text": "a"}'))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    message = error_of(path, kind=UsageError)
    assert message == f"{path}: reading zstd needs zstandard; pip install 'sama-jax[zst]'"


def test_utf_16_is_read_across_the_pieces_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_PIECE", 7)
    texts = ["é😀" * n for n in range(1, 40)]
    path = put(tmp_path / "t.jsonl", jsonl({"text": t} for t in texts).encode("utf-16"))
    assert [t.text for t in read_texts(path).texts] == texts


@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_utf_16_without_its_mark_and_utf_32_are_refused(name, code, tmp_path):
    form = {"t.jsonl": jsonl, "t.json": json.dumps, "t.csv": as_csv}[name]
    message = error_of(put(tmp_path / name, form([{"text": "private"}]).encode(code)))
    assert "private" not in message
    assert "UTF-16" not in message


@pytest.mark.parametrize("spoilt", [b"\x00", b"\x00\xd8a\x00", b"\x00\xd8"])
def test_what_only_begins_as_utf_16_is_refused(spoilt, tmp_path):
    content = jsonl([{"text": "private"}]).encode("utf-16") + spoilt
    message = error_of(put(tmp_path / "t.jsonl", content))
    assert "begins as UTF-16 does, but is not UTF-16 text" in message
    assert "private" not in message
