"""BERT and ModernBERT for masked language modelling.

Source of the names: transformers 5, `models/bert/modeling_bert.py` and
`models/modernbert/modeling_modernbert.py`. What the masked language model does not use, the pooler
and the next-sentence head, is ignored by name.
"""

import re

from sama_jax.models.families.weight_table import Rule, Table

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


def _layer(stack: str, num_layers: int) -> str:
    return {"blocks": "{i}", "first_block": "0"}.get(stack, str(num_layers - 1))


def bert_rule(path: str, num_layers: int) -> Rule:
    """The rule of one of our parameter paths, such as `blocks/attn/q_proj/kernel`."""
    module, _, leaf = path.rpartition("/")
    kernel, suffix = leaf == "kernel", "bias" if leaf == "bias" else "weight"
    if module in _BERT_TOP:
        return Rule(f"{_BERT_TOP[module]}.{suffix}", kernel)
    stack, _, inside = module.partition("/")
    layer = _layer(stack, num_layers)
    return Rule(f"bert.encoder.layer.{layer}.{_BERT_BLOCK[inside]}.{suffix}", kernel)


def _newer_norm_names(name: str, block_group_size: int) -> str:
    """Files converted from TensorFlow call a norm's weight `gamma` and its bias `beta`."""
    del block_group_size
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias",
                  re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))  # fmt: skip


BERT = Table(
    rule=bert_rule,
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
    """The rule of one of our parameter paths, such as `blocks/attn/q_proj/kernel`."""
    module, _, leaf = path.rpartition("/")
    kernel = leaf == "kernel"
    if module in _MODERNBERT_TOP:
        return Rule(_MODERNBERT_TOP[module], kernel)
    stack, _, inside = module.partition("/")
    layer = f"model.layers.{_layer(stack, num_layers)}"
    for name, modules in _MODERNBERT_JOINED.items():
        if inside.rpartition("/")[2] in modules:
            return Rule(f"{layer}.{name}.weight", kernel, joined=modules)
    return Rule(f"{layer}.{_MODERNBERT_BLOCK[inside]}.weight", kernel)


def _with_model(name: str, block_group_size: int) -> str:
    """Puts `model.` back, which `clean_name` takes away: the head stands beside the model."""
    del block_group_size
    return name if name.startswith(("head.", "decoder.")) else f"model.{name}"


MODERNBERT = Table(
    rule=modernbert_rule,
    hub_prefix="",
    tied_head=("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    canonical=_with_model,
    ignored=re.compile(r"^model\.(layers\.\d+\.attn\.)?rotary_emb\.[a-z_]*inv_freq$"),
)
