"""Reads decoders that use transformers' field names: Dream, A2D, iLLaDA, SDAR, Fast-dLLM v2, causal
Qwen and Llama.

All of them are one network: RMS norms, grouped queries, half rotation with rounded sines, a gated
MLP. A `Dialect` says what a family's classes fix and what its config class assumes.
Sources: `models/{qwen2,qwen3,llama}` of transformers 5.24; `trainer/model/dream` of `Stry233/SAMA`
(5ac7aa4); `dllm/pipelines/a2d` of `ZHZisZZ/dllm` (ca17675); `training/model/SDAR-4B-Chat` of
`JetAstra/SDAR` (c2041a8); a copy of Fast_dLLM_v2_7B's Hub files in `Satgoy152/DualDiffusion`
(1aeb3d4).

Source of the names: `models/{qwen2,qwen3,llama}` of transformers 5.24, `trainer/model/dream` of
`Stry233/SAMA`; iLLaDA's below `model.layers` are expected, not read anywhere.
"""

import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from sama_jax.models.attention_mask import FIELD, LONGEST_BLOCK
from sama_jax.models.families.family import Family, FamilyConfig, Kind
from sama_jax.models.families.fields import Fields
from sama_jax.models.families.rope import SCALED, read_rope
from sama_jax.models.families.weight_table import Table, plain_rule
from sama_jax.models.transformer import Architecture, TransformerModel
from sama_jax.untrusted import shown

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# Defaults of the config classes (`configuration_*.py`). A null `num_key_value_heads` means one a
# query head, a null `head_dim` hidden_size / num_attention_heads.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN2 = {
    **_LLAMA,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
}
_QWEN3 = {**_QWEN2, "head_dim": 128}
_DREAM = {**_QWEN2, "mask_token_id": 151666}
_FAST_DLLM = {**_QWEN2, "mask_token_id": 151665, "bd_size": 32}
_NEMOTRON: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "block_size": 32,
    "llama_4_scaling_beta": 0.1,
}
# Nobody has published iLLaDA's config class: only its two switches have a default.
_ILLADA = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": True}

# Variants that no published model of these families uses: field -> the value we have.
_ONLY = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "use_mrope": False,
}


class Dialect(NamedTuple):
    """Holds what a family's classes fix."""

    defaults: Mapping[str, Any]
    kind: Kind = "diffusion"
    shift: bool = False
    biases: Literal["config", "qkv", "none"] = "none"
    """By `attention_bias` and `mlp_bias`; always on Q, K and V; nowhere."""
    norm_heads: bool = False
    """RMS norm of each query and key head."""
    blocks: str | None = None
    """The field that says how long the blocks are that it was trained with, behind clean text."""
    rope: tuple[str, ...] = SCALED
    """What `rope_type` may be besides `default`."""
    only: Mapping[str, Any] = MappingProxyType({})
    """Further fields that have one value, or the values that each may have."""
    weights: Table | None = None
    """Of a family that names tensors otherwise."""


