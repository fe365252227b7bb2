"""Audits of documents that are longer than the model reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from wrong_inputs import Box, as_flags, assert_one_line, run, scores

from sama_jax.cli import entry

LENGTH, FLAGS = 512, {"attacks": "sama,loss", "max_length": 512, "no_figures": True}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    place = tmp_path_factory.mktemp("windows")
    for seed, name in enumerate(("target", "reference")):
        tiny.folder(place / name, seed=seed)
    made = tiny.tokenizer()
    whole = made.decode(made.encode(" ".join(tiny.texts(90, (40, 40)))).ids[:3000])
    assert len(made.encode(whole).ids) == 3000
    rows = [{"id": "long", "label": 1, "text": whole}]
    rows += [
        {"id": f"s{i}", "label": i % 2, "text": text}
        for i, text in enumerate(tiny.texts(7, (30, 60), seed=1))
    ]
    data = place / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Box(place, place / "target", place / "reference", data, place / "out")


@pytest.fixture(scope="module")
def finished(box: Box) -> Path:
    assert entry.main(box.command(**FLAGS, windows=True, include_text=True)) == 0
    return box.out


def test_a_long_document_is_scored_whole_by_its_windows(finished: Path):
    windows = [row for row in lines(finished / "windows.jsonl") if row["document"] == "long"]
    assert [row["n_tokens"] for row in windows] == [LENGTH] * 5 + [3000 - 5 * LENGTH]
    long, *short = scores(finished)
    assert (long["id"], long["n_tokens"], long["windows"]) == ("long", 3000, 6)
    assert not long["truncated"]
    for name in ("sama", "loss"):
        found = [row["scores"][name] for row in windows]
        np.testing.assert_allclose(long["scores"][name], np.mean(found))
        np.testing.assert_allclose(long["scores"][f"{name}@top3"], np.mean(sorted(found)[-3:]))
    assert [row["windows"] for row in short] == [1] * 7
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["attacks"]) == ["sama", "sama@top3", "loss", "loss@top3"]
    assert metrics["attacks"]["sama"]["n_members"] == 4


def test_the_same_pieces_by_hand_have_the_same_scores(finished: Path, box: Box, tmp_path: Path):
    made = tiny.tokenizer()
    ids = made.encode(lines(box.data)[0]["text"]).ids
    pieces = [made.decode(ids[i : i + LENGTH]) for i in range(0, 3000, LENGTH)]
    rows = [{"id": f"p{i}", "label": i % 2, "text": text} for i, text in enumerate(pieces)]
    data = tmp_path / "pieces.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert entry.main(box.command(**FLAGS, data=data, out=tmp_path / "out")) == 0
    by_hand = [row["scores"] for row in scores(tmp_path / "out")]
    windows = [row for row in lines(finished / "windows.jsonl") if row["document"] == "long"]
    assert [row["text"] for row in windows] == pieces
    assert [row["scores"] for row in windows] == by_hand


def test_windows_are_scored_again_from_the_store(finished: Path, capsys):
    before = scores(finished), (finished / "windows.jsonl").read_text()
    assert entry.main(["score", *as_flags({"store": finished, "attacks": "sama,loss"})]) == 0
    assert before == (scores(finished), (finished / "windows.jsonl").read_text())


@pytest.mark.parametrize("command", ["audit", "nll"])
def test_texts_beyond_a_models_context_are_refused(box: Box, tmp_path: Path, capsys, command: str):
    tiny.folder(tmp_path / "short", max_sequence_length=256)
    flags = {"data": box.data, "out": tmp_path / "out", "max_length": LENGTH, "quiet": True}
    if command == "audit":
        flags |= {"target": box.target, "reference": tmp_path / "short"}
    else:
        flags |= {"model": tmp_path / "short"}
    said = run(capsys, [command, *as_flags(flags)])
    assert_one_line(said, 2, "was made for 256 tokens, but a text has 512", "--max-length 256")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"windows": True, "stride": 100}, 2, "belongs to another run"),
        ({"windows": True, "top_windows": 2}, 2, "belongs to another run"),
        ({}, 2, "belongs to another run"),
        ({"stride": 100}, 2, "give --windows, too"),
        ({"windows": True, "stride": 513}, 2, "expected 1 to 512"),
        ({"windows": True, "second_seed": True}, 2, "leave it or --windows out"),
    ],
)
def test_other_windows_are_another_run(finished: Path, box: Box, capsys, change, code, said):
    assert_one_line(run(capsys, box.command(**FLAGS, **change)), code, said)
