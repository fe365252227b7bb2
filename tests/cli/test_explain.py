"""`explain` shows what the store holds of each token, of the texts that the run read."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from wrong_inputs import Box, assert_one_line, run

from sama_jax.programs.explain import explain
from sama_jax.storage.loss_store import LossStore
from sama_jax.texts.read import read_texts


def texts_of(finished: Path) -> Path:
    return finished.parent / "texts.jsonl"


def by_hand(finished: Path, text: str, length: int) -> np.ndarray:
    """Averages all that the store holds of a text under plans that both models were read with."""
    manifest = json.loads((finished / "manifest.json").read_text())
    target, reference = (manifest["store_keys"][role] for role in ("target", "reference"))
    store = LossStore(finished / "losses", writes=False)
    records = store.keys()
    plans = {
        plan
        for model, plan, key in records
        if key == text and model == target and store.has(reference, plan, text)
    }
    passes = [
        store.read(reference, plan, text).dense(length).astype(float)
        - store.read(target, plan, text).dense(length)
        for plan in plans
    ]
    found = np.concatenate(passes)
    read = np.isfinite(found)
    return np.where(read.any(axis=0), np.where(read, found, 0).sum(axis=0), np.nan) / read.sum(
        axis=0
    ).clip(1)


def test_each_token_has_the_mean_of_its_passes(finished: Path):
    given = read_texts(texts_of(finished)).texts
    found = explain(finished, given, top=len(given))
    lines = [json.loads(x) for x in (finished / "texts.jsonl").read_text().splitlines()]
    keys = {line["id"]: line["views"]["text"]["store_key"] for line in lines}
    words = {text.id: text.text for text in given}
    assert len(found.texts) == len(given)
    scores = [one.score for one in found.texts]
    assert scores == sorted(scores, reverse=True)
    for one in found.texts:
        expected = by_hand(finished, keys[one.id], len(one.pieces))
        np.testing.assert_allclose(one.differences, expected, rtol=0, atol=1e-12)
        assert words[one.id].startswith("".join(one.pieces))
        gains = np.nan_to_num(one.differences - found.usual)
        for span in one.spans:
            assert span.total == pytest.approx(gains[span.start : span.end].sum())
    others = [np.nanmean(one.differences) for one in found.texts if one.label == 0]
    assert found.usual == pytest.approx(np.mean(others), abs=0.05)  # those are weighted by passes


def test_without_the_flag_no_page_is_written(finished: Path):
    assert not (finished / "tokens.html").exists()
    assert "tokens.html" not in (finished / "report.html").read_text()


def test_the_terminal_shows_the_texts_of_the_runs_own_files(finished: Path, capsys):
    said = run(capsys, ["explain", str(finished), "--top", "1"])
    assert said.code == 0
    assert "orange: the target predicts the token better" in said.out
    best = explain(finished, read_texts(texts_of(finished)).texts, top=1).texts[0]
    flat = re.sub(r"\s+", " ", said.out)
    assert best.id in flat
    assert re.sub(r"\s+", " ", "".join(best.pieces)).strip() in flat


def test_the_page_escapes_texts_and_is_private(box: Box, capsys):
    rows = [
        {"id": f"<b>{i}</b>", "text": f"<script>alert({i})</script> {words}", "label": i % 2}
        for i, words in enumerate(tiny.texts(24, (8, 20)))
    ]
    data = box.path / "script.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(capsys, box.command(data=data))
    page = box.path / "page.html"
    command = ["explain", str(box.out), "--html", str(page), "--id", "<b>3</b>"]
    for _ in range(2):  # a page of its own is replaced
        assert run(capsys, command).code == 0
    content = page.read_text()
    assert "This file holds texts" in content
    assert "<script>" not in content
    assert "<b>3" not in content
    assert page.stat().st_mode & 0o077 == 0
    page.write_text("years of work")
    assert_one_line(run(capsys, command), 2, "was not written by this command")
    assert page.read_text() == "years of work"


def test_an_audit_that_may_include_texts_writes_the_page_and_the_report_names_it(box: Box, capsys):
    assert run(capsys, box.command(include_text=True)).code == 0
    page = box.out / "tokens.html"
    assert page.stat().st_mode & 0o077 == 0
    assert page.read_text().count("<section") == 5
    report = (box.out / "report.html").read_text()
    assert 'href="tokens.html"' in report
    words = json.loads((box.out / "scores.jsonl").read_text().splitlines()[0])["text"]
    assert words[:20] not in report
    assert run(capsys, ["verify-run", str(box.out)]).code == 0


def test_other_texts_tokenizers_and_ids_are_refused(box: Box, finished: Path, capsys):
    rows = [json.loads(x) for x in texts_of(finished).read_text().splitlines()]
    for row in rows:
        row["text"] = f"{row['text']} more"
        row["id"] = row.get("id") or None
    names = [one.id for one in read_texts(texts_of(finished)).texts]
    changed = box.path / "changed.jsonl"
    lines = [json.dumps({**row, "id": name}) + "\n" for row, name in zip(rows, names)]
    changed.write_text("".join(lines))
    short = ["explain", str(finished), "--id", names[0], "--data"]
    assert_one_line(run(capsys, [*short, str(changed)]), 3, "is not the one that the run read")
    only = box.path / "only.jsonl"
    only.write_text(lines[1])
    assert_one_line(run(capsys, [*short, str(only)]), 3, "is not in the files that were given")
    wrong = ["explain", str(finished), "--id", "nobody"]
    assert_one_line(run(capsys, wrong), 2, "has no text of the id 'nobody'")
    file = box.path / "target" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][0]["special"] ^= True
    file.write_text(json.dumps(content))
    other = ["explain", str(finished), "--tokenizer", str(box.path / "target")]
    assert_one_line(run(capsys, other), 2, "is not the tokenizer that the audit read")


def test_a_run_that_is_not_finished_is_refused(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    (box.out / "scores.jsonl").unlink()
    assert_one_line(run(capsys, ["explain", str(box.out)]), 2, "is not a finished run")
