"""MDLM and SEDD: one network, with and without the prefix `backbone.`.

Source of the names: `models/dit.py` of kuleshov-group/mdlm and `model/transformer.py` of
louaaron/Score-Entropy-Discrete-Diffusion.
"""

import re

from sama_jax.models.families.weight_table import Rule, Table

# Our path inside a block -> name inside `blocks.{i}`.
_BLOCK = {
    "attn_norm": "norm1",
    "attn/o_proj": "attn_out",
    "mlp_norm": "norm2",
    "mlp/up_proj": "mlp.0",
    "mlp/down_proj": "mlp.2",
    "modulation": "adaLN_modulation",
}
_TOP = {
    "time/dense_0": "sigma_map.mlp.0",
    "time/dense_1": "sigma_map.mlp.2",
    "final_norm": "output_layer.norm_final",
    "final_modulation": "output_layer.adaLN_modulation",
    "lm_head": "output_layer.linear",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def dit_rule(path: str, num_layers: int) -> Rule:
    """The rule of one of our parameter paths, such as `blocks/attn/q_proj/kernel`."""
    if path == "embed/embedding":
        return Rule("vocab_embed.embedding")
    module, _, leaf = path.rpartition("/")
    kernel, suffix = leaf == "kernel", "bias" if leaf == "bias" else "weight"
    if module in _TOP:
        return Rule(f"{_TOP[module]}.{suffix}", kernel)
    stack, _, inside = module.partition("/")
    layer = "{i}" if stack == "blocks" else str(num_layers - 1)
    if inside.removeprefix("attn/") in _QKV:
        return Rule(f"blocks.{layer}.attn_qkv.weight", kernel, joined=_QKV)
    return Rule(f"blocks.{layer}.{_BLOCK[inside]}.{suffix}", kernel)


_BUFFERS = re.compile(r"^rotary_emb\.inv_freq$")

SEDD = Table(rule=dit_rule, hub_prefix="", ignored=_BUFFERS)
MDLM = Table(
    rule=dit_rule,
    hub_prefix="backbone.",
    canonical=lambda name, block_group_size: name.removeprefix("backbone."),
    ignored=_BUFFERS,
)
