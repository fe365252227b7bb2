"""Lets several processes of one run meet, watch each other, and tell each other small things.

`jax.distributed` aborts a process, with a stack dump, where a peer never starts or dies. So the
command that the user starts (the supervisor) does none of the work: it meets the other processes
within a bounded wait, then runs itself again in a child that does the work, and watches. If a
process is lost, or its work stands still, the others end their children and say so in one line.
No JAX.

Supervisors talk to that of process 0 (`meeting`). A child talks to its supervisor over a socket
pair, and ends when that closes.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from sama_jax import terminal
from sama_jax.devices import meeting
from sama_jax.devices.child_process import Crashed, Process, exit_code, start
from sama_jax.devices.lines import LINE_BYTES, Lines
from sama_jax.devices.meeting import Event, Hub, Lost, Meeting, Spoke, names
from sama_jax.devices.rank import Place
from sama_jax.errors import EXIT_CODES, Interrupted
from sama_jax.untrusted import printable

CHILD = "SAMA_JAX_CHILD"
"""Environment variable of a child: its end of the pair, and of the file for crash reports."""
START_SECONDS = 300.0
"""How long processes wait for each other at the start, unless told otherwise."""
STALL_SECONDS = 3600.0
"""How long the work may make no progress, unless told otherwise: one compilation of a large model
on a CPU takes a quarter of an hour, and is one step."""
SILENT_SECONDS = 90.0
"""Without a sign of life of the child until it counts as stopped. A library that is loaded from a
slow disk holds Python's lock for some ten seconds."""
EARLY = "ended before the others"
"""How a process has gone whose child ended well while another one still waits for a word of it."""


# --- the work's side -----------------------------------------------------------------------------


class Peers:
    """Speaks to all processes of a run from one of them, which is alone without a supervisor."""

    def __init__(
        self, rank: int = 0, count: int = 1, jax: Meeting | None = None, lines: Lines | None = None
    ):
        self.rank, self.count, self.jax = rank, count, jax
        self._lines, self._answers = lines, queue.Queue()

    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns every process' `value` (JSON), by rank, when all have called it with `what`.

        All call it in the same order. If one of them ends, the supervisor ends this process.
        """
        if self._lines is None:
            return [value]
        self._lines.send({"gather": what, "value": value})
        return self._answers.get()

    def start(self) -> None:
        """Begins to listen, and to tell the supervisor that the work is alive and goes on."""
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def fail(self, line: str) -> None:
        """Tells the supervisor what to say in place of this process, which ends."""
        if self._lines is not None:
            with contextlib.suppress(OSError):
                self._lines.send({"fault": line})

    def _listen(self) -> None:
        assert self._lines is not None
        with contextlib.suppress(OSError, ValueError):
            while True:
                self._answers.put(self._lines.receive(LINE_BYTES)["values"])
        os._exit(Interrupted.exit_code)  # the supervisor has gone, however it went

    def _beat(self) -> None:
        assert self._lines is not None
        with contextlib.suppress(OSError):
            while True:
                self._lines.send({"steps": terminal.moves()})
                time.sleep(meeting.BEAT_SECONDS)


def join() -> Peers | None:
    """Returns the peers of a supervisor's child, None in any other process; waits for nothing."""
    text = os.environ.pop(CHILD, None)
    if text is None:
        return None
    told = json.loads(text)
    # What C++ code and uncaught exceptions print, such as the dump of a process whose peer has
    # died, goes to a file; the supervisor shows it if that was not the reason and it is asked to.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
    terminal.guard_streams()
    os.dup2(told["crash"], 1)
    os.dup2(told["crash"], 2)
    report = os.fdopen(2, "w", buffering=1, closefd=False)
    lines = Lines(socket.socket(fileno=told["link"]))
    peers = Peers(told["rank"], told["count"], Meeting(*told["jax"]), lines)

    def crashed(kind: type[BaseException], error: BaseException, trace: Any) -> NoReturn:
        traceback.print_exception(kind, error, trace, file=report)
        peers.fail(terminal.fault_line(error))
        os._exit(1)  # not through JAX's own end, which would wait for the other processes

    sys.excepthook = crashed
    peers.start()
    _joined.append(peers)
    return peers


