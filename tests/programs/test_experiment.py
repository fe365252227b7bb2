"""Experiments: their files, and the settings of their runs."""

from pathlib import Path

import pytest

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
