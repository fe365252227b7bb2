"""`config.json` of the LLaDA models with experts in our words: LLaDA-MoE, LLaDA2.0 and LLaDA2.1.

Source of the names: `ZHZisZZ/dllm` `dllm/pipelines/llada/models/modeling_lladamoe.py` and
`dllm/pipelines/llada2/models/modeling_llada2_moe.py`; stacked experts, `inclusionAI/dFactory`
`scripts/moe_convertor.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from sama_jax.models.families.family import Family, FamilyConfig
from sama_jax.models.families.fields import SIZE_LIMIT, Fields
from sama_jax.models.families.rope import read_rope
from sama_jax.models.families.weight_table import Rule, Table
from sama_jax.models.moe import Experts
from sama_jax.models.transformer import Architecture, TransformerModel
from sama_jax.untrusted import shown

MASK_ID = 156895
"""`<|mask|>` of both; the default of LLaDA2's `generate` and of `inclusionAI/dInfer`'s benchmark
for LLaDA-MoE. Their configs name none."""

BLOCK_LENGTH = 32
"""LLaDA2's attention block; not in its config but the default of its `generate`, and `block_size`
of its authors' training (`configs/sft` of `inclusionAI/dFactory`, 92b6890)."""


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads",)

DENSE_LIMIT = 64
"""Dense layers before those with experts: each is a part of the program of its own."""


def _mask_id(config: Fields) -> Any:
    named = config.get("mask_token_id")
    return MASK_ID if named is None else named


def _rotary_size(config: Fields, head_size: int, share: Any) -> int:
    """Returns the channels of a head that are rotated: an even number of them."""
    size = int(head_size * share) if type(share) in (int, float) and abs(share) < 2**16 else 0
    if not 0 < size <= head_size or size % 2:
        config.refuse(
            f"partial_rotary_factor {shown(share)} rotates {size} of a head's {head_size} "
            "channels; expected an even number of them"
        )
    if config.get("rotary_dim", size) not in (None, size):
        config.refuse(
            f"rotary_dim is {shown(config.get('rotary_dim'))}, but partial_rotary_factor rotates "
            f"{size} channels; remove the wrong one"
        )
    return size


def check_fit(config: Fields, arch: Architecture, experts: Experts) -> None:
    """Raises `ModelError` for numbers of heads, layers and experts that do not fit together."""
    size, rest = divmod(experts.count, experts.groups)
    kept = min(experts.kept_groups, experts.groups)
    wrong = []
    if arch.num_heads % arch.num_kv_heads:
        wrong.append(
            f"num_attention_heads {arch.num_heads} is not a multiple of num_key_value_heads "
            f"{arch.num_kv_heads}"
        )
    if not 0 <= arch.first_dense < arch.num_layers:
        wrong.append(f"{arch.first_dense} dense layers of {arch.num_layers} leave none for experts")
    if rest or (experts.gate == "sigmoid" and size < 2):
        wrong.append(f"{experts.count} experts do not make {experts.groups} groups of two or more")
    if kept < experts.kept_groups or experts.active > kept * size:
        wrong.append(
            f"{experts.active} active experts do not fit into {experts.kept_groups} of "
            f"{experts.groups} groups of {size}"
        )
    if wrong:
        config.refuse("; ".join(wrong))


def is_lladamoe(config: Mapping[str, Any]) -> bool:
    """Tells LLaDA-MoE from dense models: the Hub's config says `llada`, dllm's `lladamoe`."""
    named = config.get("architectures")
    listed = named if isinstance(named, list) else [named]
    is_named = any(name in listed for name in _LLADAMOE_CLASSES)
    return config.get("model_type") == "llada" and ("num_experts" in config or is_named)


LLADA_MOE_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "shared_expert_intermediate_size": None,
    "moe_router_enable_expert_bias": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "qk_layernorm": False,
    "rms_norm_eps": 1e-5,
}


