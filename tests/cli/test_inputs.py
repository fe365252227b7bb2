"""Wrong model folders and texts: one clear line, the documented exit code, no remains."""

import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from broken_folders import MODELS, edit_config, edit_weights
from wrong_inputs import (
    GOOD,
    Box,
    assert_one_line,
    line,
    refuse,
    run,
    scores,
)

pytestmark = pytest.mark.usefixtures("figures")


@pytest.mark.parametrize("role", ["target", "reference"])
@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, role: str, box: Box, capsys: pytest.CaptureFixture[str]):
    spoil, fragments = MODELS[case]
    spoil(getattr(box, role))
    refuse(capsys, box, box.command(), 4, str(getattr(box, role)), *fragments)


def test_all_tensors_that_do_not_fit_are_listed_at_once(box: Box, capsys):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        names = {key.rsplit("blocks.", 1)[-1]: key for key in tensors}
        del tensors[names["0.q_proj.weight"]]
        tensors["model.transformer.extra.weight"] = np.zeros((2, 3), np.float32)
        tensors[names["0.ff_out.weight"]] = np.zeros((16, 31), np.float32)

    edit_weights(box.target, spoil)
    said = run(capsys, box.command())
    first = assert_one_line(said, 4, str(box.target))
    assert "3 tensors do not fit" in first
    listed = said.err.splitlines()[1:]
    assert [text.split()[0] for text in listed] == ["missing", "shape", "unexpected"]
    assert "blocks.0.q_proj.weight [16, 16]" in listed[0]
    assert listed[1].endswith("blocks.0.ff_out.weight: expected [16, 32], found [16, 31]")
    assert listed[2].endswith("extra.weight [2, 3]")
    assert not box.out.exists()


def test_tokenizers_that_give_different_ids(box: Box, capsys):
    tiny.tokenizer(vocab=270).save(str(box.reference / "tokenizer.json"))
    refuse(
        capsys, box, box.command(), 4, "tokenise alike", "'t0'", "texts.jsonl:1", "fine-tuned from"
    )


def test_another_tokenizer_file_with_equal_ids_is_fine(box: Box, capsys):
    path = box.reference / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert run(capsys, box.command(dry_run=True)).code == 0


def test_target_and_reference_with_different_mask_ids(box: Box, capsys):
    edit_config(box.reference, mask_token_id=298)
    refuse(capsys, box, box.command(), 2, "299", "298", "--mask-id")


# --- texts -------------------------------------------------------------------------------------


