"""SMDM (nieshen/SMDM): masked diffusion on lit-gpt's Llama.

The published files are bare weights without a config. `config.json` has to be written: lit-gpt's
field names (`lit_gpt/config.py` of ML-GSAI/SMDM, 583aa47), as in `trainer/configs/models/
Diff_LLaMA_*.json` of `Stry233/SAMA`, and `model_type` `smdm`.
"""

from typing import Any

from sama_jax.errors import ModelError
from sama_jax.models.families.family import Family, FamilyConfig, check_sizes
from sama_jax.models.transformer import Architecture

_SIZES = ("n_layer", "n_head", "n_embd", "intermediate_size", "vocab_size")
_OPTIONAL_SIZES = ("n_query_groups", "padded_vocab_size")

# What all published models share; another value is another network.
_ONLY: dict[str, tuple[Any, ...]] = {
    "rotary_percentage": (1.0,),
    "parallel_residual": (False,),
    "shared_attention_norm": (False,),
    "bias": (False,),
    "condense_ratio": (1,),
    "_norm_class": ("FusedRMSNorm", "RMSNorm"),
    "_mlp_class": ("LLaMAMLP",),
}


def read_smdm(config: dict[str, Any], where: str) -> FamilyConfig:
    """Diff_LLaMA_*: the mask token is the row behind the vocabulary, and has no logit."""
    wrong = [
        f"{k} is {config[k]!r}" for k, have in _ONLY.items() if config.get(k, have[0]) not in have
    ]
    if wrong:
        raise ModelError(f"{where}: not supported: " + "; ".join(wrong))
    check_sizes(config, (*_SIZES, *(n for n in _OPTIONAL_SIZES if n in config)), where)
    heads, width = config["n_head"], config["n_embd"]
    groups = config.get("n_query_groups", heads)
    rows = config.get("padded_vocab_size", config["vocab_size"])
    if width % heads or heads % groups or (width // heads) % 2:
        raise ModelError(
            f"{where}: n_embd {width}, n_head {heads}, n_query_groups {groups} do not fit: heads "
            "must divide n_embd into even sizes and be a multiple of n_query_groups"
        )
    arch = Architecture(
        vocab_size=rows + 1,
        head_rows=rows,
        width=width,
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=groups,
        head_size=width // heads,
        mlp_width=config["intermediate_size"],
        tied=False,
        norm_eps=float(config.get("norm_eps", 1e-5)),
        rope_theta=10000.0,
        rope_table="bfloat16",
    )
    mask_id = config.get("mask_token_id", rows)
    return FamilyConfig(f"smdm/{groups}x{heads // groups}x{width // heads}", arch, mask_id, False)


SMDM = Family(read_smdm, ("TransEncoder",))
