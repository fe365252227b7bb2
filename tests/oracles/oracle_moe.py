"""LLaDA-MoE and LLaDA2 in PyTorch, written plainly as oracles, and random folders made with them.

Independent of the package: loops over layers and experts, every expert on every token, PyTorch's
own attention kernel. Parameter names are those of the published checkpoints. Ties in a router go to
the lower index (a stable sort); `torch.topk` leaves them open. Not a test; tests import it after
putting this folder on `sys.path`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from oracle import MASK_ID, PAD_ID, RmsNorm, rope, write_folder
from torch import nn

BLOCK = 32


def llada_moe_config(**changes: Any) -> dict[str, Any]:
    """A small `config.json` in LLaDA-MoE's words; `model_type` is what the Hub says."""
    return {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "expert_intermediate_size": 24,
        "dense_intermediate_size": 80,
        "shared_expert_intermediate_size": None,
        "moe_layer_freq": [1, 1, 1],
        "moe_router_enable_expert_bias": False,
        "norm_topk_prob": True,  # the block ignores it
        "qk_layernorm": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "clip_qkv": None,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "mask_token_id": MASK_ID,
        "pad_token_id": PAD_ID,
        **changes,
    }


def llada2_config(**changes: Any) -> dict[str, Any]:
    """A small `config.json` in LLaDA2's words."""
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 80,
        "first_k_dense_replace": 1,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 24,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "hidden_act": "silu",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "rope_theta": 600000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "mask_token_id": MASK_ID,
        "pad_token_id": PAD_ID,
        **changes,
    }


def top(scores, count: int):
    """Values and indices of the largest, of equal ones the lower index first."""
    values, index = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :count], index[..., :count]


class Mlp(nn.Module):
    def __init__(self, d: int, f: int):
        super().__init__()
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def attention(q, k, v, c: dict[str, Any], visible):
    """Rotates the leading channels and attends; q [b, h, l, a], k and v [b, g, l, a]."""
    size, parts = int(q.shape[-1] * c["partial_rotary_factor"]), c.get("parts", 1)

    def turn(x):
        part = x[..., :size].unflatten(2, (parts, -1))
        turned = rope(part, c["rope_theta"], False).flatten(2, 3)
        return torch.cat([turned, x[..., size:]], dim=-1)

    repeats = q.shape[1] // k.shape[1]
    k, v = turn(k).repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    mask = torch.zeros(visible.shape, dtype=q.dtype)
    mask = mask.masked_fill(~visible, torch.finfo(q.dtype).min)[:, None]
    out = F.scaled_dot_product_attention(turn(q), k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def split(x, size: int):
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


class LladaMoeExperts(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.active = c["num_experts_per_tok"]
        self.gate = nn.Linear(c["hidden_size"], c["num_experts"], bias=False)
        width = c["expert_intermediate_size"]
        self.experts = nn.ModuleList(Mlp(c["hidden_size"], width) for _ in range(c["num_experts"]))
        has_bias = c["moe_router_enable_expert_bias"]
        self.register_buffer("expert_bias", torch.zeros(c["num_experts"]) if has_bias else None)

    def forward(self, h):
        weights = torch.softmax(self.gate(h).float(), dim=-1)
        if self.expert_bias is not None:
            weights = weights + self.expert_bias.float()
        weights, index = top(weights, self.active)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            out = out + expert(h) * (weights * (index == e)).sum(-1, keepdim=True).to(h.dtype)
        return out


class LladaMoeLayer(nn.Module):
    def __init__(self, c: dict[str, Any], layer: int):
        super().__init__()
        self.c, d = c, c["hidden_size"]
        self.head = d // c["num_attention_heads"]
        kv, bias, eps = self.head * c["num_key_value_heads"], c["attention_bias"], c["rms_norm_eps"]
        parts = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
        self.self_attn = nn.ModuleDict({n: nn.Linear(*s, bias=bias) for n, s in parts.items()})
        if c["qk_layernorm"]:
            self.self_attn["q_norm"] = RmsNorm(self.head, eps, False)
            self.self_attn["k_norm"] = RmsNorm(self.head, eps, False)
        self.input_layernorm = RmsNorm(d, eps, False)
        self.post_attention_layernorm = RmsNorm(d, eps, False)
        experts = c["moe_layer_freq"][layer] != 0
        self.mlp = LladaMoeExperts(c) if experts else Mlp(d, c["dense_intermediate_size"])
        if experts and c["shared_expert_intermediate_size"]:
            self.shared_expert = Mlp(d, c["shared_expert_intermediate_size"])

    def forward(self, x, visible):
        a, h = self.self_attn, self.input_layernorm(x)
        q, k, v = (split(a[n](h), self.head) for n in ("q_proj", "k_proj", "v_proj"))
        if self.c["qk_layernorm"]:
            q, k = a["q_norm"](q), a["k_norm"](k)
        x = x + a["o_proj"](attention(q, k, v, self.c, visible))
        h = self.post_attention_layernorm(x)
        out = self.mlp(h)
        if hasattr(self, "shared_expert"):
            out = out + self.shared_expert(h)
        return x + out


class Llada2Gate(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.zeros(c["num_experts"], c["hidden_size"]))
        self.register_buffer("expert_bias", torch.zeros(c["num_experts"]))

    def forward(self, h):
        """Weights [.., experts], zero for those that are not chosen; float32."""
        c = self.c
        scores = torch.sigmoid(h.float() @ self.weight.float().T)
        choice = scores + self.expert_bias.float()
        groups = choice.unflatten(-1, (c["n_group"], -1))
        _, kept = top(top(groups, 2)[0].sum(-1), c["topk_group"])
        dropped = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
        choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
        _, index = top(choice, c["num_experts_per_tok"])
        weights = torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index))
        if c["num_experts_per_tok"] > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c["routed_scaling_factor"]


