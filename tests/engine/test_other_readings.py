"""A model that is read otherwise than it was trained is refused; one read rightly never is."""

import re

import jax
import numpy as np
import pytest
import trained

from sama_jax.core.frequencies import frequency_losses
from sama_jax.engine import other_readings
from sama_jax.errors import ModelError

MASKS = (0, 50, 299)


@pytest.fixture(scope="module")
def texts():
    return list(trained.tokens(48, seed=9))


def frequencies(texts):
    return float(np.nanmean(frequency_losses(texts)))


def check(texts, weights=None, **changes):
    network = trained.model(**changes)
    weights = trained.params() if weights is None else weights
    return other_readings.check(network, weights, texts, frequencies(texts), MASKS)


def test_a_model_that_is_read_as_it_was_trained_passes(texts):
    assert check(texts) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 100.0 * 25}, "with a rotary base 0.1 times as large"),
        ({"rope_theta": 100.0 / 25}, "with a rotary base 10 times as large"),
        ({"mask_token_id": 50}, "masked by token 299"),
    ],
)
def test_a_wrong_field_of_the_config_is_named_by_what_predicts_better(texts, changes, named):
    with pytest.raises(ModelError, match=re.escape(named)):
        check(texts, **changes)


def test_texts_that_run_the_other_way_are_read_better_backwards(texts):
    own = other_readings.Reading("own", trained.model(), trained.model().mask_id)
    others = other_readings.other_readings(trained.model(), MASKS)
    turned = [ids[::-1] for ids in texts]
    rest = trained.params(), turned, frequencies(turned)
    assert other_readings.better_readings(own, others, *rest)[0].name == "backwards"


@pytest.mark.parametrize(("lead", "refused"), [(0.012, False), (0.03, True)])
def test_a_model_that_knows_next_to_nothing_is_refused_only_for_more(
    texts, lead, refused, monkeypatch
):
    """Both leads are half of what the model then knows beyond the frequencies."""
    own = frequencies(texts) - lead
    found = [other_readings.Lead("backwards", lead, 0.001, own, 96)]
    monkeypatch.setattr(other_readings, "better_readings", lambda *_: found)
    if refused:
        with pytest.raises(ModelError, match="read backwards"):
            check(texts)
    else:
        assert check(texts) is not None


def test_few_or_short_texts_and_a_model_that_knows_nothing_cannot_tell(texts):
    wrong = {"mask_token_id": 50}
    assert check(texts[: other_readings.LEAST_TEXTS - 1], **wrong) is None
    assert check([ids[: other_readings.SHORTEST - 1] for ids in texts], **wrong) is None
    nothing = jax.tree.map(lambda x: x / 100, trained.params())
    assert check(texts, nothing, **wrong) is None
