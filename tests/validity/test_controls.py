"""What an audit shows of nothing, of the same texts again, and of texts that were surely learnt."""

import numpy as np
import pytest

from sama_jax.core import metrics
from sama_jax.validity import bounds
from sama_jax.validity.scores import mask_noise, negative_control, pipeline_control

LEARNT = {"before": 3.0, "after": 2.0, "steps": 40}


def scores_of(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    draw = np.random.default_rng(seed)
    values, groups = draw.normal(size=120), None
    if kind == "tied":
        values = np.minimum(np.round(values), 1)
    if kind == "grouped":
        groups = np.arange(120) // 4
        values += 2 * draw.normal(size=30)[groups]
    if kind == "missing":
        values[::7] = np.nan
    return values, groups


@pytest.mark.parametrize("kind", ["continuous", "tied", "grouped", "missing"])
def test_sound_scores_tell_halves_of_nothing_apart_as_rarely_as_they_should(kind: str):
    found = [negative_control("sama", *scores_of(kind, seed)) for seed in range(10)]
    assert {one["status"] for one in found} == {"pass"}
    assert f"where {bounds.HALVINGS / 20:g} are expected" in found[0]["sentence"]
    # Of 500 intervals a share of .05 has a deviation of .01; the scores' own adds some.
    assert np.mean([one["statistic"] or 0 for one in found]) == pytest.approx(0.05, abs=0.04)


def test_intervals_that_are_too_narrow_void_the_audit(monkeypatch: pytest.MonkeyPatch):
    sound = metrics.auc_interval
    narrow = lambda *data: sound(*data, level=0.6)  # noqa: E731  misses two in five
    monkeypatch.setattr(metrics, "auc_interval", narrow)
    assert negative_control("sama", *scores_of("continuous", 0))["status"] == "void"


def test_documents_stay_whole_when_non_members_are_halved(monkeypatch: pytest.MonkeyPatch):
    def whole(values, half, units):
        assert all(len(set(half[units == unit])) == 1 for unit in units)
        assert 0 < half.sum() < len(half)
        return 0.0, 1.0

    monkeypatch.setattr(metrics, "auc_interval", whole)
    monkeypatch.setattr(bounds, "HALVINGS", 5)
    assert negative_control("sama", *scores_of("grouped", 0))["status"] == "pass"
    few = negative_control("sama", np.arange(200.0), np.arange(200) // 20)
    assert (few["status"], few["sentence"][:2]) == ("not run", "10")


@pytest.mark.parametrize(("noise", "status"), [(0.3, "pass"), (2.0, "warn")])
def test_scores_that_are_mostly_luck_of_the_masks_are_told(noise: float, status: str):
    draw, labels = np.random.default_rng(0), np.arange(200) % 2
    true = draw.normal(size=200) + labels
    first, second = (true + noise * draw.normal(size=200) for _ in range(2))
    second[150:] = np.nan
    found = mask_noise("sama", first, second, labels)
    assert found["status"] == status
    assert "on the same 150 texts" in found["sentence"]
    assert found["statistic"] == pytest.approx(np.corrcoef(first[:150], second[:150])[0, 1])


def test_aucs_that_differ_under_other_masks_are_both_told():
    labels = np.repeat([0, 1], 50)
    first = np.arange(100.0)
    second = np.r_[np.arange(0.0, 50), np.arange(30.0, 80)]
    assert "AUCs of 1.000 and 0.920" in mask_noise("sama", first, second, labels)["sentence"]
    assert "AUC" not in mask_noise("sama", first, first, labels)["sentence"]
    assert mask_noise("sama", first, np.ones(100), labels)["status"] == "not run"


def test_a_pipeline_that_does_not_find_what_was_learnt_is_told():
    labels, draw = np.repeat([1, 0], 32), np.random.default_rng(0)
    found = pipeline_control("sama", draw.normal(size=64) + 2 * labels, labels, **LEARNT)
    assert (found["status"], found["bound"]) == ("pass", bounds.CONTROL_P)
    assert "32 of the non-members (from 3.000 to 2.000 nats a token, in 40" in found["sentence"]
    lost = pipeline_control("sama", draw.normal(size=64), labels, **LEARNT)
    assert (lost["status"], "did not find" in lost["sentence"]) == ("warn", True)
    # One-sided: what ranks the learnt texts below the others has not found them.
    assert pipeline_control("sama", -2.0 * labels, labels, **LEARNT)["status"] == "warn"
    broken = LEARNT | {"after": float("nan")}
    assert pipeline_control("sama", np.zeros(0), labels[:0], **broken)["status"] == "warn"


def test_seven_texts_a_side_can_pass_and_six_cannot():
    for count, status in ((bounds.CONTROL_TEXTS, "pass"), (bounds.CONTROL_TEXTS - 1, "warn")):
        labels = np.repeat([1, 0], count)
        assert pipeline_control("sama", labels * 1.0, labels, **LEARNT)["status"] == status