class Llada2Experts(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d, f = c["hidden_size"], c["moe_intermediate_size"]
        self.gate = Llada2Gate(c)
        self.experts = nn.ModuleList(Mlp(d, f) for _ in range(c["num_experts"]))
        if c["num_shared_experts"]:
            self.shared_experts = Mlp(d, f * c["num_shared_experts"])

    def forward(self, h):
        weights = self.gate(h)
        out = sum(e(h).float() * weights[..., i, None] for i, e in enumerate(self.experts))
        out = out.to(h.dtype)
        return out + self.shared_experts(h) if hasattr(self, "shared_experts") else out


class Llada2Layer(nn.Module):
    def __init__(self, c: dict[str, Any], layer: int):
        super().__init__()
        self.c, d, eps = c, c["hidden_size"], c["rms_norm_eps"]
        self.heads, self.kv, self.head = (
            c[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        rows = (self.heads + 2 * self.kv) * self.head
        self.attention = nn.ModuleDict(
            {
                "query_key_value": nn.Linear(d, rows, bias=c["use_qkv_bias"]),
                "dense": nn.Linear(self.heads * self.head, d, bias=c["use_bias"]),
            }
        )
        if c["use_qk_norm"]:
            self.attention["query_layernorm"] = RmsNorm(self.head, eps, False)
            self.attention["key_layernorm"] = RmsNorm(self.head, eps, False)
        self.input_layernorm = RmsNorm(d, eps, False)
        self.post_attention_layernorm = RmsNorm(d, eps, False)
        dense = layer < c["first_k_dense_replace"]
        self.mlp = Mlp(d, c["intermediate_size"]) if dense else Llada2Experts(c)

    def forward(self, x, visible):
        a = self.attention
        joined = split(a["query_key_value"](self.input_layernorm(x)), self.head)
        q, k, v = joined.split([self.heads, self.kv, self.kv], dim=1)
        if self.c["use_qk_norm"]:
            q, k = a["query_layernorm"](q), a["key_layernorm"](k)
        x = x + a["dense"](attention(q, k, v, self.c, visible))
        return x + self.mlp(self.post_attention_layernorm(x))


class MoeModel(nn.Module):
    """Either network: logits in float32, and the final hidden states."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c = c
        second = c["architectures"] == ["LLaDA2MoeModelLM"]
        self.block = BLOCK if second else None
        self.embedding = "word_embeddings" if second else "embed_tokens"
        layer = Llada2Layer if second else LladaMoeLayer
        layers = [layer(c, i) for i in range(c["num_hidden_layers"])]
        self.model = nn.ModuleDict(
            {
                self.embedding: nn.Embedding(c["vocab_size"], c["hidden_size"]),
                "layers": nn.ModuleList(layers),
                "norm": RmsNorm(c["hidden_size"], c["rms_norm_eps"], False),
            }
        )
        self.tied = c["tie_word_embeddings"]
        if not self.tied:
            self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    @torch.no_grad()
    def forward_behind(self, tokens, clean, key_valid):
        """Logits at `tokens` of an input of twice the length, as blocks are trained: they see their
        own block there, and those before it of the clean text."""
        length = tokens.shape[1]
        block = torch.arange(length) // self.block
        own, before = block[:, None] == block, block[:, None] > block
        seen = torch.cat(
            [torch.cat([own, before], 1), torch.cat([torch.zeros_like(own), own | before], 1)]
        )
        self.c["parts"] = 2  # positions begin anew with the clean text
        try:
            visible = seen[None] & key_valid.repeat(1, 2)[:, None, :]
            return self.run(torch.cat([tokens, clean], 1), visible)[0][:, :length]
        finally:
            del self.c["parts"]

    @torch.no_grad()
    def forward(self, tokens, key_valid=None):
        """`tokens` int [b, l]; `key_valid` bool [b, l], or None for all."""
        visible = torch.ones(*tokens.shape, tokens.shape[1], dtype=torch.bool)
        if key_valid is not None:
            visible &= key_valid[:, None, :]
        if self.block:
            block = torch.arange(tokens.shape[1]) // self.block
            visible &= block[None, None, :] <= block[None, :, None]
        return self.run(tokens, visible)

    def run(self, tokens, visible):
        x = self.model[self.embedding](tokens)
        for layer in self.model["layers"]:
            x = layer(x, visible)
        x = self.model["norm"](x)
        head = self.model[self.embedding] if self.tied else self.lm_head
        return F.linear(x, head.weight).float(), x


def random_module(c: dict[str, Any], seed: int) -> MoeModel:
    """A module whose every parameter and buffer is random; activations and logits of order one."""
    module = MoeModel(c)
    generator = torch.Generator().manual_seed(seed)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    with torch.no_grad():
        for name, tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm." in name:
                value = 1.0 + 0.2 * noise
            elif name.endswith("expert_bias"):
                value = noise * (0.2 if "gate." in name else 0.5 / len(tensor))
            elif name.endswith("bias"):
                value = 0.2 * noise
            elif name.endswith(("embed_tokens.weight", "word_embeddings.weight")):
                value = noise * (c["hidden_size"] ** -0.5 if c["tie_word_embeddings"] else 1.0)
            else:
                value = noise / tensor.shape[1] ** 0.5
            tensor.copy_(value)
    return module.eval()


def merged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """dFactory's layout: `mlp.experts.{e}.up_proj.weight` of all e as one `mlp.experts.up_proj`."""
    out, stacks = {}, {}
    for name, tensor in tensors.items():
        before, middle, after = name.partition(".mlp.experts.")
        if not middle:
            out[name] = tensor
            continue
        number, projection, _ = after.split(".")
        stacks.setdefault(f"{before}.mlp.experts.{projection}", {})[int(number)] = tensor
    stacked = {n: torch.stack([t for _, t in sorted(by.items())]) for n, by in stacks.items()}
    return out | stacked


def random_folder(
    path: Path, c: dict[str, Any], seed: int, shards: int = 1, dtype: torch.dtype = torch.float32
) -> MoeModel:
    """Writes a folder with random weights (buffers stay float32) and returns the module."""
    module = random_module(c, seed)
    buffers = {name: tensor.clone() for name, tensor in module.named_buffers()}
    module = module.to(dtype)
    tensors = dict(module.state_dict()) | buffers
    write_folder(path, c, merged(tensors) if "veomni" in c["model_type"] else tensors, shards)
    return module
