"""Connects the supervisors of a run: they meet at process 0's port, and know each other there.

JSON lines over TCP. Whoever connects has to prove within seconds that it has the run's secret;
what anyone else sends is cut off, and changes nothing. Standard library only.
"""

import collections
import contextlib
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sama_jax.devices.lines import LINE_BYTES, Lines
from sama_jax.devices.rank import Place
from sama_jax.devices.secret import proof, proves
from sama_jax.errors import Interrupted, SamaError, UsageError
from sama_jax.untrusted import printable

BEAT_SECONDS, LOST_SECONDS = 1.0, 15.0
"""Between two signs of life, and without one until a process counts as lost. A process that ends
is noticed at once, since its connection closes."""
FAREWELL_SECONDS = 2.0
"""What a process that ends waits until the others have read its last words."""
HELLO_SECONDS, HELLO_BYTES = 10.0, 1024
"""What a connection may take until it has proved that it has the secret."""
STRANGERS = 64
"""Connections without a proof at once; the oldest is closed for a new one."""

Message = dict[str, Any]


class Lost(SamaError):
    """Another process never came, ended or is silent."""

    exit_code = Interrupted.exit_code


class Event(NamedTuple):
    """What a process has said; `{"here": True}` and `{"gone": ..}` of a link are our own."""

    rank: int
    message: Message


def names(place: Place, ranks: Sequence[int]) -> str:
    """Names processes in a message."""
    what = "process" if len(ranks) == 1 else "processes"
    return f"{what} {', '.join(map(str, ranks))} of {place.count}"


def understood(message: Any, sender: int, place: Place) -> bool:
    """Tells whether this is a message that `sender` may send, with values of the right types."""

    def ranks(found: Any) -> bool:
        return bool(found) and all(type(r) is int and 0 <= r < place.count for r in found)

    match message:
        case {"beat": 1} | {"done": True}:
            return True
        case {"gather": str(), "value": _}:
            return sender != 0
        case {"gone": list(gone), "how": str()}:
            return ranks(gone) and (sender == 0 or gone == [sender])
        case {"values": list(values)}:
            return sender == 0 and len(values) == place.count
        case {"missing": list(missing)}:
            return sender == 0 and ranks(missing)
        case {"start": str()}:
            return sender == 0
    return False


