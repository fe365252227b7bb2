"""Documents of installed packages: parsed and never run, in a fixed order, each with news in it."""

import sys
from pathlib import Path

import pytest

from sama_jax.errors import UsageError
from sama_jax.texts import installed

LONG = "It says the same thing in many words, {} times over, until it is long enough to count.\n"


def prose(name: str) -> str:
    return "".join(f"{name} {LONG.format(i)}" for i in range(8))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "some_package"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(f'"""{prose("module")}"""\nraise SystemExit("imported")\n')
    code = (
        f'class A:\n    """{prose("class")}"""\n    def f(self):\n        """{prose("method")}"""\n'
    )
    (folder / "a.py").write_text(code)
    (folder / "b.py").write_text(code + "\ndef short():\n    'Too short.'\n")
    (folder / "broken.py").write_text("def (\n")
    (folder / "tests" / "c.py").write_text(f'"""{prose("test")}"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return "some_package"


def test_docstrings_are_read_without_running_anything(package: str):
    found = installed.docstrings([package])
    assert [text.split()[0] for text in found] == ["module", "class", "method"]
    assert {len(text) for text in found} == {installed.MAX_CHARS}
    assert package not in sys.modules


def test_a_package_that_is_not_here_is_named(package: str):
    with pytest.raises(UsageError, match="package no_such_package is not installed here"):
        installed.docstrings([package, "no_such_package"])


def test_the_standard_library_has_enough_source():
    found = installed.stdlib_documents()
    assert len(found) == len(set(found)) > 1000
