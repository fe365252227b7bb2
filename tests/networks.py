"""A tiny model of every network. Not a test."""

from sama_jax.models import dit, encoders, moe, transformer

BASE = {"vocab_size": 64, "width": 32, "num_layers": 3, "num_heads": 4, "mlp_width": 48}
LLAMA = {
    **BASE,
    "num_kv_heads": 2,
    "head_size": 8,
    "tied": False,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
}
EVERYTHING = {
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "head_bias": True,
    "norm_bias": True,
}
EXPERTS = moe.Experts(count=8, active=2, width=16, gate="sigmoid", bias=True, shared_width=16)
NETWORKS = {
    "llama, all biases": transformer.TransformerModel(
        arch=transformer.Architecture(**LLAMA, **EVERYTHING, qk_norm="whole"), mask_id=1
    ),
    "experts": transformer.TransformerModel(
        arch=transformer.Architecture(**LLAMA, experts=EXPERTS, first_dense=1, qk_norm="head"),
        mask_id=1,
    ),
    "dit": dit.DitModel(
        arch=dit.DitArchitecture(
            vocab_size=64, width=32, num_layers=3, num_heads=4, condition_width=16, timed=True
        ),
        mask_id=1,
    ),
    "bert": encoders.BertModel(
        arch=encoders.BertArchitecture(**BASE, norm_eps=1e-5, max_length=16, token_types=2),
        mask_id=1,
    ),
    "modernbert": encoders.ModernBertModel(
        arch=encoders.ModernBertArchitecture(
            **BASE,
            norm_eps=1e-5,
            local=(False, True, True),
            reach=4,
            global_theta=1e4,
            local_theta=1e4,
        ),
        mask_id=1,
    ),
}
