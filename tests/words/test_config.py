"""Settings: one place for each default, presets that agree with their names, overrides."""

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest

from sama_jax import config
from sama_jax.config import (
    PRESETS,
    AuditSettings,
    PrefixSettings,
    SamaSettings,
    TrainSettings,
    from_dict,
    override,
    settings_hash,
)
from sama_jax.errors import UsageError


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_once(name: str):
    for settings in (AuditSettings(preset=name), AuditSettings.of(name)):
        assert settings.sama == PRESETS[name]
        assert settings.preset_label == name


def test_a_preset_s_settings_that_are_changed_are_said_to_be():
    assert AuditSettings.of("paper", overrides=["sama.steps=8"]).preset_label == "paper, changed"
    assert AuditSettings(preset="paper", sama=SamaSettings()).preset_label == "paper, changed"
    assert AuditSettings.of("paper", overrides=["seed=8"]).preset_label == "paper"


def test_an_unknown_preset_is_refused():
    for make in (AuditSettings.of, lambda name: AuditSettings(preset=name)):
        with pytest.raises(UsageError, match="did you mean 'official'"):
            make("offical")
    with pytest.raises(UsageError, match="choose one with --preset"):
        AuditSettings.of(overrides=["preset=paper"])


def test_passes_are_the_budget_of_all_attacks():
    settings = AuditSettings.of("paper", passes=8, overrides=["sama.subsets=4"], max_length=9)
    assert (settings.passes, settings.sama.steps, settings.sama.repeats) == (8, 2, 4)
    assert (settings.budget, settings.sama.subsets, settings.max_length) == (8, 4, 9)
    with pytest.raises(UsageError, match="multiple of 4"):
        AuditSettings.of("paper", passes=6)
    with pytest.raises(UsageError, match="at least 1"):
        AuditSettings.of(passes=0)


@pytest.mark.parametrize("kind", [AuditSettings, TrainSettings])
def test_a_setting_is_given_once(kind):
    for twice in ({"overrides": ["seed=1", "seed = 1"]}, {"overrides": ["seed=2"], "seed": 1}):
        with pytest.raises(UsageError, match="'seed' is given twice"):
            kind.of(**twice)
    with pytest.raises(UsageError, match="'passes' is given twice"):
        AuditSettings.of(passes=8, overrides=["passes=3"])


@pytest.mark.parametrize("number", ["max_length=1_2", "sama.min_density=0.1_5"])
def test_a_number_with_underscores_is_none(number):
    with pytest.raises(UsageError, match="must be of type"):
        AuditSettings.of(overrides=[number])


def test_overrides_hold_together_whatever_their_order():
    pair = ["sama.min_density=0.6", "sama.max_density=0.9"]
    assert AuditSettings.of(overrides=pair) == AuditSettings.of(overrides=pair[::-1])
    with pytest.raises(UsageError, match="min_density"):
        AuditSettings.of(overrides=pair[:1])


def test_settings_survive_a_manifest():
    settings = AuditSettings.of("official", prefix=PrefixSettings(shots=2), passes=4)
    assert from_dict(AuditSettings, dataclasses.asdict(settings)) == settings
    with pytest.raises(UsageError, match="another version"):
        from_dict(AuditSettings, {"tempo": 3})


def test_training_settings_take_fields_then_overrides():
    made = TrainSettings.of(overrides=["epochs=2", "eps=0.1"], windows=True)
    assert (made.epochs, made.eps, made.windows) == (2.0, 0.1, True)
    assert override(made, []) == made


NUMBERS = [
    (kind, name)
    for kind in vars(config).values()
    if dataclasses.is_dataclass(kind)
    for name, hint in get_type_hints(kind).items()
    if hint in (int, float)
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_every_number_has_a_smallest_and_a_largest_value(kind, name):
    for value in (-(10**12), 10**12, 10**400, math.nan, math.inf, None, "3", [3], True):
        with pytest.raises(UsageError, match=f"setting {name} must") as caught:
            kind(**{name: value})
        assert len(str(caught.value)) < 200


def test_sizes_that_are_too_large_together_are_refused():
    SamaSettings(steps=16, subsets=1024, subset_size=1024)
    with pytest.raises(UsageError, match="is 16,793,600, expected at most 16,777,216"):
        SamaSettings(steps=16, subsets=1025, subset_size=1024)
    AuditSettings.of(passes=512, max_length=65535)
    for fields in ({"passes": 1024}, {"overrides": ["likelihood.passes=1024"]}):
        with pytest.raises(UsageError, match="1024 passes over 65535 tokens"):
            AuditSettings.of(max_length=65535, **fields)


@pytest.mark.parametrize("value", [["x"] * 10**6, {"a": 1}, "x" * 10**6, None, 3])
def test_a_word_of_another_kind_is_told_briefly(value):
    for make in (SamaSettings, AuditSettings):
        name = "nesting" if make is SamaSettings else "dtype"
        with pytest.raises(UsageError, match=f"setting {name} is ") as caught:
            make(**{name: value})
        assert len(str(caught.value)) < 200
    with pytest.raises(UsageError, match="unknown preset"):
        AuditSettings(preset=value)


def test_a_hash_sees_every_field():
    base, hints = SamaSettings(), get_type_hints(SamaSettings)
    hashes = {settings_hash(base)}
    for name, value in dataclasses.asdict(base).items():
        kind = hints[name]
        words = (False, True) if kind is bool else get_args(kind)
        others = [word for word in words if word != value]
        changed = others[0] if others else kind(math.ceil(2 * value) if kind is int else value / 2)
        hashes.add(settings_hash(dataclasses.replace(base, **{name: changed})))
    assert len(hashes) == 1 + len(dataclasses.fields(base))
