"""Reads the configs and names the tensors of MDLM, BD3-LM and SEDD, which are one network.

Source of the names: `models/dit.py` of kuleshov-group/mdlm, `models/hf` of kuleshov-group/bd3lms
(1c3e8f4) and `model/transformer.py` of louaaron/Score-Entropy-Discrete-Diffusion.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from sama_jax.models.dit import DitArchitecture, DitModel
from sama_jax.models.families.family import Family, FamilyConfig
from sama_jax.models.families.fields import Fields
from sama_jax.models.families.weight_table import Rule, Table
from sama_jax.untrusted import shown

MDLM_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50258,
    "hidden_dim": 768,
    "cond_dim": 129,
    "n_blocks": 12,
    "n_heads": 12,
    "time_conditioning": False,
}
"""Of the Hub's config class, as third parties report it; the published file overrides `cond_dim`
with 128."""


def read_mdlm(config: Fields) -> FamilyConfig:
    """Reads kuleshov-group/mdlm-owt's `config.json`. The mask is the last row, which MDLM
    appends to a tokenizer without one; `mask_token_id` replaces it."""
    config = config.with_defaults(MDLM_DEFAULTS)
    rows, timed = config.size("vocab_size"), config.flag("time_conditioning")
    arch = _architecture(config, rows, "hidden_dim", timed=timed)
    mask_id = config.get("mask_token_id")
    mask_id = rows - 1 if mask_id is None else mask_id
    return FamilyConfig("mdlm", arch, MDLM_WEIGHTS, DitModel, mask_id, shift=False)


BD3LM_DEFAULTS: dict[str, Any] = {
    **MDLM_DEFAULTS,
    "block_size": 1,
    "model_length": 1024,
    "cross_attn": True,
    "adaln": True,
}
"""Of its config class. Its published files are expected to have a `cond_dim` of 128."""
_BD3LM_ONLY = {"causal": False, "time_conditioning": False}


def read_bd3lm(config: Fields) -> FamilyConfig:
    """Reads kuleshov-group/bd3lm-owt-block_size16's `config.json`.

    `cross_attn` says whether blocks see the clean text before them; without it attention is full,
    as in the model that these are trained from. The mask is MDLM's.
    """
    config = config.with_defaults(BD3LM_DEFAULTS)
    config.only(_BD3LM_ONLY)
    config.get("attn_backend")  # which of PyTorch's programs computes the same
    rows, block, longest = config.sizes("vocab_size", "block_size", "model_length")
    arch = _architecture(config, rows, "hidden_dim", timed=False)
    blocks = config.flag("cross_attn") and block < longest
    arch = dataclasses.replace(
        arch,
        block_length=block if blocks else None,
        clean_context=blocks,
        modulated=config.flag("adaln"),
    )
    mask_id = config.get("mask_token_id")
    mask_id = rows - 1 if mask_id is None else mask_id
    return FamilyConfig("bd3lm", arch, MDLM_WEIGHTS, DitModel, mask_id, shift=False)


def is_sedd(config: Mapping[str, Any]) -> bool:
    """Tells SEDD, which publishes its training configuration: `graph` and `tokens`, no type."""
    return "model_type" not in config and {"model", "graph", "noise", "tokens"} <= config.keys()


def read_sedd(config: Fields) -> FamilyConfig:
    """Reads louaaron/sedd-small's `config.json`: `tokens`, `model.*`, `graph.type`, `noise.type`.

    There are no defaults. The mask token is the row after the tokenizer's. `scale_by_sigma` only
    adds a constant to all scores, so both values are accepted.
    """
    for section, have in (("graph", "absorb"), ("noise", "loglinear")):
        kind = config.section(section).get("type")
        if kind != have:
            config.refuse(f"{section}.type is {shown(kind)}, only '{have}' is supported")
    tokens, model = config.size("tokens"), config.section("model")
    model.get("scale_by_sigma")
    arch = _architecture(model, tokens + 1, "hidden_size", timed=True)
    model.refuse_rest()
    return FamilyConfig("sedd", arch, SEDD_WEIGHTS, DitModel, tokens, shift=False)


def _architecture(config: Fields, rows: int, width_name: str, *, timed: bool) -> DitArchitecture:
    width, condition, layers, heads = config.sizes(width_name, "cond_dim", "n_blocks", "n_heads")
    if width % (2 * heads):
        config.refuse(f"n_heads {heads} must divide {width_name} {width} into even sizes")
    return DitArchitecture(
        vocab_size=rows,
        width=width,
        num_layers=layers,
        num_heads=heads,
        condition_width=condition,
        timed=timed,
    )


# --- weights --------------------------------------------------------------------------------------

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
    """Returns the rule of one of our parameter paths, such as `blocks/attn/q_proj/kernel`."""
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


# BD3-LM also keeps the noise levels that it was trained at.
_BUFFERS = re.compile(r"^rotary_emb\.inv_freq$|^sampling_eps_(min|max)$")

SEDD_WEIGHTS = Table(rule=dit_rule, hub_prefix="", ignored=_BUFFERS)
MDLM_WEIGHTS = Table(
    rule=dit_rule,
    hub_prefix="backbone.",
    canonical=lambda name, block_group_size: name.removeprefix("backbone."),
    ignored=_BUFFERS,
)


FAMILIES = (
    Family("mdlm", read_mdlm, ("MDLM",)),
    Family("bd3lm", read_bd3lm, ("BD3LM",)),
    Family("sedd", read_sedd, ("SEDD",), is_sedd),
)
