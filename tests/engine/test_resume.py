"""A run that is cut off at any moment continues, computes nothing twice and ends with equal scores.

`SAMA_RESUME_TEXTS=500 SAMA_RESUME_KILLS=10` makes the killed run as long as in the acceptance.
"""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny

from sama_jax.arrays import TextKeyData
from sama_jax.cli import entry
from sama_jax.cli.flags import STANDARD
from sama_jax.config import AuditSettings
from sama_jax.devices.strategy import local_layout
from sama_jax.engine.batching import BatchShapes
from sama_jax.engine.text_table import TextView, table_of
from sama_jax.errors import ValidityError
from sama_jax.models.registry import build_model, read_config
from sama_jax.storage.files import AppendOnly, read_json_lines
from sama_jax.storage.loss_store import LossStore, make_record
from sama_jax.storage.run_folder import RunFolder

TEXTS = int(os.environ.get("SAMA_RESUME_TEXTS", "120"))
KILLS = int(os.environ.get("SAMA_RESUME_KILLS", "3"))
ROOT = Path(__file__).parents[2]
SETTINGS = ["--set", "sama.steps=4", "--set", "sama.subsets=16", "--max-length", "64"]
PATIENCE = 300.0
"""Seconds for one step of a run on a busy machine."""


# --- whole runs, in processes that can be killed -------------------------------------------------


class Inputs(NamedTuple):
    """Model folders, texts and the environment that all runs share."""

    target: Path
    reference: Path
    data: Path
    ids: list[str]
    env: dict[str, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    base = tmp_path_factory.mktemp("resume")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(base / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return Inputs(
        tiny.folder(base / "target", seed=0),
        tiny.folder(base / "reference", seed=1),
        tiny.write_texts(base / "texts.jsonl", tiny.texts(TEXTS)),
        [f"t{i}" for i in range(TEXTS)],
        env,
    )


class Run:
    """`python -m sama_jax audit` in a process of its own."""

    def __init__(self, inputs: Inputs, out: Path, *more: str):
        self.out = out
        self._errors = out.with_name(f"{out.name}-{time.monotonic_ns()}.err")
        command = [
            *(sys.executable, "-m", "sama_jax", "audit", "--target", str(inputs.target)),
            *("--reference", str(inputs.reference), "--data", str(inputs.data)),
            *("--out", str(out), "--batch-size", "4", "--no-figures", *SETTINGS, *more),
        ]
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=inputs.env
            )

    @property
    def stderr(self) -> str:
        return self._errors.read_text()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Returns as soon as `happened()`; fails if the process ends before."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"ended too early:\n{self.stderr}"
            assert time.monotonic() < deadline, f"nothing happened:\n{self.stderr}"
            time.sleep(0.001)

    def finish(self) -> int:
        return self.process.wait(PATIENCE)

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.finish()


FINISHED = ValidityError.exit_code
"""Everything is written; the models are random, which a gate finds in so many texts."""


def shard_bytes(out: Path) -> int:
    shard = out / "losses" / "losses-00000.bin"
    return shard.stat().st_size if shard.exists() else 0


def stored(out: Path, scratch: Path) -> tuple[int, int]:
    """(records, distinct keys) of a run's loss store, read from a copy."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(out / "losses", scratch)
    store = LossStore(scratch)
    store.close()
    return store.num_records, len(store)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


class Whole(NamedTuple):
    """The uninterrupted run."""

    rows: list[dict[str, Any]]
    records: int
    bytes: int


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "run"
    run = Run(inputs, out)
    assert run.finish() == FINISHED, run.stderr
    records, keys = stored(out, out.parent / "copy")
    assert records == keys > 0
    return Whole(rows_of(out), records, shard_bytes(out))


def assert_complete(out: Path, inputs: Inputs, whole: Whole) -> None:
    """All texts once and in order, scores bit for bit, nothing computed twice or left over."""
    rows = rows_of(out)
    assert [row["id"] for row in rows] == inputs.ids
    assert rows == whole.rows
    assert stored(out, out.parent / "copy") == (whole.records, whole.records)
    assert not list(out.rglob("*.part"))
    assert json.loads((out / "manifest.json").read_text())["finished"] is True


def test_a_run_killed_again_and_again_ends_with_equal_scores(
    inputs: Inputs, whole: Whole, tmp_path: Path
):
    out, jitter, seen = tmp_path / "run", random.Random(0), 0
    for kill in range(1, KILLS + 1):
        run = Run(inputs, out)
        goal = max(shard_bytes(out) + 1, kill * whole.bytes // (KILLS + 1))
        run.wait_until(lambda goal=goal: shard_bytes(out) >= goal)
        time.sleep(jitter.uniform(0, 0.005))
        assert run.stop(signal.SIGKILL) == -signal.SIGKILL
        records, keys = stored(out, tmp_path / "copy")
        assert seen < records == keys
        assert not (out / "scores.jsonl").exists()
        print(f"kill {kill}: {records} of {whole.records} records")
        seen = records
    run = Run(inputs, out)
    assert run.finish() == FINISHED, run.stderr
    assert_complete(out, inputs, whole)


def catches_signals(pid: int) -> bool:
    """Whether the process has its own SIGTERM handler; on Linux, else after a while."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        time.sleep(0.5)
        return True
    caught = [line.split()[1] for line in status.read_text().splitlines() if "SigCgt" in line]
    return bool(caught) and bool(int(caught[0], 16) >> (signal.SIGTERM - 1) & 1)


def assert_interrupted(run: Run, code: int) -> None:
    """Exit code 75 and one line that says what to do; no traceback."""
    assert code == 75, run.stderr
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("sama-jax:")]
    assert len(said) == 1, run.stderr
    assert "continues" in said[0]
    assert str(run.out) in said[0]


