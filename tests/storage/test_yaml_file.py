"""YAML files say what they seem to say: each key once, every number decimal."""

from pathlib import Path

import pytest

from sama_jax.errors import DataError
from sama_jax.storage.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("runs: [1]\nseed: 3\nruns: [2]", "'runs' stands there twice, line 3"),
        ("runs:\n- {seed: 1, name: a, seed: 2}", "'seed' stands there twice, line 2"),
        ("1: a\n'1': b", "'1' stands there twice"),
        ("seed: 010", "'010' is no plain decimal number, line 1"),
        ("a: 1\nmax_length: 1:04", "'1:04' is no plain decimal number, line 2"),
        ("max_length: 1_2", "'1_2' is no plain decimal"),
        ("max_length: 0x10", "'0x10' is no plain decimal"),
        ("margin: 1:30.5", "'1:30.5' is no plain decimal"),
        ("margin: .inf", "'.inf' is no plain decimal"),
    ],
)
def test_what_yaml_would_read_otherwise_is_refused(tmp_path: Path, content: str, said: str):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(DataError) as found:
        read_yaml(tmp_path / "a.yaml")
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_decimals_words_and_merges_are_read_as_ever(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "numbers: [0, -3, 10, 1.5, .5, 1.0e-3, 0.25]\nwords: ['010', 1e5]\n"
        "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}"
    )
    assert read_yaml(tmp_path / "a.yaml") == {
        "numbers": [0, -3, 10, 1.5, 0.5, 0.001, 0.25],
        "words": ["010", "1e5"],
        "a": {"x": 1},
        "b": {"x": 2},
        "c": {"x": 3},
    }
