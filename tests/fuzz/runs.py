"""Readers of what the program itself wrote: plans, losses, run folders, experiments."""

import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from fuzz import mutations, seeds
from fuzz.reader import TEXTS, Reader, audit, good, write
from sama_jax.arrays import ProbePlan
from sama_jax.cli import entry
from sama_jax.config import AuditSettings
from sama_jax.programs import experiment_file
from sama_jax.storage import replay
from sama_jax.storage.calibration_file import (
    Calibration,
    read_calibration,
    write_calibration,
)
from sama_jax.storage.loss_store import LossStore, make_record
from sama_jax.weights import orbax


def _replay(root: Path) -> None:
    draw = np.random.default_rng(0)
    n, steps, length = 4, 3, 8
    masks = draw.random((n, steps, length)) < 0.5
    masks[..., 0] = True
    plan = ProbePlan(
        masks=masks,
        scored=masks,
        weights=np.ones((n, steps), np.float32),
        subsets=np.where(draw.random((n, steps, 5, 2)) < 0.7, 0, -1).astype(np.int32),
    )
    ids = [f"t{i}" for i in range(n)]
    folder = root / "one"
    folder.mkdir(parents=True)
    tokens = draw.integers(0, 300, (n, length))
    replay.save_plan(folder / "plan.npz", ids, tokens, plan, "default")
    values = draw.random((2, n, steps, length)).astype(np.float32)
    replay.save_losses(folder / "losses.npz", ids, *values)


def _spoil_replay(draw: random.Random, root: Path) -> None:
    if draw.random() < 0.2:
        (root / "plan.npz").write_bytes(seeds.npz_bomb(3))
    else:
        mutations.spoil(draw, root, ["plan.npz"])


def _read_replay(root: Path) -> None:
    """What a plan scores is masked, inside the text, and weighs something."""
    loaded = replay.load_plan(root / "plan.npz", None)
    plan, length = loaded.plan, loaded.tokens.shape[-1]
    tokens = [row[row >= 0] for row in loaded.tokens]
    replay.match(loaded, loaded.ids, tokens, root / "plan.npz")
    masks, scored = np.asarray(plan.masks), np.asarray(plan.scored)
    assert not (scored & ~masks).any(), "scored where nothing is masked"
    beyond = np.arange(length) >= np.array([len(t) for t in tokens])[:, None]
    assert not (masks & beyond[:, None]).any(), "masked beyond the text"
    assert np.isfinite(plan.weights).all()
    assert (np.asarray(plan.weights) >= 0).all()
    assert ((np.asarray(plan.subsets) >= -1) & (np.asarray(plan.subsets) < length)).all()
    assert len(set(loaded.ids)) == len(loaded.ids), "an id twice"
    losses = replay.load_losses(root / "losses.npz", loaded)
    assert np.isfinite(losses.target[scored]).all()


def _stores(root: Path) -> None:
    (root / "one").mkdir(parents=True)
    store = LossStore(root / "one")
    draw = np.random.default_rng(0)
    for model in ("target", "reference"):
        for batch in range(3):
            records = [
                make_record(np.array([[0, 2, -1], [1, 3, 4]]), draw.random((2, 3)).astype("f4"))
                for _ in range(4)
            ]
            store.append(model, "plan", [f"{batch}{i:015x}" for i in range(4)], records)
    store.close()


def _read_store(root: Path) -> None:
    store = LossStore(root)
    try:
        for key in store.keys():  # noqa: SIM118  it is no dict
            record = store.read(*key)
            assert record.counts.sum() == len(record.positions) == len(record.losses)
            assert (record.counts >= 0).all()
            if len(record.positions):
                record.dense(int(record.positions.max()) + 1)
    finally:
        store.close()


def _run(root: Path) -> None:
    good(root / "made")
    shutil.move(root / "made" / "out", root / "one")
    shutil.rmtree(root / "made")


RUN_FILES = ("*.json", "*.jsonl", "parts/*", "losses/*")


def _score(root: Path, good: Path) -> list[str]:
    del good
    return ["score", "--store", str(root), "--attacks", "sama,loss,ratio", "--quiet"]


def _report(root: Path, good: Path) -> list[str]:
    del good
    return ["report", str(root)]


