"""LLaDA in PyTorch, written plainly as an oracle, and random model folders made with it.

Independent of the package: explicit loops over layers, no stacking, no trimming, PyTorch's own
attention kernel. Parameter names are those of the published checkpoints (`model.transformer...`).
Not a test; tests import it after putting this folder on `sys.path`.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

# Products this small only lose by being split, ten times over when cores are shared.
torch.set_num_threads(1)

MASK_ID = 299
PAD_ID = 298


def config(**changes: Any) -> dict[str, Any]:
    """A small `config.json` in LLaDA's words; `changes` replace or add fields."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": 96,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 6,
        "mlp_hidden_size": 160,
        "activation_type": "silu",
        "block_type": "llama",
        "block_group_size": 1,
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 500000.0,
        "rope_full_precision": True,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "vocab_size": 300,
        "embedding_size": 300,
        "weight_tying": False,
        "max_sequence_length": 512,
        "mask_token_id": MASK_ID,
        "eos_token_id": PAD_ID,
        "pad_token_id": PAD_ID,
        **changes,
    }


class RmsNorm(nn.Module):
    """Normalise in float32, cast back, then scale (and shift) in the parameters' dtype."""

    def __init__(self, width: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        y = x.float()
        y = y / torch.sqrt((y**2).mean(dim=-1, keepdim=True) + self.eps)
        y = self.weight * y.to(x.dtype)
        return y if self.bias is None else y + self.bias


def rope(x, theta: float, full_precision: bool):
    """Rotates `x` [b, heads, l, a]: component j pairs with component j + a/2."""
    length, size = x.shape[-2:]
    inverse = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    y = x.float() if full_precision else x
    cos = torch.cat([angle.cos(), angle.cos()], dim=-1).to(y.dtype)
    sin = torch.cat([angle.sin(), angle.sin()], dim=-1).to(y.dtype)
    low, high = y.chunk(2, dim=-1)
    return (y * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c = c
        d, f = c["d_model"], c["mlp_hidden_size"]
        self.head = d // c["n_heads"]
        kv = self.head * c["n_kv_heads"]
        bias, qkv_bias = c["include_bias"], c["include_bias"] or c["include_qkv_bias"]
        self.attn_norm = _norm(c, d)
        self.ff_norm = _norm(c, d)
        self.q_proj = nn.Linear(d, d, qkv_bias)
        self.k_proj = nn.Linear(d, kv, qkv_bias)
        self.v_proj = nn.Linear(d, kv, qkv_bias)
        self.attn_out = nn.Linear(d, d, bias)
        self.ff_proj = nn.Linear(d, f, bias)
        self.up_proj = nn.Linear(d, f, bias)
        self.ff_out = nn.Linear(f, d, bias)
        if c["attention_layer_norm"]:
            self.q_norm = _norm(c, d)
            self.k_norm = _norm(c, kv)

    def heads(self, x):
        """Rotated queries and keys, and values, all [b, heads, l, a]."""
        c, (b, length, _) = self.c, x.shape
        h = self.attn_norm(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        if c["attention_layer_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(b, length, -1, self.head).transpose(1, 2) for t in (q, k, v))
        q = rope(q, c["rope_theta"], c["rope_full_precision"])
        k = rope(k, c["rope_theta"], c["rope_full_precision"])
        # Query heads 0..r-1 read key head 0, the next r key head 1, and so on.
        repeats = c["n_heads"] // c["n_kv_heads"]
        return q, k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)

    def forward(self, x, key_valid):
        b, length, d = x.shape
        q, k, v = self.heads(x)
        mask = None
        if key_valid is not None:
            mask = torch.zeros(b, 1, 1, length, dtype=q.dtype)
            mask = mask.masked_fill(~key_valid[:, None, None, :], torch.finfo(q.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn_out(out.transpose(1, 2).reshape(b, length, d))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


def _norm(c: dict[str, Any], width: int) -> RmsNorm:
    bias = c["bias_for_layer_norm"]
    return RmsNorm(width, c["rms_norm_eps"], c["include_bias"] if bias is None else bias)


class Llada(nn.Module):
    """Gives logits and hidden states: the input of every block, then the final one."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c = c
        rows = c["embedding_size"] or c["vocab_size"]
        parts: dict[str, nn.Module] = {"wte": nn.Embedding(rows, c["d_model"])}
        parts["ln_f"] = _norm(c, c["d_model"])
        blocks, size = [Block(c) for _ in range(c["n_layers"])], c["block_group_size"]
        if size > 1:
            groups = [nn.ModuleList(blocks[i : i + size]) for i in range(0, len(blocks), size)]
            parts["block_groups"] = nn.ModuleList(groups)
        else:
            parts["blocks"] = nn.ModuleList(blocks)
        if not c["weight_tying"]:
            parts["ff_out"] = nn.Linear(c["d_model"], rows, c["include_bias"])
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})

    def blocks(self) -> list[Block]:
        transformer = self.model["transformer"]
        if "blocks" in transformer:
            return list(transformer["blocks"])
        return [block for group in transformer["block_groups"] for block in group]

    @torch.no_grad()
    def forward(self, tokens, key_valid=None):
        """`tokens` int [b, l]; `key_valid` bool [b, l], or None for attention to every position."""
        c, transformer = self.c, self.model["transformer"]
        x = transformer["wte"](tokens)
        if c["input_emb_norm"]:
            x = x * c["d_model"] ** 0.5
        hidden = []
        for block in self.blocks():
            hidden.append(x)
            x = block(x, key_valid)
        x = transformer["ln_f"](x)
        hidden.append(x)
        if c["weight_tying"]:
            logits = F.linear(x, transformer["wte"].weight)
        else:
            logits = transformer["ff_out"](x)
        if c["scale_logits"]:
            logits = logits * (1 / math.sqrt(c["d_model"]))
        return logits, hidden


@torch.no_grad()
def attention(module: Llada, tokens, key_valid):
    """Attention weights (query, key) averaged over heads and layers, [b, l, l].

    Head by head, and only over the valid keys of a text instead of by a mask.
    """
    total = torch.zeros(*tokens.shape, tokens.shape[1])
    _, inputs = module(tokens, key_valid)
    for block, x in zip(module.blocks(), inputs):
        for q, k, keys, out in zip(*block.heads(x)[:2], key_valid, total):
            for head in range(len(q)):
                scores = q[head].float() @ k[head][keys].float().T / math.sqrt(block.head)
                out[:, keys] += scores.softmax(dim=-1) / (len(q) * module.c["n_layers"])
    return total


def random_module(c: dict[str, Any], seed: int) -> Llada:
    """A module whose every parameter is random, norm scales and all biases included.

    The spread keeps activations, attention scores and logits at order one, so that no part of the
    network is negligible in what comes out.
    """
    module = Llada(c)
    generator = torch.Generator().manual_seed(seed)
    small = c["d_model"] ** -0.5
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm." in name or "ln_f." in name:
                value = (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.2 * noise
            elif name.endswith("wte.weight"):
                value = noise * (small if c["weight_tying"] or c["input_emb_norm"] else 1.0)
            else:
                value = noise / parameter.shape[1] ** 0.5
            parameter.copy_(value)
    return module.eval()


def random_folder(
    path: Path,
    c: dict[str, Any],
    seed: int,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Llada:
    """Writes a model folder with random weights and returns the module that holds the same ones."""
    module = random_module(c, seed).to(dtype)
    write_folder(path, c, dict(module.state_dict()), shards)
    return module


def write_folder(
    path: Path, c: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1
) -> None:
    """Writes `config.json` and the tensors as they are, in one file or in shards with an index.

    Shards are filled by kind of tensor, as on the Hub, so that a block lies in several files.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(c, indent=2))
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata)
        return
    names = sorted(tensors, key=lambda n: (n.split(".")[-2:], n))
    weight_map = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in part}, path / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
