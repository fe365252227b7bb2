"""Several processes of one audit on 127.0.0.1: shares, a killed one, one that never starts.

Every process is ended by its handle; every wait has a limit, and what processes printed is in the
message of a failure.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
from strangers import STRANGERS, free_port, knock

from sama_jax.devices import meeting, processes, secret
from sama_jax.devices.child_process import Crashed
from sama_jax.devices.rank import Place, found_place, given_place
from sama_jax.errors import UsageError
from sama_jax.storage.loss_store import LossStore

ROOT = Path(__file__).parents[2]
SECRET = b"0123456789abcdef of the tests"
PATIENCE = 500.0
"""Seconds for a step on a busy machine."""
TEXTS = 24
MORE_TEXTS = 240
"""For a run that is killed in the middle: a busy machine did all of 24 before the kill came."""
VOID = 5
"""What such a run ends with: from 40 texts on, models that have learnt nothing are noticed."""


class Inputs(NamedTuple):
    """Models and texts that all runs share."""

    target: Path
    reference: Path
    texts: Path


def environment(inputs: Inputs) -> dict[str, str]:
    """Two devices a process; programs are kept for the next one."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(inputs.texts.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "PYTHONPATH": str(ROOT),
        secret.VARIABLE: SECRET.decode(),
    }


def audit(inputs: Inputs, out: Path, *flags: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "sama_jax",
        "audit",
        "--target",
        inputs.target,
        "--reference",
        inputs.reference,
        "--data",
        inputs.texts,
        "--out",
        out,
        "--attacks",
        "sama,loss",
        "--set",
        "sama.steps=3",
        "--set",
        "sama.subsets=16",
        "--max-length",
        32,
        "--batch-size",
        1,
        "--no-figures",
        *flags,
    ]
    return subprocess.Popen(
        [str(c) for c in command],
        env=environment(inputs),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def start(
    inputs: Inputs, outs: list[Path], *flags: object, ranks=(0, 1), port: int | None = None
) -> list[subprocess.Popen]:
    """Processes of one run of two, each with its own --out."""
    port = port or free_port()
    return [
        audit(
            inputs,
            outs[rank],
            "--coordinator",
            f"127.0.0.1:{port}",
            "--num-processes",
            2,
            "--process-id",
            rank,
            *flags,
        )
        for rank in ranks
    ]


def finish(running: list[subprocess.Popen], seconds: float = PATIENCE) -> list[tuple[int, str]]:
    """(exit code, what was printed on standard error) of each; none is left behind."""
    try:
        outputs = [p.communicate(timeout=seconds)[1] for p in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, text) for p, text in zip(running, outputs)]


def scores_of(out: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["scores"] for row in rows}


def assert_same_scores(out: Path, expected: dict[str, dict], tolerance: float = 0.0) -> None:
    found = scores_of(out)
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        for attack, value in scores.items():
            # A vote near zero may turn where losses differ in the last bits.
            slack = max(tolerance, 0.01 if attack == "sama" and tolerance else 0.0)
            assert found[name][attack] == pytest.approx(value, rel=tolerance, abs=slack)


