"""What was stored is read again, whatever was cut off behind it."""

import shutil
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from properties import FEW

from sama_jax.arrays import ProbePlan
from sama_jax.storage import replay
from sama_jax.storage.files import AppendOnly, read_json_lines
from sama_jax.storage.loss_store import LossStore, Record, make_record

LENGTH = 6
Key = tuple[str, str, str]


@st.composite
def batches(draw) -> list[tuple[str, str, list[str], list[Record]]]:
    """Batches of one to three texts under plans of one or two passes, and empty passes in them."""
    found, number = [], 0
    for _ in range(draw(st.integers(1, 4))):
        passes = draw(st.integers(1, 2))
        names, records = [], []
        for _ in range(draw(st.integers(1, 3))):
            used = draw(arrays(bool, (passes, LENGTH)))
            values = draw(arrays(np.float32, (passes, LENGTH), elements=st.floats(0, 20, width=32)))
            places = np.where(used, np.arange(LENGTH), -1)
            records.append(make_record(places, values))
            names.append(f"{number:016x}")
            number += 1
        found.append((draw(st.sampled_from("mn")), draw(st.sampled_from("pq")), names, records))
    return found


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def fill(folder: Path, given) -> list[tuple[int, dict[Key, Record]]]:
    """Appends all batches; returns the size after each, and what is stored by then."""
    store, states, known = LossStore(folder), [], {}
    for model, plan, names, records in given:
        store.append(model, plan, names, records)
        known = known | {(model, plan, n): r for n, r in zip(names, records)}
        states.append(((folder / "losses-00000.bin").stat().st_size, known))
    store.close()
    return states


def assert_holds(store: LossStore, known: dict[Key, Record]) -> None:
    assert set(store.keys()) == set(known)
    for key, record in known.items():
        for found, wanted in zip(store.read(*key), record):
            np.testing.assert_array_equal(found, wanted)


@FEW
@given(given=batches(), share=st.floats(0, 1))
def test_a_store_that_is_cut_anywhere_keeps_the_frames_before(tmp_path: Path, given, share):
    folder = fresh(tmp_path / "store")
    states = fill(folder, given)
    shard = folder / "losses-00000.bin"
    at = int(share * states[-1][0])
    shard.write_bytes(shard.read_bytes()[:at])
    known = {}
    for size, by_then in states:
        if size <= at:
            known = by_then
    store = LossStore(folder)
    assert_holds(store, known)
    for model, plan, names, records in given:  # and what was lost is stored again
        store.append(model, plan, names, records)
    assert_holds(store, states[-1][1])
    store.close()
    again = LossStore(folder)
    assert_holds(again, states[-1][1])
    again.close()


@FEW
@given(rows=st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=4))),
       share=st.floats(0, 1))  # fmt: skip
def test_lines_that_are_cut_anywhere_are_a_beginning(tmp_path: Path, rows, share):
    path = tmp_path / "lines.jsonl"
    path.unlink(missing_ok=True)
    file = AppendOnly(path)
    file.append_json(*rows)
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    values, end = read_json_lines(path)
    assert values == rows[: len(values)]
    assert whole[:end].count(b"\n") == len(values)
    again = AppendOnly(path, end)
    again.append_json(*rows[len(values) :])
    again.close()
    assert path.read_bytes() == whole


@st.composite
def plans(draw) -> tuple[list[str], np.ndarray, ProbePlan]:
    count, steps = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, LENGTH), min_size=count, max_size=count))
    valid = np.arange(LENGTH) < np.array(lengths)[:, None]
    tokens = np.where(valid, draw(arrays(np.int32, valid.shape, elements=st.integers(0, 99))), -1)
    masks = draw(arrays(bool, (count, steps, LENGTH))) & valid[:, None]
    masks[..., 0] = True
    scored = draw(arrays(bool, masks.shape)) & masks
    scored[..., 0] = True
    subsets = np.full((count, steps, 2, 2), -1, np.int32)
    subsets[..., 0] = 0
    weights = draw(arrays(np.float32, (count, steps), elements=st.floats(0.125, 4, width=32)))
    ids = draw(st.lists(st.text("abé😀", min_size=1), min_size=count, max_size=count, unique=True))
    return ids, tokens, ProbePlan(masks, scored, weights, subsets)


@FEW
@given(given=plans(), order=st.randoms(use_true_random=False))
def test_a_plan_and_its_losses_are_read_as_they_were_written(tmp_path: Path, given, order):
    ids, tokens, plan = given
    replay.save_plan(tmp_path / "plan.npz", ids, tokens, plan, "default")
    loaded = replay.load_plan(tmp_path / "plan.npz", LENGTH)
    assert loaded.ids == ids
    np.testing.assert_array_equal(loaded.tokens, tokens)
    for found, wanted in zip(loaded.plan, plan):
        np.testing.assert_array_equal(found, wanted)
    again = replay.load_plan(tmp_path / "plan.npz", LENGTH)
    assert again.identity == loaded.identity

    rows = order.sample(range(len(ids)), len(ids))
    values = np.arange(2 * plan.masks.size, dtype=np.float32).reshape(2, *plan.masks.shape)
    names = [ids[row] for row in rows]
    replay.save_losses(tmp_path / "losses.npz", names, *values[:, rows])
    losses = replay.load_losses(tmp_path / "losses.npz", loaded)
    np.testing.assert_array_equal(losses.target, values[0])
    np.testing.assert_array_equal(losses.reference, values[1])
    parts = [row[row >= 0] for row in tokens]
    assert replay.match(loaded, names, [parts[row] for row in rows], tmp_path) == rows