def test_a_run_stopped_by_signals_ends_with_equal_scores(
    inputs: Inputs, whole: Whole, tmp_path: Path
):
    out = tmp_path / "run"

    run = Run(inputs, out)  # while it imports
    run.wait_until(lambda: catches_signals(run.process.pid))
    assert_interrupted(run, run.stop(signal.SIGTERM))
    assert not out.exists()

    run = Run(inputs, out)  # while it compiles
    run.wait_until(lambda: "compiling" in run.stderr)
    assert_interrupted(run, run.stop(signal.SIGINT))

    for first, second in (
        (signal.SIGTERM, None),
        (signal.SIGINT, None),
        (signal.SIGTERM, signal.SIGTERM),
    ):
        run, before = Run(inputs, out), shard_bytes(out)
        run.wait_until(lambda run=run, before=before: shard_bytes(out) > before)
        run.process.send_signal(first)
        if second:
            time.sleep(0.002)
            run.process.send_signal(second)
        assert_interrupted(run, run.finish())
        records, keys = stored(out, tmp_path / "copy")
        assert records == keys

    run = Run(inputs, out)
    assert run.finish() == FINISHED, run.stderr
    assert_complete(out, inputs, whole)


# --- whole runs, in this process -----------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("models")
    return tiny.folder(base / "target", seed=0), tiny.folder(base / "reference", seed=1)


def audit(models: tuple[Path, Path], data: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    command = ["audit", "--target", str(models[0]), "--reference", str(models[1])]
    command += ["--data", str(data), "--out", str(out), "--quiet", *tiny.SETTINGS, *more]
    assert entry.main(command) == 0
    return rows_of(out)


def records_by_plan(out: Path, scratch: Path) -> dict[str, int]:
    """Records of each (model, plan), repeated ones counted."""
    assert len(set(stored(out, scratch))) == 1
    counts: dict[str, int] = {}
    for frame in frames(scratch / "losses-00000.bin"):
        header = json.loads(frame[20 : 20 + int.from_bytes(frame[4:8], "little")])
        key = f"{header['model']} {header['plan']}"
        counts[key] = counts.get(key, 0) + len(header["texts"])
    return counts


def frames(shard: Path) -> list[bytes]:
    """The frames of a shard by the documented format."""
    content, found, at = shard.read_bytes(), [], 0
    while at < len(content):
        head, payload = (
            int.from_bytes(content[at + a : at + b], "little") for a, b in ((4, 8), (8, 16))
        )
        found.append(content[at : at + 20 + head + payload])
        at += 20 + head + payload
    return found


def test_an_added_attack_costs_only_what_is_missing(models, tmp_path: Path):
    data = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(20, (8, 28)))
    out = tmp_path / "run"
    first = audit(models, data, out, "--attacks", "sama")
    before = records_by_plan(out, tmp_path / "copy")
    assert list(before.values()) == [20, 20]
    assert [list(row["scores"]) for row in first] == [["sama"]] * 20
    shard = (out / "losses" / "losses-00000.bin").read_bytes()

    both = audit(models, data, out, "--attacks", STANDARD)
    after = records_by_plan(out, tmp_path / "copy")
    assert {key: after[key] for key in before} == before
    assert list(after.values()) == [20] * 4
    assert (out / "losses" / "losses-00000.bin").read_bytes().startswith(shard)
    assert [row["scores"]["sama"] for row in both] == [row["scores"]["sama"] for row in first]
    assert all(None not in row["scores"].values() and len(row["scores"]) > 1 for row in both)

    at_once = audit(models, data, tmp_path / "at-once", "--attacks", STANDARD)
    assert [row["scores"] for row in at_once] == [row["scores"] for row in both]

    size = shard_bytes(out)
    again = audit(models, data, out, "--attacks", "loss")  # nothing is missing
    assert shard_bytes(out) == size
    assert [row["scores"] for row in again] == [row["scores"] for row in both]


