"""Runs commands on inputs that are wrong in one way, and looks at what they say and leave.

Standard error holds one line and nothing else (a list may follow it), no traceback; the output
folder is absent or complete, and a good result that was there before is untouched.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny

from sama_jax.cli import entry

ROOT = Path(__file__).parents[1]


class Box(NamedTuple):
    """A place of its own with good inputs."""

    path: Path
    target: Path
    reference: Path
    data: Path
    out: Path

    def command(self, **changes: Any) -> list[str]:
        """The good command; `max_length=16` adds or replaces a flag, None drops it."""
        flags = {
            "target": self.target,
            "reference": self.reference,
            "data": self.data,
            "out": self.out,
            "max_length": 32,
            **changes,
        }
        changed = str(changes.get("set")).partition("=")[0]
        steps = [one for one in tiny.STEPS if one.partition("=")[0] != changed]
        return ["audit", "--quiet", *(w for s in steps for w in ("--set", s)), *as_flags(flags)]

    def lines(self, *lines: str | bytes, name: str = "bad.jsonl") -> Path:
        """A file of these lines."""
        made = self.path / name
        made.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines))
        return made


def as_flags(values: dict[str, Any]) -> list[str]:
    """Spells flags: `max_length=16` as two words, True as one, None not at all."""
    words = []
    for name, value in values.items():
        if value is not None:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words


def line(text: str = "karo mite", **fields: Any) -> str:
    return json.dumps({"text": text, **fields})


GOOD = [line(f"karo mite {i}", id=f"g{i}") for i in range(6)]
"""Lines of good texts."""


class Said(NamedTuple):
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], command: list[str]) -> Said:
    capsys.readouterr()
    try:
        code = entry.main(command)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    return Said(code, *capsys.readouterr())


def run_process(command: list[str], limit: int | None = None) -> Said:
    """In a process of its own, which may write no file beyond `limit` bytes."""
    code = "import sys; from sama_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1)); {code}"
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    # As tests/conftest.py sets it here: a folder is continued in the same arithmetic only.
    env |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=env, capture_output=True, text=True, timeout=300
    )
    return Said(done.returncode, done.stdout, done.stderr)


def assert_one_line(said: Said, code: int, *fragments: str) -> str:
    """Exit code, one line on standard error, and what must stand in it. Returns the line."""
    assert said.code == code, said.err
    assert "Traceback" not in said.err
    first, *rest = said.err.splitlines()
    assert first.startswith("sama-jax"), said.err
    assert all(text.startswith("  ") for text in rest), said.err  # only a list may follow
    for fragment in fragments:
        assert fragment in said.err, said.err
    assert said.out == ""
    return first


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def scores(out: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (out / "scores.jsonl").read_text().splitlines()]


def assert_complete(out: Path, finished: Path) -> None:
    """The folder holds what an undisturbed run leaves, with equal scores."""
    assert scores(out) == scores(finished)
    assert contents(out).keys() == contents(finished).keys()
    assert json.loads((out / "manifest.json").read_text())["finished"] is True


def refuse(
    capsys: pytest.CaptureFixture[str], box: Box, command: list[str], code: int, *fragments: str
) -> str:
    """The command ends with one line, and without a trace in the box."""
    before = contents(box.path)
    said = assert_one_line(run(capsys, command), code, *fragments)
    assert contents(box.path) == before
    assert not box.out.exists() or any(box.out.iterdir())
    return said
