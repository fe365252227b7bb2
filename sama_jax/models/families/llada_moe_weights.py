"""LLaDA-MoE, LLaDA2.0 and LLaDA2.1.

Source of the names: `ZHZisZZ/dllm` `dllm/pipelines/llada/models/modeling_lladamoe.py` and
`dllm/pipelines/llada2/models/modeling_llada2_moe.py`; stacked experts, `inclusionAI/dFactory`
`scripts/moe_convertor.py`.
"""

import re
from collections.abc import Callable, Mapping

from sama_jax.models.families.weight_table import Rule, Table

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
    """`blocks`, `last_block` or `first_blocks_0` -> the layer's number in a source name."""
    if stack.startswith("first_blocks_"):
        return stack.removeprefix("first_blocks_")
    return "{i}" if stack == "blocks" else str(num_layers - 1)


def _rules(
    top: dict[str, Rule], block: Mapping[str, tuple[str, bool]], expert: str
) -> Callable[[str, int], Rule]:
    """`expert`: name of an expert's projection `{p}` inside a layer."""

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

LLADA_MOE = Table(
    rule=_rules(_top("model.embed_tokens.weight"), _LLADAMOE_BLOCK, "mlp.experts.{e}.{p}.weight"),
    hub_prefix="",
    tied_head=("lm_head.weight", "model.embed_tokens.weight"),
    canonical=_with_model,
    ignored=_IGNORED,
    refused=((r"\.mlp\.w[12]$", f"fused experts of dInfer are not read; {_ADVICE}"),),
)
LLADA2 = Table(
    rule=_rules(_top("model.word_embeddings.weight"), _LLADA2_BLOCK, "mlp.experts.{e}.{p}.weight"),
    hub_prefix="",
    tied_head=("lm_head.weight", "model.word_embeddings.weight"),
    canonical=_with_model,
    ignored=_IGNORED,
    refused=(
        (
            r"\.mlp\.experts\.\w+_proj$",
            "stacked experts, as dFactory merges them, need model_type 'llada2_moe_veomni'; "
            f"or {_ADVICE}",
        ),
    ),
)
# dFactory's merged format: all experts of a layer in one tensor [e, out, in].
LLADA2_MERGED = LLADA2._replace(
    rule=_rules(_top("model.word_embeddings.weight"), _LLADA2_BLOCK, "mlp.experts.{p}"),
    refused=(),
)
