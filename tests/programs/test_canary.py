"""Canaries: made by coins, planted without a trace of anything else, checked, and audited."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import zstandard
from tokenizers import Tokenizer, normalizers
from wrong_inputs import as_flags, assert_one_line, contents, run

from sama_jax.cli import entry
from sama_jax.errors import DataError, ModelError, UsageError
from sama_jax.programs import canary
from sama_jax.programs.canary import Recipe, read_canaries, run_check, run_insert, run_make
from sama_jax.programs.canary_audit import control, run_canary_audit
from sama_jax.storage.canary_file import KEY, TEXTS
from sama_jax.storage.files import sha256_of
from sama_jax.storage.text_index import INDEX, read_index, write_index

RECIPE = Recipe(count=30, length=12)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, 30 canaries and their audit."""
    base = tmp_path_factory.mktemp("canary")
    for seed, name in enumerate(("target", "reference")):
        tiny.folder(base / name, seed=seed)
    run_make(base / "reference", base / "canaries", RECIPE, seed=7)
    return base


@pytest.fixture(scope="module")
def audited(place: Path) -> Path:
    models = {"target": place / "target", "reference": place / "reference"}
    given = {"data": place / "canaries" / TEXTS, "out": place / "run", "attacks": "sama,loss"}
    flags = as_flags({**models, **given, "no_figures": True})
    assert entry.main(["audit", "--quiet", *tiny.SETTINGS, *flags]) == 0
    return place / "run"


@pytest.fixture
def made(place: Path, tmp_path: Path) -> Path:
    """A copy of the canaries that a test may spoil."""
    for name in (TEXTS, KEY):
        (tmp_path / name).write_bytes((place / "canaries" / name).read_bytes())
    return tmp_path


def command(capsys, action: str, *given: object, **flags):
    return run(capsys, ["canary", action, *map(str, given), *as_flags(flags)])


# --- make -----------------------------------------------------------------------------------------


def test_kinds_and_copies_take_turns_and_the_label_is_the_coin(place: Path):
    key, texts = read_canaries(place / "canaries")
    assert len(set(texts)) == 30
    assert not any("\ufffd" in text or text != text.strip() for text in texts)
    assert all(c.isprintable() or c in "\n\t" for text in texts for c in text)
    cells = Counter((one.kind, one.copies) for one in key.canaries)
    assert cells == {(k, n): 5 for k in ("sampled", "random") for n in (1, 4, 16)}
    rows = [json.loads(x) for x in (place / "canaries" / TEXTS).read_text().splitlines()]
    assert [row["label"] for row in rows] == [one.included for one in key.canaries]
    assert [row["label"] for row in rows] == canary.flip_coins(30, 7).tolist()
    stored = (place / "canaries" / KEY).read_text()
    assert not any(text in stored for text in texts)


def test_the_command_repeats_itself_by_its_seed_and_draws_a_secret_one_without(
    place: Path, tmp_path: Path, capsys
):
    flags = {"reference": place / "reference", "count": 4, "length": 8, "copies": "2", "seed": 3}
    said = [
        command(capsys, "make", **{**flags, "out": tmp_path / name, "seed": seed})
        for name, seed in (("a", 3), ("b", 3), ("c", 4), ("d", None))
    ]
    assert all(one.code == 0 for one in said), said
    found = [read_canaries(tmp_path / name) for name in "abcd"]
    assert found[0][1] == found[1][1]
    assert len({str(texts) for _, texts in found}) == 3
    assert len({key.seed for key, _ in found}) == 3
    assert (tmp_path / "a" / TEXTS).read_bytes() == (tmp_path / "b" / TEXTS).read_bytes()
    assert found[0][0].canaries[0].copies == 2
    stored = json.loads((tmp_path / "a" / KEY).read_text())
    assert stored["sha256"] in said[0].out
    assert_one_line(command(capsys, "make", **flags, out=tmp_path / "a"), 2, "is not empty")


def test_coins_are_fair_and_independent():
    """400 seeds: a share has a standard deviation of .025, a correlation one of .05."""
    coins = np.array([canary.flip_coins(40, seed) for seed in range(400)], float)
    assert np.abs(coins.mean(axis=0) - 0.5).max() < 0.11
    beside = np.corrcoef(coins.T)
    np.fill_diagonal(beside, 0)
    assert np.abs(beside).max() < 0.25
    assert coins.sum(axis=1).std() > 2  # not half of them: sqrt(40) / 2 = 3.2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"attack": "dfmia"}, "reads all texts at once"),
        ({"attack": "smaa"}, "did you mean 'sama'"),
        ({"copies": "1,0"}, "expected numbers of 1 to 1000"),
        ({"copies": "1,,4"}, "expected numbers of 1 to 1000"),
        ({"temperature": 0}, "--temperature must lie in"),
        ({"length": 7}, "--length must be at least 8"),
        ({"count": 0}, "--count must be at least 1"),
        ({"seed": -1}, "--seed must lie in"),
    ],
)
def test_wrong_flags_make_nothing(place: Path, tmp_path: Path, capsys, flags, said):
    given = {"reference": place / "reference", "out": tmp_path / "out", **flags}
    assert_one_line(command(capsys, "make", **given), 2, said)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_spells_too_few_texts_is_refused(place: Path, tmp_path: Path):
    """At a temperature near 0 all texts are alike."""
    cold = RECIPE._replace(kind="sampled", temperature=1e-6)
    with pytest.raises(ModelError, match="of 30 canaries are distinct and come back"):
        run_make(place / "reference", tmp_path / "out", cold, seed=1)
    assert not (tmp_path / "out").exists()


