"""Configs are understood or refused: every family, every kind of field that changes the numbers."""

import json
from typing import Any

import oracle
import oracle_dit
import oracle_moe
import pytest
import tiny

from sama_jax.errors import ModelError
from sama_jax.models.registry import read_config

_HF = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
ROTARY: dict[str, dict[str, Any]] = {
    "llada": oracle.config(),
    "dream": {**_HF, "model_type": "Dream", "rope_theta": 5e5},
    "illada": {**_HF, "model_type": "illada", "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    "a2d": {**_HF, "model_type": "a2d-qwen3", "rope_theta": 5e5},
    "llama": {**_HF, "model_type": "llama", "rope_theta": 5e5},
    "llada_moe": oracle_moe.llada_moe_config(rope_theta=5e5, partial_rotary_factor=1),
    "llada2": oracle_moe.llada2_config(rope_theta=5e5, partial_rotary_factor=0.5),
}
"""One theta for all layers."""
MODERN = {**_HF, "model_type": "modernbert"}
CONFIGS: dict[str, dict[str, Any]] = {
    **ROTARY,
    "modernbert": MODERN,
    "bert": {**_HF, "model_type": "bert"},
    "roberta": {**_HF, "model_type": "roberta"},
    "smdm": {
        **{"model_type": "smdm", "n_layer": 2, "n_head": 4, "n_embd": 32},
        **{"intermediate_size": 64, "vocab_size": 299},
    },
    "mdlm": oracle_dit.mdlm_config(),
    "sedd": oracle_dit.sedd_config(),
    "bd3lm": oracle_dit.bd3lm_config(),
}
REFUSED: dict[str, Any] = {
    "rope_scaling": {"rope_type": "longrope", "factor": 8.0},
    "rope_parameters": {"rope_type": "proportional", "factor": 4.0, "rope_theta": 5e5},
    "sliding_window": 4096,
    "layer_types": ["full_attention", "chunked_attention"],
    "attention_scaling": 0.5,
    "attention_multiplier": 1.0,
    "logit_scale": 0.1,
    "attn_logit_softcapping": 30.0,
    "quantization": {"group_size": 64, "bits": 4},
    "rotary_interleaved": True,
    "rope_local_base_freq": 10000.0,
    "use_mrope": True,
    "original_max_position_embeddings": 16,
    "block_length": 8,
    "attention_chunk_size": 512,
}
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("rope_scaling", "sliding_window", "quantization_config"), None),
    **{"attention_dropout": 0.1, "attention_probs_dropout_prob": 0.1, "output_attentions": False},
    **{"use_sliding_window": False, "max_window_layers": 28, "_attn_implementation": "sdpa"},
    **{"residual_multiplier": 1.0, "final_logit_softcapping": 0.0, "use_flash_attention": True},
}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        read_config(json.loads(json.dumps(config)), "here")
    message = str(caught.value)
    assert message.startswith("here")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_field_that_may_change_the_numbers_is_refused_by_name(family, field):
    read_config(CONFIGS[family], "here")
    if field == "sliding_window" and family in ("dream", "a2d"):
        return  # their class uses no window unless another field says so, which is refused
    message = refusal({**CONFIGS[family], field: REFUSED[field]})
    assert field in message or "rope_type" in message
    value = REFUSED[field]
    value = value.get("rope_type", value) if isinstance(value, dict) else value
    assert repr(value)[:20] in message


@pytest.mark.parametrize("family", CONFIGS)
def test_fields_that_change_nothing_are_read(family):
    config = CONFIGS[family]
    assert read_config({**NEUTRAL, **config}, "here").arch == read_config(config, "here").arch


def test_a_window_that_is_switched_off_is_no_window():
    off = {**ROTARY["llama"], "use_sliding_window": False, "sliding_window": 131072}
    assert read_config(off, "here") == read_config(ROTARY["llama"], "here")
    qwen = {**_HF, "model_type": "qwen2", "sliding_window": 131072}  # its class default is off
    read_config(qwen, "here")


