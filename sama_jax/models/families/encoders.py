"""Reads the configs and names the tensors of BERT and ModernBERT for masked language modelling.

What the masked language model does not use, the pooler and the next-sentence head, is ignored by
name.

Source of the names: transformers 5, `models/bert/modeling_bert.py` and
`models/modernbert/modeling_modernbert.py`. What the masked language model does not use, the pooler
and the next-sentence head, is ignored by name.
"""

import re
from typing import Any

from sama_jax.errors import ModelError
from sama_jax.models.encoders import (
    BertArchitecture,
    BertModel,
    ModernBertArchitecture,
    ModernBertModel,
)
from sama_jax.models.families.family import Family, FamilyConfig, check_sizes
from sama_jax.models.families.weight_table import Rule, Table, plain_rule

# Defaults of transformers' config classes (5.24).
BERT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
}
_BERT_ONLY = {
    "hidden_act": "gelu",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
}
MODERNBERT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_bias": True,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "tie_word_embeddings": True,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "layer_types": None,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,
}
_MODERNBERT_ONLY = {
    "hidden_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_bias": True,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "tie_word_embeddings": True,
    "rope_scaling": None,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


def read_bert(config: dict[str, Any], where: str) -> FamilyConfig:
    """Reads transformers' BERT. The mask id is the tokenizer's."""
    full = {**BERT_DEFAULTS, **config}
    _refuse_others(full, _BERT_ONLY, "BERT", where)
    check_sizes(full, (*_SIZES, "max_position_embeddings", "type_vocab_size"), where)
    arch = BertArchitecture(
        **_shared(full, 1, where),
        norm_eps=float(full["layer_norm_eps"]),
        max_length=full["max_position_embeddings"],
        token_types=full["type_vocab_size"],
    )
    return FamilyConfig(
        "bert",
        arch,
        BERT_WEIGHTS,
        BertModel,
        full.get("mask_token_id"),
        shift=False,
        kind="masked",
    )


def read_modernbert(config: dict[str, Any], where: str) -> FamilyConfig:
    """Reads transformers' ModernBERT, in the words of version 4 (`global_attn_every_n_layers`,
    `global_rope_theta`) or 5 (`layer_types`, `rope_parameters`). The mask id is the tokenizer's."""
    full = {**MODERNBERT_DEFAULTS, **config}
    _refuse_others(full, _MODERNBERT_ONLY, "ModernBERT", where)
    check_sizes(full, (*_SIZES, "local_attention", "global_attn_every_n_layers"), where)
    layers, every = full["num_hidden_layers"], full["global_attn_every_n_layers"]
    if layers < 2:
        raise ModelError(f"{where}: num_hidden_layers is {layers}, expected 2 or more")
    local = tuple(bool(i % every) for i in range(layers))
    if full["layer_types"] is not None:
        kinds = {"full_attention": False, "sliding_attention": True}
        types = list(full["layer_types"])
        if len(types) != layers or not set(types) <= kinds.keys():
            raise ModelError(
                f"{where}: layer_types is {types}, expected {layers} of {', '.join(kinds)}"
            )
        local = tuple(kinds[kind] for kind in types)
    arch = ModernBertArchitecture(
        **_shared(full, 2, where),
        norm_eps=float(full["norm_eps"]),
        local=local,
        reach=full["local_attention"] // 2,
        global_theta=_theta(full, "full_attention", "global_rope_theta", where),
        local_theta=_theta(full, "sliding_attention", "local_rope_theta", where),
    )
    return FamilyConfig(
        "modernbert",
        arch,
        MODERNBERT_WEIGHTS,
        ModernBertModel,
        full.get("mask_token_id"),
        False,
        "masked",
    )


def _theta(config: dict[str, Any], kind: str, older: str, where: str) -> float:
    """Returns the rotary base of one kind of layers; `rope_parameters` goes first."""
    rope = (config["rope_parameters"] or {}).get(kind) or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"{where}: rope_parameters.{kind}.rope_type is {rope['rope_type']!r}, only 'default' "
            "is supported"
        )
    return float(rope.get("rope_theta", config[older]))


