"""The attack suite as a whole: one store, one recipe, invariants that hold for every attack."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from scored import ORACLES, oracle, score_reading

from sama_jax import attacks
from sama_jax.arrays import ProbePlan, Reading
from sama_jax.attacks.registry import ENTRY_POINTS
from sama_jax.cli import entry
from sama_jax.config import (
    AuditSettings,
    PrefixSettings,
    SamaSettings,
)
from sama_jax.core import losses
from sama_jax.engine.text_table import table_from_description
from sama_jax.errors import ValidityError
from sama_jax.programs.audit import AuditJob, AuditResult, run_audit
from sama_jax.programs.catalogue import describe
from sama_jax.programs.rescore import run_score
from sama_jax.storage.run_folder import read_rows
from sama_jax.storage.text_index import INDEX, read_index
from sama_jax.texts.read import collect, read_texts

ROOT = Path(__file__).parents[2]
SETTINGS = AuditSettings(
    max_length=32,
    passes=4,
    sama=SamaSettings(steps=4, subsets=8),
    prefix=PrefixSettings(shots=3, tokens=16),
)

ONE, TWO = 8, 12
"""Texts of so many tokens."""


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    tiny.folder(folder / "target", seed=1)
    tiny.folder(folder / "reference", seed=2)
    found = tiny.texts(26, (4, 14))
    found = [text.capitalize() if i % 3 else text for i, text in enumerate(found)]
    found[ONE], found[TWO] = "x", "x!"  # as many tokens
    tiny.write_texts(folder / "texts.jsonl", [*found, ""])
    return folder


def audit(box: Path, out: Path, *names: str, **changes: Any) -> AuditResult:
    given: dict[str, Any] = {
        "target": box / "target",
        "reference": box / "reference",
        "texts": read_texts(box / "texts.jsonl"),
        "out": out,
        "attacks": names,
        "settings": SETTINGS,
        "quiet": True,
    }
    result = run_audit(AuditJob(**(given | changes)))
    assert result is not None
    return result


@pytest.fixture(scope="module")
def everything(box: Path) -> AuditResult:
    return audit(box, box / "all", "all")


def column(rows: list[dict], name: str) -> list[float]:
    return [r["scores"][name] for r in rows if r["scores"].get(name) is not None]


def test_every_attack_that_can_be_computed_is_and_none_is_constant(everything: AuditResult):
    manifest = json.loads((everything.out / "manifest.json").read_text())
    left_out = manifest["not_computed"]
    assert left_out.pop("prompt") == "it is defined for prompts and responses (--template)"
    assert all("models, this one is diffusion" in reason for reason in left_out.values())
    names = [n for n in attacks.names() if attacks.select([n])[0].in_all]
    assert set(everything.rows[0]["scores"]) == set(names) - set(left_out) - {"prompt"}
    for name in everything.rows[0]["scores"]:
        values = column(everything.rows, name)
        assert np.isfinite(values).all()
        assert len(set(values)) > 2, f"{name} is constant: {values}"


def test_an_empty_text_and_prefix_texts_have_no_score_but_a_status(everything: AuditResult):
    assert everything.rows[-1]["status"] == "empty"
    taken = [r for r in everything.rows if r["status"] == "prefix"]
    assert sum(r["label"] for r in taken) == 3
    assert len(taken) == 6
    for row in [everything.rows[-1], *taken]:
        assert set(row["scores"].values()) == {None}
    for row in everything.rows:
        nulls = {n for n, s in row["scores"].items() if s is None}
        if row["status"] == "ok":
            assert set(row.get("undefined", {})) == nulls
    evaluated = everything.metrics["attacks"]["sama"]
    assert evaluated["n_members"] + evaluated["n_nonmembers"] == len(everything.rows) - 7


def test_one_token_is_read_by_all_that_need_no_second(everything: AuditResult):
    """docs/attacks.md, "Where there is no score"."""
    one, two = everything.rows[ONE], everything.rows[TWO]
    assert (one["status"], one["n_tokens"]) == ("ok", 1)
    assert (two["status"], two["n_tokens"]) == ("ok", 2)
    assert {n for n, s in two["scores"].items() if s is None} == {"lowercase"}
    assert {n for n, s in one["scores"].items() if s is None} == {
        "lowercase", "pia", "pia:l1", "pia:loss", "ratio:circulated", "complement:t",
        "infill:prefix",
    }  # fmt: skip


def test_scores_from_the_store_are_those_of_a_full_run_and_cost_no_pass(
    box: Path, everything: AuditResult, tmp_path: Path, monkeypatch
):
    stored = audit(box, tmp_path / "run", "sama", "loss", "ratio")
    size = (tmp_path / "run" / "losses" / "losses-00000.bin").stat().st_size

    def never(*_, **__):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(losses, "loss_batch", never)
    result = run_score(tmp_path / "run", ["zlib", "ladder:signs"], quiet=True)
    assert (tmp_path / "run" / "losses" / "losses-00000.bin").stat().st_size == size
    monkeypatch.undo()
    # Adding an attack to a run declares nothing more.
    names = ("sama", "loss", "ratio", "zlib", "ladder:signs")
    full = audit(box, tmp_path / "full", *names, family=("loss", "ratio"))
    for row, other, first in zip(result.rows, full.rows, stored.rows, strict=True):
        assert row == other
        assert first["scores"].items() <= row["scores"].items()
    assert result.metrics == full.metrics


def test_a_score_that_needs_passes_says_so(box: Path, tmp_path: Path, capsys):
    audit(box, tmp_path / "run", "loss")
    code = entry.main(["score", "--store", str(tmp_path / "run"), "--attacks", "sama"])
    said = capsys.readouterr().err
    assert code == 2
    assert "its passes were not made for 26 of 27 texts" in said
    assert "--attacks sama" in said
    assert entry.main(["score", "--store", str(tmp_path / "none")]) == 3


def test_adding_an_attack_computes_only_what_is_missing(box: Path, tmp_path: Path):
    first = audit(box, tmp_path / "run", "loss")
    second = audit(box, tmp_path / "run", "loss", "zlib", "ratio")
    assert first.cost["passes_run"] == 26 * 4
    assert second.cost["passes_run"] == 26 * 4  # the reference's alone
    third = audit(box, tmp_path / "run", "loss", "ratio")
    assert third.cost["passes_run"] == 0
    assert third.rows == second.rows


def budget(passes: int) -> AuditSettings:
    return AuditSettings.of(passes=passes)


def test_shared_passes_are_at_most_sixty_percent(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # nothing is folded
    assert entry.main(["attacks", "--json", "--passes", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passes_after_sharing"] <= 0.6 * found["passes_before_sharing"]
    plain = {e["name"].partition(":")[0] for e in found["attacks"]}
    assert len(plain) >= 18
    names = [e["name"] for e in found["attacks"] if "diffusion" in e["models"]]
    here = describe(names, budget(8))
    assert here["passes_after_sharing"] <= 0.6 * here["passes_before_sharing"]
    # Attacks on one set of passes need it once; two sets are added.
    alone = {"loss": 8, "zlib": 8, "ratio": 16, "mink": 8, "mink++": 8}
    for names, shared in (("loss", "zlib"), 8), (("loss", "ratio"), 16), (("mink", "loss"), 16):
        pair = describe(names, budget(8))
        assert pair["passes_before_sharing"] == sum(alone[n] for n in names)
        assert pair["passes_after_sharing"] == shared
    assert describe(["mink", "mink++"], budget(8))["passes_after_sharing"] == 8
    assert entry.main(["attacks", "--passes", "8"]) == 0
    printed = capsys.readouterr().out
    assert f"{found['passes_after_sharing']} shared" in printed
    for row in found["attacks"]:
        assert all(row[k] in printed for k in ("name", "access", "summary", "source"))
    assert "not part of 'all': its:code, ladder:calibrated" in printed


def test_identical_models_leave_every_calibrated_attack_constant(box: Path, tmp_path: Path):
    """What the target says of a text and the reference says as well speaks for no text."""
    names = ("sama", "ratio", "ratio:circulated", "wbc", "complement", "complement:mean")
    # `mink++` reads more of the target than any of these does of the reference.
    same = tiny.same_weights(box / "target", tmp_path / "same")
    with pytest.raises(ValidityError, match="same_losses"):
        audit(box, tmp_path / "run", *names, "mink++", reference=same)
    rows = read_rows(tmp_path / "run")
    assert len(column(rows, "mink++")) >= 20
    for name in names:
        values = column(rows, name)
        assert len(values) >= 20, name
        # A quotient of equal float32 numbers may be off by one unit in the last place.
        assert max(values) - min(values) < 1e-6, name


def test_no_score_knows_the_label_of_a_scored_text(
    box: Path, everything: AuditResult, tmp_path: Path
):
    """All labels turned round but those of the prefix texts: every score is the same, bit for bit,
    except those of the check that learns labels."""
    texts = read_texts(box / "texts.jsonl").texts
    taken = [r["id"] for r in everything.rows if r["status"] == "prefix"]
    taken.sort(key=lambda i: hashlib.sha256(f"42 {i}".encode()).digest())
    shots = [t for i in taken for t in texts if t.id == i]
    turned = [t if t.id in taken else t._replace(label=1 - (t.label or 0)) for t in texts]
    result = audit(
        box, tmp_path / "run", "all", texts=collect(turned), prefixes=collect(shots),
        store=everything.out / "losses",
    )  # fmt: skip
    assert result.cost["passes_run"] == 0
    for row, before in zip(result.rows, everything.rows, strict=True):
        same, other = ({n: s for n, s in r["scores"].items() if n != "bows"} for r in (row, before))
        assert same == other
        assert row["status"] == before["status"]
    aucs = [r.metrics["attacks"]["loss"]["auc"] for r in (result, everything)]
    assert sum(aucs) == pytest.approx(1.0)


# --- every attack has an oracle -----------------------------------------------------------------


def test_every_attack_has_an_oracle():
    """A new attack needs a test under `scored.oracle`, which sees to it that it is scored there."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"oracles_of_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert set(ORACLES) == set(attacks.names())


