"""Sends and receives JSON lines over a socket, of bounded length and within a bounded time.

Standard library only.
"""

import json
import socket
import threading
import time
from typing import Any

from sama_jax.untrusted import parse_json

LINE_BYTES = 2**30
"""Longest line of a known process: names of a million stored records take 100 MB."""


class Lines:
    """Sends and receives the lines of one connection. Any thread may send, one receives."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self._buffer, self._sending = bytearray(), threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends one line. Raises `OSError`."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            self.sock.sendall(line)

    def receive(self, limit: int, until: float | None = None) -> Any:
        """Returns what the next line says; waits for it until `until`, or as the socket does.

        Raises:
          OSError: the connection has ended, or the time is over.
          ValueError: the line is longer than `limit` bytes, or no JSON.
        """
        seen = 0
        while (end := self._buffer.find(b"\n", seen, limit)) < 0:
            seen = len(self._buffer)
            if seen >= limit:
                raise ValueError(f"a line of more than {limit:,} bytes")
            if until is not None:
                self.sock.settimeout(max(until - time.monotonic(), 0.001))
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the connection was closed")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return parse_json(line)
