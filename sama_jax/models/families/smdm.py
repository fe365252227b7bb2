"""Reads SMDM (nieshen/SMDM), masked diffusion on lit-gpt's Llama, and names its tensors.

The published files are bare weights without a config. `config.json` has to be written: lit-gpt's
field names (`lit_gpt/config.py` of ML-GSAI/SMDM, 583aa47), as in `trainer/configs/models/
Diff_LLaMA_*.json` of `Stry233/SAMA`, and `model_type` `smdm`.

Source of the names: `lit_gpt/diffmodel.py` of `ML-GSAI/SMDM`, from its modules; no file was opened.
"""

from typing import Any

from sama_jax.models.families.family import UNLIMITED, Family, FamilyConfig
from sama_jax.models.families.fields import Fields
from sama_jax.models.families.weight_table import Fused, Rule, Table
from sama_jax.models.transformer import Architecture, TransformerModel

# What all published models share; another value is another network.
_ONLY: dict[str, Any] = {
    "rotary_percentage": 1.0,
    "rope_base": 10000,
    "parallel_residual": False,
    "shared_attention_norm": False,
    "bias": False,
    "condense_ratio": 1,
    "_norm_class": ("FusedRMSNorm", "RMSNorm"),
    "_mlp_class": "LLaMAMLP",
}


def read_smdm(config: Fields) -> FamilyConfig:
    """Reads Diff_LLaMA_*: the mask token is the row behind the vocabulary, and has no logit."""
    config.only(_ONLY)
    layers, heads, width, inner, vocabulary = config.sizes(
        "n_layer", "n_head", "n_embd", "intermediate_size", "vocab_size"
    )
    config = config.with_defaults({"n_query_groups": heads, "padded_vocab_size": vocabulary})
    groups, rows = config.sizes("n_query_groups", "padded_vocab_size")
    if width % heads or heads % groups or (width // heads) % 2:
        config.refuse(
            f"n_embd {width}, n_head {heads}, n_query_groups {groups} do not fit: heads must "
            "divide n_embd into even sizes and be a multiple of n_query_groups"
        )
    arch = Architecture(
        vocab_size=rows + 1,
        head_rows=rows,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=groups,
        head_size=width // heads,
        mlp_width=inner,
        tied=False,
        norm_eps=config.positive("norm_eps", 1e-5),
        rope_theta=10000.0,
        rope_table="bfloat16",
    )
    mask_id = config.get("mask_token_id", rows)
    weights = smdm_table(groups, heads // groups, width // heads)
    length = config.sizes("block_size", null=("block_size",))[0] or UNLIMITED
    family = FamilyConfig("smdm", arch, weights, TransformerModel, mask_id, shift=False)
    return family._replace(max_length=length)


# --- weights --------------------------------------------------------------------------------------

# Our path inside a block -> name inside `transformer.h.{i}`; kernels are transposed.
_BLOCK = {
    "attn_norm": "norm_1",
    "attn/o_proj": "attn.proj",
    "mlp_norm": "norm_2",
    "mlp/gate_proj": "mlp.swiglu.w1",
    "mlp/up_proj": "mlp.swiglu.w2",
    "mlp/down_proj": "mlp.swiglu.w3",
}
_TOP = {
    "embed/embedding": Rule("transformer.wte.weight"),
    "final_norm/scale": Rule("transformer.ln_f.weight"),
    "lm_head/kernel": Rule("lm_head.weight", transpose=True),
}


def smdm_table(groups: int, queries: int, head_size: int) -> Table:
    """Names tensors whose fused matrix has `groups` key/value heads, each behind `queries` others.

    The one family whose tensors cannot be split without these numbers.
    """
    view = (groups, queries + 2, head_size)
    everything = slice(None)
    fused = {
        "attn/q_proj": Fused(view, (everything, slice(0, queries))),
        "attn/k_proj": Fused(view, (everything, queries)),
        "attn/v_proj": Fused(view, (everything, queries + 1)),
    }

    def rule(path: str, num_layers: int) -> Rule:
        if path in _TOP:
            return _TOP[path]
        stack, _, rest = path.partition("/")
        inside, _, leaf = rest.rpartition("/")
        block = f"transformer.h.{'{i}' if stack == 'blocks' else num_layers - 1}"
        if inside in fused:
            return Rule(f"{block}.attn.attn.weight", transpose=True, fused=fused[inside])
        return Rule(f"{block}.{_BLOCK[inside]}.weight", leaf == "kernel")

    return Table(rule=rule, hub_prefix="")


FAMILIES = (Family("smdm", read_smdm, ("TransEncoder",)),)
