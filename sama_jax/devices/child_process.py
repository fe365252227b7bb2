"""A child process that answers questions, one JSON line each; its errors are raised here again.

Work goes to a child where it needs other environment variables than this process, where its memory
is to be measured, or where it may crash. This file has both ends, and `start`, through which every
process of this package is started. Standard library only.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from sama_jax import isolation, terminal
from sama_jax.errors import OutOfMemory, SamaError

Process = subprocess.Popen[Any]

TICK_SECONDS = 10.0
"""Seconds between two calls of `tick`."""


def start(
    arguments: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
) -> Process:
    """Starts this Python on `-m MODULE ..` or `-c CODE ..`, cut off from the current folder.

    `env` replaces the environment variables of this process; `options` go to `Popen`.
    """
    env = isolation.environment(dict(os.environ if env is None else env))
    return subprocess.Popen([sys.executable, "-P", *arguments], env=env, **options)


def exit_code(process: Process, seconds: float) -> int | None:
    """Waits for a process to end; returns its exit code, None if it runs on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


class Crashed(SamaError):
    """A child process ended without an answer (exit code 1)."""


class Child:
    """Runs a module that calls `serve`, and asks it questions. A context manager, which kills it.

    Args:
      name: names the process in messages.
      module: dotted name, run as `python -m`.
      env: environment variables; None: those of this process.
      advice: ends the message where the process was killed, most often for lack of memory.
      show_errors: passes the standard error through; else a crash reports its last line.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *,
        env: Mapping[str, str] | None = None,
        advice: str = "",
        show_errors: bool = True,
    ):
        self.name, self._advice = name, advice
        self._stderr: IO[bytes] | None = None
        if not show_errors:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (`__exit__` closes it)
        self._process = start(
            ["-m", module],
            env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        if self._stderr is not None:
            self._stderr.close()

    def ask(self, question: Any, tick: Callable[[float], None] | None = None) -> Any:
        """Returns the answer to a question, both JSON. `tick` is told the seconds now and then.

        Raises:
          SamaError: what the child raised while it answered.
          OutOfMemory: the child was killed.
          Crashed: the child ended in another way.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        with _ticking(tick):
            line = self._process.stdout.readline()
        if not line:
            raise self._end()
        answer = json.loads(line)
        if "fault" in answer:
            raise Crashed(f"the {self.name} process has met {answer['fault']}")
        if "error" in answer:
            kinds = {kind.__name__: kind for kind in SamaError.__subclasses__()}
            advice = f"; {self._advice}" if answer["error"] == OutOfMemory.__name__ else ""
            raise kinds[answer["error"]](answer["message"] + (advice if self._advice else ""))
        return answer["answer"]

    def _end(self) -> SamaError:
        """Makes the error that says how the child ended."""
        code = self._process.wait()
        if code == -9:
            return OutOfMemory(
                f"the {self.name} process was killed (signal 9), most often because this machine "
                f"ran out of memory{self._advice and '; ' + self._advice}"
            )
        last = ""
        if self._stderr is not None:
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip() or "it said nothing"
            last = f" ({said.splitlines()[-1]})"
        return Crashed(f"the {self.name} process ended with exit code {code}{last}")


@contextlib.contextmanager
def _ticking(tick: Callable[[float], None] | None) -> Iterator[None]:
    """Calls `tick` with the seconds so far, every `TICK_SECONDS`, until the block ends."""
    start, done = time.monotonic(), threading.Event()

    def run() -> None:
        while tick is not None and not done.wait(TICK_SECONDS):
            tick(time.monotonic() - start)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def failed_allocation(error: Exception) -> str | None:
    """Returns what an allocation that failed says, in one line; None for any other error.

    JAX's own class is not imported here. Where XLA tries kernels out, its first line is another.
    """
    if isinstance(error, MemoryError):
        return str(error) or "MemoryError"
    found = re.search(r"RESOURCE_EXHAUSTED[^\n]*", str(error))
    return found and found[0]


def serve(answer: Callable[[Any], Any]) -> None:
    """Answers the questions of a `Child` until it asks no more; the child's `main` calls this.

    Everything else that is printed here goes to standard error, since libraries print as they like.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            found = {"answer": answer(json.loads(line))}
        except SamaError as error:
            found = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:
            reason = failed_allocation(error)
            if terminal.wants_traceback():
                traceback.print_exc()
            if reason is not None:
                found = {"error": OutOfMemory.__name__, "message": f"out of memory ({reason})"}
            else:
                found = {"fault": terminal.fault_line(error)}
        print(json.dumps(found), file=answers, flush=True)