TEXTS: dict[str, tuple[Callable[[Box], Path], list[str]]] = {
    "malformed JSON": (
        lambda b: b.lines(*GOOD, '{"text": "karo"', *GOOD),
        ["bad.jsonl:7:", "JSON"],
    ),
    "not an object": (lambda b: b.lines(*GOOD, "[1]"), ["bad.jsonl:7:", "expected a JSON object"]),
    "no text": (lambda b: b.lines(*GOOD, '{"id": "x"}'), ["bad.jsonl:7:", "no field 'text'", "id"]),
    "text is a number": (lambda b: b.lines(*GOOD, '{"text": 3}'), ["bad.jsonl:7:", "string"]),
    "label of 2": (
        lambda b: b.lines(*GOOD, line(label=2)),
        ["bad.jsonl:7:", "label is another number", "1 (member)"],
    ),
    "label is a word": (
        lambda b: b.lines(line(label="seen")),
        ["bad.jsonl:1:", "label is another string (4 characters)"],
    ),
    "texts elsewhere": (
        lambda b: b.lines('{"input": "karo", "label": 1}'),
        ["bad.jsonl:1:", "(its fields: input, label)", "--text-field NAME"],
    ),
    "empty file": (lambda b: b.lines(), ["bad.jsonl", "no texts"]),
    "blank lines": (lambda b: b.lines("", "", ""), ["bad.jsonl", "no texts"]),
    "one id, two texts": (
        lambda b: b.lines(line("karo", id="x"), *GOOD, line("mite", id="x")),
        ["'x'", "two different texts", "bad.jsonl:1", "bad.jsonl:8"],
    ),
    "binary": (
        lambda b: b.lines(b"\x7fELF\x02\x01\x00\xff\xfe"),
        ["bad.jsonl:1:", "not UTF-8", "binary"],
    ),
    "binary without a name": (
        lambda b: b.lines(bytes(range(256)), name="data.bin"),
        ["data.bin", "not UTF-8"],
    ),
    "prose": (lambda b: b.lines("hello", name="a.txt"), ["a.txt", "unknown kind", ".jsonl"]),
    "no such file": (lambda b: b.path / "none.jsonl", ["none.jsonl", "no such file"]),
    "a folder": (lambda b: b.target, ["is a folder"]),
    "below a file": (lambda b: b.data / "x.jsonl", ["x.jsonl", "cannot be read"]),
    "truncated gzip": (
        lambda b: b.lines(gzip.compress("\n".join(GOOD).encode())[:-9], name="x.jsonl.gz"),
        ["x.jsonl.gz", "truncated"],
    ),
    "truncated parquet": (
        lambda b: b.lines(b"PAR1 rest", name="x.parquet"),
        ["not a complete parquet"],
    ),
    "csv without text": (
        lambda b: b.lines("a,b", "1,2", name="x.csv"),
        ["x.csv:1", "no column 'text'"],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str, box: Box, capsys):
    make, fragments = TEXTS[case]
    refuse(capsys, box, box.command(data=make(box)), 3, *fragments)


def test_fields_that_are_named_are_read_from_all_files(box: Box, capsys):
    texts = tiny.texts(4)
    rows = [json.dumps({"input": text, "seen": i > 1}) for i, text in enumerate(texts)]
    data, known = box.lines(*rows, name="d.jsonl"), box.lines('{"input": "sun"}', name="c.jsonl")
    named = ["--text-field", "input", "--label-field"]
    command = box.command(data=data, control=known)
    found = run(capsys, [*command, *named, "seen", "--dry-run"])
    assert found.code == 0, found.err
    refuse(capsys, box, [*command, *named, "gold"], 3, "d.jsonl", "no field 'gold'", "input, seen")


def test_one_of_two_files_is_missing(box: Box, capsys):
    none = box.path / "none.jsonl"
    command = box.command(data=None, members=box.lines(*GOOD), nonmembers=none)
    refuse(capsys, box, command, 3, "none.jsonl", "no such file")


def test_many_bad_lines_are_listed_and_counted(box: Box, capsys):
    path = box.lines(*['{"txt": "karo"}'] * 14)
    refuse(capsys, box, box.command(data=path), 3, "14 problems", "bad.jsonl:10:", "and 4 more")


def test_an_input_that_may_not_be_read(box: Box, capsys, monkeypatch: pytest.MonkeyPatch):
    real = Path.open

    def refused(path: Path, *mode: str, **options: str):
        if path == box.data:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *mode, **options)

    monkeypatch.setattr(Path, "open", refused)
    said = run(capsys, box.command())
    assert_one_line(said, 3, "texts.jsonl", "Permission denied")


# --- the same text on both sides ---------------------------------------------------------------


def both_sides(box: Box) -> dict[str, Path | None]:
    members = box.lines(*GOOD[:4], line("dalfer novi"), name="members.jsonl")
    nonmembers = box.lines(line("dalfer novi"), line("sundal"), name="nonmembers.jsonl")
    return {"data": None, "members": members, "nonmembers": nonmembers}


def test_a_text_in_both_files_is_reported(box: Box, capsys):
    command = [part for part in box.command(**both_sides(box)) if part != "--quiet"]
    said = run(capsys, command)
    assert said.code == 5  # 1 of 6 different texts
    assert "void: contradictions: texts that occur as member and as non-member: 1;" in said.err
    assert "Traceback" not in said.err
    report = (box.out / "report.md").read_text().splitlines()
    assert report[2].startswith("No conclusion (contradictions): texts that occur as member")
    rows = scores(box.out)
    assert len(rows) == 7
    assert sorted(row["label"] for row in rows) == [0, 0, 1, 1, 1, 1, 1]


def test_a_text_in_both_files_under_strict(box: Box, capsys):
    said = run(capsys, box.command(**both_sides(box), strict=True))
    assert_one_line(said, 5, str(box.out), "texts that occur as member and as non-member: 1;")
    assert len(scores(box.out)) == 7
    assert (box.out / "report.md").exists()
    assert json.loads((box.out / "manifest.json").read_text())["finished"] is True


def test_texts_of_both_classes_that_cutting_makes_equal_are_reported(box: Box, capsys):
    """They differ behind the last token that is kept."""
    begin = "karo mite sunka dalfer " * 40
    texts = [line(f"{begin} {end}", id=f"x{end}", label=end) for end in (0, 1)]
    others = [line(f"mite {i}", id=f"m{i}", label=i % 2) for i in range(4)]
    path = box.lines(*others, *texts)
    said = run(capsys, box.command(data=path, attacks="loss", strict=True))
    note = "texts of both classes that have the same tokens, after they are cut: 1"
    assert_one_line(said, 5, "void", note)
    gates = json.loads((box.out / "manifest.json").read_text())["gates"]
    assert any(note in one["sentence"] for one in gates if one["status"] == "void")


def test_strict_is_silent_about_good_texts(box: Box, capsys):
    # One model alone: of two with random weights the reference may well be the better one.
    said = run(capsys, box.command(attacks="loss", strict=True))
    assert (said.code, said.err) == (0, "")
