"""Experiments: their files, and the settings of their runs."""

import json
from pathlib import Path

import pytest
import tiny

from sama_jax.cli import entry
from sama_jax.config import PRESETS, AuditSettings, PrefixSettings
from sama_jax.errors import DataError, UsageError
from sama_jax.programs import experiment

BASE = AuditSettings(max_length=96, seed=0, prefix=PrefixSettings(tokens=96))


def test_a_run_has_the_settings_of_its_models_then_its_own():
    assert experiment.run_settings({}, BASE) == BASE
    run = {"preset": "paper", "passes": 8, "seed": 3, "dtype": "float32", "set": ["tail.parts=2"]}
    made = experiment.run_settings(run, BASE)
    assert (made.preset, made.passes, made.seed, made.dtype) == ("paper", 8, 3, "float32")
    assert (made.sama.repeats, made.sama.steps, made.tail.parts) == (4, 2, 2)
    assert (made.max_length, made.prefix) == (96, BASE.prefix)
    assert experiment.run_settings({"preset": "official"}, BASE).sama == PRESETS["official"]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"passes": 0}, "--passes must be at least 1"),
        ({"preset": "papr"}, "did you mean 'paper'"),
        ({"set": ["preset=paper"]}, "choose one with --preset"),
    ],
)
def test_wrong_settings_of_a_run(run, words):
    with pytest.raises(UsageError, match=words):
        experiment.run_settings(run, BASE)


def test_every_experiment_that_is_shipped_can_be_run():
    found = experiment.available()
    assert found
    for name in found:
        for run in experiment.read(experiment.find(name))["runs"]:
            experiment.run_settings(run, BASE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs: [", "not readable as YAML"),
        ("runs: 3", "a list `runs`"),
        ("runs: [{name: a}]", "run 0 needs a name and attacks"),
        ("runs: [{name: a, attacks: [sama], sead: 3}]", "did you mean 'seed'"),
        ("run: 3\nruns: []", "did you mean 'runs'"),
        ("models: llada\nruns: []", "models are 'llada'"),
        ("compare: [[a, b]]\nruns: [{name: a, attacks: [a]}]", "no run has both"),
    ],
)
def test_wrong_files_are_one_line(text: str, words: str, tmp_path: Path):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        experiment.read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_experiment_runs_compares_and_continues(tmp_path: Path, monkeypatch, capsys):
    """Two runs on models and texts of one's own, through the command line."""
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "target", seed=0)
    tiny.folder(tmp_path / "reference", seed=1)
    tiny.write_texts(tmp_path / "texts.jsonl", tiny.texts(20, (8, 28)))
    common = "max_length: 32, set: [sama.subsets=8]"
    (tmp_path / "two.yaml").write_text(
        "summary: two runs\n"
        "models: {target: target, reference: reference}\n"
        "data: {data: texts.jsonl}\n"
        "runs:\n"
        f"  - {{name: few, attacks: [sama, ratio], passes: 2, {common}}}\n"
        f"  - {{name: more, attacks: [sama], passes: 4, {common}}}\n"
        "compare: [[ratio, sama]]\n"
    )
    command = ["experiment", "two.yaml", "--out", "runs"]
    assert entry.main(command) == 0
    said = capsys.readouterr()
    assert "AUC gained" in said.out
    assert "run few" in said.err
    found = json.loads((tmp_path / "runs" / "two" / "experiment.json").read_text())
    (compared,) = found["runs"]["few"]["compare"]
    aucs = {name: found["runs"]["few"]["metrics"][name]["auc"] for name in ("sama", "ratio")}
    assert compared["difference"] == pytest.approx(aucs["sama"] - aucs["ratio"])
    assert found["runs"]["more"]["compare"] == []
    manifest = json.loads((tmp_path / "runs" / "two" / "more" / "manifest.json").read_text())
    assert manifest["settings"]["sama"]["steps"] == manifest["settings"]["passes"] == 4
    assert manifest["command"] == "sama-jax experiment two.yaml"
    assert entry.main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    again = json.loads((tmp_path / "runs" / "two" / "experiment.json").read_text())
    assert again == found
