"""Lets several processes of one run meet, watch each other, and tell each other small things.

`jax.distributed` aborts a process, with a stack dump, where a peer never starts or dies. So the
command that the user starts (the supervisor) does none of the work: it meets the other processes
within a bounded wait, then runs itself again in a child that does the work, and watches. If a
process is lost, the others end their children and say so in one line. Standard library only.

Supervisors talk to that of process 0 in JSON lines over TCP, at the coordinator's port. A child
talks to its supervisor over a socket pair, and ends when that closes.
"""

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from sama_jax.errors import EXIT_CODES, Interrupted, SamaError, UsageError

CHILD = "SAMA_JAX_CHILD"
"""Environment variable of a child: its end of the pair, and of the file for crash reports."""
START_SECONDS = 300
"""How long processes wait for each other at the start, unless told otherwise."""
BEAT_SECONDS, LOST_SECONDS = 1.0, 15.0
"""Between two signs of life, and without one until a process counts as lost. A process that ends
is noticed at once, since its connection closes."""


class Place(NamedTuple):
    """Which process this is, of how many, and where they meet."""

    coordinator: str
    """HOST:PORT of process 0."""
    count: int
    rank: int


def given_place(coordinator: str | None, count: int | None, rank: int | None) -> Place | None:
    """Returns the place that the flags give; None if there are none. Raises `UsageError`."""
    if coordinator is None and count is None and rank is None:
        return None
    if coordinator is None or count is None or rank is None:
        raise UsageError("--coordinator, --num-processes and --process-id belong together")
    port = coordinator.rpartition(":")[2]
    if ":" not in coordinator or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--coordinator {coordinator}: expected HOST:PORT")
    if not 0 <= rank < count:
        raise UsageError(f"--process-id {rank}: expected 0 to {count - 1} for --num-processes")
    return Place(coordinator, count, rank)


def found_place(env: Mapping[str, str], metadata: Callable[[str], str] | None = None) -> Place:
    """Finds the place in the environment: Slurm (one task a node), or a Cloud TPU slice.

    A TPU slice is known by the variables that GKE sets, else by the metadata of the virtual machine
    (the two attributes that JAX's own detection reads).

    Raises:
      UsageError: it is neither.
    """
    if "SLURM_PROCID" in env and "SLURM_JOB_ID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
        if match is None:
            raise UsageError(f"--distributed: cannot read Slurm's list of nodes {nodes!r}")
        port = 20000 + int(env["SLURM_JOB_ID"]) % 10000
        count = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
        return Place(f"{match[1]}{match[2] or ''}:{port}", count, int(env["SLURM_PROCID"]))
    with contextlib.suppress(OSError, ValueError, IndexError):
        if "TPU_WORKER_HOSTNAMES" in env:
            hosts, rank = env["TPU_WORKER_HOSTNAMES"].split(","), int(env["TPU_WORKER_ID"])
        else:
            read = metadata or _metadata
            hosts = [w.split(":")[2] for w in read("worker-network-endpoints").split(",")]
            rank = int(read("agent-worker-number"))
        return Place(f"{hosts[0]}:8479", len(hosts), rank)
    raise UsageError(
        "--distributed: neither Slurm nor a Cloud TPU slice is found here; give --coordinator "
        "HOST:PORT, --num-processes N and --process-id I"
    )


def _metadata(attribute: str) -> str:
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{attribute}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode()


# --- the work's side -----------------------------------------------------------------------------


class Peers:
    """Speaks to all processes of a run from one of them, which is alone without a supervisor."""

    def __init__(self, rank: int = 0, count: int = 1, jax_address: str = "", link: Any = None):
        self.rank, self.count, self.jax_address = rank, count, jax_address
        self._link, self._answers = link, queue.Queue()

    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns every process' `value` (JSON), by rank, when all have called it with `what`.

        All call it in the same order. If one of them ends, the supervisor ends this process.
        """
        if self._link is None:
            return [value]
        _send(self._link, {"gather": what, "value": value})
        return self._answers.get()

    def _listen(self) -> None:
        for message in _messages(self._link):
            self._answers.put(message["values"])
        os._exit(Interrupted.exit_code)  # the supervisor has gone, however it went


def join() -> Peers | None:
    """Returns the peers of a supervisor's child, None in any other process; waits for nothing."""
    text = os.environ.pop(CHILD, None)
    if text is None:
        return None
    told = json.loads(text)
    # What C++ code and uncaught exceptions print, such as the dump of a process whose peer has
    # died, goes to a file; the supervisor shows it if that was not the reason.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
    os.dup2(told["crash"], 1)
    os.dup2(told["crash"], 2)
    report = os.fdopen(2, "w", buffering=1, closefd=False)

    def crashed(*error: Any) -> NoReturn:
        traceback.print_exception(*error, file=report)
        os._exit(1)  # not through JAX's own end, which would wait for the other processes

    sys.excepthook = crashed
    peers = Peers(told["rank"], told["count"], told["jax"], socket.socket(fileno=told["link"]))
    threading.Thread(target=peers._listen, daemon=True).start()
    _joined.append(peers)
    return peers


