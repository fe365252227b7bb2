"""BD3-LM against a plain PyTorch module of ours: every block behind the text without masks.

Ours reads a text with masks and the text itself in one pass; the oracle reads block by block, each
behind the clean blocks before it, as these models generate.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle_dit
import pytest
import torch

from sama_jax.arrays import ForwardBatch
from sama_jax.core import losses
from sama_jax.models.attention_mask import mask_of
from sama_jax.models.registry import read_config
from sama_jax.training import step
from sama_jax.weights import loading, model_folder

LENGTH, MASK_ID = 200, oracle_dit.MASK_ID
# As in test_parity.py: float32 sums in another order; a wrong formula is off by 1e-2 or more.
LOGITS, NLL = 1e-4, 1e-5
VARIANTS: dict[str, dict[str, Any]] = {
    "modulated": {"block_size": 48},  # which does not divide the length
    "plain": {"block_size": 100, "adaln": False},
}
RNG = np.random.default_rng(0)
TEXTS = RNG.integers(0, MASK_ID, (4, LENGTH)).astype(np.int32)
SHARES = np.array([[0.1], [0.3], [0.6], [0.9]])
MASKS = RNG.random(TEXTS.shape) < SHARES
TOKENS = np.where(MASKS, MASK_ID, TEXTS).astype(np.int32)
EVERYWHERE = np.ones_like(MASKS)


class Pair(NamedTuple):
    """The same weights in both networks."""

    module: oracle_dit.Dit
    model: Any
    params: Any
    block: int


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(variant)`, each written and loaded once."""

    @functools.cache
    def make(variant: str) -> Pair:
        path, changes = tmp_path_factory.mktemp(variant), VARIANTS[variant]
        config = oracle_dit.bd3lm_config(**changes)
        module = oracle_dit.random_folder(path, config, list(VARIANTS).index(variant), shards=3)
        folder = model_folder.open_folder(path, dtype="float32")
        params = loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        return Pair(module, folder.model, params, changes["block_size"])

    return make


def by_blocks(both: Pair, tokens: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """The oracle's head output without the mask token."""
    head = both.module.by_blocks(*(torch.from_numpy(x).long() for x in (tokens, clean)), both.block)
    return np.where(np.arange(head.shape[-1]) == MASK_ID, -np.inf, head.numpy())


def nll(logits: np.ndarray, answers: np.ndarray = TEXTS) -> np.ndarray:
    """Loss of every answer, from float32 logits, in float64."""
    log_p = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
    return -np.take_along_axis(log_p, answers[..., None], -1)[..., 0]


def ours(both: Pair, clean: np.ndarray | None) -> np.ndarray:
    hidden = jax.jit(both.model.hidden)(both.params, TOKENS, EVERYWHERE, clean)
    return np.array(jax.jit(both.model.logits)(both.params, hidden))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_losses_equal_pytorch(pair, variant, record_parity):
    both = pair(variant)
    expected, actual = by_blocks(both, TOKENS, TEXTS), ours(both, TEXTS)
    assert expected[..., :MASK_ID].std() > 0.3, "logits too flat to tell anything"
    difference = np.abs(actual - expected)[..., :MASK_ID].max()
    loss_difference = np.abs(nll(actual) - nll(expected))[MASKS].max()
    record_parity("BD3-LM", difference, loss_difference)
    assert difference < LOGITS
    assert loss_difference < NLL


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_clean_text_masks_stand_in_all_blocks(pair, variant):
    """As in a pass of their sampler, whose masks all stand in the last block."""
    both = pair(variant)
    ids, sigma = torch.from_numpy(TOKENS).long(), torch.zeros(len(TOKENS))
    head, weights = (x.numpy()[..., :MASK_ID] for x in both.module(ids, sigma, both.block))
    np.testing.assert_allclose(ours(both, None)[..., :MASK_ID], head, rtol=0, atol=LOGITS)
    attention = jax.jit(both.model.attention)(both.params, TOKENS, EVERYWHERE)
    np.testing.assert_allclose(attention, weights, rtol=0, atol=1e-6)
    clean = by_blocks(both, TOKENS, TEXTS)[..., :MASK_ID]
    assert np.abs(head - clean)[:, : both.block].max() < LOGITS  # nothing stands before the first
    assert np.abs(head - clean)[:, both.block :].max() > 100 * LOGITS


def test_scoring_and_training_show_each_block_the_text_without_masks(pair):
    """Of texts of several lengths: what follows a text in its last block is hidden."""
    both, lengths = pair("modulated"), np.array([LENGTH, 144, 131, 9])
    valid = np.arange(LENGTH) < lengths[:, None]
    masks = (np.random.default_rng(2).random((2, *valid.shape)) < [[[0.2]], [[0.7]]]) & valid
    positions = losses.scored_positions(masks, LENGTH)
    batch = ForwardBatch(TEXTS, valid, masks, positions, np.zeros(2, np.int32), np.int32(2))
    score = jax.jit(losses.loss_batch, static_argnums=(0, 1))
    values = np.asarray(score(both.model, (LENGTH,), both.params, batch))
    for mask, at, value in zip(masks, positions, values):
        expected, tokens = np.zeros(mask.shape), np.where(mask, MASK_ID, TEXTS).astype(np.int32)
        for row, n in enumerate(lengths):
            text = slice(row, row + 1), slice(0, n)
            expected[text] = nll(by_blocks(both, tokens[text], TEXTS[text]), TEXTS[text])
        found = np.take_along_axis(expected, np.maximum(at, 0), axis=1)
        assert np.abs(value - found)[at >= 0].max() < NLL
        counted = step.Objective(jnp.asarray(tokens), jnp.asarray(mask), jnp.ones(4), jnp.ones(()))
        loss = jax.jit(step.loss_of, static_argnums=0)
        sum_of_losses = loss(both.model, both.params, TEXTS, valid, counted)
        assert float(sum_of_losses) == pytest.approx(expected[mask].sum(), rel=1e-5)


def test_its_config_says_what_a_block_sees():
    def arch(**changes: Any) -> Any:
        return read_config(oracle_dit.bd3lm_config(**changes), "here").arch

    assert mask_of(arch()) == "clean:48"
    assert mask_of(arch(cross_attn=False)) == "full"
    assert mask_of(arch(block_size=256)) == "full"  # the length of its texts
    assert mask_of(arch(attention_mask="block:16")) == "block:16"
    assert arch().modulated
    assert not arch(adaln=False).modulated
    assert read_config(oracle_dit.bd3lm_config(), "here").max_length == 256