def records(out: Path) -> tuple[int, int]:
    """Records in all shards, and distinct ones."""
    store = LossStore(out / "losses", "losses-99999.bin")
    store.close()
    (out / "losses" / "losses-99999.bin").unlink()
    return store.num_records, len(store)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("multiprocess")
    wide = {"n_layers": 2, "d_model": 32, "mlp_hidden_size": 48, "n_heads": 4, "n_kv_heads": 4}
    return Inputs(
        tiny.folder(root / "target", seed=1, **wide),
        tiny.folder(root / "reference", seed=2, **wide),
        tiny.write_texts(root / "texts.jsonl", tiny.texts(TEXTS, words=(3, 30))),
    )


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    """The scores of one process."""
    out = tmp_path_factory.mktemp("expected") / "run"
    (result,) = finish([audit(inputs, out)])
    assert result[0] == 0, result[1]
    return scores_of(out)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_one_of_two_is_killed_and_one_process_goes_on(inputs, tmp_path):
    """The survivor names it at once, without a dump; then every text once, and the same scores."""
    # Beside the other texts, so that the programs in the cache are used.
    texts = tiny.write_texts(
        inputs.texts.with_name("more.jsonl"), tiny.texts(MORE_TEXTS, words=(3, 30))
    )
    inputs = inputs._replace(texts=texts)
    (result,) = finish([audit(inputs, tmp_path / "expected")])
    assert result[0] == VOID, result[1]
    out = tmp_path / "run"
    first, second = running = start(inputs, [out, out])
    end = time.monotonic() + PATIENCE
    part = out / "parts" / "scores-00001.jsonl"
    while lines(part) < 2 and time.monotonic() < end and second.poll() is None:
        time.sleep(0.02)
    second.kill()
    killed = time.monotonic()
    (code, told), _ = finish([first, second])
    took = time.monotonic() - killed
    assert code == 75, told
    last = told.strip().splitlines()[-1]
    assert last.startswith("sama-jax: process 1 of 2 has gone (stopped, dead or unreachable)"), told
    assert "Traceback" not in told
    assert "Check failure" not in told
    assert took < meeting.LOST_SECONDS + 15, "the bound, and what a busy machine takes to end"
    parts = [p.read_text().splitlines() for p in out.glob("parts/*.jsonl")]
    done = {json.loads(line)["id"] for part in parts for line in part}
    print(len(done), "of", MORE_TEXTS, "texts done when one was killed")
    assert 2 <= len(done) < MORE_TEXTS
    (result,) = finish([audit(inputs, out)])
    assert result[0] == VOID, result[1]
    assert_same_scores(out, scores_of(tmp_path / "expected"))
    total, distinct = records(out)
    # Two models under SAMA's plan, the target under loss's.
    assert total == distinct == MORE_TEXTS * 3
    assert not any(p.poll() is None for p in running)


def knock_all_along(port: int, running: list[subprocess.Popen]) -> None:
    """Lets strangers knock as long as the processes run."""
    draw, count, kept = random.Random(2), 0, []
    while any(p.poll() is None for p in running):
        with contextlib.suppress(OSError):  # nobody listens yet, or no longer
            kept.append(knock(port, draw.randrange(9), draw))
            count += 1
        time.sleep(0.01 if count < STRANGERS else 0.2)
    for sock in kept:
        sock.close()
    assert count > 10


