"""Experiments: their files, and the settings of their runs."""

import json
from pathlib import Path

import pytest
import tiny

from sama_jax.cli import entry
from sama_jax.config import PRESETS, AuditSettings, PrefixSettings
from sama_jax.errors import DataError, UsageError
from sama_jax.programs import experiment, experiment_file

BASE = AuditSettings(max_length=96, seed=0, prefix=PrefixSettings(tokens=96))


def test_a_run_has_the_settings_of_its_models_then_its_own():
    assert experiment_file.run_settings({}, BASE) == BASE
    run = {"preset": "paper", "passes": 8, "seed": 3, "dtype": "float32", "set": ["tail.parts=2"]}
    made = experiment_file.run_settings(run, BASE)
    assert (made.preset, made.passes, made.seed, made.dtype) == ("paper", 8, 3, "float32")
    assert (made.sama.repeats, made.sama.steps, made.tail.parts) == (4, 2, 2)
    assert (made.max_length, made.prefix) == (96, BASE.prefix)
    assert experiment_file.run_settings({"preset": "official"}, BASE).sama == PRESETS["official"]


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
        experiment_file.run_settings(run, BASE)


def test_every_experiment_that_is_shipped_can_be_run():
    found = experiment_file.available()
    assert found
    for name in found:
        for run in experiment_file.read(experiment_file.find(name))["runs"]:
            experiment_file.run_settings(run, BASE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs: [", "not readable as YAML"),
        ("runs: 3", "a list `runs`"),
        ("runs: [{name: a}]", "run 0 needs name and attacks"),
        ("runs: [{name: a, attacks: [sama], sead: 3}]", "did you mean 'seed'"),
        ("run: 3\nruns: []", "did you mean 'runs'"),
        ("models: llada\nruns: [{name: a, attacks: [a]}]", "models are 'llada'"),
        ("compare: [[a, b]]\nruns: [{name: a, attacks: [a]}]", "no run has both"),
    ],
)
def test_wrong_files_are_one_line(text: str, words: str, tmp_path: Path):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        experiment_file.read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


GOOD = {"name": "a", "attacks": ["sama"]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "!!bool x",
        "!!timestamp x",
        "[" * 5000,
        "runs: [3]",
        "runs: {}",
        "a: &a {" + ", ".join(f"k{i}: 1" for i in range(40)) + "}\nruns: [{<<: [*a, *a, *a]}]",
        "x" * 2**19,
        *(
            json.dumps({"runs": [{**GOOD, **change}]})
            for change in [
                *(
                    {"name": n}
                    for n in (3, [], "", ".", "..", "/x", "a/b", "../x", "losses", "a\n")
                ),
                *({"attacks": a} for a in ("sama", [3], [["sama"]], {}, [])),
                *({"set": s} for s in ("a=1", [1], {}, None)),
                *({"models": m} for m in (3, [], {}, {"target": "x"}, {"reference": "x"})),
                {"models": {"target": "x", "reference": 3}},
                {"models": {"target": "x", "reference": "y", "adaptor": "z"}},
                *({"data": d} for d in (3, "x", {"data": 3}, {"date": "x"})),
            ]
        ),
        json.dumps({"runs": [GOOD, GOOD]}),
        *(json.dumps({"runs": [GOOD], "compare": c}) for c in (3, [3], ["sama"], [["sama"]])),
        *(json.dumps({"runs": [GOOD], "summary": s}) for s in (3, ["x"], None)),
    ],
)
def test_values_of_a_wrong_kind_are_one_line(text: str, tmp_path: Path):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        experiment_file.read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["preset", "passes", "max_length", "seed", "dtype", "padding"])
@pytest.mark.parametrize("value", ["x", [], {}, -1, 10**9, None, 1.5])
def test_settings_of_a_wrong_kind_are_found_before_anything_runs(name, value, tmp_path: Path):
    if (name, value) == ("seed", 10**9) or (name, value) == ("passes", None):
        return
    (tmp_path / "e.yaml").write_text(json.dumps({"runs": [{**GOOD, name: value}]}))
    with pytest.raises(UsageError, match=r"run 0 \('a'\): "):
        experiment_file.read(tmp_path / "e.yaml")


OWN = {"target": "t", "reference": "r"}