def test_equal_tokens_are_computed_once_and_scored_twice(models, tmp_path: Path):
    found = tiny.texts(6, (8, 28))
    long = " ".join(tiny.texts(3, (40, 48)))
    found += [found[2], f"{long} karo", f"{long} mite"]  # the last two are cut to equal tokens
    data = tiny.write_texts(tmp_path / "texts.jsonl", found, labels=False)
    rows = audit(models, data, tmp_path / "run")
    assert list(records_by_plan(tmp_path / "run", tmp_path / "copy").values()) == [7] * 4
    assert [row["id"] for row in rows] == [f"t{i}" for i in range(9)]
    assert rows[6]["scores"] == rows[2]["scores"]
    assert rows[8]["scores"] == rows[7]["scores"]
    assert rows[8]["truncated"]
    assert None not in rows[8]["scores"].values()
    assert rows[7]["scores"] != rows[6]["scores"]


def test_a_text_is_padded_alike_however_few_are_left():
    """A resumed run must compute the same bits, and padding may change them."""

    def text(name: str, length: int) -> TextView:
        key, ids = TextKeyData(np.uint32(0), np.uint32(0)), np.zeros(length, np.int32)  # pyright: ignore
        return TextView(key, np.ones(length, bool), 1, 1, name, ids, ids[:0])

    lengths = [20, 120, 60, 25, *[50] * 30, 30, 100]
    table = table_of([text(f"{i}", length) for i, length in enumerate(lengths)])
    settings = AuditSettings(max_length=128)
    # Large enough for a bucket to pay, if it saves padding at all; never initialised.
    config = tiny.config(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=8192)
    model = build_model(read_config(config, "config.json"), tiny.MASK_ID, np.dtype(np.float32))
    shapes = BatchShapes(model, 128, settings, local_layout(), 0, 2**30, batch_size=1)

    def padded(rows: list[int]) -> dict[int, int]:
        batches = shapes.batches(table, rows)
        assert len({len(b.rows) for b in batches}) <= 1
        found = [(int(r), b.length) for b in batches for r in b.rows if r >= 0]
        assert sorted(r for r, _ in found) == sorted(rows)
        return dict(found)

    everything = padded(list(range(len(lengths))))
    assert everything[0] == 64  # three short texts are too few for a bucket of their own
    assert everything[1] == 128
    draw = random.Random(0)
    for count in [1, 1, 2, 3, 5, 8, 20]:
        left = sorted(draw.sample(range(len(lengths)), count))
        assert padded(left) == {row: everything[row] for row in left}
    assert padded([0]) == {0: 64}
    assert padded([]) == {}


