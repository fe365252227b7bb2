"""The diffusion transformer of MDLM, BD3-LM and SEDD in PyTorch, written plainly as an oracle.

Independent of the package: loops over layers, fused QKV, one modulation a text, PyTorch's own
attention. Parameter names are SEDD's; folders of the others put `backbone.` before them. Not a
test; tests import it after putting this folder on `sys.path`.
"""

import math
from pathlib import Path
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from torch import nn

MASK_ID = 300


def mdlm_config(**changes: Any) -> dict[str, Any]:
    """A small `config.json` in MDLM's words."""
    return {
        "architectures": ["MDLM"],
        "model_type": "mdlm",
        "vocab_size": MASK_ID + 1,
        "model_length": 256,
        "hidden_dim": 64,
        "cond_dim": 24,
        "n_blocks": 3,
        "n_heads": 4,
        "dropout": 0.1,
        "time_conditioning": False,
        **changes,
    }


def bd3lm_config(**changes: Any) -> dict[str, Any]:
    """A small `config.json` in BD3-LM's words; `block_size` does not divide the length."""
    return {
        **mdlm_config(),
        "architectures": ["BD3LM"],
        "model_type": "bd3lm",
        "block_size": 48,
        "cross_attn": True,
        "adaln": True,
        "attn_backend": "flex",
        "var_min": True,
        "sampling_eps_min": 0.45,
        "sampling_eps_max": 0.95,
        **changes,
    }


def sedd_config(**changes: Any) -> dict[str, Any]:
    """A small training configuration in SEDD's words; `changes` to its model."""
    return {
        "ngpus": 8,
        "tokens": MASK_ID,
        "graph": {"type": "absorb", "file": "data", "report_all": False},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "training": {"ema": 0.9999},
        "model": {
            "name": "small",
            "type": "ddit",
            "hidden_size": 64,
            "cond_dim": 24,
            "length": 256,
            "n_blocks": 3,
            "n_heads": 4,
            "scale_by_sigma": True,
            "dropout": 0.1,
            **changes,
        },
    }


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, [x.shape[-1]], self.weight, None, 1e-5)


class Embedding(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(rows, width))


class Time(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma):
        frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angle = sigma[:, None] * frequency
        return F.silu(self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1)))


class Rotary(nn.Module):
    """Only there because its buffer is stored in the published files."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, size, 2) / size))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, c: int | None):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(d), Norm(d)
        self.attn_qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d)
        )
        if c is not None:
            self.adaLN_modulation = nn.Linear(c, 6 * d)

    def forward(self, x, condition, seen):
        b, length, d = x.shape
        m = [0, 0, 1, 0, 0, 1]
        if condition is not None:
            m = self.adaLN_modulation(condition).view(b, 6, 1, d).unbind(dim=1)
        h = self.norm1(x) * (1 + m[1]) + m[0]
        qkv = self.attn_qkv(h).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q, k = oracle.rope(q, 10000.0, True), oracle.rope(k, 10000.0, True)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        x = x + m[2] * self.attn_out((weights @ v).transpose(1, 2).reshape(b, length, d))
        h = self.norm2(x) * (1 + m[4]) + m[3]
        return x + m[5] * self.mlp(h), weights.mean(dim=1)


class Output(nn.Module):
    def __init__(self, rows: int, d: int, c: int | None):
        super().__init__()
        self.norm_final = Norm(d)
        self.linear = nn.Linear(d, rows)
        if c is not None:
            self.adaLN_modulation = nn.Linear(c, 2 * d)

    def forward(self, x, condition):
        if condition is None:
            return self.linear(self.norm_final(x))
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Dit(nn.Module):
    def __init__(self, rows: int, d: int, c: int | None, layers: int, heads: int):
        super().__init__()
        self.vocab_embed = Embedding(rows, d)
        if c is not None:
            self.sigma_map = Time(c)
        self.rotary_emb = Rotary(d // heads)
        self.blocks = nn.ModuleList(Block(d, heads, c) for _ in range(layers))
        self.output_layer = Output(rows, d, c)

    @torch.no_grad()
    def forward(self, tokens, sigma, block_size: int | None = None):
        """The head's output [b, l, v] and attention averaged over heads and layers [b, l, l].

        With blocks, a position sees its own and those before it.
        """
        x, total = self.vocab_embed.embedding[tokens], 0
        condition = self.sigma_map(sigma) if hasattr(self, "sigma_map") else None
        place = torch.arange(tokens.shape[1]) // (block_size or tokens.shape[1])
        for block in self.blocks:
            x, weights = block(x, condition, place[None] <= place[:, None])
            total = total + weights
        return self.output_layer(x, condition), total / len(self.blocks)

    def by_blocks(self, tokens, clean, block_size: int):
        """The head's output [b, l, v] where each block of `tokens` stands behind clean text: one
        pass a block, over the clean blocks before it and itself, as BD3-LM generates."""
        found = []
        for start in range(0, tokens.shape[1], block_size):
            read = torch.cat([clean[:, :start], tokens[:, start : start + block_size]], dim=1)
            out, _ = self(read, torch.zeros(len(tokens)), block_size)
            found.append(out[:, start:])
        return torch.cat(found, dim=1)


def mdlm_log_p(head, tokens):
    """log p(x0 | x_t) [b, l, v] of the SUBS parametrisation."""
    head = head.clone()
    head[..., MASK_ID] += -1e6
    log_p = torch.log_softmax(head, dim=-1)
    carried = torch.full_like(log_p, -1e6).scatter(-1, tokens[..., None], 0.0)
    return torch.where((tokens == MASK_ID)[..., None], log_p, carried)


def sedd_log_score(head, tokens, sigma):
    """log of p_t(v) / p_t(x_t), as SEDD's network returns it."""
    score = head - torch.log(torch.expm1(sigma))[:, None, None] - math.log(head.shape[-1] - 1)
    return score.scatter(-1, tokens[..., None], 0.0)


def random_folder(path: Path, config: dict[str, Any], seed: int, shards: int = 1) -> Dit:
    """Writes a folder in the family's layout, every parameter random, and returns the module.

    Modulation weights are large enough that the noise level changes all of the output.
    """
    sedd = "graph" in config
    c = config["model"] if sedd else config
    rows = config["tokens"] + 1 if sedd else config["vocab_size"]
    width = c["hidden_size" if sedd else "hidden_dim"]
    condition = c["cond_dim"] if c.get("adaln", True) else None
    module = Dit(rows, width, condition, c["n_blocks"], c["n_heads"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = 1 + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.2 * noise
            elif name.endswith("embedding"):
                value = noise
            else:
                value = noise / parameter.shape[1] ** 0.5
            parameter.copy_(value)
    prefix = "" if sedd else "backbone."
    tensors = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    if c.get("var_min"):
        limits = ("sampling_eps_min", "sampling_eps_max")
        tensors |= {name: torch.tensor(c[name]) for name in limits}
    oracle.write_folder(path, config, tensors, shards)
    return module.eval()
