"""The coordinator's port: whoever has not the secret changes nothing, and ends nothing."""

import contextlib
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Callable

import pytest
from strangers import STRANGERS, free_port, knock

from sama_jax.devices import lines, meeting, secret
from sama_jax.devices.meeting import Hub, Lost, Spoke, understood
from sama_jax.devices.rank import Place
from sama_jax.errors import UsageError

SECRET = b"0123456789abcdef of the tests"


class Run:
    """Supervisors of one run in threads; their ends are met, and watched by nobody."""

    def __init__(self, count: int, wait: float = 30.0):
        self.port, self.count = free_port(), count
        self.ends = [self.end(rank) for rank in range(count)]
        self.found: dict[int, object] = {}
        self.threads = [threading.Thread(target=self.meet, args=(r, wait)) for r in range(count)]

    def end(self, rank: int, count: int | None = None, key: bytes = SECRET) -> Hub | Spoke:
        place = Place(f"127.0.0.1:{self.port}", count or self.count, rank)
        return Hub(place, key) if rank == 0 else Spoke(place, key)

    def meet(self, rank: int, wait: float) -> None:
        try:
            self.found[rank] = self.ends[rank].meet(time.monotonic() + wait, wait)
        except (Lost, UsageError) as error:
            self.found[rank] = error

    def close(self) -> None:
        for end in self.ends:
            end.close()


@pytest.fixture
def run():
    made = Run(3)
    yield made
    made.close()


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_strangers_change_nothing(run: Run):
    """Before, while and after the processes meet; then they meet as if nobody had been there."""
    draw = random.Random(1)
    run.threads[0].start()
    kept = [knock(run.port, i % 9, draw) for i in range(STRANGERS // 3)]
    for thread in run.threads[1:]:
        thread.start()
    kept += [knock(run.port, i % 9, draw) for i in range(STRANGERS // 3)]
    for thread in run.threads:
        thread.join(timeout=20)
    addresses = {found.address for found in run.found.values()}
    assert len(run.found) == 3
    assert len(addresses) == 1
    kept += [knock(run.port, i % 9, draw) for i in range(STRANGERS // 3)]
    run.ends[1].send({"gather": "a", "value": 1})
    assert run.ends[0].events.get(timeout=5) == (1, {"gather": "a", "value": 1})
    run.ends[0].send({"values": [0, 1, 2]})
    for end in run.ends[1:]:
        assert end.events.get(timeout=5) == (0, {"values": [0, 1, 2]})
    assert all(end.events.empty() for end in run.ends)
    for sock in kept:
        sock.close()


def test_one_that_speaks_slowly_is_cut_off(monkeypatch):
    monkeypatch.setattr(meeting, "HELLO_SECONDS", 0.5)
    run = Run(2, wait=5.0)
    run.threads[0].start()
    with socket.create_connection(("127.0.0.1", run.port)) as slow:
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 4:
                slow.sendall(b" ")
                time.sleep(0.1)
    assert 0.5 <= time.monotonic() - begin < 3
    run.threads[0].join()
    run.close()
    assert "process 1 of 2 did not start within 5 s" in str(run.found[0])


def test_who_is_refused_is_told_at_once(run: Run):
    for thread in run.threads:
        thread.start()
    for thread in run.threads:
        thread.join(timeout=20)
    for end, reason in (
        (run.end(1), "process 1 is there already"),
        (run.end(2, count=4), "it has --num-processes 3; process 2 of 4 is none"),
        (run.end(3, count=3), "process 3 of 3 is none"),
        (run.end(1, key=b"another secret, as long"), "another secret"),
    ):
        begin = time.monotonic()
        with pytest.raises(UsageError, match=reason):
            end.meet(begin + 30, 30)
        assert time.monotonic() - begin < 5
    assert all(end.events.empty() for end in run.ends)


def test_a_process_that_came_and_went_before_the_start_may_come_again():
    run = Run(3)
    run.threads[0].start()
    early = run.end(1)
    assert isinstance(early, Spoke)
    early._connect(time.monotonic() + 20)
    wait_for(lambda: 1 in run.ends[0].links)
    early.links[0].lines.sock.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: 1 not in run.ends[0].links)
    for thread in run.threads[1:]:
        thread.start()
    for thread in run.threads:
        thread.join(timeout=20)
    run.close()
    assert [type(run.found[r]) for r in range(3)] == [meeting.Meeting] * 3


def test_a_stranger_in_the_place_of_process_0_is_not_believed():
    """It does not have the secret, so what it says is not heard."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def lie() -> None:
            with contextlib.suppress(OSError):  # until the test ends
                while True:
                    sock, _ = server.accept()
                    with sock:
                        told = lines.Lines(sock)
                        told.send({"nonce": "0"})
                        told.receive(1024)
                        told.send({"welcome": "0"})
                        told.send({"start": "127.0.0.1:1"})

        threading.Thread(target=lie, daemon=True).start()
        spoke = Spoke(Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 1), SECRET)
        with pytest.raises(Lost, match="it has another secret"):
            spoke.meet(time.monotonic() + 1, 1)


def test_jax_is_bound_to_the_address_where_the_others_came_in(run: Run):
    for thread in run.threads:
        thread.start()
    for thread in run.threads:
        thread.join(timeout=20)
    zero = run.found[0]
    assert zero.bind == zero.address == run.found[1].address
    assert zero.bind.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("message", "sender"),
    [
        (5, 1),
        ({}, 1),
        ({"code": 0}, 1),
        ({"gather": ["x"], "value": 0}, 1),
        ({"gather": "x"}, 1),
        ({"values": [1, 2, 3]}, 1),
        ({"values": [1, 2]}, 0),
        ({"gone": 5, "how": "x"}, 1),
        ({"gone": [2], "how": "x"}, 1),
        ({"gone": [7], "how": "x"}, 0),
        ({"gone": [], "how": "x"}, 0),
        ({"fault": "x"}, 1),
        ({"start": "x"}, 1),
    ],
)
def test_messages_of_known_processes_are_checked(message, sender):
    assert not understood(message, sender, Place("h:1", 3, 0))


def test_a_line_is_bounded():
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    with ours, theirs:
        theirs.sendall(b"1" * 99 + b"\n" + b"2\n" + b"3" * 101)
        reader = lines.Lines(ours)
        assert reader.receive(100) == int("1" * 99)
        assert reader.receive(100) == 2
        with pytest.raises(ValueError, match="more than 100 bytes"):
            reader.receive(100)


def test_a_secret_is_made_once_for_its_user_alone(tmp_path):
    path = tmp_path / "new" / "secret"
    first = secret.find_secret(path, {})
    assert secret.find_secret(path, {secret.VARIABLE: "y" * 40}) == first
    assert len(first) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret.find_secret(None, {secret.VARIABLE: "y" * 40}) == b"y" * 40
    path.chmod(0o644)
    with pytest.raises(UsageError, match="others may read it: chmod 600"):
        secret.find_secret(path, {})
    with pytest.raises(UsageError, match="expected at least 16 bytes, found 3"):
        secret.find_secret(None, {secret.VARIABLE: "abc"})
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UsageError, match="expected a regular file"):
        secret.find_secret(tmp_path / "pipe", {})