def _merge(root: Path, good: Path) -> list[str]:
    del good
    return ["merge", str(root / "merged"), str(root), "--quiet"]


def _all_rows(root: Path) -> None:
    """No text is lost or there twice, and every score is a number."""
    out = root / "merged" if (root / "merged").is_dir() else root
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == TEXTS, f"{len(rows)} rows"


def _continue(root: Path, good: Path) -> list[str]:
    """The same audit again, on a finished folder of which something is spoilt."""
    command = audit(root, good, good / "texts.jsonl", "--attacks", "sama,loss,ratio")
    command[command.index("--out") + 1] = str(root)
    return command


def _training(root: Path) -> None:
    tiny.folder(root / "one" / "base")
    tiny.write_texts(root / "one" / "texts.jsonl", tiny.texts(8, (4, 12)), labels=False)
    assert entry.main(_finetune(root / "one", root)) == 0


def _finetune(root: Path, good: Path) -> list[str]:
    del good
    given = ["--base", str(root / "base"), "--data", str(root / "texts.jsonl")]
    short = ["--max-length", "16", "--epochs", "1", "--batch-size", "4"]
    return ["finetune", *given, "--out", str(root / "tuned"), *short, "--quiet"]


_CALIBRATION: Calibration = {
    "attack": "sama",
    "identity": {"seed": 1, "target.weights": "0123"},
    "scores": [0.25, 0.5, 0.75],
    "lengths": [3, 4, 5],
    "keys": ["a", "b", "c"],
    "groups": None,
    "fpr": 0.25,
    "guarantee": None,
    "rank": 1,
    "date": "2026-11-30",
}


def _calibration(root: Path) -> None:
    (root / "one").mkdir(parents=True)
    write_calibration(root / "one" / "calibration.json", _CALIBRATION)


def _read_calibration(root: Path) -> None:
    """What was written, or nothing."""
    found = read_calibration(root / "calibration.json")
    assert {name: found[name] for name in _CALIBRATION} == _CALIBRATION


def _calibrate(root: Path, good: Path) -> list[str]:
    del good
    return ["calibrate", str(root), "--out", str(root / "made.json"), "--fpr", "0.4"]


_STATE = {"params": {"w": np.arange(6, dtype=np.float32)}, "step": np.int32(3)}


def _checkpoints(root: Path) -> None:
    with orbax.Checkpoints(root / "one") as kept:
        for step in (1, 2):
            kept.save(step, jax.tree.map(jnp.asarray, _STATE))


def _restore(root: Path) -> None:
    """The state that was saved, or nothing: a flipped byte of an array cannot be told."""
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), _STATE)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: x.update(sharding=device), wanted)
    with orbax.Checkpoints(root) as kept:
        found = kept.restore(wanted)
    assert found is None or found[0] in (1, 2)


def _experiment(root: Path) -> None:
    write(root / "one" / "own.yaml", seeds.EXPERIMENT.encode())


def _read_experiment(root: Path) -> None:
    plan = experiment_file.read(root / "own.yaml")
    for run in plan["runs"]:
        assert isinstance(run["name"], str)
        assert run["name"] not in ("", ".", ".."), "leaves the folder"
        assert "/" not in run["name"], "leaves the folder"
        experiment_file.run_settings(run, AuditSettings())


READERS = {
    "replay": Reader(_replay, ("*.npz",), _read_replay, extra=_spoil_replay),
    "store": Reader(_stores, ("*.bin",), _read_store),
    "calibration": Reader(_calibration, ("*.json",), _read_calibration),
    "calibrate": Reader(_run, RUN_FILES, command=_calibrate, patience=6),
    "experiment": Reader(_experiment, ("*.yaml",), _read_experiment),
    "score": Reader(_run, RUN_FILES, command=_score, check=_all_rows, patience=6),
    "report": Reader(_run, RUN_FILES, command=_report, patience=6),
    "merge": Reader(_run, RUN_FILES, command=_merge, check=_all_rows, patience=6),
    "continue": Reader(_run, RUN_FILES, command=_continue, check=_all_rows, patience=6),
    "training": Reader(
        _training, ("tuned/train.json", "tuned/log.jsonl"), command=_finetune, patience=6
    ),
    "checkpoint": Reader(_checkpoints, ("**/*",), _restore),
}
