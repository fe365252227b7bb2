"""Reads the configs and names the tensors of BERT, RoBERTa and ModernBERT.

Source of the names: transformers 5, `models/bert/modeling_bert.py`,
`models/roberta/modeling_roberta.py` and `models/modernbert/modeling_modernbert.py`. What the masked
language model does not use, the pooler and the next-sentence head, is ignored by name.
"""

import re
from collections.abc import Mapping
from typing import Any

from sama_jax.models.encoders import (
    BertArchitecture,
    BertModel,
    ModernBertArchitecture,
    ModernBertModel,
)
from sama_jax.models.families.family import Family, FamilyConfig
from sama_jax.models.families.fields import Fields
from sama_jax.models.families.weight_table import Rule, Table, plain_rule
from sama_jax.untrusted import shown

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
ROBERTA_DEFAULTS = {**BERT_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1}
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


def read_bert(config: Fields) -> FamilyConfig:
    """Reads transformers' BERT. The mask id is the tokenizer's."""
    return _bert(config.with_defaults(BERT_DEFAULTS), "bert", BERT_WEIGHTS)


def read_roberta(config: Fields) -> FamilyConfig:
    """Reads transformers' RoBERTa, whose tokens have the rows of the position table behind that of
    its padding token. The mask id is the tokenizer's."""
    config = config.with_defaults(ROBERTA_DEFAULTS)
    rows, padding = config.size("max_position_embeddings"), config.get("pad_token_id")
    if type(padding) is not int or not 0 <= padding < rows - 1:
        config.refuse(
            f"pad_token_id is {shown(padding)}; expected an integer from 0 to {rows - 2}, since "
            f"positions begin behind it in a table of {rows} rows"
        )
    return _bert(config, "roberta", ROBERTA_WEIGHTS, padding)


def _bert(config: Fields, name: str, weights: Table, padding_id: int | None = None) -> FamilyConfig:
    config.only(_BERT_ONLY)
    rows, token_types = config.sizes("max_position_embeddings", "type_vocab_size")
    arch = BertArchitecture(
        **_shared(config, 1),
        norm_eps=config.positive("layer_norm_eps"),
        max_length=rows if padding_id is None else rows - padding_id - 1,
        token_types=token_types,
        padding_id=padding_id,
    )
    mask_id = config.get("mask_token_id")
    return FamilyConfig(name, arch, weights, BertModel, mask_id, shift=False, kind="masked")


def read_modernbert(config: Fields) -> FamilyConfig:
    """Reads transformers' ModernBERT, in the words of version 4 (`global_attn_every_n_layers`,
    `global_rope_theta`) or 5 (`layer_types`, `rope_parameters`). The mask id is the tokenizer's."""
    config = config.with_defaults(MODERNBERT_DEFAULTS)
    config.only(_MODERNBERT_ONLY)
    sizes = _shared(config, 2)
    if sizes["num_layers"] < 2:
        config.refuse(f"num_hidden_layers is {sizes['num_layers']}, expected 2 or more")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or set(rope) - _LAYER_KINDS.keys():
        config.refuse(
            f"rope_parameters is {shown(rope)}; expected one set for each of "
            + " and ".join(_LAYER_KINDS)
        )
    arch = ModernBertArchitecture(
        **sizes,
        norm_eps=config.positive("norm_eps"),
        local=_local_layers(config, sizes["num_layers"]),
        reach=config.size("local_attention") // 2,
        global_theta=_theta(config, rope, "full_attention", "global_rope_theta"),
        local_theta=_theta(config, rope, "sliding_attention", "local_rope_theta"),
    )
    return FamilyConfig(
        "modernbert",
        arch,
        MODERNBERT_WEIGHTS,
        ModernBertModel,
        config.get("mask_token_id"),
        False,
        "masked",
    )


_LAYER_KINDS = {"full_attention": False, "sliding_attention": True}


def _local_layers(config: Fields, layers: int) -> tuple[bool, ...]:
    """Returns by layer whether it is local: by its list, else every layer but each third."""
    every, types = config.size("global_attn_every_n_layers"), config.get("layer_types")
    by_number = tuple(bool(i % every) for i in range(layers))
    if types is None:
        return by_number
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(_LAYER_KINDS):
        config.refuse(
            f"layer_types is {shown(types)}, expected {layers} of {', '.join(_LAYER_KINDS)}"
        )
    local = tuple(_LAYER_KINDS[kind] for kind in types)
    if config.states("global_attn_every_n_layers") and local != by_number:
        config.refuse(
            f"layer_types and global_attn_every_n_layers {every} do not agree; remove the wrong one"
        )
    return local


def _theta(config: Fields, rope: Mapping[str, Any], kind: str, older: str) -> float:
    """Returns the rotary base of one kind of layers, by `rope_parameters` or its older name."""
    theta = config.positive(older)
    inside = rope.get(kind) or {}
    if not isinstance(inside, dict):
        config.refuse(f"rope_parameters.{kind} is {shown(inside)}, expected an object")
    fields = Fields(inside, f"{config.where}, rope_parameters.{kind}", {"rope_theta": theta})
    fields.only({"rope_type": "default"})
    found = fields.positive("rope_theta")
    fields.refuse_rest(all_matter=True)
    if config.states(older) and found != theta:
        config.refuse(f"{older} is {theta}, but rope_parameters.{kind} says {found}")
    return found


def _shared(config: Fields, parity: int) -> dict[str, int]:
    """Reads the sizes that both have; a head's must be a multiple of `parity` (2 for rotation)."""
    rows, width, layers, heads, inner = config.sizes(*_SIZES)
    if width % (parity * heads):
        config.refuse(
            f"num_attention_heads {heads} must divide hidden_size {width}"
            + (" into even sizes" if parity == 2 else "")
        )
    return {
        "vocab_size": rows,
        "width": width,
        "num_layers": layers,
        "num_heads": heads,
        "mlp_width": inner,
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
ROBERTA_WEIGHTS = Table(
    rule=plain_rule(
        {
            **{ours: name.replace("bert.", "roberta.") for ours, name in _BERT_TOP.items()},
            "head/dense": "lm_head.dense",
            "head/norm": "lm_head.layer_norm",
            "head": "lm_head",
        },
        "roberta.encoder.layer",
        _BERT_BLOCK,
    ),
    hub_prefix="",
    tied_head=("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    copies=(("lm_head.decoder.bias", "lm_head.bias"),),
    canonical=_newer_norm_names,
    ignored=re.compile(r"^roberta\.pooler\.|^roberta\.embeddings\.(position|token_type)_ids$"),
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
    Family("roberta", read_roberta, ("RobertaForMaskedLM",)),
    Family("modernbert", read_modernbert, ("ModernBertForMaskedLM",)),
)