def read_lladamoe(config: Fields) -> FamilyConfig:
    """Reads inclusionAI/LLaDA-MoE-7B-A1B. Defaults: `configuration_lladamoe.py` in `ZHZisZZ/dllm`.

    Fields whose class default is -1, which cannot build a network, must be present; only an absent
    `partial_rotary_factor` counts as 1. `norm_topk_prob` and `moe_router_score_function` are not
    read, since the authors' block ignores them.
    """
    config = config.with_defaults(LLADA_MOE_DEFAULTS)
    rows, width, layers, heads, kv_heads = config.sizes(*_SIZES, null=("num_key_value_heads",))
    count, active, inner = config.sizes(
        "num_experts", "num_experts_per_tok", "expert_intermediate_size"
    )
    config.only({"hidden_act": "silu", "clip_qkv": None})
    first_dense = _first_dense(config, layers)
    if width % heads:
        config.refuse(f"{heads} heads do not divide hidden_size {width}")
    experts = Experts(
        count=count,
        active=active,
        width=inner,
        gate="softmax",
        bias=config.flag("moe_router_enable_expert_bias", null=False),
        shared_width=config.count("shared_expert_intermediate_size", SIZE_LIMIT),
    )
    bias, rope = config.flag("attention_bias"), read_rope(config)
    arch = Architecture(
        vocab_size=rows,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_size=width // heads,
        mlp_width=config.size("dense_intermediate_size") if first_dense else experts.width,
        tied=config.flag("tie_word_embeddings"),
        norm_eps=config.positive("rms_norm_eps"),
        rope_theta=rope.theta,
        rope_float32=False,
        rotary_size=_rotary_size(config, width // heads, rope.share),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head" if config.flag("qk_layernorm", null=False) else None,
        experts=experts,
        first_dense=first_dense,
    )
    check_fit(config, arch, experts)
    return FamilyConfig(
        "lladamoe", arch, LLADA_MOE_WEIGHTS, TransformerModel, _mask_id(config), shift=False
    )


def _first_dense(config: Fields, layers: int) -> int:
    """Layers before the first with experts: `moe_layer_freq` has 0 for each dense layer."""
    frequency = config.get("moe_layer_freq")
    if not isinstance(frequency, list) or len(frequency) != layers:
        config.refuse(
            f"moe_layer_freq is {shown(frequency)}; expected {layers} numbers, one a layer"
        )
    dense = [f == 0 for f in frequency]
    first = dense.index(False) if False in dense else layers
    if any(dense[first:]) or DENSE_LIMIT < first < layers:
        config.refuse(
            f"moe_layer_freq is {shown(frequency)}; dense layers are supported at the start only, "
            f"up to {DENSE_LIMIT}"
        )
    return first


# Defaults of LLaDA2's config class (`configuration_llada2_moe.py` in `ZHZisZZ/dllm`).
LLADA2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30592,
    "hidden_size": 1024,
    "intermediate_size": None,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 0,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_bias": True,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "num_experts": 16,
    "num_shared_experts": 0,
    "num_experts_per_tok": 2,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": None,
    "first_k_dense_replace": 0,
    "head_dim": None,
    "partial_rotary_factor": 0.5,
}


def read_llada2(config: Fields) -> FamilyConfig:
    """Reads inclusionAI/LLaDA2.0-mini and 2.1-mini; experts stacked if dFactory merged them.

    `norm_topk_prob` and `moe_router_enable_expert_bias` are not read: the authors' router always
    normalises and always has a bias.
    """
    config = config.with_defaults(LLADA2_DEFAULTS)
    config.only({"hidden_act": "silu", "score_function": "sigmoid", "use_sliding_window": False})
    config.only({"block_length": BLOCK_LENGTH})  # no known config states it
    rows, width, layers, heads = config.sizes(*_SIZES[:4])
    kv_heads = config.count("num_key_value_heads", SIZE_LIMIT) or heads
    head_size = config.count("head_dim", SIZE_LIMIT) or width // heads
    count, active, groups, kept_groups, inner = config.sizes(
        "num_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size"
    )
    experts = Experts(
        count=count,
        active=active,
        width=inner,
        gate="sigmoid",
        bias=True,
        shared_width=config.count("num_shared_experts") * inner,
        groups=groups,
        kept_groups=kept_groups,
        scale=config.positive("routed_scaling_factor"),
    )
    rope = read_rope(config, share=LLADA2_DEFAULTS["partial_rotary_factor"])
    first_dense = config.count("first_k_dense_replace", DENSE_LIMIT)
    arch = Architecture(
        vocab_size=rows,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        mlp_width=config.size("intermediate_size") if first_dense else experts.width,
        tied=config.flag("tie_word_embeddings"),
        norm_eps=config.positive("rms_norm_eps"),
        rope_theta=rope.theta,
        rope_float32=False,
        rotary_size=_rotary_size(config, head_size, rope.share),
        qkv_bias=config.flag("use_qkv_bias"),
        o_bias=config.flag("use_bias"),
        qk_norm="head" if config.flag("use_qk_norm") else None,
        block_length=BLOCK_LENGTH,
        clean_context=True,
        experts=experts,
        first_dense=first_dense,
    )
    check_fit(config, arch, experts)
    merged = config.get("model_type") == "llada2_moe_veomni"
    return FamilyConfig(
        "llada2_merged" if merged else "llada2",
        arch,
        LLADA2_MERGED_WEIGHTS if merged else LLADA2_WEIGHTS,
        TransformerModel,
        _mask_id(config),
        shift=False,
    )


# --- weights --------------------------------------------------------------------------------------

_MLP = ("gate_proj", "up_proj", "down_proj")
_QKV = ("q_proj", "k_proj", "v_proj")
_EXPERT = re.compile(r"^moe/experts/(\w+_proj)/kernel$")