def read_decoder(dialect: Dialect, config: Fields) -> FamilyConfig:
    """Reads any of these configs; `dialect` holds the differences."""
    config, by_config = config.with_defaults(dialect.defaults), dialect.biases == "config"
    config.only({**_ONLY, **dialect.only, "is_causal": dialect.kind == "autoregressive"})
    if "use_sliding_window" in dialect.defaults:
        config.get("sliding_window")  # without effect, since it is not used
    rows, width, inner, layers, heads, kv_heads, size = config.sizes(
        *_SIZES, null=("num_key_value_heads", "head_dim")
    )
    kv_heads, size = kv_heads or heads, size or width // heads
    if heads % kv_heads or size % 2 or not size:
        config.refuse(
            f"num_attention_heads {heads}, num_key_value_heads {kv_heads}, head size {size} do not "
            "fit: heads must be a multiple of key/value heads, the size even"
        )
    rope = read_rope(config, kinds=dialect.rope)
    if rope.share != 1:
        config.refuse(f"partial_rotary_factor is {shown(rope.share)}, only 1 is supported")
    attention_bias = by_config and config.flag("attention_bias")
    blocks = stated_blocks(config, dialect.blocks)
    arch = Architecture(
        vocab_size=rows,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        mlp_width=inner,
        tied=config.flag("tie_word_embeddings"),
        norm_eps=config.positive("rms_norm_eps"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_float32=False,
        qkv_bias=dialect.biases == "qkv" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=by_config and config.flag("mlp_bias"),
        qk_norm="head" if dialect.norm_heads else None,
        block_length=1 if dialect.kind == "autoregressive" else blocks,
        clean_context=blocks is not None,
    )
    mask_id = config.get("mask_token_id")
    if mask_id is None and dialect.kind == "autoregressive":
        mask_id = 0  # never used: attacks on next-token models mask nothing
    return FamilyConfig(
        "decoder",
        arch,
        dialect.weights or DECODER_WEIGHTS,
        TransformerModel,
        mask_id,
        shift=dialect.shift,
        kind=dialect.kind,
        max_length=rope.max_length,
    )


def stated_blocks(config: Fields, field: str | None) -> int | None:
    """Returns the length of the blocks that a model is trained to fill in behind clean text; None
    without such a field.

    A config that states its mask by name has that one; the length may then be absent.
    """
    if field is None:
        return None
    length = config.count(field, LONGEST_BLOCK) or None
    if length is None and config.get(FIELD) is None:
        config.refuse(
            f"{field} is {shown(config.get(field))}; expected the length of the blocks that the "
            "model was trained with"
        )
    return length


# --- weights --------------------------------------------------------------------------------------

_TOP = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
# Our module inside a block -> its name inside `model.layers.{i}`.
_BLOCK = {
    "attn_norm": "input_layernorm",
    **{f"attn/{p}": f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    **{f"mlp/{p}": f"mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
}


def _with_model(name: str, block_group_size: int) -> str:
    """Puts back the `model.` that `clean_name` takes away: the head stands beside the model."""
    del block_group_size
    return name if name.startswith("lm_head.") else f"model.{name}"


DECODER_WEIGHTS = Table(
    rule=plain_rule(_TOP, "model.layers", _BLOCK),
    hub_prefix="",
    tied_head=("lm_head.weight", "model.embed_tokens.weight"),
    canonical=_with_model,
    ignored=re.compile(r"\.rotary_emb\.inv_freq$"),
    rows_fields=("vocab_size",),
    tied_field="tie_word_embeddings",
)


NEMOTRON_WEIGHTS = DECODER_WEIGHTS._replace(
    rule=plain_rule(
        {
            "embed": "encoder.embed_tokens",
            "final_norm": "encoder.norm",
            "lm_head": "diffusion_head",
        },
        "encoder.layers",
        _BLOCK,
    ),
    tied_head=("diffusion_head.weight", "encoder.embed_tokens.weight"),
    canonical=lambda name, block_group_size: name,
)


def is_illada(config: Mapping[str, Any]) -> bool:
    """Tells iLLaDA by its class: what its config says for `model_type` has not been seen."""
    listed = config.get("architectures")
    return isinstance(listed, list) and "ILLaDAForCausalLM" in listed


def _family(model_type: str, dialect: Dialect, *architectures: str) -> Family:
    matches = is_illada if model_type == "illada" else None
    return Family(model_type, partial(read_decoder, dialect), architectures, matches)


_QWEN2_DIALECT = Dialect(_QWEN2, biases="qkv")
_QWEN3_DIALECT = Dialect(_QWEN3, biases="config", norm_heads=True)
_LLAMA_DIALECT = Dialect(_LLAMA, biases="config")
_FAST_DIALECT = Dialect(_FAST_DLLM, shift=True, biases="qkv", blocks="bd_size")
# Its config says "bidirectional", which is how its code sees a block behind a cache.
_NEMOTRON_DIALECT = Dialect(
    _NEMOTRON,
    blocks="block_size",
    rope=("yarn",),
    only={
        "dlm_paradigm": ("bidirectional", "block_diff"),
        "attention_bias": False,
        "mlp_bias": False,
    },
    weights=NEMOTRON_WEIGHTS,
)
_CAUSAL: dict[str, Any] = {"kind": "autoregressive", "shift": True}

FAMILIES = (
    # DiffuCoder loads Dream's classes.
    _family("Dream", Dialect(_DREAM, shift=True, biases="qkv"), "DreamModel"),
    _family("illada", Dialect(_ILLADA, rope=("llama3",)), "ILLaDAForCausalLM"),
    _family("a2d-qwen2", _QWEN2_DIALECT, "A2DQwen2LMHeadModel"),
    _family("a2d-qwen3", _QWEN3_DIALECT, "A2DQwen3LMHeadModel"),
    _family("a2d-llama", _LLAMA_DIALECT, "A2DLlamaLMHeadModel"),
    _family("sdar", _QWEN3_DIALECT._replace(blocks="block_size"), "SDARForCausalLM"),
    _family("Fast_dLLM_Qwen", _FAST_DIALECT, "Fast_dLLM_QwenForCausalLM"),
    _family("nemotron_labs_diffusion", _NEMOTRON_DIALECT, "NemotronLabsDiffusionModel"),
    _family("qwen2", _QWEN2_DIALECT._replace(**_CAUSAL), "Qwen2ForCausalLM"),
    _family("qwen3", _QWEN3_DIALECT._replace(**_CAUSAL), "Qwen3ForCausalLM"),
    _family("llama", _LLAMA_DIALECT._replace(**_CAUSAL), "LlamaForCausalLM"),
)
