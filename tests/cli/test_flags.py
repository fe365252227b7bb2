"""Flags come from fields: the same defaults and choices, and the values of the fields again."""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest

from sama_jax import config
from sama_jax.cli import entry, flags
from sama_jax.config import AuditSettings, Flag, TrainSettings
from sama_jax.errors import UsageError
from sama_jax.programs.jobs import AuditJob, BenchJob, PlanJob

GOOD: dict[str, list[str]] = {
    "audit": ["--target", "t", "--reference", "r", "--data", "d", "--out", "o"],
    "finetune": ["--base", "b", "--data", "d", "--out", "o"],
    "plan": ["--model", "m", "--topology", "cpu:2"],
    "bench": ["--model", "m", "--data", "d"],
    "attacks": [],
    "nll": ["--model", "m", "--data", "d", "--out", "o"],
}


def parse(command: str, *more: str) -> argparse.Namespace:
    return entry.build_parser().parse_args([command, *GOOD[command], *more])


@pytest.mark.parametrize(
    ("command", "kind", "expected"),
    [
        ("audit", AuditSettings, AuditSettings()),
        ("attacks", AuditSettings, AuditSettings()),
        ("plan", AuditSettings, AuditSettings()),
        ("nll", AuditSettings, AuditSettings()),
        ("bench", AuditSettings, AuditSettings(preset="official")),
        ("finetune", TrainSettings, TrainSettings()),
    ],
)
def test_without_flags_a_command_has_the_defaults_of_the_fields(command, kind, expected):
    assert flags.settings_of(parse(command), kind) == expected


@pytest.mark.parametrize(
    "twice",
    [["--data", "e"], ["--data", "d"], ["--seed", "1", "--seed", "2"], ["--models=auto"] * 2],
)
def test_a_flag_that_takes_one_value_is_refused_twice(twice, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("audit", *twice)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "is given twice" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "kind", "twice"),
    [
        ("audit", AuditSettings, ["--seed", "42", "--set", "seed=2"]),  # its default, but given
        ("audit", AuditSettings, ["--passes", "8", "--set", "passes=3"]),
        ("plan", AuditSettings, ["--max-length", "64", "--set", "max_length=32"]),
        ("finetune", TrainSettings, ["--lr", "0.1", "--set", "learning_rate=0.2"]),
        ("finetune", TrainSettings, ["--train-on-padding", "--set", "train_on_padding=1"]),
    ],
)
def test_a_flag_is_not_replaced_by_a_setting(command, kind, twice):
    with pytest.raises(UsageError, match="is given twice"):
        flags.settings_of(parse(command, *twice), kind)
    assert flags.settings_of(parse(command, *twice[-2:]), kind) != kind()


@pytest.mark.parametrize("number", [["--limit", "1_0"], ["--seed", "1e3"], ["--margin", "0.6_1"]])
def test_a_number_is_a_plain_decimal(number, capsys):
    with pytest.raises(SystemExit):
        parse("audit", *number)
    assert "number, found" in capsys.readouterr().err


def test_a_flag_that_repeats_and_a_second_command_line_are_taken():
    for _ in range(2):
        parsed = parse("audit", "--set", "sama.steps=2", "--set", "padding=visible", "--seed", "1")
        assert parsed.set == ["sama.steps=2", "padding=visible"]


@pytest.mark.parametrize("kind", [AuditSettings, TrainSettings])
def test_a_setting_is_refused_twice(kind):
    with pytest.raises(UsageError, match="setting 'seed' is given twice"):
        kind.of(overrides=["seed=1", "seed = 2"])


