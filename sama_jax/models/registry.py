"""Which family a folder's `config.json` belongs to, and its architecture. No files, no devices.

A family is one reader `config dict -> FamilyConfig`. Fields that a config leaves out take the
default of the family's own config class, never the value of its best-known checkpoint.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from sama_jax.errors import ModelError, nearest
from sama_jax.models.transformer import Architecture


class FamilyConfig(NamedTuple):
    """What a `config.json` says, in our words."""

    family: str
    arch: Architecture
    mask_id: int | None
    """None where the config names none; then the tokenizer or `--mask-id` must."""
    shift: bool
    block_group_size: int


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

# Sizes: field -> whether it may be null, because another field then decides.
_LLADA_SIZES = {
    "d_model": False,
    "n_heads": False,
    "n_layers": False,
    "mlp_ratio": False,
    "vocab_size": False,
    "block_group_size": False,
    "n_kv_heads": True,
    "mlp_hidden_size": True,
    "embedding_size": True,
}


def read_llada(config: dict[str, Any], where: str) -> FamilyConfig:
    """LLaDA dense: 8B-Base, -Instruct, 1.5 and the small configurations of the SAMA repository."""

    def get(name: str) -> Any:
        return config.get(name, LLADA_DEFAULTS[name])

    wrong = [
        f"{name} is {get(name)!r}{'' if name in config else ' (class default, field is absent)'}, "
        f"only {have!r} is supported"
        for name, have in _LLADA_ONLY.items()
        if get(name) != have
    ]
    if wrong:
        raise ModelError(f"{where}: unsupported LLaDA variant: " + "; ".join(wrong))
    wrong = [
        f"{name} is {get(name)!r}"
        for name, optional in _LLADA_SIZES.items()
        if not (optional and get(name) is None) and (type(get(name)) is not int or get(name) < 1)
    ]
    if wrong:
        raise ModelError(f"{where}: expected positive integers, but " + "; ".join(wrong))
    width, heads = get("d_model"), get("n_heads")
    kv_heads = get("n_kv_heads") or (1 if get("multi_query_attention") else heads)
    if width % heads or heads % kv_heads or (width // heads) % 2:
        raise ModelError(
            f"{where}: d_model {width}, n_heads {heads}, n_kv_heads {kv_heads} do not fit: heads "
            "must divide d_model into even sizes and be a multiple of n_kv_heads"
        )
    norm_bias = get("bias_for_layer_norm")
    arch = Architecture(
        vocab_size=get("embedding_size") or get("vocab_size"),
        width=width,
        num_layers=get("n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=width // heads,
        mlp_width=get("mlp_hidden_size") or get("mlp_ratio") * width,
        tied=bool(get("weight_tying")),
        norm_eps=float(get("rms_norm_eps")),
        rope_theta=float(get("rope_theta")),
        qkv_bias=bool(get("include_bias") or get("include_qkv_bias")),
        linear_bias=bool(get("include_bias")),
        norm_bias=bool(get("include_bias") if norm_bias is None else norm_bias),
        qk_norm=bool(get("attention_layer_norm")),
        scale_embedding=bool(get("input_emb_norm")),
        scale_logits=bool(get("scale_logits")),
        rope_float32=bool(get("rope_full_precision")),
    )
    return FamilyConfig("llada", arch, get("mask_token_id"), False, get("block_group_size"))


FAMILIES: dict[str, Callable[[dict[str, Any], str], FamilyConfig]] = {"llada": read_llada}

_ARCHITECTURES = {"llada": ("LLaDAModelLM", "LLaDAModel")}


def read_config(config: dict[str, Any], where: str) -> FamilyConfig:
    """The family of a parsed `config.json`, by `model_type` and `architectures` together.

    `where` is the file's path, for messages. Raises `ModelError` for what is not known: the two
    fields are both needed, since LLaDA-MoE's Hub config also says `llada`.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(
            f"{where}: model_type is {kind!r}, which is not a supported family"
            + nearest(str(kind), FAMILIES)
        )
    architectures = config.get("architectures") or []
    listed = architectures if isinstance(architectures, list) else [architectures]
    if architectures and not any(name in listed for name in _ARCHITECTURES[kind]):
        raise ModelError(
            f"{where}: model_type is '{kind}' but architectures is {architectures}; "
            f"expected one of {list(_ARCHITECTURES[kind])}"
        )
    try:
        return FAMILIES[kind](config, where)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: a field has an unusable value ({error})") from None