_joined: list[Peers] = []


def leave(code: int) -> None:
    """Ends the process if it is a child, at once: JAX's own end would wait for the others."""
    if _joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- the supervisor's side -----------------------------------------------------------------------


class Lost(SamaError):
    """Another process never came, ended or is silent."""

    exit_code = Interrupted.exit_code


def supervise(command: Sequence[str], place: Place, seconds: float, kept: str) -> int:
    """Meets the others, runs `command` in a child and watches; returns the exit code.

    Args:
      seconds: how long to wait for the others at the start.
      kept: end of the line that says that a process was lost.

    Raises:
      Lost: names the process.
    """
    hub = _Hub(place) if place.rank == 0 else _Spoke(place)
    try:
        jax_address = hub.meet(time.monotonic() + seconds, seconds)
        return _Watch(hub, place, kept).run(command, jax_address)
    finally:
        hub.close()


def _names(place: Place, ranks: Sequence[int]) -> str:
    what = "process" if len(ranks) == 1 else "processes"
    return f"{what} {', '.join(map(str, ranks))} of {place.count}"


class _Link:
    """Connects to another supervisor; what it says goes to a queue with its rank."""

    def __init__(self, sock: socket.socket, rank: int, events: queue.Queue):
        self.sock, self.rank, self.ended = sock, rank, False
        sock.settimeout(LOST_SECONDS)
        self._events, self._sending = events, threading.Lock()
        for work in (self._read, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self._sending:  # the reader notices
            _send(self.sock, message)

    def _read(self) -> None:
        for message in _messages(self.sock):
            if "beat" not in message:
                self._events.put((self.rank, message))
        self._events.put((self.rank, {"gone": [self.rank], "how": "stopped, dead or unreachable"}))

    def _beat(self) -> None:
        while not self.ended:
            self.send({"beat": 1})
            time.sleep(BEAT_SECONDS)


class _Hub:
    """Speaks for process 0: the others connect to it, and it passes on what they say."""

    def __init__(self, place: Place):
        self.place, self.events = place, queue.Queue()
        self.links: dict[int, _Link] = {}
        host, _, port = place.coordinator.rpartition(":")
        local = host in ("localhost", "127.0.0.1")
        try:
            self._server = socket.create_server(("127.0.0.1" if local else "", int(port)))
        except OSError as error:
            raise UsageError(
                f"--coordinator {place.coordinator}: process 0 cannot listen there ({error})"
            ) from None

    def meet(self, until: float, seconds: float) -> str:
        """Waits for all; returns the address for `jax.distributed`."""
        place = self.place
        while len(self.links) < place.count - 1:
            self._server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                sock, _ = self._server.accept()
                sock.settimeout(10)
                hello = next(_messages(sock), {})
            except TimeoutError:
                break
            rank, count = hello.get("rank", -1), hello.get("count")
            if count != place.count or rank in self.links or rank not in range(1, place.count):
                reason = f"process 0 has --num-processes {place.count}: process {rank} of {count} "
                with contextlib.suppress(OSError):
                    _send(sock, {"refused": reason + "does not fit, or is there already"})
                sock.close()
                continue
            self.links[rank] = _Link(sock, rank, self.events)
        missing = [r for r in range(1, place.count) if r not in self.links]
        if missing:
            self.send({"missing": missing})
            raise Lost(_missing(place, missing, seconds))
        host = place.coordinator.rpartition(":")[0]
        with socket.create_server(("", 0)) as free:
            address = f"{host}:{free.getsockname()[1]}"
        self.send({"start": address})
        return address

    def send(self, message: dict[str, Any]) -> None:
        for link in self.links.values():
            link.send(message)

    def close(self) -> None:
        self._server.close()
        _close(self.links)


class _Spoke:
    """Speaks for another process: it is connected to process 0."""

    def __init__(self, place: Place):
        self.place, self.events = place, queue.Queue()
        self.links: dict[int, _Link] = {}

    def meet(self, until: float, seconds: float) -> str:
        place = self.place
        host, _, port = place.coordinator.rpartition(":")
        while True:
            try:
                sock = socket.create_connection((host, int(port)), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise Lost(
                        f"process 0 of {place.count} did not answer at {place.coordinator} within "
                        f"{seconds:.0f} s ({error}); start it and run the same command again"
                    ) from None
                time.sleep(0.2)
        _send(sock, {"rank": place.rank, "count": place.count})
        self.links[0] = _Link(sock, 0, self.events)
        # Process 0 bounds the wait; a little later it counts as lost itself.
        try:
            _, message = self.events.get(timeout=max(until - time.monotonic(), 0) + LOST_SECONDS)
        except queue.Empty:
            message = {"gone": [0], "how": "silent"}
        if "refused" in message:
            raise UsageError(message["refused"])
        if "missing" in message:
            raise Lost(_missing(place, message["missing"], seconds))
        if "gone" in message:
            raise Lost(f"{_names(place, [0])} has gone before the start; run all of them again")
        return message["start"]

    def send(self, message: dict[str, Any]) -> None:
        self.links[0].send(message)

    def close(self) -> None:
        _close(self.links)


def _missing(place: Place, missing: list[int], seconds: float) -> str:
    return (
        f"{_names(place, missing)} did not start within {seconds:.0f} s; nothing was done: start "
        "all of them again (--start-timeout sets the wait)"
    )


def _close(links: dict[int, _Link]) -> None:
    for link in links.values():
        link.ended = True
        with contextlib.suppress(OSError):
            link.sock.shutdown(socket.SHUT_WR)
    time.sleep(0.2)  # closing with something unread would take back what was just sent
    for link in links.values():
        link.sock.close()


class _Watch:
    """Watches the child and the peers, and passes on what they say to each other."""

    def __init__(self, hub: _Hub | _Spoke, place: Place, kept: str):
        self.hub, self.place, self.kept = hub, place, kept
        self.values: dict[str, dict[int, Any]] = {}
        self.done: set[int] = set()

    def run(self, command: Sequence[str], jax_address: str) -> int:
        place = self.place
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as crash, ours:
            fds = (theirs.fileno(), crash.fileno())
            told = {
                "rank": place.rank,
                "count": place.count,
                "jax": jax_address,
                "link": fds[0],
                "crash": fds[1],
            }
            # A session of its own: Ctrl-C reaches the supervisor, which ends the child.
            child = subprocess.Popen(
                command,
                env={**os.environ, CHILD: json.dumps(told)},
                pass_fds=fds,
                start_new_session=True,
            )
            theirs.close()
            self.child = ours
            try:
                threading.Thread(target=self._hear, args=(ours, child), daemon=True).start()
                return self._loop(child, crash)
            finally:
                child.kill()
                child.wait()

    def _hear(self, ours: socket.socket, child: subprocess.Popen) -> None:
        for message in _messages(ours):
            self.hub.events.put((self.place.rank, message))
        self.hub.events.put((self.place.rank, {"code": child.wait()}))

    def _loop(self, child: subprocess.Popen, crash: Any) -> int:
        while True:
            rank, message = self.hub.events.get()
            if "gather" in message:
                self._gather(rank, message)
            elif "values" in message:
                _send(self.child, message)
            elif "done" in message:
                self.done.add(rank)
            elif "code" in message:
                return self._ended(message["code"], crash)
            elif "gone" in message and not set(message["gone"]) <= self.done:
                return self._lost(message, child)

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
            _send(self.child, answer)

    def _ended(self, code: int, crash: Any) -> int:
        """Decides what the end of the child means."""
        if code == 0:
            self.hub.send({"done": self.place.rank})
            return 0
        if code in EXIT_CODES:  # the child has said itself what happened
            self.hub.send({"gone": [self.place.rank], "how": f"ended with exit code {code}"})
            if code == Interrupted.exit_code:
                raise Interrupted
            return code
        # A collective fails at once when a peer dies, often before the news of it is here.
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                _, message = self.hub.events.get(timeout=0.1)
                if "gone" in message and not set(message["gone"]) <= self.done:
                    return self._lost(message, None)
        self.hub.send({"gone": [self.place.rank], "how": f"failed with exit code {code}"})
        crash.seek(0)
        sys.stderr.write(crash.read().decode(errors="replace"))
        return 1

    def _lost(self, message: dict[str, Any], child: subprocess.Popen | None) -> int:
        """Tells the others, and raises `Lost`, unless the child itself has something to say."""
        self.hub.send(message)
        if child is not None:  # the same error may be on its way in every process
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=1.0)
                if code in EXIT_CODES and code != Interrupted.exit_code:
                    return code
        raise Lost(
            f"{_names(self.place, message['gone'])} has gone ({message['how']}); {self.kept}"
        )


def _send(sock: socket.socket, message: dict[str, Any]) -> None:
    sock.sendall(json.dumps(message).encode() + b"\n")


def _messages(sock: socket.socket):
    """Yields the JSON lines of a connection until it closes, fails or is silent too long."""
    rest = b""
    with contextlib.suppress(OSError, ValueError):
        while data := sock.recv(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)
