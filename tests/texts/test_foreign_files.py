"""Files of texts that others made: names that are nearly right, private texts, sizes."""

import gzip
import json
import os
import threading
import time
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from sama_jax.errors import DataError
from sama_jax.texts import read, records, streams
from sama_jax.texts.read import read_texts

PRIVATE = "Jane Doe was diagnosed with a private thing " * 70


def lines(*found):
    return "".join(json.dumps(record) + "\n" for record in found)


def error_of(path, content=None):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_texts(path)
    return str(caught.value)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Label", " label", "\ufefflabel", "labels", "is_member", "member"]
)
def test_labels_under_another_name_are_not_lost(name, tmp_path):
    for path, content in [
        ("t.jsonl", lines({"text": "x", name: 1})),
        ("t.json", json.dumps({"text": ["x"], name: [1]})),
        ("t.csv", f"text,{name}\nx,1\n"),
    ]:
        message = error_of(tmp_path / path, content)
        assert "has a field '" in message
        assert "write it 'label' if it is meant, else leave it out" in message
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"], name: [1]}), tmp_path / "t.parquet")
    assert "write it 'label'" in error_of(tmp_path / "t.parquet")


@pytest.mark.parametrize("value", ["no", "1.0", 0.0, False, "member", [1], ["spam"], ""])
@pytest.mark.parametrize("name", ["is_member", "member", "labels"])
def test_labels_under_another_name_are_not_lost_however_they_are_spelled(name, value, tmp_path):
    content = lines({"text": "x", name: value}, {"text": "y", name: value})
    assert "write it 'label'" in error_of(tmp_path / "t.jsonl", content)


def test_pairs_and_unknown_labels_are_still_read(tmp_path):
    for record in ({"member": "a text", "nonmember": "another"}, {"text": "x", "is_member": None}):
        (tmp_path / "t.jsonl").write_text(lines(record))
        assert read_texts(tmp_path / "t.jsonl").texts


def test_a_name_may_be_wrong_from_some_record_on(tmp_path):
    content = lines({"text": "x"}, {"text": "y", "labels": None}, {"text": "z", "Label": 1})
    assert error_of(tmp_path / "t.jsonl", content).startswith("t.jsonl:3: has a field 'Label'")


@pytest.mark.parametrize(
    "record",
    [
        {"text": "x", "label": 1, "Label": "spam"},
        {"text": "x", "label": 0, "labels": [1, 2]},
        {"text": "x", "labels": None},
        {"text": "x", "idx": 3, "title": "Label", "source_id": 4},
    ],
)
def test_other_fields_of_similar_names_are_left_alone(record, tmp_path):
    (tmp_path / "t.jsonl").write_text(lines(record))
    assert read_texts(tmp_path / "t.jsonl").texts[0].label == record.get("label")


def test_a_column_that_stands_twice_is_refused(tmp_path):
    message = error_of(tmp_path / "t.csv", "text,label,label\nx,1,0\n")
    assert message == "t.csv:1: has several columns 'label'; keep one of them"


# --- private texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", f'"{PRIVATE}"\n"b"\n'),
        ("t.jsonl", lines({PRIVATE: 1})),
        ("t.jsonl", lines({"text": "x", "label": PRIVATE})),
        ("t.jsonl", lines({"text": "x", "label": {"a": PRIVATE}})),
        ("t.jsonl", lines({"text": "x", "id": [PRIVATE]})),
        ("t.jsonl", lines({"text": "x", "id": PRIVATE}, {"text": "y", "id": PRIVATE})),
        ("t.jsonl", lines({"text": {"a": PRIVATE}})),
        ("t.json", json.dumps({"text": ["x"], "label": 3, PRIVATE: ["a"]})),
        ("t.csv", f'text,label\nx,"{PRIVATE}"\n'),
    ],
)
def test_a_message_holds_little_of_a_text(name, content, tmp_path):
    message = error_of(tmp_path / name, content)
    assert len(message) < 300
    assert PRIVATE[:61] not in message


def test_a_csv_file_without_a_header_is_told_by_its_columns_alone(tmp_path):
    message = error_of(tmp_path / "t.csv", f'"{PRIVATE}",name,"a, b"\n')
    assert message == (
        "t.csv:1: has no column 'text' (its columns: (3,080 characters), name, (4 characters)); "
        "rename the one that holds texts, or name it: --text-field NAME"
    )


@pytest.mark.parametrize("given", ["a\x00", "\x00", "a\ud800"])
def test_ids_that_no_file_can_hold_are_refused(given, tmp_path):
    assert "NUL or half a character" in error_of(
        tmp_path / "t.jsonl", lines({"text": "x", "id": given})
    )