def test_a_score_without_its_line_is_read_from_the_store(models, tmp_path: Path):
    data = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(20, (8, 28)))
    out = tmp_path / "run"
    rows = audit(models, data, out)
    size, parts = shard_bytes(out), out / "parts" / "scores-00000.jsonl"
    lines = parts.read_bytes()
    parts.write_bytes(lines[: len(lines) // 2])  # torn in the middle of a line
    for name in ("scores.jsonl", "metrics.json"):
        (out / name).unlink()
    assert audit(models, data, out) == rows
    assert shard_bytes(out) == size


def test_a_missing_store_is_computed_anew_with_equal_scores(models, tmp_path: Path):
    data = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(20, (8, 28)))
    rows = audit(models, data, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "losses")
    assert audit(models, data, tmp_path / "run") == rows
    assert len(set(stored(tmp_path / "run", tmp_path / "copy"))) == 1


def test_ctrl_c_inside_a_caller_s_process(models, tmp_path: Path, capsys, monkeypatch):
    data = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(20, (8, 28)))
    rows = audit(models, data, tmp_path / "undisturbed")
    out, append = tmp_path / "run", LossStore.append

    def interrupted(store: LossStore, *batch: Any) -> None:
        if len(store):
            raise KeyboardInterrupt
        append(store, *batch)

    command = ["audit", "--target", str(models[0]), "--reference", str(models[1])]
    command += ["--data", str(data), "--out", str(out), "--quiet", *tiny.SETTINGS]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(LossStore, "append", interrupted)
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        assert entry.main(command) == 75
        assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"finished batches are kept in {out}: the same command continues" in said
    records, keys = stored(out, tmp_path / "copy")
    assert records == keys == 20
    assert entry.main(command) == 0
    assert rows_of(out) == rows


# --- the files -----------------------------------------------------------------------------------


def some_record(seed: int, passes: int = 3, slots: int = 4):
    draw = np.random.default_rng(seed)
    positions = np.sort(draw.permuted(np.tile(np.arange(9), (passes, 1)), axis=1)[:, :slots])
    positions[0, -1] = -1
    return make_record(positions, draw.normal(size=positions.shape).astype(np.float32))


def fill(folder: Path, batches: int = 3) -> list[int]:
    """Writes batches of two records; returns where each frame ends."""
    store, ends = LossStore(folder), []
    for batch in range(batches):
        names = [f"{batch}a", f"{batch}b"]
        store.append("model", "plan", names, [some_record(2 * batch), some_record(2 * batch + 1)])
        ends.append((folder / "losses-00000.bin").stat().st_size)
    store.close()
    return ends


def assert_holds(store: LossStore, batches: list[int]) -> None:
    assert store.num_records == len(store) == 2 * len(batches)
    for batch in batches:
        for row, name in enumerate("ab"):
            read, wrote = (
                store.read("model", "plan", f"{batch}{name}"),
                some_record(2 * batch + row),
            )
            for a, b in zip(read, wrote):
                assert a.dtype == b.dtype
                assert np.array_equal(a, b)


def test_a_shard_cut_at_any_byte_of_its_last_frame_reopens_before_it(tmp_path: Path):
    ends = fill(tmp_path / "whole")
    content = (tmp_path / "whole" / "losses-00000.bin").read_bytes()
    assert ends[-1] == len(content)
    folder = tmp_path / "cut"
    folder.mkdir()
    for size in range(ends[-2], ends[-1]):
        (folder / "losses-00000.bin").write_bytes(content[:size])
        store = LossStore(folder)
        assert_holds(store, [0, 1])
        assert shard_bytes_in(folder) == ends[-2]
        store.append("model", "plan", ["2a", "2b"], [some_record(4), some_record(5)])
        assert_holds(store, [0, 1, 2])
        store.close()
        assert (folder / "losses-00000.bin").read_bytes() == content
    store = LossStore(folder)
    assert_holds(store, [0, 1, 2])
    store.close()


def shard_bytes_in(folder: Path) -> int:
    return (folder / "losses-00000.bin").stat().st_size


def test_a_flipped_byte_costs_the_losses_of_its_frame_alone(tmp_path: Path):
    ends = fill(tmp_path)
    shard = tmp_path / "losses-00000.bin"
    content = shard.read_bytes()
    for at in range(ends[-2]):
        for flip in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[at] ^= flip
            shard.write_bytes(damaged)
            store = LossStore(tmp_path)
            hit = int(at >= ends[0])
            assert_holds(store, [b for b in range(3) if b != hit])
            assert store.damaged_bytes == ends[hit] - (ends[hit - 1] if hit else 0)
            store.close()
            assert shard.read_bytes() == damaged  # nothing is cut
    store = LossStore(tmp_path)
    store.append("model", "plan", ["1a", "1b"], [some_record(2), some_record(3)])
    store.close()
    store = LossStore(tmp_path)
    assert_holds(store, [0, 1, 2])
    store.close()


