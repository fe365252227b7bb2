"""A model that is read otherwise than it was trained is refused; one read rightly never is."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trained

from sama_jax.core.frequencies import frequency_losses
from sama_jax.engine import other_readings
from sama_jax.errors import ModelError
from sama_jax.models.registry import build_model, read_config
from sama_jax.training import step

MASKS = (0, 50, 299)


@pytest.fixture(scope="module")
def texts():
    return list(trained.tokens(48, seed=9))


def frequencies(texts):
    return float(np.nanmean(frequency_losses(list(texts))))


def check(texts, weights=None, **changes):
    network = trained.model(**changes)
    weights = trained.params() if weights is None else weights
    return other_readings.check(network, weights, texts, frequencies(texts), MASKS)


def test_a_model_that_is_read_as_it_was_trained_passes(texts):
    assert check(texts) == (None, True)


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
    assert other_readings.better_readings(own, others, *rest)[0][0].read.name == "backwards"


def test_texts_name_the_mask_of_attention_that_a_model_was_trained_with():
    """`experiments/statistics/masks.py` does so for more masks and seeds."""
    full, known = trained.model(), trained.tokens(64, seed=100)
    network = dataclasses.replace(full, arch=dataclasses.replace(full.arch, block_length=8))
    untrained = trained.first(network, 0)
    weights = trained.train(network, untrained, known, 400, 1e-2)
    rest = list(known), frequencies(known), MASKS
    assert other_readings.check(network, weights, *rest) == (None, True)
    with pytest.raises(ModelError, match=r"mask block:8 it.*--attention-mask block:8, or full to"):
        other_readings.check(full, weights, *rest)
    asked = other_readings.check(full, weights, *rest, asked_mask=True)
    assert asked.warning is not None
    assert "read with attention mask block:8" in asked.warning
    assert other_readings.check(full, untrained, *rest) == (None, False)


def test_blocks_behind_clean_text_are_compared_with_their_like_alone():
    """What shows more of a text predicts it better, whatever the model was trained with."""
    model = trained.model()
    arch = dataclasses.replace(model.arch, block_length=8, clean_context=True)
    network = dataclasses.replace(model, arch=arch)
    named = [read.mask for read in other_readings.other_attention(network, (None, 1, 8, 16), 32)]
    assert named == ["full", "clean:1", "clean:16"]


@pytest.mark.parametrize(("lead", "refused"), [(0.012, False), (0.03, True)])
def test_a_model_that_knows_next_to_nothing_is_refused_only_for_more(
    texts, lead, refused, monkeypatch
):
    """Both leads are half of what the model then knows beyond the frequencies."""
    own = frequencies(texts) - lead
    turned = other_readings.Reading("backwards", trained.model(), 0, backwards=True)
    found = [other_readings.Lead(turned, lead, 0.001, own, 96)]
    monkeypatch.setattr(other_readings, "better_readings", lambda *_: (found, own))
    if refused:
        with pytest.raises(ModelError, match="read backwards"):
            check(texts)
    else:
        assert check(texts).warning is not None


def test_few_or_short_texts_and_a_model_that_knows_nothing_cannot_tell(texts):
    wrong = {"mask_token_id": 50}
    assert check(texts[: other_readings.LEAST_TEXTS - 1], **wrong) == (None, False)
    assert check([ids[: other_readings.SHORTEST - 1] for ids in texts], **wrong) == (None, False)
    nothing = jax.tree.map(lambda x: x / 100, trained.params())
    assert check(texts, nothing, **wrong) == (None, False)


CAUSAL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
CAUSAL |= {"num_attention_heads": 2, "model_type": "llama", "max_position_embeddings": 64}


def causal(theta: float):
    family = read_config(CAUSAL | {"rope_theta": theta}, "config.json")
    return build_model(family, 0, np.dtype("float32"))


@pytest.fixture(scope="module")
def causal_weights():
    """A next-token model that has learnt the language."""
    network, optimizer = causal(100.0), optax.adam(1e-2)
    texts = jnp.asarray(trained.tokens(250 * 32, seed=1).reshape(250, 32, -1))
    first = jax.tree.map(
        lambda x: 5 * x if x.ndim > 1 else x, jax.jit(network.init)(jax.random.key(0))
    )

    def update(carry, tokens):
        weights, state = carry
        valid = jnp.ones(tokens.shape, bool)
        rest = network, weights, tokens, valid, jax.random.key(0), 0.0
        grads = jax.grad(step.loss_of_kind, argnums=1)(*rest)
        changes, state = optimizer.update(grads, state)
        return (optax.apply_updates(weights, changes), state), None

    run = jax.jit(lambda start: jax.lax.scan(update, start, texts)[0][0])
    return run((first, optimizer.init(first)))


def test_a_next_token_model_is_judged_as_well(texts, causal_weights):
    given = causal_weights, texts, frequencies(texts), MASKS
    assert other_readings.check(causal(100.0), *given) == (None, True)
    with pytest.raises(ModelError, match="with a rotary base 10 times as large"):
        other_readings.check(causal(4.0), *given)
    turned = [ids[::-1] for ids in texts]
    with pytest.raises(ModelError, match="read backwards"):
        other_readings.check(causal(100.0), causal_weights, turned, *given[2:])
