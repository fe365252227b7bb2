"""Gates about losses: each fires on what it is for, and on nothing else."""

import numpy as np
import pytest

from sama_jax.core.frequencies import frequency_losses
from sama_jax.validity import bounds, losses, scores

N = 60
LABELS = np.arange(N) % 2


def sound(seed=0):
    """Losses of a target that knows members .3, non-members .1 nats better than its reference."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(3.0, 0.3, N)
    return reference - np.where(LABELS == 1, 0.3, 0.1) + rng.normal(0, 0.05, N), reference


def test_a_sound_audit_passes_every_gate():
    target, reference = sound()
    frequencies = np.full(N, 6.0)
    found = [
        losses.same_losses(np.full(N, 0.003)),
        losses.target_worse(target, reference, LABELS),
        losses.reference_better(target, reference),
        losses.learnt("target", target, frequencies),
        losses.learnt("reference", reference, frequencies),
        losses.same_arithmetic("float32", "float32"),
        scores.ties("sama", reference - target, LABELS),
        scores.missing_scores("sama", reference - target, LABELS),
    ]
    assert {one["status"] for one in found} == {"pass"}
    assert not any(one["remedy"] for one in found)


def test_models_that_are_one_are_void():
    found = losses.same_losses(np.where(np.arange(N) < 40, 1.0, 0.0))
    assert (found["status"], found["statistic"]) == ("void", pytest.approx(2 / 3))
    assert found["bound"] == bounds.SAME_SHARE
    assert "never trained" in found["remedy"]


def test_exchanged_models_are_void_and_an_overfitted_target_is_not():
    target, reference = sound()
    found = losses.target_worse(reference + 1.0, target, LABELS)
    assert found["status"] == "void"
    # Members much better, non-members much worse: that is what an attack finds.
    overfitted = reference + np.where(LABELS == 1, -2.0, 1.5)
    assert losses.target_worse(overfitted, reference, LABELS)["status"] == "pass"
    assert losses.target_worse(overfitted, reference, np.zeros(N, int))["status"] == "pass"
    assert losses.target_worse(overfitted + 3, reference, LABELS)["status"] == "void"
    other = losses.target_worse(overfitted + 3, reference, LABELS, "span")
    assert other["status"] == "warn"
    assert "nats a span above" in other["sentence"]


def test_a_reference_that_is_better_on_most_texts_is_a_warning():
    target, reference = sound()
    assert losses.reference_better(reference, target)["status"] == "warn"


@pytest.mark.parametrize("role", ["target", "reference"])
def test_a_model_that_knows_no_more_than_frequencies_is_void(role):
    frequencies = np.full(N, 5.9)
    found = losses.learnt(role, np.full(N, 6.0), frequencies)
    assert (found["name"], found["status"]) == (f"{role}_learnt", "void")
    assert "rotary base" in found["remedy"]
    assert losses.learnt(role, np.full(N, 5.8), frequencies)["status"] == "pass"
    few = np.where(np.arange(N) < bounds.MIN_TEXTS - 1, 6.0, np.nan)
    assert losses.learnt(role, few, frequencies)["status"] == "not run"


def test_nothing_read_is_not_run():
    empty = np.full(N, np.nan)
    found = [
        losses.same_losses(empty),
        losses.target_worse(empty, empty, LABELS),
        losses.reference_better(empty, empty),
        losses.learnt("target", empty, empty),
        scores.ties("sama", empty, LABELS),
    ]
    assert {one["status"] for one in found} == {"not run"}
    assert all(one["statistic"] is None for one in found)


def test_two_arithmetics_are_a_warning():
    assert losses.same_arithmetic("float32", "bfloat16")["status"] == "warn"


def test_ties_weaken_and_equal_scores_void():
    assert scores.ties("sama", np.ones(N), LABELS)["status"] == "void"
    assert scores.ties("sama", np.round(np.linspace(0, 1, N)), LABELS)["status"] == "warn"
    # One score in six of all non-members is the highest one.
    top = np.linspace(0, 1, N)
    top[(LABELS == 0) & (np.arange(N) % 12 == 0)] = 2
    assert scores.ties("sama", top, LABELS)["status"] == "warn"


def test_scores_that_one_class_lacks_are_a_warning():
    values = np.linspace(0, 1, N)
    values[(LABELS == 1) & (np.arange(N) < 20)] = np.nan
    assert scores.missing_scores("sama", values, LABELS)["status"] == "warn"
    values = np.where(np.arange(N) < 10, np.nan, values)
    few = np.where(np.arange(N) < 0.9 * N, np.nan, np.linspace(0, 1, N))
    assert scores.missing_scores("sama", few, LABELS)["status"] == "warn"
    fair = np.linspace(0, 1, N)
    fair[:10] = np.nan
    assert scores.missing_scores("sama", fair, LABELS)["status"] == "pass"


def test_frequencies_leave_each_text_out():
    texts = [np.array([1, 1, 2]), np.array([2, 3]), np.array([], int), np.array([9])]
    found = frequency_losses(texts)
    # Of the first text: 3 other tokens, 4 kinds; nobody else has a 1, one has a 2.
    expected = -(2 * np.log(1 / 7) + np.log(2 / 7)) / 3
    assert found[0] == pytest.approx(expected)
    assert np.isnan(found[2])
    assert np.isnan(frequency_losses([np.array([1, 2])])).all()