def test_a_mesh_over_two_processes_gives_the_same_scores(inputs, expected, tmp_path):
    """With strangers at the port from the first moment to the last."""
    out, port = tmp_path / "run", free_port()
    running = start(inputs, [out, out], "--mesh", "data=2,model=2", port=port)
    knocking = threading.Thread(target=knock_all_along, args=(port, running))
    knocking.start()
    for code, told in finish(running):
        assert code == 0, told
    knocking.join()
    assert_same_scores(out, expected, tolerance=1e-5)
    total, distinct = records(out)
    assert total == distinct == TEXTS * 3
    shards = sorted(p.name for p in (out / "losses").iterdir())
    assert shards == ["losses-00000.bin", "losses-00001.bin"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["cost"]["passes_run"] == TEXTS * (2 * 3 + 3)


def merge(inputs: Inputs, out: Path, *parts: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "sama_jax", "merge", out, *parts]
    running = subprocess.Popen(
        [str(c) for c in command],
        env=environment(inputs),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    return finish([running])[0]


def test_without_a_shared_disk_the_parts_are_merged(inputs, expected, tmp_path):
    """Each process has a folder of its own; joined, they are what one process writes."""
    outs = [tmp_path / "a", tmp_path / "b"]
    for code, told in finish(start(inputs, outs)):
        assert code == 0, told
    assert not (outs[0] / "scores.jsonl").exists()
    parts = [lines(o / "parts" / f"scores-0000{i}.jsonl") for i, o in enumerate(outs)]
    assert sum(parts) == TEXTS
    assert min(parts) > 0
    code, told = merge(inputs, tmp_path / "out", *outs)
    assert code == 0, told
    assert_same_scores(tmp_path / "out", expected)
    code, told = merge(inputs, tmp_path / "out", *outs)
    assert code == 2
    assert "exists and is not empty; give a new folder" in told
    code, told = merge(inputs, tmp_path / "half", outs[0])
    assert code == 2
    assert f"passes were not made for {parts[1]} of {TEXTS} texts; run the audit" in told


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_starts_is_named(rank, inputs, tmp_path):
    out = tmp_path / "run"
    begin = time.monotonic()
    ((code, told),) = finish(start(inputs, [out, out], "--start-timeout", 2, ranks=[rank]), 60)
    assert time.monotonic() - begin < 40
    assert code == 75, told
    wanted = (
        "process 1 of 2 did not start within 2 s"
        if rank == 0
        else ("process 0 of 2 did not answer at 127.0.0.1:")
    )
    assert told.startswith(f"sama-jax: {wanted}")
    assert len(told.strip().splitlines()) == 1
    assert not out.exists()


def test_an_error_in_one_process_is_its_own_and_ends_the_others(inputs, tmp_path):
    out = tmp_path / "run"
    port = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id"]
    running = [audit(inputs, out, *port, 0), audit(inputs, out, *port, 1, "--seed", 7)]
    told = finish(running)
    assert {code for code, _ in told} <= {2, 75}
    assert any("processes 0 and 1 do not agree on texts, models" in text for _, text in told)
    assert not out.exists()


def test_sigterm_stops_all(inputs, tmp_path):
    out = tmp_path / "run"
    running = start(inputs, [out, out])
    end = time.monotonic() + PATIENCE
    while not (out / "parts").is_dir() and time.monotonic() < end:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    (first, told), (second, own) = finish(running)
    assert (first, second) == (75, 75), told + own
    assert "process 1 of 2 has gone" in told
    assert "interrupted; what is finished is kept" in own
    assert "Traceback" not in told + own


# --- the meeting, without any work ---------------------------------------------------------------

CHILD = """
import os, signal, sys, time
from sama_jax.devices import processes
peers = processes.join()
for i in range(3):
    print(peers.rank, peers.gather(f"round {i}", [peers.rank, i]), flush=True)
if "fail" in sys.argv and peers.rank == 1:
    raise RuntimeError("a private text")
for name in ("SIGKILL", "SIGSTOP", "SIGSEGV"):
    if name in sys.argv and peers.rank == 1:
        os.kill(os.getpid(), getattr(signal, name))
if "leave" in sys.argv:
    peers.rank == 1 and processes.leave(0)
    peers.gather("one more", None)
if "memory" in sys.argv and peers.rank == 1:
    processes.leave(71)
if "hang" in sys.argv:
    time.sleep(60)
processes.leave(0)
"""


def supervise(count: int, *flags: str, stall: float = 60.0) -> list[int | str]:
    """Exit codes, or errors, of supervisors in threads of this process."""
    port, results = free_port(), [0] * count

    def one(rank: int) -> None:
        place, bounds = Place(f"127.0.0.1:{port}", count, rank), processes.Bounds(30, stall)
        try:
            results[rank] = processes.supervise(
                ["-c", CHILD, *flags], place, bounds, "kept", SECRET
            )
        except (meeting.Lost, Crashed) as error:
            results[rank] = f"{error.exit_code}: {error}"

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return results


def test_processes_tell_each_other_small_things(capfd):
    assert supervise(3) == [0, 0, 0]
    printed = capfd.readouterr().out.splitlines()
    assert sorted(printed) == sorted(
        f"{rank} {[[r, i] for r in range(3)]}" for rank in range(3) for i in range(3)
    )


def test_a_bug_in_one_process_is_shown_there_and_named_elsewhere(capfd, monkeypatch):
    other, own = supervise(2, "fail", "hang")
    expected = "1: a fault of sama_jax, please report it: RuntimeError in"
    assert str(own).startswith(expected)
    assert other == "75: process 1 of 2 has gone (failed with exit code 1); kept"
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("SAMA_JAX_TRACEBACK", "1")
    assert str(supervise(2, "fail", "hang")[1]).startswith(expected)
    assert capfd.readouterr().err.count("RuntimeError: a private text") == 1


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("SIGKILL", 75, "killed by SIGKILL, most often because the machine ran out of memory"),
        ("SIGSEGV", 1, "ended by SIGSEGV"),
        ("SIGSTOP", 75, "stopped or stuck: no sign of life for 5 s"),
        ("leave", 75, "ended before the others"),
    ],
)
def test_a_child_that_is_killed_or_stopped_is_named_by_every_process(
    how, code, told, capfd, monkeypatch
):
    monkeypatch.setattr(processes, "SILENT_SECONDS", 5.0)  # a busy machine is silent for 2 s
    begin = time.monotonic()
    zero, one, two = supervise(3, how, *[] if how == "leave" else ["hang"])
    assert time.monotonic() - begin < 50
    for said in (zero, two):
        assert said == f"75: process 1 of 3 has gone ({told}); kept"
    if how == "leave":
        assert one == 0
    else:
        assert str(one).startswith(f"{code}: process 1 of 3 ")
        assert told in str(one)
    assert capfd.readouterr().err == ""