# --- insert ---------------------------------------------------------------------------------------


def lines_of(count: int) -> list[bytes]:
    return [
        json.dumps({"id": i, "text": f"private {i} \u2028 end", "more": None}).encode() + b"\n"
        for i in range(count)
    ]


def test_each_included_canary_stands_as_often_as_it_should_and_all_else_is_as_it_was(
    made: Path, capsys
):
    """A mark of encoding, blank lines, other line ends and a last line without one."""
    lines = [b"\xef\xbb\xbf" + lines_of(1)[0], b"\n", *lines_of(20)[1:]]
    lines[5] = lines[5].replace(b"\n", b"\r\n")
    lines[-1] = lines[-1].rstrip(b"\n")
    (made / "data.jsonl").write_bytes(b"".join(lines))
    said = command(capsys, "insert", made / "data.jsonl", canaries=made, out=made / "train.jsonl")
    assert said.code == 0, said.err
    key, texts = read_canaries(made)
    copies = sum(one.copies for one in key.canaries if one.included)
    assert f"20 records, and {copies} copies" in said.out

    found = (made / "train.jsonl").read_bytes().splitlines(keepends=True)
    ours = [x for x in found if x.startswith(b'{"text": ')]
    others = [x for x in found if not x.startswith(b'{"text": ')]
    assert b"".join(others).rstrip(b"\n") == b"".join(lines)
    times = Counter(json.loads(x)["text"] for x in ours)
    assert times == {t: one.copies for one, t in zip(key.canaries, texts) if one.included}
    places = [i for i, x in enumerate(found) if x in ours]
    assert len({sum(x not in ours for x in found[:i]) for i in places}) > 10  # all over the file
    assert found[0] == lines[0]


def test_another_field_may_hold_the_texts(made: Path):
    (made / "data.jsonl").write_text('{"body": "one"}\n')
    run_insert(made / "data.jsonl", made, made / "train.jsonl", "body")
    key, _ = read_canaries(made)
    rows = [json.loads(x) for x in (made / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + sum(one.copies for one in key.canaries if one.included)
    assert all(row.keys() == {"body"} for row in rows)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"text": "secret"}\n{"text": 5}\n', "data.jsonl:2: expected JSON Lines"),
        (b'{"text": "secret"}\nsecret\n', "data.jsonl:2: expected JSON Lines"),
        (b"text\nsecret\n", "data.jsonl:1: expected JSON Lines"),
        (b'[{"text": "secret"}]', "data.jsonl:1: expected JSON Lines"),
        (b"\x1f\x8b\xff\n", "data.jsonl:1: expected JSON Lines"),
        (b'"secret"\n', "data.jsonl:1: expected JSON Lines"),
        ('{"text": "secret"}\n'.encode("utf-16"), "data.jsonl:1: expected JSON Lines"),
        (zstandard.compress(b'{"text": "secret"}\n'), "data.jsonl:1: expected JSON Lines"),
        (b"\n\n", "holds no record"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_json_lines_is_refused_and_nothing_is_written(made: Path, capsys, data, said):
    if data is not None:
        (made / "data.jsonl").write_bytes(data)
    before = contents(made)
    wrong = command(capsys, "insert", made / "data.jsonl", canaries=made, out=made / "o.jsonl")
    line = assert_one_line(wrong, 3, said)
    assert "secret" not in line
    assert contents(made) == before


def test_no_file_is_replaced_and_no_canary_planted_twice(made: Path, capsys):
    (made / "data.jsonl").write_bytes(b"".join(lines_of(3)))
    for out in ("data.jsonl", TEXTS):
        with pytest.raises(UsageError, match="exists; give --out a new file"):
            run_insert(made / "data.jsonl", made, made / out)
    run_insert(made / "data.jsonl", made, made / "train.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl:\d+: is a canary already"):
        run_insert(made / "train.jsonl", made, made / "again.jsonl")
    assert not (made / "again.jsonl").exists()


def test_a_key_that_was_changed_is_refused(made: Path):
    found = json.loads((made / KEY).read_text())
    found["canaries"][0]["included"] ^= True
    (made / KEY).write_text(json.dumps(found))
    with pytest.raises(DataError, match="SHA-256 differs"):
        read_canaries(made)
    del found["sha256"]
    found["canaries"].reverse()
    (made / KEY).write_text(json.dumps(found | {"sha256": sha256_of(found)}))
    with pytest.raises(DataError, match="of different canaries"):
        read_canaries(made)
    for other in ("{}", "[]", "{", '{"made_by": "sama-jax canary make"}'):
        (made / KEY).write_text(other)
        with pytest.raises(DataError, match=r"canaries\.json"):
            read_canaries(made)


# --- check ----------------------------------------------------------------------------------------


def test_canaries_that_arrive_whole_pass_every_check(place: Path, made: Path, capsys):
    (made / "data.jsonl").write_bytes(b"".join(lines_of(5)))
    run_insert(made / "data.jsonl", made, made / "train.jsonl")
    given = {"canaries": made, "model": place / "target", "data": made / "train.jsonl"}
    said = command(capsys, "check", **given)
    assert said.code == 0, said.err
    assert [x.split(": 30 of 30 canaries ")[0] for x in said.out.splitlines()] == [
        "tokenisation",
        "truncation",
        "difference",
        "training data",
    ]


def test_canaries_are_counted_in_every_form(place: Path, made: Path, tmp_path: Path):
    key, texts = read_canaries(made)
    copies = [t for one, t in zip(key.canaries, texts) for _ in range(one.copies * one.included)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in copies)
    (tmp_path / "t.jsonl.zst").write_bytes(zstandard.compress(lines.encode("utf-16")))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["body"], *([text] for text in copies)])
    for name in ("t.jsonl.zst", "t.csv"):
        assert not run_check(made, place / "target", 64, tmp_path / name, "body").failed