def test_lone_surrogates_of_texts_become_a_replacement_character(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert read_texts(tmp_path / "t.jsonl").texts[0].text == "a\ufffdb \U0001f600"


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.txt"])
def test_a_line_is_not_read_beyond_its_limit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LINE_BYTES", 2**16)
    path = tmp_path / name
    path.write_bytes(b"x" * 2**24)
    tracemalloc.start()
    assert f"{name}:1: the line has more than 65,536 bytes" in error_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21


def test_a_compressed_file_is_not_unpacked_beyond_its_limit(tmp_path, monkeypatch):
    content = gzip.compress(b"\n" * 2**15)
    monkeypatch.setattr(streams, "UNPACKED_BYTES", 2**12)
    assert "unpacks to more than 4,096 bytes" in error_of(tmp_path / "t.jsonl.gz", content)
    monkeypatch.setattr(streams, "UNPACKED_BYTES", 2**16)
    assert "holds no texts" in error_of(tmp_path / "t.jsonl.gz", content)


def test_a_parquet_file_is_not_unpacked_beyond_its_limit(tmp_path, monkeypatch):
    path, table = tmp_path / "t.parquet", pyarrow.table({"text": ["x" * 2**20]})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    assert len(read_texts(path).texts[0].text) == 2**20
    monkeypatch.setattr(streams, "UNPACKED_BYTES", 2**16)
    assert "unpacks to more than 50 times its size" in error_of(path)


def test_rows_that_repeat_an_entry_of_a_parquet_dictionary_are_one_object(tmp_path):
    path, table = tmp_path / "t.parquet", pyarrow.table({"text": ["x" * 2**16] * 2000})
    pyarrow.parquet.write_table(table, path)
    assert path.stat().st_size < 2**17
    found = list(records.rows_of(path))
    assert len(found) == 2000
    assert len({id(row.fields["text"]) for row in found}) <= 2000 // records.BATCH_ROWS + 1


def test_blank_lines_do_not_go_on_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BLANK_LINES", 100)
    assert "t.jsonl:101: more than 100 blank lines" in error_of(tmp_path / "t.jsonl", "\n" * 1000)


def test_a_key_that_stands_twice_is_named_in_a_list_over_several_lines(tmp_path):
    content = '[\n  {"text": "a", "label": 1, "label": 0},\n  {"text": "b"}\n]\n'
    message = error_of(tmp_path / "texts.json", content)
    assert "the key 'label' twice in one object" in message


def test_problems_do_not_go_on_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_COUNTED", 20)
    message = error_of(tmp_path / "t.jsonl", "{}\n" * 1000)
    assert message.startswith("t.jsonl: 21 problems")


@pytest.mark.parametrize("content", ["[" + "{}," * 600 + "{}]", '{"text": [' + "[]," * 600 + "1]}"])
def test_json_of_many_values_is_refused_before_it_is_parsed(content, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "JSON_VALUES", 1000)
    for name in ("t.json", "t.jsonl"):
        assert "more than 1,000 values" in error_of(tmp_path / name, content)
    monkeypatch.setattr(records, "JSON_BYTES", 1000)
    assert "JSON of more than 1,000 bytes" in error_of(tmp_path / "t.json", content)


def test_a_csv_field_does_not_swallow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LINE_BYTES", 1000)
    message = error_of(tmp_path / "t.csv", 'text\n"' + "x\n" * 5000)
    assert message == "t.csv:2: not valid CSV (field larger than field limit (1000))"


# --- kinds of columns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("id", pyarrow.timestamp("ns", "Europe/Vienna")),
        ("id", pyarrow.date32()),
        ("label", pyarrow.decimal128(3)),
        ("text", pyarrow.binary()),
        ("text", pyarrow.struct({"a": pyarrow.string()})),
    ],
)
def test_a_parquet_column_of_another_kind_is_named(column, kind, tmp_path):
    columns = {"text": ["x"], column: pyarrow.array([None], kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    message = error_of(tmp_path / "t.parquet")
    assert f"its column '{column}' holds {kind}, expected strings" in message


def test_a_parquet_column_that_nobody_reads_may_hold_anything(tmp_path):
    times = pyarrow.array([2**52], pyarrow.timestamp("s", "Europe/Vienna"))
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"], "time": times}), path)
    assert read_texts(path).texts[0].text == "x"


def test_texts_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "t.jsonl")
    content = lines({"text": "x"}, {"text": "y"})
    writer = threading.Thread(target=(tmp_path / "t.jsonl").write_text, args=(content,))
    writer.start()
    assert [t.text for t in read_texts(tmp_path / "t.jsonl").texts] == ["x", "y"]
    writer.join()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_csv_end_in_any_way(end, tmp_path):
    content = f'text,label{end}"a{end}b\u2028c",1{end}d,0{end}'
    (tmp_path / "t.csv").write_bytes(content.encode())
    found = read_texts(tmp_path / "t.csv").texts
    assert [(t.text, t.label) for t in found] == [(f"a{end}b\u2028c", 1), ("d", 0)]
    assert [t.where for t in found] == ["t.csv:2", "t.csv:4"]


def test_a_text_that_stands_there_very_often_gets_ids_at_once(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "karo"}\n' * 30_000)
    begin = time.process_time()
    found = read_texts(path)
    assert time.process_time() - begin < 10  # trying every number anew took 60 s
    assert found.texts[-1].id == f"{found.texts[0].id}#30000"
