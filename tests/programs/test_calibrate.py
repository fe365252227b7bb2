"""Calibration files, and the verdicts by them: what they hold, refuse and say."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import trained
from wrong_inputs import Box

from sama_jax.cli import entry
from sama_jax.core import conformal
from sama_jax.errors import DataError, UsageError, ValidityError
from sama_jax.programs import calibrate
from sama_jax.programs.apply import ASSUMPTION, DECISIONS, SUMMARY, run_apply
from sama_jax.programs.calibrate import run_calibrate
from sama_jax.storage.calibration_file import read_calibration, write_calibration
from sama_jax.storage.run_folder import read_rows
from sama_jax.storage.text_index import INDEX, read_index, write_index
from sama_jax.validity.drift import same_lengths
from sama_jax.validity.gate import gate

FLAGS = {"max_length": 24, "no_figures": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of 160 texts as two: `known` of the first 80, `new` of the others.

    The models have learnt something, since a void audit calibrates nothing.
    """
    base = tmp_path_factory.mktemp("calibrate")
    trained.audited(base)
    lengths = np.random.default_rng(0).integers(8, 21, 160)
    texts = [trained.words(ids[:n]) for ids, n in zip(trained.tokens(160, seed=5), lengths)]
    data = tiny.write_texts(base / "texts.jsonl", texts)
    box = Box(base, base / "target", base / "reference", data, base / "whole")
    assert entry.main(box.command(**FLAGS, attacks="sama,ratio")) == 0
    for name, of in (("known", slice(0, 80)), ("new", slice(80, 160))):
        shutil.copytree(base / "whole", base / name)
        lines = (base / "whole" / "scores.jsonl").read_text().splitlines(keepends=True)
        (base / name / "scores.jsonl").write_text("".join(lines[of]))
        rows, views = read_index(base / name / INDEX, identity(base / name))
        change_manifest(base / name, lambda m: m["run"].update(texts=80))
        change_manifest(base / name, lambda m: m.pop("files"))
        views = {view: found[of] for view, found in views.items()}
        write_index(base / name / INDEX, identity(base / name), rows[of], views)
    return base


def identity(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())["run"]


