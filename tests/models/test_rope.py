"""Stretched rotary embeddings against transformers, at positions far behind the first length."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle_llama
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sama_jax.errors import ModelError
from sama_jax.models.families.family import UNLIMITED
from sama_jax.models.layers import rotate
from sama_jax.models.registry import read_config
from sama_jax.weights import loading, model_folder

LENGTH, FIRST = 1024, 64
# Of the 16 frequencies of a head of 32, fast ones stay, slow ones are divided, some are blended.
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": FIRST}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": FIRST},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "yarn": YARN,
    "yarn, broken places": {**YARN, "truncate": False, "beta_fast": 6.0, "beta_slow": 0.5},
    "yarn, two scales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, a factor": {**YARN, "attention_factor": 1.3, "beta_fast": None},
    "yarn, all slow": {**YARN, "beta_fast": 1e-4, "beta_slow": 1e-5},
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_far_positions_turn_as_in_transformers(scaling):
    wanted = {**SCALINGS[scaling], "rope_theta": 1e6}
    sizes = {**SIZES, "head_dim": 128, "max_position_embeddings": 131072}
    config = transformers.Qwen3Config(**sizes, rope_parameters=dict(wanted))
    inverse, factor = ROPE_INIT_FUNCTIONS[wanted["rope_type"]](config, "cpu")
    arch: Any = read_config(
        {**sizes, "model_type": "qwen3", "rope_parameters": wanted}, "here"
    ).arch
    positions = np.array([[0, 1, 60, 1000, 20000, 131071]], np.int32)
    x = np.zeros((1, 1, 6, 128), np.float32)
    x[..., :64] = 1  # what it becomes is cosines, then sines
    turned = rotate(
        jnp.asarray(x), jnp.asarray(positions), arch.rope_theta, True, arch.rope_scaling
    )
    angle = positions[0][:, None] * inverse.double().numpy()
    expected = factor * np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    # Units of 2^-24: a frequency is rounded twice, its share of a blend (a quotient of differences)
    # up to four times, the blend three times, the angle, its cosine and the factor once each.
    allowed = 12 * 2.0**-24 * np.maximum(np.tile(angle, 2), 1.0) * max(factor, 1.0)
    assert (np.abs(np.asarray(turned[0, 0]) - expected) <= allowed).all()


FAMILIES = {
    "llama": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "a2d-llama": ("Llama", {}),
    "a2d-qwen2": ("Qwen2", {}),
    "a2d-qwen3": ("Qwen3", {}),
    "Dream": ("Qwen2", {}),
    "sdar_moe": ("Qwen3Moe", MOE),
}
CASES = [
    ("llama", "linear"),
    ("llama", "yarn, a factor"),
    ("qwen2", "yarn"),
    ("qwen2", "dynamic"),
    ("qwen3", "yarn, broken places"),
    ("qwen3", "llama3"),
    ("a2d-llama", "yarn, two scales"),
    ("a2d-qwen2", "linear"),
    ("a2d-qwen3", "yarn"),
    ("Dream", "yarn"),
    ("sdar_moe", "yarn"),
]


def write(path: Path, family: str, scaling: str) -> torch.nn.Module:
    """A folder as transformers writes it, with the fields of the family."""
    origin, fields = FAMILIES[family]
    made = {**SIZES, **fields, "rope_parameters": {**SCALINGS[scaling], "rope_theta": 1e4}}
    config = getattr(transformers, f"{origin}Config")(**made, attn_implementation="eager")
    module = getattr(transformers, f"{origin}ForCausalLM")(config)
    oracle_llama.randomise(module, config.tie_word_embeddings, CASES.index((family, scaling)))
    module.save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    written |= {"model_type": family, "architectures": None, "mask_token_id": 299}
    if family == "sdar_moe":
        written |= {"block_size": 4, "attention_mask": "full"}
    (path / "config.json").write_text(json.dumps(written))
    return module


@pytest.mark.parametrize(("family", "scaling"), CASES)
def test_logits_of_a_long_text_equal_pytorch(tmp_path, family, scaling, record_parity):
    module = write(tmp_path, family, scaling)
    folder = model_folder.open_folder(tmp_path, dtype="float32")
    params = loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    tokens = np.random.default_rng(0).integers(0, 299, (1, LENGTH)).astype(np.int32)
    causal = folder.model.kind == "autoregressive"
    open_mask = torch.zeros(1, 1, LENGTH, LENGTH)
    with torch.no_grad():
        read = torch.from_numpy(tokens).long()
        expected = module(read, attention_mask=None if causal else open_mask).logits.numpy()
    model: Any = folder.model
    if model.shift:  # PyTorch's logits are those of the next token
        expected = np.concatenate([expected[:, :1], expected[:, :-1]], axis=1)
    valid = np.ones_like(tokens, bool)
    hidden = jax.jit(model.hidden)(params, tokens, valid)
    logits = np.asarray(model.logits(params, hidden))
    difference = np.abs(logits - expected)[0, 1:].max()
    record_parity("stretched", difference, 0.0)
    assert expected.std() > 0.5, "logits too flat to tell anything"
    assert difference < 1e-4


def test_a_text_ends_where_the_network_would_change():
    qwen = {**SIZES, "model_type": "qwen2", "max_position_embeddings": 2**19}
    plain = read_config(qwen, "here")

    def read(**scaling):
        return read_config({**qwen, "rope_scaling": scaling}, "here")

    dynamic = read(**SCALINGS["dynamic"])
    assert (dynamic.arch, dynamic.max_length) == (plain.arch, 2**19)
    assert read(**YARN).max_length == 2**19 < UNLIMITED
    assert read(**YARN, llama_4_scaling_beta=0.1).max_length == FIRST
    del qwen["max_position_embeddings"]  # whose absence leaves open where the base changes
    with pytest.raises(ModelError, match=r"^here: .*max_position_embeddings is None"):
        read(**SCALINGS["dynamic"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rope_type": "longrope"}, "rope_type is 'longrope'; expected 'default' or 'linear' or"),
        ({"rope_type": "proportional"}, "rope_type is 'proportional'"),
        ({"factor": None}, "factor is None"),
        ({"truncate": "no"}, "truncate is 'no'; expected true or false"),
        ({"beta_slow": 40.0}, "beta_slow 40.0 is not below beta_fast 32.0"),
        ({"rope_type": "linear"}, "not understood: original_max_position_embeddings is 64"),
        ({"short_factor": [1.0]}, "not understood: short_factor is"),
        ({"mrope_section": [16, 24, 24]}, "not understood: mrope_section is"),
    ],
)
def test_what_is_not_understood_is_refused(changes, complaint):
    config = {**SIZES, "model_type": "qwen3", "rope_scaling": {**YARN, **changes}}
    with pytest.raises(ModelError, match=f"^here: .*{complaint}"):
        read_config(config, "here")
