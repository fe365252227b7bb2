"""LLaDA dense.

Source of the names: `Stry233/SAMA` `trainer/model/llada/modeling_llada.py` and the Hub index of
GSAI-ML/LLaDA-8B-Instruct.
"""

import re

from sama_jax.models.families.weight_table import Rule, Table

# Our path inside a block -> (name inside `transformer.blocks.{i}`, transposed).
_LLADA_BLOCK = {
    "attn_norm": ("attn_norm", False),
    "attn/q_proj": ("q_proj", True),
    "attn/k_proj": ("k_proj", True),
    "attn/v_proj": ("v_proj", True),
    "attn/q_norm": ("q_norm", False),
    "attn/k_norm": ("k_norm", False),
    "attn/o_proj": ("attn_out", True),
    "mlp_norm": ("ff_norm", False),
    "mlp/gate_proj": ("ff_proj", True),
    "mlp/up_proj": ("up_proj", True),
    # Not to be confused with `transformer.ff_out`, the vocabulary head.
    "mlp/down_proj": ("ff_out", True),
}
_LLADA_TOP = {
    "embed/embedding": Rule("transformer.wte.weight"),
    "final_norm/scale": Rule("transformer.ln_f.weight"),
    "final_norm/bias": Rule("transformer.ln_f.bias"),
    "lm_head/kernel": Rule("transformer.ff_out.weight", transpose=True),
    "lm_head/bias": Rule("transformer.ff_out.bias"),
}


def llada_rule(path: str, num_layers: int) -> Rule:
    """The rule of one of our parameter paths, such as `blocks/attn/q_proj/kernel`."""
    if path in _LLADA_TOP:
        return _LLADA_TOP[path]
    stack, _, rest = path.partition("/")
    inside, _, leaf = rest.rpartition("/")
    name, transpose = _LLADA_BLOCK[inside]
    layer = "{i}" if stack == "blocks" else str(num_layers - 1)
    suffix = "bias" if leaf == "bias" else "weight"
    return Rule(f"transformer.blocks.{layer}.{name}.{suffix}", transpose and leaf == "kernel")


def _plain_blocks(name: str, block_group_size: int) -> str:
    """Block groups (`transformer.block_groups.{g}.{j}.`) become plain blocks."""
    if match := re.match(r"^transformer\.block_groups\.(\d+)\.(\d+)\.(.+)$", name):
        group, within, rest = int(match[1]), int(match[2]), match[3]
        return f"transformer.blocks.{group * block_group_size + within}.{rest}"
    return name


LLADA = Table(
    rule=llada_rule,
    hub_prefix="model.",
    tied_head=("transformer.ff_out.weight", "transformer.wte.weight"),
    canonical=_plain_blocks,
)
