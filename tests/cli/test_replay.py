"""Wrong replay files: one clear line, the documented exit code, no remains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wrong_inputs import (
    Box,
    line,
    refuse,
    run,
    scores,
)

from sama_jax.cli import entry


@pytest.fixture(scope="module")
def plan(originals: Path) -> Path:
    box = Box(*(originals / n for n in ("", "target", "reference", "texts.jsonl", "planned")))
    path = originals / "plan.npz"
    assert entry.main(box.command(attacks="sama", save_plan=path)) == 0
    return path


def edit_plan(plan: Path, path: Path, **changes: Any) -> Path:
    with np.load(plan, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name].copy())
    np.savez(path, allow_pickle=False, **arrays)
    return path


def test_a_plan_of_another_max_length(plan: Path, box: Box, capsys):
    command = box.command(plan=plan, max_length=16)
    refuse(capsys, box, command, 2, "plan.npz", "--max-length 32", "16")


def test_a_plan_with_other_tokens(plan: Path, box: Box, capsys):
    def spoil(tokens: np.ndarray) -> np.ndarray:
        tokens[3, 0] += 1
        return tokens

    path = edit_plan(plan, box.path / "p.npz", tokens=spoil)
    refuse(capsys, box, box.command(plan=path), 3, "'t3'", "other tokens", "same tokenizer")


def test_a_plan_of_other_texts(plan: Path, box: Box, capsys):
    path = edit_plan(plan, box.path / "p.npz", ids=lambda ids: np.char.replace(ids, "t7", "u7"))
    refuse(capsys, box, box.command(plan=path), 3, "'t7'", "not in the plan")


@pytest.mark.parametrize("attacks", ["loss"])
def test_a_plan_without_sama(plan: Path, box: Box, capsys, attacks: str):
    refuse(capsys, box, box.command(plan=plan, attacks=attacks), 2, "--plan", "sama")


PLANS: dict[str, tuple[Callable[[Path, Box], Path], list[str]]] = {
    "missing": (lambda p, b: b.path / "none.npz", ["none.npz", "No such file"]),
    "a folder": (lambda p, b: b.target, ["not a plan file"]),
    "texts": (lambda p, b: b.data, ["texts.jsonl", "not a plan file"]),
    "truncated": (lambda p, b: b.lines(p.read_bytes()[:-50], name="p.npz"), ["not a plan file"]),
    "damaged": (
        lambda p, b: b.lines(
            p.read_bytes()[:900] + b"\xff" * 50 + p.read_bytes()[950:], name="p.npz"
        ),
        ["not a plan file"],
    ),
    "empty": (lambda p, b: b.lines(name="p.npz"), ["not a plan file"]),
    "an array": (
        lambda p, b: np.save(b.path / "p.npy", np.zeros(3)) or b.path / "p.npy",
        ["plan file"],
    ),
    "without masks": (lambda p, b: edit_plan(p, b.path / "p.npz", masks=None), ["masks"]),
    "other shapes": (
        lambda p, b: edit_plan(p, b.path / "p.npz", masks=lambda a: a[:, :1]),
        ["do not fit together", "scored"],
    ),
    "positions beyond the end": (
        lambda p, b: edit_plan(p, b.path / "p.npz", subsets=lambda a: np.full_like(a, 32)),
        ["positions beyond its tokens"],
    ),
    "words for tokens": (
        lambda p, b: edit_plan(p, b.path / "p.npz", tokens=lambda a: a.astype("U4")),
        ["tokens"],
    ),
    "bytes for ids": (
        lambda p, b: edit_plan(p, b.path / "p.npz", ids=lambda a: a.astype("S9")),
        ["ids"],
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plan_files(case: str, plan: Path, box: Box, capsys):
    make, fragments = PLANS[case]
    refuse(capsys, box, box.command(plan=make(plan, box)), 3, *fragments)


def test_equal_texts_may_have_plans_of_their_own(box: Box, capsys):
    """Beside a twin with other masks, a text scores as it does alone."""
    texts = {"a": "karo mite sunka dalfer", "b": "vilo gra", "c": "karo mite sunka dalfer"}
    data = box.lines(*(line(text, id=name) for name, text in texts.items()), name="twins.jsonl")

    def score(out: str, path: Path, **more: Any) -> dict[str, dict[str, float]]:
        changes = {"data": path, "out": box.path / out, "attacks": "sama,loss", **more}
        assert run(capsys, box.command(**changes)).code == 0
        return {row["id"]: row["scores"] for row in scores(box.path / out)}

    score("first", data, save_plan=box.path / "p.npz")
    size = int((np.load(box.path / "p.npz")["tokens"][2] >= 0).sum())

    def moved(masks: np.ndarray) -> np.ndarray:
        masks[2, :, :size] = np.roll(masks[2, :, :size], 1, axis=-1)
        return masks

    def moved_too(subsets: np.ndarray) -> np.ndarray:
        subsets[2] = np.where(subsets[2] >= 0, (subsets[2] + 1) % size, -1)
        return subsets

    changes = {"masks": moved, "scored": moved, "subsets": moved_too}
    path = edit_plan(box.path / "p.npz", box.path / "q.npz", **changes)
    saved = box.path / "m.npz"
    together = score("together", data, plan=path, save_losses=saved)
    alone = score("alone", box.lines(line(texts["c"], id="c"), name="c.jsonl"), plan=path)
    assert together["c"] == alone["c"]
    assert together["a"]["loss"] == together["c"]["loss"]
    losses = np.load(saved)["target"]
    np.testing.assert_array_equal(np.isfinite(losses), np.load(path)["scored"])
