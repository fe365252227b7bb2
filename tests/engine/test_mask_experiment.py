"""The experiment on masks of attention, small: two masks named, an untrained model's not."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "statistics" / "masks.py"


@pytest.fixture(scope="module")
def masks():
    spec = importlib.util.spec_from_file_location("masks_experiment", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mask", ["causal", "block:8"])
def test_texts_that_a_model_knows_by_heart_name_the_mask_that_it_was_trained_with(masks, mask):
    assert list(masks.answers(mask, range(1), 900)) == [(mask, masks.CANNOT_TELL)]
