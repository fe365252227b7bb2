"""Flags from a YAML file give the run that the same flags give; what is no flag is refused."""

import json
from pathlib import Path

import pytest
import yaml
from wrong_inputs import Box, assert_one_line, run, scores

from sama_jax.cli import audit, entry


def parsed(file: Path, content: object, *given: str):
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return entry.build_parser().parse_args(["audit", "--config", str(file), *given])


def test_the_file_of_a_run_folder_repeats_it_bit_for_bit(box: Box, finished: Path, capsys):
    kept = yaml.safe_load((finished / "audit.yaml").read_text())
    assert "out" not in kept
    assert kept["target"] == str(finished.parent / "target")
    argv = ["audit", f"--config={finished / 'audit.yaml'}", "--out", str(box.out)]
    assert run(capsys, argv).code == 0
    assert scores(box.out) == scores(finished)
    manifests = [json.loads((x / "manifest.json").read_text()) for x in (box.out, finished)]
    assert manifests[0]["run"] == manifests[1]["run"]
    assert yaml.safe_load((box.out / "audit.yaml").read_text()) == kept


def test_every_kind_of_flag_is_read(tmp_path: Path):
    content = {
        "target": "t",
        "max-length": 64,
        "top_windows": 2,
        "margin": 0.6,
        "attacks": ["sama", "loss"],
        "adapter": ["a", "b"],
        "set": "sama.steps=8",
        "windows": True,
        "strict": False,
        "no-figures": True,
        "limit": None,
    }
    args = parsed(tmp_path / "a.yaml", content, "--reference", "r", "--out", "o")
    assert (args.max_length, args.top_windows, args.margin) == (64, 2, 0.6)
    assert args.attacks == ["sama", "loss"]
    assert args.adapter == [Path("a"), Path("b")]
    assert args.set == ["sama.steps=8"]
    assert (args.windows, args.strict, args.figures, args.limit) == (True, False, False, None)


def test_the_command_line_counts_instead_of_the_file(tmp_path: Path):
    content = {"reference": "r", "max-length": 64, "set": ["sama.steps=8"], "seed": 3}
    given = ["--out", "o", "--max-length=32", "--set", "sama.steps=4"]
    args = parsed(tmp_path / "a.yaml", content, *given)
    assert (args.max_length, args.seed, args.set) == (32, 3, ["sama.steps=4"])


def test_a_flag_that_begins_like_another_replaces_itself_alone(tmp_path: Path):
    content = {
        "reference": "r",
        "reference-attention-mask": "clean:8",
        "reference-tokenizer": "own",
    }
    args = parsed(tmp_path / "a.yaml", content, "--reference", "b", "--out", "o")
    assert args.reference == [Path("b")]
    assert (args.reference_attention_mask, args.reference_tokenizer) == ("clean:8", "own")
    args = parsed(tmp_path / "a.yaml", content, "--reference-a", "full", "--out", "o")
    assert (args.reference_attention_mask, args.reference_tokenizer) == ("full", "own")
    args = entry.build_parser().parse_args(
        ["audit", "--conf", str(tmp_path / "a.yaml"), "--out", "o"]
    )
    assert args.reference == [Path("r")]


def test_the_config_of_a_new_model_is_another_flag(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    given = ["pretrain", "--config", str(tmp_path / "config.json"), "--data", "d", "--out", "o"]
    assert entry.build_parser().parse_args(given).config == tmp_path / "config.json"


def test_no_reference_stays_none_beside_a_folder_of_that_name(tmp_path: Path, monkeypatch):
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    given = ["audit", "--target", "t", "--reference", "none", "--data", "d", "--out", "o"]
    args = entry.build_parser().parse_args(given)
    audit.checked(args)
    assert args.flags["reference"] == "none"
    assert args.reference == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"tarjet": "t"}, "'tarjet' is no flag of sama-jax audit; did you mean 'target'"),
        ({"config": "b.yaml"}, "'config' is no flag"),
        ("limit: 2001-01-01", "limit: expected a word or a number"),
        ({"windows": "yes"}, "windows is a switch; expected true or false"),
        ({"target": {"a": 1}}, "target: expected a word or a number"),
        ({"target": True}, "target: expected a word or a number"),
        (["target"], "expected a mapping of flags"),
        ("a: [", "not readable as YAML"),
        ("!!python/object/apply:os.system ['true']", "not readable as YAML"),
    ],
)
def test_what_is_no_flag_is_refused(tmp_path: Path, capsys, content, said):
    with pytest.raises(SystemExit) as ended:
        parsed(tmp_path / "a.yaml", content, "--reference", "r", "--out", "o")
    assert ended.value.code == 3
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1


def test_a_flag_that_is_spelled_in_two_ways_is_refused(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        parsed(
            tmp_path / "a.yaml", "max-length: 3\nmax_length: 4", "--reference", "r", "--out", "o"
        )
    assert "--max-length: is given twice" in capsys.readouterr().err


def test_saving_replaces_no_file_of_another_kind(box: Box, capsys):
    mine = box.path / "mine.yaml"
    mine.write_text("years: of work\n")
    command = [*box.command(), "--dry-run", "--save-config"]
    assert_one_line(run(capsys, [*command, str(mine)]), 2, "was not written by --save-config")
    assert mine.read_text() == "years: of work\n"
    new = box.path / "new.yaml"
    for _ in range(2):
        assert run(capsys, [*command, str(new)]).code == 0
    assert yaml.safe_load(new.read_text())["data"] == str(box.data)


def test_the_file_of_a_folder_made_in_two_goes_repeats_both(box: Box, capsys):
    for attacks in ("loss", "sama"):
        assert run(capsys, box.command(attacks=attacks)).code == 0
    kept = yaml.safe_load((box.out / "audit.yaml").read_text())
    assert set(kept["attacks"]) == {"loss", "sama"}
    assert kept["primary"] == "loss"  # what was declared before the first pass
    again = box.path / "again"
    argv = ["audit", "--config", str(box.out / "audit.yaml"), "--out", str(again)]
    assert run(capsys, argv).code == 0
    first, second = (json.loads((x / "metrics.json").read_text()) for x in (box.out, again))
    assert second["attacks"] == first["attacks"]
    assert second["verdict"]["declared"] == first["verdict"]["declared"]