@pytest.mark.parametrize(
    ("models", "data", "words"),
    [
        ("demo", {"data": "x"}, r"has data \(data\), but its models bring their own texts"),
        ("smol", {"prefixes": "x"}, "bring their own"),
        ({"laboratory": {}}, {"members": "a", "nonmembers": "b"}, "bring their own"),
        (OWN, {}, "data name no file; expected a file `data`"),
        (OWN, {"prefixes": "x"}, "data name no file"),
        (OWN, {"members": "x"}, "data name members; expected"),
        (OWN, {"data": "x", "members": "a", "nonmembers": "b"}, "data name data and members and"),
    ],
)
def test_files_that_would_not_be_read_are_refused(models, data, words: str, tmp_path: Path):
    path = tmp_path / "e.yaml"
    for whole in (
        {"models": models, "data": data, "runs": [GOOD]},
        {"runs": [{**GOOD, "models": models, "data": data}]},
    ):
        path.write_text(json.dumps(whole))
        with pytest.raises(DataError, match=words):
            experiment_file.read(path)


def test_an_adapter_of_an_experiment_is_used(tmp_path: Path, monkeypatch):
    """Each run gets the folders that its models name."""
    tiny.write_texts(tmp_path / "t.jsonl", tiny.texts(2))
    jobs = []

    class Stop(Exception):
        pass

    def run_audit(job):
        jobs.append(job)
        raise Stop

    monkeypatch.setattr(experiment.audit, "run_audit", run_audit)
    for models in ({"reference": "r", "adapter": "d"}, {"reference": "r", "target": "t"}):
        whole = {"models": models, "data": {"data": str(tmp_path / "t.jsonl")}, "runs": [GOOD]}
        (tmp_path / "e.yaml").write_text(json.dumps(whole))
        with pytest.raises(Stop):
            experiment.run_experiment(str(tmp_path / "e.yaml"), tmp_path, quiet=True)
    found = [(str(j.target), str(j.reference), j.adapter and str(j.adapter)) for j in jobs]
    assert found == [("r", "r", "d"), ("t", "r", None)]


def test_fields_of_an_experiment_are_named_beside_its_files(tmp_path: Path, monkeypatch):
    jobs = []
    monkeypatch.setattr(experiment.audit, "run_audit", jobs.append)
    rows = [{"input": "karo", "seen": True}, {"input": "mite", "seen": False}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.jsonl").write_text('{"input": "sun"}\n')
    data = {"data": str(tmp_path / "t.jsonl"), "prefixes": str(tmp_path / "p.jsonl")}
    data |= {"text_field": "input", "label_field": "seen"}
    whole = {"models": {"reference": "r", "target": "t"}, "data": data, "runs": [GOOD]}
    (tmp_path / "e.yaml").write_text(json.dumps(whole))
    with pytest.raises(AssertionError):  # the run gives no result
        experiment.run_experiment(str(tmp_path / "e.yaml"), tmp_path, quiet=True)
    assert [(t.text, t.label) for t in jobs[0].texts.texts] == [("karo", 1), ("mite", 0)]
    assert [t.text for t in jobs[0].prefixes.texts] == ["sun"]
    data["text_field"] = 3
    (tmp_path / "e.yaml").write_text(json.dumps(whole))
    with pytest.raises(DataError, match="expected text_field to be the name of a field"):
        experiment_file.read(tmp_path / "e.yaml")


def test_conversations_of_an_experiment_are_written_by_its_template(tmp_path: Path, monkeypatch):
    jobs = []
    monkeypatch.setattr(experiment.audit, "run_audit", jobs.append)
    (tmp_path / "t.jsonl").write_text('{"prompt": "sun", "response": "mite", "label": 1}\n')
    data: dict[str, object] = {"data": str(tmp_path / "t.jsonl")}
    whole = {"models": {"reference": "r", "target": "t"}, "data": data, "runs": [GOOD]}

    def given(**changes: object) -> Path:
        whole["data"] = data | changes
        (tmp_path / "e.yaml").write_text(json.dumps(whole))
        return tmp_path / "e.yaml"

    path = given(template="chatml", end_tokens=2)
    with pytest.raises(AssertionError):  # the run gives no result
        experiment.run_experiment(str(path), tmp_path, quiet=True)
    (text,) = jobs[0].texts.texts
    assert (text.scored, text.has_prompt, text.text.count("<|endoftext|>")) == ("mite", True, 2)
    for changes, complaint in (
        ({"loss_on": "text"}, "are about conversations: add a template"),
        ({"template": "chatml", "loss_on": "prompt"}, "loss_on is 'prompt'; expected response or"),
        ({"template": "chatml", "end_tokens": -1}, "end_tokens is -1"),
        ({"template": "chatml", "end_tokens": True}, "end_tokens is True"),
        ({"template": "chatm"}, "unknown template 'chatm'"),
    ):
        with pytest.raises(DataError, match=rf"run 0 \(.*\): .*{complaint}"):
            experiment_file.read(given(**changes))


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
