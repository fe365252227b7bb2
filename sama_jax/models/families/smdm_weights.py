"""SMDM: lit-gpt's names, Q, K and V in one matrix, head by head.

Source of the names: `lit_gpt/diffmodel.py` of `ML-GSAI/SMDM`, from its modules; no file was opened.
"""

from sama_jax.models.families.weight_table import Fused, Rule, Table

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
    """The fused matrix has `groups` key/value heads, each behind its `queries` query heads.

    The one family whose tensors cannot be split without these numbers, so they are in its name.
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