@pytest.mark.parametrize(
    "junk", [b"\0" * 4096, b"SJL1" * 9, os.urandom(999), b"SJL1" + b"\xff" * 40]
)
def test_junk_behind_the_last_frame_is_cut_off(tmp_path: Path, junk: bytes):
    ends = fill(tmp_path)
    shard = tmp_path / "losses-00000.bin"
    shard.write_bytes(shard.read_bytes() + junk)
    store = LossStore(tmp_path)
    assert_holds(store, [0, 1, 2])
    store.close()
    assert shard_bytes_in(tmp_path) == ends[-1]


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"model": "m", "plan": "p", "passes": 3},
        {"model": "m", "plan": "p", "passes": -1, "texts": ["a"]},
        {"model": "m", "plan": "p", "passes": 10**12, "texts": ["a"]},
        {"model": "m", "plan": "p", "passes": True, "texts": ["a"]},
        {"model": "m", "plan": "p", "passes": 3, "texts": ["a", "b"]},
        {"model": 1, "plan": "p", "passes": 3, "texts": ["a"]},
    ],
)
def test_a_frame_whose_header_says_something_else_is_none(tmp_path: Path, header: Any):
    ends = fill(tmp_path)
    shard = tmp_path / "losses-00000.bin"
    head, payload = json.dumps(header).encode(), np.zeros(3, "<i4").tobytes() + b"\0" * 5
    crc = zlib.crc32(payload, zlib.crc32(head))
    with shard.open("ab") as file:
        file.write(struct.pack("<4sIQI", b"SJL1", len(head), len(payload), crc) + head + payload)
    store = LossStore(tmp_path)
    assert_holds(store, [0, 1, 2])
    store.close()
    assert shard_bytes_in(tmp_path) == ends[-1]


def test_a_damaged_shard_is_computed_anew_where_it_is_damaged(models, tmp_path: Path):
    data = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(20, (8, 28)))
    out = tmp_path / "run"
    rows = audit(models, data, out)
    shard = out / "losses" / "losses-00000.bin"
    content, first = bytearray(shard.read_bytes()), len(frames(shard)[0])
    content[first // 2] ^= 0x10
    shard.write_bytes(content + b"\0" * 4096)
    shutil.rmtree(out / "parts")
    assert audit(models, data, out) == rows
    assert shard.stat().st_size == len(content) + first


def test_a_write_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = AppendOnly(tmp_path / "x.jsonl")
    file.append_json({"a": 1})
    inner = file._file

    class Half:
        def write(self, data: bytes) -> int:
            inner.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    monkeypatch.setattr(file, "_file", Half())
    with pytest.raises(Exception, match="No space left on device") as caught:
        file.append_json({"b": 2})
    assert getattr(caught.value, "exit_code", None) == 74
    monkeypatch.setattr(file, "_file", inner)
    file.append_json({"c": 3})
    file.close()
    assert read_json_lines(tmp_path / "x.jsonl")[0] == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize(
    "torn", [b"{", b'{"id": "b"', b'{"id": "b", "scores": {"sama": 0.5}}', b"\xc3"]
)
def test_torn_last_lines_are_cut_off(tmp_path: Path, torn: bytes):
    folder = RunFolder(tmp_path, {"seed": 1}, {}, None)
    folder.append_scores([{"id": "a", "scores": {"sama": 0.25}, "passes": {"sama": 4}}])
    folder.close()
    names = ("parts/scores-00000.jsonl", "log.jsonl")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        (tmp_path / name).write_bytes(before[name] + torn)
    folder = RunFolder(tmp_path, {"seed": 1}, {}, None)
    assert folder.has_scores("a", ["sama"])
    assert not folder.has_scores("b", ["sama"])
    folder.append_scores([{"id": "c", "scores": {"sama": 0.75}, "passes": {"sama": 4}}])
    folder.close()
    for name in names:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(before[name])
        added = [json.loads(line) for line in content[len(before[name]) :].decode().splitlines()]
        assert [line.get("id", line.get("event")) for line in added] == (
            ["c"] if "scores" in name else ["start"]
        )
