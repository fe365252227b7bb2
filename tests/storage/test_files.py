"""Files that appear whole, files that only grow, and what a failure leaves."""

import json
import os

import pytest

from sama_jax.errors import DataError, OutputError, UsageError
from sama_jax.storage import files
from sama_jax.storage.files import AppendOnly, read_json_lines, readable, write_atomic, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OutputError, match=r"x\.json: cannot write \(No space left on device\)"):
        write_atomic(path, "new")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]  # no .part is left


def test_a_file_beside_the_one_that_is_written_is_not_touched(tmp_path):
    path = tmp_path / "cal[1].json"
    theirs = [
        tmp_path / f"cal[1].json{end}" for end in (".part", ".sama-mine.part", ".sama-1.part")
    ]
    left = tmp_path / "cal[1].json.sama-0123abcd.part"  # by a process that was killed
    for file in (*theirs, left):
        file.write_text("precious")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([path, *theirs])
    assert {file.read_text() for file in theirs} == {"precious"}
    assert path.stat().st_mode == theirs[0].stat().st_mode


def test_numbers_that_are_no_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_an_appended_file_is_cut_back_to_its_whole_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n{"c"')
    values, end = read_json_lines(path)
    assert values == [{"a": 1}, {"b": 2}]
    file = AppendOnly(path, end)
    assert file.append(b'{"d": 4}\n') == end
    file.close()
    assert read_json_lines(path)[0] == [{"a": 1}, {"b": 2}, {"d": 4}]


def test_two_writers_of_one_file_are_refused(tmp_path):
    first = AppendOnly(tmp_path / "x.jsonl")
    with pytest.raises(UsageError, match="another process is writing"):
        AppendOnly(tmp_path / "x.jsonl")
    first.close()
    AppendOnly(tmp_path / "x.jsonl").close()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "gone.bin"
    with pytest.raises(DataError, match=r"gone\.bin: cannot be read"), readable(path):
        os.stat(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "absent"])
def test_only_regular_files_are_copied(kind, tmp_path):
    source = tmp_path / "source.bin"
    if kind == "pipe":
        os.mkfifo(source)
    elif kind == "device":
        source.symlink_to("/dev/zero")  # a copy of it fills the disk
    elif kind == "folder":
        source.mkdir()
    with pytest.raises(DataError, match=r"source\.bin"):
        files.copy_file(source, tmp_path / "copy.bin")
    assert {p.name for p in tmp_path.iterdir()} <= {"source.bin"}


def test_a_copy_has_every_byte_and_replaces_a_link_rather_than_its_target(tmp_path):
    content = bytes(range(256)) * 2**13
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"kept")
    (tmp_path / "copy").symlink_to(tmp_path / "b")
    files.copy_file(tmp_path / "a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert (tmp_path / "b").read_bytes() == b"kept"


def test_lines_of_a_missing_file_are_none(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == ([], 0)