def test_an_oracle_must_score_what_it_names(monkeypatch):
    monkeypatch.setitem(ORACLES, "loss", set())
    with pytest.raises(AssertionError, match="never scored"):
        oracle("loss")(lambda: None)()


def test_the_documentation_describes_every_attack():
    text = (ROOT / "docs" / "attacks.md").read_text("utf-8")
    described = text[text.index("## The attacks") : text.index("## Where there is no score")]
    for name in attacks.names():
        assert f"`{name}`" in described, name


# --- the recipe ----------------------------------------------------------------------------------


def recipe() -> tuple[str, str]:
    """Returns the Python file and the entry point that the page shows."""
    text = (ROOT / "docs" / "recipes" / "add_an_attack.md").read_text("utf-8")
    code, toml = (re.search(f"```{kind}\n(.*?)```", text, re.S) for kind in ("python", "toml"))
    assert code
    assert toml
    return code[1], toml[1]


def test_the_recipe_adds_an_attack_in_at_most_25_lines(box: Path, tmp_path: Path):
    """Followed literally by a package of its own, in a process that knows only its entry point."""
    code, toml = recipe()
    assert len(code.strip().splitlines()) <= 25
    site = tmp_path / "site"
    info = site / "meangain-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "meangain.py").write_text(code)
    assert f'entry-points."{ENTRY_POINTS}"' in toml
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{toml.strip().splitlines()[1]}\n"
                                           .replace('"', ""))  # fmt: skip
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: meangain\nVersion: 1.0\n")
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "sama_jax", *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = tmp_path / "run"
    run("audit", "--target", f"{box / 'target'}", "--reference", f"{box / 'reference'}",
        "--data", f"{box / 'texts.jsonl'}", "--out", f"{out}", "--attacks", "sama,meangain",
        *tiny.SETTINGS)  # fmt: skip
    listed = json.loads(run("attacks", "--json"))["attacks"]
    mine = next(e for e in listed if e["name"] == "meangain")
    assert mine["summary"].startswith("Mean of reference minus target loss")
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(set(column(rows, "meangain"))) == 26
    assert "meangain" in (out / "report.md").read_text()
    assert "meangain" in json.loads((out / "metrics.json").read_text())["attacks"]


