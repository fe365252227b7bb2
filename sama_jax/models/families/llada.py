"""Reads LLaDA's config and names its tensors: dense models of the first generation.

Source of the names: `Stry233/SAMA` `trainer/model/llada/modeling_llada.py` and the Hub index of
GSAI-ML/LLaDA-8B-Instruct.
"""

import re
from typing import Any

from sama_jax.models.families.family import Family, FamilyConfig
from sama_jax.models.families.fields import Fields
from sama_jax.models.families.rope import read_rope
from sama_jax.models.families.weight_table import Table, plain_rule
from sama_jax.models.transformer import Architecture, TransformerModel
from sama_jax.untrusted import shown

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

_LLADA_SIZES = (
    *("d_model", "n_heads", "n_layers", "mlp_ratio", "vocab_size", "block_group_size"),
    *("n_kv_heads", "mlp_hidden_size", "embedding_size"),
)


def read_llada(config: Fields) -> FamilyConfig:
    """Reads dense LLaDA: 8B-Base, -Instruct, 1.5 and the SAMA repository's small ones."""
    config = config.with_defaults(LLADA_DEFAULTS)
    config.only(_LLADA_ONLY)
    config.get("alibi_bias_max")  # without alibi it has no effect
    width, heads, layers, ratio, rows, group, kv_heads, inner, embedded = config.sizes(
        *_LLADA_SIZES, null=("n_kv_heads", "mlp_hidden_size", "embedding_size")
    )
    one = config.flag("multi_query_attention", null=False)
    kv_heads = kv_heads or (1 if one else heads)
    if width % heads or heads % kv_heads or (width // heads) % 2:
        config.refuse(
            f"d_model {width}, n_heads {heads}, n_kv_heads {kv_heads} do not fit: heads must "
            "divide d_model into even sizes and be a multiple of n_kv_heads"
        )
    rope = read_rope(config)
    if rope.share != 1:
        config.refuse(f"partial_rotary_factor is {shown(rope.share)}, only 1 is supported")
    bias = config.flag("include_bias")
    arch = Architecture(
        vocab_size=embedded or rows,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=width // heads,
        mlp_width=inner or ratio * width,
        tied=config.flag("weight_tying"),
        norm_eps=config.positive("rms_norm_eps"),
        rope_theta=rope.theta,
        qkv_bias=config.flag("include_qkv_bias") or bias,
        o_bias=bias,
        mlp_bias=bias,
        head_bias=bias,
        norm_bias=config.flag("bias_for_layer_norm", null=bias),
        qk_norm="whole" if config.flag("attention_layer_norm") else None,
        scale_embedding=config.flag("input_emb_norm"),
        scale_logits=config.flag("scale_logits"),
        rope_float32=config.flag("rope_full_precision"),
    )
    return FamilyConfig(
        "llada",
        arch,
        LLADA_WEIGHTS,
        TransformerModel,
        config.get("mask_token_id"),
        shift=False,
        block_group_size=group,
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
    if match := re.match(r"^transformer\.block_groups\.(\d{1,9})\.(\d{1,9})\.(.+)$", name):
        group, within, rest = int(match[1]), int(match[2]), match[3]
        return f"transformer.blocks.{group * block_group_size + within}.{rest}"
    return name


LLADA_WEIGHTS = Table(
    rule=plain_rule(_TOP, "transformer.blocks", _BLOCK),
    hub_prefix="model.",
    tied_head=("transformer.ff_out.weight", "transformer.wte.weight"),
    canonical=_plain_blocks,
    saved_config={"block_group_size": 1},
    rows_fields=("vocab_size", "embedding_size"),
)


FAMILIES = (Family("llada", read_llada, ("LLaDAModelLM", "LLaDAModel")),)
