"""Dream, A2D, iLLaDA and the causal Llama, Qwen2 and Qwen3: the names that transformers gives them.

Source of the names: `models/{qwen2,qwen3,llama}` of transformers 5.24, `trainer/model/dream` of
`Stry233/SAMA`; iLLaDA's below `model.layers` are expected, not read anywhere.
"""

import re

from sama_jax.models.families.weight_table import Rule, Table

# Our path inside a block -> name inside `model.layers.{i}`; kernels are transposed.
_BLOCK = {
    "attn_norm": "input_layernorm",
    **{f"attn/{p}": f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    **{f"mlp/{p}": f"mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
}
_TOP = {
    "embed/embedding": Rule("model.embed_tokens.weight"),
    "final_norm/scale": Rule("model.norm.weight"),
    "lm_head/kernel": Rule("lm_head.weight", transpose=True),
}


def decoder_rule(path: str, num_layers: int) -> Rule:
    """The rule of one of our parameter paths, such as `blocks/attn/q_proj/kernel`."""
    if path in _TOP:
        return _TOP[path]
    stack, _, rest = path.partition("/")
    inside, _, leaf = rest.rpartition("/")
    layer = "{i}" if stack == "blocks" else str(num_layers - 1)
    suffix = "bias" if leaf == "bias" else "weight"
    return Rule(f"model.layers.{layer}.{_BLOCK[inside]}.{suffix}", leaf == "kernel")


def _with_model(name: str, block_group_size: int) -> str:
    """Puts back the `model.` that `clean_name` takes away: the head stands beside the model."""
    del block_group_size
    return name if name.startswith("lm_head.") else f"model.{name}"


DECODER = Table(
    rule=decoder_rule,
    hub_prefix="",
    tied_head=("lm_head.weight", "model.embed_tokens.weight"),
    canonical=_with_model,
    ignored=re.compile(r"\.rotary_emb\.inv_freq$"),
)
