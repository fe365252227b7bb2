"""Speaks to whoever runs a program: lines, tables, and the progress of long work.

Messages and progress go to standard error, so that standard output stays for results.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 10.0
"""Seconds between two plain lines of progress."""


def console(quiet: bool = False) -> Console:
    """Returns the console of messages, on standard error.

    It prints verbatim: a path may hold what rich would take for markup, such as `[/x]`.
    """
    return Console(
        stderr=True, quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False
    )


class Terminal:
    """Says, shows and counts, or does none of it where `quiet`, so that no caller has to ask."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self._messages = console(quiet)

    def say(self, line: str) -> None:
        """Prints a message on standard error."""
        self._messages.print(line)

    def show(self, result: RenderableType) -> None:
        """Prints a result, such as a table, on standard output."""
        Console(quiet=self.quiet).print(result)

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
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._quiet, self._start, self._first = quiet, time.monotonic(), done
        self._last = self._start
        self._note = ""
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
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
        self._note = text
        if self._bar:
            self._bar.update(self._task, note=text)
        elif text.startswith("compiling"):
            self._line(text)

    def advance(self, amount: int) -> None:
        """Counts `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
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
