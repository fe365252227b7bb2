"""Turns Ctrl-C and SIGTERM into a stop in good order."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from sama_jax.errors import Interrupted


class Stop:
    """A handler of signals. Inside `deferred` the first signal only sets `requested`.

    Outside, the handler that was there before decides: a command ends at once. Where there is
    none it raises, but a callback of XLA in which a signal strikes swallows what is raised there;
    whoever goes on then finds `requested` set.
    """

    def __init__(self, out: Path):
        self.out, self.requested, self._defer = out, False, False
        self.before: dict[int, Any] = {}
        """The handlers of the code around."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again or not self._defer:
            if callable(before := self.before.get(number)):
                before(number, frame)
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the code inside finish its step; a second signal does not wait."""
        if self.requested:
            raise KeyboardInterrupt
        self._defer = True
        try:
            yield
        finally:
            self._defer = False

    def error(self, detail: str) -> Interrupted:
        """Returns the error to raise, which says what was kept."""
        return Interrupted(f"{self.out}: interrupted, {detail}; the same command continues")


@contextlib.contextmanager
def interruptible(out: Path) -> Iterator[Stop]:
    """Catches Ctrl-C and SIGTERM for the code inside, which then raises `Interrupted`.

    Python lets only the main thread catch signals; elsewhere nothing is caught.
    """
    stop = Stop(out)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            stop.before[number] = signal.signal(number, stop)
    try:
        yield stop
    except KeyboardInterrupt:
        raise stop.error("between two checkpoints; what has no checkpoint is lost") from None
    finally:
        for number, handler in stop.before.items():
            signal.signal(number, handler)
