"""The reader of what comes in at the coordinator's port: from strangers, and from known peers."""

import contextlib
import json
import queue
import socket
import threading
import time
from pathlib import Path

from fuzz.reader import Reader, write
from sama_jax.devices.lines import Lines
from sama_jax.devices.meeting import Hub, Link, Spoke, understood
from sama_jax.devices.processes import Bounds, _Watch
from sama_jax.devices.rank import Place

SECRET = b"0123456789abcdef of the fuzz"
SAID = [
    {"who": [1, 2], "nonce": "00", "proof": "00"},
    {"beat": 1},
    {"gather": "memory", "value": [1, 2.5]},
    {"start": "localhost:1"},
    {"values": [1, 2]},
    {"done": True},
    {"gone": [1], "how": "ended"},
    {"missing": [1]},
]


def _said(root: Path) -> None:
    write(root / "one" / "said.jsonl", b"".join(json.dumps(x).encode() + b"\n" for x in SAID))


def _listen(root: Path) -> None:
    """A stranger says it, then a peer; the process that belongs here is met all the same."""
    file, faults = root / "said.jsonl", []
    said = file.read_bytes() if file.is_file() and file.resolve().is_relative_to(root) else b""
    before, threading.excepthook = threading.excepthook, faults.append
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends = [end(Place(f"127.0.0.1:{port}", 2, i), SECRET) for i, end in enumerate((Hub, Spoke))]
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as stranger:
            _say(stranger, said)
        _hear(said, ends[0])
        until = time.monotonic() + 4
        other = threading.Thread(target=ends[1].meet, args=(until, 4.0), daemon=True)
        other.start()
        assert ends[0].meet(until, 4.0).address
        other.join(4)
        assert not other.is_alive()
        assert ends[0].events.empty()
    finally:
        for end in ends:
            end.close()
        threading.excepthook = before
    assert not faults, f"a thread ended with {faults[0]}"


def _say(sock: socket.socket, said: bytes) -> None:
    with contextlib.suppress(OSError):  # cut off while it speaks
        sock.settimeout(2)
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)


def _hear(said: bytes, hub: Hub | Spoke) -> None:
    """What a known peer says arrives if it may say it, and is passed on without an error."""
    here, there = socket.socketpair()
    events: queue.Queue = queue.Queue()
    link = Link(Lines(here), 1, hub.place, events)
    sending = threading.Thread(target=_say, args=(there, said), daemon=True)
    sending.start()
    watch = _Watch(hub, Bounds(), "kept")
    watch.child = Lines(there)
    while True:
        rank, message = events.get(timeout=4)
        if message.get("how", "").startswith(("stopped, dead", "sent what")):
            break
        assert understood(message, rank, hub.place)
        watch._pass_on(rank, message)
        watch._is_loss(message)
    link.ended = True
    for sock in (here, there):
        sock.close()
    while not hub.events.empty():  # what `watch` reports is no news of the hub
        hub.events.get()


READERS = {"port": Reader(_said, ("*",), _listen, patience=2)}
