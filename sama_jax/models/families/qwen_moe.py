"""Reads RND1 and SDAR's models with experts, which are Qwen3 with a mixture of experts.

Tensors have the names of `models/qwen3_moe` of transformers 5.24, which are LLaDA-MoE's.
Sources: `rnd/` of `RadicalNumerics/RND1` (87d5f46); `modeling_sdar_moe.py` of
`PKU-SEC-Lab/TEAM-MoE-dLLM` (e9c502e), a changed copy, whose config class was not seen.
"""

from functools import partial
from typing import Any

from sama_jax.models.families.decoders import stated_blocks
from sama_jax.models.families.family import Family, FamilyConfig
from sama_jax.models.families.fields import Fields
from sama_jax.models.families.llada_moe import LLADA_MOE_WEIGHTS, check_fit
from sama_jax.models.families.rope import SCALED, read_rope
from sama_jax.models.moe import Experts
from sama_jax.models.transformer import Architecture, TransformerModel

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "moe_intermediate_size",
)
# Variants that no published model of these families uses: field -> the value we have.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "is_causal": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": ([], None),
}
_RND1 = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "mask_token_id": 151669,
}
# Field -> its name in configs that transformers 5 has written of its own Qwen3-MoE.
_EXPERTS, _LATER = "num_experts", "num_local_experts"
# RND1's class sets these after it has read the config, whatever that says.
_FIXED = ("norm_topk_prob", "attention_bias", "tie_word_embeddings", "rms_norm_eps", "rope_theta")


def read_qwen_moe(name: str, config: Fields) -> FamilyConfig:
    """Reads the config of `name`, `rnd1` or `sdar_moe`; the latter has no defaults."""
    is_rnd1 = name == "rnd1"
    config = config.with_defaults(_RND1 if is_rnd1 else {"attention_bias": False})
    config.only({**_ONLY, **({field: _RND1[field] for field in _FIXED} if is_rnd1 else {})})
    config.get("sliding_window")  # without effect, since it is not used
    rows, width, layers, heads, kv_heads, active, inner = config.sizes(*_SIZES)
    count = _experts(config)
    rope = read_rope(config, kinds=() if is_rnd1 else SCALED)
    bias = config.flag("attention_bias")
    blocks = stated_blocks(config, None if is_rnd1 else "block_size")
    if rope.share != 1 or (is_rnd1 and rope.theta != _RND1["rope_theta"]):
        config.refuse(
            f"rope_theta {rope.theta} and partial_rotary_factor {rope.share} are not supported"
        )
    experts = Experts(
        count=count,
        active=active,
        width=inner,
        gate="softmax",
        normalise=config.flag("norm_topk_prob"),
    )
    arch = Architecture(
        vocab_size=rows,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=config.size("head_dim"),
        mlp_width=inner,
        tied=config.flag("tie_word_embeddings"),
        norm_eps=config.positive("rms_norm_eps"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_float32=False,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        block_length=blocks,
        clean_context=blocks is not None,
        experts=experts,
    )
    check_fit(config, arch, experts)
    mask_id = config.get("mask_token_id")
    return FamilyConfig(
        name,
        arch,
        LLADA_MOE_WEIGHTS,
        TransformerModel,
        mask_id,
        shift=is_rnd1,
        max_length=rope.max_length,
    )


def _experts(config: Fields) -> int:
    """Returns the number of experts, by either name; two that differ are refused."""
    names = [name for name in (_EXPERTS, _LATER) if config.states(name)]
    counts = config.sizes(*(names or [_EXPERTS]))
    if len(set(counts)) > 1:
        config.refuse(f"{_EXPERTS} is {counts[0]}, but {_LATER} is {counts[1]}; remove one")
    return counts[0]


FAMILIES = (
    Family("rnd1", partial(read_qwen_moe, "rnd1"), ("RND1LM",)),
    Family("sdar_moe", partial(read_qwen_moe, "sdar_moe"), ("SDARMoeForCausalLM",)),
)
