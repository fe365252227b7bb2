"""Strangers at the port of a run: what they send, and in which numbers.

SAMA_JAX_STRANGERS=1000 lets that many knock in each test; a CI run does with fewer.
"""

import json
import os
import random
import socket

STRANGERS = int(os.environ.get("SAMA_JAX_STRANGERS", "150"))
WELL_FORMED = {"who": [1, 3], "nonce": "00", "proof": "00"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def knock(port: int, kind: int, draw: random.Random) -> socket.socket:
    """A stranger of one of nine kinds; the slow ones are left open."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    hello = json.dumps(WELL_FORMED).encode()
    said = [
        draw.randbytes(draw.randint(1, 3000)),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        draw.choice([b"5", b"[1]", b"null", b'{"who": {}}', b"[" * 900, b"9" * 900]) + b"\n",
        hello + b"\n",
        hello[: draw.randint(1, len(hello))],
        b'{"code": 0}\n{"done": true}\n{"gone": [0], "how": "x"}\n{"gather": ["x"]}\n',
        b"x" * 10**6,
        b" ",
        b"",
    ][kind]
    try:
        sock.sendall(said)
        if kind < 7:
            sock.close()
    except OSError:  # cut off while it spoke
        sock.close()
    return sock
