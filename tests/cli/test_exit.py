"""What a process ends with: exit codes, interruptions, memory that runs out."""

import re
import subprocess
import sys
from importlib import import_module

import jax.numpy as jnp
import numpy as np
import pytest
from wrong_inputs import ROOT, Box, assert_one_line, run, run_process

from sama_jax.cli import bench, entry
from sama_jax.cli.running import failed_allocation


@pytest.mark.parametrize(
    ("changes", "code", "fragments"),
    [
        ({"attacks": "samma"}, 2, ["did you mean 'sama'?"]),
        ({"data": "none.jsonl"}, 3, ["none.jsonl: no such file"]),
        ({"reference": "nowhere"}, 4, ["nowhere: no such folder"]),
    ],
)
def test_the_exit_code_of_a_process(changes, code: int, fragments: list[str], box: Box):
    assert_one_line(run_process(box.command(**changes)), code, *fragments)
    assert not box.out.exists()


def test_a_signal_while_a_tokenizer_works_says_its_line():
    """Standard error is held back then, since the library tells its panics there."""
    code = (
        "import os, signal, sys\n"
        "from sama_jax.cli import attacks, main\n"
        "from sama_jax.texts.tokenizer_calls import called\n"
        "def stopped(_):\n"
        "    with called('it fails'):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "attacks.run = stopped\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "attacks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert done.stderr.startswith("sama-jax: interrupted; ")


@pytest.mark.parametrize("changes", [{"preset": "offical"}, {"data": None}, {"limit": 0}])
def test_usage_errors_do_not_import_jax(changes, box: Box):
    code = (
        "import sys; from sama_jax.cli import main; code = main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *box.command(**changes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize(
    ("command", "after"),
    [
        (["bench", "--model", "m", "--data", "d"], "{} starts over"),
        (["plan", "--model", "m", "--topology", "cpu:2"], "{} starts over"),
        (["score", "--store", "s"], "what is finished is kept: {} continues"),
        (
            ["nll", "--model", "m", "--data", "d", "--out", "o"],
            "what is finished is kept: {} continues",
        ),
    ],
)
def test_an_interrupted_command_says_what_it_does_next(monkeypatch, capsys, command, after):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"sama_jax.cli.{command[0]}"), "run", stopped)
    assert entry.main(command) == 75
    said = capsys.readouterr().err
    given = f"sama-jax {' '.join(command)}"
    assert said == f"sama-jax: interrupted; {after.format(given)}\n"


@pytest.mark.parametrize("on_device", [False, True])
def test_memory_that_runs_out(monkeypatch, capsys, on_device: bool):
    """Of a device, as JAX reports it, and of the host: one line that says what needs less."""

    def too_much(_):
        (jnp if on_device else np).zeros(2**55, np.float32).block_until_ready()

    monkeypatch.setattr(bench, "run", too_much)
    assert entry.main(["bench", "--model", "m", "--data", "d"]) == 71
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("sama-jax: out of memory (")
    assert ("RESOURCE_EXHAUSTED" in said) == on_device
    assert "a smaller --batch-size" in said
    assert "--models" not in said


class Panic(BaseException):
    """As Rust's panics arrive: no `Exception`."""


@pytest.mark.parametrize("kind", [RuntimeError, RecursionError, OSError, Panic])
def test_an_error_that_nobody_foresaw_is_one_line(kind, monkeypatch, capsys):
    """Without its own words, which may be a text; and it is not taken for a lack of memory."""

    def wrong(_):
        raise kind("NOT_FOUND: a private text")

    monkeypatch.setattr(bench, "run", wrong)
    assert entry.main(["bench", "--model", "m", "--data", "d"]) == 1
    said = capsys.readouterr().err
    where = r"tests/cli/test_exit\.py:\d+"
    assert re.fullmatch(
        f"sama-jax: a fault of sama_jax, please report it: {kind.__name__} in {where}; "
        "SAMA_JAX_TRACEBACK=1 shows the whole of it\n",
        said,
    )
    monkeypatch.setenv("SAMA_JAX_TRACEBACK", "1")
    entry.main(["bench", "--model", "m", "--data", "d"])
    assert "NOT_FOUND: a private text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--start-timeout", "nan"),
        ("--start-timeout", "inf"),
        ("--start-timeout", "0"),
        ("--stall-timeout", "1e300"),
        ("--coordinator", "x:²"),
        ("--mesh", "data=²"),
        ("--mesh", "data=" + "9" * 5000),
    ],
)
def test_numbers_that_are_none(flag, value, box: Box, capsys):
    more = ["--num-processes", "2", "--process-id", "0"] if flag == "--coordinator" else []
    assert_one_line(run(capsys, [*box.command(), flag, value, *more]), 2, value[:9])


def test_a_batch_that_no_memory_holds(box: Box, capsys):
    said = run(capsys, box.command(batch_size=10**20))
    assert_one_line(said, 2, "--batch-size must be at most 10,000,000")


@pytest.mark.parametrize("name", ["cpu:²", "cpu:" + "9" * 5000, "v5e:4x" + "9" * 5000, "v5e:٤x4"])
def test_topologies_that_are_none(name, box: Box, capsys):
    command = ["plan", "--model", str(box.target), "--topology", name]
    assert_one_line(run(capsys, command), 2, "topology", name[:9])


def test_the_line_about_memory_is_found_among_others():
    """A GPU's error when no kernel of a product could be tried out; seen on an H200."""
    error = RuntimeError(
        "NOT_FOUND: All configs failed during profiling.\n"
        "EXECUTION FAILED: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 62.52GiB\n"
        "=== Source Location Trace: ===\nconfig_selector.cc:71\n"
    )
    expected = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 62.52GiB"
    assert failed_allocation(error) == expected