_joined: list[Peers] = []


def is_child() -> bool:
    """Tells whether this is a supervisor's child."""
    return bool(_joined)


def leave(code: int) -> None:
    """Ends the process if it is a child, at once: JAX's own end would wait for the others."""
    if _joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- the supervisor's side -----------------------------------------------------------------------


class Bounds(NamedTuple):
    """How long a supervisor waits, in seconds."""

    start: float = START_SECONDS
    """For the other processes."""
    stall: float = STALL_SECONDS
    """For progress of the work."""


class Ended(NamedTuple):
    """Says that the child has ended; it comes from no connection."""

    code: int


def supervise(
    arguments: Sequence[str], place: Place, bounds: Bounds, kept: str, secret: bytes
) -> int:
    """Meets the others, runs Python on `arguments` in a child and watches; returns the exit code.

    Args:
      kept: end of the line that says that a process was lost.

    Raises:
      UsageError: process 0 refuses this process.
      Lost: names the process.
      Crashed: the child has failed in a way that nobody foresaw.
    """
    hub = Hub(place, secret) if place.rank == 0 else Spoke(place, secret)
    try:
        jax = hub.meet(time.monotonic() + bounds.start, bounds.start)
        return _Watch(hub, bounds, kept).run(arguments, jax)
    finally:
        hub.close()


