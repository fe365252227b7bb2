"""densities.json: what an audit says of its masks is what its stored losses say."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from wrong_inputs import Box

from sama_jax.cli import entry
from sama_jax.core.spread import QUANTILES


def test_densities_are_those_of_the_saved_plan_and_losses(tmp_path: Path):
    for seed, name in enumerate(("target", "reference")):
        tiny.folder(tmp_path / name, seed=seed)
    data = tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(10, (8, 20)))
    box = Box(tmp_path, tmp_path / "target", tmp_path / "reference", data, tmp_path / "run")
    files = {"save_plan": tmp_path / "p.npz", "save_losses": tmp_path / "l.npz"}
    assert entry.main(box.command(attacks="sama", **files)) == 0
    found = json.loads((box.out / "densities.json").read_text())

    plan, losses = np.load(files["save_plan"]), np.load(files["save_losses"])
    tokens = (plan["tokens"] >= 0).sum(axis=1)
    lines = (box.out / "scores.jsonl").read_text().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    passes = plan["masks"].shape[1]
    shares = [np.mean(plan["masks"][:, t].sum(axis=1) / tokens) for t in range(passes)]
    assert found["densities"] == pytest.approx(shares, rel=1e-6)
    gains = np.zeros((len(labels), passes))
    for text in range(len(labels)):
        for t in range(passes):
            at = np.flatnonzero(plan["scored"][text, t])
            gains[text, t] = np.mean(
                [float(losses["reference"][text, t, i]) - losses["target"][text, t, i] for i in at]
            )
    for name, label in (("members", 1), ("non-members", 0)):
        own = gains[np.array(labels) == label]
        assert found["classes"][name]["texts"] == len(own) > 0
        wanted = np.quantile(own, QUANTILES, axis=0).T
        np.testing.assert_allclose(found["classes"][name]["by_pass"], wanted, rtol=1e-5, atol=1e-6)

    before = (box.out / "densities.json").read_bytes()
    (box.out / "densities.json").unlink()
    assert entry.main(["score", "--store", str(box.out), "--attacks", "sama"]) == 0
    assert (box.out / "densities.json").read_bytes() == before
    assert "Loss differences by density" not in (box.out / "report.md").read_text()