def test_what_is_lost_on_the_way_ends_with_3_by_name(place: Path, made: Path, capsys):
    key, texts = read_canaries(made)
    (made / "data.jsonl").write_bytes(b"".join(lines_of(5)))
    run_insert(made / "data.jsonl", made, made / "train.jsonl")
    once = dict.fromkeys((made / "train.jsonl").read_text().splitlines(keepends=True))
    (made / "train.jsonl").write_text("".join(once))  # as one who drops duplicates
    given = {"canaries": made, "model": place / "target", "data": made / "train.jsonl"}
    said = command(capsys, "check", **given, max_length=5)
    assert said.code == 3
    assert "reach the model whole (truncation, training data)" in said.err
    right = sum(one.copies == 1 or not one.included for one in key.canaries)
    assert f"training data: {right} of 30 canaries" in said.out
    assert "truncation: 0 of 30" in said.out
    assert not any(text in said.err + said.out for text in texts)
    with_held_out = json.dumps({"text": next(
        t for one, t in zip(key.canaries, texts) if not one.included
    )})  # fmt: skip
    (made / "train.jsonl").write_text(with_held_out + "\n")
    lost = sum(one.included for one in key.canaries)
    found = run_check(made, place / "target", 64, made / "train.jsonl")
    assert f"training data: {29 - lost} of 30" in found.lines[-1]


def test_a_tokenizer_that_spells_otherwise_is_noticed(place: Path, made: Path):
    """This one drops accents, so that texts with them come back as others."""
    (made / "model").mkdir()
    other = Tokenizer.from_file(str(place / "target" / "tokenizer.json"))
    other.add_special_tokens(["<|other|>"])
    other.normalizer = normalizers.Replace("k", "<|other|>")  # pyright: ignore
    other.save(str(made / "model" / "tokenizer.json"))
    _, texts = read_canaries(made)
    found = run_check(made, made / "model", 512)
    assert "tokenisation" in found.failed
    kept = sum("k" not in text for text in texts)
    assert f"tokenisation: {kept} of 30 canaries" in found.lines[0]


# --- audit ----------------------------------------------------------------------------------------


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    """A copy of the audit's folder that a test may spoil."""
    shutil.copytree(audited, tmp_path / "run")
    return tmp_path / "run"


def change_rows(folder: Path, change) -> None:
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        change(number, row)
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forget_files(folder)


