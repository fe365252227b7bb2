"""The terminal: messages and progress on standard error, results on standard output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from sama_jax import terminal
from sama_jax.terminal import Terminal

ROOT = Path(__file__).parents[2]


def test_messages_and_results_are_kept_apart(capsys):
    here = Terminal()
    here.say("a path such as [/x] stays as it is")
    here.show("a result")
    said = capsys.readouterr()
    assert said.err == "a path such as [/x] stays as it is\n"
    assert said.out == "a result\n"


def test_a_long_message_is_not_folded(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    Terminal().say("word " * 30)
    assert capsys.readouterr().err.count("\n") == 1


def test_quiet_is_inside(capsys):
    here = Terminal(quiet=True)
    here.say("nothing")
    here.show("nothing")
    with here.bar("audit", 3, "texts") as bar:
        bar.note("compiling")
        bar.advance(3)
    with here.byte_bar("weights", 10**9) as told:
        told(10**9)
    assert capsys.readouterr() == ("", "")


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.0)
    with Terminal().bar("audit", 4, "texts", done=1) as bar:
        bar.note("compiling for 32 tokens")
        bar.note("target")
        bar.advance(1)
        bar.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "audit: 1/4 texts, compiling for 32 tokens"
    assert lines[1] == "audit: 2/4 texts, about 1 s left target"
    assert lines[2] == "audit: 4/4 texts, done in 0 s"
    assert len(lines) == 3


def test_a_bar_of_few_bytes_is_silent(capsys):
    with Terminal().byte_bar("weights", 10**6 - 1) as told:
        told(10**6 - 1)
    assert capsys.readouterr().err == ""
    with Terminal().byte_bar("weights", 3 * 10**6) as told:
        told(3 * 10**6)
    assert capsys.readouterr().err == "weights: 3/3 MB, done in 0 s\n"


FOREIGN = "a\x1b[31mred\x07\x9b\r\ud800é\u202e"
SHOWN = "a\\x1b[31mred\\x07\\x9b\\r\\ud800é\\u202e"


def test_what_would_move_a_cursor_is_escaped(capsys):
    here = Terminal()
    here.say(f"{FOREIGN}\n  a list")
    table = Table(FOREIGN, width=200)
    table.add_row(FOREIGN)
    here.show(table)
    with here.bar(FOREIGN, 1, "texts") as bar:
        bar.note(f"compiling {FOREIGN}")
    said = capsys.readouterr()
    assert said.err.startswith(f"{SHOWN}\n  a list\n")
    assert said.err.count(SHOWN) == 4
    assert said.out.count(SHOWN) == 2
    assert not set(said.err + said.out) & set("\x1b\x07\x9b\r\ud800\u202e")
    assert terminal.one_line("x\ny\n  z") == "x\\ny\n  z"


SPEAKS = """
import sys
from sama_jax import terminal
from sama_jax.cli.running import Parser, command_of, run_program

def run(args):
    print(args.text)
    terminal.Terminal().show(args.text)
    raise terminal.OutputError(f"{args.text}: cannot write")

parser = Parser(prog="speaks")
command_of(parser.add_subparsers(), "now", "", run).add_argument("text")
sys.exit(run_program("speaks", parser, None))
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "utf-16"])
def test_all_that_a_command_prints_is_escaped_in_any_encoding(encoding):
    given = os.fsencode("é\x1b]0;x\x07") + b"\xff\n"
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-c", SPEAKS, "now", given]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60)
    assert done.returncode == 74
    shown = "\\x1b]0;x\\x07\\udcff"
    assert done.stdout.decode(encoding).count(shown) == 2
    assert done.stderr.decode(encoding).count("\n") == 1
    assert f"{shown}\\n: cannot write" in done.stderr.decode(encoding)


@pytest.mark.parametrize("flags", [["now", "x"], ["--help"], ["now", "--help"]])
def test_a_standard_output_that_takes_no_more_is_said_in_one_line(flags):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SPEAKS, *flags],
            env=env,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 74
    assert done.stderr.count("\n") == 1
    assert "<stdout>: cannot write (No space left on device)" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "1 s"), (89.0, "89 s"), (90.0, "2 min"), (5399.0, "90 min"), (5400.0, "1.5 h")],
)
def test_lengths_of_time(seconds: float, shown: str):
    assert terminal.duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(100, "0.0977 KiB"), (2**20, "1 MiB"), (2**27, "0.125 GiB"), (2**31, "2 GiB")],
)
def test_sizes(count: int, shown: str):
    assert terminal.binary_size(count) == shown
