"""Wrong flags and settings: one clear line, exit code 2, no remains."""

from typing import Any

import pytest
from wrong_inputs import (
    Box,
    contents,
    refuse,
    run,
)

from sama_jax.config import SamaSettings
from sama_jax.errors import UsageError

USAGE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "attack": ({"attacks": "samma"}, ["unknown attack 'samma'", "did you mean 'sama'?"]),
    "one of two attacks": ({"attacks": "sama,losss"}, ["'losss'", "'loss'"]),
    "no attack": ({"attacks": ","}, ["no attack given", "sama"]),
    "preset": ({"preset": "offical"}, ["unknown preset 'offical'", "did you mean 'official'?"]),
    "setting": (
        {"set": "sama.step=8"},
        ["unknown setting 'sama.step'", "did you mean 'sama.steps'?"],
    ),
    "unlike any": ({"set": "zzz=8"}, ["unknown setting 'zzz'", "sama.steps"]),
    "group": ({"set": "sama=8"}, ["'sama' is a group", "steps"]),
    "no group": ({"set": "seed.x=8"}, ["'seed.x'", "not a group"]),
    "no value": ({"set": "sama.steps"}, ["expected key=value", "'sama.steps'"]),
    "number is a word": ({"set": "sama.steps=x"}, ["sama.steps", "int", "'x'"]),
    "word is unknown": ({"set": "sama.nesting=nestd"}, ["nesting", "did you mean 'nested'?"]),
    "flag is a word": ({"set": "sama.exclude_special=maybe"}, ["true or false", "'maybe'"]),
    "steps 0": ({"set": "sama.steps=0"}, ["steps must lie in 1..65535, got 0"]),
    "density": ({"set": "sama.min_density=0.9"}, ["min_density", "0.9"]),
    "density nan": ({"set": "sama.max_density=nan"}, ["max_density", "nan"]),
    "preset by --set": ({"set": "preset=paper"}, ["preset", "--preset"]),
    "limit 0": ({"limit": 0}, ["--limit must be at least 1"]),
    "limit is a word": ({"limit": "ten"}, ["--limit", "'ten'"]),
    "batch size": ({"batch_size": 0}, ["--batch-size must be at least 1"]),
    "passes": ({"passes": 0}, ["--passes must be at least 1"]),
    "seed": ({"seed": -1}, ["seed", "-1"]),
    "seed is too large": ({"seed": 2**32}, ["seed", str(2**32)]),
    "length 0": ({"max_length": 0}, ["max_length", "0"]),
    "length is too large": ({"max_length": 65536}, ["max_length", "65536"]),
    "padding": ({"pad_to": 64}, ["pad_to", "--padding visible"]),
    "pad to less": ({"pad_to": 16, "padding": "visible"}, ["pad_to (16)", "max_length (32)"]),
    "dtype": ({"dtype": "float16"}, ["--dtype", "'float16'", "bfloat16"]),
    "no texts": ({"data": None}, ["--data F", "--members F"]),
    "half a split": ({"data": None, "members": "x"}, ["--data F", "--nonmembers F"]),
    "both kinds of texts": ({"members": "x", "nonmembers": "y"}, ["either --data F"]),
    "no target": ({"target": None}, ["--target"]),
    "unknown flag": ({"tempo": 3}, ["--tempo"]),
    "plan without sama": ({"attacks": "loss", "save_plan": "p.npz"}, ["--save-plan", "sama"]),
    "losses without sama": ({"attacks": "loss", "save_losses": "p.npz"}, ["--save-losses", "sama"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_flags_and_settings(case: str, box: Box, capsys):
    changes, fragments = USAGE[case]
    refuse(capsys, box, box.command(**changes), 2, *fragments)


TRAINING: dict[str, tuple[list[str], list[str]]] = {
    "epochs nan": (["--epochs", "nan"], ["epochs", "number", "nan"]),
    "epochs 0": (["--epochs", "0"], ["epochs must be positive"]),
    "rate": (["--lr", "inf"], ["--lr", "number", "inf"]),
    "batch size": (["--batch-size", "0"], ["batch_size must lie in 1..65535"]),
    "seed": (["--seed", "-1"], ["seed", "-1"]),
    "never a checkpoint": (["--set", "checkpoint_every=0"], ["checkpoint_every", "0"]),
    "clip": (["--set", "grad_clip=-1"], ["grad_clip must lie in 0.."]),
    "decay": (["--set", "weight_decay=-0.1"], ["weight_decay must lie in 0..1000", "-0.1"]),
    "eps": (["--set", "eps=1"], ["eps must lie between 0 and 1"]),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_settings(case: str, box: Box, capsys):
    flags, fragments = TRAINING[case]
    command = ["finetune", "--base", str(box.target), "--data", str(box.data), "--quiet"]
    refuse(capsys, box, [*command, "--out", str(box.out), *flags], 2, *fragments)


def test_the_demo_s_seed(box: Box, capsys):
    refuse(capsys, box, ["demo", "--seed", "-1", "--out", str(box.out)], 2, "seed", "-1")


def test_settings_that_limit_each_other_come_in_any_order(box: Box, capsys):
    """Each alone contradicts a default: 0.6 the highest density, 64 hidden padding."""
    pairs = ["sama.min_density=0.6", "sama.max_density=0.9", "pad_to=64", "padding=visible"]
    command = [*box.command(dry_run=True), *(x for pair in pairs for x in ("--set", pair))]
    assert run(capsys, command).code == 0


@pytest.mark.parametrize("change", [{"steps": 2.5}, {"steps": True}, {"exclude_special": "no"}])
def test_settings_of_another_type(change: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(change))):
        SamaSettings(**change)


def test_unknown_command(box: Box, capsys):
    refuse(capsys, box, ["audti"], 2, "audti", "audit", "--help")
    refuse(capsys, box, [], 2, "COMMAND")


@pytest.mark.parametrize("mask_id", [-1, 300])
def test_mask_id_outside_the_embedding(mask_id: int, box: Box, capsys):
    refuse(capsys, box, box.command(mask_id=mask_id), 4, str(mask_id), "300 rows")


def test_a_dry_run_writes_nothing(box: Box, capsys):
    before = contents(box.path)
    command = [part for part in box.command(dry_run=True) if part != "--quiet"]
    said = run(capsys, command)
    assert said.code == 0
    assert "20 texts, 160 forward passes" in said.err
    assert contents(box.path) == before
    assert not box.out.exists()
