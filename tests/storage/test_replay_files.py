"""Replay files that others made: plans that cannot be, archives that are none."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sama_jax.arrays import ProbePlan
from sama_jax.errors import DataError
from sama_jax.storage import replay

N, T, L, SUBSETS, M = 2, 3, 6, 2, 2


def arrays():
    """A plan of a text of five tokens and one of four; each step masks one token more."""
    masks = np.zeros((N, T, L), bool)
    for step in range(T):
        masks[:, step, : step + 1] = True
    return {
        "ids": np.array(["a", "b"]),
        "tokens": np.array([[5, 6, 7, 8, 9, -1], [5, 6, 7, 8, -1, -1]], np.int32),
        "masks": masks,
        "scored": masks.copy(),
        "subsets": np.zeros((N, T, SUBSETS, M), np.int16) - np.array([0, 1], np.int16),
        "weights": np.ones((N, T), np.float32),
    }


def write(path: Path, found) -> Path:
    np.savez(path, **found)
    return path


def refused(path: Path, read=replay.load_plan) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_plan_made_elsewhere_is_read(tmp_path):
    found = replay.load_plan(write(tmp_path / "p.npz", arrays()))
    assert found.ids == ["a", "b"]
    assert replay.store_suffixes(found) == ["", ""]


def test_rows_of_equal_tokens_are_told_apart_by_their_plans(tmp_path):
    found = arrays()
    found["tokens"][0] = found["tokens"][1]
    same = replay.load_plan(write(tmp_path / "p.npz", found))
    assert replay.store_suffixes(same) == ["", ""]
    found["weights"][0, 0] = 0.5
    a, b = replay.store_suffixes(replay.load_plan(write(tmp_path / "p.npz", found)))
    assert "" not in (a, b)
    assert a != b


@pytest.mark.parametrize(
    ("words", "name", "at", "value"),
    [
        ("scored is not a part of masks", "scored", (1, 0, 3), True),
        ("masks reach beyond its tokens", "masks", (1, 0, 4), True),
        ("subsets hold positions beyond its tokens", "subsets", (1, 0, 0, 0), 4),
        ("subsets hold positions beyond its tokens", "subsets", (1, 0, 0, 0), -5),
        ("no pass up to theirs scores", "subsets", (1, 1, 0, 0), 2),
        ("a subset holds a position twice", "subsets", (1, 2, 0), 1),
        ("a pass with a weight has no subset", "subsets", (1, 1), -1),
        ("weights must be finite", "weights", (1, 2), np.nan),
        ("weights must be finite", "weights", (1, 2), np.inf),
        ("weights must be finite and not negative", "weights", (1, 2), -1),
        ("all its weights are 0", "weights", 1, 0),
        ("padding before the end", "tokens", (1, 0), -1),
        ("text 'a' stands twice", "ids", 1, "a"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(words, name, at, value, tmp_path):
    found = arrays()
    found[name][at] = value
    assert words in refused(write(tmp_path / "p.npz", found))


@pytest.mark.parametrize(
    ("names", "axis"),
    [
        (["ids", "tokens", "masks", "scored", "subsets", "weights"], 0),
        (["masks", "scored", "subsets", "weights"], 1),
        (["subsets"], 2),
        (["subsets"], 3),
        (["tokens", "masks", "scored"], -1),
    ],
)
def test_a_plan_of_nothing_is_refused(names, axis, tmp_path):
    found = arrays()
    for name in names:
        found[name] = found[name].take([], axis=axis)
    assert "at least one text, pass, subset" in refused(write(tmp_path / "p.npz", found))


def npy(shape: str, dtype: str = "|b1", version: bytes = b"\x01\x00", more: str = "") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}{more}}}\n".encode()
    size = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + size + header


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (npy("(2, 3, 1000000000000)"), "expected at most 1,073,741,824"),
        (npy("(1000000000,)", "<U1000000"), "holds <u1000000"),
        (npy("(-5, 3, 6)"), "shape"),
        (npy("(2, 3, 6)", "|O"), "holds object"),
        (npy("(2, 3, 6)", version=b"\x02\x00"), "version (2, 0)"),
        (npy("(2, 3, 6)"), "not a plan file"),
        (npy("(((((((((((" * 9), "not a plan file"),
        (npy("(2, 3, 6)", more=", 'x': 1"), "header"),
        (b"\x93NUMPY", "eof"),
        (b"", "eof"),
        (b"words of any kind", "magic"),
    ],
)
def test_a_member_that_is_no_array_is_refused(member, words, tmp_path):
    path = write(tmp_path / "p.npz", {k: v for k, v in arrays().items() if k != "masks"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("masks.npy", member)
    assert words in refused(path).lower()


def test_a_file_that_expands_is_refused_by_its_headers(tmp_path, monkeypatch):
    path = tmp_path / "p.npz"
    np.savez_compressed(path, **arrays() | {"masks": np.zeros((N, T, 10**6), bool)})
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(replay, "MAX_BYTES", 10**6)
    assert "expected at most 1,000,000" in refused(path)


@pytest.mark.parametrize(("at", "value"), [(6, 1), (8, 77)], ids=["encrypted", "compression"])
def test_a_member_that_cannot_be_unpacked_is_refused(at, value, tmp_path):
    data = bytearray(write(tmp_path / "p.npz", arrays()).read_bytes())
    for sign, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        start = data.find(sign)
        while start >= 0:
            data[start + at + shift] = value
            start = data.find(sign, start + 1)
    (tmp_path / "p.npz").write_bytes(data)
    assert "not a plan file" in refused(tmp_path / "p.npz")


@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.array("a")},
        {"ids": np.array(["a", "a"])},
        {"target": np.zeros((2, 3), np.float32)},
        {"target": np.full((N, T, L), np.nan, np.float32)},
        {"state_at": np.zeros(4, int)},
        {"state_at": np.array([[0, 0, 99]])},
    ],
)
def test_losses_that_cannot_be_are_refused(change, tmp_path):
    plan = replay.load_plan(write(tmp_path / "p.npz", arrays()))
    losses = np.zeros((N, T, L), np.float32)
    good = {"ids": np.array(["a", "b"]), "target": losses, "reference": losses}
    replay.load_losses(write(tmp_path / "good.npz", good), plan)
    path = write(tmp_path / "bad.npz", good | change)
    refused(path, lambda path: replay.load_losses(path, plan))


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "p.npz")
    assert "regular file" in refused(tmp_path / "p.npz")


def test_losses_that_hold_a_text_twice_are_refused(tmp_path):
    plan = ProbePlan(
        masks=np.ones((1, 1, 2), bool),
        scored=np.ones((1, 1, 2), bool),
        weights=np.ones((1, 1), np.float32),
        subsets=np.zeros((1, 1, 1, 1), np.int32),
    )
    made = replay.Replay(["a"], np.zeros((1, 2), np.int32), plan, "plan")
    values = np.zeros((2, 1, 2), np.float32)
    replay.save_losses(tmp_path / "losses.npz", ["a", "a"], values, values)
    with pytest.raises(DataError, match="twice"):
        replay.load_losses(tmp_path / "losses.npz", made)
