"""Reads LLaDA's config and names its tensors: dense models of the first generation.

Source of the names: `Stry233/SAMA` `trainer/model/llada/modeling_llada.py` and the Hub index of
GSAI-ML/LLaDA-8B-Instruct.
"""

import re
from typing import Any

from sama_jax.errors import ModelError
from sama_jax.models.families.family import Family, FamilyConfig
from sama_jax.models.families.weight_table import Table, plain_rule
from sama_jax.models.transformer import Architecture, TransformerModel

# Defaults of LLaDA's config class (`configuration_llada.py` in `Stry233/SAMA`): GPT-2-like, unlike
# the 8B checkpoint. What they switch on and the network does not have is refused below.
LLADA_DEFAULTS: dict[str, Any] = {
    "d_model": 768,
    "n_heads": 12,
    "n_kv_heads": None,
    "n_layers": 12,
    "mlp_ratio": 4,
    "mlp_hidden_size": None,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "block_group_size": 1,
    "alibi": False,
    "rope": False,
    "rope_full_precision": True,
    "rope_theta": 10000.0,
    "multi_query_attention": None,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "input_emb_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "rms_norm_eps": 1e-5,
    "include_qkv_bias": False,
    "include_bias": False,
    "bias_for_layer_norm": None,
    "scale_logits": False,
    "vocab_size": 50257,
    "embedding_size": 50304,
    "weight_tying": True,
    "mask_token_id": 50256,
}

# Switches of LLaDA's code that no published diffusion model uses: field -> the value we have.
_LLADA_ONLY = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "layer_norm_with_affine": True,
    "attention_layer_norm_with_affine": True,
}

# Sizes: field -> whether it may be null, because another field then decides.
_LLADA_SIZES = {
    "d_model": False,
    "n_heads": False,
    "n_layers": False,
    "mlp_ratio": False,
    "vocab_size": False,
    "block_group_size": False,
    "n_kv_heads": True,
    "mlp_hidden_size": True,
    "embedding_size": True,
}


def read_llada(config: dict[str, Any], where: str) -> FamilyConfig:
    """Reads dense LLaDA: 8B-Base, -Instruct, 1.5 and the SAMA repository's small ones."""

    def get(name: str) -> Any:
        return config.get(name, LLADA_DEFAULTS[name])

    wrong = [
        f"{name} is {get(name)!r}{'' if name in config else ' (class default, field is absent)'}, "
        f"only {have!r} is supported"
        for name, have in _LLADA_ONLY.items()
        if get(name) != have
    ]
    if wrong:
        raise ModelError(f"{where}: unsupported LLaDA variant: " + "; ".join(wrong))
    wrong = [
        f"{name} is {get(name)!r}"
        for name, optional in _LLADA_SIZES.items()
        if not (optional and get(name) is None) and (type(get(name)) is not int or get(name) < 1)
    ]
    if wrong:
        raise ModelError(f"{where}: expected positive integers, but " + "; ".join(wrong))
    width, heads = get("d_model"), get("n_heads")
    kv_heads = get("n_kv_heads") or (1 if get("multi_query_attention") else heads)
    if width % heads or heads % kv_heads or (width // heads) % 2:
        raise ModelError(
            f"{where}: d_model {width}, n_heads {heads}, n_kv_heads {kv_heads} do not fit: heads "
            "must divide d_model into even sizes and be a multiple of n_kv_heads"
        )
    norm_bias = get("bias_for_layer_norm")
    arch = Architecture(
        vocab_size=get("embedding_size") or get("vocab_size"),
        width=width,
        num_layers=get("n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=width // heads,
        mlp_width=get("mlp_hidden_size") or get("mlp_ratio") * width,
        tied=bool(get("weight_tying")),
        norm_eps=float(get("rms_norm_eps")),
        rope_theta=float(get("rope_theta")),
        qkv_bias=bool(get("include_bias") or get("include_qkv_bias")),
        o_bias=bool(get("include_bias")),
        mlp_bias=bool(get("include_bias")),
        head_bias=bool(get("include_bias")),
        norm_bias=bool(get("include_bias") if norm_bias is None else norm_bias),
        qk_norm="whole" if get("attention_layer_norm") else None,
        scale_embedding=bool(get("input_emb_norm")),
        scale_logits=bool(get("scale_logits")),
        rope_float32=bool(get("rope_full_precision")),
    )
    return FamilyConfig(
        "llada",
        arch,
        LLADA_WEIGHTS,
        TransformerModel,
        get("mask_token_id"),
        shift=False,
        block_group_size=get("block_group_size"),
    )


# --- weights --------------------------------------------------------------------------------------

_TOP = {
    "embed": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "lm_head": "transformer.ff_out",
}
# Our module inside a block -> its name inside `transformer.blocks.{i}`.
_BLOCK = {
    "attn_norm": "attn_norm",
    "attn/q_proj": "q_proj",
    "attn/k_proj": "k_proj",
    "attn/v_proj": "v_proj",
    "attn/q_norm": "q_norm",
    "attn/k_norm": "k_norm",
    "attn/o_proj": "attn_out",
    "mlp_norm": "ff_norm",
    "mlp/gate_proj": "ff_proj",
    "mlp/up_proj": "up_proj",
    # Not to be confused with `transformer.ff_out`, the vocabulary head.
    "mlp/down_proj": "ff_out",
}


def _plain_blocks(name: str, block_group_size: int) -> str:
    """Turns block groups (`transformer.block_groups.{g}.{j}.`) into plain blocks."""
    if match := re.match(r"^transformer\.block_groups\.(\d+)\.(\d+)\.(.+)$", name):
        group, within, rest = int(match[1]), int(match[2]), match[3]
        return f"transformer.blocks.{group * block_group_size + within}.{rest}"
    return name


LLADA_WEIGHTS = Table(
    rule=plain_rule(_TOP, "transformer.blocks", _BLOCK),
    hub_prefix="model.",
    tied_head=("transformer.ff_out.weight", "transformer.wte.weight"),
    canonical=_plain_blocks,
    saved_config={"block_group_size": 1},
)


FAMILIES = (Family("llada", read_llada, ("LLaDAModelLM", "LLaDAModel")),)