# Our path inside a block -> (name inside `model.layers.{i}`, transposed).
_SHARED_NAMES = {
    "attn_norm/scale": ("input_layernorm.weight", False),
    "mlp_norm/scale": ("post_attention_layernorm.weight", False),
    "moe/router/kernel": ("mlp.gate.weight", True),
    **{f"mlp/{p}/kernel": (f"mlp.{p}.weight", True) for p in _MLP},
}
_LLADAMOE_BLOCK = {
    **_SHARED_NAMES,
    **{f"attn/{p}/kernel": (f"self_attn.{p}.weight", True) for p in (*_QKV, "o_proj")},
    **{f"attn/{p}/bias": (f"self_attn.{p}.bias", False) for p in (*_QKV, "o_proj")},
    "attn/q_norm/scale": ("self_attn.q_norm.weight", False),
    "attn/k_norm/scale": ("self_attn.k_norm.weight", False),
    "moe/router/expert_bias": ("mlp.expert_bias", False),
    **{f"shared/{p}/kernel": (f"shared_expert.{p}.weight", True) for p in _MLP},
}
_LLADA2_BLOCK = {
    **_SHARED_NAMES,
    **{f"attn/{p}/kernel": ("attention.query_key_value.weight", True) for p in _QKV},
    **{f"attn/{p}/bias": ("attention.query_key_value.bias", False) for p in _QKV},
    "attn/o_proj/kernel": ("attention.dense.weight", True),
    "attn/o_proj/bias": ("attention.dense.bias", False),
    "attn/q_norm/scale": ("attention.query_layernorm.weight", False),
    "attn/k_norm/scale": ("attention.key_layernorm.weight", False),
    "moe/router/expert_bias": ("mlp.gate.expert_bias", False),
    **{f"shared/{p}/kernel": (f"mlp.shared_experts.{p}.weight", True) for p in _MLP},
}


def _top(embedding: str) -> dict[str, Rule]:
    return {
        "embed/embedding": Rule(embedding),
        "final_norm/scale": Rule("model.norm.weight"),
        "lm_head/kernel": Rule("lm_head.weight", transpose=True),
    }


def _layer(stack: str, num_layers: int) -> str:
    """Returns the layer's number in a source name, of `blocks`, `last_block` and so on."""
    if stack.startswith("first_blocks_"):
        return stack.removeprefix("first_blocks_")
    return "{i}" if stack == "blocks" else str(num_layers - 1)


def _rules(
    top: dict[str, Rule], block: Mapping[str, tuple[str, bool]], expert: str
) -> Callable[[str, int], Rule]:
    """Makes the rules; `expert` names an expert's projection `{p}` inside a layer."""

    def rule(path: str, num_layers: int) -> Rule:
        if path in top:
            return top[path]
        stack, _, inside = path.partition("/")
        layer = f"model.layers.{_layer(stack, num_layers)}"
        if match := _EXPERT.match(inside):
            return Rule(f"{layer}.{expert.replace('{p}', match[1])}", transpose=True)
        name, transpose = block[inside]
        return Rule(
            f"{layer}.{name}",
            transpose,
            joined=_QKV if ".query_key_value." in name else (),
            buffer=name.endswith("expert_bias"),
        )

    return rule


def _with_model(name: str, block_group_size: int) -> str:
    """Puts `model.` back, which `clean_name` takes away: the head stands beside the model."""
    del block_group_size
    return name if name.startswith("lm_head.") else f"model.{name}"


_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
_ADVICE = "save it with separate experts (mlp.experts.0.gate_proj.weight, ...)"

LLADA_MOE_WEIGHTS = Table(
    rule=_rules(_top("model.embed_tokens.weight"), _LLADAMOE_BLOCK, "mlp.experts.{e}.{p}.weight"),
    hub_prefix="",
    tied_head=("lm_head.weight", "model.embed_tokens.weight"),
    canonical=_with_model,
    ignored=_IGNORED,
    rows_fields=("vocab_size",),
    tied_field="tie_word_embeddings",
    refused=((r"\.mlp\.w[12]$", f"fused experts of dInfer are not read; {_ADVICE}"),),
)
LLADA2_WEIGHTS = Table(
    rule=_rules(_top("model.word_embeddings.weight"), _LLADA2_BLOCK, "mlp.experts.{e}.{p}.weight"),
    hub_prefix="",
    tied_head=("lm_head.weight", "model.word_embeddings.weight"),
    canonical=_with_model,
    ignored=_IGNORED,
    rows_fields=("vocab_size",),
    tied_field="tie_word_embeddings",
    refused=(
        (
            r"\.mlp\.experts\.\w+_proj$",
            "stacked experts, as dFactory merges them, need model_type 'llada2_moe_veomni'; "
            f"or {_ADVICE}",
        ),
    ),
)
# dFactory's merged format: all experts of a layer in one tensor [e, out, in].
LLADA2_MERGED_WEIGHTS = LLADA2_WEIGHTS._replace(
    rule=_rules(_top("model.word_embeddings.weight"), _LLADA2_BLOCK, "mlp.experts.{p}"),
    refused=(),
)


_LLADAMOE_CLASSES = ("LLaDAMoEModelLM", "LLaDAMoEModel")
_LLADA2_CLASSES = ("LLaDA2MoeModelLM", "LLaDA2MoeModel")
FAMILIES = (
    Family("lladamoe", read_lladamoe, _LLADAMOE_CLASSES, is_lladamoe),
    Family("llada2_moe", read_llada2, _LLADA2_CLASSES),
    Family("llada2_moe_veomni", read_llada2, _LLADA2_CLASSES),
    Family("llada21_moe", read_llada2, _LLADA2_CLASSES),
)
