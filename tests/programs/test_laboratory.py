"""The laboratory: regimes as axes, splits that never mix, models that are made once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from sama_jax.errors import DataError, UsageError, ValidityError
from sama_jax.programs import experiment, experiment_file, laboratory
from sama_jax.programs.laboratory import Regime, grid

WORDS = {name: tiny.texts(160, words=(10, 18), seed=i) for i, name in enumerate("nkc")}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one block, texts of a few words, one step of pre-training."""
    given: dict[Any, str] = {laboratory.NEW: "n", laboratory.KNOWN: "k"}
    monkeypatch.setattr(laboratory, "docstrings", lambda names, _: [*WORDS[given[names]]])
    monkeypatch.setattr(laboratory, "stdlib_documents", lambda max_chars: [*WORDS["c"]])
    monkeypatch.setattr(laboratory, "SIZES", {"0.5M": (1, 16), "1M": (1, 16)})
    monkeypatch.setattr(laboratory, "VOCABULARY", 300)
    monkeypatch.setattr(laboratory, "AUDITED", 24)
    few = dataclasses.replace(laboratory.PRETRAIN, epochs=0.2)
    monkeypatch.setattr(laboratory, "PRETRAIN", few)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_fields_that_are_lists_are_axes():
    found = grid({"epochs": [1, 3], "seed": [0, 1], "domain": "known"})
    assert [(r.epochs, r.seed, r.domain) for r in found] == [
        (1, 0, "known"),
        (1, 1, "known"),
        (3, 0, "known"),
        (3, 1, "known"),
    ]
    assert grid({}) == [Regime()]
    assert len({r.name for r in found}) == 4
    assert len({r.setting for r in found}) == 2


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"members": 5}, "members must lie in"),
        ({"domain": "prose"}, "domain is 'prose'; expected new, known, code"),
        ({"seed": []}, "0 regimes"),
        ({"seed": list(range(999)), "epochs": [1, 2]}, "1998 regimes"),
    ],
)
def test_wrong_axes_are_one_line(axes: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(UsageError, match=words):
        grid(axes)
    file = tmp_path / "e.yaml"
    run = {"name": "a", "attacks": ["loss"]}
    file.write_text(json.dumps({"models": {"laboratory": axes}, "runs": [run]}))
    with pytest.raises(DataError, match=words):
        experiment_file.read(file)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("domain", ["new", "known", "code"])
def test_no_text_is_on_two_sides(domain: str, tmp_path: Path):
    regime = Regime(domain=domain, members=30, epochs=0.5, tokens=32, size="0.5M")
    made = laboratory.prepare(regime, tmp_path, quiet=True)
    members, nonmembers = texts(made.members), texts(made.nonmembers)
    learnt, shots = texts(made.finetune), texts(made.prefixes)
    general = texts(tmp_path / "corpus" / "t32" / "general.jsonl")
    assert (len(members), len(nonmembers), len(learnt)) == (24, 24, 37)
    assert set(members) <= set(learnt)
    assert set(shots[:7]) <= set(learnt) - set(members)
    assert not set(nonmembers) & set(learnt)
    assert not set(shots[7:]) & (set(learnt) | set(nonmembers))
    assert not (set(learnt) | set(nonmembers) | set(shots)) & set(general)
    domains = {"new": "n", "known": "k", "code": "c"}
    assert set(learnt) <= set(WORDS[domains[domain]])
    assert not set(WORDS["n"]) & set(general)


@pytest.mark.usefixtures("small")
def test_bases_serve_all_regimes_and_nothing_is_made_twice(tmp_path: Path):
    regimes = grid({"members": 24, "epochs": 0.5, "tokens": 32, "size": "0.5M", "seed": [0, 1]})
    made = [laboratory.prepare(regime, tmp_path, quiet=True) for regime in regimes]
    assert made[0].base == made[1].base
    assert texts(made[0].members) != texts(made[1].members)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len(before) == 3
    again = [laboratory.prepare(regime, tmp_path, quiet=True) for regime in regimes]
    assert again == made
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before
    utility = laboratory.utility(made[0])
    assert set(utility) == {"base", "target"}
    assert all(0 < value < 20 for value in utility.values())


@pytest.mark.usefixtures("small")
def test_a_domain_may_be_a_file(tmp_path: Path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": t}) + "\n" for t in WORDS["k"][:90]))
    regime = Regime(domain=str(own), members=24, epochs=0.5, tokens=32, size="0.5M")
    assert regime.name.startswith("own-m24-")
    made = laboratory.prepare(regime, tmp_path / "lab", quiet=True)
    assert set(texts(made.members)) <= set(WORDS["k"][:90])
    with pytest.raises(UsageError, match="has 90 texts here, 80 members need 118"):
        laboratory.prepare(dataclasses.replace(regime, members=80), tmp_path / "lab", quiet=True)


@pytest.mark.usefixtures("small")
def test_an_experiment_runs_in_every_regime(tmp_path: Path, capsys):
    axes = {"members": 24, "epochs": 0.5, "tokens": 32, "size": "0.5M", "seed": [0, 1]}
    whole = {
        "models": {"laboratory": axes},
        "runs": [{"name": "few", "passes": 4, "attacks": ["loss", "ratio"]}],
    }
    (tmp_path / "e.yaml").write_text(json.dumps(whole))
    # A base of one step knows nothing, which voids the audits, and all of them were.
    with pytest.raises(ValidityError, match=r"-s0/few, new-m24-e0\.5-"):
        experiment.run_experiment(str(tmp_path / "e.yaml"), tmp_path / "runs")
    assert "(2 of 2)" in capsys.readouterr().err
    out = tmp_path / "runs" / "e"
    written = json.loads((out / "experiment.json").read_text())
    for seed in (0, 1):
        regime = Regime(**{**axes, "seed": seed})
        found = written["runs"][f"{regime.name}/few"]
        assert found["regime"] == {"setting": regime.setting, "seed": seed}
        assert "reference_learnt" in found["void"]
        manifest = json.loads((out / regime.name / "few" / "manifest.json").read_text())
        assert manifest["settings"]["max_length"] == 32
        assert manifest["reference"].endswith("runs/laboratory/bases/0.5M-t32")
    (line,) = written["summary"]
    assert (line["seeds"], line["void"], line["auc"]) == ([], [0, 1], {})


def one(seed: int, auc: float, gain: float) -> dict[str, Any]:
    """A run of a laboratory as experiment.json holds it."""
    interval = [auc - 0.1, auc + 0.1]
    pair = {"from": "loss", "to": "sama", "difference": gain, "ci": [gain - 0.06, gain + 0.06]}
    return {
        "regime": {"setting": "x", "seed": seed},
        "run": "r",
        "utility": {"base": 3.0, "target": 2.0 + seed},
        "metrics": {"sama": {"auc": auc, "auc_ci": interval}, "bows": {"auc": None}},
        "compare": [pair],
    }


def test_seeds_are_joined_and_void_ones_counted():
    void = {**one(2, 0, 0), "void": "same_losses: ..."}
    del void["metrics"], void["compare"]
    runs = {"a": one(0, 0.6, 0.02), "b": one(1, 0.62, 0.04), "c": void, "d": {"metrics": {}}}
    (line,) = experiment.summarise(runs)
    assert (line["setting"], line["run"], line["seeds"], line["void"]) == ("x", "r", [0, 1], [2])
    assert line["utility"] == {"base": 3.0, "target": 3.0}
    assert list(line["auc"]) == ["sama"]
    # Student's width with one degree of freedom is 12.7 standard errors of .01.
    assert line["auc"]["sama"] == pytest.approx(
        {"mean": 0.61, "low": 0.61 - 0.127, "high": 0.61 + 0.127, "count": 2}, abs=1e-3
    )
    gain = line["compare"]["sama - loss"]
    assert (gain["mean"], gain["count"]) == (pytest.approx(0.03), 2)