class Link:
    """A connection to a supervisor that has the secret; what it says goes to a queue."""

    def __init__(self, lines: Lines, rank: int, place: Place, events: "queue.Queue[Any]"):
        self.lines, self.rank, self.place, self.ended = lines, rank, place, False
        self.read_out = threading.Event()
        """Set when the other side says nothing any more, and all that it said was read."""
        self._events = events
        lines.sock.settimeout(LOST_SECONDS)
        for work in (self._read, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def send(self, message: Message) -> None:
        """Sends a message; the reader notices where that fails."""
        with contextlib.suppress(OSError):
            self.lines.send(message)

    def _read(self) -> None:
        how = "stopped, dead or unreachable"
        for message in self._messages():
            if not understood(message, self.rank, self.place):
                how = "sent what no process of this version sends"
                break
            if "beat" not in message:
                self._events.put(Event(self.rank, message))
        self._events.put(Event(self.rank, {"gone": [self.rank], "how": how}))
        with contextlib.suppress(OSError):
            self.lines.sock.shutdown(socket.SHUT_WR)  # so that the other side knows that too
        self.read_out.set()

    def _messages(self) -> Iterator[Any]:
        with contextlib.suppress(OSError, ValueError):
            while True:
                yield self.lines.receive(LINE_BYTES)

    def _beat(self) -> None:
        while not self.ended:
            self.send({"beat": 1})
            time.sleep(BEAT_SECONDS)


class _Ends:
    """What process 0 and the others have in common: links, and a queue of what they say."""

    def __init__(self, place: Place, secret: bytes):
        self.place, self.secret = place, secret
        self.events: queue.Queue[Any] = queue.Queue()
        self.links: dict[int, Link] = {}

    def send(self, message: Message) -> None:
        """Sends to everybody who is connected."""
        for link in list(self.links.values()):
            link.send(message)

    def close(self) -> None:
        """Ends all connections; what was sent before arrives."""
        links = list(self.links.values())
        for link in links:
            link.ended = True
            with contextlib.suppress(OSError):
                link.lines.sock.shutdown(socket.SHUT_WR)
        # Closing takes back what was sent and not read yet, if anything arrives after it.
        until = time.monotonic() + FAREWELL_SECONDS
        for link in links:
            link.read_out.wait(max(until - time.monotonic(), 0))
            link.lines.sock.close()

    def _missing(self, missing: list[int], seconds: float) -> Lost:
        return Lost(
            f"{names(self.place, missing)} did not start within {seconds:.0f} s; nothing was "
            "done: start all of them again (--start-timeout sets the wait)"
        )


class Meeting(NamedTuple):
    """Where the processes' JAX meets."""

    address: str
    bind: str | None = None
    """Where process 0's coordinator listens; None: on all addresses of the host."""


class Hub(_Ends):
    """Speaks for process 0: the others connect to it, and it passes on what they say."""

    def __init__(self, place: Place, secret: bytes):
        super().__init__(place, secret)
        self._strangers: collections.deque[socket.socket] = collections.deque()
        self._joining, self._closed = threading.Lock(), False
        self._host, _, port = place.coordinator.rpartition(":")
        # Another name of this host may stand for an address that is not its own.
        local = "127.0.0.1" if self._host == "localhost" else self._host
        try:
            bind = local if local.startswith("127.") else ""
            self._server = socket.create_server((bind, int(port)))
        except OSError as error:
            raise UsageError(
                f"--coordinator {place.coordinator}: process 0 cannot listen there ({error})"
            ) from None
        threading.Thread(target=self._accept, daemon=True).start()

    def meet(self, until: float, seconds: float) -> Meeting:
        """Waits for all; tells them where `jax.distributed` meets. Raises `Lost`."""
        others = range(1, self.place.count)
        here: set[int] = set()
        while len(here) < len(others) and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                event = self.events.get(timeout=left)
                if "here" in event.message:
                    here.add(event.rank)
                else:  # it went before the start, and may come again
                    here.discard(event.rank)
                    self.links.pop(event.rank, None)
        missing = [r for r in others if r not in here]
        if missing:
            self.send({"missing": missing})
            raise self._missing(missing, seconds)
        meeting, public = self._jax_meeting()
        self.send({"start": public})
        return meeting

    def _jax_meeting(self) -> tuple[Meeting, str]:
        """Returns where JAX's coordinator listens, and what the others call it: the address of this
        host at which they came in."""
        reached = {link.lines.sock.getsockname()[0] for link in self.links.values()}
        bind = reached.pop() if len(reached) == 1 else ""
        with socket.create_server((bind, 0)) as free:
            port = free.getsockname()[1]
        public = f"{self._host}:{port}"
        return (Meeting(f"{bind}:{port}", f"{bind}:{port}") if bind else Meeting(public)), public

    def _accept(self) -> None:
        """Lets everybody knock, each in a thread of its own: a slow one keeps nobody out."""
        while not self._closed:
            try:
                sock, _ = self._server.accept()
            except OSError:  # closed, or too many open files for the moment
                time.sleep(0.05)
                continue
            self._strangers.append(sock)
            if len(self._strangers) > STRANGERS:
                with contextlib.suppress(OSError, IndexError):
                    self._strangers.popleft().shutdown(socket.SHUT_RDWR)
            threading.Thread(target=self._admit, args=(sock,), daemon=True).start()

    def _admit(self, sock: socket.socket) -> None:
        """Makes a link of a connection that proves to be a process of this run; else closes it."""
        lines, nonce = Lines(sock), secrets.token_hex(16)
        joined = False
        with contextlib.suppress(OSError, ValueError):
            until = time.monotonic() + HELLO_SECONDS
            sock.settimeout(HELLO_SECONDS)
            lines.send({"nonce": nonce})
            joined = self._answer(lines, lines.receive(HELLO_BYTES, until), nonce)
        with contextlib.suppress(ValueError):
            self._strangers.remove(sock)
        if not joined:
            sock.close()

    def _answer(self, lines: Lines, hello: Any, nonce: str) -> bool:
        place = self.place
        match hello:
            case {"who": [int(rank), int(count)], "nonce": str(theirs), "proof": str(given)}:
                pass
            case _:
                return False
        if not proves(given, proof(self.secret, "hello", nonce, theirs, rank, count)):
            lines.send({"refused": "it was given another secret (--secret-file, SAMA_JAX_SECRET)"})
            return False
        with self._joining:
            reason = None
            if count != place.count or not 0 < rank < place.count:
                reason = f"it has --num-processes {place.count}; process {rank} of {count} is none"
            elif rank in self.links:
                reason = f"process {rank} is there already; give each another --process-id"
            if reason is not None:
                lines.send({"refused": reason})
                return False
            lines.send({"welcome": proof(self.secret, "welcome", nonce, theirs)})
            self.links[rank] = Link(lines, rank, place, self.events)
        self.events.put(Event(rank, {"here": True}))
        return True

    def close(self) -> None:
        """Ends all connections, and listens no more."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in `accept`
        self._server.close()
        super().close()


class Spoke(_Ends):
    """Speaks for another process: it is connected to process 0."""

    def meet(self, until: float, seconds: float) -> Meeting:
        """Connects, and waits for all. Raises `UsageError` where process 0 refuses it, `Lost`."""
        place, reason = self.place, "no answer"
        while 0 not in self.links:
            try:
                self._connect(until)
            except (OSError, ValueError) as error:
                reason = str(error)
                if time.monotonic() > until:
                    raise Lost(
                        f"process 0 of {place.count} did not answer at {place.coordinator} within "
                        f"{seconds:.0f} s ({printable(reason, 200)}); start it and run the same "
                        "command again"
                    ) from None
                time.sleep(0.2)
        # Process 0 bounds the wait; a little later it counts as lost itself.
        try:
            event = self.events.get(timeout=max(until - time.monotonic(), 0) + LOST_SECONDS)
        except queue.Empty:
            event = Event(0, {"gone": [0], "how": "silent"})
        if "missing" in event.message:
            raise self._missing(event.message["missing"], seconds)
        if "start" not in event.message:
            raise Lost(f"{names(place, [0])} has gone before the start; run all of them again")
        return Meeting(event.message["start"])

    def _connect(self, until: float) -> None:
        place, nonce = self.place, secrets.token_hex(16)
        host, _, port = place.coordinator.rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout=5)
        lines, limit = Lines(sock), max(until, time.monotonic() + 5)
        try:
            match lines.receive(HELLO_BYTES, min(limit, time.monotonic() + HELLO_SECONDS)):
                case {"nonce": str(theirs)}:
                    pass
                case _:
                    raise ValueError("it is no process of sama-jax")
            given = proof(self.secret, "hello", theirs, nonce, place.rank, place.count)
            who = [place.rank, place.count]
            lines.send({"who": who, "nonce": nonce, "proof": given})
            match lines.receive(HELLO_BYTES, time.monotonic() + HELLO_SECONDS):
                case {"refused": str(why)}:
                    raise UsageError(
                        f"process 0 at {place.coordinator} refuses this process: "
                        f"{printable(why, 200)}"
                    )
                case {"welcome": str(given)}:
                    if not proves(given, proof(self.secret, "welcome", theirs, nonce)):
                        raise ValueError("it has another secret")
                case _:
                    raise ValueError("it is no process of sama-jax")
        except BaseException:
            sock.close()
            raise
        self.links[0] = Link(lines, 0, place, self.events)
