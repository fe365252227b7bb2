"""Masks of attention: what a token sees by their names, and where a name may stand."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from networks import NETWORKS

from sama_jax.devices import memory
from sama_jax.errors import ModelError, UsageError
from sama_jax.models.attention_mask import block_length_of, has_clean_context, mask_name, mask_of
from sama_jax.models.registry import read_config, with_attention_mask
from sama_jax.weights import loading, model_folder
from sama_jax.weights.identity import model_identity

LENGTH = 12
PLACES = np.arange(LENGTH)
SEEN = {
    "full": np.ones((LENGTH, LENGTH), bool),
    "causal": PLACES[None] <= PLACES[:, None],
    "block:5": PLACES[None] // 5 <= PLACES[:, None] // 5,
}
"""Mask -> [query, key] whether the query sees the key."""
EXPERTS = {
    **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"norm_topk_prob": True, "tie_word_embeddings": False},
}
OWN, BEFORE = (compare(PLACES[None] // 5, PLACES[:, None] // 5) for compare in (np.equal, np.less))


@functools.lru_cache
def weights(network: str) -> Any:
    made = jax.jit(NETWORKS[network].init)(jax.random.key(0))
    return jax.tree.map(lambda x: 5 * x, made)


def read_by(network: str, mask: str) -> Any:
    model: Any = NETWORKS[network]
    changes = {"block_length": block_length_of(mask), "clean_context": has_clean_context(mask)}
    return dataclasses.replace(model, arch=dataclasses.replace(model.arch, **changes))


def influence(network: str, mask: str, change_clean: bool | None = None) -> np.ndarray:
    """[query, key] whether the output at the query depends on the token at the key: in what is
    known, or in the text with masks or without them alone."""
    model = read_by(network, mask)
    same = np.tile(np.arange(10, 10 + LENGTH, dtype=np.int32), (LENGTH + 1, 1))
    other = same.copy()
    other[1 + PLACES, PLACES] = 50
    tokens, clean = other, None
    if change_clean is not None:
        tokens, clean = (same, other) if change_clean else (other, same)
    everywhere = np.tile(PLACES.astype(np.int32), (LENGTH + 1, 1))

    @jax.jit
    def hidden(params: Any, tokens: Any, valid: Any, positions: Any, clean: Any) -> Any:
        stream = model.trunk(params, tokens, valid, clean)
        return model.last_hidden(params, stream, valid, positions)

    valid = np.ones(tokens.shape, bool)
    found = np.asarray(hidden(weights(network), tokens, valid, everywhere, clean))
    return (np.abs(found[1:] - found[0]).max(axis=-1) > 0).T


@pytest.mark.parametrize("mask", SEEN)
@pytest.mark.parametrize("network", ["llama, all biases", "dit"])
def test_a_token_depends_on_what_its_mask_shows_and_on_nothing_else(network, mask):
    np.testing.assert_array_equal(influence(network, mask), SEEN[mask])


@pytest.mark.parametrize("network", ["llama, all biases", "dit"])
def test_a_block_sees_its_own_masks_and_the_clean_text_before_it_and_no_truth(network):
    np.testing.assert_array_equal(influence(network, "clean:5", change_clean=False), OWN)
    np.testing.assert_array_equal(influence(network, "clean:5", change_clean=True), BEFORE)


@pytest.mark.parametrize("network", ["llama, all biases", "dit"])
def test_without_a_clean_text_it_reads_what_blocks_read(network):
    """Also what `hidden` and `attention` give, under padding, and by its last blocks of 12 / 5."""
    tokens = np.random.default_rng(0).integers(0, 64, (2, LENGTH)).astype(np.int32)
    valid = np.arange(LENGTH) < np.array([[LENGTH], [7]])

    def outputs(mask: str) -> list[np.ndarray]:
        model = read_by(network, mask)
        functions = (model.hidden, model.attention)
        return [np.asarray(jax.jit(f)(weights(network), tokens, valid))[valid] for f in functions]

    for found, expected in zip(outputs("clean:5"), outputs("block:5")):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("network", ["llama, all biases", "experts", "dit"])
def test_a_clean_context_costs_what_a_text_of_twice_the_length_does(network):
    clean, plain = read_by(network, "clean:5"), read_by(network, "block:5")
    assert clean.flops_per_text(12, 3.0) == plain.flops_per_text(24, 3.0)
    for platform in ("cpu", "gpu", "tpu"):
        shape = memory.BatchShape(rows=2, length=12, slots=3, platform=platform)
        found = memory.temporaries(clean.arch, np.float32, shape)
        twice = memory.temporaries(plain.arch, np.float32, shape._replace(length=24))
        assert found == twice


@pytest.mark.parametrize("mask", [*SEEN, "block:32", "block:65536", "clean:1", "clean:32"])
def test_a_name_is_that_of_its_blocks(mask):
    assert mask_name(block_length_of(mask), has_clean_context(mask)) == mask


@pytest.mark.parametrize(
    "mask", ["", "Full", "block", "block:0", "block:-1", "clean", "clean:0", "32"]
)
def test_other_names_are_refused(tmp_path, mask):
    tiny.folder(tmp_path)
    with pytest.raises(UsageError, match=r"expected full, causal, or block:N or clean:N"):
        model_folder.open_folder(tmp_path, attention_mask=mask)
    with pytest.raises(ModelError, match=r"expected full, causal, or block:N"):
        read_config(tiny.config(attention_mask=mask), "config.json")


def test_a_config_may_state_the_mask_and_whoever_asks_goes_before(tmp_path):
    tiny.folder(tmp_path, attention_mask="block:4")
    assert model_folder.open_folder(tmp_path).model.arch.block_length == 4
    asked = model_folder.open_folder(tmp_path, attention_mask="full")
    assert asked.model.arch.block_length is None
    assert model_folder.open_folder(tmp_path).identity != asked.identity
    clean = model_folder.open_folder(tmp_path, attention_mask="clean:4")
    blocks = model_folder.open_folder(tmp_path)
    assert (clean.model.arch.block_length, clean.model.arch.clean_context) == (4, True)
    assert clean.identity != blocks.identity
    assert model_identity(clean)["attention_mask"] == "clean:4"


@pytest.mark.parametrize(
    ("kind", "field", "more"),
    [
        ("sdar", "block_size", {}),
        ("Fast_dLLM_Qwen", "bd_size", {}),
        ("sdar_moe", "block_size", EXPERTS),
    ],
)
def test_what_learnt_in_blocks_behind_clean_text_is_read_so(kind, field, more):
    config = {"model_type": kind, "num_hidden_layers": 1, field: 16, **more}
    assert mask_of(read_config(config, "here").arch) == "clean:16"
    asked = read_config({**config, "attention_mask": "block:4"}, "here").arch
    assert mask_of(asked) == "block:4"


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_models_of_another_kind_leave_no_choice(kind):
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = {**sizes, "num_attention_heads": 4, "model_type": kind}
    family = read_config(config, "config.json")
    with pytest.raises(ValueError, match="a choice of diffusion models alone"):
        with_attention_mask(family, "full")
    with pytest.raises(ModelError, match="attention_mask is 'full'"):
        read_config({**config, "attention_mask": "full"}, "config.json")


def test_a2d_that_was_trained_in_blocks_equals_transformers_under_that_mask(tmp_path):
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen3Config(**sizes, head_dim=8, mask_token_id=59)
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    made = theirs.config.to_dict() | {"model_type": "a2d-qwen3"}
    made |= {"architectures": ["A2DQwen3LMHeadModel"], "is_causal": False}
    kept = {k: v for k, v in made.items() if k != "layer_types"}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    tokens, clean = np.random.default_rng(0).integers(0, 59, (2, 2, LENGTH)).astype(np.int32)
    nothing = np.zeros_like(OWN)
    seen = {
        "block:5": (SEEN["block:5"], tokens, PLACES),
        "clean:5": (
            np.block([[OWN, BEFORE], [nothing, SEEN["block:5"]]]),
            np.concatenate([tokens, clean], axis=1),
            np.tile(PLACES, 2),
        ),
    }
    for mask, (allowed, read, places) in seen.items():
        bias = torch.where(torch.from_numpy(allowed), 0.0, torch.finfo(torch.float32).min)
        with torch.no_grad():
            expected = theirs(
                torch.from_numpy(read).long(),
                attention_mask=bias[None, None].expand(2, 1, -1, -1),
                position_ids=torch.from_numpy(places)[None],
            ).logits.numpy()[:, :LENGTH]
        folder = model_folder.open_folder(tmp_path, attention_mask=mask)
        params = loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        valid = jnp.ones(tokens.shape, bool)
        hidden = jax.jit(folder.model.hidden)(params, tokens, valid, clean)
        found = np.asarray(folder.model.logits(params, hidden))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