# --- nll and experiments -------------------------------------------------------------------------


def test_nll_has_the_likelihood_and_its_standard_error(box: Path, tmp_path: Path, capsys):
    out = tmp_path / "nll"
    command = ["nll", "--model", f"{box / 'target'}", "--data", f"{box / 'texts.jsonl'}"]
    flags = ["--out", f"{out}", "--passes", "4", "--max-length", "32"]
    assert entry.main([*command, *flags, "--quiet"]) == 0
    rows = [json.loads(line) for line in (out / "nll.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == [f"t{i}" for i in range(27)]
    assert rows[-1]["status"] == "empty"
    assert rows[-1]["nll"] is None
    scores = audit(box, tmp_path / "run", "loss").rows
    for row, other in zip(rows[:-1], scores[:-1], strict=True):
        assert row["nll"] == pytest.approx(-other["scores"]["loss"], rel=1e-6)
        assert row["nll_total"] == pytest.approx(row["nll"] * row["n_tokens"], rel=1e-6)
        # The only token is masked in every pass: no error.
        assert (row["standard_error"] == 0) == (row["n_tokens"] == 1)
        assert 0 <= row["standard_error"] < row["nll"]


def test_the_standard_error_is_that_of_the_mean_of_the_passes():
    from sama_jax.arrays import ProbePlan, Reading
    from sama_jax.programs.nll import bound_and_error

    draw = np.random.default_rng(1)
    scored = draw.random((6, 9)) < 0.5
    scored[2] = False
    weights = np.where(scored.any(axis=1), draw.random(6), 0.0).astype(np.float32)
    target = np.where(scored, draw.random((6, 9)) * 5, np.nan).astype(np.float32)
    plan = ProbePlan(scored, scored, weights, np.zeros((6, 0, 1), np.int32))  # pyright: ignore
    found = bound_and_error(Reading(target, target, plan, 9, 40, 60), SETTINGS)  # pyright: ignore
    estimates = [w * np.nansum(t) for w, t in zip(weights, target) if w > 0]
    expected = [np.mean(estimates), np.std(estimates, ddof=1) / np.sqrt(len(estimates))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_experiments_are_well_formed_and_run(box: Path, tmp_path: Path, capsys):
    from sama_jax.programs import experiment_file

    listed = experiment_file.available()
    assert {"baseline_check", "ablation_ladder"} <= set(listed)
    for name in listed:
        for run in experiment_file.read(experiment_file.find(name))["runs"]:
            attacks.select(run["attacks"])
    ladder = experiment_file.read(experiment_file.find("ablation_ladder"))
    assert [a for a, _ in ladder["compare"]] == ladder["runs"][0]["attacks"][:-1]
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"models: {{target: {box / 'target'}, reference: {box / 'reference'}}}\n"
        f"data: {{data: {box / 'texts.jsonl'}}}\n"
        "runs:\n- {name: r, passes: 4, max_length: 32, attacks: [loss, sama],"
        " set: ['sama.subsets=8']}\n"
        f"- {{name: part, data: {{data: {box / 'part.jsonl'}}}, passes: 4, max_length: 32,"
        " attacks: [loss], set: ['sama.subsets=8']}\n"
        "compare: [[loss, sama]]\n"
    )
    lines = (box / "texts.jsonl").read_text().splitlines(keepends=True)
    (box / "part.jsonl").write_text("".join(lines[3:9]))
    assert entry.main(["experiment", str(file), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    made = json.loads((tmp_path / "out" / "mine" / "experiment.json").read_text())["runs"]["r"]
    aucs = {n: made["metrics"][n]["auc"] for n in ("loss", "sama")}
    # The second run has texts of its own, and reads the losses of the first.
    part = json.loads((tmp_path / "out" / "mine" / "part" / "manifest.json").read_text())
    assert part["run"]["texts"] == 6
    assert part["cost"]["passes_run"] == 0
    gained = made["compare"][0]["difference"]
    assert gained == pytest.approx(aucs["sama"] - aucs["loss"], abs=1e-9)
    file.write_text("runs:\n- {name: r, attacks: [loss], seeed: 3}\n")
    assert entry.main(["experiment", str(file)]) == 3
    assert "unknown field 'seeed'; did you mean 'seed'" in capsys.readouterr().err
    assert entry.main(["experiment", "ablation_lader"]) == 2
    assert "ablation_ladder" in capsys.readouterr().err


# --- the ladder ----------------------------------------------------------------------------------


@oracle("ladder:calibrated", "ladder:progressive", "ladder:subsets", "ladder:signs")
def test_the_rungs_against_loops():
    draw = np.random.default_rng(3)
    steps, length, subsets, size = 5, 12, 7, 3
    masks = draw.random((steps, length)) < 0.5
    masks[1] = False
    weights = np.where(masks.any(axis=1), 1 / np.arange(1, steps + 1), 0.0).astype(np.float32)
    chosen = np.full((steps, subsets, size), -1, np.int32)
    for t, n in np.ndindex(steps, subsets):
        pool = np.flatnonzero(masks[t])
        k = min(size, len(pool))
        chosen[t, n, :k] = draw.choice(pool, k, replace=False)
    target, reference = (
        np.where(masks, draw.integers(0, 4096, masks.shape) / 1024, np.nan).astype(np.float32)
        for _ in range(2)
    )
    plan = ProbePlan(masks, masks, weights, chosen)
    read = Reading(target, reference, plan, length, 40, 60)
    difference = reference - target
    recorded = [t for t in range(steps) if masks[t].any()]
    means = [np.nanmean(difference[t]) for t in recorded]
    groups = [[difference[t, [i for i in s if i >= 0]].mean() for s in chosen[t]] for t in recorded]
    expected = {
        "ladder:progressive": np.mean(means),
        "ladder:subsets": np.mean([np.mean(g) for g in groups]),
        "ladder:signs": np.mean([np.mean(np.array(g) > 0) for g in groups]),
        "ladder:calibrated": sum(w * np.nansum(d) for w, d in zip(weights, difference))
        / len(recorded),
    }
    for rung, value in expected.items():
        np.testing.assert_allclose(score_reading(rung, read, SETTINGS), value, rtol=2e-6)


def test_the_index_gives_back_the_views(everything: AuditResult):
    manifest = json.loads((everything.out / "manifest.json").read_text())
    rows, views = read_index(everything.out / INDEX, manifest["run"])
    assert [r["id"] for r in rows] == [r["id"] for r in everything.rows]
    assert all(len(found) == len(rows) for found in views.values())
    at = next(i for i, row in enumerate(rows) if row["status"] == "ok")
    text = table_from_description(views["text"], "here").row(at)
    assert text is not None
    assert len(text.maskable) == everything.rows[at]["n_tokens"]
    assert text.store_key.startswith(f"{int(text.key.high):08x}")