@pytest.mark.parametrize("section", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("family", ROTARY)
def test_theta_is_read_where_it_stands(family, section):
    config = ROTARY[family]
    inside = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if "partial_rotary_factor" in config:
        inside["partial_rotary_factor"] = config["partial_rotary_factor"]
    moved = {k: v for k, v in config.items() if k not in inside} | {section: inside}
    assert read_config(moved, "here") == read_config(config, "here")
    beside = {**moved, "rope_scaling": {"rope_type": "default"}, "rope_parameters": inside}
    assert read_config(beside, "here") == read_config(config, "here")
    both = {**config, section: {**inside, "rope_theta": 7.0}}
    assert "rope_theta is 7.0 in one place and 500000.0 in another" in refusal(both)
    half = {**config, section: {**inside, "partial_rotary_factor": 0.25}}
    assert "partial_rotary_factor" in refusal(half) or "llada" in family


def test_the_length_before_stretching_is_read_where_it_stands():
    """transformers 5 takes it from beside the section first; see `standardize_rope_params`."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    name = "original_max_position_embeddings"
    llama = {**ROTARY["llama"], "max_position_embeddings": 64}
    inside = read_config({**llama, "rope_scaling": {**scaling, name: 16}}, "here")
    beside = {**llama, name: 16, "rope_scaling": scaling}
    assert read_config(beside, "here") == inside
    theta = {"rope_theta": llama["rope_theta"]}
    assert read_config({**beside, "rope_parameters": {**scaling, **theta}}, "here") == inside
    assert read_config({**llama, "rope_scaling": scaling}, "here") != inside
    two = {**beside, "rope_scaling": {**scaling, name: 32}}
    assert f"{name} is 32 in one place and 16 in another" in refusal(two)


def test_a_block_of_another_length_is_refused():
    config = CONFIGS["llada2"]
    assert read_config({**config, "block_length": 32}, "here") == read_config(config, "here")
    assert "block_length is 8" in refusal({**config, "block_length": 8})


def test_modernbert_reads_one_set_for_each_kind_of_layers():
    sets = {"full_attention": {"rope_theta": 7e3}, "sliding_attention": {"rope_theta": 70.0}}
    arch = read_config({**MODERN, "rope_parameters": sets}, "here").arch
    assert (arch.global_theta, arch.local_theta) == (7e3, 70.0)  # pyright: ignore
    assert "rope_parameters" in refusal({**MODERN, "rope_parameters": {"rope_theta": 7e3}})
    older = {**MODERN, "rope_parameters": sets, "global_rope_theta": 8e3}
    assert "global_rope_theta is 8000.0, but" in refusal(older)
    sets["full_attention"]["factor"] = 2.0
    assert "factor is 2.0" in refusal({**MODERN, "rope_parameters": sets})


NUMBERS = [float("nan"), float("inf"), -float("inf"), 0, -1, True, "1e-5", None, [1], 10**400]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: repr(v)[:9])
@pytest.mark.parametrize(
    ("family", "field"),
    [
        *(("llada", name) for name in ("rope_theta", "rms_norm_eps")),
        *(("dream", name) for name in ("rope_theta", "rms_norm_eps")),
        *(("llada2", name) for name in ("rope_theta", "rms_norm_eps", "routed_scaling_factor")),
        *(("llada_moe", name) for name in ("rope_theta", "rms_norm_eps", "partial_rotary_factor")),
        *(("modernbert", name) for name in ("norm_eps", "global_rope_theta")),
        *(("bert", "layer_norm_eps"), ("smdm", "norm_eps")),
    ],
)
def test_numbers_are_finite_and_positive(family, field, value):
    assert f"{field} " in refusal({**CONFIGS[family], field: value})


SIZES = {
    "llada": ("d_model", "n_heads", "n_layers", "n_kv_heads", "mlp_hidden_size", "embedding_size"),
    "llama": (*_HF, "head_dim"),
    "llada_moe": ("hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok"),
    "llada2": ("vocab_size", "num_experts", "n_group", "topk_group", "moe_intermediate_size"),
    "modernbert": ("hidden_size", "num_hidden_layers", "local_attention"),
    "bert": ("vocab_size", "max_position_embeddings", "type_vocab_size"),
    "roberta": ("vocab_size", "max_position_embeddings", "type_vocab_size"),
    "smdm": ("n_layer", "n_head", "n_embd", "n_query_groups", "padded_vocab_size"),
    "mdlm": ("hidden_dim", "cond_dim", "n_blocks", "n_heads"),
    "sedd": ("tokens",),
    "bd3lm": ("block_size", "model_length", "hidden_dim"),
}


@pytest.mark.parametrize("value", [0, -9, True, 2.0, "32", [32], 10**9, 10**15, 2**40])
@pytest.mark.parametrize("family", SIZES)
def test_sizes_are_positive_integers_of_a_possible_size(family, value):
    for field in SIZES[family]:
        message = refusal({**CONFIGS[family], field: value})
        assert f"{field} is {value!r}" in message


@pytest.mark.parametrize("value", [-1, True, 1.5, "1", 10**9])
@pytest.mark.parametrize(
    "field", ["num_shared_experts", "first_k_dense_replace", "num_key_value_heads", "head_dim"]
)
def test_counts_may_be_zero_and_nothing_else(field, value):
    assert f"{field} is {value!r}" in refusal({**CONFIGS["llada2"], field: value})


@pytest.mark.parametrize("value", ["false", "no", 0, 1, None])
@pytest.mark.parametrize(
    ("family", "field"),
    [
        *(("llada", f) for f in ("scale_logits", "weight_tying", "rope_full_precision", "rope")),
        *(("llada", f) for f in ("include_bias", "input_emb_norm", "attention_layer_norm")),
        *(("llama", f) for f in ("tie_word_embeddings", "attention_bias", "mlp_bias")),
        *(("llada2", f) for f in ("use_bias", "use_qk_norm", "tie_word_embeddings")),
        *(("bert", "tie_word_embeddings"), ("mdlm", "time_conditioning")),
        *(("bd3lm", "cross_attn"), ("bd3lm", "adaln")),
    ],
)
def test_switches_are_booleans(family, field, value):
    assert f"{field} is {value!r}" in refusal({**CONFIGS[family], field: value})


@pytest.mark.parametrize("value", [-9, 0, True, "512", 1.5, 2**40])
def test_the_longest_text_is_a_positive_integer(value):
    assert f"is {value!r}" in refusal(tiny.config(max_sequence_length=value))
    assert read_config(tiny.config(max_sequence_length=None), "here").max_length == 2**20
    assert read_config(tiny.config(max_sequence_length=64), "here").max_length == 64


def test_a_message_shows_little_of_a_foreign_value():
    message = refusal({**CONFIGS["llada"], "rope_scaling_\x1b[31m" + "x" * 999: "y" * 10**6})
    assert len(message) < 900
    assert "\x1b" not in message
