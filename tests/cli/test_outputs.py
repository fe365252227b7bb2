"""Folders of other runs, damaged folders, full disks: one clear line, and good results are kept."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from wrong_inputs import (
    GOOD,
    Box,
    assert_complete,
    assert_one_line,
    contents,
    refuse,
    run,
    run_process,
    scores,
)

from sama_jax.storage import files

pytestmark = pytest.mark.usefixtures("figures")


def test_a_folder_of_another_run_is_refused_with_the_difference(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    (box.path / "other.jsonl").write_text("\n".join(GOOD))
    tiny.folder(box.path / "other", seed=2)
    for changes, fragments in [
        ({"preset": "paper"}, ["preset was 'default', is 'paper'", "sama.repeats was 1, is 4"]),
        ({"seed": 7}, ["seed was 42, is 7"]),
        ({"limit": 5}, ["texts was 20, is 5"]),
        ({"max_length": 16}, ["max_length was 32, is 16"]),
        ({"data": box.path / "other.jsonl"}, ["data was ", "texts was 20, is 6"]),
        ({"target": box.path / "other"}, ["target.weights was "]),
        ({"reference": box.path / "other"}, ["reference.weights was "]),
        ({"mask_id": 298}, ["target.mask_id was '299', is '298'", "reference.mask_id was"]),
    ]:
        for dry in (True, None):
            command = box.command(**changes, dry_run=dry)
            said = refuse(capsys, box, command, 2, str(box.out), *fragments)
            assert "belongs to another run; give --out a new folder" in said
    assert_complete(box.out, finished)


def test_a_folder_that_is_no_run_is_refused(box: Box, capsys):
    box.out.mkdir()
    (box.out / "thesis.tex").write_text("years of work")
    for dry in (True, None):
        command = box.command(dry_run=dry)
        refuse(capsys, box, command, 2, str(box.out), "not empty", "manifest.json", "new folder")


def test_a_folder_that_another_process_is_writing_to(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    other = files.AppendOnly(box.out / "losses" / "losses-00000.bin")
    refuse(capsys, box, box.command(), 2, "losses-00000.bin", "another process is writing to it")
    other.close()
    assert run(capsys, box.command()).code == 0
    assert_complete(box.out, finished)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_folder_with_a_damaged_demo(content: str, box: Box, capsys):
    box.out.mkdir()
    (box.out / "demo.json").write_text(content)
    refuse(capsys, box, ["demo", "--out", str(box.out)], 2, str(box.out), "no demo's folder")


def test_a_path_that_looks_like_markup_is_printed_as_it_is(box: Box, capsys):
    odd = box.path / "x[" / "y] :smile:"  # "[/y]" would close a style that is not open
    odd.parent.mkdir()
    box.target.rename(odd)
    said = run(capsys, [part for part in box.command(target=odd) if part != "--quiet"])
    assert said.code == 0
    assert f"target: {odd}, " in said.err


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
def test_a_damaged_manifest_is_refused(content: bytes, box: Box, capsys):
    box.out.mkdir()
    (box.out / "manifest.json").write_bytes(content)
    refuse(capsys, box, box.command(), 2, "manifest.json", "not readable", "new folder")


@pytest.mark.parametrize("foreign", [b'{"a": 1}\n', b"5\n", b"\xff\x00\n", b"[" * 99_999 + b"\n"])
def test_damaged_lines_of_scores_are_made_anew(
    foreign: bytes, box: Box, finished: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(finished, box.out)
    part = box.out / "parts" / "scores-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    stale = json.loads(lines[3]) | {"run": "0123456789abcdef"}
    stale["scores"] = dict.fromkeys(stale["scores"], 0.125)
    flipped = json.loads(lines[4])
    flipped["scores"]["sama"] = 0.125
    lines[4] = json.dumps(flipped).encode() + b"\n"
    part.write_bytes(foreign + b"".join(lines[2:]) + json.dumps(stale).encode() + b"\n")
    assert run(capsys, box.command()).code == 0
    assert scores(box.out) == scores(finished)


def test_a_shard_that_is_none_is_named(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    (box.out / "losses" / "losses-00001.bin").mkdir()
    said = run(capsys, box.command())
    assert_one_line(said, 3, "losses-00001.bin", "expected a regular file", "move it away")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", []),
        ("settings", "x"),
        ("store", 5),
        ("attacks", {"sama": 1}),
        ("corpus_attacks", [1]),
        ("store_keys", {"target": None}),
        ("cost", {"seconds": {"sama": "x"}}),
        ("notes", [None]),
        ("not_computed", ["x"]),
        ("versions", {"jax": 1}),
    ],
)
@pytest.mark.parametrize("command", ["audit", "score", "merge", "report"])
def test_a_manifest_with_a_field_of_another_type_is_refused(
    command: str, field: str, value: Any, box: Box, finished: Path, capsys
):
    shutil.copytree(finished, box.out)
    manifest = json.loads((box.out / "manifest.json").read_text())
    (box.out / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    commands = {
        "audit": box.command(),
        "score": ["score", "--store", str(box.out), "--attacks", "sama", "--quiet"],
        "merge": ["merge", str(box.path / "merged"), str(box.out), "--quiet"],
        "report": ["report", str(box.out)],
    }
    before = contents(box.out)
    said = run(capsys, commands[command])
    assert_one_line(said, 2, "manifest.json", f"'{field}'")
    assert contents(box.out) == before


def cut(lines: list[bytes]) -> bytes:
    whole = b"".join(lines)
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda lines: b"",
        lambda lines: b"".join([*lines[:3], b"{broken\n", *lines[4:]]),
        lambda lines: b"".join([*lines, lines[0]]),
        lambda lines: b"".join([*lines[:-1], lines[0]]),
        lambda lines: b"".join([*lines[:-1], lines[-1].replace(b'"tokens": ', b'"tokens": -')]),
        lambda lines: b"".join([*lines[:-1], lines[-1].replace(b'"key": "', b'"key": "x')]),
        lambda lines: b"".join([*lines[:-1], lines[-1].replace(b'_bytes": ', b'_bytes": 1')]),
        lambda lines: b"".join([*lines[:-1], lines[-1].replace(b'"label": 0', b'"label": 1')]),
    ],
)
@pytest.mark.parametrize("command", ["score", "merge"])
def test_a_damaged_index_loses_no_row(
    command: str, damage: Callable[[list[bytes]], bytes], box: Box, finished: Path, capsys
):
    shutil.copytree(finished, box.out)
    index = box.out / "texts.jsonl"
    index.write_bytes(damage(index.read_bytes().splitlines(keepends=True)))
    before = contents(box.out)
    commands = {
        "score": ["score", "--store", str(box.out), "--attacks", "sama", "--quiet"],
        "merge": ["merge", str(box.path / "merged"), str(box.out), "--quiet"],
    }
    assert_one_line(run(capsys, commands[command]), 3, "texts.jsonl")
    assert contents(box.out) == before
    assert run(capsys, box.command()).code == 0  # makes it anew
    assert_complete(box.out, finished)


def test_scores_that_hold_other_texts_than_the_index_are_kept(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    lines = (box.out / "scores.jsonl").read_text().splitlines(keepends=True)
    (box.out / "scores.jsonl").write_text("".join(lines[:7]))
    command = ["score", "--store", str(box.out), "--attacks", "sama", "--quiet"]
    assert_one_line(run(capsys, command), 3, "scores.jsonl")
    assert (box.out / "scores.jsonl").read_text() == "".join(lines[:7])


def test_an_output_below_a_file(box: Box, capsys):
    refuse(capsys, box, box.command(out=box.data / "x"), 74, str(box.data / "x"), "cannot write")
    refuse(capsys, box, box.command(out=box.data), 74, str(box.data), "cannot write")
    store = box.data / "store"
    assert_one_line(run(capsys, box.command(store=store)), 74, str(store), "cannot write")


@pytest.mark.parametrize("flag", ["save_plan", "save_losses"])
@pytest.mark.parametrize("victim", ["data", "weights", "folder", "other npz"])
def test_a_replay_file_replaces_nothing_of_the_user(flag: str, victim: str, box: Box, capsys):
    np.savez(box.path / "mine.npz", precious=np.ones(3))
    path = {
        "data": box.data,
        "weights": box.target / "model.safetensors",
        "folder": box.target,
        "other npz": box.path / "mine.npz",
    }[victim]
    before = contents(path) if path.is_dir() else path.read_bytes()
    refuse(capsys, box, box.command(**{flag: path}), 2, str(path), "not replaced")
    assert before == (contents(path) if path.is_dir() else path.read_bytes())


def test_a_replay_file_replaces_one_of_its_kind(box: Box, capsys):
    files = {"save_plan": box.path / "p.npz", "save_losses": box.path / "l.npz"}
    assert run(capsys, box.command(**files)).code == 0
    assert run(capsys, box.command(**files)).code == 0
    swapped = {"save_plan": box.path / "l.npz"}
    assert_one_line(run(capsys, box.command(**swapped)), 2, "l.npz", "not replaced")
    same = {"plan": box.path / "p.npz", "save_plan": box.path / "p.npz"}
    assert_one_line(run(capsys, box.command(**same)), 2, "must name different files")


@pytest.mark.parametrize("command", ["bench", "plan"])
def test_results_as_json_replace_nothing_of_the_user(command: str, box: Box, capsys):
    mine = box.path / "mine.json"
    mine.write_text('{"precious": 1}')
    given = ["--model", str(box.target), "--json", str(mine)]
    given += {"bench": ["--data", str(box.data)], "plan": ["--topology", "cpu:2"]}[command]
    assert_one_line(run(capsys, [command, *given]), 2, "mine.json", "not replaced")
    assert mine.read_text() == '{"precious": 1}'


def test_votes_are_written_whatever_was_scored_before(box: Box, finished: Path, capsys):
    """Also where another attack has no score: `lowercase` has none for a text without capitals."""
    shutil.copytree(finished, box.out)
    new = {"out": box.path / "new", "store": box.out / "losses", "attacks": "lowercase,sama"}
    for command in (box.command(include_votes=True), box.command(**new, include_votes=True)):
        assert run(capsys, command).code == 0
    for out in (box.out, box.path / "new"):
        assert all("votes" in row for row in scores(out) if row["scores"]["sama"] is not None)


@pytest.mark.parametrize("flag", ["save_plan", "save_losses"])
def test_a_replay_file_that_cannot_be_written(flag: str, box: Box, finished: Path, capsys):
    said = run(capsys, box.command(**{flag: box.data / "x.npz"}))
    assert_one_line(said, 74, "x.npz", "cannot write")
    assert run(capsys, box.command()).code == 0
    assert_complete(box.out, finished)


def test_report_of_a_folder_that_is_no_run(box: Box, finished: Path, capsys):
    refuse(capsys, box, ["report", str(box.path / "none")], 2, "none", "not a finished run")
    refuse(capsys, box, ["report", str(box.target)], 2, str(box.target), "not a finished run")
    refuse(capsys, box, ["report", str(box.data)], 2, str(box.data), "not a finished run")
    shutil.copytree(finished, box.out)
    (box.out / "scores.jsonl").unlink()
    refuse(capsys, box, ["report", str(box.out)], 2, "scores.jsonl", "same command")
    (box.out / "scores.jsonl").write_bytes(b"\xff\xfe")
    refuse(capsys, box, ["report", str(box.out)], 2, "scores.jsonl")
    (box.out / "scores.jsonl").unlink()
    (box.out / "scores.jsonl").mkdir()
    refuse(capsys, box, ["report", str(box.out)], 2, "scores.jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="names have at most 255 bytes there")
@pytest.mark.parametrize(("flag", "code"), [("target", 4), ("data", 3), ("plan", 3), ("out", 74)])
def test_a_name_that_is_too_long(flag: str, code: int, box: Box, capsys):
    refuse(capsys, box, box.command(**{flag: box.path / ("x" * 300)}), code, "x" * 300)


# --- a full disk -------------------------------------------------------------------------------


class FullDisk:
    """Lets this many bytes be written by way of `sama_jax.storage.files`, then the disk is full."""

    def __init__(self, room: float, monkeypatch: pytest.MonkeyPatch):
        self.room, self.used = room, 0
        disk = self

        class Watched:
            def __init__(self, *args: Any, **kwargs: Any):
                self._file = open(*args, **kwargs)  # noqa: SIM115

            def write(self, data: bytes) -> int | None:
                part = disk.take(data)
                written = self._file.write(part)
                return written if len(part) == len(data) else disk.full()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def __enter__(self) -> "Watched":
                return self

            def __exit__(self, *_: object) -> None:
                self._file.close()

        monkeypatch.setattr(files, "open", Watched, raising=False)

    def take(self, data: bytes) -> bytes:
        """As much of `data` as there is room for; a disk fills up in the middle of a write."""
        part = data[: int(min(len(data), self.room - self.used))]
        self.used += len(part)
        return part

    def full(self) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_at_any_moment(box: Box, finished: Path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(float("inf"), patch)
        assert run(capsys, box.command(out=box.path / "roomy")).code == 0
        total = disk.used
    assert total > 10_000
    moments = [0, 100, *(total * i // 5 for i in range(1, 5)), total - 1]
    for room in moments:
        out = box.path / f"out-{room}"
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(room, patch)
            said = run(capsys, box.command(out=out))
        line = assert_one_line(said, 74, str(out), "No space left on device", "free some space")
        assert line.endswith("it continues")
        assert not list(out.rglob("*.part"))
        for made in out.glob("*.json"):
            json.loads(made.read_text())
        assert run(capsys, box.command(out=out)).code == 0
        assert_complete(out, finished)


def test_a_disk_that_fills_up_leaves_a_good_result_alone(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    before = contents(box.out)
    for room in (0, 100, 3000):
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(room, patch)
            assert_one_line(run(capsys, box.command()), 74, "No space left on device")
        after = contents(box.out)
        for name in ("scores.jsonl", "metrics.json", "report.md", "losses/losses-00000.bin"):
            assert after[name] == before[name]
        assert after.keys() == before.keys()
    assert run(capsys, box.command()).code == 0
    assert_complete(box.out, finished)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE with EFBIG")
@pytest.mark.parametrize(("limit", "named"), [(500, "manifest.json"), (10500, "losses-00000.bin")])
def test_a_limit_on_file_sizes(limit: int, named: str, box: Box, finished: Path, capsys):
    """What the operating system itself refuses, at the start and in the store."""
    said = run_process(box.command(), limit)
    assert_one_line(said, 74, named, "File too large", "cannot write")
    assert not list(box.out.rglob("*.part"))
    assert run(capsys, box.command()).code == 0
    assert contents(box.out).keys() == contents(finished).keys()
    for row, other in zip(scores(box.out), scores(finished), strict=True):
        assert row["id"] == other["id"]
        # One device there, eight here: equal up to rounding.
        assert row["scores"]["loss"] == pytest.approx(other["scores"]["loss"], abs=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE with EFBIG")
def test_a_limit_on_file_sizes_that_only_figures_exceed(box: Box, finished: Path, capsys):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        said = run(capsys, box.command())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line(said, 74, "figures", "File too large", "cannot write")
    assert not list(box.out.rglob("*.part"))
    assert scores(box.out) == scores(finished)
    assert run(capsys, box.command()).code == 0
    assert_complete(box.out, finished)