def test_a_job_without_flags_has_the_defaults_of_its_fields():
    """But for what the command reads from files or names in another way."""
    texts: Any = object()
    own: dict[str, Any] = {"texts": texts, "prefixes": None, "command": "", "attacks": ["sama"]}
    own |= {"control": None, "flags": {}}
    job = AuditJob(**(flags.values_of(parse("audit"), AuditJob) | own))
    target, reference, out = Path("t"), Path("r"), Path("o")
    plain = AuditJob(target=target, reference=[reference], out=out, **own)
    assert replace(job, peers=plain.peers) == plain

    own = {"models": 2, "attacks": ["sama"]}
    job = PlanJob(**(flags.values_of(parse("plan"), PlanJob) | own))
    assert job == PlanJob(model=Path("m"), topology="cpu:2", **own)

    own = {"texts": [], "settings": AuditSettings()}
    job = BenchJob(**(flags.values_of(parse("bench"), BenchJob) | own))
    assert job == BenchJob(model=Path("m"), **own)


def test_flags_change_the_fields_of_their_names():
    more = [
        "--max-length",
        "64",
        "--dtype",
        "bfloat16",
        "--padding",
        "visible",
        "--pad-to",
        "80",
        "--seed",
        "7",
        "--preset",
        "official",
        "--passes",
        "8",
        "--set",
        "tail.parts=3",
        "--no-figures",
        "--batch-size",
        "3",
        "--mask-id",
        "9",
        "--models",
        "in-turn",
        "--attacks",
        "sama, loss",
    ]
    args = parse("audit", *more)
    settings = flags.settings_of(args, AuditSettings)
    expected = AuditSettings.of(
        "official",
        passes=8,
        overrides=["tail.parts=3"],
        max_length=64,
        dtype="bfloat16",
        padding="visible",
        pad_to=80,
        seed=7,
    )
    assert settings == expected
    job = flags.values_of(args, AuditJob)
    assert (job["figures"], job["batch_size"], job["mask_id"]) == (False, 3, 9)
    assert (job["models"], job["attacks"]) == ("in-turn", ["sama", "loss"])
    assert flags.settings_of(parse("finetune", "--lr", "0.1"), TrainSettings).learning_rate == 0.1


@pytest.mark.parametrize("wrong", [-4, 0])
def test_a_job_takes_no_number_of_texts_below_one(wrong: Any):
    common: dict[str, Any] = {"target": Path("t"), "reference": Path("r"), "out": Path("o")}
    with pytest.raises(UsageError, match="limit must be a whole number"):
        AuditJob(**common, texts=object(), limit=wrong)  # pyright: ignore
    with pytest.raises(UsageError, match="batch_size must be a whole number"):
        BenchJob(model=Path("m"), texts=[], settings=AuditSettings(), batch_size=wrong)


def test_the_choices_of_a_flag_are_those_of_its_field(capsys):
    for word in get_args(config.Dtype):
        assert parse("audit", "--dtype", word).dtype == word
    with pytest.raises(SystemExit):
        parse("audit", "--dtype", "float16")
    said = capsys.readouterr().err
    assert all(word in said for word in get_args(config.Dtype))


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A field of every kind."""

    place: Annotated[Path, Flag("where", "DIR")]
    count: Annotated[int | None, Flag("how many", "N")] = None
    kind: Annotated[Literal["a", "b"], Flag("which")] = "a"
    rate: Annotated[float, Flag(name="--r")] = 0.5
    hidden: Annotated[bool, Flag("hides it")] = False
    shown: Annotated[bool, Flag("hides it, too")] = True
    plain: int = 3


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ([], {}),
        (["--count", "4", "--kind", "b", "--r", "2"], {"count": 4, "kind": "b", "rate": 2.0}),
        (["--hidden", "--no-shown", "--plain", "5"], {"hidden": True, "shown": False, "plain": 5}),
    ],
)
def test_a_field_of_every_kind(given: list[str], changed: dict[str, Any]):
    parser = argparse.ArgumentParser()
    flags.flags_of(parser, Toy, *(field.name for field in fields(Toy)))
    args = parser.parse_args(["--place", "here", *given])
    assert Toy(**flags.values_of(args, Toy)) == Toy(place=Path("here"), **changed)
    shown = parser.format_help()
    assert "where" in shown
    assert "which (default: a)" in shown
    assert "how many\n" in shown  # no default to show
