"""Reads spoilt inputs, one at a time, with little memory and little time. `pool` starts it.

On standard input it gets a line `{"reader", "number", "seconds", "keep"}` an input, and answers
each with a line `{"kind", "detail", "where", "trace", "seconds", "bytes"}`. Whatever ends the
process is an answer, too.
"""

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from fuzz import reader, readers
from sama_jax.errors import EXIT_CODES, SamaError

HERE = Path(__file__).parent
EXTRA_BYTES = 2**30
"""Memory that one input may take on top of what the process has."""
COMMANDS = 0.15
"""Share of the inputs that go through the command line, where a reader has both ways."""
LINE = 1200
"""Characters of a line of a message, at most."""


class Finding(Exception):
    """Something that no input may do: `(kind, detail)`."""


def template(scratch: Path, name: str) -> Path:
    """Makes the good input of a reader, or finds it."""
    path = scratch / "good" / name
    if not path.is_dir():
        part = path.with_name(f"{name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (reader.good if name == "good" else readers.READERS[name].make)(part)
        part.rename(path)
    return path


def read(scratch: Path, name: str, number: int, keep: bool = False) -> None:
    """Spoils and reads one input. Raises `Finding`."""
    way, draw = readers.READERS[name], random.Random(f"{name} {number}")
    good = template(scratch, "good") if way.command else scratch
    variants = sorted(p for p in template(scratch, name).iterdir())
    root = scratch / "inputs" / f"{name}-{number}"
    _copy(draw.choice(variants), root)
    if number >= 0:  # below, the good input itself
        reader.spoil(way, draw, root)
    as_command = way.read is None or (way.command and draw.random() < COMMANDS)
    try:
        if as_command:
            assert way.command is not None
            code = command(way.command(root, good))
            if code == 0 and way.check:
                way.check(root)
        else:
            assert way.read is not None
            way.read(root)
    except SamaError as error:
        judge(error)
    finally:
        if not keep:
            for left in root.parent.glob(f"{root.name}*"):
                shutil.rmtree(left, ignore_errors=True)


def _copy(source: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to, symlinks=True)


def judge(error: SamaError) -> None:
    """Raises `Finding` unless an error has a documented code and a message that can be shown."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MemoryError) or "memory" in type(link).__name__.lower():
            raise Finding("memory", f"{type(error).__name__} after a MemoryError")
        link = link.__cause__ or link.__context__
    if error.exit_code not in EXIT_CODES or error.exit_code in (0, 1):
        raise Finding("code", f"exit code {error.exit_code}")
    judge_lines(str(error).split("\n"))


def judge_lines(lines: list[str]) -> None:
    """Raises `Finding` for what a terminal cannot show, or nobody reads."""
    for line in lines:
        bad = [c for c in line if not c.isprintable()]
        if bad:
            raise Finding("message", f"unprintable {bad[0]!r} in {line[:300]!r}")
        if len(line) > LINE:
            raise Finding("message", f"a line of {len(line)} characters: {line[:300]!r}")
    if any(not line.startswith("  ") for line in lines[1:]):
        raise Finding("message", f"more than one line: {lines[:3]!r}")


def command(argv: list[str]) -> int:
    """Runs a command line in this process; returns its exit code. Raises `Finding`."""
    from checkpoints_convert import __main__ as convert
    from sama_jax.cli import entry

    main, name = (convert.main, "checkpoints_convert"), "sama-jax"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if argv[0] == "convert":
                code, name = main[0](argv[1:]), main[1]
            else:
                code = entry.main(argv)
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    said = err.getvalue()
    if "Traceback" in said or "Traceback" in out.getvalue():
        raise Finding("traceback", said[-300:])
    if code not in EXIT_CODES or code == 1:
        raise Finding("code", f"exit code {code}: {said[-300:]!r}")
    if code == 71:
        raise Finding("memory", said[-300:])
    if code and argv[1] != "inspect":
        if not said.startswith(name):
            raise Finding("message", f"exit code {code} with {said[:300]!r}")
        judge_lines(said.rstrip("\n").split("\n"))
    return code


def status(field: str) -> int:
    """Returns a size from /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return 0


_warm: set[str] = set()


def attempt(scratch: Path, name: str, number: int, seconds: float, keep: bool) -> dict[str, Any]:
    """Reads one input within its limits; returns the answer."""
    kind, detail, trace = "fine", "", ""
    for needed in ("good", name) if readers.READERS[name].command else (name,):
        template(scratch, needed)
    if number >= 0 and name not in _warm:  # what is imported now takes no input's memory
        _warm.add(name)
        read(scratch, name, -1)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + EXTRA_BYTES, -1))
    limit = seconds * readers.READERS[name].patience
    # What takes no time of this process, such as a wait for a pipe, is given longer: others may
    # have the processor.
    faulthandler.dump_traceback_later(6 * limit, exit=True)
    start = time.process_time()
    try:
        read(scratch, name, number, keep)
    except Finding as found:
        kind, detail = found.args
    except MemoryError:
        kind, trace = "memory", traceback.format_exc()
    except BaseException as error:  # pyo3's PanicException is no Exception
        kind, detail, trace = (
            "traceback",
            f"{type(error).__name__}: {error}",
            traceback.format_exc(),
        )
        checked = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent == HERE
        if isinstance(error, AssertionError) and checked:
            kind = "wrong"
    finally:
        took = time.process_time() - start
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    peak = max(status("VmHWM") - before, 0)
    if peak > EXTRA_BYTES and kind == "fine":
        kind, detail = "memory", f"{peak / 2**30:.2f} GiB"
    if took > limit and kind == "fine":
        kind, detail = "hang", f"{took:.1f} s of the processor"
    if trace and not detail:
        detail = trace.strip().splitlines()[-1]
    where = [line.strip() for line in trace.splitlines() if 'File "' in line]
    own = [line for line in where if "sama_jax/" in line or "checkpoints_convert/" in line]
    answer = {"kind": kind, "detail": ascii(detail[:600]), "where": (own or where or [""])[-1]}
    return answer | {"trace": trace[-4000:], "seconds": took, "bytes": peak}


def main() -> None:
    """Answers until standard input closes."""
    scratch = Path(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jax.config.update("jax_platforms", "cpu")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    os.chdir(scratch)
    for done, line in enumerate(sys.stdin, 1):
        job = json.loads(line)
        found = attempt(scratch, job["reader"], job["number"], job["seconds"], job["keep"])
        answers.write(json.dumps(found) + "\n")
        if done % 200 == 0:
            jax.clear_caches()


if __name__ == "__main__":
    main()