@pytest.fixture
def runs(place: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Copies of both runs, and where the calibration goes."""
    for name in ("known", "new"):
        shutil.copytree(place / name, tmp_path / name)
    return tmp_path / "known", tmp_path / "new", tmp_path / "calibration.json"


def test_the_command_writes_a_file_that_the_other_one_uses(runs, capsys):
    known, new, file = runs
    assert entry.main(["calibrate", str(known), "--out", str(file), "--fpr", "0.1"]) == 0
    said = capsys.readouterr().out
    content = read_calibration(file)
    scores = [r["scores"]["sama"] for r in read_rows(known) if r["label"] == 0]
    scores = np.array([s for s in scores if s is not None])
    assert content["scores"] == sorted(scores.tolist())
    assert content["rank"] == conformal.rank_of(len(scores), 0.1)
    assert f"{len(scores)} held-out non-members" in said

    assert entry.main(["apply", str(new), "--calibration", str(file), "--collection"]) == 0
    said = capsys.readouterr().out
    lines = [json.loads(x) for x in (new / "decisions.jsonl").read_text().splitlines()]
    rows = read_rows(new)
    assert [x["id"] for x in lines] == [r["id"] for r in rows]
    for line, row in zip(lines, rows):
        p = (1 + (scores >= row["scores"]["sama"]).sum()) / (len(scores) + 1)
        assert line == {
            "id": row["id"],
            "score": row["scores"]["sama"],
            "p": pytest.approx(p),
            "flagged": bool(p <= content["rank"] / (len(scores) + 1)),
        }
    summary = json.loads((new / "decisions.json").read_text())
    assert summary["flagged"] == sum(x["flagged"] for x in lines)
    assert summary["collection"]["texts"] == len(rows)
    assert 0 < summary["collection"]["p"] <= 1
    assert summary["calibration"] == json.loads(file.read_text())["sha256"]
    assert ASSUMPTION in said
    assert "is not the probability" in said
    assert "in 80 % of cases" in said


def test_scores_that_were_changed_by_hand_calibrate_nothing(place: Path, tmp_path: Path):
    shutil.copytree(place / "whole", tmp_path / "run")
    change_rows(tmp_path / "run", lambda _, row: row["scores"].update(sama=0.5))
    with pytest.raises(UsageError, match="was changed after the run had finished"):
        run_calibrate(tmp_path / "run", tmp_path / "calibration.json", fpr=0.1)


@pytest.mark.parametrize("void", ["known", "new"])
def test_a_void_run_calibrates_and_judges_nothing(void: str, runs):
    known, new, file = runs
    if void == "new":
        run_calibrate(known, file, fpr=0.1)
    failed = gate("same_losses", "void", "They are one model.", "Look for the right one.")
    change_manifest(runs[0] if void == "known" else new, lambda m: m.update(gates=[failed]))
    with pytest.raises(ValidityError, match="is void: same_losses: They are one model"):
        run_calibrate(known, file, fpr=0.1) if void == "known" else run_apply(new, file)
    assert file.exists() == (void == "new")
    assert not (new / "decisions.jsonl").exists()


def test_decisions_about_a_run_that_becomes_void_are_withdrawn(place: Path, tmp_path: Path):
    box = Box(place, place / "target", place / "reference", place / "texts.jsonl", tmp_path / "run")
    shutil.copytree(place / "whole", box.out)
    decide(box.out)
    again = box.command(**FLAGS, attacks="sama,ratio")
    assert entry.main(again) == 0
    assert (box.out / DECISIONS).is_file()
    assert (box.out / SUMMARY).is_file()
    failed = gate("same_losses", "void", "They are one model.", "Look for the right one.")
    change_manifest(box.out, lambda m: m.update(gates=[failed]))
    assert entry.main(again) == ValidityError.exit_code
    assert not (box.out / DECISIONS).exists()
    assert not (box.out / SUMMARY).exists()


def decide(run: Path) -> list[dict[str, Any]]:
    """Writes what `apply` would write, by scores that were not calibrated."""
    lines = [{"id": row["id"], "score": row["scores"]["sama"]} for row in read_rows(run)]
    (run / DECISIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / SUMMARY).write_text('{"attack": "sama"}')
    return lines


@pytest.mark.parametrize("spoilt", ["score", "line", "summary"])
def test_decisions_about_other_scores_than_the_run_has_are_withdrawn(spoilt, place, tmp_path):
    run = Path(shutil.copytree(place / "whole", tmp_path / "run"))
    lines = decide(run)
    score = ["score", "--store", str(run), "--attacks", "ratio"]
    assert entry.main(score) == 0
    assert (run / DECISIONS).is_file()
    lines[3]["score"] = None
    content = "".join(json.dumps(line) + "\n" for line in lines)
    if spoilt != "summary":
        (run / DECISIONS).write_text(content if spoilt == "score" else content[:-3])
    else:
        (run / SUMMARY).write_text("[]")
    assert entry.main(score) == 0
    assert not (run / DECISIONS).exists()
    assert not (run / SUMMARY).exists()


def test_known_members_are_not_judged(runs):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)
    whole = run_apply(new, file, fdr=0.5, collection=True).summary
    lines = (new / DECISIONS).read_text().splitlines()

    def mark(place: int, row: dict[str, Any]) -> None:
        if place % 4 == 0:
            row.pop("label")
            row.update(control=True)

    change_rows(new, mark)
    found = run_apply(new, file, fdr=0.5, collection=True)
    assert found.summary["texts"] == found.summary["collection"]["texts"] == 60
    assert found.summary["collection"]["p"] != whole["collection"]["p"]
    ids = [json.loads(line)["id"] for line in (new / DECISIONS).read_text().splitlines()]
    assert ids == [json.loads(line)["id"] for i, line in enumerate(lines) if i % 4]
    assert "of 60 texts flagged" in found.sentences[0]


@pytest.mark.parametrize("tokens", [2, 400])
def test_a_text_of_a_length_that_no_other_one_calibrated_gets_no_verdict(tokens, runs):
    known, new, file = runs
    content, _ = run_calibrate(known, file, fpr=0.1)
    run_apply(new, file)
    before = [json.loads(x) for x in (new / DECISIONS).read_text().splitlines()]
    change_rows(new, lambda i, row: row.update(n_tokens=tokens if i < 3 else row["n_tokens"]))
    found = run_apply(new, file, collection=True)
    after = [json.loads(x) for x in (new / DECISIONS).read_text().splitlines()]
    lacking = {"p": None, "flagged": None, "reason": "length"}
    assert after == [one | lacking if i < 3 else one for i, one in enumerate(before)]
    assert found.summary["texts"] == found.summary["collection"]["texts"] == 77
    assert found.summary["of_other_lengths"] == 3
    low, high = content["lengths"][0], content["lengths"][-1]
    assert (
        f"3 texts have no verdict: of fewer or more tokens than any text that calibrated ({low} "
        f"to {high})" in found.sentences[1]
    )


def test_a_single_text_of_another_length_is_refused(runs, capsys):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)

    def alone(place: int, row: dict[str, Any]) -> None:
        del row["label"]
        row["n_tokens"] = 2
        row["scores"] = row["scores"] if place == 3 else {"sama": None, "ratio": None}

    change_rows(new, alone)
    assert entry.main(["apply", str(new), "--calibration", str(file)]) == 5
    assert "1 text has no verdict" in capsys.readouterr().err
    assert not (new / DECISIONS).exists()


def test_a_run_that_asked_no_gates_calibrates_nothing(runs):
    known, _, file = runs
    change_manifest(known, lambda m: m.pop("gates"))
    with pytest.raises(ValidityError, match="does not say whether its models, texts and losses"):
        run_calibrate(known, file, fpr=0.1)


def test_false_discoveries_and_broken_ties(runs):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)
    found = run_apply(new, file, fdr=0.5, smoothed=True)
    again = run_apply(new, file, fdr=0.5, smoothed=True)
    assert found == again
    lines = [json.loads(x) for x in (new / "decisions.jsonl").read_text().splitlines()]
    p = np.array([x["p"] for x in lines])
    assert [x["flagged"] for x in lines] == (conformal.adjusted(p) <= 0.5).tolist()
    assert (found.summary["fdr"], found.summary["fpr"]) == (0.5, None)


def test_a_text_without_a_score_gets_no_verdict(runs):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)
    change_rows(
        new, lambda i, row: row["scores"].update(sama=row["scores"]["sama"] if i - 3 else None)
    )
    assert run_apply(new, file).summary["texts"] == 79
    lines = [json.loads(x) for x in (new / "decisions.jsonl").read_text().splitlines()]
    nothing = {"score": None, "p": None, "flagged": None, "reason": "no score"}
    assert lines[3] == {"id": lines[3]["id"], **nothing}


def change_rows(run: Path, change) -> None:
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    for place, row in enumerate(rows):
        change(place, row)
    (run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_manifest(run: Path, change) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "field",
    ["version", "tokenizer", "target.weights", "reference.weights", "backend", "max_length", "seed",
     "sama.subset_size", "dtype", "form", "code of sama"],
)  # fmt: skip
def test_a_run_that_was_made_otherwise_is_refused_by_what_differs(runs, field, capsys):
    known, new, file = runs
    content, _ = run_calibrate(known, file, fpr=0.1)
    assert field in content["identity"]
    write_calibration(file, content | {"identity": content["identity"] | {field: "another"}})
    assert entry.main(["apply", str(new), "--calibration", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{field} was 'another', is" in said
    assert not (new / "decisions.jsonl").exists()


def test_a_run_that_does_not_say_by_which_code_it_scored_calibrates_nothing(runs):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)
    for run in (known, new):
        change_manifest(run, lambda m: m.pop("codes"))
    with pytest.raises(UsageError, match="by which code its scores of sama were made"):
        run_calibrate(known, file, fpr=0.1)
    with pytest.raises(UsageError, match="by which code its scores of sama were made"):
        run_apply(new, file)


def test_windows_are_refused_as_what_they_are(runs):
    known, _, file = runs
    change_manifest(known, lambda m: m["run"].update(windows={"stride": None}))
    with pytest.raises(UsageError, match="was made with --windows"):
        run_calibrate(known, file, fpr=0.1)


def test_another_kind_of_device_is_refused_and_another_number_of_them_is_not(runs):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)
    change_manifest(new, lambda m: m.update(device="4" + m["device"][1:]))
    run_apply(new, file)
    change_manifest(new, lambda m: m.update(device="8 x NVIDIA H200 (gpu)"))
    with pytest.raises(UsageError, match=r"device was .*, is 'NVIDIA H200 \(gpu\)'"):
        run_apply(new, file)


def test_a_changed_file_is_refused(runs):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)
    content = json.loads(file.read_text())
    content["scores"][0] += 1e-9
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="was changed after it was written"):
        run_apply(new, file)
    file.write_text("{}")
    with pytest.raises(UsageError, match="is no calibration"):
        run_apply(new, file)
    with pytest.raises(DataError, match="cannot be read"):
        run_apply(new, file.with_name("none.json"))


def test_texts_that_calibrated_are_not_judged(runs):
    known, _, file = runs
    run_calibrate(known, file, fpr=0.1)
    ids = [row["id"] for row in read_rows(known) if row["label"] == 0]
    with pytest.raises(
        DataError, match=f"helped to calibrate and cannot be judged by it .{ids[0]}"
    ):
        run_apply(known, file)


def test_attacks_whose_scores_depend_on_other_texts_are_refused(runs):
    known, _, file = runs
    change_rows(known, lambda _, row: row["scores"].update(dfmia=1.0, recall=1.0))
    with pytest.raises(UsageError, match="'dfmia' reads all texts of a run at once"):
        run_calibrate(known, file, attack="dfmia", fpr=0.1)
    with pytest.raises(UsageError, match="'recall' took its prefixes from the texts of the run"):
        run_calibrate(known, file, attack="recall", fpr=0.1)
    with pytest.raises(UsageError, match="'rato' has no scores in this run; did you mean 'ratio'"):
        run_calibrate(known, file, attack="rato", fpr=0.1)
    assert not file.exists()


def test_too_few_nonmembers_for_the_rate_are_refused(runs):
    known, _, file = runs
    with pytest.raises(DataError, match="expected at least 999: audit more"):
        run_calibrate(known, file, fpr=0.001)
    with pytest.raises(DataError, match=r"with probability 0\.9; expected at least 45"):
        run_calibrate(known, file, fpr=0.05, guarantee=0.9)
    assert conformal.rank_of(45, 0.05, 0.9) == 1
    assert conformal.rank_of(44, 0.05, 0.9) == 0


def test_one_text_of_each_group_calibrates(runs):
    known, new, file = runs
    for run in (known, new):
        change_rows(run, lambda place, row: row.update(group=place // 4))
    content, _ = run_calibrate(known, file, fpr=0.1)
    groups = {row["group"] for row in read_rows(known) if row["label"] == 0}
    assert content["groups"] == len(content["scores"]) == len(groups)
    assert run_apply(new, file, collection=True).summary["collection"]["texts"] == 20


def test_the_best_attack_is_chosen_on_other_texts_than_calibrate_and_measure(runs, monkeypatch):
    known, _, file = runs
    seen = []
    original = calibrate._strongest

    def spy(run, texts):
        seen.extend(key for key, chosen in zip(run.keys, texts) if chosen)
        return original(run, texts)

    monkeypatch.setattr(calibrate, "_strongest", spy)
    content, measured = run_calibrate(known, file, attack="best", fpr=0.2)
    assert content["attack"] in ("sama", "ratio")
    assert measured is not None
    assert not set(seen) & set(content["keys"])
    labels = [row["label"] for row in read_rows(known)]
    assert len(content["keys"]) + measured.nonmembers + len(seen) < len(labels)
    assert measured.nonmembers + len(content["keys"]) < labels.count(0)
    said = calibrate.told(content, measured)
    assert f"of {measured.nonmembers} non-members (" in said[1]


def test_texts_of_other_lengths_are_refused(runs, capsys):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)
    change_rows(new, lambda place, row: row.update(n_tokens=row["n_tokens"] + 12))
    lines = (new / "texts.jsonl").read_text()
    assert entry.main(["apply", str(new), "--calibration", str(file)]) == 5
    assert (
        "The lengths of these texts and of those that calibrated differ" in capsys.readouterr().err
    )
    assert (new / "texts.jsonl").read_text() == lines


def test_a_line_about_a_text_is_of_the_run_itself(place, runs, capsys):
    known, new, file = runs
    run_calibrate(known, file, fpr=0.1)
    lines = (new / INDEX).read_text().splitlines(keepends=True)
    of_another_run = (place / "whole" / INDEX).read_text().splitlines(keepends=True)[80:]
    assert json.loads(lines[3])["id"] == json.loads(of_another_run[3])["id"]
    (new / INDEX).write_text("".join([*lines[:3], of_another_run[3], *lines[4:]]))
    score = ["score", "--store", str(new), "--attacks", "ratio"]
    for command in (["apply", str(new), "--calibration", str(file)], score):
        assert entry.main(command) == 3
        assert f"{INDEX}: line 4 was written by another run; copy it" in capsys.readouterr().err


def test_texts_of_one_source_are_refused_once_in_a_hundred_times():
    rng = np.random.default_rng(0)
    void = [
        same_lengths(*rng.poisson(40, (2, 60)).tolist())["status"] == "void" for _ in range(200)
    ]
    assert np.mean(void) <= 0.04  # 1 % and four standard deviations; ties make it rarer


def test_a_calibration_replaces_nothing_else(runs):
    known, _, file = runs
    file.write_text("mine")
    with pytest.raises(UsageError):
        run_calibrate(known, file, fpr=0.1)
    assert file.read_text() == "mine"
    assert entry.main(["calibrate", str(known / "losses"), "--out", str(file)]) == 2