class _Watch:
    """Watches the child and the peers, and passes on what they say to each other."""

    def __init__(self, hub: Hub | Spoke, bounds: Bounds, kept: str):
        self.hub, self.place, self.bounds, self.kept = hub, hub.place, bounds, kept
        self.values: dict[str, dict[int, Any]] = {}
        self.done: set[int] = set()
        self.early: set[int] = set()
        self.fault: str | None = None
        self._steps = -1
        self._alive = self._stepped = time.monotonic()
        self._waits = False

    def run(self, arguments: Sequence[str], jax: Meeting) -> int:
        """Runs the child to its end, or to that of a peer."""
        place = self.place
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as crash, ours:
            fds = (theirs.fileno(), crash.fileno())
            told = {"rank": place.rank, "count": place.count, "jax": jax}
            told |= {"link": fds[0], "crash": fds[1]}
            env = {**os.environ, CHILD: json.dumps(told)}
            # A session of its own: Ctrl-C reaches the supervisor, which ends the child.
            child = start(arguments, env, pass_fds=fds, start_new_session=True)
            theirs.close()
            self.child = Lines(ours)
            self._alive = self._stepped = time.monotonic()
            try:
                threading.Thread(target=self._hear, args=(child,), daemon=True).start()
                return self._loop(child, crash)
            finally:
                child.kill()
                child.wait()

    def _hear(self, child: Process) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                message = self.child.receive(LINE_BYTES)
                self._alive = time.monotonic()
                if "steps" not in message:
                    self.hub.events.put(Event(self.place.rank, message))
                elif message["steps"] != self._steps:
                    self._steps, self._stepped = message["steps"], self._alive
        self.hub.events.put(Ended(child.wait()))

    def _loop(self, child: Process, crash: Any) -> int:
        while True:
            try:
                event = self.hub.events.get(timeout=meeting.BEAT_SECONDS)
            except queue.Empty:
                event = self._standing_still()
            if isinstance(event, Ended):
                return self._ended(event.code, crash)
            if event is not None:
                self._pass_on(event.rank, event.message)
                if self._is_loss(event.message):
                    return self._lost(event.message, child)

    def _standing_still(self) -> Event | None:
        """Returns the event of a child that shows no life, or makes no progress of its own."""
        now, silent = time.monotonic(), min(SILENT_SECONDS, self.bounds.stall)
        if now - self._alive > silent:
            how = f"stopped or stuck: no sign of life for {silent:g} s"
        elif not self._waits and now - self._stepped > self.bounds.stall:
            how = f"no progress for {self.bounds.stall:g} s: --stall-timeout sets the bound"
        else:
            return None
        message = {"gone": [self.place.rank], "how": how}
        self.hub.send(message)
        return Event(self.place.rank, message)

    def _pass_on(self, rank: int, message: dict[str, Any]) -> None:
        match message:
            case {"gather": _}:
                self._waits |= rank == self.place.rank
                self._gather(rank, message)
            case {"values": _}:
                self._answer(message)
            case {"done": _}:
                self.done.add(rank)
            case {"fault": str(line)}:
                self.fault = line
        self._require_all_take_part()

    def _is_loss(self, message: dict[str, Any]) -> bool:
        return "gone" in message and not set(message["gone"]) <= self.done

    def _gather(self, rank: int, message: dict[str, Any]) -> None:
        if self.place.rank != 0:
            self.hub.send(message)
            return
        found = self.values.setdefault(message["gather"], {})
        found[rank] = message["value"]
        if len(found) == self.place.count:
            del self.values[message["gather"]]
            answer = {"values": [found[r] for r in range(self.place.count)]}
            self.hub.send(answer)
            self._answer(answer)

    def _answer(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the child's end is noticed elsewhere
            self.child.send(message)
        self._waits, self._stepped = False, time.monotonic()

    def _require_all_take_part(self) -> None:
        """Reports a process that has ended while this one waits for a word of it."""
        others = range(1, self.place.count) if self._waits else range(self.place.count)
        waiting = self.values.values() if self.place.rank == 0 else [others]
        for found in waiting:
            for rank in sorted(self.done.difference(found)):
                self.done.discard(rank)
                self.early.add(rank)
                message = {"gone": [rank], "how": EARLY}
                self.hub.events.put(Event(rank, message))

    def _ended(self, code: int, crash: Any) -> int:
        """Decides what the end of the child means."""
        own = self.place.rank
        if code == 0:
            self.hub.send({"done": True})
            return 0
        if code in EXIT_CODES:  # the child has said itself what happened
            self.hub.send({"gone": [own], "how": f"ended with exit code {code}"})
            if code == Interrupted.exit_code:
                raise Interrupted
            return code
        how = f"ended by {_signal_name(-code)}" if code < 0 else f"failed with exit code {code}"
        if code == -signal.SIGKILL:  # a library that misses a peer aborts; it does not do this
            how = "killed by SIGKILL, most often because the machine ran out of memory"
            self.hub.send({"gone": [own], "how": how})
            raise self._loss([own], how)
        # A collective fails at once when a peer dies, often before the news of it is here.
        until = time.monotonic() + 2.0
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                event = self.hub.events.get(timeout=left)
                self._pass_on(*event)
                if self._is_loss(event.message):
                    return self._lost(event.message, None)
        self.hub.send({"gone": [own], "how": how})
        if terminal.wants_traceback():
            crash.seek(0)
            sys.stderr.write(crash.read().decode(errors="replace"))
        raise Crashed(
            self.fault
            or f"{names(self.place, [own])} {how}: a fault of sama_jax or of a library; "
            f"{terminal.TRACEBACK}=1 shows what it printed"
        )

    def _lost(self, message: dict[str, Any], child: Process | None) -> int:
        """Tells the others, and raises `Lost`, unless the child itself has something to say."""
        if set(message["gone"]) <= self.early:  # the end of its connection may be heard first
            message = message | {"how": EARLY}
        if self.place.rank == 0:
            self.hub.send(message)
        if child is not None and message["gone"] != [self.place.rank]:
            code = exit_code(child, 1.0)  # the same error may be on its way in every process
            if code in EXIT_CODES and code not in (0, None, Interrupted.exit_code):
                return code
        raise self._loss(message["gone"], message["how"])

    def _loss(self, ranks: Sequence[int], how: str) -> Lost:
        return Lost(f"{names(self.place, ranks)} has gone ({printable(how, 200)}); {self.kept}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
