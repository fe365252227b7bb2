"""Splits are random, keep whole what belongs together, and are recognised by the audit."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from wrong_inputs import Box, as_flags, assert_one_line, line, run

from sama_jax.errors import DataError
from sama_jax.programs.split import draw_members, require_split
from sama_jax.texts.read import read_split, read_texts


@pytest.fixture
def box(tmp_path: Path) -> Box:
    texts = tiny.texts(30, (12, 20))
    rows = [line(text, id=f"t{i}", group=f"secret{i // 3}") for i, text in enumerate(texts[:12])]
    rows += [line(text) for text in texts[12:]]
    rows += [line(f"{texts[20]} {texts[21]} {texts[22]} {end}") for end in ("ka", "ro", "mi")]
    data = tmp_path / "all.jsonl"
    data.write_text("\n".join(rows) + "\n")
    return Box(tmp_path, tmp_path / "target", tmp_path / "reference", data, tmp_path / "out")


def split(capsys, box: Box, **flags):
    given = {"out": box.out, "seed": 3, **flags}
    return run(capsys, ["split", str(box.data), *as_flags(given)])


def sides(out: Path) -> list[list[dict]]:
    return [
        [json.loads(row) for row in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("members", "nonmembers")
    ]


def test_each_text_is_on_one_side_with_its_group_and_its_near_duplicates(box: Box, capsys):
    said = split(capsys, box)
    assert said.code == 0, said.err
    members, others = sides(box.out)
    given = sorted(text.text for text in read_texts(box.data).texts)
    assert sorted(row["text"] for row in members + others) == given
    assert abs(len(members) - len(others)) <= 3
    groups = [{row["group"] for row in side if "group" in row} for side in (members, others)]
    assert len(groups[0] | groups[1]) == 4
    assert not groups[0] & groups[1]
    near = [sum(len(row["text"].split()) > 36 for row in side) for side in (members, others)]
    assert sorted(near) == [0, 3]
    made = (box.out / "split.json").read_text()
    assert "secret" not in made
    assert not any(text in made for text in given)


def test_the_seed_alone_decides_and_another_one_draws_anew(box: Box, capsys):
    found = []
    for seed, name in ((3, "a"), (3, "b"), (4, "c")):
        assert split(capsys, box, seed=seed, out=box.path / name, members=10).code == 0
        found.append(sides(box.path / name))
    assert found[0] == found[1] != found[2]
    assert abs(len(found[0][0]) - 10) <= 2


def test_every_unit_is_as_often_a_member_as_any_other():
    """Binomial: 400 draws of a half have a s.d. of 10."""
    units = np.repeat(np.arange(20), 2)
    counts = sum(draw_members(units, 20, seed).astype(int) for seed in range(400))
    assert np.abs(counts - 200).max() < 45
    assert (counts[::2] == counts[1::2]).all()


def test_the_audit_knows_its_split_and_says_how_many_texts_differ(box: Box, capsys):
    assert split(capsys, box).code == 0
    path = box.out / "split.json"
    texts = read_split(box.out / "members.jsonl", box.out / "nonmembers.jsonl").texts
    require_split(path, texts)
    require_split(path, texts[:5], limit=5)
    with pytest.raises(DataError, match="of its 33 texts 28 are not audited"):
        require_split(path, texts[:5])
    picked = sorted(texts, key=lambda text: text.text)[:20]
    for limit in (20, 1000):
        with pytest.raises(DataError, match=rf"of the first {min(limit, 33)} of its 33 texts"):
            require_split(path, picked, limit=limit)
    require_split(path, texts, limit=1000)
    wrong = [texts[0]._replace(label=1 - (texts[0].label or 0)), texts[1]._replace(label=None)]
    wrong += [texts[2]._replace(text="another")]
    with pytest.raises(DataError, match=r"of 33 texts 1 are not in it, and 2 have another label"):
        require_split(path, [*wrong, *texts[3:]])


def test_a_split_file_that_was_changed_is_refused(box: Box, capsys):
    assert split(capsys, box).code == 0
    path = box.out / "split.json"
    made = json.loads(path.read_text())
    made["texts"][0]["label"] ^= 1
    path.write_text(json.dumps(made))
    texts = read_split(box.out / "members.jsonl", box.out / "nonmembers.jsonl").texts
    with pytest.raises(DataError, match="SHA-256 differs"):
        require_split(path, texts)
    for other in ("{}", "[1]", "{", '{"made_by": "sama-jax split", "sha256": "", "texts": [1]}'):
        path.write_text(other)
        with pytest.raises(DataError, match=r"split\.json"):
            require_split(path, texts)


def test_an_audit_of_other_texts_ends_with_3(box: Box, capsys):
    assert split(capsys, box).code == 0
    tiny.write_texts(box.data, tiny.texts(4, seed=9))
    for seed, folder in enumerate((box.target, box.reference)):
        tiny.folder(folder, seed=seed)
    command = box.command(split=box.out / "split.json", out=box.path / "run")
    assert_one_line(run(capsys, command), 3, "of 4 texts 4 are not in it")
    assert not (box.path / "run").exists()


def test_texts_of_another_field_are_split_the_same(box: Box, capsys):
    assert split(capsys, box, seed=1).code == 0
    made = (box.out / "members.jsonl").read_bytes()
    box.data.write_text(box.data.read_text().replace('"text"', '"input"'))
    other = {"seed": 1, "out": box.path / "other"}
    assert_one_line(split(capsys, box, **other), 3, "--text-field NAME")
    assert split(capsys, box, **other, text_field="input").code == 0
    assert (box.path / "other" / "members.jsonl").read_bytes() == made


def test_what_cannot_be_split_is_refused(box: Box, capsys):
    assert_one_line(split(capsys, box, members=33), 2, "got 33 of 33 texts")
    box.data.write_text(line("a", label=1) + "\n" + line("b") + "\n")
    assert_one_line(split(capsys, box), 3, "1 texts have a label already")
    box.data.write_text(line("a", group=1) + "\n" + line("b", group=1) + "\n")
    assert_one_line(split(capsys, box), 3, "nearly all texts belong together")
    assert not box.out.exists()
    box.out.mkdir()
    (box.out / "x").write_text("")
    assert_one_line(split(capsys, box), 2, "is not empty")