def test_work_without_progress_is_named(capfd):
    """The process lives and answers; its work stands still."""
    found = [str(said) for said in supervise(2, "hang", stall=4.0)]
    assert all("has gone (no progress for 4 s: --stall-timeout sets the bound)" in x for x in found)
    assert capfd.readouterr().err == ""


def test_a_lack_of_memory_in_one_process_is_its_exit_code(capfd):
    other, own = supervise(2, "memory", "hang")
    assert own == 71
    assert other == "75: process 1 of 2 has gone (ended with exit code 71); kept"
    assert capfd.readouterr().err == ""


def test_a_silent_process_counts_as_lost(monkeypatch):
    """A host without power closes no connection."""
    monkeypatch.setattr(meeting, "LOST_SECONDS", 1.0)
    monkeypatch.setattr(meeting.Link, "_beat", lambda _: None)
    port, found = free_port(), []
    spoke = meeting.Spoke(Place(f"127.0.0.1:{port}", 2, 1), SECRET)
    thread = threading.Thread(target=lambda: found.append(spoke.meet(time.monotonic() + 30, 30)))
    thread.start()
    place, begin = Place(f"127.0.0.1:{port}", 2, 0), time.monotonic()
    with pytest.raises(meeting.Lost, match="process 1 of 2 has gone"):
        processes.supervise(
            ["-c", "import time; time.sleep(60)"], place, processes.Bounds(), "kept", SECRET
        )
    assert 1.0 <= time.monotonic() - begin < 15
    thread.join()
    assert found
    spoke.close()


def test_place_from_flags():
    place = given_place("host:12", 4, 3)
    assert place == ("host:12", 4, 3)
    assert given_place(None, None, None) is None
    for flags, message in (
        (("host:12", None, 1), "belong together"),
        (("host", 2, 1), "expected HOST:PORT"),
        (("host:²", 2, 1), "expected HOST:PORT"),
        (("host:" + "9" * 5000, 2, 1), "expected HOST:PORT"),
        ((":12", 2, 1), "expected HOST:PORT"),
        (("host:12", 10**9, 1), "expected 1 to 10000"),
        (("host:12", 0, 0), "expected 1 to 10000"),
        (("host:12", 2, 2), "expected 0 to 1"),
    ):
        with pytest.raises(UsageError, match=message):
            given_place(*flags)


def test_place_from_the_environment():
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_JOB_ID": "123456",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    }
    assert found_place(slurm) == ("gpu007:23456", 4, 3)
    assert found_place({**slurm, "SLURM_STEP_NODELIST": "a1,b2"}).coordinator[:3] == "a1:"
    for wrong in ({"SLURM_PROCID": "²"}, {"SLURM_PROCID": "4"}, {"SLURM_JOB_ID": "x"}):
        with pytest.raises(UsageError, match="cannot read Slurm's job"):
            found_place({**slurm, **wrong})
    gke = {"TPU_WORKER_HOSTNAMES": "t-0.x,t-1.x", "TPU_WORKER_ID": "1"}
    assert found_place(gke) == ("t-0.x:8479", 2, 1)
    machine = {"worker-network-endpoints": "a:b:10.0.0.1,c:d:10.0.0.2", "agent-worker-number": "1"}
    assert found_place({}, machine.__getitem__) == ("10.0.0.1:8479", 2, 1)

    def nowhere(_):
        raise OSError

    with pytest.raises(UsageError, match="neither Slurm nor a Cloud TPU slice"):
        found_place({}, nowhere)


def test_rows_of_a_mesh_belong_to_one_process_each():
    """Asked in one process: all of them are its own."""
    from sama_jax.devices.mesh import make_mesh
    from sama_jax.devices.strategy import OnMesh

    layout = OnMesh(make_mesh("data=4,model=2"))
    np.testing.assert_array_equal(layout.owned(8), np.ones(8, bool))
    np.testing.assert_array_equal(layout.held(8), np.ones(8, bool))
