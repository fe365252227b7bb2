"""What is behind a one-line error is shown where SAMA_JAX_TRACEBACK asks for it."""

import pytest

from checkpoints_convert import __main__ as converter
from sama_jax.cli import entry


@pytest.mark.parametrize(
    ("main", "command"),
    [
        (entry.main, ["experiment", "bad.yaml"]),
        (converter.main, ["to-hf", "bad", "out"]),
    ],
)
@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_the_traceback(main, command, asked, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.yaml").write_text("runs: [")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAMA_JAX_TRACEBACK", raising=False)
    if asked is not None:
        monkeypatch.setenv("SAMA_JAX_TRACEBACK", asked)
    code = main(command)
    first, *rest = capsys.readouterr().err.splitlines()
    assert code in (3, 4)
    assert "bad" in first
    if asked != "1":
        assert rest == []
        return
    # The error of the library that read the file, though it was raised `from None`.
    assert rest.count("Traceback (most recent call last):") == 2
    assert any("ParserError" in line or "JSONDecodeError" in line for line in rest)
    assert rest[-1].endswith(first.split(": ", 1)[1])