def _refuse_others(config: dict[str, Any], only: dict[str, Any], name: str, where: str) -> None:
    wrong = [
        f"{field} is {config[field]!r}, only {have!r} is supported"
        for field, have in only.items()
        if config[field] != have
    ]
    if wrong:
        raise ModelError(f"{where}: unsupported {name} variant: " + "; ".join(wrong))


def _shared(config: dict[str, Any], parity: int, where: str) -> dict[str, int]:
    """Reads the sizes that both have; a head's must be a multiple of `parity` (2 for rotation)."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % (parity * heads):
        raise ModelError(
            f"{where}: num_attention_heads {heads} must divide hidden_size {width}"
            + (" into even sizes" if parity == 2 else "")
        )
    return {
        "vocab_size": config["vocab_size"],
        "width": width,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "mlp_width": config["intermediate_size"],
    }


# --- weights --------------------------------------------------------------------------------------

# Our path inside a block -> name inside `bert.encoder.layer.{i}`.
_BERT_BLOCK = {
    "attn/q_proj": "attention.self.query",
    "attn/k_proj": "attention.self.key",
    "attn/v_proj": "attention.self.value",
    "attn/o_proj": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp/up_proj": "intermediate.dense",
    "mlp/down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_BERT_TOP = {
    "embed": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "head/dense": "cls.predictions.transform.dense",
    "head/norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",
}


def _newer_norm_names(name: str, block_group_size: int) -> str:
    """Files converted from TensorFlow call a norm's weight `gamma` and its bias `beta`."""
    del block_group_size
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


BERT_WEIGHTS = Table(
    rule=plain_rule(_BERT_TOP, "bert.encoder.layer", _BERT_BLOCK),
    hub_prefix="",
    tied_head=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    copies=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    canonical=_newer_norm_names,
    ignored=re.compile(
        r"^bert\.pooler\.|^cls\.seq_relationship\.|^bert\.embeddings\.(position|token_type)_ids$"
    ),
)


# Our path inside a block -> name inside `model.layers.{i}`.
_MODERNBERT_BLOCK = {
    "attn_norm": "attn_norm",
    "attn/o_proj": "attn.Wo",
    "mlp_norm": "mlp_norm",
    "mlp/down_proj": "mlp.Wo",
}
# Rows of several of our modules; the first half of Wi is activated.
_MODERNBERT_JOINED = {
    "attn.Wqkv": ("q_proj", "k_proj", "v_proj"),
    "mlp.Wi": ("gate_proj", "up_proj"),
}
_MODERNBERT_TOP = {
    "embed": "model.embeddings.tok_embeddings.weight",
    "embed_norm": "model.embeddings.norm.weight",
    "final_norm": "model.final_norm.weight",
    "head/dense": "head.dense.weight",
    "head/norm": "head.norm.weight",
    "head": "decoder.bias",
}


def modernbert_rule(path: str, num_layers: int) -> Rule:
    """Returns the rule of one of our parameter paths, such as `blocks/attn/q_proj/kernel`."""
    module, _, leaf = path.rpartition("/")
    kernel = leaf == "kernel"
    if module in _MODERNBERT_TOP:
        return Rule(_MODERNBERT_TOP[module], kernel)
    stack, _, inside = module.partition("/")
    number = {"blocks": "{i}", "first_block": "0"}.get(stack, str(num_layers - 1))
    layer = f"model.layers.{number}"
    for name, modules in _MODERNBERT_JOINED.items():
        if inside.rpartition("/")[2] in modules:
            return Rule(f"{layer}.{name}.weight", kernel, joined=modules)
    return Rule(f"{layer}.{_MODERNBERT_BLOCK[inside]}.weight", kernel)


def _with_model(name: str, block_group_size: int) -> str:
    """Puts `model.` back, which `clean_name` takes away: the head stands beside the model."""
    del block_group_size
    return name if name.startswith(("head.", "decoder.")) else f"model.{name}"


MODERNBERT_WEIGHTS = Table(
    rule=modernbert_rule,
    hub_prefix="",
    tied_head=("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    canonical=_with_model,
    ignored=re.compile(r"^model\.(layers\.\d+\.attn\.)?rotary_emb\.[a-z_]*inv_freq$"),
)


FAMILIES = (
    Family("bert", read_bert, ("BertForMaskedLM", "BertForPreTraining")),
    Family("modernbert", read_modernbert, ("ModernBertForMaskedLM",)),
)