def forget_files(folder: Path) -> None:
    """Makes a folder one whose files nobody recorded."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("files", None)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def bounds(place: Path, folder: Path, out: Path):
    return run_canary_audit(folder, place / "canaries", out)


def test_the_command_says_the_bound_and_what_it_means(
    place: Path, copied: Path, tmp_path: Path, capsys
):
    change_rows(copied, lambda _, row: row["scores"].update(sama=float(row["label"])))
    out = tmp_path / "epsilon.json"
    said = command(capsys, "audit", copied, canaries=place / "canaries", out=out, delta=1e-6)
    assert said.code == 0, said.err
    found = json.loads(out.read_text())
    every = found["all"]
    assert (found["attack"], found["delta"], every["significance"]) == (
        "sama",
        1e-6,
        pytest.approx(0.05),
    )
    assert every["epsilon"] == every["largest_possible"] > 0.5  # all guesses are right
    assert every["auc"] == 1
    assert every["included"] + every["held_out"] == 30
    assert found["by_copies"].keys() == {"1", "4", "16"}
    assert all(
        one["significance"] == pytest.approx(0.05 / 3) for one in found["by_copies"].values()
    )
    assert sum(one["included"] for one in found["by_copies"].values()) == every["included"]
    lines = said.out.splitlines()
    assert f"epsilon is at least {every['epsilon']:.2f}, with 95 % confidence" in lines[0]
    assert f"at most {every['largest_possible']:.2f}, with every guess right" in lines[1]
    assert "a small one proves nothing" in lines[2]
    again = command(capsys, "audit", copied, canaries=place / "canaries", out=out)
    assert again.code == 0  # replaces its own
    out.write_text("mine")
    assert_one_line(command(capsys, "audit", copied, canaries=place / "canaries", out=out), 2)


def test_models_that_saw_no_canary_show_nothing(place: Path, audited: Path, tmp_path: Path):
    found, sentences = bounds(place, audited, tmp_path / "epsilon.json")
    assert found["all"]["epsilon"] == 0
    assert sentences[0] == "No epsilon above 0 is shown, at 95 % confidence."
    assert "too few canaries of 16 copies" in sentences[-1]


def test_the_control_says_whether_what_stands_there_often_was_found():
    one = {"included": 12, "held_out": 10, "p": 0.0009}
    assert control("16", one) == (
        "Control: canaries that stand there 16 times were found (p = 0.0009)."
    )
    assert "were not found (p = 0.002): this attack is blind" in control("4", one | {"p": 0.002})
    assert "too few canaries of 9 copies" in control("9", one | {"held_out": 9})


def test_canaries_that_are_missing_or_on_the_other_side_make_no_bound(
    place: Path, copied: Path, tmp_path: Path
):
    def spoil(number: int, row) -> None:
        if number == 0:
            row["scores"]["sama"] = None
        if number in (1, 2):
            row["label"] = 1 - row["label"]

    change_rows(copied, spoil)
    lines = (copied / "scores.jsonl").read_text().splitlines(keepends=True)
    (copied / "scores.jsonl").write_text("".join(lines[:-1]))
    manifest = json.loads((copied / "manifest.json").read_text())
    rows, views = read_index(copied / INDEX, manifest["run"])
    manifest["run"]["texts"] -= 1
    views = {view: found[:-1] for view, found in views.items()}
    write_index(copied / INDEX, manifest["run"], rows[:-1], views)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="1 are not in this audit, 1 have no score of sama and 2 "):
        bounds(place, copied, tmp_path / "epsilon.json")
    assert not (tmp_path / "epsilon.json").exists()


def test_a_void_audit_makes_no_bound(place: Path, copied: Path, tmp_path: Path, capsys):
    manifest = json.loads((copied / "manifest.json").read_text())
    one = {"name": "identical", "status": "void", "statistic": 1.0, "bound": 0.5,
           "sentence": "Target and reference are the same.", "remedy": "Take another."}  # fmt: skip
    manifest.pop("seal", None)
    (copied / "manifest.json").write_text(json.dumps(manifest | {"gates": [one]}))
    out = tmp_path / "epsilon.json"
    said = command(capsys, "audit", copied, canaries=place / "canaries", out=out)
    assert_one_line(said, 5, "its result is void: identical: Target and reference are the same.")
    assert not out.exists()
    expected = [one | {"name": name} for name in ("reference_learnt", "blind")]
    (copied / "manifest.json").write_text(json.dumps(manifest | {"gates": expected}))
    _, sentences = bounds(place, copied, out)
    assert out.exists()
    assert not any("code of sama" in sentence for sentence in sentences)
    other = manifest | {"gates": [], "codes": manifest["codes"] | {"sama": "another"}}
    (copied / "manifest.json").write_text(json.dumps(other))
    found, sentences = bounds(place, copied, out)
    assert (found["run"]["code of sama"], found["same_code"]) == ("another", False)
    assert any("The code of sama is another one" in sentence for sentence in sentences)


def test_the_attack_is_the_one_that_was_fixed_beforehand(place: Path, copied: Path, tmp_path: Path):
    change_rows(copied, lambda _, row: row["scores"].pop("sama"))
    with pytest.raises(UsageError, match="attack 'sama' has no scores in this run"):
        bounds(place, copied, tmp_path / "epsilon.json")
    with pytest.raises(UsageError, match="expected the output folder of a finished audit"):
        bounds(place, tmp_path, tmp_path / "epsilon.json")
