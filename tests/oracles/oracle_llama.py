"""Dream, iLLaDA and SMDM in PyTorch, written plainly as oracles; transformers has the others.

Parameter names are those of the published checkpoints. Not a test; tests import it after putting
this folder on `sys.path`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from oracle import RmsNorm, rope
from torch import nn


def attention(q, k, v, key_valid):
    """Heads [b, heads, l, a] -> [b, l, heads * a]; every query sees the valid keys."""
    b, heads, length, size = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    mask = None
    if key_valid is not None:
        mask = torch.zeros(b, 1, 1, length, dtype=q.dtype)
        mask = mask.masked_fill(~key_valid[:, None, None, :], torch.finfo(q.dtype).min)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(b, length, heads * size)


class DecoderAttention(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c = c
        d, bias = c["hidden_size"], c["model_type"] == "Dream"
        self.size = d // c["num_attention_heads"]
        self.q_proj = nn.Linear(d, d, bias)
        self.k_proj = nn.Linear(d, self.size * c["num_key_value_heads"], bias)
        self.v_proj = nn.Linear(d, self.size * c["num_key_value_heads"], bias)
        self.o_proj = nn.Linear(d, d, False)

    def forward(self, x, key_valid):
        b, length, _ = x.shape
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.view(b, length, -1, self.size).transpose(1, 2) for t in projected)
        theta = self.c["rope_theta"]
        return self.o_proj(attention(rope(q, theta, False), rope(k, theta, False), v, key_valid))


class DecoderMlp(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d, f = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(d, f, False)
        self.up_proj = nn.Linear(d, f, False)
        self.down_proj = nn.Linear(f, d, False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.input_layernorm = RmsNorm(c["hidden_size"], c["rms_norm_eps"], False)
        self.self_attn = DecoderAttention(c)
        self.post_attention_layernorm = RmsNorm(c["hidden_size"], c["rms_norm_eps"], False)
        self.mlp = DecoderMlp(c)

    def forward(self, x, key_valid):
        x = x + self.self_attn(self.input_layernorm(x), key_valid)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Dream (biases on Q, K and V) and iLLaDA (none): Qwen2 and Llama that look both ways."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d, rows = c["hidden_size"], c["vocab_size"]
        blocks = nn.ModuleList(DecoderBlock(c) for _ in range(c["num_hidden_layers"]))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(rows, d),
                "layers": blocks,
                "norm": RmsNorm(d, c["rms_norm_eps"], False),
            }
        )
        self.lm_head = None if c["tie_word_embeddings"] else nn.Linear(d, rows, False)

    @torch.no_grad()
    def forward(self, tokens, key_valid=None):
        """Logits [b, l, v]."""
        x = self.model["embed_tokens"](tokens)
        for block in self.model["layers"]:
            x = block(x, key_valid)
        x = self.model["norm"](x)
        if self.lm_head is None:
            return F.linear(x, self.model["embed_tokens"].weight)
        return self.lm_head(x)


class SmdmAttention(nn.Module):
    """Q, K and V come out of one matrix: for each group its queries, then a key, then a value."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d = c["n_embd"]
        self.groups, self.size = c["n_query_groups"], d // c["n_head"]
        self.queries = c["n_head"] // self.groups
        self.attn = nn.Linear(d, (self.queries + 2) * self.groups * self.size, False)
        self.proj = nn.Linear(d, d, False)

    def forward(self, x, key_valid):
        b, length, _ = x.shape
        fused = self.attn(x).view(b, length, self.groups, self.queries + 2, self.size)
        q, k, v = fused.split([self.queries, 1, 1], dim=3)
        q, k, v = (t.reshape(b, length, -1, self.size).transpose(1, 2) for t in (q, k, v))
        return self.proj(attention(rounded_rope(q), rounded_rope(k), v, key_valid))


def rounded_rope(x):
    """Sines and cosines rounded to bfloat16, then a rotation in float32."""
    half = x.shape[-1] // 2
    inverse = 1.0 / 10000.0 ** (torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float32), inverse)
    cos, sin = angle.cos().bfloat16().float(), angle.sin().bfloat16().float()
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


class SmdmMlp(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d, f = c["n_embd"], c["intermediate_size"]
        linear = {"w1": nn.Linear(d, f, False), "w2": nn.Linear(d, f, False)}
        self.swiglu = nn.ModuleDict({**linear, "w3": nn.Linear(f, d, False)})

    def forward(self, x):
        return self.swiglu["w3"](F.silu(self.swiglu["w1"](x)) * self.swiglu["w2"](x))


class SmdmBlock(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.norm_1 = RmsNorm(c["n_embd"], c["norm_eps"], False)
        self.attn = SmdmAttention(c)
        self.norm_2 = RmsNorm(c["n_embd"], c["norm_eps"], False)
        self.mlp = SmdmMlp(c)

    def forward(self, x, key_valid):
        x = x + self.attn(self.norm_1(x), key_valid)
        return x + self.mlp(self.norm_2(x))


class Smdm(nn.Module):
    """The embedding has one row more than the head: the mask token's."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d, rows = c["n_embd"], c["vocab_size"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows + 1, d),
                "h": nn.ModuleList(SmdmBlock(c) for _ in range(c["n_layer"])),
                "ln_f": RmsNorm(d, c["norm_eps"], False),
            }
        )
        self.lm_head = nn.Linear(d, rows, False)

    @torch.no_grad()
    def forward(self, tokens, key_valid=None):
        """Logits [b, l, v - 1]."""
        x = self.transformer["wte"](tokens)
        for block in self.transformer["h"]:
            x = block(x, key_valid)
        return self.lm_head(self.transformer["ln_f"](x))


def randomise(module: nn.Module, tied: bool, seed: int) -> None:
    """Draws every parameter so that activations, scores and logits are of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                value = (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
            elif "embed_tokens" in name or "wte" in name:
                value = noise * (parameter.shape[1] ** -0.5 if tied else 1.0)
            else:
                value = noise / parameter.shape[1] ** 0.5
            parameter.copy_(value)
    module.eval()
