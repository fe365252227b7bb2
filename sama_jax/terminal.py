"""Speaks to whoever runs a program: lines, tables, and the progress of long work.

Messages and progress go to standard error, so that standard output stays for results. Names and
texts of others pass through here on their way out: what would move a cursor, ring a bell or cannot
be encoded is escaped.
"""

import contextlib
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sama_jax import isolation
from sama_jax.errors import OutputError
from sama_jax.untrusted import printable

if TYPE_CHECKING:  # a fifth of a second with all of its parts, of which `--help` needs none
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.text import Text

PLAIN_SECONDS = 10.0
"""Seconds between two plain lines of progress."""
TRACEBACK = "SAMA_JAX_TRACEBACK"
"""Environment variable: 1 shows where an error comes from, under its line."""


# --- what may be printed -------------------------------------------------------------------------


def escape(text: str) -> str:
    """Returns a text as it may be printed: whole, with its line breaks, without control characters
    and lone surrogates."""
    if text.isprintable():
        return text
    return "\n".join(printable(line, len(line)) for line in text.split("\n"))


def one_line(text: str) -> str:
    """Returns a message as it may be printed: escaped, on one line but for a list of ours, whose
    lines are indented."""
    return re.sub(r"\n(?!  )", r"\\n", escape(text))


class _Guarded:
    """Escapes what is written to a stream, unless it is `verbatim`, and makes its failure a known
    error; in all else it is the stream that it wraps."""

    def __init__(self, stream: Any, *, verbatim: bool = False):
        self.stream, self.verbatim = stream, verbatim

    def write(self, text: str) -> int:
        """Writes the text. Raises `OutputError`."""
        with self._written():
            self.stream.write(text if self.verbatim else escape(text))
        return len(text)

    def flush(self) -> None:
        """Writes what is left. Raises `OutputError`."""
        with self._written():
            self.stream.flush()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Else Python tries to write the rest at its end, and complains.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            raise OutputError(f"{self.stream.name}: cannot write ({error.strerror})") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_streams() -> None:
    """Lets whatever this process prints pass through `escape`, in any encoding of the streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not twice, and not a notebook's own
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Guarded(stream))


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Gives a library the plain streams, for progress of its own."""
    guarded = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (getattr(s, "stream", s) for s in guarded)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = guarded


def _console(*, stderr: bool = False, **options: Any) -> "Console":
    """Makes a console that escapes texts by itself, since what it adds for colours and bars has to
    reach the terminal."""
    from rich.console import Console

    class Escaping(Console):
        def render_str(self, text: str, **options: Any) -> "Text":
            """Makes a text of a string, as the cells of tables are made."""
            return super().render_str(escape(text), **options)

    stream: Any = sys.stderr if stderr else sys.stdout
    if isinstance(stream, _Guarded):
        stream = _Guarded(stream.stream, verbatim=True)
    return Escaping(file=stream, **options)


def console(quiet: bool = False) -> "Console":
    """Returns the console of messages, on standard error.

    It prints verbatim: a path may hold what rich would take for markup, such as `[/x]`.
    """
    return _console(
        stderr=True, quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False
    )


def results_console(quiet: bool = False) -> "Console":
    """Returns the console of results, on standard output."""
    return _console(quiet=quiet)


def wants_traceback() -> bool:
    """Tells whether the user has asked for tracebacks."""
    return os.environ.get(TRACEBACK, "0") != "0"


def fault_line(error: BaseException) -> str:
    """Says in one line that nobody foresaw this error, and where it was raised.

    Its own words are left out: they may hold a text that nobody else is to see.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(isolation.HOME + os.sep)] or frames
    where = [f" in {os.path.relpath(f.filename, isolation.HOME)}:{f.lineno}" for f in ours[-1:]]
    return (
        f"a fault of sama_jax, please report it: {type(error).__name__}{''.join(where)}; "
        f"{TRACEBACK}=1 shows the whole of it"
    )


# --- messages, results, progress -----------------------------------------------------------------

_moves = 0


def moves() -> int:
    """Returns how often a bar of this process has moved, shown or not: whether its work goes on."""
    return _moves


def _count_move() -> None:
    global _moves
    _moves += 1


class Terminal:
    """Says, shows and counts, or does none of it where `quiet`, so that no caller has to ask."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self._messages = console(quiet)

    def say(self, line: str) -> None:
        """Prints a message on standard error."""
        self._messages.print(line)

    def show(self, result: "RenderableType") -> None:
        """Prints a result, such as a table, on standard output."""
        results_console(self.quiet).print(result)

    def bar(self, what: str, total: int, unit: str, *, done: int = 0) -> "ProgressBar":
        """Returns the bar of work that has `total` units, of which some may be done."""
        return ProgressBar(what, total, unit, quiet=self.quiet, done=done)

    def byte_bar(self, what: str, total: int, *, least: int = 10**6) -> "ByteBar":
        """Returns the bar of `total` bytes, silent if they are fewer than `least`."""
        return ByteBar(what, total, quiet=self.quiet, least=least)


class ProgressBar:
    """Counts units of work: a bar on a terminal, a plain line now and then elsewhere.

    `note` says what is going on, such as "compiling".
    """

    def __init__(self, what: str, total: int, unit: str, *, quiet: bool = False, done: int = 0):
        self.what, self.total, self.unit, self.done = escape(what), total, unit, done
        self._quiet, self._start, self._first = quiet, time.monotonic(), done
        self._last = self._start
        self._note = ""
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn(unit),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=console(),
            )
            self._task = self._bar.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressBar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line(f"done in {time.monotonic() - self._start:.0f} s")

    def note(self, text: str) -> None:
        """Shows what is going on until the next note."""
        self._note = text = escape(text)
        _count_move()
        if self._bar:
            self._bar.update(self._task, note=text)
        elif text.startswith("compiling"):
            self._line(text)

    def advance(self, amount: int) -> None:
        """Counts `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        _count_move()
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        elif now - self._last >= PLAIN_SECONDS and self.done < self.total:
            self._last = now
            left = (now - self._start) * (self.total - self.done) / max(self.done - self._first, 1)
            self._line(f"about {duration(left)} left {self._note}".rstrip())

    def _line(self, text: str) -> None:
        if not self._quiet:
            print(f"{self.what}: {self.done}/{self.total} {self.unit}, {text}", file=sys.stderr)


class ByteBar:
    """Counts bytes in megabytes; silent if there are fewer than `least` of them."""

    def __init__(self, what: str, total: int, *, quiet: bool = False, least: int = 10**6):
        self._bar = ProgressBar(what, total // 10**6, "MB", quiet=quiet or total < least)
        self._bytes = 0

    def __enter__(self) -> Callable[[int], None]:
        self._bar.__enter__()
        return self._told

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, value, trace)

    def _told(self, amount: int) -> None:
        self._bytes += amount
        self._bar.advance(self._bytes // 10**6 - self._bar.done)


def duration(seconds: float) -> str:
    """Returns a length of time for people: "40 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def binary_size(count: int) -> str:
    """Returns a number of bytes for people: "1.24 GiB", "12.5 MiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.3g} {name}"
    return f"{count / 2**10:.3g} KiB"
