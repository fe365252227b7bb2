"""Files that others wrote: what they are read as, and the one error that is left."""

import os

import pytest

from sama_jax import untrusted


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="regular file"):
        untrusted.read_bytes(tmp_path / "config.json")


def test_what_is_no_file_is_closed_again(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="regular file"):
            untrusted.open_file(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_bytes_than_the_limit_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="at most 10 bytes, found 1,099,511,627,776"):
        untrusted.read_bytes(path, 10)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", b"\xff{}"])
def test_whatever_is_wrong_with_json_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"JSON|Expecting|digits|codec"):
        untrusted.parse_json(content)


@pytest.mark.parametrize(
    "content",
    ['{"text": "a", "label": 1, "label": 0}', b'[{"b": [{"label": 1, "a": 2, "label": 1}]}]'],
)
def test_a_key_that_repeats_is_an_error(content):
    """Some readers take the first of its values, others the last."""
    with pytest.raises(ValueError, match="key 'label' twice"):
        untrusted.parse_json(content)


def test_keys_of_several_objects_may_be_the_same():
    content = '{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}'
    for encoding in ("utf-8", "utf-16"):
        found = untrusted.parse_json(content.encode(encoding))
        assert found == {"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}


def test_a_foreign_text_in_a_message_is_cut_and_moves_no_cursor():
    assert untrusted.printable("a\x1b[31m\nb\ud800") == "a\\x1b[31m\\nb\\ud800"
    assert untrusted.printable("x" * 100, 4) == "xxxx…"
    assert untrusted.printable("Zürich") == "Zürich"


def test_a_foreign_value_in_a_message_is_spelled_cut_and_escaped():
    assert untrusted.shown("a\x1b") == "'a\\x1b'"
    assert untrusted.shown(["x" * 100]).endswith("…")
    assert untrusted.shown(None) == "None"
